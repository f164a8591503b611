//! When a coordinator campaigns, leads and ends. Pure; the caller says what time
//! it is and carries out what is told, one request at a time.
//!
//! ```text
//!             nobody leads          taken
//!  Following ──────────> Campaigning ────> Leading ────> Over: the process ends
//!      ^                      │                │  lease not renewed in time, a write or
//!      └──────────────────────┘                │  a term refused, asked to stop
//!        somebody else was first, too late     v
//! ```
//!
//! A process leads once: the one that stops ends, so that nothing of its term is
//! still under way in it when it follows. The lease says when that is due, on
//! this host's own clock, and etcd says on its own when another may try. Both may
//! be wrong: what keeps two leaders apart is the term.

use super::chain::Lead;

/// Where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Somebody else leads, or nobody yet.
    Following,
    /// It has a lease and has asked for the lead.
    Campaigning {
        /// Its lease.
        lease: i64,
        /// Of which it is sure until then, ms.
        until: u64,
    },
    /// It leads.
    Leading {
        /// By this right.
        lead: Lead,
        /// Its lease was kept alive until then, ms.
        until: u64,
    },
    /// It has led, or was asked to stop.
    Over(Why),
}

/// Why it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// It could not keep its lease alive.
    LeaseLost,
    /// The journal took no write of its term any more.
    Deposed,
    /// A storage server or an agent has heard a higher term.
    HigherTerm,
    /// It was told to.
    Stopped,
}

impl Why {
    /// For people.
    #[must_use]
    pub fn sentence(self) -> &'static str {
        match self {
            Self::LeaseLost => "its lease in etcd was not renewed in time",
            Self::Deposed => "etcd took no write of this term any more",
            Self::HigherTerm => "a storage server or an agent has heard a higher term",
            Self::Stopped => "it was told to stop",
        }
    }
}

/// What it hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Time has passed, and no request is under way.
    Tick,
    /// Nobody leads.
    Vacant,
    /// Somebody leads.
    Led,
    /// Its own key is there, of a campaign that it has given up.
    LeftBehind {
        /// With this lease.
        lease: i64,
    },
    /// It has a lease, of which it is sure until then.
    Granted {
        /// The lease.
        lease: i64,
        /// ms.
        until: u64,
    },
    /// It has the lead.
    Won(Lead),
    /// Somebody else was first.
    Lost,
    /// The lease lives until then.
    Kept {
        /// ms.
        until: u64,
    },
    /// The lease is over.
    LeaseGone,
    /// etcd did not answer.
    Failed,
    /// The journal took no write of this term.
    WriteRefused,
    /// Somebody has heard a higher term.
    HigherTerm,
    /// It is to end.
    Stop,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Do {
    /// Ask who leads.
    Look,
    /// Ask for a lease.
    Grant,
    /// Ask for the lead.
    Campaign {
        /// With this lease.
        lease: i64,
    },
    /// Keep the lease alive.
    KeepAlive {
        /// Which.
        lease: i64,
    },
    /// Give a lease back, and the leader's key with it.
    Revoke {
        /// Which.
        lease: i64,
    },
    /// Begin to lead.
    Lead(Lead),
    /// Stop everything that leads, at once.
    End(Why),
}

impl State {
    /// What comes of an input, at `now` ms.
    #[must_use]
    pub fn step(self, now: u64, input: Input) -> (Self, Vec<Do>) {
        use Input::{
            Failed, Granted, HigherTerm, Kept, LeaseGone, Led, LeftBehind, Lost, Stop, Tick,
            Vacant, Won, WriteRefused,
        };
        use State::{Campaigning, Following, Leading, Over};
        match (self, input) {
            (Following, Tick) => (Following, vec![Do::Look]),
            (Following, Vacant) => (Following, vec![Do::Grant]),
            (Following, Granted { lease, until }) if now < until => {
                (Campaigning { lease, until }, vec![Do::Campaign { lease }])
            }
            // What comes too late for this state, or for the lease, is given back.
            (_, Granted { lease, .. } | LeftBehind { lease }) => (self, vec![Do::Revoke { lease }]),
            (Leading { lead, .. }, Won(again)) if lead == again => (self, vec![]),
            (Following | Leading { .. } | Over(_), Won(lead)) => {
                (self, vec![Do::Revoke { lease: lead.lease }])
            }
            (Following, Stop) => (Over(Why::Stopped), vec![Do::End(Why::Stopped)]),

            (Campaigning { lease, until }, Tick | Won(_)) if now >= until => {
                (Following, vec![Do::Revoke { lease }])
            }
            (Campaigning { lease, .. }, Tick) => (self, vec![Do::Campaign { lease }]),
            (Campaigning { until, .. }, Won(lead)) => {
                (Leading { lead, until }, vec![Do::Lead(lead)])
            }
            (Campaigning { lease, .. }, Lost) => (Following, vec![Do::Revoke { lease }]),
            (Campaigning { .. }, LeaseGone) => (Following, vec![]),
            (Campaigning { lease, .. }, Stop) => {
                (Over(Why::Stopped), vec![Do::Revoke { lease }, Do::End(Why::Stopped)])
            }

            // Also an answer that says the lease was kept, when it comes too late: others may
            // have been told otherwise meanwhile.
            (Leading { until, .. }, Tick | Kept { .. } | LeaseGone) if now >= until => {
                (Over(Why::LeaseLost), vec![Do::End(Why::LeaseLost)])
            }
            (Leading { .. }, LeaseGone) => (Over(Why::LeaseLost), vec![Do::End(Why::LeaseLost)]),
            (Leading { lead, .. }, Tick) => (self, vec![Do::KeepAlive { lease: lead.lease }]),
            (Leading { lead, until }, Kept { until: new }) => {
                (Leading { lead, until: until.max(new) }, vec![])
            }
            (Leading { .. }, WriteRefused) => (Over(Why::Deposed), vec![Do::End(Why::Deposed)]),
            (Leading { lead, .. }, HigherTerm) => {
                let lease = lead.lease;
                (Over(Why::HigherTerm), vec![Do::End(Why::HigherTerm), Do::Revoke { lease }])
            }
            (Leading { lead, .. }, Stop) => {
                let lease = lead.lease;
                (Over(Why::Stopped), vec![Do::End(Why::Stopped), Do::Revoke { lease }])
            }

            (
                Following,
                Led | Lost | Kept { .. } | LeaseGone | Failed | WriteRefused | HigherTerm,
            )
            | (
                Campaigning { .. },
                Vacant | Led | Kept { .. } | Failed | WriteRefused | HigherTerm,
            )
            | (Leading { .. }, Vacant | Led | Lost | Failed)
            | (
                Over(_),
                Tick
                | Vacant
                | Led
                | Lost
                | Kept { .. }
                | LeaseGone
                | Failed
                | WriteRefused
                | HigherTerm
                | Stop,
            ) => (self, vec![]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    const LEAD: Lead = Lead { term: 4, created: 9, lease: 7 };

    fn states() -> [(&'static str, State); 4] {
        [
            ("Following", State::Following),
            ("Campaigning", State::Campaigning { lease: 7, until: 100 }),
            ("Leading", State::Leading { lead: LEAD, until: 100 }),
            ("Over", State::Over(Why::Stopped)),
        ]
    }

    fn inputs() -> [(&'static str, Input); 13] {
        [
            ("Tick", Input::Tick),
            ("Vacant", Input::Vacant),
            ("Led", Input::Led),
            ("LeftBehind", Input::LeftBehind { lease: 6 }),
            ("Granted", Input::Granted { lease: 8, until: 100 }),
            ("Won", Input::Won(LEAD)),
            ("Lost", Input::Lost),
            ("Kept", Input::Kept { until: 150 }),
            ("LeaseGone", Input::LeaseGone),
            ("Failed", Input::Failed),
            ("WriteRefused", Input::WriteRefused),
            ("HigherTerm", Input::HigherTerm),
            ("Stop", Input::Stop),
        ]
    }

    fn name(state: State) -> String {
        match state {
            State::Following => "Following".to_owned(),
            State::Campaigning { until, .. } => format!("Campaigning({until})"),
            State::Leading { until, .. } => format!("Leading({until})"),
            State::Over(why) => format!("Over({why:?})"),
        }
    }

    fn word(output: &Do) -> String {
        match output {
            Do::Lead(_) => "Lead".to_owned(),
            Do::Revoke { lease } => format!("Revoke({lease})"),
            Do::Campaign { .. } => "Campaign".to_owned(),
            Do::KeepAlive { .. } => "KeepAlive".to_owned(),
            other => format!("{other:?}"),
        }
    }

    /// Every state and input, in time (50) and too late (100).
    #[test]
    fn the_whole_matrix() {
        let mut table = String::new();
        for (from, state) in states() {
            for (what, input) in inputs() {
                let cell = |now| {
                    let (to, outputs) = state.step(now, input);
                    let outputs: Vec<_> = outputs.iter().map(word).collect();
                    let to = if to == state { "-".to_owned() } else { name(to) };
                    format!("{to} {}", outputs.join(" ")).trim_end().to_owned()
                };
                let (now, late) = (cell(50), cell(100));
                let late = if late == now { "=".to_owned() } else { late };
                writeln!(table, "{from:<12}{what:<13}{now:<38}{late}").expect("text");
            }
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/coordinator/etcd/election.matrix.txt");
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path, &table).expect("written");
        }
        let known = std::fs::read_to_string(path).expect("the matrix");
        assert_eq!(table, known, "look at the difference; BLESS=1 writes the new one");
    }

    /// Nothing leads again, and nothing leads without time left on its lease.
    #[test]
    fn it_leads_once_and_in_time() {
        for (_, state) in states() {
            for (_, input) in inputs() {
                for now in [50, 100] {
                    let (to, outputs) = state.step(now, input);
                    if let State::Leading { until, .. } = to {
                        assert!(now < until || to == state, "{state:?} {input:?} at {now}");
                    }
                    let begins = outputs.iter().any(|output| matches!(output, Do::Lead(_)));
                    assert_eq!(
                        begins,
                        matches!((state, to), (State::Campaigning { .. }, State::Leading { .. }))
                    );
                    if matches!(state, State::Over(_)) {
                        assert_eq!(to, state);
                    }
                    let ends = outputs.iter().any(|output| matches!(output, Do::End(_)));
                    assert_eq!(ends, to != state && matches!(to, State::Over(_)));
                }
            }
        }
    }
}
