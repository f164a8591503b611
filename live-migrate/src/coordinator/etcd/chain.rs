//! The transactions by which a coordinator takes the lead and writes the journal,
//! and what their answers mean. Pure: etcd is not called here, so that the model
//! (`model.rs`) runs what the product runs.
//!
//! Keys, under the prefix:
//!
//! | key | is |
//! |---|---|
//! | `leader` | who leads: JSON, with the lease of the process that leads |
//! | `term` | the highest term that was ever taken |
//! | `tail` | the last write: its number, its term, the last event's number |
//! | `handoffs/ID`, `vms/NAME`, `events/NUMBER` | the journal |
//!
//! 1. A term is taken in the transaction that makes the leader's key, and only if
//!    that is absent and `term` is as it was read: no two leaders have one term.
//! 2. A write is conditional on the very leader's key that this coordinator made
//!    (by its revision): one that was deposed writes nothing, however late.
//! 3. A write is conditional on the write before it (`tail`, by its revision): one
//!    that was delayed on its way is not done behind a newer one, nor twice; and
//!    asked again, it says that it was done.

use serde::{Deserialize, Serialize};

use super::EtcdError;
use super::txn::{Answer, Compare, Kv, Op, Txn};
use crate::coordinator::journal::{Change, EVENTS_MAX, Event, FORMAT};

/// Steps of one transaction; etcd takes 128 (`--max-txn-ops`).
const OPS_MAX: usize = 120;
/// Of one transaction; etcd takes 1.5 MiB (`--max-request-bytes`).
pub const BYTES_MAX: usize = 1 << 20;
/// The oldest events go when so many more than [`EVENTS_MAX`] are there.
const TRIM_EVERY: u64 = 64;

/// Names of the keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Keys(String);

impl Keys {
    /// Under a prefix, which ends with a slash.
    #[must_use]
    pub fn under(prefix: &str) -> Self {
        Self(prefix.to_owned())
    }

    /// The prefix.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.0
    }

    /// Who leads.
    #[must_use]
    pub fn leader(&self) -> String {
        format!("{}leader", self.0)
    }

    /// The highest term.
    #[must_use]
    pub fn term(&self) -> String {
        format!("{}term", self.0)
    }

    /// The last write.
    #[must_use]
    pub fn tail(&self) -> String {
        format!("{}tail", self.0)
    }

    /// What the names of all rows, VMs or events begin with.
    #[must_use]
    pub fn all(&self, what: &str) -> String {
        format!("{}{what}/", self.0)
    }

    /// An event. Numbers of one length are sorted as text.
    #[must_use]
    pub fn event(&self, seq: u64) -> String {
        format!("{}events/{seq:020}", self.0)
    }
}

/// Who leads, as the others read it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Leader {
    /// Name of the instance, for people.
    pub name: String,
    /// Where its API is.
    pub api: String,
    /// Of this leadership.
    pub term: u64,
    /// Of this process and no other.
    pub instance: String,
}

/// The key `term`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counter {
    /// The highest term taken.
    pub term: u64,
    /// When that was written; 0: never.
    pub revision: i64,
}

#[derive(Serialize, Deserialize)]
struct CounterValue {
    format: u64,
    term: u64,
}

/// The right to write, until somebody else has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lead {
    /// Its term.
    pub term: u64,
    /// When the leader's key was made.
    pub created: i64,
    /// The leader's key goes with it.
    pub lease: i64,
}

/// The key `tail`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tail {
    /// Of who wrote.
    pub term: u64,
    /// Counts writes of all terms.
    pub write: u64,
    /// Number of the last event.
    pub seq: u64,
}

/// Reads a value of ours.
pub(super) fn parsed<T: serde::de::DeserializeOwned>(kv: &Kv) -> Result<T, EtcdError> {
    serde_json::from_str(&kv.value)
        .map_err(|error| EtcdError::Value { key: kv.key.clone(), what: error.to_string() })
}

fn text<T: Serialize>(value: &T) -> String {
    // Structs and rows of ours always have a text.
    serde_json::to_string(value).unwrap_or_default()
}

/// Reads leader and term at once.
#[must_use]
pub fn look(keys: &Keys) -> Txn {
    Txn { then: vec![Op::Get(keys.leader()), Op::Get(keys.term())], ..Txn::default() }
}

/// What [`look`] found: the leader's key, and the counter.
///
/// # Errors
/// Values that are not ours, or of a format of the future.
pub fn looked(answer: &Answer) -> Result<(Option<(Leader, Lead)>, Counter), EtcdError> {
    let leader = match answer.found.first() {
        Some(Some(kv)) => {
            let leader: Leader = parsed(kv)?;
            let lead = Lead { term: leader.term, created: kv.created, lease: kv.lease };
            Some((leader, lead))
        }
        _ => None,
    };
    let counter = match answer.found.get(1) {
        Some(Some(kv)) => {
            let CounterValue { format, term } = parsed(kv)?;
            if format != FORMAT {
                let what = format!("it is of format {format}, and this program knows {FORMAT}");
                return Err(EtcdError::Value { key: kv.key.clone(), what });
            }
            Counter { term, revision: kv.modified }
        }
        _ => Counter::default(),
    };
    Ok((leader, counter))
}

/// Takes the lead and the next term, at least `term_min`, if nobody leads. `who`'s
/// own term is not looked at.
#[must_use]
pub fn campaign(keys: &Keys, who: &Leader, lease: i64, counter: Counter, term_min: u64) -> Txn {
    let term = counter.term.saturating_add(1).max(term_min);
    let leader = Leader { term, ..who.clone() };
    Txn {
        compare: vec![
            Compare::Created(keys.leader(), 0),
            Compare::Modified(keys.term(), counter.revision),
        ],
        then: vec![
            Op::Put(keys.leader(), text(&leader), lease),
            Op::Put(keys.term(), text(&CounterValue { format: FORMAT, term }), 0),
            Op::Get(keys.leader()),
        ],
        otherwise: vec![Op::Get(keys.leader())],
    }
}

/// The lead that was taken, now or by the same [`campaign`] said before; `None`:
/// somebody else leads, or has just led.
///
/// # Errors
/// A value that is not ours.
pub fn elected(who: &Leader, lease: i64, answer: &Answer) -> Result<Option<Lead>, EtcdError> {
    let Some(Some(kv)) = answer.found.first() else { return Ok(None) };
    let leader: Leader = parsed(kv)?;
    let lead = Lead { term: leader.term, created: kv.created, lease: kv.lease };
    Ok((leader.instance == who.instance && kv.lease == lease).then_some(lead))
}

/// Where the journal goes on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Chain {
    keys: Keys,
    lead: Lead,
    tail: Tail,
    /// When the tail was written; 0: never.
    revision: i64,
}

/// What a write was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is there, since this revision.
    Done(i64),
    /// It is not there and will not be: somebody else leads.
    Deposed,
}

impl Chain {
    /// Behind the last write there is, which was read after the lead was taken.
    ///
    /// # Errors
    /// A value that is not ours.
    pub fn behind(keys: Keys, lead: Lead, tail: Option<&Kv>) -> Result<Self, EtcdError> {
        let (tail, revision) = match tail {
            Some(kv) => (parsed(kv)?, kv.modified),
            None => (Tail::default(), 0),
        };
        Ok(Self { keys, lead, tail, revision })
    }

    /// Number of the last event.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.tail.seq
    }

    /// How many of these go into one transaction; at least one, which may be too
    /// large by itself.
    #[must_use]
    pub fn fitting(&self, changes: &[&Change]) -> usize {
        let (mut ops, mut bytes) = (0, 0);
        let mut fits = |change: &&&Change| {
            let (of, mut seq) = (&self.keys, self.tail.seq);
            let steps = steps(of, change, &mut seq);
            ops += steps.len();
            bytes += steps.iter().map(Op::bytes).sum::<usize>();
            // One for the tail, one for old events.
            ops + 2 <= OPS_MAX && bytes <= BYTES_MAX
        };
        changes.iter().take_while(|change| fits(change)).count().max(1)
    }

    /// The write of these, and the tail behind it.
    ///
    /// # Errors
    /// [`EtcdError::TooLarge`].
    pub fn next(&self, changes: &[&Change]) -> Result<(Tail, Txn), EtcdError> {
        let mut seq = self.tail.seq;
        let mut then: Vec<Op> =
            changes.iter().flat_map(|change| steps(&self.keys, change, &mut seq)).collect();
        let bytes = then.iter().map(Op::bytes).sum();
        if bytes > BYTES_MAX || then.len() + 2 > OPS_MAX {
            return Err(EtcdError::TooLarge { bytes, most: BYTES_MAX });
        }
        let keep = seq.saturating_sub(EVENTS_MAX);
        if keep / TRIM_EVERY > self.tail.seq.saturating_sub(EVENTS_MAX) / TRIM_EVERY {
            then.push(Op::DeleteRange(self.keys.event(0), self.keys.event(keep + 1)));
        }
        let tail = Tail { term: self.lead.term, write: self.tail.write + 1, seq };
        then.push(Op::Put(self.keys.tail(), text(&tail), 0));
        let compare = vec![
            Compare::Created(self.keys.leader(), self.lead.created),
            Compare::Modified(self.keys.tail(), self.revision),
        ];
        let otherwise = vec![Op::Get(self.keys.leader()), Op::Get(self.keys.tail())];
        Ok((tail, Txn { compare, then, otherwise }))
    }

    /// What the answer to a write says, whether it was asked once or more often.
    ///
    /// # Errors
    /// A value that is not ours.
    pub fn judge(&self, meant: &Tail, answer: &Answer) -> Result<Verdict, EtcdError> {
        if answer.succeeded {
            return Ok(Verdict::Done(answer.revision));
        }
        let created = |kv: &Kv| kv.created == self.lead.created;
        let leads = matches!(answer.found.first(), Some(Some(kv)) if created(kv));
        match answer.found.get(1) {
            // It was done when it was asked before.
            Some(Some(kv)) if leads && parsed::<Tail>(kv)? == *meant => {
                Ok(Verdict::Done(kv.modified))
            }
            _ => Ok(Verdict::Deposed),
        }
    }

    /// The write is done.
    pub fn advance(&mut self, tail: Tail, revision: i64) {
        (self.tail, self.revision) = (tail, revision);
    }
}

fn steps(keys: &Keys, change: &Change, seq: &mut u64) -> Vec<Op> {
    let mut steps = Vec::new();
    if let Some(row) = &change.row {
        steps.push(Op::Put(format!("{}{}", keys.all("handoffs"), row.id), text(row), 0));
    }
    if let Some((name, vm)) = &change.vm {
        steps.push(Op::Put(format!("{}{name}", keys.all("vms")), text(vm), 0));
    }
    for id in &change.forget {
        steps.push(Op::Delete(format!("{}{id}", keys.all("handoffs"))));
    }
    for event in &change.events {
        *seq += 1;
        let event = Event { seq: *seq, ..event.clone() };
        steps.push(Op::Put(keys.event(*seq), text(&event), 0));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn chain() -> Chain {
        let lead = Lead { term: 3, created: 10, lease: 5 };
        Chain::behind(Keys::under("/b/"), lead, None).expect("new")
    }

    fn event(bytes: usize) -> Event {
        let (kind, subject) = ("k".repeat(bytes), String::new());
        Event { seq: 0, kind, subject, at_unix_us: 0, data: Value::Null }
    }

    fn told(count: usize, bytes: usize) -> Change {
        Change { events: vec![event(bytes); count], ..Change::default() }
    }

    #[test]
    fn a_write_is_under_the_leaders_key_and_behind_the_last_write() {
        let mut chain = chain();
        let (tail, txn) = chain.next(&[&told(2, 1)]).expect("small");
        assert_eq!(tail, Tail { term: 3, write: 1, seq: 2 });
        assert_eq!(
            txn.compare,
            [
                Compare::Created("/b/leader".to_owned(), 10),
                Compare::Modified("/b/tail".to_owned(), 0)
            ]
        );
        chain.advance(tail, 77);
        let (tail, txn) = chain.next(&[&told(1, 1)]).expect("small");
        assert_eq!(tail, Tail { term: 3, write: 2, seq: 3 });
        assert!(txn.compare.contains(&Compare::Modified("/b/tail".to_owned(), 77)));
    }

    #[test]
    fn an_answer_is_understood_also_when_it_was_asked_before() {
        let chain = chain();
        let (tail, _) = chain.next(&[&told(1, 1)]).expect("small");
        let kv = |key: &str, value: String, created, modified| {
            Some(Kv { key: key.to_owned(), value, created, modified, lease: 0 })
        };
        let answer = |leader: i64, tail: &Tail| Answer {
            succeeded: false,
            revision: 99,
            found: vec![
                kv("/b/leader", String::new(), leader, leader),
                kv("/b/tail", text(tail), 1, 50),
            ],
        };
        let done = Answer { succeeded: true, revision: 42, found: Vec::new() };
        assert_eq!(chain.judge(&tail, &done), Ok(Verdict::Done(42)));
        assert_eq!(chain.judge(&tail, &answer(10, &tail)), Ok(Verdict::Done(50)));
        // Another leader, also if it has not written yet, or one that has led.
        assert_eq!(chain.judge(&tail, &answer(11, &tail)), Ok(Verdict::Deposed));
        let other = Tail { write: 9, ..tail };
        assert_eq!(chain.judge(&tail, &answer(10, &other)), Ok(Verdict::Deposed));
        let none = Answer { succeeded: false, revision: 99, found: vec![None, None] };
        assert_eq!(chain.judge(&tail, &none), Ok(Verdict::Deposed));
    }

    #[test]
    fn what_is_too_much_for_etcd_is_cut_or_refused() {
        let chain = chain();
        let (small, big) = (told(30, 1), told(1, BYTES_MAX / 2 - 1000));
        assert_eq!(chain.fitting(&[&small; 10]), 3);
        assert_eq!(chain.fitting(&[&big, &big, &big]), 2);
        let huge = told(1, BYTES_MAX + 1);
        assert_eq!(chain.fitting(&[&huge, &small]), 1);
        let refused = chain.next(&[&huge]).expect_err("too large").to_string();
        assert!(refused.contains("nothing was started"), "{refused}");
        assert!(chain.next(&[&told(OPS_MAX, 1)]).is_err());
    }

    #[test]
    fn old_events_go_a_few_at_a_time() {
        let mut chain = chain();
        chain.tail.seq = EVENTS_MAX + TRIM_EVERY - 1;
        let (tail, txn) = chain.next(&[&told(1, 1)]).expect("small");
        assert_eq!(tail.seq, EVENTS_MAX + TRIM_EVERY);
        let range = Op::DeleteRange(chain.keys.event(0), chain.keys.event(TRIM_EVERY + 1));
        assert!(txn.then.contains(&range), "{txn:?}");
        chain.advance(tail, 1);
        let (_, txn) = chain.next(&[&told(1, 1)]).expect("small");
        assert!(!txn.then.iter().any(|op| matches!(op, Op::DeleteRange(..))), "{txn:?}");
    }
}
