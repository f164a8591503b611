//! A network of its own for a test, and a place in it behind two cables, one of which can be pulled.
//!
//! ```text
//!   the test's thread, all that it starts   127.77.0.1 ══ what can be pulled ══ 127.77.0.2
//!                                127.0.0.1  127.78.0.1 ═════════ stays ════════ 127.78.0.2  the island
//! ```
//!
//! Both are network namespaces that only the test has, so nothing of this machine's network is touched, and they go with
//! the test. A pulled cable is a link that is down: who connects is not answered, neither is who was connected, and
//! nobody is told. The addresses are of loopback's, because the daemons take nothing else without certificates; the
//! namespaces route them between each other.

use crate::baton::wait_until;
use crate::daemon::Daemon;
use crate::guest::skip_if;
use crate::workspace::system_program;
use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Of the test's end of the cable that can be pulled.
pub const LOOSE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 77, 0, 1));
/// Of the test's end of the other cable.
pub const FIXED: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 78, 0, 1));
/// Of the island's end of the other cable.
pub const ISLAND: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 78, 0, 2));

const SOON: Duration = Duration::from_secs(10);

/// True when a test that needs a network of its own has to be skipped; says so, loudly, and why.
///
/// # Panics
/// When something is missing and `BATON_REQUIRE_QEMU=1` says that it must be there.
#[must_use]
pub fn skip_without_network(test: &str) -> bool {
    let missing = ["ip", "sysctl", "nsenter", "unshare", "timeout", "bash"]
        .iter()
        .find_map(|name| system_program(name).err())
        .map(|error| format!("{error:#}"));
    let refused = || {
        let tried = Command::new("unshare").args(["--net", "true"]).output();
        let fine = tried.is_ok_and(|output| output.status.success());
        (!fine).then(|| "network namespaces may not be made here; root may".to_owned())
    };
    skip_if(test, missing.or_else(refused))
}

/// The place. Its namespace goes when this is dropped.
#[derive(Debug)]
pub struct Island {
    keeper: Daemon,
}

impl Island {
    /// Moves the calling thread, and all that it will start, into a network of its own, and makes the island.
    pub fn make(dir: &Path) -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        let args = ["--net", "sleep", "infinity"];
        let keeper = Daemon::start(dir, "island", &system_program("unshare")?, args)?;
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let pid = keeper.pid().to_string();
        wait_until("the island is a namespace of its own", SOON, || {
            let ours = namespace("thread-self");
            namespace(&pid).is_some_and(|theirs| Some(theirs) != ours)
        })?;
        let island = Self { keeper };
        for (name, theirs) in [("loose", LOOSE), ("fixed", FIXED)] {
            run(&["ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", &pid])?;
            let other = theirs.to_string().replace(".0.1", ".0.2");
            run(&["ip", "address", "add", &format!("{theirs}/30"), "dev", name])?;
            island.run(&["ip", "address", "add", &format!("{other}/30"), "dev", name])?;
        }
        for inside in [false, true] {
            let run = |args: &[&str]| if inside { island.run(args) } else { run(args) };
            run(&["sysctl", "-q", "-w", "net.ipv4.conf.all.route_localnet=1"])?;
            for name in ["lo", "loose", "fixed"] {
                run(&["ip", "link", "set", name, "up"])?;
            }
            // 127.0.0.0/8 as a whole is this host's, else.
            let local = ["dev", "lo", "table", "local"];
            run(&[&["ip", "route", "del", "local", "127.0.0.0/8"], &local[..]].concat())?;
            let source = ["src", "127.0.0.1"];
            run(&[&["ip", "route", "add", "local", "127.0.0.0/16"], &local[..], &source].concat())?;
        }
        // Who has no answer to the question where the other end is, would be told that it is away.
        let mac = run(&["ip", "-o", "link", "show", "loose"])?;
        let mac = mac.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        let there = [&LOOSE.to_string(), "lladdr", mac.context("a link has an address")?];
        let always = ["dev", "loose", "nud", "permanent"];
        island.run(&[&["ip", "neigh", "replace"], &there[..], &always].concat())?;
        Ok(island)
    }

    /// What a command begins with that runs there.
    #[must_use]
    pub fn prefix(&self) -> Vec<String> {
        let net = format!("--net=/proc/{}/ns/net", self.keeper.pid());
        vec!["nsenter".to_owned(), net]
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let prefix = self.prefix();
        run(&[&prefix.iter().map(String::as_str).collect::<Vec<_>>()[..], args].concat())
    }

    /// Pulls the cable.
    pub fn pull(&self) -> Result<()> {
        run(&["ip", "link", "set", "loose", "down"]).map(drop)
    }

    /// Puts it back.
    pub fn plug(&self) -> Result<()> {
        run(&["ip", "link", "set", "loose", "up"]).map(drop)
    }

    /// Whether somebody there who connects is answered: taken or refused.
    pub fn is_answered(&self, address: SocketAddr) -> Result<bool> {
        let (ip, port) = (address.ip(), address.port());
        let connect = format!("exec 3<>/dev/tcp/{ip}/{port}");
        let mut command = Command::new("nsenter");
        command.args(&self.prefix()[1..]).args(["timeout", "2", "bash", "-c", &connect]);
        // 124: the time was over, with nothing heard.
        Ok(command.output()?.status.code() != Some(124))
    }
}

fn run(args: &[&str]) -> Result<String> {
    let [program, args @ ..] = args else { bail!("nothing to run") };
    let output = Command::new(system_program(program)?).args(args).output()?;
    if !output.status.success() {
        bail!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}
