//! A server moves a thousand volumes at the same time.

mod common;

use baton_protocol::access::Phase;
use baton_protocol::handoff::{Answer, Ask, Outcome};
use baton_protocol::{AccessMode, Epoch, Seq, Status};
use common::handoff::{D, DESTINATION, Member, S, SOURCE, TRY, plan, which};
use common::{Client, Fixture, metric};

const HANDOFFS: usize = 1000;
/// Callers of the admin API at the same time.
const CALLERS: usize = 64;

/// The same to every member, by many at once.
fn each(members: &[Member], act: impl Fn(&Member) + Sync) {
    let chunk = members.len().div_ceil(CALLERS);
    std::thread::scope(|scope| {
        for members in members.chunks(chunk) {
            let act = &act;
            scope.spawn(move || members.iter().for_each(act));
        }
    });
}

/// SEAL goes out for all before any is answered; each destination activates when
/// it hears of its seal, and opens.
fn move_all(sources: &mut [Client], destinations: &mut [Client]) {
    let parked: Vec<(Answer, u64)> = destinations
        .iter_mut()
        .map(|destination| {
            let now = destination.access();
            let parked = destination.watch(&now);
            (now, parked)
        })
        .collect();
    for source in sources.iter_mut() {
        source.send_ask(Ask::Seal(Vec::new()));
    }
    let mut asked = Vec::new();
    for (destination, (_, parked)) in destinations.iter_mut().zip(parked) {
        let mut news = destination.told(parked);
        while news.record.phase != Phase::Sealed {
            let parked = destination.watch(&news);
            news = destination.told(parked);
        }
        asked.push(destination.send_ask(Ask::Activate));
    }
    let mut proofs = Vec::new();
    for (destination, asked) in destinations.iter_mut().zip(asked) {
        let answer = destination.told(asked);
        assert_eq!(answer.outcome, Outcome::Granted);
        proofs.push(answer.proof.expect("the winner's"));
    }
    for source in sources {
        let (header, body) = source.reply();
        assert_eq!((header.seq, header.status), (Seq(source.seq), Status::Ok));
        assert_eq!(Answer::decode(&body).expect("an answer").outcome, Outcome::Granted);
    }
    for (destination, proof) in destinations.iter_mut().zip(proofs) {
        assert_eq!(destination.open(TRY, proof), Status::Ok);
        assert_eq!(destination.epoch, Epoch(2));
        assert_eq!(destination.write(0, &[2; 512]), Status::Ok);
    }
}

#[test]
fn a_thousand_handoffs_at_the_same_time() {
    let fixture = Fixture::start();
    let members: Vec<Member> = (0..HANDOFFS)
        .map(|n| Member::create(fixture.data, fixture.admin, &format!("d{n}")))
        .collect();
    let connect = |mode, owner: &str, session| -> Vec<Client> {
        members.iter().map(|member| member.control(owner, session, mode, 0)).collect()
    };
    let mut sources = connect(AccessMode::Owner, SOURCE, S);
    let mut destinations = connect(AccessMode::Standby, DESTINATION, D);
    let stores = || metric(fixture.admin, "baton_access_stores_total{when=\"first\"}");
    let before = stores();
    each(&members, |member| {
        let plan = plan(&[member], "fast", TRY);
        let (status, record) = member.post("arm", &serde_json::json!({"term": 1, "plan": plan}));
        assert_eq!((status, record["phase"].as_str()), (200, Some("armed")));
    });
    assert_eq!(stores() - before, HANDOFFS as u64, "each is durable before it is answered");
    move_all(&mut sources, &mut destinations);
    each(&members, |member| {
        let (status, record) = member.post("settle", &which(1));
        assert_eq!((status, record["owner"]["name"].as_str()), (200, Some(DESTINATION)));
    });
    for source in &mut sources {
        assert_eq!(source.write(0, &[9; 512]), Status::StaleEpoch);
    }
    for member in &members {
        let mut data = [0; 512];
        fixture.volume(&member.name).data.read(0, &mut data).expect("read");
        assert_eq!(data, [2; 512]);
    }
}
