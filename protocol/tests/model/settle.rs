//! Liveness: from any state, when nothing breaks any more and messages arrive,
//! the VM ends up running on exactly one side.

use crate::scope::{D, S, Scope};
use crate::world::{Action, World};

/// More steps than any recovery takes.
const STEPS_MAX: usize = 600;

/// Whether an orchestrator that gives the migration up, and one that goes
/// through with it, both end with the VM running on exactly one side.
pub(crate) fn ends_well(scope: &Scope, world: &World) -> bool {
    if world.broken.is_some() || world.is_fenced() || needs_a_fence(scope, world) {
        return true;
    }
    gives_up(scope, world) && goes_through(scope, world)
}

/// A member has stopped for a handoff that the anchor has forgotten. Nobody can say
/// how it was decided, nor whether its source had sealed it.
fn needs_a_fence(scope: &Scope, world: &World) -> bool {
    let stopped = |member: usize| world.servers[member].record.admits().owner.is_none();
    (0..scope.members).any(|member| world.is_forgotten(member) && stopped(member))
}

fn gives_up(scope: &Scope, world: &World) -> bool {
    let mut world = calm(scope, world);
    if !world.vms[S].running {
        world = act(scope, &world, &Action::StartSource);
    }
    world = calm(scope, &world);
    // A destination that was ordered to activate has won before its machine ran;
    // the answer to the cancel says so.
    if world.is_won_by_destination(scope) && !world.vms[D].running {
        world = calm(scope, &act(scope, &world, &Action::StartDestination));
    }
    is_one_up(&world)
}

fn goes_through(scope: &Scope, world: &World) -> bool {
    let mut world = calm(scope, world);
    if world.vms[S].running {
        world = act(scope, &world, &Action::StopSource);
    }
    world = calm(scope, &world);
    if !world.vms[D].running {
        world = act(scope, &world, &Action::StartDestination);
    }
    world = calm(scope, &world);
    // A destination that cannot go on: the orchestrator falls back.
    if !world.is_up(D) && !world.vms[S].running {
        world = act(scope, &world, &Action::StartSource);
    }
    is_one_up(&calm(scope, &world))
}

pub(crate) fn is_one_up(world: &World) -> bool {
    world.broken.is_none() && (world.is_up(S) != world.is_up(D))
}

fn act(scope: &Scope, world: &World, action: &Action) -> World {
    let mut healed = world.clone();
    healed.left.stops = 9;
    healed.left.starts = 9;
    let mut next = healed.after(scope, action).unwrap_or(healed);
    next.left.stops = 0;
    next.left.starts = 0;
    next
}

/// Lets everything that is under way happen, in one fair order.
pub(crate) fn calm(scope: &Scope, world: &World) -> World {
    let mut world = world.clone();
    world.left.server_crashes = 0;
    world.left.backend_crashes = [0, 0];
    world.left.net_faults = 0;
    world.left.late_arms = 0;
    world.left.stops = 0;
    world.left.starts = 0;
    world.forget_the_dead();
    let mut actions = Vec::new();
    for _ in 0..STEPS_MAX {
        actions.clear();
        world.actions(scope, &mut actions);
        let next = actions
            .iter()
            .filter(|action| is_calm(action))
            .find_map(|action| world.after(scope, action));
        let Some(next) = next else { break };
        world = next;
    }
    world
}

fn is_calm(action: &Action) -> bool {
    matches!(
        action,
        Action::Hear { .. }
            | Action::Look { .. }
            | Action::Deliver { again: false, .. }
            | Action::FinishSeal { .. }
            | Action::Carry(_)
            | Action::Finish(_)
            | Action::Ack(_)
            | Action::RestartBackend { .. }
            | Action::Stuck { .. }
            | Action::Disarm { .. }
    )
}
