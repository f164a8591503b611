//! What agents, backends and machines do on one host.

use baton_protocol::handoff::Cooperative;
use baton_protocol::handoff::cooperative::{Input, Output, Refusal, Standing};

use super::mutant::Mutant;
use super::world::{Backend, Launch, Machine, Order, Run, What, World, turn};
use crate::agent::ledger::{self, Note, Proof, Verdict};

/// Where an agent dies in the middle of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Cut {
    /// It does not.
    None,
    /// Behind the first thing that it does.
    First,
    /// Behind the second.
    Second,
}

/// What an agent answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Proven(Proof),
    CameBack,
    Refused,
}

impl World {
    /// A process, as it is started the next time.
    pub(super) fn start(&mut self, host: usize) {
        let Some(launch) = self.hosts[host].launch.filter(|_| !self.hosts[host].dead) else {
            return;
        };
        if self.hosts[host].backend.is_some() {
            return;
        }
        self.processes += 1;
        let vm = match launch {
            Launch::Standby(attempt) if !self.is(Mutant::StandbySends) => {
                Cooperative::standby(1, attempt)
            }
            _ => Cooperative::serving(1),
        };
        let process = self.processes;
        self.hosts[host].backend = Some(Backend { process, vm, taken: None });
    }

    /// A process ends; its machine is left alone.
    pub(super) fn end(&mut self, host: usize) -> Option<u8> {
        let backend = self.hosts[host].backend.take()?;
        if let Some(machine) = &mut self.hosts[host].machine {
            machine.at = false;
        }
        Some(backend.process)
    }

    /// A backend that claims.
    pub(super) fn serve(&mut self, host: usize) {
        self.hosts[host].launch = Some(Launch::Owner);
        self.start(host);
    }

    fn stop(&mut self, host: usize) {
        self.hosts[host].launch = None;
        self.end(host);
    }

    fn note(&mut self, host: usize, note: Note) {
        self.hosts[host].note = Some(note);
    }

    pub(super) fn judge(
        &self,
        host: usize,
        order: ledger::Order,
    ) -> Result<Verdict, ledger::Refusal> {
        let Self { hosts, .. } = self;
        let serves = hosts[host].launch == Some(Launch::Owner);
        ledger::step(hosts[host].note.as_ref(), serves, order)
    }

    /// As if the note did not void it, for mutants that hear what is late.
    fn hears_late(&self, host: usize, order: Order) -> bool {
        let late = |note: &Note| note.turn.number >= u64::from(order.number);
        let mutant = match order.what {
            What::Stand => Mutant::LateStand,
            What::Permit { .. } => Mutant::LatePermit,
            What::End { .. } => Mutant::LateEnd,
            What::Keep => Mutant::LateKeep,
            What::Dismiss => return false,
        };
        self.is(mutant) && self.hosts[host].note.as_ref().is_some_and(late)
    }

    /// The agent carries an order out, or dies in the middle.
    pub(super) fn obey(&mut self, order: Order, cut: Cut) -> Answer {
        let turn = turn(order.number);
        let asked = match order.what {
            What::Stand => ledger::Order::Stand(turn),
            What::Permit { .. } => ledger::Order::Permit(turn),
            What::Dismiss => ledger::Order::Dismiss(turn),
            What::End { .. } => ledger::Order::End(turn),
            What::Keep => ledger::Order::Keep(turn),
        };
        let host = order.to;
        let verdict = match self.judge(host, asked) {
            _ if self.hears_late(host, order) => Ok(Verdict::Go),
            verdict => verdict,
        };
        let (next, go) = match verdict {
            Err(_) => return Answer::Refused,
            Ok(Verdict::Void) => return Answer::Done,
            Ok(Verdict::Proven(proof)) => return Answer::Proven(proof),
            Ok(Verdict::Note(note)) => (Some(note), true),
            Ok(Verdict::Go) => (None, false),
        };
        if order.what == What::Stand && !self.makes_room(host, order.number) {
            return Answer::Refused;
        }
        let forced = order.what == What::Permit { forced: true };
        if forced && next.is_some() && !self.is(Mutant::ForcesMachine) {
            if self.hosts[host].machine.is_some_and(|machine| machine.seen) {
                return Answer::Refused;
            }
            self.stop(host);
        }
        if let Some(next) = next {
            self.note(host, next);
        }
        if go && cut == Cut::First {
            return Answer::Refused;
        }
        match order.what {
            What::Stand => {
                self.hosts[host].launch = Some(Launch::Standby(turn.attempt));
                self.start(host);
                Answer::Done
            }
            What::Dismiss => {
                self.stop(host);
                Answer::Done
            }
            What::Permit { .. } => {
                self.serve(host);
                if cut == Cut::Second { Answer::Refused } else { self.permit(host, order.number) }
            }
            What::Keep => {
                self.serve(host);
                let sealed = self.hosts[host].standing() == Some(Standing::Sealed);
                if sealed && !self.is(Mutant::KeepsSealed) {
                    self.stop(host);
                    if cut == Cut::Second {
                        return Answer::Refused;
                    }
                    self.serve(host);
                }
                Answer::Done
            }
            What::End { process, starts } => self.prove(host, order.number, process, starts, cut),
        }
    }

    /// What stands by for another try is ended, and no machine of it is left.
    fn makes_room(&mut self, host: usize, number: u8) -> bool {
        if self.hosts[host].launch == Some(Launch::Standby(turn(number).attempt)) {
            return true;
        }
        if !self.is(Mutant::StandsBeside) {
            self.stop(host);
        }
        self.is(Mutant::MachineLeft) || !self.hosts[host].machine.is_some_and(|m| m.seen)
    }

    fn permit(&mut self, host: usize, number: u8) -> Answer {
        let Some(backend) = &mut self.hosts[host].backend else { return Answer::Refused };
        match backend.vm.step(Input::Permit(turn(number).attempt)) {
            Ok(Some(Output::Open)) => self.send(host),
            Ok(_) => {}
            Err(_) if backend.vm.standing() == Standing::Serving => {}
            Err(_) => return Answer::Refused,
        }
        Answer::Done
    }

    fn prove(&mut self, host: usize, number: u8, process: u8, starts: u32, cut: Cut) -> Answer {
        let (undrained, given_up) =
            (self.is(Mutant::SealsUndrained), self.is(Mutant::SealsCameBack));
        let (any, unsealed) = (self.is(Mutant::SealsAnyProcess), self.is(Mutant::EndsUnsealed));
        let Some(backend) = &mut self.hosts[host].backend else { return Answer::Refused };
        if backend.process != process && !any {
            return Answer::CameBack;
        }
        if undrained {
            let _ = backend.vm.step(Input::Drained(0));
        }
        let starts = if given_up || any { backend.vm.starts() } else { starts };
        let attempt = turn(number).attempt;
        match backend.vm.step(Input::Seal { attempt, starts }) {
            _ if unsealed => {}
            Ok(_) => {}
            Err(Refusal::CameBack) => return Answer::CameBack,
            Err(_) => return Answer::Refused,
        }
        if cut == Cut::First {
            return Answer::Refused;
        }
        self.stop(host);
        if cut == Cut::Second {
            return Answer::Refused;
        }
        let proof = Proof { pid: 1, seen_by: String::new(), status: None, at_unix_us: 0 };
        if !self.is(Mutant::EndsUnnoted) {
            self.note(host, Note::ended(turn(number), proof.clone()));
        }
        Answer::Proven(proof)
    }

    /// Somebody asks for a backend that claims.
    pub(super) fn claim(&mut self, host: usize) -> bool {
        let order = ledger::Order::Claim { force: false };
        if self.judge(host, order).is_err() && !self.is(Mutant::ClaimsUnjudged) {
            return false;
        }
        if self.is(Mutant::ClaimsUnlocked) {
            self.hosts[host].claims = true;
        } else {
            self.serve(host);
        }
        true
    }
}

/// Machines.
impl World {
    /// From its disks.
    pub(super) fn boot(&mut self, host: usize) {
        let known = self.answered;
        let run = Run::Running;
        self.hosts[host].machine =
            Some(Machine { run, known, wants: None, at: false, seen: false });
        self.attach(host);
    }

    /// The rings of a machine that runs start at the backend that is there.
    pub(super) fn attach(&mut self, host: usize) {
        let Host { backend: Some(backend), machine: Some(machine), .. } = &mut self.hosts[host]
        else {
            return;
        };
        if machine.run != Run::Running || machine.at {
            return;
        }
        (machine.at, machine.seen) = (true, true);
        let _ = backend.vm.step(Input::Started(0));
        backend.taken = machine.wants.map(|value| (value, false));
        self.send(host);
    }

    /// The guest asks for a write.
    pub(super) fn write(&mut self, host: usize) {
        let Host { backend: Some(backend), machine: Some(machine), .. } = &mut self.hosts[host]
        else {
            return;
        };
        let value = machine.known + 1;
        machine.wants = Some(value);
        backend.taken = Some((value, false));
        self.send(host);
    }

    /// Its rings stop with it; what they took may be answered later.
    pub(super) fn stop_machine(&mut self, host: usize, migrating: bool) {
        let Some(machine) = &mut self.hosts[host].machine else { return };
        machine.run = Run::Stopped(migrating);
        if !std::mem::take(&mut machine.at) {
            return;
        }
        let Some(backend) = &mut self.hosts[host].backend else { return };
        let _ = backend.vm.step(Input::Stopped { disk: 0, migrating });
        match backend.taken {
            None => drop(backend.vm.step(Input::Drained(0))),
            // Behind a shut gate: it is let go.
            Some((_, false)) => self.give_up(host),
            Some((_, true)) => {}
        }
    }

    /// What the rings took is let go; the ring keeps it, and so does the server.
    pub(super) fn give_up(&mut self, host: usize) {
        let forgets = self.is(Mutant::SealsGivenUp);
        let Some(backend) = &mut self.hosts[host].backend else { return };
        backend.taken = None;
        for request in &mut self.server {
            request.given_up |= request.process == backend.process;
        }
        if !forgets {
            let _ = backend.vm.step(Input::GivenUp(0));
        }
    }

    pub(super) fn quit(&mut self, host: usize) {
        self.stop_machine(host, false);
        if self.hosts[host].backend.as_ref().is_some_and(|backend| backend.taken.is_some()) {
            self.give_up(host);
        }
        self.hosts[host].machine = None;
    }
}

use super::world::Host;
