//! Waits until a process has stopped itself at its point, hurts the victim, and lets the process go on.
//!
//! A thread beside the story, which is at that moment stuck in whatever it asked. It knows processes by their ids only;
//! starting and reaping them is the story's.

use super::case::{Actor, Fault};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a process is looked at.
const POLL: Duration = Duration::from_millis(2);

/// How a process is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// A child of ours.
    Pid(u32),
    /// The agent notes it in this file.
    Noted(PathBuf),
}

impl Who {
    /// Its id, if it is known and it lives.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        let pid = match self {
            Self::Pid(pid) => *pid,
            Self::Noted(path) => {
                let note: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
                u32::try_from(note["process"]["pid"].as_u64()?).ok()?
            }
        };
        is_alive(pid).then_some(pid)
    }
}

/// Who runs now.
pub type Register = Arc<Mutex<BTreeMap<Actor, Who>>>;

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// The point was not reached.
    Waiting,
    /// The victim is down.
    Hurt,
    /// There was no victim at that moment.
    Absent,
    /// The victim may be started again, or runs again.
    Over,
}

/// A running injector.
#[derive(Debug)]
pub struct Injector {
    shared: Arc<Mutex<(Progress, bool)>>,
    thread: Option<JoinHandle<()>>,
}

/// What it is to do.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Who stops at the point.
    pub owner: Actor,
    /// Who is hurt then.
    pub victim: Actor,
    /// How.
    pub fault: Fault,
    /// How long a frozen victim stays so, and a dead one dead.
    pub hold: Duration,
}

impl Injector {
    /// Begins to watch.
    #[must_use]
    pub fn start(order: Order, register: &Register) -> Self {
        let shared = Arc::new(Mutex::new((Progress::Waiting, false)));
        let (theirs, register) = (Arc::clone(&shared), Arc::clone(register));
        let thread = std::thread::spawn(move || run(order, &register, &theirs));
        Self { shared, thread: Some(thread) }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.lock().expect("nobody panics here").0
    }

    /// Ends the watch. A victim that is frozen is let go.
    pub fn stop(&mut self) -> Progress {
        self.shared.lock().expect("nobody panics here").1 = true;
        if let Some(thread) = self.thread.take() {
            thread.join().expect("nobody panics there");
        }
        self.progress()
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(order: Order, register: &Register, shared: &Mutex<(Progress, bool)>) {
    let find = |actor| register.lock().expect("nobody panics here").get(&actor)?.pid();
    let stopped = || shared.lock().expect("nobody panics here").1;
    let tell = |progress| shared.lock().expect("nobody panics here").0 = progress;
    let owner = loop {
        match find(order.owner).filter(|pid| is_stopped(*pid)) {
            Some(pid) => break pid,
            None if stopped() => return,
            None => std::thread::sleep(POLL),
        }
    };
    match find(order.victim) {
        Some(victim) => {
            hurt(order, owner, victim, &tell);
            let until = Instant::now() + order.hold;
            while Instant::now() < until && !stopped() {
                std::thread::sleep(POLL);
            }
            if order.fault == Fault::Freeze {
                send(victim, Signal::SIGCONT);
            }
            tell(Progress::Over);
        }
        None => {
            send(owner, Signal::SIGCONT);
            tell(Progress::Absent);
        }
    }
    // A process that its supervisor has started again stops at the point as well.
    while !stopped() {
        if let Some(pid) = find(order.owner).filter(|pid| is_stopped(*pid)) {
            send(pid, Signal::SIGCONT);
        }
        std::thread::sleep(POLL);
    }
}

fn hurt(order: Order, owner: u32, victim: u32, tell: &dyn Fn(Progress)) {
    match order.fault {
        Fault::Kill => send(victim, Signal::SIGKILL),
        Fault::Freeze => send(victim, Signal::SIGSTOP),
    }
    let gone = |pid| if order.fault == Fault::Kill { !is_alive(pid) } else { is_stopped(pid) };
    let patience = Instant::now() + Duration::from_secs(5);
    while !gone(victim) && Instant::now() < patience {
        std::thread::sleep(POLL);
    }
    tell(Progress::Hurt);
    if victim != owner {
        send(owner, Signal::SIGCONT);
    }
}

fn send(pid: u32, signal: Signal) {
    // It may be gone: then there is nothing to do.
    let _ = i32::try_from(pid).map(|pid| kill(Pid::from_raw(pid), signal));
}

/// 'T' stopped, 'Z' dead and not reaped, anything else; `None` when there is no such process.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

fn is_stopped(pid: u32) -> bool {
    state(pid) == Some('T')
}

fn is_alive(pid: u32) -> bool {
    !matches!(state(pid), None | Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baton::wait_until;
    use crate::daemon::Daemon;
    use crate::workspace::TestDir;
    use std::path::Path;

    const SOON: Duration = Duration::from_secs(10);

    fn two() -> (TestDir, [Daemon; 2], Register) {
        let dir = TestDir::new("injector").unwrap();
        let start =
            |name| Daemon::start(dir.path(), name, Path::new("/bin/sleep"), ["60"]).unwrap();
        let both = [start("owner"), start("victim")];
        let register = Register::default();
        register.lock().unwrap().insert(Actor::Anchor, Who::Pid(both[0].pid()));
        register.lock().unwrap().insert(Actor::SourceVmm, Who::Pid(both[1].pid()));
        (dir, both, register)
    }

    fn order(victim: Actor, fault: Fault) -> Order {
        Order { owner: Actor::Anchor, victim, fault, hold: Duration::from_millis(50) }
    }

    fn wait(injector: &Injector, progress: Progress) {
        wait_until("the injector", SOON, || injector.progress() >= progress).unwrap();
    }

    #[test]
    fn the_owner_goes_on_and_the_victim_is_hurt() {
        let (_dir, mut both, register) = two();
        let injector = Injector::start(order(Actor::SourceVmm, Fault::Freeze), &register);
        assert_eq!(injector.progress(), Progress::Waiting);
        both[0].signal(Signal::SIGSTOP).unwrap();
        wait(&injector, Progress::Over);
        assert!(!is_stopped(both[0].pid()) && !is_stopped(both[1].pid()));
        drop(injector);

        let injector = Injector::start(order(Actor::SourceVmm, Fault::Kill), &register);
        both[0].signal(Signal::SIGSTOP).unwrap();
        wait(&injector, Progress::Over);
        assert!(both[0].is_running().unwrap() && !both[1].is_running().unwrap());
        drop(injector);

        let injector = Injector::start(order(Actor::SourceVmm, Fault::Kill), &register);
        both[0].signal(Signal::SIGSTOP).unwrap();
        wait_until("it is not there", SOON, || injector.progress() == Progress::Absent).unwrap();
        assert!(!is_stopped(both[0].pid()));
    }

    /// Whoever is started in its place stops at the point as well.
    #[test]
    fn nobody_is_left_at_the_point() {
        let dir = TestDir::new("injector").unwrap();
        let script = "trap 'echo went on' CONT; echo up; while :; do sleep 0.01; done";
        let mut owner =
            Daemon::start(dir.path(), "owner", Path::new("/bin/sh"), ["-c", script]).unwrap();
        owner.wait_line("up", SOON).unwrap();
        let register = Register::default();
        register.lock().unwrap().insert(Actor::Anchor, Who::Pid(owner.pid()));
        let injector = Injector::start(order(Actor::Other, Fault::Kill), &register);
        for times in 1..=3 {
            owner.signal(Signal::SIGSTOP).unwrap();
            wait_until("it goes on", SOON, || owner.log().matches("went on").count() == times)
                .unwrap();
        }
        assert_eq!(injector.progress(), Progress::Absent);
    }

    #[test]
    fn who_stands_at_the_point_can_be_the_victim() {
        let (_dir, mut both, register) = two();
        let injector = Injector::start(order(Actor::Anchor, Fault::Kill), &register);
        both[0].signal(Signal::SIGSTOP).unwrap();
        wait(&injector, Progress::Over);
        assert!(!both[0].is_running().unwrap());
        drop(injector);
        let mut injector = Injector::start(order(Actor::Anchor, Fault::Kill), &register);
        assert_eq!(injector.stop(), Progress::Waiting, "nobody is at the point");
    }
}
