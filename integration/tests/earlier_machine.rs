//! A destination's machine is good for one try. One that is left over from an earlier try, with the memory of then, is
//! kept away from the next one's backend: by that backend, and before it is started by the agent.

use baton_integration::baton::wait_until;
use baton_integration::faults::cluster::VM;
use baton_integration::faults::world::{Side, World};
use baton_integration::handoff::Fleet;
use baton_integration::workspace::TestDir;
use serde_json::{Value, json};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);

/// Prepares a move of the VM: its id, and what the coordinator says.
fn prepare(world: &World, from: Side) -> (String, Value) {
    let id = Fleet::attempt().id;
    let path = format!("/v1/vms/{VM}/handoffs/{id}?wait=READY&timeout=6s");
    let body = json!({ "from": from.host(), "to": from.other().host() });
    let row = world.coordinator.call("PUT", &path, Some(&body)).unwrap();
    (id, row)
}

/// [`prepare`] that must fail, for a machine with this process id.
fn is_kept_away(world: &World, from: Side, old: u32) {
    let (id, _) = prepare(world, from);
    let path = format!("/v1/vms/{VM}/handoffs/{id}?wait=OVER&timeout=6s");
    let row = world.coordinator.call("GET", &path, None).unwrap();
    assert_eq!((&row["state"], &row["outcome"]), (&json!("FAILED"), &json!("source")), "{row:#}");
    assert_eq!(row["because"]["type"], "baton:earlier-machine");
    let said = row["because"]["detail"].as_str().unwrap();
    for part in [
        &*format!("process {old} (baton-vmm-stub) was at the disks of {VM} before"),
        &format!("end process {old}"),
        &format!("the source {} owns the volumes", from.host()),
    ] {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
}

fn end(world: &World, id: &str, verb: &str) -> Value {
    let path = format!("/v1/vms/{VM}/handoffs/{id}:{verb}?timeout=6s");
    world.coordinator.call("POST", &path, None).unwrap()
}

/// The guest goes over, as its VMM would take it.
fn switch(world: &mut World, dir: &TestDir, from: Side, id: &str) {
    let to = from.other();
    world.start_vmm(to).unwrap();
    world.vmm_mut(to).unwrap().wait_ready().unwrap();
    let saved = dir.join(&format!("saved-{id}"));
    world.vmm(from).unwrap().order("log").unwrap();
    world.vmm(from).unwrap().order("stop").unwrap();
    world.vmm(from).unwrap().save(&saved).unwrap();
    world.vmm(to).unwrap().load(&saved).unwrap();
    world.vmm(to).unwrap().order("run").unwrap();
    world.vmm(to).unwrap().wait_progress(20, SOON).unwrap();
    assert_eq!(end(world, id, "finish")["outcome"], "destination");
}

#[test]
fn row_08_a_machine_that_is_left_from_an_earlier_try_keeps_the_next_from_beginning() {
    let dir = TestDir::new("earlier").unwrap();
    let mut world = World::undisturbed(dir.path(), 2).unwrap();
    world.vmm_mut(Side::Source).unwrap().wait_ready().unwrap();
    world.vmm(Side::Source).unwrap().order("run").unwrap();
    world.vmm(Side::Source).unwrap().wait_progress(20, SOON).unwrap();

    // Its machine came, has its memory, and freezes; then the move is called off.
    let (id, said) = prepare(&world, Side::Source);
    assert_eq!(said["state"], "READY", "{said:#}");
    world.start_vmm(Side::Destination).unwrap();
    world.vmm_mut(Side::Destination).unwrap().wait_ready().unwrap();
    let old = world.vmm(Side::Destination).unwrap().daemon.pid();
    world.vmm(Side::Destination).unwrap().daemon.freeze().unwrap();
    assert_eq!(end(&world, &id, "cancel")["outcome"], "source");

    // Nothing waits at its socket for it, now or after the agent was killed, and the guest goes on.
    for _ in 0..2 {
        is_kept_away(&world, Side::Source, old);
        world.vmm(Side::Source).unwrap().wait_progress(20, SOON).unwrap();
        world.restart_agent(Side::Destination).unwrap();
    }

    // It is ended while the coordinator looks, and the guest moves there; and back, when the machine that it left is
    // ended.
    let id = Fleet::attempt().id;
    let client = world.coordinator.client();
    let handoff = format!("/v1/vms/{VM}/handoffs/{id}");
    let path = format!("{handoff}?wait=READY&timeout=6s");
    let body = json!({ "from": Side::Source.host(), "to": Side::Destination.host() });
    let asked = std::thread::spawn(move || client.call("PUT", &path, Some(&body)).unwrap());
    wait_until("the coordinator has seen the machine", SOON, || {
        let row = client.call("GET", &handoff, None);
        row.is_ok_and(|row| row["trouble"]["type"] == "baton:earlier-machine")
    })
    .unwrap();
    world.end_vmm(Side::Destination).unwrap();
    let said = asked.join().unwrap();
    assert_eq!(said["state"], "READY", "{said:#}");
    switch(&mut world, &dir, Side::Source, &id);
    let left = world.vmm(Side::Source).unwrap().daemon.pid();
    is_kept_away(&world, Side::Destination, left);
    world.end_vmm(Side::Source).unwrap();
    let (id, said) = prepare(&world, Side::Destination);
    assert_eq!(said["state"], "READY", "{said:#}");
    switch(&mut world, &dir, Side::Destination, &id);
}
