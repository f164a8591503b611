use super::*;
use stateright::semantics::register::{Register, RegisterOp, RegisterRet};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester};

/// Small random histories, most of them wrong: this checker and the slow one of
/// the model checker's library must agree on each.
#[test]
fn agrees_with_a_slow_oracle() {
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut right, mut wrong) = (0, 0);
    for _ in 0..30_000 {
        let mut history = History::default();
        let mut oracle = LinearizabilityTester::new(Register(0u64));
        let mut open: Vec<usize> = Vec::new();
        let mut written = 0;
        for _ in 0..rng.usize(2..=12) {
            if open.len() < 3 && rng.u8(..3) > 0 {
                let kind = if rng.bool() {
                    written += 1;
                    Kind::Write { sector: 0, value: written }
                } else {
                    Kind::Read { sector: 0, value: 0 }
                };
                let op = match kind {
                    Kind::Write { value, .. } => RegisterOp::Write(value),
                    _ => RegisterOp::Read,
                };
                let id = history.invoke(0, kind);
                oracle.on_invoke(id, op).expect("a thread of its own");
                open.push(id);
            } else if !open.is_empty() {
                let id = open.swap_remove(rng.usize(..open.len()));
                let read = rng.u64(..=written);
                let ret = match history.operations()[id].kind {
                    Kind::Write { .. } => RegisterRet::WriteOk,
                    _ => RegisterRet::ReadOk(read),
                };
                history.answer(id, read);
                oracle.on_return(id, ret).expect("it was invoked");
            }
        }
        let expected = oracle.is_consistent();
        assert_eq!(check(&history).is_ok(), expected, "{history:?}");
        if expected { right += 1 } else { wrong += 1 }
    }
    assert!(right > 1000 && wrong > 1000, "{right} right, {wrong} wrong");
}

fn write(history: &mut History, value: Value) {
    let id = history.invoke(0, Kind::Write { sector: 0, value });
    history.answer(id, 0);
}

fn read(history: &mut History, value: Value) {
    let id = history.invoke(0, Kind::Read { sector: 0, value: 0 });
    history.answer(id, value);
}

fn flush(history: &mut History) {
    let id = history.invoke(0, Kind::Flush);
    history.answer(id, 0);
}

fn why(history: &History) -> Option<Why> {
    check(history).err().map(|broken| broken.why)
}

#[test]
fn a_power_loss_takes_what_was_not_flushed_and_nothing_else() {
    let mut history = History::default();
    write(&mut history, 1);
    flush(&mut history);
    write(&mut history, 2);
    history.lose_power(0);
    for (value, verdict) in [(2, None), (1, None), (0, Some(Why::FlushLost(0, 1)))] {
        let mut history = history.clone();
        read(&mut history, value);
        read(&mut history, value);
        assert_eq!(why(&history), verdict);
        // The other one is gone for good.
        write(&mut history, 3);
        read(&mut history, 3);
        read(&mut history, value);
        assert!(why(&history).is_some());
    }
    let mut both = history.clone();
    read(&mut both, 1);
    read(&mut both, 2);
    assert_eq!(why(&both), Some(Why::TwoSurvivors(1, 2)));
    // Without a power loss the same is a lost write.
    let mut history = History::default();
    write(&mut history, 1);
    write(&mut history, 2);
    read(&mut history, 1);
    assert_eq!(why(&history), Some(Why::Both(1, 2)));
}

#[test]
fn what_was_under_way_at_a_power_loss_may_come_before_or_after_it() {
    let mut history = History::default();
    write(&mut history, 1);
    let open = history.invoke(0, Kind::Write { sector: 0, value: 2 });
    read(&mut history, 2);
    history.lose_power(0);
    read(&mut history, 1);
    read(&mut history, 2);
    assert_eq!(why(&history), None);
    history.answer(open, 0);
    assert_eq!(why(&history), None);
    read(&mut history, 1);
    assert!(why(&history).is_some());
}

#[test]
fn a_volume_does_not_answer_for_another() {
    let mut history = History::default();
    for volume in 0..2 {
        let id = history.invoke(volume, Kind::Write { sector: 0, value: volume as u64 + 1 });
        history.answer(id, 0);
        let id = history.invoke(volume, Kind::Read { sector: 0, value: 0 });
        history.answer(id, volume as u64 + 1);
    }
    assert_eq!(why(&history), None);
    let id = history.invoke(0, Kind::Read { sector: 0, value: 0 });
    history.answer(id, 2);
    assert_eq!(why(&history), Some(Why::OutOfNowhere(2)));
}
