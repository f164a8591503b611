//! How the model is explored. Bounded by states and steps, not by time, so it is the same on
//! every machine; `BATON_MODEL=large` explores far more.

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::action::Action;
use super::calm::ends;
use super::mutant::Mutant;
use super::scene::scenes;
use super::world::{Broken, Budget, World};

const WALK_STEPS_MAX: usize = 70;
/// Liveness is asked for at the end of a walk, and behind so many steps.
const ENDS_EVERY: usize = 15;
/// A rare action is taken once in so many times.
const RARE: usize = 5;

/// Factor on how much is explored.
fn effort() -> usize {
    let large = std::env::var("BATON_MODEL").is_ok_and(|scope| scope == "large");
    if large { 100 } else { 1 }
}

/// Everything may happen.
fn all() -> Budget {
    Budget {
        tries: 3,
        writes: 6,
        crashes: 2,
        doubles: 2,
        stops: 4,
        copies: 3,
        claims: 2,
        deaths: 0,
        rash: false,
    }
}

/// A host may be gone for good.
fn deadly() -> Budget {
    Budget { deaths: 1, ..all() }
}

/// What was broken, and how.
type Found = (Broken, Vec<Action>);

fn walk(start: &World, seed: u64) -> Option<Found> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut world = start.clone();
    let (mut path, mut actions) = (Vec::new(), Vec::new());
    while path.len() < WALK_STEPS_MAX {
        actions.clear();
        world.actions(&mut actions);
        let mut next = None;
        while !actions.is_empty() && next.is_none() {
            let action = actions.swap_remove(random.usize(..actions.len()));
            if action.is_rare() && random.usize(..RARE) != 0 && !actions.is_empty() {
                continue;
            }
            next = world.after(action).map(|after| (action, after));
        }
        let Some((action, after)) = next else { break };
        path.push(action);
        world = after;
        if let Some(broken) = world.broken {
            return Some((broken, path));
        }
        if path.len() % ENDS_EVERY == 0
            && let Some(broken) = ends(&world)
        {
            return Some((broken, path));
        }
    }
    ends(&world).map(|broken| (broken, path))
}

/// Seeded walks from every scene; the seed, and what it found.
fn walks(budget: Budget, mutant: Option<Mutant>, most: usize) -> Option<(u64, Found)> {
    let scenes = scenes(&World::new(budget, mutant));
    for scene in &scenes {
        if let Some(broken) = scene.broken {
            return Some((0, (broken, Vec::new())));
        }
    }
    (0..most).find_map(|number| {
        let seed = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        walk(&scenes[number % scenes.len()], seed).map(|found| (seed, found))
    })
}

fn told((seed, (broken, path)): &(u64, Found)) -> String {
    let lines: String =
        path.iter().enumerate().map(|(at, action)| format!("{:>3} {action:?}\n", at + 1)).collect();
    format!("{broken:?}, seed {seed:#x}:\n{lines}")
}

struct Search {
    starts: Vec<World>,
}

impl Model for Search {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        self.starts.clone()
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.actions(actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        world.after(action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always("nothing is broken", |_, world: &World| world.broken.is_none())]
    }
}

/// Every order of events, as far as it comes.
fn search(budget: Budget, most: usize) -> Option<String> {
    let model = Search { starts: scenes(&World::new(budget, None)) };
    let checker = model
        .checker()
        .finish_when(HasDiscoveries::AnyFailures)
        .target_state_count(most)
        .spawn_bfs()
        .join();
    eprintln!("{} states, depth {}", checker.unique_state_count(), checker.max_depth());
    let (_, path) = checker.discoveries().into_iter().next()?;
    let broken = path.last_state().broken;
    Some(format!("{broken:?}: {:#?}", path.into_actions()))
}

#[test]
fn no_search_finds_anything() {
    let small = Budget { crashes: 1, doubles: 1, claims: 1, tries: 2, ..all() };
    assert_eq!(search(small, 1_000_000 * effort()), None);
}

#[test]
fn no_walk_finds_anything() {
    for budget in [all(), deadly()] {
        let found = walks(budget, None, 20_000 * effort());
        assert!(found.is_none(), "{}", found.as_ref().map(told).unwrap_or_default());
    }
}

#[test]
fn every_mutant_is_caught() {
    for mutant in Mutant::ALL {
        let budget = if mutant == Mutant::ForcesMachine { deadly() } else { all() };
        let found = walks(budget, Some(mutant), 40_000);
        eprintln!("{mutant:?}: {}", found.as_ref().map_or("not caught".to_owned(), told));
        assert!(found.is_some(), "{mutant:?} is not caught");
    }
}

/// Why a person who forces must be sure that the host is gone.
#[test]
fn force_while_the_source_lives_is_no_promise() {
    let rash = Budget { rash: true, ..all() };
    assert!(walks(rash, None, 20_000).is_some());
}
