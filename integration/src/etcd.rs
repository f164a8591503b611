//! An etcd cluster on loopback, real and small: three members are ready in about a second, 25 MB of memory each.
//!
//! Each member is a child of the test, with everything it writes in the test's directory, and is reached by its clients
//! through a [`Proxy`](crate::proxy::Proxy) of its own if the test wants one; the members hear each other directly, or
//! not at all: [`Etcd::freeze`] and [`Etcd::kill`] make a minority of the rest.

use crate::daemon::Daemon;
use crate::guest::skip_if;
use crate::port::free_port;
use crate::workspace::system_program;
use anyhow::{Context, Result, bail};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// For a cluster to be of use, on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const COMMAND_TIMEOUT: &str = "--command-timeout=10s";
/// Without a beat for so long, ms, the members choose another leader.
const ELECTION_MS: &str = "600";
const BEAT_MS: &str = "60";

/// Says what is missing for this module; `None` when nothing is.
#[must_use]
pub fn missing() -> Option<String> {
    ["etcd", "etcdctl"]
        .iter()
        .find_map(|name| system_program(name).err())
        .map(|error| format!("{error:#}; scripts/setup.sh --etcd installs it"))
}

/// True when a test that needs etcd has to be skipped; says so, loudly, and why.
///
/// # Panics
/// When something is missing and `BATON_REQUIRE_QEMU=1` says that it must be there.
#[must_use]
pub fn skip_without_etcd(test: &str) -> bool {
    skip_if(test, missing())
}

/// Certificates for clients and members, as `openssl` made them.
#[derive(Clone, Debug)]
pub struct Certificates {
    dir: PathBuf,
}

/// A member.
#[derive(Debug)]
struct Member {
    daemon: Daemon,
    client: SocketAddr,
    peer: SocketAddr,
}

/// A running cluster.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    dir: PathBuf,
    tls: Option<Certificates>,
    more: Vec<String>,
}

impl Etcd {
    /// A new cluster of so many members in `dir/etcd`.
    pub fn start(dir: &Path, members: usize) -> Result<Self> {
        Self::start_with(dir, members, None, &[])
    }

    /// The same with certificates for clients, and with more flags.
    pub fn start_with(
        dir: &Path,
        members: usize,
        tls: Option<Certificates>,
        more: &[&str],
    ) -> Result<Self> {
        let dir = dir.join("etcd");
        fs::create_dir_all(&dir)?;
        let addresses: Vec<(SocketAddr, SocketAddr)> =
            (0..members).map(|_| Ok((free_port()?, free_port()?))).collect::<Result<_>>()?;
        let mut etcd = Self {
            members: Vec::new(),
            dir,
            tls,
            more: more.iter().map(|flag| (*flag).to_owned()).collect(),
        };
        for (n, (client, peer)) in addresses.iter().enumerate() {
            let peers: Vec<SocketAddr> = addresses.iter().map(|(_, peer)| *peer).collect();
            let daemon = etcd.launch(n, *client, *peer, &peers)?;
            etcd.members.push(Member { daemon, client: *client, peer: *peer });
        }
        etcd.wait_healthy()?;
        Ok(etcd)
    }

    fn launch(
        &self,
        n: usize,
        client: SocketAddr,
        peer: SocketAddr,
        peers: &[SocketAddr],
    ) -> Result<Daemon> {
        let cluster: Vec<String> =
            peers.iter().enumerate().map(|(n, peer)| format!("n{n}=http://{peer}")).collect();
        let url = format!("{}://{client}", self.scheme());
        let mut command = Command::new(system_program("etcd")?);
        command
            .args(["--name", &format!("n{n}"), "--data-dir"])
            .arg(self.dir.join(format!("n{n}")))
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &format!("http://{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
            .args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"])
            .args(["--heartbeat-interval", BEAT_MS, "--election-timeout", ELECTION_MS])
            .args(&self.more);
        if let Some(tls) = &self.tls {
            command.arg("--cert-file").arg(tls.file("server.pem"));
            command.arg("--key-file").arg(tls.file("server.key"));
            command.arg("--trusted-ca-file").arg(tls.file("ca.pem")).arg("--client-cert-auth");
        }
        Daemon::start_command(&self.dir, &format!("n{n}"), command)
    }

    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Where clients reach each member.
    #[must_use]
    pub fn clients(&self) -> Vec<SocketAddr> {
        self.members.iter().map(|member| member.client).collect()
    }

    /// `http://HOST:PORT` of each member.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.clients().iter().map(|client| format!("{}://{client}", self.scheme())).collect()
    }

    /// SIGKILL.
    pub fn kill(&mut self, n: usize) -> Result<()> {
        self.members[n].daemon.kill()
    }

    /// Starts a member again that was killed.
    pub fn restart(&mut self, n: usize) -> Result<()> {
        let peers: Vec<SocketAddr> = self.members.iter().map(|member| member.peer).collect();
        let daemon = self.launch(n, self.members[n].client, self.members[n].peer, &peers)?;
        self.members[n].daemon = daemon;
        Ok(())
    }

    /// SIGSTOP: to the other members and to clients it is cut off.
    pub fn freeze(&self, n: usize) -> Result<()> {
        self.members[n].daemon.freeze()
    }

    /// SIGCONT.
    pub fn thaw(&self, n: usize) -> Result<()> {
        self.members[n].daemon.thaw()
    }

    /// Which member leads.
    pub fn leader(&self) -> Result<usize> {
        for (n, endpoint) in self.endpoints().iter().enumerate() {
            let Ok(status) = self.ctl_at(endpoint, &["endpoint", "status", "-w", "json"]) else {
                continue;
            };
            let status: serde_json::Value = serde_json::from_str(&status)?;
            let status = &status[0]["Status"];
            if status["header"]["member_id"] == status["leader"] {
                return Ok(n);
            }
        }
        bail!("no member leads")
    }

    /// Runs `etcdctl` against all members.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        self.ctl_at(&self.endpoints().join(","), args)
    }

    /// The values of all keys that begin with this, by key.
    pub fn values(&self, prefix: &str) -> Result<Vec<(String, String)>> {
        let text = self.ctl(&["get", "--prefix", prefix])?;
        let lines: Vec<&str> = text.lines().collect();
        Ok(lines.chunks_exact(2).map(|kv| (kv[0].to_owned(), kv[1].to_owned())).collect())
    }

    fn ctl_at(&self, endpoints: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(system_program("etcdctl")?);
        command.env("ETCDCTL_API", "3").args(["--endpoints", endpoints, COMMAND_TIMEOUT]);
        if let Some(tls) = &self.tls {
            command.arg("--cacert").arg(tls.file("ca.pem"));
            command.arg("--cert").arg(tls.file("client.pem"));
            command.arg("--key").arg(tls.file("client.key"));
        }
        let output = command.args(args).output().context("cannot run etcdctl")?;
        if !output.status.success() {
            bail!("etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Until a majority answers.
    pub fn wait_healthy(&self) -> Result<()> {
        let until = Instant::now() + START_TIMEOUT;
        loop {
            match self.ctl(&["get", "health", "--consistency=l"]) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > until => {
                    let log = self.members[0].daemon.log();
                    return Err(error.context(format!("etcd is of no use:\n{log}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

impl Certificates {
    /// An authority, a certificate for members on loopback, and one for clients.
    pub fn make(dir: &Path) -> Result<Self> {
        let dir = dir.join("etcd-tls");
        fs::create_dir_all(&dir)?;
        let run = |args: &[&str]| -> Result<()> {
            let output =
                Command::new(system_program("openssl")?).current_dir(&dir).args(args).output()?;
            if !output.status.success() {
                bail!("openssl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(())
        };
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        run(&[
            &["req", "-x509", "-days", "2", "-subj", "/CN=etcd authority"],
            &key[..],
            &["-keyout", "ca.key", "-out", "ca.pem"],
        ]
        .concat())?;
        for (who, extension) in [
            ("server", "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth"),
            ("client", "extendedKeyUsage=clientAuth"),
        ] {
            fs::write(dir.join(format!("{who}.ext")), extension)?;
            let [key_file, request, cert, extensions, subject] = [
                format!("{who}.key"),
                format!("{who}.csr"),
                format!("{who}.pem"),
                format!("{who}.ext"),
                "/O=etcd".to_owned(),
            ];
            run(&[
                &["req", "-subj", &subject],
                &key[..],
                &["-keyout", &key_file, "-out", &request],
            ]
            .concat())?;
            run(&[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                "ca.pem",
                "-CAkey",
                "ca.key",
                "-CAcreateserial",
                "-days",
                "2",
                "-extfile",
                &extensions,
                "-out",
                &cert,
            ])?;
        }
        Ok(Self { dir })
    }

    /// `ca.pem`, `client.pem`, `client.key`, ...
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::TestDir;

    #[test]
    fn three_members_go_on_with_two_and_go_with_their_test() {
        if skip_without_etcd("three_members_go_on_with_two_and_go_with_their_test") {
            return;
        }
        let dir = TestDir::new("etcd").unwrap();
        let begun = Instant::now();
        let mut etcd = Etcd::start(dir.path(), 3).unwrap();
        eprintln!("three members in {:?}", begun.elapsed());
        let leader = etcd.leader().unwrap();
        etcd.ctl(&["put", "/a", "1"]).unwrap();
        etcd.kill(leader).unwrap();
        etcd.wait_healthy().unwrap();
        assert_eq!(etcd.values("/").unwrap(), [("/a".to_owned(), "1".to_owned())]);
        etcd.restart(leader).unwrap();
        let pids: Vec<u32> = etcd.members.iter().map(|member| member.daemon.pid()).collect();
        drop(etcd);
        for pid in pids {
            assert!(!Path::new(&format!("/proc/{pid}")).exists());
        }
    }
}
