//! Storage servers die.

use crate::scene::{OWNERS, Scene};
use baton_integration::handoff::Begin;

#[test]
fn f9_eight_volumes_on_four_servers_move_as_one_while_servers_die() {
    let (mut scene, _) = Scene::new("f9", 4, 8, false);
    scene.stand_by();
    for dies in 0..4 {
        let moving = scene.prepare();
        // Right behind the seals; the first is the anchor's.
        scene.stop_guest(&moving);
        scene.fleet.wait_phase(&["sealed"]).unwrap();
        scene.fleet.servers[dies].kill_and_restart().unwrap();
        scene.go_on(moving);
        let owners: Vec<String> = (0..8).map(|m| scene.fleet.owner(m).unwrap()).collect();
        assert_eq!(owners, [OWNERS[scene.at]; 8]);
        // Back on standby, for the next round.
        let left = 1 - scene.at;
        scene.hosts[left].daemon.kill().unwrap();
        scene.hosts[left].set_begin(Begin::Standby).unwrap();
        scene.hosts[left].restart().unwrap();
    }
    assert!(scene.judge() > 500);
}
