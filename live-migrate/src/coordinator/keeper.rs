//! Keeps one handoff: one task that owns its row, writes it before anything it
//! makes due, and has what is due carried out.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use super::carry_out::carry_out;
use super::core::{Core, unix_us};
use super::journal::{Change, Event, JournalError};
use super::plan::{Action, Input, Output, Refusal, Row, Trouble};

/// Messages waiting for a row; its actions send a few each.
const MESSAGES_MAX: usize = 64;
/// Between two tries at a journal that fails.
const JOURNAL_PAUSE: Duration = Duration::from_millis(500);

/// Why a request was not granted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AskError {
    /// The row does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The coordinator ends.
    #[error("the coordinator is going away; ask its successor")]
    Gone,
}

enum Message {
    /// Of which attempt: what is late says nothing about the next.
    Learned(u32, Input),
    Asked(Input, oneshot::Sender<Result<(), AskError>>),
}

/// Where actions report.
#[derive(Clone, Debug)]
pub(super) struct Reports {
    to: mpsc::Sender<Message>,
    attempt: u32,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Learned(_, input) | Self::Asked(input, _) => input.fmt(f),
        }
    }
}

impl Reports {
    /// Waits for room; whoever reports may be aborted meanwhile.
    pub(super) async fn tell(&self, input: Input) {
        // The keeper ends only with the coordinator.
        let _ = self.to.send(Message::Learned(self.attempt, input)).await;
    }
}

/// A handoff that is kept, as long as there is a handle.
#[derive(Clone, Debug)]
pub struct Handle {
    messages: mpsc::Sender<Message>,
    shown: watch::Receiver<Arc<Row>>,
    _task: Arc<EndOnDrop>,
}

#[derive(Debug)]
struct EndOnDrop(AbortHandle);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Handle {
    /// The row now.
    #[must_use]
    pub fn row(&self) -> Arc<Row> {
        Arc::clone(&self.shown.borrow())
    }

    /// Sees every change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<Row>> {
        self.shown.clone()
    }

    /// Asks, and returns when the answer is durable.
    ///
    /// # Errors
    /// [`AskError`].
    pub async fn ask(&self, input: Input) -> Result<Arc<Row>, AskError> {
        let (done, answer) = oneshot::channel();
        self.messages.send(Message::Asked(input, done)).await.map_err(|_| AskError::Gone)?;
        answer.await.map_err(|_| AskError::Gone)??;
        Ok(self.row())
    }
}

/// Begins to keep a row. `Ok` when it is durable.
///
/// # Errors
/// The journal did not take it; nothing was started.
pub(super) async fn keep(core: &Arc<Core>, row: Row) -> Result<Handle, AskError> {
    let (messages, inbox) = mpsc::channel(MESSAGES_MAX);
    let (show, shown) = watch::channel(Arc::new(row.clone()));
    let keeper = Keeper {
        core: Arc::clone(core),
        row,
        reports: messages.clone(),
        show,
        running: HashMap::new(),
    };
    let (done, started) = oneshot::channel();
    let task = Arc::new(EndOnDrop(tokio::spawn(keeper.run(inbox, done)).abort_handle()));
    started.await.map_err(|_| AskError::Gone)??;
    Ok(Handle { messages, shown, _task: task })
}

struct Keeper {
    core: Arc<Core>,
    row: Row,
    reports: mpsc::Sender<Message>,
    show: watch::Sender<Arc<Row>>,
    running: HashMap<Action, AbortHandle>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        for (_, action) in self.running.drain() {
            action.abort();
        }
    }
}

impl Keeper {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Message>,
        started: oneshot::Sender<Result<(), AskError>>,
    ) {
        let new = self.row.version == 0;
        let first = if new { self.apply(Input::Start).await } else { Ok(()) };
        let failed = first.is_err();
        // Who asked may have gone; the row is durable all the same.
        let _ = started.send(first);
        if failed {
            return;
        }
        if !new {
            self.insist(Input::Start).await;
        }
        while let Some(message) = inbox.recv().await {
            match message {
                Message::Learned(attempt, _) if attempt != self.row.attempt => {}
                Message::Learned(_, input) => self.insist(input).await,
                Message::Asked(input, done) => {
                    let _ = done.send(self.apply(input).await);
                }
            }
        }
    }

    /// What was learned stays true while the journal fails.
    async fn insist(&mut self, input: Input) {
        loop {
            match self.apply(input.clone()).await {
                Err(AskError::Journal(_)) => tokio::time::sleep(JOURNAL_PAUSE).await,
                Ok(()) | Err(AskError::Refused(_) | AskError::Gone) => return,
            }
        }
    }

    async fn apply(&mut self, input: Input) -> Result<(), AskError> {
        let step = self.row.step(input)?;
        let mut row = step.row;
        let now = unix_us();
        if row.state != self.row.state || row.reached.is_empty() {
            row.reached.push((row.state, now));
        }
        row.term = self.core.term;
        if step.outputs.contains(&Output::Journal) {
            let events = step.outputs.iter().filter_map(|output| event(&row, output, now));
            let mut events: Vec<Event> = events.collect();
            if row.cooperation.forced != self.row.cooperation.forced
                && let Some(reason) = &row.cooperation.forced
            {
                let data = json!({"id": row.id.to_string(), "vm": row.vm, "from": row.from,
                    "to": row.to, "reason": reason});
                events.push(told(&row, "baton.handoff.forced", now, data));
            }
            if row.driven != self.row.driven
                && let Some(driven) = &row.driven
            {
                let data = json!({"id": row.id.to_string(), "step": driven["step"]});
                events.push(told(&row, "baton.migration.step", now, data));
            }
            let change = Change { row: Some(row.clone()), events, ..Change::default() };
            self.core.journal.write(change).await?;
            self.row = row;
            self.show.send_replace(Arc::new(self.row.clone()));
        }
        for output in step.outputs {
            match output {
                Output::Journal => {}
                Output::Tell(state) => {
                    self.core.metrics.reached(state);
                    tracing::info!(handoff = %self.row.id, vm = self.row.vm, from = self.row.from,
                        to = self.row.to, attempt = self.row.attempt, %state, "handoff");
                }
                Output::TellTrouble(Trouble { kind, detail }) => {
                    tracing::warn!(handoff = %self.row.id, vm = self.row.vm, kind, detail, "handoff is hindered");
                }
                Output::Begin(action) => self.begin(action),
                Output::End(action) => {
                    if let Some(task) = self.running.remove(&action) {
                        task.abort();
                    }
                }
                Output::StepDown => self.core.step_down("a storage server has heard a higher term"),
            }
        }
        Ok(())
    }

    fn begin(&mut self, action: Action) {
        let row = Arc::new(self.row.clone());
        let reports = Reports { to: self.reports.clone(), attempt: row.attempt };
        let task = carry_out(Arc::clone(&self.core), row, action, reports);
        let task = tokio::spawn(task).abort_handle();
        if let Some(old) = self.running.insert(action, task) {
            old.abort();
        }
    }
}

fn event(row: &Row, output: &Output, now: u64) -> Option<Event> {
    let outcome = row.outcome().map(super::plan::Winner::name);
    let id = row.id.to_string();
    match output {
        Output::Tell(state) => Some(told(
            row,
            "baton.handoff.state",
            now,
            json!({"id": id, "vm": row.vm, "from": row.from, "to": row.to,
                "state": state.name(), "attempt": row.attempt, "outcome": outcome}),
        )),
        Output::TellTrouble(trouble) => Some(told(
            row,
            "baton.handoff.trouble",
            now,
            json!({"id": id, "vm": row.vm, "type": trouble.kind, "detail": trouble.detail}),
        )),
        _ => None,
    }
}

fn told(row: &Row, kind: &str, at_unix_us: u64, data: serde_json::Value) -> Event {
    let subject = format!("vms/{}/handoffs/{}", row.vm, row.id);
    Event { seq: 0, kind: kind.to_owned(), subject, at_unix_us, data }
}
