//! Connecting to a unix socket whose owner may be frozen.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;

/// Between two tries at a full queue of connections.
const PAUSE: Duration = Duration::from_millis(20);

/// Connects, and waits while the listener's queue is full: QEMU's monitor has
/// room for one that was not accepted yet, so a frozen QEMU fills it at once,
/// and the kernel then refuses instead of waiting. The caller sets a limit.
pub(crate) async fn connect(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(PAUSE).await;
            }
            done => return done,
        }
    }
}
