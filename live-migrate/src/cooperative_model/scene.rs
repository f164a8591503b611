//! Where walks and searches begin: what happened before, so that they need not find the
//! long way there.

use super::action::Action;
use super::host::Cut;
use super::world::{Order, What, World};

/// A VM moves from a host, all its orders being carried out as soon as they are due.
fn moving(from: usize) -> [Action; 6] {
    let to = 1 - from;
    [
        Action::Prepare(from),
        Action::Look,
        Action::Stop(from, true),
        Action::Copy(from),
        Action::Resume(to),
        Action::Look,
    ]
}

fn played(world: &World, actions: &[Action]) -> World {
    let mut world = world.clone();
    for action in actions {
        // What comes of nothing has been done.
        world = world.after(*action).unwrap_or(world);
        for order in world.due() {
            let answer = world.obey(order, Cut::None);
            world.hear(order, &answer);
        }
    }
    world
}

/// What happens while nobody hears of it.
fn unheard(world: World, actions: &[Action]) -> World {
    actions.iter().fold(world, |world, action| world.after(*action).unwrap_or(world))
}

/// Copies of orders that were sent in a try are still on their way.
fn late(mut world: World, number: u8, orders: &[(usize, What)]) -> World {
    world.orders.extend(orders.iter().map(|&(to, what)| Order { number, to, what }));
    world.orders.sort_unstable();
    world
}

/// All of them.
pub(super) fn scenes(world: &World) -> Vec<World> {
    let there = moving(0);
    let ready = &there[..2];
    let called_off = [ready, &[Action::Cancel]].concat();
    // The server has kept one write, and done it when it was asked for again.
    let gave_up = [
        &[
            Action::Write(0),
            Action::Stop(0, false),
            Action::GiveUp(0),
            Action::Resume(0),
            Action::Execute(0),
        ],
        &there[..],
    ]
    .concat();
    // A copy waits at the destination, and the guest has gone on at the source.
    let went_on = [
        Action::Stop(0, true),
        Action::Copy(0),
        Action::Resume(0),
        Action::Write(0),
        Action::Execute(0),
        Action::Resume(1),
    ];
    let end = What::End { process: 1, starts: 1 };
    let of_source = [(1, What::Stand), (0, end), (0, What::Keep), (1, What::Dismiss)];
    let permit = What::Permit { forced: false };
    let of_destination = [(1, What::Stand), (0, end), (1, permit)];
    let off = late(played(world, &called_off), 1, &of_source);
    let moved = played(world, &there);
    let back = [&[Action::Quit(0)][..], &moving(1)].concat();
    vec![
        world.clone(),
        played(world, ready),
        played(world, &gave_up),
        unheard(played(world, ready), &went_on),
        played(&off, &there),
        late(moved.clone(), 1, &of_destination),
        late(played(&moved, &back), 1, &of_destination),
        off,
        moved,
    ]
}
