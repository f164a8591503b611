//! Who has a VM's volumes, as far as this host was told, where their storage keeps
//! nobody out: one note for each VM, and what each order does to it. Pure.
//!
//! ```text
//!                    +---------+  permit   +-----------+
//!   nothing, --stand-> standby ------------> permitted |--+
//!   or volumes |     +----+----+           +-----------+  | end, of a later try
//!   elsewhere  |  dismiss |                               v
//!              |     +----v------+         +----------+ proven +-------+
//!              +-----> dismissed |         | restored |<-------> ended |
//!                    +-----------+         +----------+  keep  +-------+
//! ```
//!
//! Rules:
//! - Every try of a VM has a number, greater than those of all before it. The note is
//!   of the latest try that was heard of here: an order of an earlier one is void,
//!   however late it comes, and changes nothing.
//! - The volumes leave by a try of this host's own (`end`) and come by one in which it
//!   stood by (`permit`); both sides of one try are never one host.
//! - A try that was called off here (`keep`, `dismiss`) stays so.
//! - Where the note says that the volumes are elsewhere, nothing claims them, unless a
//!   person says so; after that everything of the try is void.
//!
//! Knows no process and no disk; `cooperative` carries out what this allows.

use std::fmt;

use baton_protocol::handoff::Try;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// That the source's backend has stopped for good, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub(crate) struct Proof {
    /// The process that had sealed, by its number then.
    pub pid: i32,
    /// How its end was seen: `waitpid` or `pidfd`.
    pub seen_by: String,
    /// How it ended, if that was ours to learn.
    pub status: Option<String>,
    /// Microseconds since 1970. For people.
    pub at_unix_us: u64,
}

/// A try, and its place among all tries of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Turn {
    /// The coordinator's; 0: of before there were numbers.
    #[serde(rename = "turn", default)]
    pub number: u64,
    /// Which.
    #[serde(rename = "try", with = "text")]
    pub attempt: Try,
}

/// What became of the latest try here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub(crate) enum Fate {
    /// A backend may stand by; the volumes are elsewhere.
    Standby,
    /// None does any more, and the volumes stayed elsewhere.
    Dismissed,
    /// The volumes came.
    Permitted,
    /// The volumes left.
    Ended {
        /// Why that is sure.
        proof: Proof,
    },
    /// The volumes stayed, or are back.
    Restored,
    /// A person says that they are here.
    Claimed,
}

/// The last thing that happened to a VM here, durable.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Note {
    /// In which try.
    #[serde(flatten)]
    pub turn: Turn,
    /// What.
    #[serde(flatten)]
    pub fate: Fate,
}

/// What is asked of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Order {
    /// Destination: have a backend that waits.
    Stand(Turn),
    /// Destination: the source is proven gone, serve.
    Permit(Turn),
    /// Destination: called off.
    Dismiss(Turn),
    /// Source: have the backend stop for good, and prove it.
    End(Turn),
    /// Source: called off, serve.
    Keep(Turn),
    /// Anybody: start a backend that claims the volumes.
    Claim {
        /// A person answers for it.
        force: bool,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stand(turn) => write!(f, "to stand by for try {}", turn.attempt),
            Self::Permit(turn) => write!(f, "to serve after try {}", turn.attempt),
            Self::Dismiss(turn) => write!(f, "to stand by no more for try {}", turn.attempt),
            Self::End(turn) => write!(f, "to give the volumes up for try {}", turn.attempt),
            Self::Keep(turn) => write!(f, "to keep the volumes after try {}", turn.attempt),
            Self::Claim { .. } => f.write_str("to claim the volumes"),
        }
    }
}

/// What is to be done about an order that is not refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Write this first, then do it.
    Note(Note),
    /// Do it; it is noted, or what is to be noted is not known yet.
    Go,
    /// It was proven before.
    Proven(Proof),
    /// There is nothing to do, and nothing of the try can come to be here any more.
    Void,
}

/// Why not. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub(crate) enum Refusal {
    /// Of an earlier try.
    #[error("another try has followed since")]
    Late,
    /// Of this one.
    #[error("it was called off here")]
    CalledOff,
    /// Of this one.
    #[error("the volumes came here in it")]
    Came,
    /// The other side's order.
    #[error("this host is the other side of it")]
    OtherSide,
    /// Nobody waits for a permission.
    #[error("no backend stands by for it here")]
    NotStanding,
    /// Not without somebody who answers for it.
    #[error("the volumes are not here")]
    Elsewhere,
    /// A destination is where they are not.
    #[error("the volumes are here already")]
    Here,
}

impl Note {
    /// The volumes left this host, proven.
    pub(crate) fn ended(turn: Turn, proof: Proof) -> Self {
        Self { turn, fate: Fate::Ended { proof } }
    }

    /// A backend of this host may use the volumes.
    pub(crate) fn is_here(&self) -> bool {
        matches!(self.fate, Fate::Permitted | Fate::Restored | Fate::Claimed)
    }
}

/// Judges an order. `serves`: a backend that claims is kept running here, which counts
/// where no try was ever heard of.
///
/// # Errors
/// [`Refusal`].
pub(crate) fn step(note: Option<&Note>, serves: bool, order: Order) -> Result<Verdict, Refusal> {
    let turn = match order {
        Order::Claim { force } => return claim(note, force),
        Order::Stand(turn)
        | Order::Permit(turn)
        | Order::Dismiss(turn)
        | Order::End(turn)
        | Order::Keep(turn) => turn,
    };
    match note {
        Some(note) if note.turn == turn => again(note, order),
        Some(note) if note.turn.number >= turn.number => match order {
            Order::Dismiss(_) => Ok(Verdict::Void),
            _ => Err(Refusal::Late),
        },
        _ => first(note.map_or(serves.then_some(true), |note| Some(note.is_here())), turn, order),
    }
}

/// Of a try that was not heard of; `here`: where the volumes are, if that is known.
fn first(here: Option<bool>, turn: Turn, order: Order) -> Result<Verdict, Refusal> {
    let note = |fate| Ok(Verdict::Note(Note { turn, fate }));
    match order {
        Order::Stand(_) if here == Some(true) => Err(Refusal::Here),
        Order::Stand(_) => note(Fate::Standby),
        // Nobody may stand by for it where the volumes are.
        Order::Dismiss(_) if here == Some(true) => Ok(Verdict::Void),
        Order::Dismiss(_) => note(Fate::Dismissed),
        Order::Permit(_) => Err(Refusal::NotStanding),
        Order::End(_) | Order::Keep(_) if here == Some(false) => Err(Refusal::Elsewhere),
        Order::End(_) => Ok(Verdict::Go),
        Order::Keep(_) | Order::Claim { .. } => note(Fate::Restored),
    }
}

/// Of the try that the note is of.
fn again(known: &Note, order: Order) -> Result<Verdict, Refusal> {
    let note = |fate| Ok(Verdict::Note(Note { turn: known.turn, fate }));
    match (&known.fate, order) {
        (Fate::Standby, Order::Stand(_))
        | (Fate::Dismissed, Order::Dismiss(_))
        | (Fate::Permitted, Order::Permit(_))
        | (Fate::Restored | Fate::Claimed, Order::Keep(_)) => Ok(Verdict::Go),
        (Fate::Standby, Order::Permit(_)) => note(Fate::Permitted),
        (Fate::Standby, Order::Dismiss(_)) => note(Fate::Dismissed),
        (Fate::Ended { proof }, Order::End(_)) => Ok(Verdict::Proven(proof.clone())),
        (Fate::Ended { .. }, Order::Keep(_)) => note(Fate::Restored),
        (Fate::Permitted, Order::Stand(_) | Order::Dismiss(_)) => Err(Refusal::Came),
        (Fate::Dismissed, Order::Stand(_) | Order::Permit(_))
        | (Fate::Restored, Order::End(_))
        | (Fate::Claimed, Order::Stand(_) | Order::Permit(_) | Order::End(_)) => {
            Err(Refusal::CalledOff)
        }
        (Fate::Claimed, Order::Dismiss(_)) => Ok(Verdict::Void),
        (Fate::Standby | Fate::Dismissed | Fate::Permitted, Order::End(_) | Order::Keep(_))
        | (
            Fate::Ended { .. } | Fate::Restored,
            Order::Stand(_) | Order::Permit(_) | Order::Dismiss(_),
        ) => Err(Refusal::OtherSide),
        (_, Order::Claim { force }) => claim(Some(known), force),
    }
}

fn claim(note: Option<&Note>, force: bool) -> Result<Verdict, Refusal> {
    match note {
        Some(note) if !note.is_here() && force => {
            Ok(Verdict::Note(Note { turn: note.turn, fate: Fate::Claimed }))
        }
        Some(note) if !note.is_here() => Err(Refusal::Elsewhere),
        _ => Ok(Verdict::Go),
    }
}

/// What prints and parses.
mod text {
    use baton_protocol::handoff::Try;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    pub(super) fn serialize<S: Serializer>(value: &Try, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Try, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_protocol::handoff::HandoffId;

    fn turn(number: u64) -> Turn {
        Turn { number, attempt: Try { id: HandoffId(u128::from(number) + 7), attempt: 1 } }
    }

    fn proof() -> Proof {
        Proof { pid: 1, seen_by: "waitpid".to_owned(), status: None, at_unix_us: 0 }
    }

    fn fates() -> [Fate; 6] {
        [
            Fate::Standby,
            Fate::Dismissed,
            Fate::Permitted,
            Fate::Ended { proof: proof() },
            Fate::Restored,
            Fate::Claimed,
        ]
    }

    fn word(verdict: &Result<Verdict, Refusal>) -> String {
        match verdict {
            Ok(Verdict::Note(Note { fate, .. })) => match fate {
                Fate::Ended { .. } => unreachable!("only a proof ends"),
                fate => format!("{fate:?}").to_lowercase(),
            },
            Ok(Verdict::Proven(_)) => "proven".to_owned(),
            Ok(verdict) => format!("({verdict:?})").to_lowercase(),
            Err(refusal) => format!("{refusal:?}"),
        }
    }

    /// Every state x every order: of a later try, of this one, of an earlier one, and of
    /// another with the same number. Small letters: what is noted.
    const MATRIX: &str = "
              stand       permit      dismiss     end       keep      claim     force
none      >   standby     NotStanding dismissed   (go)      restored  (go)      (go)
serving   >   Here        NotStanding (void)      (go)      restored  (go)      (go)
standby   >   standby     NotStanding dismissed   Elsewhere Elsewhere Elsewhere claimed
standby   =   (go)        permitted   dismissed   OtherSide OtherSide Elsewhere claimed
standby   <   Late        Late        (void)      Late      Late      Elsewhere claimed
standby   ~   Late        Late        (void)      Late      Late      Elsewhere claimed
dismissed >   standby     NotStanding dismissed   Elsewhere Elsewhere Elsewhere claimed
dismissed =   CalledOff   CalledOff   (go)        OtherSide OtherSide Elsewhere claimed
dismissed <   Late        Late        (void)      Late      Late      Elsewhere claimed
dismissed ~   Late        Late        (void)      Late      Late      Elsewhere claimed
permitted >   Here        NotStanding (void)      (go)      restored  (go)      (go)
permitted =   Came        (go)        Came        OtherSide OtherSide (go)      (go)
permitted <   Late        Late        (void)      Late      Late      (go)      (go)
permitted ~   Late        Late        (void)      Late      Late      (go)      (go)
ended     >   standby     NotStanding dismissed   Elsewhere Elsewhere Elsewhere claimed
ended     =   OtherSide   OtherSide   OtherSide   proven    restored  Elsewhere claimed
ended     <   Late        Late        (void)      Late      Late      Elsewhere claimed
ended     ~   Late        Late        (void)      Late      Late      Elsewhere claimed
restored  >   Here        NotStanding (void)      (go)      restored  (go)      (go)
restored  =   OtherSide   OtherSide   OtherSide   CalledOff (go)      (go)      (go)
restored  <   Late        Late        (void)      Late      Late      (go)      (go)
restored  ~   Late        Late        (void)      Late      Late      (go)      (go)
claimed   >   Here        NotStanding (void)      (go)      restored  (go)      (go)
claimed   =   CalledOff   CalledOff   (void)      CalledOff (go)      (go)      (go)
claimed   <   Late        Late        (void)      Late      Late      (go)      (go)
claimed   ~   Late        Late        (void)      Late      Late      (go)      (go)
";

    fn orders(turn: Turn) -> [Order; 7] {
        [
            Order::Stand(turn),
            Order::Permit(turn),
            Order::Dismiss(turn),
            Order::End(turn),
            Order::Keep(turn),
            Order::Claim { force: false },
            Order::Claim { force: true },
        ]
    }

    #[test]
    fn every_state_and_every_order() {
        let row = |name: &str, when: &str, note: Option<&Note>, serves, turn| {
            let words = orders(turn).map(|order| word(&step(note, serves, order)));
            let [stand, permit, dismiss, end, keep, claim, force] = words;
            format!(
                "{name:<9} {when}   {stand:<11} {permit:<11} {dismiss:<11} {end:<9} {keep:<9} {claim:<9} {force}\n"
            )
        };
        let head = "              stand       permit      dismiss     end       keep      claim     force\n";
        let mut rows = format!("\n{head}");
        rows += &row("none", ">", None, false, turn(1));
        rows += &row("serving", ">", None, true, turn(1));
        for fate in fates() {
            let name = serde_json::to_value(&fate).expect("JSON");
            let name = name["state"].as_str().expect("a word").to_owned();
            let note = Note { turn: turn(2), fate };
            let other = Turn { number: 2, attempt: turn(9).attempt };
            let whens = [(">", turn(3)), ("=", turn(2)), ("<", turn(1)), ("~", other)];
            for (when, turn) in whens {
                rows += &row(&name, when, Some(&note), false, turn);
                // What runs says nothing where the note does.
                assert_eq!(
                    orders(turn).map(|order| step(Some(&note), true, order)),
                    orders(turn).map(|order| step(Some(&note), false, order))
                );
            }
        }
        assert_eq!(rows, MATRIX, "{rows}");
    }

    /// A note is never of an earlier try than it was, and one try has one outcome here.
    #[test]
    fn a_note_goes_forward_only() {
        for fate in fates() {
            let known = Note { turn: turn(2), fate };
            for number in 1..4 {
                for order in orders(turn(number)) {
                    let Ok(Verdict::Note(next)) = step(Some(&known), false, order) else {
                        continue;
                    };
                    assert!(next.turn.number >= known.turn.number, "{order:?}");
                    let came_and_went = next.is_here() != known.is_here();
                    let may = match (&known.fate, &next.fate) {
                        (Fate::Standby, Fate::Permitted) | (Fate::Ended { .. }, Fate::Restored) => {
                            next.turn == known.turn
                        }
                        (_, fate) => *fate == Fate::Claimed,
                    };
                    assert!(!came_and_went || may, "{known:?} {order:?} {next:?}");
                }
            }
        }
    }

    #[test]
    fn what_agents_before_wrote_is_read() {
        let text = r#"{"state":"restored","try":"01ARZ3NDEKTSV4RRFFQ69G5FAV/2"}"#;
        let note: Note = serde_json::from_str(text).expect("a note");
        assert_eq!((note.turn.number, &note.fate), (0, &Fate::Restored));
        let ended = Note::ended(turn(3), proof());
        let text = serde_json::to_string(&ended).expect("JSON");
        assert!(text.contains(r#""state":"ended""#) && text.contains(r#""turn":3"#), "{text}");
        assert_eq!(serde_json::from_str::<Note>(&text).expect("a note"), ended);
    }
}
