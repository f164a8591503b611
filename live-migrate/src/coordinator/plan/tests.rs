use baton_protocol::handoff::HandoffId;
use baton_remote_client::Engine;

use super::*;

fn row() -> Row {
    let member = |n: u64| Member {
        disk: format!("disk{n}"),
        engine: Engine::Baton,
        storage: "s:1".to_owned(),
        volume: format!("v{n}"),
        id: n,
        progress: Progress::Planned,
        seen: Seen::Nothing,
        epoch: 0,
        next_epoch: 0,
    };
    Row {
        id: HandoffId(7),
        attempt: 1,
        vm: "web".to_owned(),
        from: "a".to_owned(),
        to: "b".to_owned(),
        request_hash: String::new(),
        trigger: Trigger::Implicit,
        fast: true,
        key: hex_of(&[9; 32]),
        labels: std::collections::BTreeMap::new(),
        created_unix_us: 0,
        ready_timeout_ms: 1000,
        members: vec![member(1), member(2)],
        state: State::Preparing,
        standing: Standing::Unknown,
        stood: false,
        was_active: false,
        back: None,
        winner: None,
        proof: None,
        unknown: false,
        abdicated: false,
        fenced: false,
        switchover: false,
        seal_ordered: false,
        activate: false,
        activate_ordered: false,
        finish: false,
        last: false,
        loser_gone: false,
        trouble: None,
        timings: Timings::default(),
        cooperation: Cooperation::default(),
        driven: None,
        version: 0,
        term: 1,
        reached: Vec::new(),
    }
}

pub(crate) fn fresh() -> Row {
    row()
}

fn after(mut row: Row, inputs: &[Input]) -> Row {
    for input in inputs {
        row = row.step(input.clone()).expect("granted").row;
    }
    row
}

fn trouble(kind: &str) -> Trouble {
    Trouble { kind: kind.to_owned(), detail: String::new() }
}

fn grant(winner: Winner) -> Grant {
    Grant { session: 5, winner, grant: 3, mac: hex_of(&[1; 32]) }
}

fn states() -> Vec<(&'static str, Row)> {
    use Input::*;
    let armed: &[Input] = &[
        Start,
        Armed(0),
        Armed(1),
        Seen(0, super::Seen::Armed, 4),
        Seen(1, super::Seen::Armed, 4),
    ];
    let new = row();
    let started = after(row(), &[Start]);
    let half = after(row(), &[Start, Armed(0)]);
    let all = after(row(), armed);
    let ready = after(all.clone(), &[Standing(super::Standing::Ready)]);
    let explicit = after(Row { trigger: Trigger::Explicit, ..row() }, armed);
    let taken_back = after(
        explicit.clone(),
        &[Standing(super::Standing::Ready), Seen(0, super::Seen::Reclaimed, 6)],
    );
    let nearly_again = after(
        taken_back.clone(),
        &[Proved(grant(Winner::Source)), Settled(1, Some(7)), Settled(0, Some(7))],
    );
    let last = Row { attempt: ATTEMPTS_MAX, ..nearly_again.clone() };
    let explicit = after(explicit, &[Standing(super::Standing::Ready), Switchover, SealOrdered]);
    let seal = [Seen(0, super::Seen::Sealed, 4), Seen(1, super::Seen::Sealed, 4)];
    let sealed = after(ready.clone(), &seal);
    let cancelling = after(ready.clone(), &[Cancel]);
    let unknown = after(cancelling.clone(), &[ReclaimUnknown]);
    let reclaimed = after(cancelling.clone(), &[Reclaimed(grant(Winner::Source))]);
    let refused = after(half.clone(), &[CannotArm(1, trouble("baton:not-owner"))]);
    let active = after(sealed.clone(), &[Seen(0, super::Seen::Active, 5)]);
    let settled = after(
        active.clone(),
        &[Proved(grant(Winner::Destination)), Settled(1, Some(7)), Settled(0, Some(7))],
    );
    let failed =
        after(refused.clone(), &[Reclaimed(grant(Winner::Source)), Settled(0, Some(7)), LoserGone]);
    vec![
        ("new", new),
        ("started", started),
        ("half armed", half),
        ("all armed", all),
        ("READY", ready),
        ("READY explicit, seal ordered", explicit.clone()),
        ("SEALED", sealed),
        ("SEALED explicit", after(explicit, &seal)),
        ("cancelling", cancelling),
        ("cancelling, unknown", unknown),
        ("one refused", refused),
        ("RECLAIMED", reclaimed),
        ("RECLAIMED explicit, taken back", taken_back),
        ("RECLAIMED explicit, taken back, all settled", nearly_again),
        ("RECLAIMED explicit, taken back, last attempt", last),
        ("ACTIVE", active),
        ("SETTLED", settled),
        ("FAILED", failed),
    ]
}

fn inputs() -> Vec<(&'static str, Input)> {
    use Input::*;
    vec![
        ("start", Start),
        ("armed 0", Armed(0)),
        ("armed 1", Armed(1)),
        ("cannot arm 0", CannotArm(0, trouble("baton:not-owner"))),
        ("cannot arm 1", CannotArm(1, trouble("baton:not-owner"))),
        ("stands by", Standing(super::Standing::Ready)),
        ("destination dead", Standing(super::Standing::Dead)),
        ("cannot stand", CannotStand(trouble("baton:destination-runs-vm"))),
        ("hindered", Hindered(trouble("baton:storage-unreachable"))),
        ("anchor armed", Seen(0, super::Seen::Armed, 4)),
        ("anchor sealed", Seen(0, super::Seen::Sealed, 4)),
        ("other sealed", Seen(1, super::Seen::Sealed, 4)),
        ("anchor frozen", Seen(0, super::Seen::Frozen, 4)),
        ("anchor active", Seen(0, super::Seen::Active, 5)),
        ("anchor reclaimed", Seen(0, super::Seen::Reclaimed, 6)),
        ("anchor over, destination", Seen(0, super::Seen::OverDestination, 5)),
        ("anchor knows nothing", Seen(0, super::Seen::Nothing, 9)),
        ("other knows nothing", Seen(1, super::Seen::Nothing, 9)),
        ("reclaim granted", Reclaimed(grant(Winner::Source))),
        ("reclaim lost", ReclaimLost),
        ("reclaim unknown", ReclaimUnknown),
        ("abdicated", Abdicated),
        ("proof", Proved(grant(Winner::Destination))),
        ("proof stale", ProofStale),
        ("settled 0", Settled(0, Some(7))),
        ("settled 1", Settled(1, Some(7))),
        ("measured", Measured(Timings { seal_us: Some(1), ..Timings::default() })),
        ("loser gone", LoserGone),
        ("loser left", LoserLeft(trouble("baton:agent-unreachable"))),
        ("late", Late),
        ("cancel", Cancel),
        ("finish", Finish),
        ("switchover", Switchover),
        ("activate", Activate),
        ("fenced", Fenced),
        ("stale term", StaleTerm),
    ]
}

fn line(row: &Row, outputs: &[Output]) -> String {
    let mut text = row.state.name().to_owned();
    if row.attempt > 1 {
        text.push_str(&format!(" attempt={}", row.attempt));
    }
    for (flag, word) in [
        (row.back.is_some() && row.winner.is_none(), "back"),
        (row.unknown, "unknown"),
        (row.fenced, "fenced"),
    ] {
        if flag {
            text.push(' ');
            text.push_str(word);
        }
    }
    text.push_str(match row.outcome() {
        Some(Winner::Source) => " owner=source",
        Some(Winner::Destination) => " owner=destination",
        None => " owner=?",
    });
    for output in outputs {
        let word = match output {
            Output::Journal => "journal".to_owned(),
            Output::Tell(state) => format!("tell {state}"),
            Output::TellTrouble(trouble) => format!("tell {}", trouble.kind),
            Output::Begin(action) => format!("+{action:?}"),
            Output::End(action) => format!("-{action:?}"),
            Output::StepDown => "step down".to_owned(),
        };
        text.push_str(&format!(" | {word}"));
    }
    text
}

/// Every state against every input, written out; a change of behaviour shows as
/// a changed line. `UPDATE_MATRIX=1` writes the file anew, for review.
#[test]
fn the_whole_matrix() {
    let mut table = String::new();
    for (state_name, state) in states() {
        table.push_str(&format!("== {state_name}\n"));
        for (input_name, input) in inputs() {
            let outcome = match state.step(input) {
                Ok(Step { row, outputs }) if outputs.is_empty() => {
                    assert_eq!(row, state, "a change without a journal row");
                    "same".to_owned()
                }
                Ok(Step { row, outputs }) => line(&row, &outputs),
                Err(refusal) => format!("refused: {refusal}"),
            };
            table.push_str(&format!("{input_name} -> {outcome}\n"));
        }
    }
    if std::env::var_os("UPDATE_MATRIX").is_some() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/coordinator/plan/matrix.txt");
        std::fs::write(file, &table).expect("written");
        return;
    }
    assert_eq!(table, include_str!("matrix.txt"));
}

#[test]
fn the_journal_comes_before_any_side_effect() {
    for (name, state) in states() {
        for (input_name, input) in inputs() {
            let Ok(Step { outputs, .. }) = state.step(input) else { continue };
            let journal = outputs.iter().position(|output| *output == Output::Journal);
            let begins = outputs.iter().position(|output| matches!(output, Output::Begin(_)));
            if let Some(begins) = begins {
                assert!(journal.is_some_and(|at| at < begins), "{name} + {input_name}");
            }
        }
    }
}

#[test]
fn an_arm_that_may_have_left_is_in_the_row_before() {
    for (name, state) in states() {
        for (input_name, input) in inputs() {
            let Ok(Step { row, outputs }) = state.step(input) else { continue };
            for output in outputs {
                if let Output::Begin(Action::Arm(place)) = output {
                    assert_ne!(
                        row.members[place].progress,
                        Progress::Planned,
                        "{name} + {input_name}"
                    );
                }
            }
        }
    }
}

/// Until the anchor is armed no other volume is: it alone decides, and a handoff that it does not know nobody can end.
/// A member whose ARM has left already is asked again whatever became of the anchor.
#[test]
fn the_anchor_is_armed_before_any_other_volume() {
    let mut armed = 0;
    for (name, state) in states() {
        for (input_name, input) in inputs() {
            let Ok(Step { row, outputs }) = state.step(input) else { continue };
            for output in outputs {
                let Output::Begin(Action::Arm(place @ 1..)) = output else { continue };
                armed += 1;
                let first = row.members[0].progress;
                let left = state.members[place].progress == Progress::Asked;
                assert!(
                    left || !matches!(
                        first,
                        Progress::Planned | Progress::Asked | Progress::Refused
                    ),
                    "{name} + {input_name}: {place} is armed, and the anchor is {first:?}"
                );
            }
        }
    }
    assert!(armed > 0);
}

/// Row 29 of the failure table: one volume that cannot be armed and nothing starts.
#[test]
fn row_29_one_refusal_takes_everything_back() {
    let row = after(fresh(), &[Input::Start, Input::Armed(0)]);
    let step = row.step(Input::CannotArm(1, trouble("baton:not-owner"))).expect("granted");
    assert!(step.outputs.contains(&Output::Begin(Action::Reclaim)));
    let row =
        after(step.row, &[Input::Reclaimed(grant(Winner::Source)), Input::Settled(0, Some(7))]);
    assert_eq!((row.state, row.outcome()), (State::Failed, Some(Winner::Source)));
    assert!(row.is_over(), "{:?}", row.due());
}

/// Rows 31 and 32 of the failure table: the source sealed and came back by itself.
fn taken_back(row: Row) -> Row {
    let started = [Input::Start, Input::Armed(0), Input::Armed(1)];
    let row = after(row, &started);
    let row = after(row, &[Input::Standing(Standing::Ready)]);
    assert_eq!(row.state, State::Ready);
    let row = after(row, &[Input::Seen(0, Seen::Sealed, 4), Input::Seen(0, Seen::Reclaimed, 6)]);
    after(
        row,
        &[
            Input::Proved(grant(Winner::Source)),
            Input::Settled(1, Some(7)),
            Input::Settled(0, Some(7)),
        ],
    )
}

#[test]
fn row_31_another_attempt_begins_when_nothing_is_left_of_the_one_before() {
    let row = taken_back(Row { trigger: Trigger::Explicit, ..fresh() });
    assert_eq!((row.attempt, row.state), (1, State::Reclaimed));
    assert_eq!(row.due(), [Action::StopDestination], "a destination is good for one try");
    let step = row.step(Input::LoserGone).expect("granted");
    assert_eq!((step.row.attempt, step.row.state), (2, State::Preparing));
    assert_eq!(step.row.outcome(), Some(Winner::Source));
    assert!(step.outputs.contains(&Output::Begin(Action::Arm(0))), "{:?}", step.outputs);
    // As the first: nothing of it is known any more.
    let again = Row { attempt: 1, version: 0, ..step.row };
    assert_eq!(again.due(), after(fresh(), &[Input::Start]).due());
}

#[test]
fn row_31_attempts_have_an_end() {
    let mut row = Row { trigger: Trigger::Explicit, ..fresh() };
    for attempt in 1..ATTEMPTS_MAX {
        row = after(taken_back(row), &[Input::LoserGone]);
        assert_eq!((row.attempt, row.state), (attempt + 1, State::Preparing));
    }
    let row = after(taken_back(row), &[Input::LoserGone]);
    assert_eq!((row.attempt, row.state), (ATTEMPTS_MAX, State::Settled));
    assert!(row.is_over(), "{:?}", row.due());
}

#[test]
fn row_32_there_is_no_other_attempt_where_the_old_machine_may_still_run() {
    let trouble = || trouble("baton:agent-unreachable");
    let explicit = || taken_back(Row { trigger: Trigger::Explicit, ..fresh() });
    for (why, row) in [
        ("implicit: nobody ends it", after(taken_back(fresh()), &[Input::LoserGone])),
        ("it could not be ended", after(explicit(), &[Input::LoserLeft(trouble())])),
        ("cancelled", after(explicit(), &[Input::Cancel, Input::LoserGone])),
        ("finished", after(explicit(), &[Input::Finish, Input::LoserGone])),
    ] {
        assert_eq!((row.attempt, row.state), (1, State::Settled), "{why}");
        assert_eq!(row.outcome(), Some(Winner::Source), "{why}");
        assert!(row.is_over(), "{why}: {:?}", row.due());
    }
    let driven = Row { driven: Some(serde_json::json!({})), ..fresh() };
    assert_eq!(
        after(taken_back(driven), &[Input::LoserGone]).attempt,
        2,
        "the coordinator ends it"
    );
}

/// Nobody is abdicated for who may have activated.
#[test]
fn only_a_dead_destination_that_was_never_active_is_abdicated_for() {
    let unknown = |inputs: &[Input]| {
        let row = after(fresh(), &[Input::Start, Input::Armed(0), Input::Armed(1)]);
        let row = after(row, inputs);
        after(row, &[Input::Cancel, Input::ReclaimUnknown])
    };
    let dead = Input::Standing(Standing::Dead);
    let due = |row: &Row, input: &Input| after(row.clone(), std::slice::from_ref(input)).due();
    let row = unknown(&[]);
    assert!(!row.due().contains(&Action::Abdicate));
    assert!(due(&row, &dead).contains(&Action::Abdicate));
    assert!(!due(&row, &Input::Standing(Standing::Parked)).contains(&Action::Abdicate));
    let row = unknown(&[Input::Standing(Standing::Active)]);
    assert!(!due(&row, &dead).contains(&Action::Abdicate));
    let row = unknown(&[Input::Seen(1, Seen::Active, 5)]);
    assert!(!due(&row, &dead).contains(&Action::Abdicate));
}

/// The answer to an ARM was lost, and the destination won all the same.
#[test]
fn a_member_that_never_answered_is_settled_when_the_destination_wins() {
    let won = [Input::Seen(0, Seen::Active, 5), Input::Proved(grant(Winner::Destination))];
    let row = after(fresh(), &[Input::Start, Input::Armed(0)]);
    let row = after(row, &won);
    assert_eq!(row.due(), [Action::Settle(1)]);
    let row = after(row, &[Input::Settled(1, Some(7)), Input::Settled(0, Some(7))]);
    assert_eq!((row.state, row.due()), (State::Settled, vec![]));
}

#[test]
fn a_backend_that_was_there_before_is_not_stopped() {
    let row = after(fresh(), &[Input::Start, Input::CannotArm(0, trouble("baton:not-owner"))]);
    assert_eq!(row.state, State::Failed);
    assert!(row.is_over(), "{:?}", row.due());
}

#[test]
fn a_row_survives_the_journal() {
    for (name, state) in states() {
        let text = serde_json::to_string(&state).expect("JSON");
        assert_eq!(serde_json::from_str::<Row>(&text).expect("a row"), state, "{name}");
    }
}
