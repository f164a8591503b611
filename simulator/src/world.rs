//! One world: storage servers, two hosts, coordinators, and an orchestrator that
//! moves the VM back and forth while things go wrong. A seed decides all of it.

use std::collections::HashSet;

use baton_protocol::VolumeId;
use baton_protocol::handoff::role::{Order as RoleOrder, Standing};
use baton_protocol::handoff::{HandoffId, Key, Members, Mode, Plan, Side, Try};

use crate::agenda::{Agenda, MS, Time};
use crate::backend::Backend;
use crate::bug::Bug;
use crate::checker;
use crate::coordinator::{Coordinator, Journal, Order, Row, Stand};
use crate::fault::{Fault, Hits, Point, Trap};
use crate::history::History;
use crate::network::{Network, Partition};
use crate::server::{Server, Volume, owner_name};
use crate::stage::{Call, DeadBackend, Event, Setting, Stage, note};
use crate::trace::Trace;
use crate::vm::{Image, Vm};
use crate::watch::{Violation, Watch};

/// How long the VM may stand still once nothing goes wrong any more.
const LIVENESS: Time = 1500 * MS;
/// How long an operator waits for what cannot be decided.
const OPERATOR: Time = 500 * MS;
/// The longest that something goes wrong.
const FAULT_MAX: Time = 90 * MS;

/// How one world ended.
#[derive(Debug)]
pub struct Report {
    /// Which world.
    pub seed: u64,
    /// The first rule that was broken.
    pub violation: Option<Violation>,
    /// What happened.
    pub trace: Trace,
    /// How often what happened.
    pub hits: Hits,
    /// Handoffs that were begun.
    pub handoffs: u64,
    /// Handoffs that source and destination won.
    pub won: [u64; 2],
    /// Handoffs that only an operator could end: a server and a backend were
    /// killed at the wrong moments.
    pub fenced: u64,
    /// What the guests asked and were answered.
    pub history: History,
}

/// Where the orchestrator stands in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Migration {
    /// Until the coordinator says READY.
    Waiting,
    Precopy {
        until: Time,
    },
    /// The source's vCPUs are stopped; which backend was told to stop its rings.
    Stopping {
        told: Option<usize>,
        until: Time,
    },
    /// The memory is on its way or there.
    Sent {
        until: Time,
    },
    /// Only the outcome is of interest.
    GivenUp,
    /// Settled; the VM is to go on at the winner's host.
    Settled {
        winner: usize,
        since: Time,
        before: [u64; 3],
    },
}

struct World {
    stage: Stage,
    servers: Vec<Server>,
    volumes: Vec<Volume>,
    backends: Vec<Backend>,
    /// Per host: its backend now, and how its agent starts it again.
    current: [Option<usize>; 2],
    wanted: [Option<bool>; 2],
    vms: [Vm; 2],
    coordinators: Vec<Coordinator>,
    journal: Journal,
    round: u64,
    rounds: u64,
    handoff: Try,
    mode: Mode,
    hosts: [usize; 2],
    migration: Migration,
    image_lost: bool,
    /// Servers and backends that were killed in this round.
    killed: [u32; 2],
    /// Handoffs that only an operator could end.
    fenced: u64,
    /// Nothing goes wrong any more from here on.
    calm_from: Time,
    round_from: Time,
    won: [u64; 2],
}

/// Plays the world of a seed to its end.
#[must_use]
pub fn run(seed: u64, bug: Option<Bug>, keep_trace: bool) -> Report {
    let mut world = World::new(seed, bug, keep_trace);
    world.play();
    let stage = world.stage;
    let mut violation = stage.watch.found().cloned();
    if violation.is_none()
        && let Err(broken) = checker::check(&stage.history)
    {
        violation = Some(Violation { rule: broken.rule(), what: broken.to_string() });
    }
    Report {
        seed,
        violation,
        trace: stage.trace,
        hits: stage.hits,
        handoffs: world.round,
        won: world.won,
        fenced: world.fenced,
        history: stage.history,
    }
}

impl World {
    fn new(seed: u64, bug: Option<Bug>, keep_trace: bool) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let volumes = rng.usize(1..=3);
        let setting = Setting {
            servers: rng.usize(1..=volumes),
            volumes,
            queues: rng.usize(1..=2),
            sectors: rng.usize(2..=6),
            overlaps: rng.u8(..4) == 0,
            dead_backend: *rng
                .choice(&[
                    DeadBackend::Waits,
                    DeadBackend::TakesForUndone,
                    DeadBackend::TakesForDone,
                ])
                .expect("three"),
            loss: if rng.bool() { 0.05 } else { 0.0 },
        };
        let mode = if rng.u8(..4) == 0 { Mode::Base } else { Mode::Fast };
        let rounds = rng.u64(2..=5);
        let mut stage = Stage {
            now: 0,
            agenda: Agenda::new(),
            rng,
            trace: Trace::new(seed, keep_trace),
            watch: Watch::new(volumes),
            history: History::default(),
            network: Network::default(),
            hits: Hits::default(),
            traps: Vec::new(),
            bug,
            carried: HashSet::new(),
            activated: None,
            losing: 0,
            doubling: 0,
            setting: setting.clone(),
        };
        note!(stage, "{setting:?} {mode:?}");
        let mut vms = [Vm::new(0, volumes), Vm::new(1, volumes)];
        vms[0].image = Some(Image::new(volumes, setting.queues));
        vms[0].running = true;
        let server = |_| Server { up: true, boot: stage.rng.u64(1..), ..Server::default() };
        let servers = (0..setting.servers).map(server).collect();
        let mut journal = Journal::default();
        let backend = Backend::start(&mut stage, 0, 0, true, &vms[0]);
        let coordinator = Coordinator::start(&mut stage, &mut journal, 0);
        for host in 0..2 {
            stage.after(100, Event::Guest { host });
        }
        stage.after(5 * MS, Event::Orchestrator);
        Self {
            servers,
            volumes: (0..volumes)
                .map(|volume| Volume::new(volume, setting.servers, setting.sectors))
                .collect(),
            backends: vec![backend],
            current: [Some(0), None],
            wanted: [Some(true), None],
            vms,
            coordinators: vec![coordinator],
            journal,
            round: 0,
            rounds,
            handoff: Try::default(),
            mode,
            hosts: [0, 1],
            migration: Migration::Settled { winner: 0, since: 0, before: [0; 3] },
            image_lost: false,
            killed: [0; 2],
            fenced: 0,
            calm_from: 0,
            round_from: 0,
            won: [0; 2],
            stage,
        }
    }

    fn play(&mut self) {
        while let Some((at, event)) = self.stage.agenda.next() {
            self.stage.now = at;
            if let Some(thaws) = self.frozen_until(&event).filter(|thaws| *thaws > at) {
                self.stage.agenda.put(thaws, event);
                continue;
            }
            let is_over = self.happens(event);
            if let Some([from, to]) = self.stage.activated.take() {
                self.look_at_leftovers(from, to);
            }
            if is_over || self.stage.watch.found().is_some() {
                return;
            }
        }
    }

    /// I5: what the source took from its guest is carried out, or the
    /// destination's guest still asks for it.
    fn look_at_leftovers(&mut self, from: usize, to: usize) {
        use crate::history::Kind;
        for request in self.vms[from].taken() {
            let Kind::Write { value, .. } = request.kind else { continue };
            let asks = self.vms[to].image.as_ref().is_some_and(|image| image.has(request.id));
            if !asks && !self.stage.carried.contains(&value) {
                let what = format!("write {value} was taken and lost when the destination won");
                self.stage.watch.broken("I5", what);
            }
        }
    }

    fn frozen_until(&self, event: &Event) -> Option<Time> {
        let network = &self.stage.network;
        let server = |volume: usize| self.servers[volume % self.servers.len()].frozen_until;
        match event {
            Event::ToServer { connection, .. } => {
                Some(self.servers[network.connections[*connection].server].frozen_until)
            }
            Event::Executed { volume, .. }
            | Event::Stored { volume, .. }
            | Event::Persist { volume, .. }
            | Event::Call { volume, .. } => Some(server(*volume)),
            Event::ToClient { connection, .. } => {
                Some(self.backends[network.connections[*connection].backend].frozen_until)
            }
            Event::Connect { backend, .. }
            | Event::Check { backend }
            | Event::Rings { backend, .. } => Some(self.backends[*backend].frozen_until),
            Event::Reply { coordinator, .. } | Event::CoordinatorTick { coordinator } => {
                Some(self.coordinators[*coordinator].frozen_until)
            }
            _ => None,
        }
    }

    /// Returns whether the world is over.
    fn happens(&mut self, event: Event) -> bool {
        let stage = &mut self.stage;
        match event {
            Event::ToServer { connection, message } => {
                let known = &stage.network.connections[connection];
                let (at, volume) = (known.server, known.volume);
                if !known.server_open {
                } else if self.servers[at].up {
                    self.volumes[volume].hear(stage, &self.servers[at], connection, message);
                } else {
                    stage.network.connections[connection].server_open = false;
                    stage.send_to_client(connection, crate::stage::ToClient::End);
                }
            }
            Event::ToClient { connection, message } => {
                let backend = &mut self.backends[stage.network.connections[connection].backend];
                if backend.alive {
                    let vm = &mut self.vms[backend.host];
                    backend.hear(stage, vm, connection, message);
                }
            }
            Event::Executed { volume, boot, token } => {
                if let Some(server) = running(&self.servers, volume, boot) {
                    self.volumes[volume].executed(stage, server, token);
                }
            }
            Event::Stored { volume, boot } => {
                if let Some(server) = running(&self.servers, volume, boot) {
                    self.volumes[volume].stored(stage, server);
                }
            }
            Event::Persist { volume, boot } => {
                if running(&self.servers, volume, boot).is_some() {
                    self.volumes[volume].persist(stage, boot);
                }
            }
            Event::ServerStarts { server } => {
                self.servers[server].up = true;
                self.servers[server].boot = stage.rng.u64(1..);
                let volumes = self.volumes.iter_mut();
                volumes.filter(|volume| volume.server == server).for_each(|v| v.start(stage));
            }
            Event::Call { coordinator, term, volume, call } => {
                let server = &self.servers[volume % self.servers.len()];
                if server.up {
                    self.volumes[volume].call(stage, server, coordinator, term, call);
                }
            }
            Event::Reply { coordinator, reply } => {
                let from = &mut self.coordinators[coordinator];
                if from.up {
                    from.hear(stage, &mut self.journal, reply);
                }
            }
            Event::CoordinatorTick { coordinator } => {
                let ticks = &mut self.coordinators[coordinator];
                let destination = self.current[self.hosts[1]];
                let is_dead = destination.is_some_and(|number| !self.backends[number].alive);
                if ticks.up
                    && let Some(Order::StartStandby) = ticks.tick(stage, &mut self.journal, is_dead)
                {
                    self.start_standby();
                }
            }
            Event::CoordinatorStarts { coordinator } => {
                let next = Coordinator::start(stage, &mut self.journal, coordinator);
                self.coordinators.push(next);
            }
            Event::Connect { backend, member, link } => {
                if self.backends[backend].alive {
                    self.backends[backend].connect(stage, member, link);
                }
            }
            Event::Check { backend } => {
                let backend = &mut self.backends[backend];
                if backend.alive {
                    backend.check(stage, &mut self.vms[backend.host]);
                }
            }
            Event::Rings { backend, member, on } => {
                let backend = &mut self.backends[backend];
                let vm = &mut self.vms[backend.host];
                if backend.alive && on == vm.running {
                    backend.rings(stage, vm, member, on);
                }
            }
            Event::BackendStarts { host } => self.start_backend(host),
            Event::Image { round, image } => {
                let vm = &mut self.vms[self.hosts[1]];
                if round == self.round && !vm.running && self.wanted[vm.host].is_some() {
                    vm.image = Some(image);
                }
            }
            Event::Guest { host } => self.guest(host),
            Event::Orchestrator => return self.orchestrate(),
            Event::Fault(fault) => self.go_wrong(fault),
        }
        false
    }

    fn guest(&mut self, host: usize) {
        let stage = &mut self.stage;
        let vm = &mut self.vms[host];
        vm.ask(stage);
        if let Some(backend) = self.current[host].map(|number| &mut self.backends[number])
            && backend.alive
            && backend.frozen_until <= stage.now
        {
            backend.take(stage, vm);
        }
        let late = stage.now - self.round_from > 150 * MS;
        let pause = if late || !vm.running { 5 * MS } else { stage.between(30, 300) };
        stage.after(pause, Event::Guest { host });
    }

    fn start_backend(&mut self, host: usize) {
        let Some(claims) = self.wanted[host] else { return };
        if self.current[host].is_some_and(|number| self.backends[number].alive) {
            return;
        }
        let number = self.backends.len();
        let backend = Backend::start(&mut self.stage, number, host, claims, &self.vms[host]);
        self.backends.push(backend);
        self.current[host] = Some(number);
    }

    fn kill_backend(&mut self, host: usize) -> bool {
        let Some(number) = self.current[host] else { return false };
        let backend = &mut self.backends[number];
        let was_alive = backend.alive;
        if was_alive {
            backend.kill(&mut self.stage);
        }
        was_alive
    }

    /// The coordinator has the destination's agent start a backend.
    fn start_standby(&mut self) {
        let to = self.hosts[1];
        if self.wanted[to].is_none() {
            self.wanted[to] = Some(false);
            self.stage.after(MS, Event::BackendStarts { host: to });
        }
    }

    fn run_vm(&mut self, host: usize) {
        if self.vms[host].image.is_none() {
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
    fn orchestrate(&mut self) -> bool {
        self.stage.after(2 * MS, Event::Orchestrator);
        let now = self.stage.now;
        let [from, to] = self.hosts;
        if self.stage.now > self.calm_from.max(self.round_from) + LIVENESS {
            let what = format!("{:?} of round {} does not end", self.migration, self.round);
            self.stage.watch.broken("I9", what);
            return true;
        }
        let stuck = now > self.calm_from.max(self.round_from) + OPERATOR;
        if stuck && self.journal.row.is_some() && self.killed.iter().all(|killed| *killed > 0) {
            self.fence();
        }
        if let Some((round, winner)) = self.journal.finished
            && round == self.round
            && !matches!(self.migration, Migration::Settled { .. })
        {
            self.settled(self.hosts[winner as usize], self.hosts[1 - winner as usize]);
            self.won[winner as usize] += 1;
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
            Migration::Precopy { until } if now >= until => {
                note!(self.stage, "the VM stops on host {from}");
                self.vms[from].running = false;
                self.vms[from].migrating = true;
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
                if vm.image.is_some() && !vm.running && self.stage.chance(0.3) {
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

    /// After a server and a backend were killed in one handoff nobody may know who
    /// holds the volumes. Then an operator says so, who has looked which VM went
    /// on last.
    fn fence(&mut self) {
        let owner = self.stage.watch.owner();
        let name = owner_name(owner);
        let open: Vec<usize> =
            (0..self.volumes.len()).filter(|v| !self.volumes[*v].belongs_to(&name)).collect();
        if open.is_empty() {
            note!(self.stage, "an operator has given the volumes to host {owner}");
            self.fenced += 1;
            let winner = if owner == self.hosts[0] { Side::Source } else { Side::Destination };
            self.journal.finished = Some((self.round, winner));
            self.journal.row = None;
        }
        for volume in open {
            self.stage.call(0, 0, volume, Call::Fence(name.clone()));
        }
    }

    fn stop_rings(&mut self) {
        let [from, to] = self.hosts;
        let Migration::Stopping { told, until } = self.migration else { return };
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

    /// The coordinator has settled: the VM goes on at `winner` and nowhere else.
    fn settled(&mut self, winner: usize, loser: usize) {
        self.kill_backend(loser);
        self.wanted[loser] = None;
        self.vms[loser] = Vm::new(loser, self.volumes.len());
        self.wanted[winner] = Some(true);
        self.stage.traps.clear();
        self.stage.after(0, Event::BackendStarts { host: winner });
        if !self.vms[winner].running {
            self.run_vm(winner);
        }
        self.calm_from = self.calm_from.max(self.stage.now);
        let mut before = [0; 3];
        before.iter_mut().zip(&self.vms[winner].answered).for_each(|(b, now)| *b = *now);
        self.migration = Migration::Settled { winner, since: self.stage.now, before };
    }

    fn look_at_winner(&mut self, winner: usize, since: Time, before: [u64; 3]) -> bool {
        let vm = &self.vms[winner];
        if vm.image.is_none() {
            // Nobody ever had the VM's memory here: the decision is all there is.
            return true;
        }
        self.round_from = self.stage.now.min(self.round_from.max(since));
        if vm.answered.iter().zip(before).all(|(now, before)| *now > before + 1) {
            if self.round == self.rounds {
                return true;
            }
            self.begin(winner);
            return false;
        }
        let backend = self.current[winner].map(|number| &self.backends[number]);
        let serves = backend.is_some_and(|b| !b.alive || b.standing() == Standing::Serving);
        if !serves && self.stage.now > self.calm_from + 100 * MS {
            // The agent starts it again as the owner that it is.
            self.kill_backend(winner);
            self.start_backend(winner);
            self.calm_from = self.stage.now;
        }
        false
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
        self.killed = [0; 2];
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
        let row = Row::new(self.round, plan, volumes.len(), self.stage.now);
        self.journal.row = Some(row);
        self.plan_faults();
    }

    fn plan_faults(&mut self) {
        self.calm_from = self.stage.now;
        for _ in 0..self.stage.rng.usize(0..=7) {
            let fault = Fault::ALL[self.stage.rng.usize(..Fault::ALL.len())];
            if self.stage.setting.overlaps && fault.forgets() {
                continue;
            }
            if self.stage.chance(0.6) {
                let point = Point::ALL[self.stage.rng.usize(..Point::ALL.len())];
                let passes = self.stage.rng.u32(0..=3);
                self.stage.traps.push(Trap { point, passes, fault });
            } else {
                let delay = self.stage.between(0, 120 * MS);
                self.stage.after(delay, Event::Fault(fault));
            }
        }
    }

    fn go_wrong(&mut self, fault: Fault) {
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
            Fault::SourceResumed => {
                let stopped = !self.vms[from].running;
                if stopped {
                    self.run_vm(from);
                    self.migration = Migration::GivenUp;
                }
                stopped
            }
            Fault::DestinationStarted => {
                let can = !self.vms[to].running && self.vms[to].image.is_some();
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
            Fault::AbdicateOrdered => self.order(to, RoleOrder::Abdicate),
            Fault::ReclaimOrdered => self.order(from, RoleOrder::Reclaim),
        };
        if happened {
            match fault {
                Fault::ServerKilled | Fault::PowerLost => self.killed[0] += 1,
                Fault::SourceKilled | Fault::DestinationKilled => self.killed[1] += 1,
                _ => {}
            }
            self.calm_from = self.calm_from.max(thaws);
            let place = Fault::ALL.iter().position(|other| *other == fault).unwrap_or_default();
            self.stage.hits.faults[place] += 1;
        }
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

    fn order(&mut self, host: usize, order: RoleOrder) -> bool {
        let backend = self.current[host].map(|number| &mut self.backends[number]);
        let now = self.stage.now;
        let Some(backend) = backend.filter(|b| b.alive && b.frozen_until <= now) else {
            return false;
        };
        backend.order(&mut self.stage, &mut self.vms[host], order);
        true
    }
}

/// The server of a volume, if it is still the process that is meant.
fn running(servers: &[Server], volume: usize, boot: u64) -> Option<&Server> {
    let server = &servers[volume % servers.len()];
    (server.up && server.boot == boot).then_some(server)
}
