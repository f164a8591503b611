//! A few threads for work that may wait for the disk: large discards, and reads
//! of data that is not in memory when io_uring cannot be used.
//!
//! The number of waiting jobs is bounded by the connections' own bounds.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::gate::{Gate, Pass};

use super::mailbox::{Done, Mailbox, Message};

/// Disk waits overlap; more threads than this do not help one disk.
const THREADS: usize = 4;

/// Runs one request and says how it ended.
pub(super) type Work = Box<dyn FnOnce(Done) -> Done + Send>;

pub(super) struct Job {
    pub(super) answer_to: Arc<Mailbox>,
    pub(super) done: Done,
    pub(super) work: Work,
    /// Inside the gate until the work is over.
    pub(super) pass: Pass<Arc<Gate>>,
}

/// Hands jobs to the threads.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    stop: bool,
}

impl Pool {
    pub(crate) fn start(self: &Arc<Self>) -> std::io::Result<Vec<JoinHandle<()>>> {
        let start = |n: usize| {
            let pool = Arc::clone(self);
            std::thread::Builder::new().name(format!("disk-{n}")).spawn(move || pool.run())
        };
        (0..THREADS).map(start).collect()
    }

    pub(super) fn push(&self, job: Job) {
        self.state().jobs.push_back(job);
        self.work.notify_one();
    }

    /// Ends the threads when the jobs are done.
    pub(crate) fn stop(&self) {
        self.state().stop = true;
        self.work.notify_all();
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let job = {
                let mut state = self.state();
                loop {
                    if let Some(job) = state.jobs.pop_front() {
                        break job;
                    }
                    if state.stop {
                        return;
                    }
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let Job { answer_to, done, work, pass } = job;
            let done = work(done);
            drop(pass);
            answer_to.send(Message::Done(done));
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("waiting", &self.state().jobs.len()).finish_non_exhaustive()
    }
}
