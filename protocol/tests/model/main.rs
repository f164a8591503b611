//! Model of a handoff around the product's own state machines, explored by
//! stateright: every order of messages, losses, crashes and starts within a
//! small scope. The invariants are those of `docs/handoff.md`.
//!
//! Then the same with mistakes built in (`mutant`): each must be found, or the
//! model proves nothing.
//!
//! What a test explores is bounded by states and steps, not by time
//! ([`Effort`]), so it is the same on every machine; each prints what it spent.
//! `BATON_MODEL=large` explores far more; without it the whole takes about 70 s
//! of one 2026 core, and may take 2 minutes.

mod mutant;
mod scope;
mod settle;
mod world;

use std::collections::BTreeMap;
use std::time::Instant;

use baton_protocol::handoff::Mode;
use stateright::{Checker, HasDiscoveries, Model, Property};

use mutant::Mutant;
use scope::{D, S, Scope};
use world::{Action, Broken, World};

struct Handoff {
    scope: Scope,
    live: bool,
}

impl Model for Handoff {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.scope)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.actions(&self.scope, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        world.after(&self.scope, &action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::always("I1 one principal, epochs never fall", |_, w: &World| {
                w.broken != Some(Broken::TwoPrincipals)
            }),
            Property::always("I2 no acknowledged write lost", |_, w: &World| {
                w.broken != Some(Broken::Lost)
            }),
            Property::always("I3 no stale read", |_, w: &World| {
                w.broken != Some(Broken::StaleRead)
            }),
            Property::always("I4 no write resurrected", |_, w: &World| {
                w.broken != Some(Broken::Resurrected)
            }),
            Property::always("I5 what the source took is done", |_, w: &World| {
                w.broken != Some(Broken::Undone)
            }),
            Property::always("I6 no decision undone", |_, w: &World| {
                w.broken != Some(Broken::DecisionUndone)
            }),
            Property::always("I7 members follow the anchor", |_, w: &World| {
                w.broken != Some(Broken::Divided)
            }),
            Property::always("I8 a standby never writes", |_, w: &World| {
                w.broken != Some(Broken::StandbyWrote)
            }),
        ];
        if self.live {
            all.push(Property::always("I9 one side runs in the end", |model: &Self, w: &World| {
                settle::ends_well(&model.scope, w)
            }));
        }
        all
    }
}

/// What a test may spend, in states of searches and steps of walks: a step costs
/// some 4 microseconds, a state of a search, with its liveness, some 25.
struct Effort {
    spent: usize,
    most: usize,
}

impl Effort {
    fn of(most: usize) -> Self {
        Self { spent: 0, most: most * effort() }
    }

    fn spend(&mut self, more: usize) {
        self.spent += more;
        let Self { spent, most } = *self;
        assert!(spent <= most, "{spent} states and steps; `make test` has time for {most}");
    }
}

impl Drop for Effort {
    fn drop(&mut self) {
        println_row(&format!("{} states and steps of at most {}", self.spent, self.most));
    }
}

/// What a search found.
#[derive(Debug)]
struct Search {
    /// What was broken, and the way there.
    broken: Option<(String, String)>,
    /// Every state of the scope was looked at.
    is_complete: bool,
}

/// Explores a scope up to so many states.
fn explore(scope: &Scope, live: bool, most: usize, effort: &mut Effort) -> Search {
    let started = Instant::now();
    let model = Handoff { scope: scope.clone(), live };
    let checker = model
        .checker()
        .finish_when(HasDiscoveries::AnyFailures)
        .target_state_count(most)
        .spawn_bfs()
        .join();
    let found = checker.discoveries().into_iter().next();
    let is_complete = found.is_none() && checker.state_count() < most;
    let outcome = match &found {
        Some((name, path)) => {
            format!("{name} broken in {} steps", path.clone().into_actions().len())
        }
        None if !is_complete => "cut off, nothing found".to_owned(),
        None => "complete, nothing found".to_owned(),
    };
    let mutant = scope.mutant.map_or(String::new(), |mutant| format!(" {mutant:?}"));
    println_row(&format!(
        "{:<28}{mutant:<30} {:>8} states, depth {:>3}, {:>5.1} s: {outcome}",
        scope.name,
        checker.unique_state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f64(),
    ));
    effort.spend(checker.state_count());
    let broken = found.map(|(name, path)| {
        let actions = path.into_actions();
        let lines = actions.iter().enumerate().map(|(at, a)| format!("{:>3} {a:?}\n", at + 1));
        (name.to_owned(), lines.collect())
    });
    Search { broken, is_complete }
}

#[allow(clippy::print_stdout, reason = "what a run covered is its result")]
fn println_row(row: &str) {
    println!("{row}");
}

/// Random walks: deep where the search is wide. What was broken and the way there.
fn wander(
    scope: &Scope,
    seed: u64,
    walks: usize,
    live: bool,
    effort: &mut Effort,
) -> Option<(String, String)> {
    let mut random = Random(seed);
    let started = Instant::now();
    let (mut steps, mut deepest, mut ups) = (0usize, 0usize, [0usize; 3]);
    let mut actions = Vec::new();
    for walk in 0..walks {
        let mut world = World::new(scope);
        let mut path = Vec::new();
        while path.len() < WALK_STEPS_MAX {
            actions.clear();
            world.actions(scope, &mut actions);
            let mut next = None;
            while !actions.is_empty() && next.is_none() {
                let action = actions.swap_remove(random.below(actions.len()));
                // Starts and accidents are rare against messages.
                if action.is_rare() && random.below(6) != 0 && !actions.is_empty() {
                    continue;
                }
                next = world.after(scope, &action).map(|world| (action, world));
            }
            let Some((action, after)) = next else { break };
            path.push(action);
            world = after;
            steps += 1;
            if world.broken.is_some() {
                break;
            }
        }
        deepest = deepest.max(path.len());
        let calm = settle::calm(scope, &world);
        let end = if calm.is_up(D) { 2 } else { usize::from(calm.is_up(S)) };
        ups[end] += 1;
        if world.broken.is_some() || (live && !settle::ends_well(scope, &world)) {
            let name = world.broken.map_or("I9".to_owned(), |broken| format!("{broken:?}"));
            let of = scope.mutant.map_or(String::new(), |mutant| format!(" {mutant:?}"));
            println_row(&format!("{}{of}: {name} broken in walk {walk}", scope.name));
            effort.spend(steps);
            let lines = path.iter().enumerate().map(|(at, a)| format!("{:>3} {a:?}\n", at + 1));
            return Some((name, lines.collect()));
        }
    }
    println_row(&format!(
        "{:<28} {walks} walks, {steps} steps, deepest {deepest}, {:.1} s, ends: none {} source {} destination {}",
        scope.name,
        started.elapsed().as_secs_f64(),
        ups[0],
        ups[1],
        ups[2],
    ));
    effort.spend(steps);
    None
}

const WALK_STEPS_MAX: usize = 120;

/// xorshift: the same walks in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let below = self.0 % bound as u64;
        usize::try_from(below).expect("below a usize")
    }
}

/// Factor on how much is explored.
fn effort() -> usize {
    let large = std::env::var("BATON_MODEL").is_ok_and(|scope| scope == "large");
    if large { 30 } else { 1 }
}

/// Everything may happen, within what a recovery is promised for.
fn wide(name: &'static str, mode: Mode) -> Scope {
    Scope {
        server_crashes: 0,
        armed: false,
        writes: [3, 3],
        stops: 3,
        starts: 3,
        coordinator: true,
        slow_io: true,
        slow_answers: true,
        net_faults: 2,
        waits: true,
        ..Scope::new(name, mode)
    }
}

/// Everything may happen, as often as it likes.
fn wild(name: &'static str, mode: Mode) -> Scope {
    Scope {
        server_crashes: 3,
        backend_crashes: [1, 1],
        ghosts: true,
        zombies: true,
        rogue: true,
        attempts: 2,
        orders: true,
        waits: false,
        ..wide(name, mode)
    }
}

#[test]
fn walks_with_one_accident_end_with_one_side_running() {
    let mut effort = Effort::of(3_000_000);
    for (name, mode) in [("base", Mode::Base), ("fast", Mode::Fast)] {
        let scopes = [
            Scope { server_crashes: 1, ..wide(name, mode) },
            Scope { server_crashes: 2, members: 3, ..wide(name, mode) },
            Scope { backend_crashes: [1, 0], ..wide(name, mode) },
            Scope { backend_crashes: [0, 1], ..wide(name, mode) },
            Scope { server_crashes: 1, orders: true, ..wide(name, mode) },
            Scope { server_crashes: 1, attempts: 2, ..wide(name, mode) },
            Scope { late_arms: 2, attempts: 3, fresh_ids: true, ..wide(name, mode) },
            Scope { server_crashes: 1, coordinator: false, ..wide(name, mode) },
            Scope { forgets: true, attempts: 3, fresh_ids: true, ..wide(name, mode) },
            Scope { backend_crashes: [0, 1], coordinator: false, ..wide(name, mode) },
            Scope { backend_crashes: [1, 0], coordinator: false, ..wide(name, mode) },
        ];
        for (at, scope) in scopes.iter().enumerate() {
            let found = wander(scope, 7 + at as u64, 2_000 * self::effort(), true, &mut effort);
            assert!(found.is_none(), "{found:?}\n{scope:?}");
        }
    }
}

#[test]
fn walks_with_any_accidents_harm_nothing() {
    let mut effort = Effort::of(10_500_000);
    for (name, mode) in [("base wild", Mode::Base), ("fast wild", Mode::Fast)] {
        let scopes = [
            wild(name, mode),
            Scope { members: 3, ..wild(name, mode) },
            Scope { late_arms: 2, fresh_ids: true, attempts: 3, ..wild(name, mode) },
            Scope { late_arms: 2, fence: true, ..wild(name, mode) },
            Scope { fence: true, ..wild(name, mode) },
            Scope {
                forgets: true,
                disarms: true,
                late_arms: 2,
                fresh_ids: true,
                attempts: 3,
                ..wild(name, mode)
            },
        ];
        for (at, scope) in scopes.iter().enumerate() {
            let found = wander(scope, 70 + at as u64, 10_000 * self::effort(), false, &mut effort);
            assert!(found.is_none(), "{found:?}\n{scope:?}");
        }
    }
}

#[test]
fn searches_find_nothing() {
    let mut effort = Effort::of(700_000);
    let base = |name| Scope::new(name, Mode::Base);
    let fast = |name| Scope::new(name, Mode::Fast);
    let scopes = [
        Scope { server_crashes: 0, ..base("no accident") },
        Scope { ..base("base, a server crashes") },
        Scope { ..fast("fast, a server crashes") },
        Scope { members: 3, writes: [1, 0], ..fast("fast, three servers") },
        Scope { server_crashes: 0, backend_crashes: [1, 0], ..base("the source dies") },
        Scope { server_crashes: 0, backend_crashes: [0, 1], ..base("the destination dies") },
        Scope { server_crashes: 0, coordinator: true, ..base("a coordinator") },
        Scope { rogue: true, server_crashes: 0, ..base("a rogue standby") },
        Scope { fence: true, server_crashes: 0, ..base("a fence") },
        Scope { coordinator: true, disarms: true, ..fast("disarmed at any time") },
    ];
    for scope in scopes {
        let found = explore(&scope, true, 60_000 * self::effort(), &mut effort);
        assert!(found.broken.is_none(), "{found:?}\n{scope:?}");
    }
}

/// Scopes so small that every state of them is looked at.
#[test]
fn small_scopes_are_searched_whole() {
    let mut effort = Effort::of(1_000_000);
    let small = |name, mode| Scope { server_crashes: 0, ..Scope::new(name, mode) };
    for mode in [Mode::Base, Mode::Fast] {
        let one = |name| Scope { members: 1, ..small(name, mode) };
        let scopes = [
            Scope { writes: [1, 0], server_crashes: 1, ..one("one, a server crashes") },
            Scope { writes: [1, 0], backend_crashes: [1, 0], ..one("one, the source dies") },
            Scope { writes: [1, 0], backend_crashes: [0, 1], ..one("one, the destination dies") },
            Scope { coordinator: true, ..one("one, a coordinator") },
            Scope { fence: true, ..one("one, a fence") },
            Scope { rogue: true, ..one("one, a rogue standby") },
            Scope { writes: [1, 0], ..small("two, a write", mode) },
            Scope { writes: [0, 0], server_crashes: 1, ..small("two, a server crashes", mode) },
        ];
        for scope in scopes {
            let found = explore(&scope, true, 1_000_000, &mut effort);
            assert!(found.broken.is_none() && found.is_complete, "{found:?}\n{scope:?}");
        }
    }
}

#[test]
fn every_mutant_is_caught() {
    let mut effort = Effort::of(8_000_000);
    let mut survivors = Vec::new();
    let mut by: BTreeMap<String, Vec<Mutant>> = BTreeMap::new();
    for (mutant, mode, live) in mutant::ALL {
        let scope = if live { wide("mutant", mode) } else { wild("mutant", mode) };
        let scope = Scope { mutant: Some(mutant), ..mutant.tempt(scope) };
        // A long and narrow way is found by searching, the others by walking.
        let found = if mutant == Mutant::UnfreezeNoBootId {
            explore(&scope, false, 1_000_000, &mut effort).broken
        } else {
            wander(&scope, 700, 60_000, live, &mut effort)
        };
        match found {
            Some((broken, _)) => by.entry(broken).or_default().push(mutant),
            None => survivors.push(mutant),
        }
    }
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
    // An invariant that no mutant breaks is not known to be looked at.
    for broken in Broken::ALL {
        assert!(by.contains_key(&format!("{broken:?}")), "no mutant breaks {broken:?}: {by:?}");
    }
}
