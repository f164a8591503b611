//! The plan against real access records, with lost and late messages, restarts
//! of coordinator and servers, and backends that do as they like.

use baton_protocol::access::{AccessRecord, By, Input as Ask, Phase, Refusal as No, Store};
use baton_protocol::handoff::{Key, Mode, Plan, Proof, Side, Try};
use baton_protocol::{Epoch, SessionId, VolumeId};
use proptest::prelude::*;

use super::tests::fresh;
use super::*;

const SOURCE: SessionId = SessionId(11);
const DESTINATION: SessionId = SessionId(22);
const TERM: u64 = 3;

struct World {
    row: Row,
    records: Vec<AccessRecord>,
    /// What a restart of its server leaves of each: nothing that could wait.
    disks: Vec<AccessRecord>,
    /// ARMs that may still arrive: the try they are of, and the member.
    late: Vec<(Try, usize)>,
    activated: bool,
    destination_alive: bool,
}

impl World {
    fn new(owned: &[bool], trigger: Trigger) -> Self {
        let records: Vec<_> = owned
            .iter()
            .enumerate()
            .map(|(n, owned)| {
                let name = if *owned { "a/web" } else { "x/web" };
                let ask = Ask::Claim { name, session: SOURCE };
                AccessRecord::new(VolumeId(n as u64 + 1)).step(ask).expect("free").record
            })
            .collect();
        let mut row = Row { trigger, ..fresh() };
        let member = row.members[0].clone();
        let next_epoch = records[0].next_epoch.0;
        row.members = (1..=owned.len() as u64)
            .map(|id| Member { id, next_epoch, ..member.clone() })
            .collect();
        let disks = records.clone();
        let mut world = Self {
            row,
            records,
            disks,
            late: Vec::new(),
            activated: false,
            destination_alive: true,
        };
        world.tell(Input::Start);
        world
    }

    fn tell(&mut self, input: Input) {
        if let Ok(step) = self.row.step(input) {
            let again = step.row.attempt > self.row.attempt;
            assert!(
                !(again && self.row.stood && self.destination_alive),
                "another try with the destination of this one"
            );
            self.row = step.row;
        }
    }

    fn plan(&self, attempt: Try) -> Plan {
        Plan {
            attempt,
            vm: "web".to_owned(),
            from: "a/web".to_owned(),
            to: "b/web".to_owned(),
            anchor: VolumeId(1),
            members: self.row.members_digest(),
            mode: Mode::Fast,
            key: Key([9; 32]),
        }
    }

    fn ask(&mut self, place: usize, ask: Ask<'_>) -> Result<(), No> {
        let step = self.records[place].step(ask)?;
        if step.store == Store::First {
            self.disks[place] = step.record.clone();
        }
        self.records[place] = step.record;
        Ok(())
    }

    fn arm(&mut self, attempt: Try, place: usize) -> Result<(), No> {
        let plan = self.plan(attempt);
        let next_epoch = Epoch(self.row.members[place].next_epoch);
        self.ask(place, Ask::Arm { plan: &plan, term: TERM, next_epoch, generation: 0 })
    }

    fn grant(&self) -> Option<Grant> {
        let attempt = self.row.attempt();
        let record = &self.records[0];
        let (side, session) = (record.winner(attempt)?, record.owner.as_ref()?.session);
        let proof = record.proof(attempt)?;
        let winner = if side == Side::Source { Winner::Source } else { Winner::Destination };
        Some(Grant { session: session.0, winner, grant: proof.grant, mac: hex_of(&proof.mac) })
    }

    fn seen(&self, place: usize) -> Seen {
        let record = &self.records[place];
        let attempt = self.row.attempt();
        if let Some(decided) = record.decided.as_ref().filter(|d| d.attempt == attempt) {
            return match decided.winner {
                Side::Source => Seen::OverSource,
                Side::Destination => Seen::OverDestination,
            };
        }
        match (record.phase, &record.handoff) {
            (phase, Some(handoff)) if handoff.plan.attempt == attempt => match phase {
                Phase::Armed => Seen::Armed,
                Phase::Sealed => Seen::Sealed,
                Phase::Active => Seen::Active,
                Phase::Reclaimed => Seen::Reclaimed,
                Phase::Frozen if handoff.sealed => Seen::FrozenSealed,
                Phase::Frozen => Seen::Frozen,
                Phase::Free | Phase::Owned => Seen::Nothing,
            },
            _ => Seen::Nothing,
        }
    }

    /// Does one thing that is due; `answered` is whether the coordinator learns of it.
    fn carry_out(&mut self, action: Action, answered: bool) {
        let attempt = self.row.attempt();
        let input = match action {
            Action::Arm(place) => match self.arm(attempt, place) {
                Ok(()) => Input::Armed(place),
                Err(No::HandoffInProgress(other)) if other == attempt => Input::Armed(place),
                Err(No::NoSuchHandoff(_)) => Input::Armed(place),
                Err(error) => Input::CannotArm(
                    place,
                    Trouble { kind: "no".to_owned(), detail: error.to_string() },
                ),
            },
            Action::Watch(place) => Input::Seen(place, self.seen(place), 1),
            Action::Stand | Action::Inspect => Input::Standing(match () {
                () if !self.destination_alive && action == Action::Stand => {
                    self.destination_alive = true;
                    Standing::Starting
                }
                () if !self.destination_alive => Standing::Dead,
                () if self.activated => Standing::Active,
                () => Standing::Ready,
            }),
            Action::Reclaim => {
                let by = By::Coordinator { term: TERM };
                match self.ask(0, Ask::Reclaim { attempt, by }) {
                    Ok(()) => match self.grant() {
                        Some(grant) => Input::Reclaimed(grant),
                        None => Input::ReclaimUnknown,
                    },
                    Err(No::Lost { .. }) => Input::ReclaimLost,
                    Err(No::UnknownFrozen) => Input::ReclaimUnknown,
                    Err(No::NoSuchHandoff(_)) => Input::ReclaimForeign,
                    Err(error) => panic!("reclaim: {error}"),
                }
            }
            Action::Abdicate => {
                assert!(
                    !self.activated || self.destination_alive,
                    "abdicated for one that activated"
                );
                match self.ask(0, Ask::Abdicate { attempt, by: By::Coordinator { term: TERM } }) {
                    Ok(()) => Input::Abdicated,
                    Err(_) => return,
                }
            }
            Action::Prove => match self.grant() {
                Some(grant) => Input::Proved(grant),
                None => return,
            },
            Action::Settle(place) => {
                let proof = self.row.proof.as_ref().map(|grant| {
                    let mac = Key([9; 32]);
                    let proof = Proof::new(
                        &mac,
                        attempt,
                        grant.winner.into(),
                        grant.grant,
                        grant.session(),
                    );
                    (grant.session(), proof)
                });
                match self.ask(place, Ask::Settle { attempt, term: TERM, proof }) {
                    Ok(()) => Input::Settled(place, Some(self.records[place].next_epoch.0)),
                    Err(No::NoSuchHandoff(_)) => Input::Settled(place, None),
                    Err(No::BadProof) => Input::ProofStale,
                    Err(error) => panic!("settle {place}: {error}"),
                }
            }
            Action::StopDestination => {
                // The next standby is another process.
                self.destination_alive = false;
                Input::LoserGone
            }
            Action::StopSource => Input::LoserGone,
            // Of handoffs without access records.
            Action::EndSource | Action::Permit | Action::Keep | Action::Dismiss => return,
            Action::Countdown | Action::OrderSeal | Action::OrderActivate => return,
        };
        if answered {
            self.tell(input);
        }
    }

    fn source_seals(&mut self, place: usize) {
        let attempt = self.row.attempt();
        let _ = self.ask(place, Ask::Seal { attempt, session: SOURCE });
        let _ = self.ask(place, Ask::Sealed { attempt, session: SOURCE });
    }

    fn destination_activates(&mut self) {
        let attempt = self.row.attempt();
        let sealed = self.records.iter().all(|record| {
            record.handoff.as_ref().is_some_and(|h| h.plan.attempt == attempt && h.sealed)
        });
        if (sealed || self.activated) && self.destination_alive {
            let ask = Ask::Activate { attempt, name: "b/web", session: DESTINATION };
            self.activated |= self.ask(0, ask).is_ok();
        }
    }

    fn server_restarts(&mut self, place: usize) {
        self.records[place] = self.disks[place].clone().after_restart();
    }

    /// From here on everybody answers; the handoff must come to its end.
    fn ends(&mut self) {
        for round in 0..100 {
            if self.row.is_over() {
                return;
            }
            for action in self.row.due() {
                self.carry_out(action, true);
            }
            if self.activated {
                self.destination_activates();
            } else if self.destination_alive
                && self.records[0].handoff.as_ref().is_some_and(|h| h.wanted_back)
            {
                let attempt = self.row.attempt();
                let by = By::Backend { name: "b/web", session: DESTINATION };
                let _ = self.ask(0, Ask::Abdicate { attempt, by });
            }
            // Nobody can say who has the volumes, and the destination is dead:
            // that is for a person to decide.
            if round == 20 && self.row.unknown && !self.destination_alive {
                for place in 0..self.records.len() {
                    let fence = Ask::Fence { term: Some(TERM), nominee: None, seen: None };
                    self.ask(place, fence).expect("fenced");
                }
                self.tell(Input::Fenced);
            }
            // Somebody loses patience, and says so once.
            if round == 3 {
                self.tell(Input::Cancel);
                self.tell(Input::Finish);
            }
        }
        panic!("it never ends: {:?} due {:?}\n{:?}", self.row, self.row.due(), self.records);
    }
}

#[derive(Clone, Debug)]
enum Move {
    /// The n-th of what is due, and whether the answer arrives.
    Do(usize, bool),
    /// An ARM leaves and arrives later.
    Delay(usize),
    Deliver(usize),
    CoordinatorRestarts,
    ServerRestarts(usize),
    Seal(usize),
    Activate,
    SourceReclaims,
    DestinationDies,
    Late,
    Cancel,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        8 => (0usize..8, prop::bool::weighted(0.8)).prop_map(|(n, a)| Move::Do(n, a)),
        1 => (0usize..3).prop_map(Move::Delay),
        1 => (0usize..3).prop_map(Move::Deliver),
        1 => Just(Move::CoordinatorRestarts),
        1 => (0usize..3).prop_map(Move::ServerRestarts),
        3 => (0usize..3).prop_map(Move::Seal),
        2 => Just(Move::Activate),
        1 => Just(Move::SourceReclaims),
        1 => Just(Move::DestinationDies),
        1 => Just(Move::Late),
        1 => Just(Move::Cancel),
    ];
    prop::collection::vec(one, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever happened, the handoff ends, every record agrees with the anchor
    /// and with what the coordinator says, and nothing is left armed, not even
    /// by an ARM that arrives afterwards.
    #[test]
    fn every_handoff_ends_and_leaves_nothing_behind(
        owned in prop::collection::vec(prop::bool::weighted(0.9), 1..4),
        explicit in any::<bool>(),
        moves in moves(),
    ) {
        let trigger = if explicit { Trigger::Explicit } else { Trigger::Implicit };
        let mut world = World::new(&owned, trigger);
        let members = owned.len();
        for next in moves {
            let attempt = world.row.attempt();
            match next {
                Move::Do(n, answered) => {
                    let due = world.row.due();
                    if !due.is_empty() {
                        world.carry_out(due[n % due.len()], answered);
                    }
                }
                Move::Delay(place) => {
                    if world.row.due().contains(&Action::Arm(place % members)) {
                        world.late.push((attempt, place % members));
                    }
                }
                Move::Deliver(n) => {
                    if !world.late.is_empty() {
                        let (attempt, place) = world.late.remove(n % world.late.len());
                        let _ = world.arm(attempt, place);
                    }
                }
                Move::CoordinatorRestarts => world.tell(Input::Start),
                Move::ServerRestarts(place) => world.server_restarts(place % members),
                Move::Seal(place) => world.source_seals(place % members),
                Move::Activate => world.destination_activates(),
                Move::SourceReclaims => {
                    let by = By::Backend { name: "a/web", session: SOURCE };
                    let _ = world.ask(0, Ask::Reclaim { attempt, by });
                }
                Move::DestinationDies => world.destination_alive = world.activated,
                Move::Late => world.tell(Input::Late),
                Move::Cancel => world.tell(Input::Cancel),
            }
        }
        world.ends();
        for (attempt, place) in std::mem::take(&mut world.late) {
            let _ = world.arm(attempt, place);
        }
        for record in &world.records {
            prop_assert!(record.handoff.is_none(), "left armed: {record:?}");
        }
        if world.row.fenced {
            prop_assert_eq!(world.row.outcome(), None);
            return Ok(());
        }
        prop_assert!(world.row.attempt <= ATTEMPTS_MAX);
        prop_assert!(explicit || world.row.attempt == 1);
        let winner = world.row.winner.expect("decided");
        let owner = if winner == Winner::Source { "a/web" } else { "b/web" };
        for (record, owned) in world.records.iter().zip(&owned) {
            let expected = if *owned { owner } else { "x/web" };
            prop_assert_eq!(&record.owner.as_ref().expect("owned").name, expected);
        }
        prop_assert!(!world.activated || winner == Winner::Destination, "a decision was undone");
    }
}
