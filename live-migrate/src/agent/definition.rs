//! A virtual machine as the agent knows it: disks and monitor.

use std::collections::HashSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use baton_protocol::POLL_US_MAX;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::identity::is_name;

/// In the run directory: what a backend is started with.
pub(super) const LAUNCH_DIR: &str = "launch";
/// In the run directory: sockets of monitors that are given no other place.
pub(super) const VMM_DIR: &str = "vmm";
/// What is the agent's own in the run directory, where each VM has a directory of its name.
const OWN_NAMES: [&str; 3] = [LAUNCH_DIR, VMM_DIR, "agent.sock"];
const DISKS_MAX: usize = 256;
const ARGUMENTS_MAX: usize = 1024;

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// A letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// Its disks.
    #[serde(rename = "disk", alias = "disks")]
    pub disks: Vec<Disk>,
    /// Its monitor.
    #[serde(default)]
    pub vmm: VmmKind,
    /// QEMU's QMP socket. Default: `vmm/VM.qmp` in the run directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub qmp: Option<PathBuf>,
    /// cloud-hypervisor's API socket. Default: `vmm/VM.api` in the run directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub api_socket: Option<PathBuf>,
    /// Program and arguments that start the monitor of an incoming migration.
    /// `{vm}`, `{qmp}`, `{api}` and `{socket:DISK}` are replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming_command: Option<Vec<String>>,
    /// How long its backend looks for more work before it sleeps, us, 0 to 100; the backend's default (0: not at all) if
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 100)]
    pub poll_us: Option<u64>,
}

/// Kind of monitor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmmKind {
    /// QEMU, over QMP.
    Qemu,
    /// cloud-hypervisor, over its API.
    CloudHypervisor,
    /// Somebody else's business (libvirt, Nova, ...).
    #[default]
    None,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name within the VM.
    pub name: String,
    /// URI of its volume.
    pub volume: String,
    /// Where the monitor connects. Default: `NAME.sock` in the VM's run directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// Refuse writes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// Queues offered; the backend's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Size of a ring; the backend's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
}

/// What is wrong with a definition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DefinitionError {
    /// A name.
    #[error(
        "`{0}` cannot be a name; use a letter or digit, then up to 63 of letters, digits, `.`, `_` and `-`"
    )]
    Name(String),
    /// No disk, or too many.
    #[error("a VM has 1 to {DISKS_MAX} disks, not {0}")]
    Disks(usize),
    /// Two of one.
    #[error("two disks share the {what} `{value}`; each needs its own")]
    Twice {
        /// What they share.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// In the run directory it is the agent's own.
    #[error("a VM cannot be called `{0}`: the agent itself has that name in its run directory")]
    OwnName(String),
    /// A socket elsewhere than meant.
    #[error("the socket path {} is not absolute", .0.display())]
    Relative(PathBuf),
    /// Polling for longer than is allowed.
    #[error("poll_us is {0}; a backend looks for work for 0 to {POLL_US_MAX} microseconds")]
    Poll(u64),
    /// A command that is none.
    #[error("incoming_command must have a program, and at most {ARGUMENTS_MAX} arguments")]
    Command,
    /// A placeholder that nothing replaces.
    #[error(
        "incoming_command has the placeholder `{{{0}}}`; there are {{vm}}, {{qmp}}, {{api}} and {{socket:DISK}} for each disk"
    )]
    Placeholder(String),
}

/// Who may connect to a host's disks; the backend's defaults if absent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Doors<'a> {
    pub(super) mode: Option<&'a str>,
    pub(super) group: Option<&'a str>,
}

/// Paths of a VM, for its commands.
#[derive(Clone, Debug)]
pub(super) struct Paths<'a> {
    pub(super) vm: &'a VmDefinition,
    /// The agent's, for all VMs.
    pub(super) run_dir: &'a Path,
}

impl VmDefinition {
    /// Checks names, numbers and paths.
    ///
    /// # Errors
    /// [`DefinitionError`], the first mistake.
    pub fn check(&self) -> Result<(), DefinitionError> {
        if !is_name(&self.name) {
            return Err(DefinitionError::Name(self.name.clone()));
        }
        if OWN_NAMES.contains(&self.name.as_str()) {
            return Err(DefinitionError::OwnName(self.name.clone()));
        }
        if !(1..=DISKS_MAX).contains(&self.disks.len()) {
            return Err(DefinitionError::Disks(self.disks.len()));
        }
        if let Some(us) = self.poll_us.filter(|us| *us > POLL_US_MAX) {
            return Err(DefinitionError::Poll(us));
        }
        let (mut names, mut volumes, mut sockets) =
            (HashSet::new(), HashSet::new(), HashSet::new());
        let sockets_of_disks = self.disks.iter().filter_map(|disk| disk.socket.as_ref());
        for path in sockets_of_disks.chain(&self.qmp).chain(&self.api_socket) {
            if !path.is_absolute() {
                return Err(DefinitionError::Relative(path.clone()));
            }
        }
        let twice =
            |what, value: &dyn ToString| DefinitionError::Twice { what, value: value.to_string() };
        for disk in &self.disks {
            if !is_name(&disk.name) {
                return Err(DefinitionError::Name(disk.name.clone()));
            }
            if !names.insert(&disk.name) {
                return Err(twice("name", &disk.name));
            }
            if !volumes.insert(&disk.volume) {
                return Err(twice("volume", &disk.volume));
            }
            if let Some(socket) = &disk.socket
                && !sockets.insert(socket)
            {
                return Err(twice("socket", &socket.display()));
            }
        }
        if let Some(command) = &self.incoming_command {
            // Any directory: it is the placeholders that are checked.
            let paths = Paths { vm: self, run_dir: Path::new("/") };
            paths.fill(command)?;
        }
        Ok(())
    }

    /// The backend's configuration file.
    pub(super) fn backend_toml(&self, host: &str, run_dir: &Path, doors: Doors<'_>) -> String {
        let paths = Paths { vm: self, run_dir };
        let text = |value: &str| toml::Value::from(value).to_string();
        let mut out = String::from("# Written by baton-agent; changes are lost.\n");
        let owner = format!("{host}/{}", self.name);
        // Writing to a string does not fail.
        let _ = writeln!(out, "owner = {}", text(&owner));
        if let Some(us) = self.poll_us {
            let _ = writeln!(out, "poll_us = {us}");
        }
        for disk in &self.disks {
            let _ = writeln!(out, "\n[[disk]]\nname = {}", text(&disk.name));
            let _ = writeln!(out, "volume = {}", text(&disk.volume));
            let socket = paths.socket(disk).display().to_string();
            let _ = writeln!(out, "socket_path = {}", text(&socket));
            for (key, value) in [("mode", doors.mode), ("group", doors.group)] {
                if let Some(value) = value {
                    let _ = writeln!(out, "socket_{key} = {}", text(value));
                }
            }
            if disk.read_only {
                let _ = writeln!(out, "read_only = true");
            }
            if let Some(queues) = disk.num_queues {
                let _ = writeln!(out, "num_queues = {queues}");
            }
            if let Some(size) = disk.queue_size {
                let _ = writeln!(out, "queue_size = {size}");
            }
        }
        out
    }
}

impl Paths<'_> {
    pub(super) fn socket(&self, disk: &Disk) -> PathBuf {
        let own = || self.run_dir.join(&self.vm.name).join(format!("{}.sock", disk.name));
        disk.socket.clone().unwrap_or_else(own)
    }

    pub(super) fn qmp(&self) -> PathBuf {
        self.vm.qmp.clone().unwrap_or_else(|| self.monitor("qmp"))
    }

    pub(super) fn api(&self) -> PathBuf {
        self.vm.api_socket.clone().unwrap_or_else(|| self.monitor("api"))
    }

    /// Not beside the disks' sockets: systemd removes that directory when the backend dies.
    fn monitor(&self, suffix: &str) -> PathBuf {
        self.run_dir.join(VMM_DIR).join(format!("{}.{suffix}", self.vm.name))
    }

    /// Replaces placeholders. What is no placeholder in form, such as JSON, stays.
    pub(super) fn fill(&self, command: &[String]) -> Result<Vec<String>, DefinitionError> {
        if command.first().is_none_or(String::is_empty) || command.len() > ARGUMENTS_MAX {
            return Err(DefinitionError::Command);
        }
        command.iter().map(|argument| self.fill_one(argument)).collect()
    }

    fn fill_one(&self, argument: &str) -> Result<String, DefinitionError> {
        let mut out = String::with_capacity(argument.len());
        let mut rest = argument;
        while let Some((before, after)) = rest.split_once('{') {
            out.push_str(before);
            let inside = after.split_once('}').filter(|(key, _)| is_key(key));
            let Some((key, behind)) = inside else {
                out.push('{');
                rest = after;
                continue;
            };
            out.push_str(&self.value(key)?);
            rest = behind;
        }
        out.push_str(rest);
        Ok(out)
    }

    fn value(&self, key: &str) -> Result<String, DefinitionError> {
        let unknown = || DefinitionError::Placeholder(key.to_owned());
        match (key, key.strip_prefix("socket:")) {
            ("vm", _) => Ok(self.vm.name.clone()),
            ("qmp", _) => Ok(self.qmp().display().to_string()),
            ("api", _) => Ok(self.api().display().to_string()),
            (_, Some(name)) => {
                let disk = self.vm.disks.iter().find(|disk| disk.name == name);
                disk.map(|disk| self.socket(disk).display().to_string()).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }
}

fn is_key(text: &str) -> bool {
    let (word, name) = text.split_once(':').map_or((text, None), |(word, name)| (word, Some(name)));
    !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase()) && name.is_none_or(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vm(text: &str) -> VmDefinition {
        toml::from_str(text).expect("a definition")
    }

    const ONE: &str = "name = \"web\"\nvmm = \"qemu\"\npoll_us = 30\n[[disk]]\nname = \"root\"\nvolume = \"baton://s:1/v\"\n[[disk]]\nname = \"data\"\nvolume = \"baton://s:1/w\"\nsocket = \"/x/d.sock\"\nread_only = true\nnum_queues = 2\n";

    #[test]
    fn each_mistake_is_named() {
        vm(ONE).check().expect("good");
        for (from, to, names) in [
            ("\"web\"", "\"../web\"", "../web"),
            ("\"root\"", "\"a b\"", "a b"),
            ("\"root\"", "\"data\"", "share the name"),
            ("/v\"", "/w\"", "share the volume"),
            ("\"/x/d.sock\"", "\"d.sock\"", "not absolute"),
            ("name = \"web\"", "name = \"web\"\nincoming_command = []", "a program"),
            (
                "name = \"web\"",
                "name = \"web\"\nincoming_command = [\"q\", \"{sockt}\"]",
                "{sockt}",
            ),
            (
                "name = \"web\"",
                "name = \"web\"\nincoming_command = [\"q\", \"{socket:x}\"]",
                "{socket:x}",
            ),
            ("poll_us = 30", "poll_us = 101", "0 to 100"),
            ("name = \"web\"", "name = \"launch\"", "launch"),
            ("name = \"web\"", "name = \"agent.sock\"", "agent.sock"),
        ] {
            assert!(ONE.contains(from));
            let error = vm(&ONE.replacen(from, to, 1)).check().expect_err(to).to_string();
            assert!(error.contains(names), "{to}: {error}");
        }
        let none = VmDefinition { disks: Vec::new(), ..vm(ONE) };
        assert_eq!(none.check(), Err(DefinitionError::Disks(0)));
    }

    #[test]
    fn placeholders_are_replaced_and_json_stays() {
        let vm = vm(ONE);
        let paths = Paths { vm: &vm, run_dir: Path::new("/run") };
        let fill = |text: &str| {
            paths.fill(&["q".to_owned(), text.to_owned()]).map(|mut all| all.remove(1))
        };
        for (text, filled) in [
            ("path={socket:root},x", "path=/run/web/root.sock,x"),
            ("{socket:data}{vm}", "/x/d.sockweb"),
            ("unix:{qmp}", "unix:/run/vmm/web.qmp"),
            ("{\"a\":{\"b\":1}}", "{\"a\":{\"b\":1}}"),
            ("{", "{"),
            ("{}", "{}"),
        ] {
            assert_eq!(fill(text).as_deref(), Ok(filled), "{text}");
        }
    }

    #[test]
    fn the_backends_file_says_what_the_definition_says() {
        let text = {
            let doors = Doors { mode: Some("660"), group: Some("kvm") };
            vm(ONE).backend_toml("host-a", Path::new("/run"), doors)
        };
        let parsed: toml::Table = toml::from_str(&text).expect("TOML");
        assert_eq!(parsed["owner"].as_str(), Some("host-a/web"));
        assert_eq!(parsed["poll_us"].as_integer(), Some(30));
        let disks = parsed["disk"].as_array().expect("disks");
        assert_eq!(disks[0]["socket_path"].as_str(), Some("/run/web/root.sock"));
        assert_eq!(disks[1]["socket_path"].as_str(), Some("/x/d.sock"));
        assert_eq!(disks[1]["socket_mode"].as_str(), Some("660"));
        assert_eq!(disks[1]["socket_group"].as_str(), Some("kvm"));
        assert_eq!(disks[1]["num_queues"].as_integer(), Some(2));
        assert_eq!(disks[1]["read_only"].as_bool(), Some(true));
    }

    proptest! {
        #[test]
        fn any_volume_is_quoted_and_any_argument_is_safe(volume in "\\PC{0,40}", argument in ".{0,60}") {
            let mut vm = vm(ONE);
            vm.disks[0].volume = volume.clone();
            let text = vm.backend_toml("h", Path::new("/r"), Doors::default());
            let parsed: toml::Table = toml::from_str(&text).expect("TOML");
            prop_assert_eq!(parsed["disk"][0]["volume"].as_str(), Some(&*volume));
            vm.incoming_command = Some(vec!["q".to_owned(), argument]);
            let _ = vm.check();
        }
    }
}
