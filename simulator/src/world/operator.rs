//! The operator, who ends by force what nobody else can end, or what he should
//! not have touched: FENCE at every member, and the machine goes on at the
//! nominee's host once all have answered.
//!
//! His procedure is that of `docs/handoff.md`, row 36:
//!
//! 1. The nominee's backend is ended and its machine paused, if they exist: a
//!    fence for them must not let an out-of-date machine in before it is known
//!    which one went on last.
//! 2. FENCE to every member, with the owner that he read there; again until each
//!    has answered, which it does when it has drained.
//! 3. The machine that went on last goes on if it is the nominee's; otherwise a
//!    new one starts there from the disks.
//!
//! Whoever had the volumes is not told, and may go on as it likes.

use baton_protocol::access::Phase;

use super::{Host, Migration, World};
use crate::coordinator::place;
use crate::ending::Ending;
use crate::fault::Fault;
use crate::server::owner_name;
use crate::stage::{BY_OPERATOR, Call, Event, Reply, note};
use crate::vm::{Image, Vm};

/// A fence under way.
#[derive(Debug)]
pub(super) struct Fencing {
    nominee: usize,
    /// `None`: the handoff was decided, its winner's host is gone.
    ending: Option<Ending>,
    fenced: Vec<bool>,
}

impl World {
    /// Whether somebody can reach the host's agent.
    pub(super) fn is_well(&self, host: usize) -> bool {
        let Host { is_dead, hangs_until } = self.hosts_now[host];
        !is_dead && hangs_until <= self.stage.now
    }

    /// By mistake, or because he has seen enough: for either host.
    pub(super) fn force_fence(&mut self) -> bool {
        let nominee = self.stage.rng.usize(..2);
        let can = self.fencing.is_none() && self.is_well(nominee);
        if can {
            self.fence(nominee, Some(Ending::FenceForced));
        }
        can
    }

    /// Ends a handoff that nothing else can end. Returns whether it is one: what
    /// does not end and is not explained here breaks I9.
    pub(super) fn fence_what_is_stuck(&mut self) -> bool {
        let [from, to] = self.hosts;
        let owner = self.stage.watch.owner();
        if self.does_a_volume_stand_still() && self.is_well(owner) {
            self.fence(owner, Some(Ending::FenceForgotten));
            return true;
        }
        let Some(row) = &self.journal.row else { return false };
        let anchor = &self.volumes[row.anchor()].record;
        // A coordinator can take back anything else, for a dead source too; and it
        // has asked a living destination that was there to abdicate.
        if anchor.phase != Phase::Frozen {
            return false;
        }
        let (nominee, ending) = if !self.is_well(to) {
            (from, Ending::FenceDestinationGone)
        } else if !self.can_nobody_tell() {
            return false;
        } else if self.is_well(owner) {
            (owner, Ending::FenceWitnessDead)
        } else {
            (1 - owner, Ending::FenceWitnessDead)
        };
        let can = self.is_well(nominee);
        if can {
            self.fence(nominee, Some(ending));
        }
        can
    }

    /// In a handoff that the volume which decides it does not know any more.
    fn does_a_volume_stand_still(&self) -> bool {
        self.volumes.iter().any(|volume| {
            let record = &volume.record;
            let Some(handoff) = &record.handoff else { return false };
            let attempt = handoff.plan.attempt;
            let decides = &self.volumes[place(handoff.plan.anchor)].record;
            let knows = decides.handoff.as_ref().is_some_and(|h| h.plan.attempt == attempt)
                || decides.decided.as_ref().is_some_and(|d| d.attempt == attempt);
            !knows && record.admits().owner.is_none()
        })
    }

    /// No living backend of the destination was there before the anchor froze.
    fn can_nobody_tell(&self) -> bool {
        let now = self.current[self.hosts[1]].map(|number| &self.backends[number]);
        now.is_none_or(|backend| !backend.alive || !backend.has_witnessed(self.handoff))
    }

    /// The winner's host is gone: the machine starts on the other one.
    pub(super) fn evacuate(&mut self, winner: usize) {
        if self.fencing.is_none() && self.is_well(1 - winner) {
            self.fence(1 - winner, None);
        }
    }

    fn fence(&mut self, nominee: usize, ending: Option<Ending>) {
        note!(self.stage, "an operator fences for host {nominee}: {ending:?}");
        self.kill_backend(nominee);
        self.wanted[nominee] = None;
        self.vms[nominee].running = false;
        let fenced = vec![false; self.volumes.len()];
        self.fencing = Some(Fencing { nominee, ending, fenced });
    }

    /// Says it again to whoever has not answered.
    pub(super) fn fence_on(&mut self) {
        let Some(fencing) = &mut self.fencing else { return };
        let nominee = owner_name(fencing.nominee);
        for (number, volume) in self.volumes.iter().enumerate() {
            if fencing.fenced[number] {
                continue;
            }
            if volume.is_nominated(&nominee) && self.servers[volume.server].up {
                fencing.fenced[number] = true;
                continue;
            }
            let owner = volume.record.owner.as_ref().map(|owner| owner.name.clone());
            let seen = (owner, volume.record.next_epoch);
            let call = Call::Fence { nominee: nominee.clone(), seen };
            self.stage.call(BY_OPERATOR, 0, number, call);
        }
        if fencing.fenced.iter().all(|fenced| *fenced) {
            self.fenced();
        }
    }

    /// A member has answered him.
    pub(super) fn operator_hears(&mut self, reply: &Reply) {
        if let (Some(fencing), Call::Fence { nominee, .. }, None) =
            (&mut self.fencing, &reply.call, &reply.refused)
            && *nominee == owner_name(fencing.nominee)
            && self.volumes[reply.volume].is_nominated(nominee)
        {
            fencing.fenced[reply.volume] = true;
        }
    }

    /// Nobody but the nominee can have the volumes any more.
    fn fenced(&mut self) {
        let Some(Fencing { nominee, ending, .. }) = self.fencing.take() else { return };
        let last = self.stage.watch.owner();
        note!(self.stage, "all is fenced for host {nominee}; host {last} went on last");
        self.leave_behind(1 - nominee);
        if last != nominee || self.vms[nominee].image.is_none() {
            self.boot(nominee);
        }
        self.stage.watch.given(nominee);
        self.journal.row = None;
        if let Some(ending) = ending {
            self.endings.count(ending);
            let place = Fault::ALL.iter().position(|fault| *fault == Fault::FenceForced);
            if let (Ending::FenceForced, Some(place)) = (ending, place) {
                self.stage.hits.faults[place] += 1;
            }
        } else {
            self.endings.evacuated += 1;
        }
        // Another machine takes the place of one that is gone.
        self.hosts_now[1 - nominee] = Host::default();
        self.stage.traps.clear();
        self.go_on_at(nominee);
    }

    /// A machine starts from its disks.
    pub(super) fn boot(&mut self, host: usize) {
        let (volumes, queues) = (self.volumes.len(), self.stage.setting.queues);
        note!(self.stage, "the machine starts from its disks on host {host}");
        self.vms[host] = Vm::new(host, volumes);
        self.vms[host].image = Some(Image::booted(volumes, queues, self.stage.watch.trunk()));
    }

    /// Whatever is on a host that nobody counts on any more stays as it is, or is
    /// ended.
    fn leave_behind(&mut self, host: usize) {
        let hangs = !self.hosts_now[host].is_dead && !self.is_well(host);
        self.wanted[host] = None;
        if hangs || self.stage.chance(0.7) {
            self.set_aside(host);
        } else {
            self.kill_backend(host);
            self.vms[host] = Vm::new(host, self.volumes.len());
        }
    }

    /// The host's machine and backend go on apart from the host.
    ///
    /// Not one that was to claim its volumes and has heard nothing yet: it has no try,
    /// and with a machine that runs it would take the next handoff to this host for
    /// its own. Nothing but its agent can tell it apart (rule 5 of `docs/handoff.md`).
    pub(super) fn set_aside(&mut self, host: usize) {
        let backend = self.current[host].map(|number| &self.backends[number]);
        if backend.is_some_and(|backend| backend.claims && !backend.is_bound()) {
            self.kill_backend(host);
        }
        let place = self.vms.len();
        let mut vm = std::mem::replace(&mut self.vms[host], Vm::new(host, self.volumes.len()));
        vm.over_since = Some(self.stage.history.tick());
        self.vms.push(vm);
        let backend = self.current[host].take();
        if let Some(number) = backend {
            self.backends[number].place = place;
        }
        self.current.push(backend);
        note!(
            self.stage,
            "backend {backend:?} and what else was on host {host} are left to themselves, machine {place}"
        );
        self.stage.after(0, Event::Guest { place });
    }

    /// Starts what the orchestrator counts on from now on.
    pub(super) fn go_on_at(&mut self, winner: usize) {
        self.wanted[winner] = Some(true);
        self.stage.after(0, Event::BackendStarts { host: winner });
        if !self.vms[winner].running {
            self.run_vm(winner);
        }
        self.calm_from = self.calm_from.max(self.stage.now);
        let mut before = [0; 3];
        before.iter_mut().zip(&self.vms[winner].answered).for_each(|(b, now)| *b = *now);
        self.migration = Migration::Settled { winner, since: self.stage.now, before };
    }
}
