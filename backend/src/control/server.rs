//! The control socket: lines in, lines out, on threads of their own.
//!
//! Knows no command: [`Vm::answer`] does. Bounded in clients, in the length of
//! a line and in the time a client may take to read an answer, so that nothing
//! a client does costs more than one of the places.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Refusal, RefusalKind, Vm, line_of};
use crate::disk::{Shutdown, wait_readable};
use crate::socket::FrontEnds;

/// Most clients at a time. The agent, an operator and a monitor want one each.
pub const CLIENTS_MAX: usize = 8;
/// Longest line of a request, bytes; no command is a hundredth of it.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// A client that does not read its answer for this long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A client's thread: its buffers are on the heap.
const STACK_BYTES: usize = 256 << 10;

/// The running server. Dropping it ends it and removes the socket.
#[derive(Debug)]
pub struct ControlServer {
    shutdown: Arc<Shutdown>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Answers for `vm` whoever connects.
    ///
    /// # Errors
    /// When the process is out of threads or descriptors.
    pub fn spawn(socket: FrontEnds, vm: Arc<Vm>) -> io::Result<Self> {
        let shutdown = Arc::new(Shutdown::new()?);
        let ours = Arc::clone(&shutdown);
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || accept_all(socket, &vm, &ours))?;
        Ok(Self { shutdown, thread: Some(thread) })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shutdown.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept_all(mut socket: FrontEnds, vm: &Arc<Vm>, shutdown: &Arc<Shutdown>) {
    // Every client holds one more count of it.
    let places = Arc::new(());
    while let Some(listener) = socket.as_fd() {
        if !wait_readable(listener, shutdown) {
            return;
        }
        let accepted = socket.accept().and_then(|stream| {
            stream.set_nonblocking(false)?;
            stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
            Ok(stream)
        });
        let mut stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a control client could not be accepted");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if Arc::strong_count(&places) > CLIENTS_MAX {
            let _ = refuse(
                &mut stream,
                RefusalKind::TooManyClients,
                format!("{CLIENTS_MAX} clients are connected; close one and try again"),
            );
            continue;
        }
        let (vm, shutdown, place) = (Arc::clone(vm), Arc::clone(shutdown), Arc::clone(&places));
        let serve = move || {
            // It went away, which is its own matter.
            let _ = serve(stream, &vm, &shutdown);
            drop(place);
        };
        let client = thread::Builder::new().name("control-client".to_owned());
        if let Err(error) = client.stack_size(STACK_BYTES).spawn(serve) {
            tracing::warn!(%error, "a control client got no thread");
        }
    }
}

/// Serves one client until it closes, sends too long a line, or the end.
fn serve(mut stream: UnixStream, vm: &Vm, shutdown: &Shutdown) -> io::Result<()> {
    let mut pending = Vec::new();
    let mut chunk = [0; 4096];
    while wait_readable(stream.as_fd(), shutdown) {
        let got = stream.read(&mut chunk)?;
        if got == 0 {
            return Ok(());
        }
        pending.extend_from_slice(&chunk[..got]);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let line = line.trim_ascii();
            if !line.is_empty() {
                write_line(&mut stream, vm.answer(line))?;
            }
        }
        if pending.len() > LINE_BYTES_MAX {
            let detail = format!("a request has at most {LINE_BYTES_MAX} bytes");
            return refuse(&mut stream, RefusalKind::BadRequest, detail);
        }
    }
    Ok(())
}

fn refuse(stream: &mut UnixStream, kind: RefusalKind, detail: String) -> io::Result<()> {
    write_line(stream, line_of(Err(Refusal::new(kind, detail))))
}

fn write_line(stream: &mut UnixStream, mut line: String) -> io::Result<()> {
    line.push('\n');
    stream.write_all(line.as_bytes())
}
