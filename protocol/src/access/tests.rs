use super::*;
use crate::handoff::{HandoffId, Members, Plan};
use proptest::prelude::*;

const A: &str = "host-a/vm1";
const B: &str = "host-b/vm1";

fn owned_by(name: &str, session: u64) -> AccessRecord {
    let record = AccessRecord::new(VolumeId(7));
    record.step(Input::Claim { name, session: SessionId(session) }).expect("free").record
}

fn fenced(nominee: Option<&str>) -> AccessRecord {
    owned_by(A, 1).step(Input::Fence { term: None, nominee, seen: None }).expect("fence").record
}

/// Every state against every input, written out: the outcome as a short text,
/// so that a change of behaviour shows as a changed line.
#[test]
fn the_whole_matrix() {
    let states = [
        ("free", AccessRecord::new(VolumeId(7))),
        ("A/1 e1", owned_by(A, 1)),
        ("barred A e2", fenced(None)),
        ("nominated B e2", fenced(Some(B))),
    ];
    let inputs: [(&str, Input<'_>); 11] = [
        ("claim A/1", Input::Claim { name: A, session: SessionId(1) }),
        ("claim A/2", Input::Claim { name: A, session: SessionId(2) }),
        ("claim B/3", Input::Claim { name: B, session: SessionId(3) }),
        ("claim \"\"", Input::Claim { name: "", session: SessionId(3) }),
        ("rejoin 1 e1", Input::Rejoin { session: SessionId(1), epoch: Epoch(1) }),
        ("rejoin 1 e2", Input::Rejoin { session: SessionId(1), epoch: Epoch(2) }),
        ("rejoin 0 e2", Input::Rejoin { session: SessionId(0), epoch: Epoch(2) }),
        ("release 1 e1", Input::Release { session: SessionId(1), epoch: Epoch(1) }),
        ("release 9 e1", Input::Release { session: SessionId(9), epoch: Epoch(1) }),
        ("fence", Input::Fence { term: None, nominee: None, seen: None }),
        ("fence to B", Input::Fence { term: Some(4), nominee: Some(B), seen: None }),
    ];
    let mut table = String::new();
    for (state_name, state) in &states {
        for (input_name, input) in &inputs {
            let outcome = match state.step(*input) {
                Ok(Step { record, changed, .. }) => format!(
                    "{:?} e{} {}{}{}",
                    record.phase,
                    record.epoch,
                    record.owner.map_or("-".to_owned(), |o| format!("{}/{}", o.name, o.session.0)),
                    record.barred.map_or(String::new(), |b| format!(" barred {b}")),
                    if changed { "" } else { " (same)" },
                ),
                Err(Refusal::NotOwner { .. }) => "NotOwner".to_owned(),
                Err(Refusal::Barred { .. }) => "Barred".to_owned(),
                Err(Refusal::StaleEpoch { current }) => format!("Stale, now e{current}"),
                Err(Refusal::StaleTerm { .. }) => "StaleTerm".to_owned(),
                Err(Refusal::BadName) => "BadName".to_owned(),
                Err(other) => format!("{other:?}"),
            };
            table.push_str(&format!("{state_name} + {input_name} -> {outcome}\n"));
        }
    }
    let expected = "\
free + claim A/1 -> Owned e1 host-a/vm1/1
free + claim A/2 -> Owned e1 host-a/vm1/2
free + claim B/3 -> Owned e1 host-b/vm1/3
free + claim \"\" -> BadName
free + rejoin 1 e1 -> Stale, now e0
free + rejoin 1 e2 -> Stale, now e0
free + rejoin 0 e2 -> Stale, now e0
free + release 1 e1 -> Stale, now e0
free + release 9 e1 -> Stale, now e0
free + fence -> Free e1 -
free + fence to B -> Owned e1 host-b/vm1/0
A/1 e1 + claim A/1 -> Owned e1 host-a/vm1/1 (same)
A/1 e1 + claim A/2 -> Owned e2 host-a/vm1/2
A/1 e1 + claim B/3 -> NotOwner
A/1 e1 + claim \"\" -> BadName
A/1 e1 + rejoin 1 e1 -> Owned e1 host-a/vm1/1 (same)
A/1 e1 + rejoin 1 e2 -> Stale, now e1
A/1 e1 + rejoin 0 e2 -> Stale, now e1
A/1 e1 + release 1 e1 -> Free e1 -
A/1 e1 + release 9 e1 -> Stale, now e1
A/1 e1 + fence -> Free e2 - barred host-a/vm1
A/1 e1 + fence to B -> Owned e2 host-b/vm1/0 barred host-a/vm1
barred A e2 + claim A/1 -> Barred
barred A e2 + claim A/2 -> Barred
barred A e2 + claim B/3 -> Owned e3 host-b/vm1/3
barred A e2 + claim \"\" -> BadName
barred A e2 + rejoin 1 e1 -> Stale, now e2
barred A e2 + rejoin 1 e2 -> Stale, now e2
barred A e2 + rejoin 0 e2 -> Stale, now e2
barred A e2 + release 1 e1 -> Stale, now e2
barred A e2 + release 9 e1 -> Stale, now e2
barred A e2 + fence -> Free e3 - barred host-a/vm1
barred A e2 + fence to B -> Owned e3 host-b/vm1/0 barred host-a/vm1
nominated B e2 + claim A/1 -> Barred
nominated B e2 + claim A/2 -> Barred
nominated B e2 + claim B/3 -> Owned e3 host-b/vm1/3
nominated B e2 + claim \"\" -> BadName
nominated B e2 + rejoin 1 e1 -> Stale, now e2
nominated B e2 + rejoin 1 e2 -> Stale, now e2
nominated B e2 + rejoin 0 e2 -> Stale, now e2
nominated B e2 + release 1 e1 -> Stale, now e2
nominated B e2 + release 9 e1 -> Stale, now e2
nominated B e2 + fence -> Free e3 - barred host-b/vm1
nominated B e2 + fence to B -> Owned e3 host-b/vm1/0
";
    assert_eq!(table, expected);
}

#[test]
fn an_older_coordinator_is_refused() {
    let record = owned_by(A, 1)
        .step(Input::Fence { term: Some(5), nominee: None, seen: None })
        .expect("fence")
        .record;
    assert_eq!(
        record.step(Input::Fence { term: Some(4), nominee: None, seen: None }),
        Err(Refusal::StaleTerm { term: 4, current: 5 })
    );
    assert!(record.step(Input::Fence { term: Some(5), nominee: None, seen: None }).is_ok());
}

/// Rule 8: what is repeated or comes late fences nobody else.
#[test]
fn a_fence_is_only_for_whom_it_was_meant() {
    let before = owned_by(A, 1);
    let seen = Some(Seen { owner: Some(A), next_epoch: before.next_epoch });
    let fence = Input::Fence { term: None, nominee: Some(B), seen };
    let fenced = before.step(fence).expect("as it was read").record;
    let stale = |record: &AccessRecord, owner: &str| {
        let refusal = record.step(fence).expect_err("it comes again");
        assert_eq!(refusal, Refusal::StaleFence { owner: owner.to_owned(), epoch: record.epoch });
    };
    // Not the nominee, whether or not it has come.
    stale(&fenced, B);
    let claimed = fenced.step(Input::Claim { name: B, session: SessionId(9) }).expect("B").record;
    stale(&claimed, B);
    // Nor the same owner as another process, which somebody let in on purpose.
    let again = before.step(Input::Claim { name: A, session: SessionId(7) }).expect("A").record;
    stale(&again, A);
    // An operator who has looked at nothing means whoever it is.
    assert!(claimed.step(Input::Fence { term: None, nominee: None, seen: None }).is_ok());
}

/// Changing these bytes changes the disk: it needs a new format number.
#[test]
fn golden_record_format_1() {
    let record = AccessRecord {
        version: 3,
        epoch: Epoch(4),
        next_epoch: Epoch(5),
        phase: Phase::Owned,
        owner: Some(Owner { name: "h".to_owned(), session: SessionId(5) }),
        barred: Some("bb".to_owned()),
        coordinator_term: 6,
        ..AccessRecord::new(VolumeId(0x0102))
    };
    let mut golden = vec![1, 1, 0, 0, 1, 0, 2, 0, 2, 1, 0, 0, 0, 0, 0, 0];
    for number in [3u64, 4, 6, 5] {
        golden.extend_from_slice(&number.to_le_bytes());
    }
    golden.extend_from_slice(b"hbb");
    // Written by servers before handoffs existed; read for ever.
    assert_eq!(AccessRecord::decode(&golden), Ok(record.clone()));
    assert_eq!(AccessRecord::decode(&record.encode()), Ok(record));
}

/// Changing these bytes changes the disk and the wire: it needs a new format
/// number.
#[test]
fn golden_record_format_2() {
    let plan = Plan {
        attempt: Try { id: HandoffId(0x0a0b), attempt: 3 },
        vm: "vm".to_owned(),
        from: "h".to_owned(),
        to: "t".to_owned(),
        anchor: VolumeId(0x11),
        members: Members { count: 2, hash: 0x12 },
        mode: Mode::Fast,
        key: Key([0xee; 32]),
    };
    let record = AccessRecord {
        version: 3,
        epoch: Epoch(4),
        next_epoch: Epoch(8),
        phase: Phase::Frozen,
        owner: Some(Owner { name: "h".to_owned(), session: SessionId(5) }),
        barred: Some("bb".to_owned()),
        coordinator_term: 6,
        handoff: Some(Handoff {
            plan,
            e_to: Epoch(0x21),
            e_back: Epoch(0x22),
            generation: 0x23,
            grant: 0x24,
            sealed: true,
            seal_seen: false,
            abdicated: true,
            wanted_back: false,
        }),
        decided: Some(Decided {
            attempt: Try { id: HandoffId(0x0c), attempt: 1 },
            winner: Side::Destination,
            grant: 0x31,
            anchor: true,
            key: Key([0xdd; 32]),
        }),
        ..AccessRecord::new(VolumeId(0x0102))
    };
    let numbers = |numbers: &[u64]| -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    };
    let mut golden = vec![2, 6, 0b1111, 0, 0, 0, 0, 0];
    golden.extend(numbers(&[0x0102, 3, 4, 8, 6]));
    golden.extend(numbers(&[5]));
    golden.extend_from_slice(b"\x01\x00h\x02\x00bb");
    // The handoff: id, attempt, mode, flags sealed and abdicated, members.
    golden.extend_from_slice(&0x0a0b_u128.to_le_bytes());
    golden.extend_from_slice(&[3, 0, 0, 0, 1, 0b0101, 2, 0]);
    golden.extend(numbers(&[0x12, 0x11, 0x21, 0x22, 0x23, 0x24]));
    golden.extend_from_slice(&[0xee; 32]);
    golden.extend_from_slice(b"\x01\x00h\x01\x00t\x02\x00vm");
    // How the last one ended: id, attempt, winner, at the anchor, grant, key.
    golden.extend_from_slice(&0x0c_u128.to_le_bytes());
    golden.extend_from_slice(&[1, 0, 0, 0, 1, 1, 0, 0]);
    golden.extend(numbers(&[0x31]));
    golden.extend_from_slice(&[0xdd; 32]);
    assert_eq!(record.encode(), golden);
    assert_eq!(AccessRecord::decode(&golden), Ok(record));
    for len in 0..golden.len() {
        assert_eq!(AccessRecord::decode(&golden[..len]), Err(RecordError), "cut at {len}");
    }
}

/// What a restart in fast mode may have forgotten.
#[test]
fn what_a_restart_makes_of_each_phase() {
    let handoff = |mode, sealed, abdicated| Handoff {
        plan: Plan {
            attempt: Try { id: HandoffId(1), attempt: 1 },
            vm: "vm".to_owned(),
            from: A.to_owned(),
            to: B.to_owned(),
            anchor: VolumeId(7),
            members: Members { count: 1, hash: 1 },
            mode,
            key: Key([1; 32]),
        },
        e_to: Epoch(2),
        e_back: Epoch(3),
        generation: 1,
        sealed,
        seal_seen: true,
        abdicated,
        wanted_back: true,
        grant: 0,
    };
    let restarted = |phase, mode, abdicated| {
        let stored = AccessRecord {
            phase,
            handoff: Some(handoff(mode, false, abdicated)),
            ..owned_by(A, 1)
        };
        let record = stored.after_restart();
        let handoff = record.handoff.expect("kept");
        assert!(!handoff.seal_seen && !handoff.wanted_back, "these are of one incarnation");
        (record.phase, handoff.sealed)
    };
    for phase in [Phase::Armed, Phase::Sealed, Phase::Active, Phase::Reclaimed] {
        assert_eq!(restarted(phase, Mode::Base, false).0, phase);
    }
    assert_eq!(restarted(Phase::Armed, Mode::Fast, false), (Phase::Frozen, false));
    // The destination may have activated since.
    assert_eq!(restarted(Phase::Sealed, Mode::Fast, false), (Phase::Frozen, true));
    assert_eq!(restarted(Phase::Sealed, Mode::Fast, true).0, Phase::Sealed);
    assert_eq!(restarted(Phase::Active, Mode::Fast, false).0, Phase::Active);
    assert_eq!(restarted(Phase::Reclaimed, Mode::Fast, false).0, Phase::Reclaimed);
}

/// A grant that only changes memory must not forget who is the coordinator.
#[test]
fn a_newer_term_is_durable_whatever_it_asks() {
    let attempt = Try { id: HandoffId(1), attempt: 1 };
    let plan = Plan {
        attempt,
        vm: "vm".to_owned(),
        from: A.to_owned(),
        to: B.to_owned(),
        anchor: VolumeId(7),
        members: Members { count: 1, hash: 1 },
        mode: Mode::Fast,
        key: Key([1; 32]),
    };
    let owned = owned_by(A, 1);
    let next_epoch = owned.next_epoch;
    let armed = owned.step(Input::Arm { plan: &plan, term: 1, next_epoch, generation: 1 });
    let frozen = armed.expect("owned").record.after_restart();
    let by = |term| By::Coordinator { term };
    let step = |term| frozen.step(Input::Reclaim { attempt, by: by(term) }).expect("wanted back");
    assert_eq!(step(1).store, Store::Never);
    assert_eq!(step(2).store, Store::First);
}

proptest! {
    /// Epochs only grow, each is granted to one session, and storing loses nothing.
    #[test]
    fn no_epoch_has_two_holders(steps in prop::collection::vec((0u8..5, 0usize..3, 1u64..5, 0u64..6), 0..200)) {
        let names = [A, B, "host-c/vm1"];
        let mut record = AccessRecord::new(VolumeId(7));
        let mut holders = std::collections::BTreeMap::new();
        for (kind, name, session, number) in steps {
            // A session belongs to one name, as it is random in life.
            let session = SessionId(session * 10 + name as u64);
            let epoch = Epoch(number);
            let input = match kind {
                0 | 1 => Input::Claim { name: names[name], session },
                2 => Input::Rejoin { session, epoch },
                3 => Input::Release { session, epoch: record.epoch },
                _ => Input::Fence { term: Some(number), nominee: (number % 2 == 0).then_some(names[name]), seen: None },
            };
            let Ok(step) = record.step(input) else { continue };
            prop_assert!(step.record.epoch >= record.epoch);
            prop_assert_eq!(step.changed, step.record != record);
            record = step.record;
            if let Some(owner) = &record.owner && owner.session.0 != 0 {
                let holder = holders.entry(record.epoch).or_insert(owner.session);
                prop_assert_eq!(*holder, owner.session, "epoch granted twice");
            }
            prop_assert_eq!(AccessRecord::decode(&record.encode()), Ok(record.clone()));
        }
    }

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        if let Ok(record) = AccessRecord::decode(&bytes) {
            prop_assert_eq!(AccessRecord::decode(&record.encode()), Ok(record));
        }
    }
}
