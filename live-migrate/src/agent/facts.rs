//! What a host is: asked once, at the agent's start.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::process::Command;
use utoipa::ToSchema;

/// `--version` takes milliseconds on a healthy host.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// A host.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct HostFacts {
    /// As configured.
    name: String,
    /// Model of its CPUs.
    cpu_model: Option<String>,
    /// CPUs online.
    cpus: usize,
    /// Features of its CPUs, sorted.
    cpu_features: Vec<String>,
    /// Release of its kernel.
    kernel: String,
    /// Machine, such as `x86_64`.
    architecture: String,
    /// Of QEMU for this architecture, if it is installed.
    qemu_version: Option<String>,
    /// Memory, bytes.
    memory_bytes: Option<u64>,
    /// Of this agent.
    agent_version: &'static str,
}

impl HostFacts {
    pub(super) async fn gather(name: &str) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let system = nix::sys::utsname::uname().ok();
        let text = |value: Option<&std::ffi::OsStr>| {
            value.map(|value| value.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let architecture = text(system.as_ref().map(|system| system.machine()));
        Self {
            name: name.to_owned(),
            cpu_model: field(&cpuinfo, &["model name", "Model"]).map(str::to_owned),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu_features: features(&cpuinfo),
            kernel: text(system.as_ref().map(|system| system.release())),
            qemu_version: qemu_version(&architecture).await,
            architecture,
            memory_bytes: memory(&meminfo),
            agent_version: env!("CARGO_PKG_VERSION"),
        }
    }
}

fn field<'a>(text: &'a str, names: &[&str]) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        names.contains(&name.trim()).then(|| value.trim())
    })
}

fn features(cpuinfo: &str) -> Vec<String> {
    let flags = field(cpuinfo, &["flags", "Features"]).unwrap_or_default();
    let mut all: Vec<_> = flags.split_ascii_whitespace().map(str::to_owned).collect();
    all.sort();
    all.dedup();
    all
}

fn memory(meminfo: &str) -> Option<u64> {
    let kib: u64 = field(meminfo, &["MemTotal"])?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

async fn qemu_version(architecture: &str) -> Option<String> {
    let asked = Command::new(format!("qemu-system-{architecture}"))
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(VERSION_TIMEOUT, asked).await.ok()?.ok()?;
    version(&String::from_utf8_lossy(&output.stdout))
}

fn version(said: &str) -> Option<String> {
    let (_, rest) = said.lines().next()?.split_once("version ")?;
    rest.split_ascii_whitespace().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_from_what_the_kernel_and_qemu_say() {
        let cpuinfo = "processor\t: 0\nmodel name\t: CPU 9000\nflags\t\t: sse vme sse\n";
        assert_eq!(field(cpuinfo, &["model name"]), Some("CPU 9000"));
        assert_eq!(features(cpuinfo), ["sse", "vme"]);
        assert_eq!(memory("MemTotal:       16 kB\n"), Some(16 << 10));
        assert_eq!(memory("MemTotal: 18446744073709551615 kB\n"), None);
        let qemu = "QEMU emulator version 10.0.2 (Debian 1:10)\nCopyright";
        assert_eq!(version(qemu).as_deref(), Some("10.0.2"));
        assert_eq!(version("nonsense"), None);
    }
}
