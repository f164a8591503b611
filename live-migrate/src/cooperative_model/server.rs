//! The NBD server: it does what it was sent, in any order, for whoever sent it.

use baton_protocol::handoff::cooperative::Input;

use super::world::{Broken, Request, World};

impl World {
    /// A request reaches the server, unless the gate is shut: then it waits.
    pub(super) fn send(&mut self, host: usize) {
        let answered = self.answered;
        let Host { backend: Some(backend), machine, .. } = &mut self.hosts[host] else { return };
        let Some((value, sent @ false)) = &mut backend.taken else { return };
        if backend.vm.is_shut() {
            return;
        }
        *sent = true;
        let (process, value) = (backend.process, *value);
        let request = Request { host, process, value, given_up: false };
        let old = machine.is_some_and(|machine| machine.known < answered);
        self.server.push(request);
        self.server.sort_unstable();
        if old {
            self.breaks(Broken::OldMemory);
        }
    }

    /// The server does a request, and answers whoever still waits for it.
    pub(super) fn execute(&mut self, at: usize) {
        let Request { host, process, value, given_up } = self.server.remove(at);
        if self.closed[host] {
            self.breaks(Broken::Loser);
        }
        // On its own host that is the weakness of every reconnect, and not promised.
        if given_up {
            return;
        }
        self.closed[1 - host] = true;
        self.disk = value;
        if value < self.answered {
            self.breaks(Broken::Lost);
        }
        let Some(backend) = &mut self.hosts[host].backend else { return };
        if backend.process != process || backend.taken != Some((value, true)) {
            return;
        }
        backend.taken = None;
        // Of rings that are stopping; otherwise nobody takes note.
        let _ = backend.vm.step(Input::Drained(0));
        if let Some(machine) = &mut self.hosts[host].machine
            && machine.wants == Some(value)
        {
            machine.known = value;
            machine.wants = None;
            self.answered = self.answered.max(value);
        }
    }

    /// What a process had under way when it died is done or dropped with it.
    pub(super) fn settle_requests(&mut self, process: u8, done: bool) {
        while let Some(at) = self.server.iter().position(|request| request.process == process) {
            if done {
                self.execute(at);
            } else {
                self.server.remove(at);
            }
        }
    }
}

use super::world::Host;
