//! A server in the middle of very many handoffs keeps them apart (F22 of docs/scenarios.md).

mod common;

use baton_protocol::access::Phase;
use baton_protocol::handoff::{Ask, HandoffId, Outcome, Try};
use baton_protocol::{AccessMode, Status};
use common::Fixture;
use common::handoff::{D, DESTINATION, Member, S, SOURCE, arm_try, which_try};

const HANDOFFS: usize = 1000;
/// Threads that make and settle; the handoffs themselves are all under way at once.
const HANDS: usize = 8;

fn attempt(number: usize) -> Try {
    Try { id: HandoffId(0x1000 + number as u128), attempt: 1 }
}

/// Does something for each of them on a few threads.
fn each(members: &[Member], act: impl Fn(usize, &Member) + Sync) {
    std::thread::scope(|scope| {
        for hand in 0..HANDS {
            let act = &act;
            scope.spawn(move || {
                for (number, member) in members.iter().enumerate().skip(hand).step_by(HANDS) {
                    act(number, member);
                }
            });
        }
    });
}

#[test]
fn f22_a_thousand_handoffs_at_once_are_each_decided_for_the_one_who_asked() {
    let fixture = Fixture::start();
    let made: Vec<Member> = std::thread::scope(|scope| {
        let hands: Vec<_> = (0..HANDS)
            .map(|hand| {
                let (data, admin) = (fixture.data, fixture.admin);
                scope.spawn(move || {
                    let mine = (hand..HANDOFFS).step_by(HANDS);
                    mine.map(|n| Member::create(data, admin, &format!("d{n}"))).collect::<Vec<_>>()
                })
            })
            .collect();
        hands.into_iter().flat_map(|hand| hand.join().expect("made")).collect()
    });
    let mut backends: Vec<_> = made
        .iter()
        .map(|member| {
            let source = member.control(SOURCE, S, AccessMode::Owner, 0);
            let destination = member.control(DESTINATION, D, AccessMode::Standby, 0);
            (source, destination)
        })
        .collect();
    each(&made, |number, member| arm_try(&[member], "fast", attempt(number)));

    // All seals are on their way before the first is answered; so are all decisions, every third for the source.
    let seals: Vec<u64> = backends
        .iter_mut()
        .enumerate()
        .map(|(number, (source, _))| source.send_ask_of(attempt(number), Ask::Seal(Vec::new())))
        .collect();
    for ((source, _), seal) in backends.iter_mut().zip(seals) {
        let sealed = source.told(seal);
        assert_eq!((sealed.outcome, sealed.record.phase), (Outcome::Granted, Phase::Sealed));
    }
    let goes_back = |number: usize| number.is_multiple_of(3);
    let asks: Vec<u64> = backends
        .iter_mut()
        .enumerate()
        .map(|(number, (source, destination))| {
            let (winner, ask) = if goes_back(number) {
                (source, Ask::Reclaim)
            } else {
                (destination, Ask::Activate)
            };
            winner.send_ask_of(attempt(number), ask)
        })
        .collect();
    let mut proofs = Vec::with_capacity(HANDOFFS);
    for (number, ask) in asks.into_iter().enumerate() {
        let (source, destination) = &mut backends[number];
        let (winner, loser, late) = if goes_back(number) {
            (source, destination, Ask::Activate)
        } else {
            (destination, source, Ask::Reclaim)
        };
        let won = winner.told(ask);
        assert_eq!(won.outcome, Outcome::Granted, "{number}");
        assert_eq!(loser.ask_of(attempt(number), late).outcome, Outcome::Lost, "{number}");
        let proof = won.proof.expect("the winner's proof");
        assert_eq!(winner.open(attempt(number), proof), Status::Ok, "{number}");
        proofs.push(proof);
    }
    // The proof of one handoff opens no other volume.
    for (number, proof) in proofs.into_iter().enumerate() {
        let other = (number + 3) % HANDOFFS;
        let (source, destination) = &mut backends[other];
        let thief = if goes_back(other) { source } else { destination };
        assert_eq!(thief.open(attempt(number), proof), Status::StaleEpoch, "{number}");
    }
    each(&made, |number, member| {
        let (status, record) = member.post("settle", &which_try(1, attempt(number)));
        let owner = if goes_back(number) { SOURCE } else { DESTINATION };
        assert_eq!((status, record["phase"].as_str()), (200, Some("owned")), "{record}");
        assert_eq!(record["owner"]["name"], owner);
    });
}
