//! Every standing x every input, as `matrix.txt`.

use std::fmt::Write;
use std::path::Path;

use super::*;

/// Every standing against every input, as text.
#[test]
fn the_whole_matrix() {
    let mut parked = Bench::sealed_source();
    parked.hear(ANCHOR, 1, Asked::Reclaim, Outcome::Lost);
    let mut one_stopped = Bench::armed_source();
    one_stopped.role.step(Input::Stopped { member: OTHER, migrating: true });
    let mut sealing = Bench::armed_source();
    sealing.stop();
    let mut reclaiming = Bench::sealed_source();
    reclaiming.role.step(Input::Started { member: ANCHOR });
    let benches = [
        ("serving", Bench::source()),
        ("serving, armed", Bench::armed_source()),
        ("serving, armed, one stopped", one_stopped),
        ("sealing", sealing),
        ("sealed", Bench::sealed_source()),
        ("reclaiming", reclaiming),
        ("standby", Bench::with(DESTINATION, D1)),
        ("ready", Bench::destination()),
        ("activating", Bench::activating()),
        ("granted", Bench::granted().0),
        ("parked", parked),
    ];
    let mut table = String::new();
    for (name, bench) in &benches {
        for (input_name, input) in inputs(bench) {
            let mut role = bench.role.clone();
            let outputs = role.step(input);
            let outputs: Vec<String> = outputs.iter().map(say).collect();
            let outputs = if outputs.is_empty() { "-".to_owned() } else { outputs.join(", ") };
            let standing = role.standing();
            let _ = writeln!(table, "{name} + {input_name} -> {standing:?}: {outputs}");
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/handoff/role/matrix.txt");
    if std::env::var_os("BATON_BLESS").is_some() {
        std::fs::write(&path, &table).expect("the source tree can be written");
    }
    let written = std::fs::read_to_string(&path).expect("the file is in the source tree");
    let differs = written.lines().zip(table.lines()).find(|(written, now)| written != now);
    assert_eq!(differs, None, "the matrix differs from the code");
    assert_eq!(written.lines().count(), table.lines().count());
}

fn inputs(bench: &Bench) -> Vec<(&'static str, Input)> {
    let (member, attempt) = (OTHER, attempt_of(1));
    let view = |record: AccessRecord, boot_id| Input::View {
        member,
        boot_id,
        record: Box::new(record.without_keys()),
    };
    let now = bench.records[OTHER].clone();
    let fence = RecordInput::Fence { term: None, nominee: None, seen: None };
    let fenced = now.step(fence).expect("always").record;
    let answered = |member, ask, outcome| Input::Answered {
        member,
        attempt,
        ask,
        answer: bench.answer(member, 1, outcome),
    };
    vec![
        ("view, the same", view(now.clone(), 1)),
        ("view, fenced", view(fenced, 1)),
        ("view, after a restart", view(now.after_restart(), 2)),
        ("claimed", Input::Claimed { member, epoch: Epoch(9) }),
        ("started", Input::Started { member }),
        ("stopped", Input::Stopped { member, migrating: false }),
        ("stopped under a migration", Input::Stopped { member, migrating: true }),
        ("seal: not sealed", answered(OTHER, Asked::Seal, Outcome::NotSealed)),
        ("seal: refused", answered(OTHER, Asked::Seal, Outcome::Refused)),
        ("activate: granted, unproven", answered(ANCHOR, Asked::Activate, Outcome::Granted)),
        ("activate: lost", answered(ANCHOR, Asked::Activate, Outcome::Lost)),
        ("activate: no such", answered(ANCHOR, Asked::Activate, Outcome::NoSuchHandoff)),
        ("reclaim: unknown", answered(ANCHOR, Asked::Reclaim, Outcome::Unknown)),
        ("reclaim: lost", answered(ANCHOR, Asked::Reclaim, Outcome::Lost)),
        ("abdicate: granted", answered(ANCHOR, Asked::Abdicate, Outcome::Granted)),
        ("opened", Input::Opened { member, epoch: Some(Epoch(9)) }),
        ("open refused", Input::Opened { member, epoch: None }),
        ("stuck", Input::Stuck { member }),
        ("order seal", Input::Order(Order::Seal)),
        ("order activate", Input::Order(Order::Activate)),
        ("order abdicate", Input::Order(Order::Abdicate)),
        ("order reclaim", Input::Order(Order::Reclaim)),
        ("a member that is not there", Input::Started { member: 9 }),
    ]
}

fn say(output: &Output) -> String {
    match output {
        Output::Ask { member, attempt, ask } => {
            format!("ask {member} {ask:?} try {}", attempt.attempt)
        }
        Output::Open { member, .. } => format!("open {member}"),
        Output::Hold { member } => format!("hold {member}"),
        Output::Go { member, epoch, open } => {
            format!("go {member} e{epoch}{}", if open.is_some() { " with proof" } else { "" })
        }
        Output::Park(why) => format!("park {why:?}"),
    }
}
