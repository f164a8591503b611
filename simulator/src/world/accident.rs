//! What goes wrong in a round is planned, and done to the world.

use baton_protocol::handoff::role::Order as RoleOrder;

use super::{FAULT_MAX, HANG_LONG, HANG_SHORT, LEFT_MAX, Migration, World};
use crate::agenda::{MS, Time};
use crate::coordinator::{Coordinator, Stand};
use crate::fault::{Fault, Point, Trap};
use crate::network::Partition;
use crate::stage::{Event, note};
use crate::vm::Vm;

impl World {
    pub(super) fn plan_faults(&mut self) {
        self.calm_from = self.stage.now;
        let [least, most] = self.theme.faults();
        for _ in 0..self.stage.rng.usize(least..=most) {
            let (mut faults, mut points) = (&Fault::ALL[..], &Point::ALL[..]);
            if let Some(pool) = self.theme.pool().filter(|_| self.stage.rng.u8(..4) != 0) {
                (faults, points) = pool;
            }
            let fault = faults[self.stage.rng.usize(..faults.len())];
            if self.stage.setting.overlaps && fault.forgets() {
                continue;
            }
            if self.stage.chance(0.6) {
                let point = points[self.stage.rng.usize(..points.len())];
                let passes = self.stage.rng.u32(0..=3);
                self.stage.traps.push(Trap { point, passes, fault });
            } else {
                let delay = self.stage.between(0, 120 * MS);
                self.stage.after(delay, Event::Fault(fault));
            }
        }
    }

    pub(super) fn go_wrong(&mut self, fault: Fault) {
        if matches!(self.migration, Migration::Settled { .. }) {
            return;
        }
        let [from, to] = self.hosts;
        let lasts = self.stage.between(2 * MS, FAULT_MAX);
        let now = self.stage.now;
        let thaws = now + lasts;
        let server = self.stage.rng.usize(..self.servers.len());
        note!(self.stage, "FAULT {fault:?}, server {server}, {} ms", lasts / MS);
        let happened = match fault {
            Fault::ServerKilled => self.kill_server(server, false, lasts),
            Fault::PowerLost => self.kill_server(server, true, lasts),
            Fault::SourceKilled => self.kill_and_restart(from, lasts),
            Fault::DestinationKilled => self.kill_and_restart(to, lasts),
            Fault::CoordinatorKilled => {
                let coordinator = self.coordinators.last_mut().expect("there is one");
                let was_up = coordinator.up;
                coordinator.up = false;
                if was_up {
                    let coordinator = self.coordinators.len();
                    self.stage.after(lasts, Event::CoordinatorStarts { coordinator });
                }
                was_up
            }
            Fault::SecondCoordinator => {
                let number = self.coordinators.len();
                let was_up = self.coordinators[number - 1].up;
                if was_up {
                    let next = Coordinator::start(&mut self.stage, &mut self.journal, number);
                    self.coordinators.push(next);
                }
                was_up
            }
            Fault::JournalLost => {
                let row = self.journal.row.as_mut();
                row.is_some_and(|row| !std::mem::replace(&mut row.is_to_be_lost, true))
            }
            Fault::ServerFrozen => {
                self.servers[server].frozen_until = thaws;
                self.servers[server].up
            }
            Fault::SourceFrozen => self.freeze_backend(from, thaws),
            Fault::DestinationFrozen => self.freeze_backend(to, thaws),
            Fault::CoordinatorFrozen => {
                let coordinator = self.coordinators.last_mut().expect("there is one");
                coordinator.frozen_until = thaws;
                coordinator.up
            }
            Fault::SourceUnheard => self.part(from, server, true, thaws),
            Fault::SourceDeaf => self.part(from, server, false, thaws),
            Fault::DestinationUnheard => self.part(to, server, true, thaws),
            Fault::DestinationDeaf => self.part(to, server, false, thaws),
            Fault::ConnectionReset => self.lose_connections(false),
            Fault::ConnectionCut => self.lose_connections(true),
            Fault::DiskSlow => {
                self.servers[server].slow_until = thaws;
                true
            }
            Fault::MessagesLost => {
                self.stage.losing = 4;
                true
            }
            Fault::MessagesDoubled => {
                self.stage.doubling = 6;
                true
            }
            Fault::ImageLost => {
                let before = !std::mem::replace(&mut self.image_lost, true);
                before && !matches!(self.migration, Migration::Sent { .. })
            }
            Fault::SourceHostDied => self.lose_host(from),
            Fault::DestinationHostDied => self.lose_host(to),
            Fault::SourceHostHung => self.hang_host(from),
            Fault::DestinationHostHung => self.hang_host(to),
            Fault::DestinationDiedAndHung => {
                let killed = self.kill_and_restart(to, lasts);
                if killed {
                    let (point, fault) = (Point::StandbyStarted, Fault::DestinationHostHung);
                    self.stage.traps.push(Trap { point, passes: 0, fault });
                }
                killed
            }
            // Counted when it is done.
            Fault::FenceForced => {
                self.force_fence();
                false
            }
            Fault::SourceResumed => {
                let stopped = !self.vms[from].running && self.is_well(from);
                if stopped {
                    self.run_vm(from);
                    self.migration = Migration::GivenUp;
                }
                stopped
            }
            Fault::DestinationStarted => {
                let vm = &self.vms[to];
                let can = !vm.running && vm.image.is_some() && self.is_well(to);
                if can {
                    self.run_vm(to);
                }
                can
            }
            Fault::Cancelled => {
                let row = self.journal.row.as_mut();
                row.is_some_and(|row| {
                    row.cancel();
                    row.stand == Stand::Cancelling
                })
            }
            Fault::SealOrdered => self.order(from, RoleOrder::Seal),
            Fault::ActivateOrdered => self.order(to, RoleOrder::Activate),
            Fault::AbdicateOrdered => self.order(to, RoleOrder::Abdicate),
            Fault::ReclaimOrdered => self.order(from, RoleOrder::Reclaim),
            Fault::OrdersContradict => self.contradict(),
            Fault::DiskReset => self.reset_disk(from),
        };
        if happened {
            self.calm_from = self.calm_from.max(thaws);
            let place = Fault::ALL.iter().position(|other| *other == fault).unwrap_or_default();
            self.stage.hits.faults[place] += 1;
        }
    }

    /// Stops a disk's rings under a dirty log, and starts them again unless the machine has stopped by then.
    fn reset_disk(&mut self, host: usize) -> bool {
        if matches!(self.migration, Migration::Waiting) {
            self.stage.after(MS, Event::Fault(Fault::DiskReset));
            return false;
        }
        let (now, Some(number)) = (self.stage.now, self.current[host]) else { return false };
        let (backend, vm) = (&mut self.backends[number], &mut self.vms[host]);
        let resets = vm.running && vm.migrating && backend.alive && backend.frozen_until <= now;
        if resets {
            let member = self.stage.rng.usize(..self.volumes.len());
            backend.rings(&mut self.stage, vm, member, false);
            let pause = self.stage.between(100, 3 * MS);
            self.stage.after(pause, Event::Rings { backend: number, member, on: true });
        }
        resets
    }

    fn kill_server(&mut self, server: usize, power: bool, lasts: Time) -> bool {
        if !std::mem::replace(&mut self.servers[server].up, false) {
            return false;
        }
        // A killed process is not frozen any more, and its successor never was.
        self.servers[server].frozen_until = 0;
        let volumes = self.volumes.iter_mut().filter(|volume| volume.server == server);
        volumes.for_each(|volume| volume.crash(&mut self.stage, power));
        self.stage.after(lasts, Event::ServerStarts { server });
        true
    }

    fn kill_and_restart(&mut self, host: usize, lasts: Time) -> bool {
        let killed = self.kill_backend(host);
        if killed {
            self.stage.after(lasts, Event::BackendStarts { host });
        }
        killed
    }

    /// Only one host at a time: with both gone nobody is left to go on.
    fn may_lose(&self, host: usize) -> bool {
        let other = self.is_well(1 - host);
        other && self.is_well(host) && self.fencing.is_none() && self.vms.len() < LEFT_MAX
    }

    fn lose_host(&mut self, host: usize) -> bool {
        let may = self.may_lose(host);
        if may {
            self.hosts_now[host].is_dead = true;
            self.wanted[host] = None;
            if let Some(number) = self.current[host] {
                self.backends[number].vanish(&mut self.stage);
            }
            self.vms[host] = Vm::new(host, self.volumes.len());
        }
        may
    }

    fn hang_host(&mut self, host: usize) -> bool {
        let may = self.may_lose(host);
        if may {
            let [long, longest] = HANG_LONG;
            let hangs = if self.stage.rng.bool() {
                self.stage.between(FAULT_MAX, HANG_SHORT)
            } else {
                self.stage.between(long, longest)
            };
            let thaws = self.stage.now + hangs;
            self.hosts_now[host].hangs_until = thaws;
            self.vms[host].frozen_until = thaws;
            self.freeze_backend(host, thaws);
        }
        may
    }

    /// Orders that contradict each other, to either side, fitting or not.
    fn contradict(&mut self) -> bool {
        let mut heard = false;
        for _ in 0..self.stage.rng.usize(2..=5) {
            let host = self.stage.rng.usize(..2);
            heard |= match self.stage.rng.u8(..5) {
                0 => self.order(host, RoleOrder::Seal),
                1 => self.order(host, RoleOrder::Reclaim),
                2 => self.order(host, RoleOrder::Abdicate),
                _ => self.order(host, RoleOrder::Activate),
            };
        }
        heard
    }

    fn freeze_backend(&mut self, host: usize, thaws: Time) -> bool {
        let backend = self.current[host].map(|number| &mut self.backends[number]);
        backend.is_some_and(|backend| {
            backend.frozen_until = thaws;
            backend.alive
        })
    }

    fn part(&mut self, host: usize, server: usize, to_server: bool, until: Time) -> bool {
        self.stage.network.partitions.push(Partition { host, server, to_server, until });
        true
    }

    fn lose_connections(&mut self, cut: bool) -> bool {
        let host = self.hosts[self.stage.rng.usize(..2)];
        let backend = self.current[host].map(|number| &mut self.backends[number]);
        let Some(backend) = backend.filter(|backend| backend.alive) else { return false };
        backend.lose_connections(&mut self.stage, cut);
        true
    }

    pub(super) fn order(&mut self, host: usize, order: RoleOrder) -> bool {
        let backend = self.current[host].map(|number| &mut self.backends[number]);
        let now = self.stage.now;
        let Some(backend) = backend.filter(|b| b.alive && b.frozen_until <= now) else {
            return false;
        };
        backend.order(&mut self.stage, &mut self.vms[host], order);
        true
    }
}
