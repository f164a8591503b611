//! A VM at one host, as its agent tells it.
//!
//! An agent's word is a report. Nothing here decides who owns a volume.

use serde_json::Value;

use super::plan::Standing;

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskView {
    /// Its name in the VM.
    pub name: String,
    /// URI of its volume.
    pub volume: String,
}

/// A VM at one host, as its agent tells it.
#[derive(Clone, Debug)]
pub struct VmView(pub Value);

impl VmView {
    fn definition(&self) -> &Value {
        // What was remembered is a definition alone.
        if self.0["definition"].is_object() { &self.0["definition"] } else { &self.0 }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.definition()["name"].as_str().unwrap_or_default()
    }

    /// Its disks that it may write: only those move.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskView> {
        let disks = self.definition()["disk"].as_array().map_or(&[][..], Vec::as_slice);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let writable = disks.iter().filter(|disk| disk["read_only"] != Value::Bool(true));
        writable
            .map(|disk| DiskView { name: text(&disk["name"]), volume: text(&disk["volume"]) })
            .collect()
    }

    /// What defines it, for another host: nothing that is a path of this one.
    #[must_use]
    pub fn portable(&self) -> Value {
        const OF_THE_VM: [&str; 4] = ["name", "disk", "vmm", "poll_us"];
        const OF_A_DISK: [&str; 5] = ["name", "volume", "read_only", "num_queues", "queue_size"];
        let mut vm = self.definition().clone();
        if let Some(vm) = vm.as_object_mut() {
            vm.retain(|key, _| OF_THE_VM.contains(&key.as_str()));
            for disk in vm.get_mut("disk").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(disk) = disk.as_object_mut() {
                    disk.retain(|key, _| OF_A_DISK.contains(&key.as_str()));
                }
            }
        }
        vm
    }

    /// What the backend says of itself; null when it does not answer.
    #[must_use]
    pub fn status(&self) -> &Value {
        &self.0["status"]
    }

    /// The backend's part of the handoff.
    #[must_use]
    pub fn handoff(&self) -> &Value {
        &self.status()["handoff"]
    }

    /// What the backend does in the handoff.
    #[must_use]
    pub fn standing_word(&self) -> Option<&str> {
        self.handoff()["standing"].as_str()
    }

    /// It waits for a machine, in another handoff than this one.
    #[must_use]
    pub fn waits_in_another(&self, id: &str, attempt: u32) -> bool {
        matches!(self.standing_word(), Some("ready" | "activating")) && !self.is_in(id, attempt)
    }

    fn is_in(&self, id: &str, attempt: u32) -> bool {
        let handoff = self.handoff();
        handoff["id"].as_str() == Some(id)
            && handoff["attempt"].as_u64() == Some(u64::from(attempt))
    }

    /// The number of the last try that its agent has heard of, where no storage fences; 0: of none.
    #[must_use]
    pub fn turn(&self) -> u64 {
        self.0["ledger"]["turn"].as_u64().unwrap_or(0)
    }

    /// The backend's process, and how often rings were started in it, where no storage
    /// fences.
    #[must_use]
    pub fn starts(&self) -> Option<(i32, u32)> {
        let pid = i32::try_from(self.status()["pid"].as_i64()?).ok()?;
        Some((pid, u32::try_from(self.handoff()["starts"].as_u64()?).ok()?))
    }

    /// The backend's process is there, or may be.
    #[must_use]
    pub fn backend_runs(&self) -> bool {
        !matches!(self.0["backend"]["run"].as_str(), Some("stopped" | "failed"))
    }

    /// The backend's process.
    #[must_use]
    pub fn backend_pid(&self) -> Option<i64> {
        self.0["backend"]["pid"].as_i64()
    }

    /// What the machine does, in the agent's words: `running`, `paused`, ...
    #[must_use]
    pub fn run(&self) -> &str {
        self.0["vmm"]["run"].as_str().unwrap_or("unknown")
    }

    /// Its monitor can wait between the stop and the switch. cloud-hypervisor
    /// switches by itself, and has no cancel.
    #[must_use]
    pub fn can_pause(&self) -> bool {
        self.definition()["vmm"] != "cloud-hypervisor"
    }

    /// Somebody else drives the machine's monitor; the agent knows nothing of it.
    #[must_use]
    pub fn monitor_is_foreign(&self) -> bool {
        self.definition()["vmm"].as_str().is_none_or(|kind| kind == "none")
    }

    /// The machine's last migration.
    #[must_use]
    pub fn migration(&self) -> &Value {
        &self.0["vmm"]["migration"]
    }

    /// As the plan takes it, for one handoff.
    #[must_use]
    pub fn standing(&self, id: &str, attempt: u32) -> Standing {
        if !self.backend_runs() {
            // A machine that runs, or of which nobody says how it is, may have
            // activated before its backend died.
            let runs = matches!(self.run(), "running" | "unknown");
            return if runs { Standing::Unknown } else { Standing::Dead };
        }
        let same = self.is_in(id, attempt);
        match self.standing_word() {
            Some("ready") if same => Standing::Ready,
            Some("activating") if same => Standing::Active,
            Some("serving") => Standing::Active,
            Some("parked") => Standing::Parked,
            _ => Standing::Starting,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn standing(vm: Value) -> Standing {
        VmView(vm).standing("ID", 1)
    }

    #[test]
    fn what_an_agent_says_of_the_destination() {
        let backend = |standing: &str, id: &str| {
            json!({"backend": {"run": "running"}, "vmm": {"run": "incoming"},
                "status": {"handoff": {"standing": standing, "id": id, "attempt": 1}}})
        };
        assert_eq!(standing(backend("ready", "ID")), Standing::Ready);
        assert_eq!(standing(backend("ready", "OTHER")), Standing::Starting);
        assert_eq!(standing(backend("standby", "ID")), Standing::Starting);
        assert_eq!(standing(backend("activating", "ID")), Standing::Active);
        assert_eq!(standing(backend("serving", "OTHER")), Standing::Active);
        assert_eq!(standing(backend("parked", "ID")), Standing::Parked);
        let stopped = |vmm: Value| standing(json!({"backend": {"run": "stopped"}, "vmm": vmm}));
        assert_eq!(stopped(json!({"run": "gone"})), Standing::Dead);
        assert_eq!(stopped(json!({"run": "incoming"})), Standing::Dead);
        // Not proven: its machine runs, or nobody says.
        assert_eq!(stopped(json!({"run": "running"})), Standing::Unknown);
        assert_eq!(stopped(Value::Null), Standing::Unknown);
    }

    /// It is to make room for this one; one that starts, or has the volumes, is not.
    #[test]
    fn who_waits_in_another_handoff_is_told_from_who_waits_in_this_one() {
        let waits = |standing: &str, id: &str| {
            let handoff = json!({"standing": standing, "id": id, "attempt": 1});
            VmView(json!({"status": {"handoff": handoff}})).waits_in_another("ID", 1)
        };
        assert!(waits("ready", "OTHER") && waits("activating", "OTHER"));
        assert!(!waits("ready", "ID") && !waits("serving", "OTHER") && !waits("sealed", "OTHER"));
        assert!(!VmView(Value::Null).waits_in_another("ID", 1));
    }

    #[test]
    fn another_host_gets_no_paths_of_this_one() {
        let vm =
            VmView(json!({"backend": {}, "definition": {"name": "web", "qmp": "/x", "vmm": "qemu",
            "disk": [{"name": "root", "volume": "baton://s:1/v", "socket": "/y", "num_queues": 2},
                     {"name": "cd", "volume": "file:///z", "read_only": true}]}}));
        assert_eq!(
            vm.portable(),
            json!({"name": "web", "vmm": "qemu",
            "disk": [{"name": "root", "volume": "baton://s:1/v", "num_queues": 2},
                     {"name": "cd", "volume": "file:///z", "read_only": true}]})
        );
        assert_eq!(vm.disks().len(), 1);
    }

    #[test]
    fn another_host_gets_everything_that_is_no_path() {
        use crate::agent::definition::{Disk, VmDefinition, VmmKind};
        // Every field, so that a new one does not get lost on the way unseen.
        let whole = VmDefinition {
            name: "web".to_owned(),
            disks: vec![Disk {
                name: "root".to_owned(),
                volume: "baton://s:1/v".to_owned(),
                socket: Some("/y".into()),
                read_only: true,
                num_queues: Some(2),
                queue_size: Some(64),
            }],
            vmm: VmmKind::Qemu,
            qmp: Some("/x".into()),
            api_socket: Some("/z".into()),
            incoming_command: Some(vec!["/q".to_owned()]),
            poll_us: Some(30),
        };
        let mut portable = whole.clone();
        portable.disks[0].socket = None;
        (portable.qmp, portable.api_socket, portable.incoming_command) = (None, None, None);
        let sent = VmView(serde_json::to_value(&whole).expect("JSON")).portable();
        assert_eq!(serde_json::from_value::<VmDefinition>(sent).expect("a definition"), portable);
    }
}
