//! The time slice that a worker asks the kernel for.
//!
//! A worker runs for microseconds and sleeps. With a slice shorter than others have, the kernel takes it before them when
//! it is woken, and whom its answer wakes does not take its place before it is asleep again (EEVDF, Linux 6.12; older
//! kernels do not look at it). It gets no more of the processor than before.

use nix::errno::Errno;

/// Others have 700,000 to 2,800,000, by the number of CPUs. With the shortest there is, 100,000, a worker also keeps
/// clients on its own CPU from bringing several requests at a time.
const SHORT_NS: u64 = 300_000;
/// What has slices: SCHED_OTHER and SCHED_BATCH.
const FAIR: [u32; 2] = [libc::SCHED_OTHER as u32, libc::SCHED_BATCH as u32];

/// Asks for a short slice for this thread. Whoever runs the server under another policy knows better.
///
/// # Errors
/// What the kernel says; nothing has changed.
pub fn ask_for_short() -> nix::Result<()> {
    let mut now = attributes(0)?;
    if !FAIR.contains(&now.sched_policy) {
        return Ok(());
    }
    now.sched_runtime = SHORT_NS;
    // SAFETY: the structure lives over the call and has its size in it.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const now, 0) }).map(drop)
}

/// How a thread is scheduled; 0 is this one.
fn attributes(thread: libc::pid_t) -> nix::Result<libc::sched_attr> {
    // SAFETY: zeros are a value of it.
    let mut now: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of_val(&now);
    // SAFETY: the kernel writes at most `size` bytes.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, thread, &raw mut now, size, 0) };
    Errno::result(got).map(|_| now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_asks_for_itself_only() {
        std::thread::spawn(|| {
            let before = attributes(0).expect("told");
            ask_for_short().expect("granted");
            let after = attributes(0).expect("told");
            assert_eq!(
                (after.sched_policy, after.sched_nice),
                (before.sched_policy, before.sched_nice)
            );
            // Older kernels have no slice to tell of.
            let expected = if before.sched_runtime == 0 { 0 } else { SHORT_NS };
            assert_eq!(after.sched_runtime, expected);
        })
        .join()
        .expect("no panic");
        assert_ne!(attributes(0).expect("told").sched_runtime, SHORT_NS);
    }
}
