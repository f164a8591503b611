//! What can happen in a world.

use super::host::{Answer, Cut};
use super::world::{Backend, HOME, Order, Run, World};
use crate::coordinator::plan::{Action as Due, Input};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Action {
    /// A handoff from this host begins.
    Prepare(usize),
    /// The coordinator sends what is due.
    Send(Order),
    /// An order arrives.
    Arrives {
        order: Order,
        cut: Cut,
        answered: bool,
        again: bool,
    },
    /// The coordinator looks at the destination.
    Look,
    /// The destination's agent does not answer while it is to dismiss.
    Unheard,
    /// The time to prepare is over.
    Late,
    Cancel,
    Force,
    /// The coordinator dies and starts again.
    Restart,
    /// The server does a request.
    Execute(usize),
    Write(usize),
    /// Stopped; `true`: its memory is being copied.
    Stop(usize, bool),
    GiveUp(usize),
    Resume(usize),
    /// A machine comes to the backend that was started under it.
    Attach(usize),
    /// Its memory is at the other host.
    Copy(usize),
    /// A machine ends.
    Quit(usize),
    /// A backend dies; `true`: what it had under way is done.
    Crash(usize, bool),
    /// It is started again.
    Start(usize),
    /// Somebody asks for a backend that claims.
    Claim(usize),
    /// And it is started, as a mutant does it.
    Claimed(usize),
    /// A host is gone.
    Dies(usize, bool),
    /// The VM starts from its disks.
    Boot(usize),
}

impl Action {
    /// Accidents are rare in walks.
    pub(super) fn is_rare(self) -> bool {
        match self {
            Self::Arrives { cut, answered, again, .. } => cut != Cut::None || !answered || again,
            Self::Cancel
            | Self::Late
            | Self::Unheard
            | Self::Force
            | Self::Restart
            | Self::GiveUp(_)
            | Self::Quit(_)
            | Self::Crash(..)
            | Self::Claim(_)
            | Self::Dies(..) => true,
            _ => false,
        }
    }
}

impl World {
    pub(super) fn actions(&self, all: &mut Vec<Action>) {
        if self.broken.is_some() {
            return;
        }
        let budget = &self.budget;
        for order in self.due() {
            if !self.orders.contains(&order) {
                all.push(Action::Send(order));
            }
        }
        for &order in &self.orders {
            if self.hosts[order.to].dead {
                continue;
            }
            let arrives = |cut, answered, again| Action::Arrives { order, cut, answered, again };
            all.extend([arrives(Cut::None, true, false), arrives(Cut::None, false, false)]);
            if budget.doubles > 0 {
                all.push(arrives(Cut::None, true, true));
            }
            if budget.crashes > 0 {
                all.extend([Cut::First, Cut::Second].map(|cut| arrives(cut, false, false)));
            }
        }
        if let Some(row) = self.row().filter(|row| !row.is_over()) {
            if row.winner.is_none() {
                all.extend([Action::Look, Action::Cancel, Action::Late]);
            }
            let source_dead = self.sides().is_some_and(|(from, _)| self.hosts[from].dead);
            if row.winner.is_none() && (source_dead || budget.rash) {
                all.push(Action::Force);
            }
            if row.due().contains(&Due::Dismiss) {
                all.push(Action::Unheard);
            }
            if budget.crashes > 0 {
                all.push(Action::Restart);
            }
        }
        all.extend((0..self.server.len()).map(Action::Execute));
        for host in 0..self.hosts.len() {
            self.at_host(host, all);
        }
    }

    fn at_host(&self, host: usize, all: &mut Vec<Action>) {
        let (budget, here, other) = (&self.budget, &self.hosts[host], &self.hosts[1 - host]);
        if here.dead {
            return;
        }
        if budget.tries > 0 && self.is_over() && here.serves() {
            all.push(Action::Prepare(host));
        }
        match &here.backend {
            Some(backend) => {
                let stopped = here.machine.is_some_and(|m| !m.at);
                if stopped && matches!(backend.taken, Some((_, true))) {
                    all.push(Action::GiveUp(host));
                }
                if budget.crashes > 0 {
                    all.push(Action::Crash(host, true));
                    let process = backend.process;
                    if self.server.iter().any(|request| request.process == process) {
                        all.push(Action::Crash(host, false));
                    }
                }
            }
            None if here.launch.is_some() => all.push(Action::Start(host)),
            None => {}
        }
        if let Some(machine) = here.machine {
            match machine.run {
                Run::Running => {
                    if machine.at && machine.wants.is_none() && budget.writes > 0 {
                        all.push(Action::Write(host));
                    }
                    if !machine.at && here.backend.is_some() {
                        all.push(Action::Attach(host));
                    }
                    if budget.stops > 0 {
                        all.extend([true, false].map(|moves| Action::Stop(host, moves)));
                    }
                }
                Run::Incoming => all.push(Action::Resume(host)),
                Run::Stopped(_) => {
                    // The VMM waits until its rings have stopped.
                    let stops = |b: &Backend| matches!(b.taken, Some((_, true)));
                    if !here.backend.as_ref().is_some_and(stops) {
                        all.push(Action::Resume(host));
                    }
                    let quiet = machine.wants.is_none() || here.backend.is_none();
                    let room = other.machine.is_none() && other.backend.is_some();
                    if budget.copies > 0 && quiet && room {
                        all.push(Action::Copy(host));
                    }
                }
            }
            if machine.known < self.answered || other.dead || (self.is_over() && other.serves()) {
                all.push(Action::Quit(host));
            }
        } else if other.dead && here.serves() {
            all.push(Action::Boot(host));
        }
        if budget.claims > 0 && (here.note.is_some() || host == HOME) {
            all.push(Action::Claim(host));
        }
        if here.claims {
            all.push(Action::Claimed(host));
        }
        if budget.deaths > 0 {
            all.push(Action::Dies(host, true));
        }
    }

    /// The world afterwards; `None`: nothing came of it.
    pub(super) fn after(&self, action: Action) -> Option<Self> {
        let mut world = self.clone();
        world.act(action)?;
        let serve = |host: &super::world::Host| host.serves();
        if world.hosts.iter().all(serve) && !world.budget.rash {
            world.breaks(super::world::Broken::TwoServe);
        }
        (world != *self).then_some(world)
    }

    fn act(&mut self, action: Action) -> Option<()> {
        let spend = |left: &mut u8| left.checked_sub(1).map(|less| *left = less);
        match action {
            Action::Prepare(from) => {
                spend(&mut self.budget.tries)?;
                return self.prepare(from).then_some(());
            }
            Action::Send(order) => {
                self.orders.push(order);
                self.orders.sort_unstable();
            }
            Action::Arrives { order, cut, answered, again } => {
                if cut != Cut::None {
                    spend(&mut self.budget.crashes)?;
                }
                if again {
                    spend(&mut self.budget.doubles)?;
                } else {
                    let at = self.orders.iter().position(|one| *one == order)?;
                    self.orders.remove(at);
                }
                let answer = self.obey(order, cut);
                if answered {
                    self.hear(order, &answer);
                }
            }
            Action::Look => {
                let (_, to) = self.sides()?;
                if self.hosts[to].dead {
                    return None;
                }
                self.learn(Input::Standing(self.standing(to)));
            }
            Action::Unheard => {
                let order =
                    self.due().into_iter().find(|o| o.what == super::world::What::Dismiss)?;
                self.hear(order, &Answer::Refused);
            }
            Action::Late => drop(self.learn(Input::Late)),
            Action::Cancel => drop(self.learn(Input::Cancel)),
            Action::Force => drop(self.learn(Input::Force(String::new()))),
            Action::Restart => {
                spend(&mut self.budget.crashes)?;
                self.restart_coordinator();
            }
            Action::Execute(at) if at >= self.server.len() => return None,
            Action::Execute(at) => self.execute(at),
            Action::Write(host) => {
                spend(&mut self.budget.writes)?;
                self.write(host);
            }
            Action::Stop(host, migrating) => {
                spend(&mut self.budget.stops)?;
                self.stop_machine(host, migrating);
            }
            Action::GiveUp(host) => self.give_up(host),
            Action::Resume(host) => self.resume(host),
            Action::Attach(host) => self.attach(host),
            Action::Copy(host) => {
                spend(&mut self.budget.copies)?;
                self.copy(host);
            }
            Action::Quit(host) => self.quit(host),
            Action::Crash(host, done) => {
                spend(&mut self.budget.crashes)?;
                let process = self.end(host)?;
                self.settle_requests(process, done);
            }
            Action::Start(host) => self.start(host),
            Action::Claim(host) => {
                spend(&mut self.budget.claims)?;
                return self.claim(host).then_some(());
            }
            Action::Claimed(host) => {
                self.hosts[host].claims = false;
                self.serve(host);
            }
            Action::Dies(host, done) => {
                spend(&mut self.budget.deaths)?;
                if let Some(process) = self.end(host) {
                    self.settle_requests(process, done);
                }
                let here = &mut self.hosts[host];
                (here.machine, here.launch, here.dead) = (None, None, true);
                self.server.retain(|request| request.host != host);
            }
            Action::Boot(host) => self.boot(host),
        }
        Some(())
    }

    /// A machine runs, or goes on.
    pub(super) fn resume(&mut self, host: usize) {
        if let Some(machine) = &mut self.hosts[host].machine {
            machine.run = Run::Running;
        }
        self.attach(host);
    }

    /// A machine's memory, as it is now.
    pub(super) fn copy(&mut self, host: usize) {
        let copy = self.hosts[host].machine.map(|machine| super::world::Machine {
            run: Run::Incoming,
            at: false,
            // Its monitor came to the backend there before it took the memory.
            seen: true,
            ..machine
        });
        self.hosts[1 - host].machine = copy;
    }
}
