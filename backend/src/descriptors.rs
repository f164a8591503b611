//! Room for open files: the limit, and the kernel's table.

use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::close;

use crate::config::DiskConfig;

/// A listener, a front-end and its memory regions, two connections' worth of the volume.
const PER_DISK: u64 = 32;
/// Kick, call and error events, a connection to the storage and what waits for them.
const PER_QUEUE: u64 = 12;
/// The log, the control socket and its clients, what a runtime opens.
const OF_THE_PROCESS: u64 = 64;

/// Raises the limit of open files to what the system allows, and makes the kernel's table as long as these disks
/// need. Called before there are threads: a table that grows under threads waits for an RCU grace period, some
/// milliseconds, and it would grow when a front-end starts its rings.
///
/// # Errors
/// That of the system. The table grows when it must, then.
pub fn make_room(disks: &[DiskConfig]) -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let wanted = wanted(disks.iter().map(|disk| disk.options.num_queues));
    let last = i32::try_from(wanted.min(hard.saturating_sub(1))).unwrap_or(i32::MAX);
    let any = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
    Ok(close(fcntl(&any, FcntlArg::F_DUPFD_CLOEXEC(last))?)?)
}

fn wanted(queues: impl Iterator<Item = u16>) -> u64 {
    queues.fold(OF_THE_PROCESS, |sum, queues| sum + PER_DISK + PER_QUEUE * u64::from(queues))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_disk_and_every_queue_counts() {
        assert_eq!(wanted([].into_iter()), 64);
        assert_eq!(wanted([1, 4].into_iter()), 64 + 44 + 80);
    }
}
