//! The books against a world that knows every change: named cases, and random
//! schedules of answers, sleeping queues, kills and power losses.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

fn books(queues: usize) -> Vec<Account> {
    let ledger = Arc::<Ledger>::default();
    let accounts: Vec<_> = (0..queues).map(|_| ledger.open()).collect();
    accounts.iter().for_each(|account| account.welcomed(1));
    accounts
}

const TOLD: Result<(), IoError> = Err(IoError::Io);
const FINE: Result<(), IoError> = Ok(());

fn flush(account: &Account) -> Result<(), IoError> {
    account.flush_answered(account.flush_begins())
}

#[test]
fn a_loss_is_told_once() {
    let mut q = books(2);
    q[0].acknowledged();
    q[1].acknowledged();
    q[1].welcomed(2);
    assert_eq!(q[1].take_lost(), 2);
    q[0].welcomed(2);
    assert_eq!(q[0].take_lost(), 0);
    assert_eq!(flush(&q[0]), TOLD);
    assert_eq!(flush(&q[0]), FINE);
    assert_eq!(flush(&q[1]), FINE);
    // Nor by the next power loss: it takes nothing more.
    q.iter().for_each(|account| account.welcomed(3));
    assert_eq!((flush(&q[0]), q[0].take_lost()), (FINE, 0));
    // Not even when no flush succeeded between the two.
    q[0].acknowledged();
    q[0].welcomed(4);
    assert_eq!((flush(&q[0]), q[0].take_lost()), (TOLD, 1));
    q.iter().for_each(|account| account.welcomed(5));
    assert_eq!((flush(&q[0]), q[0].take_lost()), (FINE, 0));
}

#[test]
fn what_a_flush_covered_is_not_lost() {
    let mut q = books(2);
    q[0].acknowledged();
    q[1].acknowledged();
    assert_eq!(flush(&q[0]), FINE);
    q.iter().for_each(|account| account.welcomed(2));
    assert_eq!((flush(&q[1]), q[1].take_lost()), (FINE, 0));
    // A restart without a power loss, and a server that says nothing.
    q[0].acknowledged();
    q.iter().for_each(|account| account.welcomed(2));
    q.iter().for_each(|account| account.welcomed(0));
    q[0].acknowledged();
    assert_eq!((flush(&q[1]), q[1].take_lost()), (FINE, 0));
}

#[test]
fn a_flush_covers_what_was_acknowledged_before_its_submission() {
    let mut q = books(2);
    q[0].acknowledged();
    let mark = q[0].flush_begins();
    q[1].acknowledged();
    assert_eq!(q[0].flush_answered(mark), FINE);
    q[0].welcomed(2);
    assert_eq!((flush(&q[0]), q[0].take_lost()), (TOLD, 1));
}

#[test]
fn every_flush_in_flight_over_the_loss_fails() {
    let mut q = books(3);
    q[0].acknowledged();
    let marks: Vec<_> = q.iter().map(Account::flush_begins).collect();
    q.iter().for_each(|account| account.welcomed(2));
    for (account, mark) in q.iter().zip(marks) {
        assert_eq!(account.flush_answered(mark), TOLD);
    }
    assert_eq!(flush(&q[0]), FINE, "they have told it");
}

#[test]
fn an_answer_from_before_the_loss_that_is_taken_in_after_it_is_lost_too() {
    // The straggler finds it itself.
    let mut q = books(2);
    q[0].welcomed(2);
    q[1].acknowledged();
    q[1].welcomed(2);
    assert_eq!((flush(&q[1]), q[1].take_lost()), (TOLD, 1));
    // A FLUSH of another queue comes first.
    let mut q = books(2);
    q[0].welcomed(2);
    q[1].acknowledged();
    assert_eq!((flush(&q[0]), q[0].take_lost()), (TOLD, 1));
    q[1].welcomed(2);
    assert_eq!((flush(&q[0]), q[0].take_lost()), (FINE, 0));
    // It is closed first; who opens that number next is not to blame.
    let mut q = books(2);
    q[0].welcomed(2);
    q[1].acknowledged();
    drop(q.pop());
    let next = q[0].ledger().open();
    next.welcomed(2);
    assert_eq!((flush(&next), next.take_lost()), (TOLD, 1));
    assert_eq!(flush(&q[0]), FINE);
}

#[test]
fn what_closed_queues_acknowledged_still_counts() {
    let mut q = books(2);
    q[1].acknowledged();
    drop(q.pop());
    q[0].welcomed(2);
    assert_eq!((flush(&q[0]), q[0].take_lost()), (TOLD, 1));
}

#[test]
fn a_server_that_begins_to_say_its_generation_has_lost_nothing() {
    let mut account = Arc::<Ledger>::default().open();
    account.welcomed(0);
    account.acknowledged();
    account.welcomed(7);
    assert_eq!(flush(&account), FINE);
    account.acknowledged();
    account.welcomed(0);
    account.welcomed(8);
    assert_eq!(flush(&account), TOLD);
}

#[test]
fn a_lower_generation_is_not_trusted() {
    let mut q = books(2);
    q[0].welcomed(2);
    q[1].welcomed(1);
    q[1].acknowledged();
    assert_eq!(flush(&q[0]), TOLD);
    q[1].welcomed(2);
    q[1].acknowledged();
    assert_eq!(flush(&q[0]), FINE);
}

// The world.

const QUEUES: usize = 3;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(usize),
    Flush(usize),
    /// The server takes a queue's next request.
    Serve(usize),
    /// A queue takes in its next answer.
    Receive(usize),
    Kill,
    PowerLoss,
    /// A queue gives its dead connection up and makes another.
    Reconnect(usize),
    /// A queue does all it can, while the others sleep.
    Awake(usize),
    /// A queue is closed with what it has in flight, and opened again.
    Reopen(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..QUEUES;
    prop_oneof![
        4 => queue.clone().prop_map(Step::Write),
        3 => queue.clone().prop_map(Step::Flush),
        8 => queue.clone().prop_map(Step::Serve),
        8 => queue.clone().prop_map(Step::Receive),
        1 => Just(Step::Kill),
        3 => Just(Step::PowerLoss),
        3 => queue.clone().prop_map(Step::Reconnect),
        4 => queue.clone().prop_map(Step::Awake),
        1 => queue.prop_map(Step::Reopen),
    ]
}

#[derive(Clone, Copy, Debug)]
enum Message {
    Welcome(u64),
    /// Index of a write or of a flush.
    Write(usize),
    Flush(usize),
}

#[derive(Default)]
struct Change {
    /// The guest saw it complete, in this step.
    completed: Option<usize>,
    /// The server ran it in this generation and no sync came after.
    cached: Option<u64>,
    /// A FLUSH that had it in its past succeeded.
    covered: bool,
    /// The step in which the client first heard of a power loss and could not know
    /// that this had been saved.
    doubted: Option<usize>,
    /// A FLUSH failed after it was lost.
    told: bool,
}

struct Barrier {
    mark: Mark,
    submitted: usize,
    /// Changes that had completed by then.
    past: Vec<usize>,
}

#[derive(Default)]
struct Queue {
    account: Option<Account>,
    unanswered: VecDeque<Message>,
    /// Not served yet on this connection.
    sent: VecDeque<Message>,
    answers: VecDeque<Message>,
    alive: bool,
}

struct World {
    ledger: Arc<Ledger>,
    generation: u64,
    /// The newest that any queue has heard.
    heard: u64,
    queues: Vec<Queue>,
    changes: Vec<Change>,
    barriers: Vec<Barrier>,
    now: usize,
    excused: Vec<bool>,
    failed: usize,
}

impl World {
    fn new() -> Self {
        let ledger = Arc::<Ledger>::default();
        let queues = (0..QUEUES).map(|_| Queue::default()).collect();
        let (changes, barriers, excused) = (Vec::new(), Vec::new(), Vec::new());
        let (generation, heard) = (1, 1);
        let mut world = Self {
            ledger,
            generation,
            heard,
            queues,
            changes,
            barriers,
            now: 0,
            excused,
            failed: 0,
        };
        for queue in &mut world.queues {
            queue.account = Some(world.ledger.open());
            queue.connect(1);
        }
        world
    }

    /// Acknowledged, and not on the server's disk any more.
    fn is_lost(&self, change: &Change) -> bool {
        change.completed.is_some() && change.cached.is_some_and(|g| g < self.generation)
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        self.now += 1;
        match step {
            Step::Write(q) => {
                let message = Message::Write(self.changes.len());
                self.changes.push(Change::default());
                self.queues[q].submit(message);
            }
            Step::Flush(q) => {
                let completed = |w: &usize| self.changes[*w].completed.is_some();
                let past = (0..self.changes.len()).filter(completed).collect();
                let mark = self.queues[q].account.as_ref().expect("open").flush_begins();
                let message = Message::Flush(self.barriers.len());
                self.barriers.push(Barrier { mark, submitted: self.now, past });
                self.queues[q].submit(message);
            }
            Step::Serve(q) => self.serve(q),
            Step::Receive(q) => return self.receive(q),
            Step::Kill => self.queues.iter_mut().for_each(|queue| queue.alive = false),
            Step::PowerLoss => {
                self.queues.iter_mut().for_each(|queue| queue.alive = false);
                self.generation += 1;
            }
            Step::Reconnect(q) if !self.queues[q].alive => {
                self.queues[q].connect(self.generation);
            }
            Step::Reconnect(_) => {}
            Step::Awake(q) => {
                self.finish(q)?;
                self.step(Step::Reconnect(q))?;
                self.finish(q)?;
            }
            Step::Reopen(q) => {
                self.queues[q].account = None;
                self.queues[q].unanswered.clear();
                self.queues[q].account = Some(self.ledger.open());
                self.queues[q].connect(self.generation);
            }
        }
        Ok(())
    }

    fn serve(&mut self, q: usize) {
        if !self.queues[q].alive {
            return;
        }
        let Some(message) = self.queues[q].sent.pop_front() else { return };
        match message {
            Message::Write(w) => self.changes[w].cached = Some(self.generation),
            Message::Flush(_) => {
                for change in &mut self.changes {
                    if change.cached == Some(self.generation) {
                        change.cached = None;
                    }
                }
            }
            Message::Welcome(_) => unreachable!("a server's word"),
        }
        self.queues[q].answers.push_back(message);
    }

    fn receive(&mut self, q: usize) -> Result<(), TestCaseError> {
        let queue = &mut self.queues[q];
        let Some(message) = queue.answers.pop_front() else { return Ok(()) };
        let account = queue.account.as_mut().expect("open");
        match message {
            Message::Welcome(generation) => {
                account.welcomed(generation);
                queue.sent = queue.unanswered.clone();
                if generation > self.heard {
                    self.heard = generation;
                    for change in &mut self.changes {
                        let open = change.completed.is_some() && !change.covered;
                        if open && change.doubted.is_none() {
                            change.doubted = Some(self.now);
                        }
                    }
                }
            }
            Message::Write(w) => {
                account.acknowledged();
                queue.unanswered.pop_front();
                let change = &mut self.changes[w];
                change.completed = Some(self.now);
                // Taken in late: answered before a power loss that is known already.
                if change.cached.is_some_and(|generation| generation < self.heard) {
                    change.doubted = Some(self.now);
                }
            }
            Message::Flush(f) => {
                let verdict = account.flush_answered(self.barriers[f].mark);
                queue.unanswered.pop_front();
                return self.judge(f, verdict.is_ok());
            }
        }
        Ok(())
    }

    fn judge(&mut self, f: usize, success: bool) -> Result<(), TestCaseError> {
        let barrier = &self.barriers[f];
        if success {
            for &w in &barrier.past {
                let change = &self.changes[w];
                // Told by another FLUSH, unless this one was in flight when it was found.
                let found_after = change.doubted.is_some_and(|at| at > barrier.submitted);
                let fine = !self.is_lost(change) || (change.told && !found_after);
                prop_assert!(fine, "flush {f} lied about {w}");
            }
            for &w in &barrier.past {
                self.changes[w].covered = true;
            }
            return Ok(());
        }
        self.failed += 1;
        let excuse = |c: &Change| c.doubted.is_some_and(|at| !c.told || at > barrier.submitted);
        let excused = self.changes.iter().any(excuse);
        self.excused.push(excused);
        for w in 0..self.changes.len() {
            let lost = self.is_lost(&self.changes[w]);
            self.changes[w].told |= lost || self.changes[w].doubted.is_some();
        }
        Ok(())
    }

    fn finish(&mut self, q: usize) -> Result<(), TestCaseError> {
        loop {
            self.serve(q);
            if self.queues[q].answers.is_empty() {
                return Ok(());
            }
            self.step(Step::Receive(q))?;
        }
    }

    fn drain(&mut self) -> Result<(), TestCaseError> {
        for q in 0..QUEUES {
            while !self.queues[q].answers.is_empty() {
                self.step(Step::Receive(q))?;
            }
        }
        Ok(())
    }
}

impl Queue {
    fn connect(&mut self, generation: u64) {
        self.alive = true;
        self.sent.clear();
        self.answers = VecDeque::from([Message::Welcome(generation)]);
    }

    fn submit(&mut self, message: Message) {
        self.unanswered.push_back(message);
        // Before the WELCOME nothing is sent; then everything unanswered is.
        if self.alive && !matches!(self.answers.front(), Some(Message::Welcome(_))) {
            self.sent.push_back(message);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Whatever sleeps, is late, is closed or reconnects in whatever order.
    #[test]
    fn a_flush_never_lies(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in steps {
            world.step(step)?;
        }
    }

    /// Queues that are awake take in what was answered before they reconnect.
    #[test]
    fn a_flush_fails_only_when_something_not_flushed_may_be_gone(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new();
        for step in steps {
            if matches!(step, Step::Kill | Step::PowerLoss) {
                world.drain()?;
            }
            world.step(step)?;
            prop_assert!(world.excused.iter().all(|excused| *excused), "a false alarm");
        }
    }
}

/// The schedules above do meet what they are about.
#[test]
fn the_worlds_simplest_loss_is_noticed() {
    let mut world = World::new();
    use Step::*;
    for step in [
        Receive(0),
        Receive(1),
        Write(0),
        Serve(0),
        Receive(0),
        PowerLoss,
        Reconnect(1),
        Receive(1),
        Flush(1),
        Serve(1),
        Receive(1),
    ] {
        world.step(step).expect("no lie");
    }
    assert_eq!((world.failed, world.excused.as_slice()), (1, [true].as_slice()));
}
