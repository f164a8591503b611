//! One thread that makes data durable for everybody.
//!
//! All FLUSHes that wait when a sync starts are answered by it; those that come
//! while it runs wait for the next one, because data that was acknowledged after
//! the sync began need not be part of it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use baton_protocol::Status;

use crate::gate::{Gate, Pass};
use crate::metrics::FlushMetrics;
use crate::store::Store;

use super::mailbox::{Done, Mailbox, Message};

/// A FLUSH that waits.
#[derive(Debug)]
pub(super) struct FlushJob {
    pub(super) answer_to: Arc<Mailbox>,
    pub(super) done: Done,
    /// Inside the gate until the sync is over.
    pub(super) pass: Pass<Arc<Gate>>,
}

/// Hands FLUSHes to the thread.
#[derive(Debug, Default)]
pub(crate) struct Flusher {
    state: Mutex<State>,
    work: Condvar,
    /// What it counts.
    pub(crate) metrics: FlushMetrics,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<FlushJob>,
    stop: bool,
}

impl Flusher {
    pub(crate) fn start(self: &Arc<Self>, store: Arc<Store>) -> std::io::Result<JoinHandle<()>> {
        let flusher = Arc::clone(self);
        std::thread::Builder::new().name("flusher".into()).spawn(move || flusher.run(&store))
    }

    pub(super) fn push(&self, job: FlushJob) {
        self.state().waiting.push(job);
        self.work.notify_one();
    }

    /// Ends the thread when it has answered all.
    pub(crate) fn stop(&self) {
        self.state().stop = true;
        self.work.notify_one();
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, store: &Store) {
        let mut batch = Vec::new();
        loop {
            {
                let mut state = self.state();
                while state.waiting.is_empty() {
                    if state.stop {
                        return;
                    }
                    state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                std::mem::swap(&mut state.waiting, &mut batch);
            }
            let begun = Instant::now();
            let status = match store.sync() {
                Ok(()) => Status::Ok,
                Err(error) => {
                    tracing::error!(%error, "a flush failed");
                    Status::Io
                }
            };
            self.metrics.synced(begun.elapsed(), batch.len());
            for FlushJob { answer_to, mut done, pass } in batch.drain(..) {
                drop(pass);
                done.status = status;
                answer_to.send(Message::Done(done));
            }
        }
    }
}
