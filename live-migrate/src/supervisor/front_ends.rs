//! The machines that are, or were last, at the disks of each VM on this host.
//!
//! A destination's machine is good for one try (docs/decisions/0006). One of an
//! earlier try that still runs connects to the next try's backend at the same
//! socket, and where it brings no in-flight region nobody can tell it from the
//! machine that is waited for. So a backend is not started to wait for a machine
//! while one is left that was at the VM's disks before.
//!
//! What backends say is remembered on disk, so that an agent that restarts knows
//! it, too. A machine is forgotten when the backend that it was connected to says
//! that it went, or when its process has ended; not when the backend went.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::process::ProcessId;

/// A machine at a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FrontEnd {
    pub(super) process: ProcessId,
    /// The program, as the kernel shows it.
    pub(super) name: String,
    /// Process of the backend that said so.
    backend: i64,
}

/// What is known of one VM changes by what its backend says: those that it has now
/// are its own; one that it had and has no more is gone; of those that another
/// process had it knows nothing. True: something changed.
fn hear(
    known: &mut Vec<FrontEnd>,
    status: &Value,
    process: impl Fn(i32) -> Option<(ProcessId, String)>,
) -> bool {
    let Some(backend) = status["pid"].as_i64() else { return false };
    let disks = status["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let pids = disks.iter().filter_map(|disk| i32::try_from(disk["front_end"].as_i64()?).ok());
    let mut connected: Vec<i32> = pids.filter(|pid| *pid > 0).collect();
    connected.sort_unstable();
    connected.dedup();
    let before = known.clone();
    known.retain(|one| one.backend != backend || connected.contains(&one.process.pid));
    for pid in connected {
        if known.iter().any(|one| (one.backend, one.process.pid) == (backend, pid)) {
            continue;
        }
        // One that has ended already is no matter.
        let Some((process, name)) = process(pid) else { continue };
        known.retain(|one| one.process.pid != pid);
        known.push(FrontEnd { process, name, backend });
    }
    *known != before
}

fn look_up(pid: i32) -> Option<(ProcessId, String)> {
    let process = ProcessId::of(pid)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some((process, name.trim().to_owned()))
}

/// Of all VMs of this host.
#[derive(Debug)]
pub(super) struct FrontEnds {
    dir: PathBuf,
    known: Mutex<HashMap<String, Known>>,
}

/// Of one VM.
#[derive(Debug)]
struct Known {
    all: Vec<FrontEnd>,
    /// The file says the same.
    written: bool,
}

impl FrontEnds {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, known: Mutex::default() }
    }

    /// Takes what a backend says of itself.
    pub(super) fn hear(&self, vm: &str, status: &Value) {
        self.with(vm, |path, known| {
            let changed = hear(&mut known.all, status, look_up);
            if !changed && known.written {
                return;
            }
            let written = write(path, &known.all);
            // Known while this agent runs; the next one might start a backend too soon. It is tried again.
            if let (Err(error), true) = (&written, known.written) {
                tracing::error!(vm, %error, "cannot write which machines are at a VM's disks");
            }
            known.written = written.is_ok();
        });
    }

    /// One that still runs.
    pub(super) fn left(&self, vm: &str) -> Option<FrontEnd> {
        self.with(vm, |_, known| {
            known.all.retain(|one| one.process.runs());
            known.all.first().cloned()
        })
    }

    fn with<T>(&self, vm: &str, act: impl FnOnce(&Path, &mut Known) -> T) -> T {
        let path = self.dir.join(format!("{vm}.front-ends.json"));
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            all.entry(vm.to_owned()).or_insert_with(|| Known { all: read(&path), written: true });
        act(&path, known)
    }
}

fn read(path: &Path) -> Vec<FrontEnd> {
    let Ok(text) = fs::read(path) else { return Vec::new() };
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), %error, "a record of machines is damaged and ignored");
        Vec::new()
    })
}

fn write(path: &Path, known: &[FrontEnd]) -> io::Result<()> {
    if known.is_empty() {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(known)?)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(backend: i64, front_ends: &[Option<i32>]) -> Value {
        let disks: Vec<Value> = front_ends.iter().map(|pid| json!({"front_end": pid})).collect();
        json!({"pid": backend, "disks": disks})
    }

    fn processes(pid: i32) -> Option<(ProcessId, String)> {
        let process = json!({"pid": pid, "start_ticks": 1, "boot_id": "b"});
        let process = serde_json::from_value(process).expect("a process");
        (pid < 900).then(|| (process, format!("vmm-{pid}")))
    }

    fn pids(known: &[FrontEnd]) -> Vec<i32> {
        known.iter().map(|one| one.process.pid).collect()
    }

    #[test]
    fn a_machine_is_known_until_its_own_backend_says_that_it_went() {
        let mut known = Vec::new();
        let mut said = |status: &Value| {
            let changed = hear(&mut known, status, processes);
            (changed, pids(&known))
        };
        assert_eq!(said(&status(1, &[Some(7), Some(7)])), (true, vec![7]));
        assert_eq!(said(&status(1, &[Some(7), None])), (false, vec![7]));
        // Another process of the backend has not seen it, which says nothing.
        assert_eq!(said(&status(2, &[None, None])), (false, vec![7]));
        assert_eq!(said(&status(2, &[Some(8), None])), (true, vec![7, 8]));
        // It comes to that one, and goes.
        assert_eq!(said(&status(2, &[Some(8), Some(7)])), (true, vec![8, 7]));
        assert_eq!(said(&status(2, &[None, Some(7)])), (true, vec![7]));
        assert_eq!(said(&status(2, &[None, None])), (true, vec![]));
    }

    #[test]
    fn what_is_no_process_is_not_remembered() {
        let mut known = Vec::new();
        for odd in [json!({}), json!(null), json!({"pid": 1}), json!({"pid": 1, "disks": [{}]})] {
            assert!(!hear(&mut known, &odd, processes), "{odd}");
        }
        let strange = json!({"pid": 1, "disks": [{"front_end": "7"}, {"front_end": -1},
            {"front_end": 0}, {"front_end": 1_u64 << 40}, {"front_end": 901}]});
        assert!(!hear(&mut known, &strange, processes));
        assert_eq!(pids(&known), [0; 0]);
    }

    #[test]
    fn it_is_read_back_and_damage_is_nothing() {
        let dir = tempfile::tempdir().expect("temp dir");
        let me = i32::try_from(std::process::id()).expect("pid");
        let front_ends = || FrontEnds::new(dir.path().to_owned());
        front_ends().hear("vm", &status(1, &[Some(me)]));
        let read = front_ends().with("vm", |_, known| known.all.clone());
        assert_eq!(pids(&read), [me]);
        assert!(!read[0].name.is_empty());
        front_ends().hear("vm", &status(1, &[None]));
        let path = dir.path().join("vm.front-ends.json");
        assert!(!path.exists(), "none is no file");
        fs::write(&path, "{").expect("write");
        assert!(front_ends().with("vm", |_, known| known.all.is_empty()));
    }
}
