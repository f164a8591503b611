//! Waits for what a queue of a volume answers.

use baton_remote_client::{Completion, VolumeQueue};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::time::{Duration, Instant};

/// So many answers, or those that came within `limit`.
pub(crate) fn collect(
    queue: &mut dyn VolumeQueue,
    count: usize,
    limit: Duration,
) -> Vec<Completion> {
    let until = Instant::now() + limit;
    let mut done = Vec::new();
    queue.poll(&mut done);
    while done.len() < count && Instant::now() < until {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(queue.wake_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left).unwrap()).unwrap();
        queue.poll(&mut done);
    }
    done
}
