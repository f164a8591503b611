//! A model (stateright) of coordinators on one etcd, around the functions that the
//! product runs: [`State::step`], [`chain::campaign`], [`Chain::next`] and
//! [`Chain::judge`]. etcd is a map with revisions and leases; its leases end when
//! they like, since no clock is believed. Requests arrive late, twice, or without
//! an answer. A coordinator whose lease is over may go on as if it were not, as one
//! that was frozen does.
//!
//! Each mutant drops one thing that the design rests on, and must be caught.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stateright::{Checker, HasDiscoveries, Model, Property};

use super::chain::{self, Chain, Counter, Keys, Lead, Leader, Tail, Verdict};
use super::election::{Do, Input, State};
use super::txn::{Answer, Compare, Kv, Op, Txn};
use crate::coordinator::journal::{Change, Event};

const NODES: usize = 2;
/// Processes, over all nodes and restarts.
const LIVES_MAX: u8 = 3;
/// Of one process.
const WRITES_MAX: u8 = 2;
/// A lease lives until then, by the clock of whoever has it.
const UNTIL: u64 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    /// A write looks at the tail only.
    NoLeader,
    /// A write looks at the leader only.
    NoTail,
    /// A campaign does not look whether somebody else has taken the term meanwhile.
    NoCounter,
    /// Storage servers and agents obey any term.
    AnyTerm,
    /// What was asked again and is there already is taken for refused.
    NoAgain,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Etcd {
    revision: i64,
    keys: BTreeMap<String, Kv>,
    leases: BTreeSet<i64>,
    lease_last: i64,
}

impl Etcd {
    fn apply(&mut self, txn: &Txn) -> Answer {
        let holds = |compare: &Compare| match compare {
            Compare::Created(key, at) => self.keys.get(key).map_or(0, |kv| kv.created) == *at,
            Compare::Modified(key, at) => self.keys.get(key).map_or(0, |kv| kv.modified) == *at,
        };
        let succeeded = txn.compare.iter().all(holds);
        let ops = if succeeded { &txn.then } else { &txn.otherwise };
        let gone = |op: &Op| matches!(op, Op::Put(_, _, lease) if *lease != 0 && !self.leases.contains(lease));
        if ops.iter().any(gone) {
            // "requested lease not found": nothing is done.
            return Answer { succeeded: false, revision: self.revision, found: Vec::new() };
        }
        let writes = ops.iter().any(|op| !matches!(op, Op::Get(_)));
        let now = self.revision + i64::from(writes);
        let mut found = Vec::new();
        for op in ops {
            match op {
                Op::Put(key, value, lease) => {
                    let created = self.keys.get(key).map_or(now, |kv| kv.created);
                    let (key, value) = (key.clone(), value.clone());
                    let kv = Kv { key: key.clone(), value, created, modified: now, lease: *lease };
                    self.keys.insert(key, kv);
                }
                Op::Delete(key) => drop(self.keys.remove(key)),
                Op::DeleteRange(from, to) => self.keys.retain(|key, _| key < from || key >= to),
                Op::Get(key) => found.push(self.keys.get(key).cloned()),
            }
        }
        self.revision = now;
        Answer { succeeded, revision: now, found }
    }

    fn expire(&mut self, lease: i64) {
        self.leases.remove(&lease);
        self.keys.retain(|_, kv| kv.lease != lease);
        self.revision += 1;
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum What {
    Campaign { lease: i64 },
    Write { tail: Tail },
}

/// On its way to etcd.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Packet {
    life: u8,
    what: What,
    txn: Txn,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    life: u8,
    state: State,
    counter: Counter,
    chain: Option<Chain>,
    /// Asked, and not answered yet.
    asked: Option<Packet>,
    writes: u8,
    again: bool,
    acted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Entry {
    Read { term: u64 },
    Wrote { life: u8, tail: Tail },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    etcd: Etcd,
    nodes: Vec<Node>,
    network: Vec<Packet>,
    lives: u8,
    /// What etcd has taken, in its order.
    log: Vec<Entry>,
    /// Writes that were answered as done, and as refused.
    acked: Vec<(u8, Tail)>,
    refused: Vec<(u8, Tail)>,
    /// Terms and lives of what a storage server did, in its order.
    acts: Vec<(u64, u8)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    /// Looks, and campaigns if nobody leads.
    Look(usize),
    /// Asks again.
    Again(usize),
    /// Reads the journal after it has won.
    Read(usize),
    Write(usize),
    /// Has a storage server do something.
    Act(usize),
    /// Its own clock says that the lease is over: it ends and is started again.
    Ends(usize),
    Arrives(usize),
    /// And the answer is lost.
    ArrivesUnanswered(usize),
    Expires(i64),
}

struct Coordinators {
    mutant: Option<Mutant>,
}

fn keys() -> Keys {
    Keys::under("/")
}

fn who(life: u8) -> Leader {
    Leader { name: String::new(), api: String::new(), term: 0, instance: life.to_string() }
}

impl World {
    fn node(life: u8) -> Node {
        Node {
            life,
            state: State::Following,
            counter: Counter::default(),
            chain: None,
            asked: None,
            writes: 0,
            again: false,
            acted: false,
        }
    }

    fn leads(&self, n: usize) -> Option<Lead> {
        match self.nodes[n].state {
            State::Leading { lead, .. } => Some(lead),
            _ => None,
        }
    }

    fn send(&mut self, n: usize, what: What, txn: Txn) {
        let packet = Packet { life: self.nodes[n].life, what, txn };
        self.nodes[n].asked = Some(packet.clone());
        self.network.push(packet);
    }

    fn step(&mut self, n: usize, input: Input) {
        let (state, todo) = self.nodes[n].state.step(0, input);
        self.nodes[n].state = state;
        for one in todo {
            match one {
                Do::Grant => {
                    self.etcd.lease_last += 1;
                    let lease = self.etcd.lease_last;
                    self.etcd.leases.insert(lease);
                    self.step(n, Input::Granted { lease, until: UNTIL });
                }
                Do::Campaign { lease } => {
                    let node = &self.nodes[n];
                    let txn = chain::campaign(&keys(), &who(node.life), lease, node.counter, 0);
                    self.send(n, What::Campaign { lease }, txn);
                }
                Do::Revoke { lease } => self.etcd.expire(lease),
                Do::Look | Do::KeepAlive { .. } | Do::Lead(_) | Do::End(_) => {}
            }
        }
    }

    fn restart(&mut self, n: usize) {
        self.lives += 1;
        self.nodes[n] = Self::node(self.lives);
    }
}

/// Nobody leads, as this one sees it.
fn vacant(world: &World, n: usize) -> bool {
    let leader = world.etcd.keys.get("/leader");
    leader.is_none_or(|kv| kv.value.contains(&format!("\"instance\":\"{}\"", world.nodes[n].life)))
}

impl Coordinators {
    /// Somebody waits for its answer, and has not asked again yet.
    fn is_awaited(world: &World, packet: &Packet) -> bool {
        world.nodes.iter().any(|node| node.asked.as_ref() == Some(packet) && !node.again)
    }

    fn arrives(&self, world: &mut World, packet: &Packet, answered: bool) {
        let mut txn = packet.txn.clone();
        txn.compare.retain(|compare| match (self.mutant, compare) {
            (Some(Mutant::NoLeader), Compare::Created(..)) => {
                !matches!(packet.what, What::Write { .. })
            }
            (Some(Mutant::NoTail), Compare::Modified(..)) => {
                !matches!(packet.what, What::Write { .. })
            }
            (Some(Mutant::NoCounter), Compare::Modified(..)) => {
                !matches!(packet.what, What::Campaign { .. })
            }
            _ => true,
        });
        let answer = world.etcd.apply(&txn);
        if let What::Write { tail } = packet.what
            && answer.succeeded
        {
            world.log.push(Entry::Wrote { life: packet.life, tail });
        }
        let place = world.nodes.iter().position(|node| node.asked.as_ref() == Some(packet));
        let Some(n) = place.filter(|_| answered) else { return };
        world.nodes[n].asked = None;
        match packet.what {
            What::Campaign { lease } => {
                // A lease that is not there is said to be so.
                let input = match chain::elected(&who(packet.life), lease, &answer).expect("ours") {
                    _ if !world.etcd.leases.contains(&lease) => Input::LeaseGone,
                    Some(lead) => Input::Won(lead),
                    None => Input::Lost,
                };
                world.step(n, input);
            }
            What::Write { tail } => {
                let Some(chain) = &mut world.nodes[n].chain else { return };
                let mut verdict = chain.judge(&tail, &answer).expect("ours");
                if self.mutant == Some(Mutant::NoAgain) && !answer.succeeded {
                    verdict = Verdict::Deposed;
                }
                match verdict {
                    Verdict::Done(revision) => {
                        chain.advance(tail, revision);
                        world.acked.push((packet.life, tail));
                    }
                    Verdict::Deposed => {
                        // Somebody else leads: nothing else may be the reason.
                        let alive = world.leads(n).is_some_and(|lead| {
                            world
                                .etcd
                                .keys
                                .get("/leader")
                                .is_some_and(|kv| kv.created == lead.created)
                        });
                        if alive {
                            world.refused.push((packet.life, tail));
                        }
                        world.step(n, Input::WriteRefused);
                        if world.lives < LIVES_MAX {
                            world.restart(n);
                        }
                    }
                }
            }
        }
    }
}

impl Model for Coordinators {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let lives = u8::try_from(NODES).expect("few");
        vec![World {
            etcd: Etcd::default(),
            nodes: (1..=lives).map(World::node).collect(),
            network: Vec::new(),
            lives,
            log: Vec::new(),
            acked: Vec::new(),
            refused: Vec::new(),
            acts: Vec::new(),
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (n, node) in world.nodes.iter().enumerate() {
            let idle = node.asked.is_none();
            match node.state {
                // One that sees another lead does nothing; and all are alike before one has begun.
                State::Following
                    if idle && vacant(world, n) && (n == 0 || world.etcd.lease_last > 0) =>
                {
                    actions.push(Action::Look(n));
                }
                State::Leading { .. } => {
                    if idle && node.chain.is_none() {
                        actions.push(Action::Read(n));
                    }
                    if idle && node.chain.is_some() && node.writes < WRITES_MAX {
                        actions.push(Action::Write(n));
                    }
                    if node.chain.is_some() && idle && !node.acted {
                        actions.push(Action::Act(n));
                    }
                    if world.lives < LIVES_MAX {
                        actions.push(Action::Ends(n));
                    }
                }
                _ => {}
            }
            // Once for each process.
            if let Some(Packet { what: What::Write { .. }, .. }) = &node.asked
                && !node.again
            {
                actions.push(Action::Again(n));
            }
        }
        for (at, packet) in world.network.iter().enumerate() {
            actions.push(Action::Arrives(at));
            if matches!(packet.what, What::Write { .. }) && Self::is_awaited(world, packet) {
                actions.push(Action::ArrivesUnanswered(at));
            }
        }
        actions.extend(world.etcd.keys.get("/leader").map(|kv| Action::Expires(kv.lease)));
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Look(n) => {
                let answer = world.etcd.apply(&chain::look(&keys()));
                let (leader, counter) = chain::looked(&answer).expect("ours");
                world.nodes[n].counter = counter;
                let life = world.nodes[n].life.to_string();
                match leader {
                    None => world.step(n, Input::Vacant),
                    Some((leader, lead)) if leader.instance == life => {
                        world.step(n, Input::LeftBehind { lease: lead.lease });
                    }
                    Some(_) => world.step(n, Input::Led),
                }
            }
            Action::Again(n) => {
                world.nodes[n].again = true;
                world.network.push(world.nodes[n].asked.clone()?);
            }
            Action::Read(n) => {
                let lead = world.leads(n)?;
                let tail = world.etcd.keys.get("/tail");
                world.nodes[n].chain = Some(Chain::behind(keys(), lead, tail).expect("ours"));
                world.log.push(Entry::Read { term: lead.term });
            }
            Action::Write(n) => {
                let event = Event {
                    seq: 0,
                    kind: world.nodes[n].life.to_string(),
                    subject: String::new(),
                    at_unix_us: 0,
                    data: Value::Null,
                };
                let change = Change { events: vec![event], ..Change::default() };
                let (tail, txn) = world.nodes[n].chain.as_ref()?.next(&[&change]).expect("small");
                world.nodes[n].writes += 1;
                world.send(n, What::Write { tail }, txn);
            }
            Action::Act(n) => {
                let term = world.leads(n)?.term;
                world.nodes[n].acted = true;
                let highest = world.acts.iter().map(|(term, _)| *term).max().unwrap_or(0);
                if term >= highest || self.mutant == Some(Mutant::AnyTerm) {
                    world.acts.push((term, world.nodes[n].life));
                }
            }
            Action::Ends(n) => {
                let (state, _) = world.nodes[n].state.step(UNTIL, Input::Tick);
                assert!(matches!(state, State::Over(_)));
                world.restart(n);
            }
            Action::Arrives(at) | Action::ArrivesUnanswered(at) => {
                let packet = world.network.remove(at);
                self.arrives(&mut world, &packet, matches!(action, Action::Arrives(_)));
            }
            Action::Expires(lease) => world.etcd.expire(lease),
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one process writes under a term", |_, world: &World| {
                let mut writer = BTreeMap::new();
                wrote(world).all(|(life, tail)| *writer.entry(tail.term).or_insert(life) == life)
            }),
            Property::always("no two lead under one term", |_, world: &World| {
                let terms: Vec<u64> =
                    (0..NODES).filter_map(|n| world.leads(n)).map(|lead| lead.term).collect();
                terms.windows(2).all(|two| two[0] != two[1])
            }),
            Property::always(
                "nothing is written behind who has read the journal",
                |_, world: &World| {
                    let mut read = 0;
                    world.log.iter().all(|entry| match entry {
                        Entry::Read { term } => {
                            read = read.max(*term);
                            true
                        }
                        Entry::Wrote { tail, .. } => tail.term >= read,
                    })
                },
            ),
            Property::always("each write is done once, in its order", |_, world: &World| {
                wrote(world)
                    .zip(1..)
                    .all(|((_, tail), number)| tail.write == number && tail.seq == number)
            }),
            Property::always("what was acknowledged is there", |_, world: &World| {
                world.acked.iter().all(|acked| wrote(world).any(|there| there == *acked))
            }),
            Property::always("who leads is not refused", |_, world: &World| {
                world.refused.is_empty()
            }),
            Property::always(
                "a storage server never goes back to an older term",
                |_, world: &World| {
                    world.acts.windows(2).all(|two| two[0].0 < two[1].0 || two[0] == two[1])
                },
            ),
            Property::sometimes("two think that they lead", |_, world: &World| {
                (0..NODES).all(|n| world.leads(n).is_some())
            }),
            Property::sometimes("both have written", |_, world: &World| {
                wrote(world).map(|(life, _)| life).collect::<BTreeSet<_>>().len() > 1
            }),
        ]
    }
}

fn wrote(world: &World) -> impl Iterator<Item = (u8, Tail)> {
    world.log.iter().filter_map(|entry| match entry {
        Entry::Wrote { life, tail } => Some((*life, *tail)),
        Entry::Read { .. } => None,
    })
}

/// What is broken first, and how; what is never reached is told by its name.
fn explore(mutant: Option<Mutant>, most: usize) -> (Option<(String, String)>, Vec<&'static str>) {
    let begun = std::time::Instant::now();
    let checker = Coordinators { mutant }
        .checker()
        .finish_when(HasDiscoveries::AnyFailures)
        .target_state_count(most)
        .spawn_bfs()
        .join();
    let found = checker.discoveries();
    let reached = ["two think that they lead", "both have written"];
    let broken = found.iter().find(|(name, _)| !reached.contains(*name));
    let broken = broken.map(|(name, path)| {
        let actions: Vec<_> =
            path.clone().into_actions().iter().map(|a| format!("{a:?}")).collect();
        ((*name).to_owned(), actions.join(", "))
    });
    let unreached = reached.into_iter().filter(|name| !found.contains_key(name)).collect();
    eprintln!(
        "{mutant:?}: {} states, depth {}, {:.1} s: {broken:?}",
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    (broken, unreached)
}

/// Enough to reach all that is asked for below, and a while beyond.
const STATES_MAX: usize = 150_000;

#[test]
fn two_leaders_never_write_under_one_term() {
    let (broken, unreached) = explore(None, STATES_MAX);
    assert_eq!(broken, None);
    assert_eq!(unreached, [""; 0], "the model does not get there");
}

#[test]
fn every_mutant_is_caught() {
    let one_writer = "one process writes under a term";
    let one_leader = "no two lead under one term";
    let never_back = "a storage server never goes back to an older term";
    for (mutant, names) in [
        (Mutant::NoLeader, &["nothing is written behind who has read the journal"][..]),
        (Mutant::NoTail, &["each write is done once, in its order"]),
        // Whichever of two leaders of one term is first.
        (Mutant::NoCounter, &[one_writer, one_leader, never_back]),
        (Mutant::AnyTerm, &[never_back]),
        (Mutant::NoAgain, &["who leads is not refused"]),
    ] {
        let (broken, _) = explore(Some(mutant), 10 * STATES_MAX);
        let (name, how) = broken.unwrap_or_else(|| panic!("{mutant:?} is not caught"));
        assert!(names.contains(&name.as_str()), "{mutant:?} breaks `{name}`: {how}");
    }
}
