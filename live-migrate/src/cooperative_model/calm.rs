//! What comes of a world when nothing more goes wrong: the handoff ends, one host can
//! run the VM, and it can be moved again.

use super::host::{Answer, Cut};
use super::world::{Broken, Run, What, World};
use crate::coordinator::plan::{Input, State, Winner};

/// More than any handoff takes.
const ROUNDS_MAX: usize = 24;
/// An operator who waits in vain cancels.
const PATIENCE: usize = 12;

/// What is broken then.
pub(super) fn ends(world: &World) -> Option<Broken> {
    let mut world = world.clone();
    world.settle();
    if world.broken.is_some() {
        return world.broken;
    }
    let dead = world.hosts.iter().any(|host| host.dead);
    let serving: Vec<usize> = (0..2).filter(|host| world.hosts[*host].serves()).collect();
    let host = match serving[..] {
        [host] => host,
        // Whoever had the volumes is gone, and nobody forced them elsewhere.
        [] if dead => return None,
        _ => return Some(Broken::NobodyRuns),
    };
    if dead && world.hosts[host].machine.is_none_or(|m| m.known < world.answered) {
        world.quit(host);
        world.boot(host);
    }
    if !world.goes_on(host) {
        return Some(world.broken.unwrap_or(Broken::NobodyRuns));
    }
    if !dead && !world.moves(host) {
        return Some(world.broken.unwrap_or(Broken::Stuck));
    }
    world.broken
}

impl World {
    /// Orders of before arrive first.
    fn settle(&mut self) {
        for round in 0..ROUNDS_MAX {
            self.executes_all();
            for host in 0..2 {
                if std::mem::take(&mut self.hosts[host].claims) {
                    self.serve(host);
                }
                self.start(host);
                self.attach(host);
            }
            for order in std::mem::take(&mut self.orders) {
                if !self.hosts[order.to].dead {
                    let answer = self.obey(order, Cut::None);
                    self.hear(order, &answer);
                }
            }
            if self.is_over() {
                continue;
            }
            let Some((from, to)) = self.sides() else { continue };
            if !self.hosts[to].dead {
                self.learn(Input::Standing(self.standing(to)));
            }
            if self.hosts[from].dead {
                // A person looks after what waits there.
                self.quit(to);
                self.learn(Input::Force(String::new()));
            }
            if round >= PATIENCE {
                self.learn(Input::Cancel);
            }
            for order in self.due() {
                let answer = match self.hosts[order.to].dead {
                    false => self.obey(order, Cut::None),
                    true if order.what == What::Dismiss => Answer::Refused,
                    true => continue,
                };
                self.hear(order, &answer);
            }
        }
    }

    fn executes_all(&mut self) {
        while !self.server.is_empty() {
            self.execute(0);
        }
    }

    /// The guest at this host writes, and is answered.
    fn goes_on(&mut self, host: usize) -> bool {
        if self.hosts[host].machine.is_none_or(|machine| machine.known < self.answered) {
            return false;
        }
        self.resume(host);
        self.executes_all();
        let before = self.answered;
        self.write(host);
        self.executes_all();
        self.answered > before && self.broken.is_none()
    }

    /// A handoff in which nothing goes wrong. A new process at first: one that gave
    /// requests up stays where it is.
    fn moves(&mut self, from: usize) -> bool {
        let to = 1 - from;
        self.quit(to);
        self.executes_all();
        self.end(from);
        self.start(from);
        self.attach(from);
        let over = self.is_over();
        if !over || !self.prepare(from) {
            return false;
        }
        for _ in 0..ROUNDS_MAX {
            for order in self.due() {
                let answer = self.obey(order, Cut::None);
                self.hear(order, &answer);
            }
            self.learn(Input::Standing(self.standing(to)));
            let Some(row) = self.row().cloned() else { return false };
            let there = self.hosts[to].machine.map(|machine| machine.run);
            if row.state == State::Ready && there.is_none() {
                self.stop_machine(from, true);
                self.executes_all();
                self.copy(from);
            } else if there == Some(Run::Incoming) {
                self.resume(to);
            }
        }
        let won = self.row().is_some_and(|row| row.winner == Some(Winner::Destination));
        won && self.is_over() && self.goes_on(to)
    }
}
