//! The orchestrator and the agents: they move the VM back and forth, start and
//! end backends and VMs, and wait for what the coordinator says only if they
//! have the patience. An operator steps in where nothing else can.

use baton_protocol::VolumeId;
use baton_protocol::handoff::role::{Order, Standing};
use baton_protocol::handoff::{HandoffId, Key, Members, Plan, Side, Try};

use super::{Host, LIVENESS, Migration, OPERATOR, ROUNDS_MORE, World};
use crate::agenda::{MS, Time};
use crate::coordinator::{Row, Stand};
use crate::ending::Ending;
use crate::fault::Point;
use crate::server::owner_name;
use crate::stage::{DeadBackend, DecidedBy, Event, note};
use crate::vm::Vm;

impl World {
    /// The coordinator has the destination's agent start a backend.
    pub(super) fn start_standby(&mut self) {
        let to = self.hosts[1];
        if self.wanted[to].is_none() && self.fencing.is_none() && self.is_well(to) {
            self.wanted[to] = Some(false);
            self.stage.after(MS, Event::BackendStarts { host: to });
        }
    }

    pub(super) fn run_vm(&mut self, host: usize) {
        if self.vms[host].image.is_none() || !self.is_well(host) {
            return;
        }
        note!(self.stage, "the VM runs on host {host}");
        self.vms[host].run(&mut self.stage);
        self.tell_rings(host, true);
    }

    fn tell_rings(&mut self, host: usize, on: bool) {
        let Some(backend) = self.current[host] else { return };
        for member in 0..self.volumes.len() {
            let pause = self.stage.between(10, 300);
            self.stage.after(pause, Event::Rings { backend, member, on });
        }
    }

    /// Returns whether the world is over.
    pub(super) fn orchestrate(&mut self) -> bool {
        self.stage.after(2 * MS, Event::Orchestrator);
        let now = self.stage.now;
        let [from, to] = self.hosts;
        if self.stage.now > self.calm_from.max(self.round_from) + LIVENESS {
            let what = format!("{:?} of round {} does not end", self.migration, self.round);
            self.stage.watch.broken("I9", what);
            return true;
        }
        if self.fencing.is_some() {
            self.fence_on();
            return false;
        }
        let stuck = now > self.calm_from.max(self.round_from) + OPERATOR;
        if stuck && self.fence_what_is_stuck() {
            return false;
        }
        if let Some((round, winner)) = self.journal.finished
            && round == self.round
            && !matches!(self.migration, Migration::Settled { .. })
        {
            self.settled(winner);
            return false;
        }
        match self.migration {
            Migration::Waiting => {
                let backend = self.current[to].map(|number| &self.backends[number]);
                let is_ready = backend.is_some_and(|b| b.alive && b.standing() == Standing::Ready);
                let watching =
                    self.journal.row.as_ref().is_some_and(|row| row.stand == Stand::Watching);
                if is_ready && watching {
                    let until = now + self.stage.between(MS, 10 * MS);
                    self.vms[from].migrating = true;
                    self.migration = Migration::Precopy { until };
                }
            }
            Migration::Precopy { until } if now >= until && self.is_well(from) => {
                note!(self.stage, "the VM stops on host {from}");
                self.vms[from].stop();
                self.migration = Migration::Stopping { told: None, until: now + 100 * MS };
                self.stop_rings();
            }
            Migration::Stopping { until, .. } => {
                if now >= until {
                    self.give_up();
                } else {
                    self.stop_rings();
                }
            }
            Migration::Sent { until } => {
                let vm = &self.vms[to];
                if self.explicit && !vm.running && self.stage.chance(0.4) {
                    self.order(to, Order::Activate);
                }
                let backend = self.current[to].map(|number| &self.backends[number]);
                let serves = backend.is_some_and(|b| b.alive && b.standing() == Standing::Serving);
                let vm = &self.vms[to];
                let can = vm.image.is_some() && !vm.running && (serves || !self.explicit);
                if can && self.stage.chance(0.3) {
                    self.run_vm(to);
                } else if now >= until {
                    self.give_up();
                }
            }
            Migration::Settled { winner, since, before } => {
                return self.look_at_winner(winner, since, before);
            }
            Migration::Precopy { .. } | Migration::GivenUp => {}
        }
        false
    }

    fn stop_rings(&mut self) {
        let [from, to] = self.hosts;
        let Migration::Stopping { told, until } = self.migration else { return };
        if !self.is_well(from) {
            return;
        }
        let number = self.current[from].unwrap_or_default();
        let alive = self.backends[number].alive;
        let policy = self.stage.setting.dead_backend;
        let vm = &self.vms[from];
        let image = match (&vm.image, policy) {
            (Some(image), _) if vm.is_drained() => image.clone(),
            (Some(image), DeadBackend::TakesForUndone) if !alive => image.clone().guessed(false),
            (Some(image), DeadBackend::TakesForDone) if !alive => image.clone().guessed(true),
            _ if alive && told != Some(number) => {
                self.migration = Migration::Stopping { told: Some(number), until };
                return self.tell_rings(from, false);
            }
            _ => return,
        };
        self.stage.reached(Point::ImageSent);
        let (round, delay) = (self.round, self.stage.between(MS, 15 * MS));
        if !self.image_lost {
            note!(self.stage, "the VM's memory leaves for host {to}");
            self.stage.after(delay, Event::Image { round, image });
        }
        self.migration = Migration::Sent { until: self.stage.now + 80 * MS };
    }

    /// The orchestrator does not wait any longer.
    fn give_up(&mut self) {
        self.migration = Migration::GivenUp;
        note!(self.stage, "the orchestrator gives up");
        if self.stage.rng.bool() {
            self.run_vm(self.hosts[0]);
        } else if let Some(row) = &mut self.journal.row {
            row.cancel();
        }
    }

    /// The coordinator has settled: the VM goes on at the winner's host and nowhere
    /// else.
    fn settled(&mut self, winner: Side) {
        let (host, loser) = (self.hosts[winner as usize], self.hosts[1 - winner as usize]);
        self.endings.count(match (winner, self.stage.by) {
            (Side::Destination, DecidedBy::Order) => Ending::DestinationOrdered,
            (Side::Destination, _) => Ending::DestinationRan,
            (Side::Source, DecidedBy::Coordinator) => Ending::CoordinatorReclaimed,
            (Side::Source, DecidedBy::Nobody) => Ending::NeverBegan,
            (Side::Source, _) => Ending::SourceCameBack,
        });
        self.wanted[loser] = None;
        if self.is_well(loser) {
            self.kill_backend(loser);
            self.vms[loser] = Vm::new(loser, self.volumes.len());
        } else if !self.hosts_now[loser].is_dead {
            self.set_aside(loser);
        }
        self.hosts_now[loser] = Host::default();
        self.stage.traps.clear();
        self.go_on_at(host);
    }

    fn look_at_winner(&mut self, winner: usize, since: Time, before: [u64; 3]) -> bool {
        if !self.is_well(winner) {
            if self.stage.now > self.calm_from + OPERATOR {
                self.evacuate(winner);
            }
            return false;
        }
        if self.vms[winner].image.is_none() {
            // The VM's memory was lost on the way, but the volumes are here.
            self.boot(winner);
            self.endings.booted += 1;
        }
        if !self.vms[winner].running {
            self.run_vm(winner);
        }
        let vm = &self.vms[winner];
        self.round_from = self.stage.now.min(self.round_from.max(since));
        if vm.answered.iter().zip(before).all(|(now, before)| *now > before + 1) {
            if self.round >= self.rounds + ROUNDS_MORE
                || (self.round >= self.rounds && !self.does_anybody_hang())
            {
                return true;
            }
            self.begin(winner);
            return false;
        }
        let backend = self.current[winner].map(|number| &self.backends[number]);
        let serves = backend.is_some_and(|b| !b.alive || b.standing() == Standing::Serving);
        if !serves && self.stage.now > self.calm_from.max(self.restarted) + 100 * MS {
            // The agent starts it again as the owner that it is.
            self.kill_backend(winner);
            self.start_backend(winner);
            self.restarted = self.stage.now;
        }
        false
    }

    /// A machine that was left to itself and has not noticed yet.
    fn does_anybody_hang(&self) -> bool {
        self.vms[2..].iter().any(|vm| vm.frozen_until + 20 * MS > self.stage.now)
    }

    /// The next handoff is planned.
    fn begin(&mut self, from: usize) {
        let again = self.handoff.attempt > 0 && from == self.hosts[0] && self.stage.rng.bool();
        self.round += 1;
        self.hosts = [from, 1 - from];
        self.handoff = if again {
            Try { attempt: self.handoff.attempt + 1, ..self.handoff }
        } else {
            Try { id: HandoffId(self.handoff.id.0 + 1), attempt: 1 }
        };
        self.image_lost = false;
        self.explicit = self.stage.rng.u8(..3) == 0;
        self.stage.by = DecidedBy::Nobody;
        self.round_from = self.stage.now;
        self.migration = Migration::Waiting;
        let volumes: Vec<VolumeId> = self.volumes.iter().map(|v| v.record.volume).collect();
        let mut key = Key::default();
        self.stage.rng.fill(&mut key.0);
        let plan = Plan {
            attempt: self.handoff,
            vm: "vm".to_owned(),
            from: owner_name(from),
            to: owner_name(1 - from),
            anchor: volumes[self.stage.rng.usize(..volumes.len())],
            members: Members::of(volumes.iter().copied()),
            mode: self.mode,
            key,
        };
        note!(self.stage, "round {}: from host {from}, anchor {}", self.round, plan.anchor);
        let next_epochs = self.volumes.iter().map(|volume| volume.record.next_epoch).collect();
        let row = Row::new(self.round, plan, next_epochs, self.stage.now);
        self.journal.row = Some(row);
        self.plan_faults();
    }
}
