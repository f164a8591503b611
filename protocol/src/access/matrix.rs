//! Every state of the record against every input, written out, so that a change
//! of behaviour shows as a changed line of `matrix.txt`; and the table of
//! `docs/handoff.md`, made from the same code.
//!
//! `BATON_BLESS=1` writes both files anew; read the difference before you
//! commit it.

use std::fmt::Write;
use std::path::Path;

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::handoff::{HandoffId, Members, Plan};

const ANCHOR: VolumeId = VolumeId(7);
const MEMBER: VolumeId = VolumeId(8);
const SOURCE: &str = "a";
const DESTINATION: &str = "b";
const STRANGER: &str = "c";
const TERM: u64 = 5;
const S1: SessionId = SessionId(1);
const S2: SessionId = SessionId(2);
const D1: SessionId = SessionId(3);
const D2: SessionId = SessionId(4);

fn plan(attempt: u32) -> Plan {
    Plan {
        attempt: Try { id: HandoffId(1), attempt },
        vm: "vm".to_owned(),
        from: SOURCE.to_owned(),
        to: DESTINATION.to_owned(),
        anchor: ANCHOR,
        members: Members::of([ANCHOR, MEMBER]),
        mode: Mode::Fast,
        key: Key([7; 32]),
    }
}

/// What is said in the table, with names and lasting values.
struct Cast {
    plan: Plan,
    next: Plan,
    /// Of another handoff.
    other: Plan,
    bad: Plan,
}

impl Cast {
    fn new(mode: Mode) -> Self {
        let bad = Plan { to: SOURCE.to_owned(), mode, ..plan(1) };
        let attempt = Try { id: HandoffId(2), attempt: 1 };
        let other = Plan { attempt, mode, ..plan(1) };
        Self { plan: Plan { mode, ..plan(1) }, next: Plan { mode, ..plan(2) }, other, bad }
    }

    fn proof(side: Side, grant: u64, session: SessionId) -> Proof {
        let plan = plan(1);
        Proof::new(&plan.key, plan.attempt, side, grant, session)
    }

    /// Whoever plans reads this next epoch first.
    fn inputs(&self, next_epoch: Epoch) -> Vec<(&'static str, Input<'_>)> {
        let (attempt, stale) = (self.plan.attempt, Try { id: HandoffId(1), attempt: 9 });
        let back = |name, session| By::Backend { name, session };
        let coordinator = By::Coordinator { term: TERM };
        let older = By::Coordinator { term: TERM - 1 };
        let open = |side, grant, session| Input::Open {
            attempt,
            session,
            proof: Self::proof(side, grant, session),
        };
        let settle = |proof| Input::Settle { attempt, term: TERM, proof };
        let unfreeze =
            |session, boot_id| Input::Unfreeze { attempt, session, boot_id, boot_id_now: 70 };
        let arm = |plan, term| Input::Arm { plan, term, next_epoch, generation: 3 };
        let before = Epoch(next_epoch.0.saturating_sub(1));
        vec![
            ("claim a/1", Input::Claim { name: SOURCE, session: S1 }),
            ("claim a/2", Input::Claim { name: SOURCE, session: S2 }),
            ("claim b/3", Input::Claim { name: DESTINATION, session: D1 }),
            ("claim b/4", Input::Claim { name: DESTINATION, session: D2 }),
            ("claim c/9", Input::Claim { name: STRANGER, session: SessionId(9) }),
            ("rejoin 1", Input::Rejoin { session: S1, epoch: Epoch(1) }),
            ("rejoin 3", Input::Rejoin { session: D1, epoch: Epoch(2) }),
            ("release 1 e1", Input::Release { session: S1, epoch: Epoch(1) }),
            ("release 3 e2", Input::Release { session: D1, epoch: Epoch(2) }),
            ("fence", Input::Fence { term: None, nominee: None, seen: None }),
            ("fence for c", Input::Fence { term: Some(TERM), nominee: Some(STRANGER), seen: None }),
            (
                "fence of an older term",
                Input::Fence { term: Some(TERM - 1), nominee: None, seen: None },
            ),
            ("fence meant for the owner a e1", {
                let seen = Some(Seen { owner: Some(SOURCE), next_epoch: Epoch(2) });
                Input::Fence { term: None, nominee: None, seen }
            }),
            ("arm", arm(&self.plan, TERM)),
            ("arm the next try", arm(&self.next, TERM)),
            ("arm of an older term", arm(&self.plan, TERM - 1)),
            ("arm of a newer term", arm(&self.plan, TERM + 1)),
            ("arm to itself", arm(&self.bad, TERM)),
            ("arm, planned before", {
                Input::Arm { plan: &self.plan, term: TERM, next_epoch: before, generation: 3 }
            }),
            ("arm another, planned before", {
                Input::Arm { plan: &self.other, term: TERM, next_epoch: before, generation: 3 }
            }),
            ("seal 1", Input::Seal { attempt, session: S1 }),
            ("seal 2", Input::Seal { attempt, session: S2 }),
            ("seal 1 of another try", Input::Seal { attempt: stale, session: S1 }),
            ("sealed 1", Input::Sealed { attempt, session: S1 }),
            ("sealed 2", Input::Sealed { attempt, session: S2 }),
            ("activate b/3", Input::Activate { attempt, name: DESTINATION, session: D1 }),
            ("activate b/4", Input::Activate { attempt, name: DESTINATION, session: D2 }),
            ("activate a/1", Input::Activate { attempt, name: SOURCE, session: S1 }),
            (
                "activate another try",
                Input::Activate { attempt: stale, name: DESTINATION, session: D1 },
            ),
            ("reclaim a/1", Input::Reclaim { attempt, by: back(SOURCE, S1) }),
            ("reclaim a/2", Input::Reclaim { attempt, by: back(SOURCE, S2) }),
            ("reclaim b/3", Input::Reclaim { attempt, by: back(DESTINATION, D1) }),
            ("reclaim by the coordinator", Input::Reclaim { attempt, by: coordinator }),
            ("reclaim by an older one", Input::Reclaim { attempt, by: older }),
            ("abdicate b/3", Input::Abdicate { attempt, by: back(DESTINATION, D1) }),
            ("abdicate a/1", Input::Abdicate { attempt, by: back(SOURCE, S1) }),
            ("abdicate by the coordinator", Input::Abdicate { attempt, by: coordinator }),
            ("open source 1", open(Side::Source, 1, S1)),
            ("open source 2, grant 9", open(Side::Source, 9, S2)),
            ("open destination 3", open(Side::Destination, 2, D1)),
            ("open destination 4, grant 9", open(Side::Destination, 9, D2)),
            (
                "open forged",
                Input::Open {
                    attempt,
                    session: D1,
                    proof: Proof { side: Side::Destination, grant: 9, mac: [1; 32] },
                },
            ),
            ("unfreeze 1", unfreeze(S1, 70)),
            ("unfreeze 1 of another boot", unfreeze(S1, 69)),
            ("unfreeze 2", unfreeze(S2, 70)),
            ("settle", settle(None)),
            ("settle: source 1", settle(Some((S1, Self::proof(Side::Source, 1, S1))))),
            ("settle: source 2", settle(Some((S2, Self::proof(Side::Source, 9, S2))))),
            ("settle: destination 3", settle(Some((D1, Self::proof(Side::Destination, 2, D1))))),
            ("settle: destination 4, for 3", {
                settle(Some((D2, Self::proof(Side::Destination, 2, D1))))
            }),
            ("disarm", Input::Disarm { attempt, term: TERM }),
            ("disarm another try", Input::Disarm { attempt: stale, term: TERM }),
            ("disarm by an older term", Input::Disarm { attempt, term: TERM - 1 }),
        ]
    }
}

fn after(record: &AccessRecord, inputs: &[Input<'_>]) -> AccessRecord {
    inputs.iter().fold(record.clone(), |record, input| {
        record.step(*input).unwrap_or_else(|refusal| panic!("{input:?}: {refusal}")).record
    })
}

/// Every phase, and those with a past that matters.
fn states(cast: &Cast) -> Vec<(&'static str, AccessRecord)> {
    let attempt = cast.plan.attempt;
    let claim = Input::Claim { name: SOURCE, session: S1 };
    let arm = Input::Arm { plan: &cast.plan, term: TERM, next_epoch: Epoch(2), generation: 3 };
    let seal = Input::Seal { attempt, session: S1 };
    let sealed = Input::Sealed { attempt, session: S1 };
    let activate = Input::Activate { attempt, name: DESTINATION, session: D1 };
    let reclaim = Input::Reclaim { attempt, by: By::Backend { name: SOURCE, session: S1 } };
    let abdicate = Input::Abdicate { attempt, by: By::Backend { name: DESTINATION, session: D1 } };
    let settle = Input::Settle { attempt, term: TERM, proof: None };
    let disarm = Input::Disarm { attempt, term: TERM };
    let open = |side, grant, session| Input::Open {
        attempt,
        session,
        proof: Cast::proof(side, grant, session),
    };

    let free = AccessRecord::new(ANCHOR);
    let owned = after(&free, &[claim]);
    let armed = after(&owned, &[arm]);
    let is_sealed = after(&armed, &[seal, sealed]);
    let active = after(&is_sealed, &[activate]);
    let reclaimed = after(&is_sealed, &[reclaim]);
    let frozen = armed.clone().after_restart();
    let member = after(&AccessRecord::new(MEMBER), &[claim, arm]);
    let member_sealed = after(&member, &[seal, sealed]);
    vec![
        ("free", free),
        ("owned", owned.clone()),
        (
            "owned, a barred",
            after(&owned, &[Input::Fence { term: None, nominee: None, seen: None }]),
        ),
        ("armed", armed.clone()),
        ("armed, seal seen", after(&armed, &[seal])),
        ("sealed", is_sealed.clone()),
        ("sealed, abdicated", after(&is_sealed, &[abdicate])),
        ("active", active.clone()),
        ("reclaimed", reclaimed.clone()),
        ("reclaimed unsealed", after(&armed, &[reclaim])),
        ("frozen", frozen.clone()),
        ("frozen, seal seen", after(&frozen, &[seal])),
        ("frozen, sealed", after(&frozen, &[seal, sealed])),
        ("frozen, wanted back", after(&frozen, &[reclaim])),
        ("frozen, abdicated", after(&armed, &[abdicate]).after_restart()),
        ("settled: destination", after(&active, &[settle])),
        ("settled: source", after(&reclaimed, &[settle])),
        ("member armed", member.clone()),
        ("member sealed", member_sealed.clone()),
        ("member active", after(&member_sealed, &[open(Side::Destination, 2, D1)])),
        ("member reclaimed", after(&member_sealed, &[open(Side::Source, 1, S1)])),
        ("member armed, seal seen", after(&member, &[seal])),
        ("member disarmed", after(&member, &[disarm])),
        ("member frozen", member.after_restart()),
    ]
}

fn refused(refusal: &Refusal) -> String {
    let text = format!("{refusal:?}");
    text.split([' ', '(']).next().unwrap_or_default().to_owned()
}

fn outcome(state: &AccessRecord, input: Input<'_>) -> String {
    let Step { record, changed, store, reopen } = match state.step(input) {
        Ok(step) => step,
        Err(refusal) => return refused(&refusal),
    };
    if !changed {
        return "same".to_owned();
    }
    let owner = record.owner.as_ref();
    let owner = owner.map_or("-".to_owned(), |o| format!("{}/{}", o.name, o.session.0));
    let mut text = format!("{} e{} {owner}", record.phase.name(), record.epoch);
    if let Some(barred) = &record.barred {
        let _ = write!(text, " barred {barred}");
    }
    if let Some(handoff) = &record.handoff {
        for (set, name) in [
            (handoff.sealed, "sealed"),
            (handoff.seal_seen, "seal-seen"),
            (handoff.abdicated, "abdicated"),
            (handoff.wanted_back, "wanted-back"),
        ] {
            if set {
                let _ = write!(text, " {name}");
            }
        }
        let _ = write!(text, " grant {}", handoff.grant);
    }
    if let Some(decided) = &record.decided {
        let _ = write!(text, " decided {:?} grant {}", decided.winner, decided.grant);
    }
    let drain = if reopen { ", drain" } else { "" };
    let _ = write!(text, " [{store:?}{drain}]");
    text
}

/// Compares with a file, or writes it.
fn is_as_written(path: &str, now: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("BATON_BLESS").is_some() {
        std::fs::write(&path, now).expect("the source tree can be written");
    }
    let written = std::fs::read_to_string(&path).expect("the file is in the source tree");
    let differs = written.lines().zip(now.lines()).find(|(written, now)| written != now);
    assert_eq!(differs, None, "{} differs from the code", path.display());
    assert_eq!(written.lines().count(), now.lines().count());
}

#[test]
fn the_whole_matrix_of_handoffs() {
    let cast = Cast::new(Mode::Fast);
    let mut table = String::new();
    for (name, state) in states(&cast) {
        for (input_name, input) in cast.inputs(state.next_epoch) {
            let _ = writeln!(table, "{name} + {input_name} -> {}", outcome(&state, input));
        }
    }
    is_as_written("src/access/matrix.txt", &table);
}

/// What holds in every cell, whatever is written there.
#[test]
fn no_cell_of_the_matrix_breaks_a_rule() {
    let cast = Cast::new(Mode::Fast);
    for (name, state) in states(&cast) {
        for (input_name, input) in cast.inputs(state.next_epoch) {
            let Ok(step) = state.step(input) else { continue };
            let (cell, record) = (format!("{name} + {input_name}"), &step.record);
            assert!(record.epoch >= state.epoch, "{cell}: the epoch falls");
            assert!(record.next_epoch > record.epoch, "{cell}: its number could be given again");
            assert_eq!(step.changed, *record != state, "{cell}");
            let expected = state.version + u64::from(step.changed);
            assert_eq!(record.version, expected, "{cell}: changes are counted");
            let (before, now) = (state.admits().owner, record.admits().owner);
            // Who says that it is sealed has drained the gate before.
            let drained = matches!(input, Input::Sealed { .. });
            if before.is_some() && before != now && !drained {
                assert!(step.reopen, "{cell}: an epoch ends without a drain");
            }
            assert_eq!(AccessRecord::decode(&record.encode()).as_ref(), Ok(record), "{cell}");
            // Said again, it changes nothing more: the sender may have lost the answer.
            if let Ok(again) = record.step(input) {
                let fence = matches!(input, Input::Fence { .. });
                assert!(fence || !again.changed, "{cell}: not idempotent");
            }
        }
    }
}

/// Whatever was under way for it, and whoever shows what: an ARM of its plan, a seal,
/// a decision that an anchor made before it forgot.
#[test]
fn nothing_of_a_disarmed_handoff_comes_back() {
    let cast = Cast::new(Mode::Fast);
    let disarm = Input::Disarm { attempt: cast.plan.attempt, term: TERM };
    let mut disarmed = 0;
    for (name, state) in states(&cast) {
        let Ok(step) = state.step(disarm) else { continue };
        let record = step.record;
        disarmed += 1;
        let member = state.volume != ANCHOR && state.phase == Phase::Armed;
        assert!(member, "{name}: the destination may have won");
        assert_eq!((step.store, step.reopen), (Store::First, false), "{name}: interrupted");
        assert_eq!(record.admits(), state.admits(), "{name}: the source goes on");
        assert_eq!(record.next_epoch, state.next_epoch, "{name}: a number is given out again");
        // As planned before the handoff was armed.
        for (input_name, input) in cast.inputs(Epoch(3)) {
            let other = match input {
                Input::Claim { .. }
                | Input::Rejoin { .. }
                | Input::Release { .. }
                | Input::Fence { .. } => continue,
                Input::Arm { next_epoch, .. } => next_epoch >= record.next_epoch,
                _ => false,
            };
            assert!(!other, "{input_name} is late");
            assert!(record.step(input).is_err(), "{name}, disarmed + {input_name}");
        }
    }
    assert_eq!(disarmed, 2, "armed, and with its seal on the way");
}

const LEGEND: &str = "\
The anchor in fast mode. The source was granted epoch 1; 2 is the destination's number, 3 the
source's way back, 4 the next that nobody had. Bold: the next phase; noted: the phase stays and
the record changes; same: nothing changes, and the sender is told so again; a word alone: the
refusal. `first`: durable before anybody is told; `later`: told first; neither: memory only.
`drain`: the gate is shut and empty before anybody is told.

";

/// What the table in the document shows: an input, and the states it is shown
/// in.
fn documented() -> String {
    const DISARM: &str = "disarm";
    let cast = Cast::new(Mode::Fast);
    let shown = [
        ("claim a/2", "claim, next process of the source"),
        ("claim b/3", "claim, destination"),
        ("release 1 e1", "release, source"),
        ("fence", "fence"),
        ("arm", "arm"),
        ("arm, planned before", "arm that comes again, or late"),
        ("arm another, planned before", "arm of another handoff that comes late"),
        ("seal 1", "seal (asked)"),
        ("sealed 1", "sealed (all done, gate drained)"),
        ("activate b/3", "activate"),
        ("activate b/4", "activate, next process of the destination"),
        ("reclaim a/1", "reclaim"),
        ("abdicate b/3", "abdicate, destination"),
        ("abdicate by the coordinator", "abdicate, coordinator"),
        ("unfreeze 1", "unfreeze"),
        ("open destination 3", "open, destination's proof"),
        ("open source 1", "open, source's proof"),
        ("settle", "settle"),
        (DISARM, "disarm; at another member than the anchor, which refuses it"),
    ];
    let columns = ["free", "owned", "armed", "sealed", "active", "reclaimed", "frozen"];
    let states = states(&cast);
    let named = |wanted: &str| states.iter().find(|(name, _)| *name == wanted);
    let state = |column| &named(column).expect("a state").1;
    let mut table = LEGEND.to_owned();
    let _ = write!(table, "| input | {} |\n|---|", columns.join(" | "));
    table.push_str(&"---|".repeat(columns.len()));
    table.push('\n');
    for (input_name, title) in shown {
        let cells = columns.map(|column| {
            let member = named(&format!("member {column}")).filter(|_| input_name == DISARM);
            let state = member.map_or_else(|| state(column), |(_, state)| state);
            let inputs = cast.inputs(state.next_epoch);
            let input = inputs.iter().find(|(name, _)| *name == input_name);
            cell(state, input.expect("an input").1)
        });
        let _ = writeln!(table, "| {title} | {} |", cells.join(" | "));
    }
    table
}

fn cell(state: &AccessRecord, input: Input<'_>) -> String {
    let step = match state.step(input) {
        Ok(step) if !step.changed => return "same".to_owned(),
        Ok(step) => step,
        Err(refusal) => return refused(&refusal),
    };
    let mut text = if step.record.phase == state.phase {
        "noted".to_owned()
    } else {
        format!("**{}**", step.record.phase.name())
    };
    if step.record.epoch != state.epoch {
        let _ = write!(text, " e{}", step.record.epoch);
    }
    text.push_str(match step.store {
        Store::First => ", first",
        Store::Later => ", later",
        Store::Never => "",
    });
    text.push_str(if step.reopen { ", drain" } else { "" });
    text
}

/// A server with a disk, and what the two sides must not say.
struct Life {
    disk: AccessRecord,
    later: Option<AccessRecord>,
    record: AccessRecord,
    /// Who was let in under each epoch.
    holders: BTreeMap<Epoch, SessionId>,
    winners: BTreeMap<Try, Side>,
    was_sealed: bool,
    was_activated: bool,
}

impl Life {
    /// The sides keep their promises; everything else may come at any time.
    fn may_say(&self, input: &Input<'_>) -> bool {
        match input {
            Input::Unfreeze { .. } => !self.was_sealed,
            Input::Abdicate { by: By::Backend { .. }, .. } => !self.was_activated,
            Input::Activate { .. } if self.record.phase == Phase::Frozen => self.was_sealed,
            _ => true,
        }
    }

    fn step(&mut self, input: Input<'_>) -> Result<(), TestCaseError> {
        if !self.may_say(&input) {
            return Ok(());
        }
        let Ok(step) = self.record.step(input) else { return Ok(()) };
        prop_assert!(step.record.epoch >= self.record.epoch, "the epoch falls");
        match step.store {
            Store::Never => {}
            Store::Later => self.later = Some(step.record.clone()),
            Store::First => {
                self.later = None;
                self.disk = step.record.clone();
            }
        }
        self.was_sealed |= matches!(input, Input::Seal { .. } | Input::Sealed { .. });
        self.was_activated |= step.record.phase == Phase::Active;
        self.record = step.record;
        self.judge()
    }

    fn restart(&mut self, stored: bool) -> Result<(), TestCaseError> {
        if let (true, Some(later)) = (stored, self.later.take()) {
            self.disk = later;
        }
        self.later = None;
        self.record = self.disk.clone().after_restart();
        prop_assert_eq!(AccessRecord::decode(&self.record.encode()), Ok(self.record.clone()));
        self.judge()
    }

    fn judge(&mut self) -> Result<(), TestCaseError> {
        if let (Some(epoch), Some(owner)) = (self.record.admits().owner, &self.record.owner) {
            let holder = self.holders.entry(epoch).or_insert(owner.session);
            prop_assert_eq!(*holder, owner.session, "an epoch for two sessions");
            let latest = self.holders.last_key_value().map(|(epoch, _)| *epoch);
            prop_assert_eq!(latest, Some(epoch), "an old epoch is let in again");
        }
        for number in [1, 2] {
            let attempt = Try { id: HandoffId(1), attempt: number };
            if let Some(winner) = self.record.winner(attempt) {
                let known = self.winners.entry(attempt).or_insert(winner);
                prop_assert_eq!(*known, winner, "a decision is undone");
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever comes in whatever order, with restarts that lose what may be
    /// lost: epochs only grow, each is one session's, a decision stands.
    #[test]
    fn a_life_with_restarts_keeps_the_rules(
        fast: bool,
        steps in prop::collection::vec((0usize..60, any::<bool>()), 0..40),
    ) {
        let cast = Cast::new(if fast { Mode::Fast } else { Mode::Base });
        let claim = Input::Claim { name: SOURCE, session: S1 };
        let owned = after(&AccessRecord::new(ANCHOR), &[claim]);
        let armed = Input::Arm { plan: &cast.plan, term: TERM, next_epoch: Epoch(2), generation: 1 };
        let record = after(&owned, &[armed]);
        let mut life = Life {
            disk: record.clone(),
            later: None,
            record,
            holders: BTreeMap::new(),
            winners: BTreeMap::new(),
            was_sealed: false,
            was_activated: false,
        };
        for (which, stored) in steps {
            let inputs = cast.inputs(life.record.next_epoch);
            match inputs.get(which) {
                // Proofs are the anchor's to give, and this is the anchor.
                Some((_, Input::Open { .. } | Input::Settle { proof: Some(_), .. })) => {}
                // A fence begins anew; it is tried elsewhere.
                Some((_, Input::Fence { .. })) => {}
                Some((_, input)) => life.step(*input)?,
                None => life.restart(stored)?,
            }
        }
    }
}

#[test]
fn the_table_of_the_document_is_the_code() {
    const BEGIN: &str = "<!-- generated -->\n";
    const END: &str = "<!-- /generated -->";
    let path = "../docs/handoff.md";
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = std::fs::read_to_string(file).expect("the document is in the source tree");
    let (head, rest) = text.split_once(BEGIN).expect("the document has the first marker");
    let (_, tail) = rest.split_once(END).expect("the document has the second marker");
    is_as_written(path, &format!("{head}{BEGIN}{}{END}{tail}", documented()));
}
