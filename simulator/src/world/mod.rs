//! One world: storage servers, two hosts, coordinators, and an orchestrator that
//! moves the VM back and forth while things go wrong. A seed decides all of it.
//!
//! | module | noun |
//! |---|---|
//! | `orchestrator` | who moves the VM, and how a round ends |
//! | `operator` | who ends it by force |
//! | `accident` | how a [`crate::fault::Fault`] is done to the world |

mod accident;
mod operator;
mod orchestrator;

use std::collections::HashSet;

use baton_protocol::handoff::role::Standing;
use baton_protocol::handoff::{Mode, Try};

use crate::agenda::{Agenda, MS, Time};
use crate::backend::Backend;
use crate::bug::Bug;
use crate::checker;
use crate::coordinator::{Coordinator, Journal, Order};
use crate::coverage::Coverage;
use crate::ending::Endings;
use crate::fault::Hits;
use crate::history::History;
use crate::network::Network;
use crate::server::{Server, Volume};
use crate::stage::{BY_OPERATOR, DeadBackend, DecidedBy, Event, Setting, Stage, note};
use crate::theme::Theme;
use crate::trace::Trace;
use crate::vm::{Image, Vm};
use crate::watch::{Violation, Watch};

/// How long the VM may stand still once nothing goes wrong any more.
const LIVENESS: Time = 1500 * MS;
/// How long an operator waits for what cannot be decided.
const OPERATOR: Time = 500 * MS;
/// No world takes longer, unless nobody gets out of it: 2 minutes.
const END: Time = 120_000 * MS;
/// The longest that something goes wrong.
const FAULT_MAX: Time = 90 * MS;
/// The longest that a host hangs whose handoff ends without it.
const HANG_SHORT: Time = 400 * MS;
/// The longest that a host hangs: longer than an operator waits, and after he has
/// acted.
const HANG_LONG: [Time; 2] = [OPERATOR + 100 * MS, 1200 * MS];
/// More handoffs in a world in which somebody still hangs.
const ROUNDS_MORE: u64 = 6;
/// Machines in a world, with those that were left to themselves.
const LEFT_MAX: usize = 6;

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
    /// Which pairs of state and event were reached.
    pub coverage: Coverage,
    /// Handoffs that were begun.
    pub handoffs: u64,
    /// How they ended.
    pub endings: Endings,
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

/// One VM host.
#[derive(Clone, Copy, Debug, Default)]
struct Host {
    is_dead: bool,
    hangs_until: Time,
}

struct World {
    stage: Stage,
    theme: Theme,
    servers: Vec<Server>,
    volumes: Vec<Volume>,
    backends: Vec<Backend>,
    /// Per place, the hosts first, then machines that were left to themselves: the
    /// backend now.
    current: Vec<Option<usize>>,
    vms: Vec<Vm>,
    /// Per host: how its agent starts its backend again.
    wanted: [Option<bool>; 2],
    hosts_now: [Host; 2],
    fencing: Option<operator::Fencing>,
    coordinators: Vec<Coordinator>,
    journal: Journal,
    round: u64,
    rounds: u64,
    handoff: Try,
    mode: Mode,
    hosts: [usize; 2],
    migration: Migration,
    image_lost: bool,
    /// An agent orders the destination to activate before its machine runs.
    explicit: bool,
    /// Nothing goes wrong any more from here on.
    calm_from: Time,
    /// When the agent last started the winner's backend again.
    restarted: Time,
    round_from: Time,
    endings: Endings,
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
        coverage: stage.coverage,
        handoffs: world.round,
        endings: world.endings,
        history: stage.history,
    }
}

impl World {
    fn new(seed: u64, bug: Option<Bug>, keep_trace: bool) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let volumes = rng.usize(1..=3);
        let theme = Theme::draw(&mut rng);
        let mut setting = Setting {
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
        theme.set(&mut setting, &mut rng);
        let volumes = setting.volumes;
        let mode = if rng.u8(..4) == 0 { Mode::Base } else { Mode::Fast };
        let [least, most] = theme.handoffs();
        let rounds = rng.u64(least..=most);
        let mut stage = Stage {
            now: 0,
            agenda: Agenda::new(),
            rng,
            trace: Trace::new(seed, keep_trace),
            watch: Watch::new(volumes),
            history: History::default(),
            network: Network::default(),
            hits: Hits::default(),
            coverage: Coverage::default(),
            traps: Vec::new(),
            bug,
            carried: HashSet::new(),
            by: DecidedBy::Nobody,
            activated: None,
            losing: 0,
            doubling: 0,
            setting: setting.clone(),
        };
        note!(stage, "{theme:?} {setting:?} {mode:?}");
        let mut vms = vec![Vm::new(0, volumes), Vm::new(1, volumes)];
        vms[0].image = Some(Image::new(volumes, setting.queues));
        vms[0].running = true;
        let server = |_| Server { up: true, boot: stage.rng.u64(1..), ..Server::default() };
        let servers = (0..setting.servers).map(server).collect();
        let mut journal = Journal::default();
        let backend = Backend::start(&mut stage, 0, 0, None, &vms[0]);
        let coordinator = Coordinator::start(&mut stage, &mut journal, 0);
        for place in 0..2 {
            stage.after(100, Event::Guest { place });
        }
        stage.after(5 * MS, Event::Orchestrator);
        Self {
            theme,
            servers,
            volumes: (0..volumes)
                .map(|volume| Volume::new(volume, setting.servers, setting.sectors))
                .collect(),
            backends: vec![backend],
            current: vec![Some(0), None],
            hosts_now: [Host::default(); 2],
            fencing: None,
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
            explicit: false,
            calm_from: 0,
            restarted: 0,
            round_from: 0,
            endings: Endings::default(),
            stage,
        }
    }

    fn play(&mut self) {
        while let Some((at, event)) = self.stage.agenda.next() {
            self.stage.now = at;
            if at > END {
                self.stage.watch.broken("I9", "a guest does not go on, whatever is tried".into());
                return;
            }
            if let Some(thaws) = self.frozen_until(&event).filter(|thaws| *thaws > at) {
                self.stage.agenda.put(thaws, event);
                continue;
            }
            let is_over = self.happens(event);
            if let Some([from, to]) = self.stage.activated.take() {
                if !self.vms[to].running {
                    self.stage.by = DecidedBy::Order;
                }
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
            Event::Reply { coordinator: BY_OPERATOR, .. } => None,
            Event::Reply { coordinator, .. } | Event::CoordinatorTick { coordinator } => {
                Some(self.coordinators[*coordinator].frozen_until)
            }
            Event::BackendStarts { host } => Some(self.hosts_now[*host].hangs_until),
            Event::Image { .. } => Some(self.hosts_now[self.hosts[1]].hangs_until),
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
                    let vm = &mut self.vms[backend.place];
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
            Event::Reply { coordinator: BY_OPERATOR, reply } => self.operator_hears(&reply),
            Event::Reply { coordinator, reply } => {
                let from = &mut self.coordinators[coordinator];
                if from.up {
                    from.hear(stage, &mut self.journal, reply);
                }
            }
            Event::CoordinatorTick { coordinator } => {
                let ticks = &mut self.coordinators[coordinator];
                let destination = self.current[self.hosts[1]];
                let answers = !self.hosts_now[self.hosts[1]].is_dead
                    && self.hosts_now[self.hosts[1]].hangs_until <= stage.now;
                let is_dead =
                    answers && destination.is_some_and(|number| !self.backends[number].alive);
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
                    backend.check(stage, &mut self.vms[backend.place]);
                }
            }
            Event::Rings { backend, member, on } => {
                let backend = &mut self.backends[backend];
                let vm = &mut self.vms[backend.place];
                if backend.alive && on == vm.running {
                    backend.rings(stage, vm, member, on);
                }
            }
            Event::BackendStarts { host } => self.start_backend(host),
            Event::Image { round, image } => {
                let vm = &mut self.vms[self.hosts[1]];
                let dead = self.hosts_now[vm.host].is_dead;
                if round == self.round && !dead && !vm.running && self.wanted[vm.host].is_some() {
                    vm.image = Some(image);
                }
            }
            Event::Guest { place } => self.guest(place),
            Event::Orchestrator => return self.orchestrate(),
            Event::Fault(fault) => self.go_wrong(fault),
        }
        false
    }

    fn guest(&mut self, place: usize) {
        let stage = &mut self.stage;
        let vm = &mut self.vms[place];
        if vm.frozen_until > stage.now {
            return stage.after(5 * MS, Event::Guest { place });
        }
        vm.ask(stage);
        let left = place > 1;
        if let Some(backend) = self.current[place].map(|number| &mut self.backends[number])
            && backend.alive
            && backend.frozen_until <= stage.now
        {
            backend.take(stage, vm);
            // Its agent stops a machine whose backend is parked, sooner or later.
            if left && backend.standing() == Standing::Parked && stage.chance(0.05) {
                backend.kill(stage);
                return;
            }
        } else if left {
            return;
        }
        let late = stage.now - self.round_from > 150 * MS;
        let pause = if left {
            stage.between(500, 4 * MS)
        } else if late || !vm.running {
            5 * MS
        } else {
            stage.between(30, 300)
        };
        stage.after(pause, Event::Guest { place });
    }

    fn start_backend(&mut self, host: usize) {
        let Some(claims) = self.wanted[host].filter(|_| !self.hosts_now[host].is_dead) else {
            return;
        };
        if self.current[host].is_some_and(|number| self.backends[number].alive) {
            return;
        }
        let number = self.backends.len();
        let stands_by = (!claims).then_some(self.handoff);
        let backend = Backend::start(&mut self.stage, number, host, stands_by, &self.vms[host]);
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
}

/// The server of a volume, if it is still the process that is meant.
fn running(servers: &[Server], volume: usize, boot: u64) -> Option<&Server> {
    let server = &servers[volume % servers.len()];
    (server.up && server.boot == boot).then_some(server)
}
