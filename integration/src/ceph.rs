//! A Ceph cluster of one monitor and one OSD, real and small: ready in two seconds, about 75 MB of memory.
//!
//! Both are children of the test, in the foreground, with everything they write in the test's directory; they go when
//! [`Ceph`] is dropped. Objects live in the OSD's memory, where it may be frozen but not killed, or on disk, which takes
//! four seconds more to make. There is no manager: block images, snapshots and the blocklist work without.

use crate::daemon::Daemon;
use crate::guest::skip_if;
use crate::port::free_port;
use crate::workspace::system_program;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// For a daemon to be of use, on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// For one command. Ceph's own tools wait for ever for a cluster that is away.
const COMMAND_TIMEOUT_S: &str = "60";
/// The pool in which images are made.
pub const POOL: &str = "rbd";
/// Ten years: an entry that ends while somebody still wants to write is no fence.
const FOR_EVER_S: &str = "315360000";

/// Says what is missing for this module; `None` when nothing is.
#[must_use]
pub fn missing() -> Option<String> {
    let need =
        ["ceph-mon", "ceph-osd", "ceph", "rbd", "ceph-authtool", "monmaptool", "timeout", "rados"];
    need.iter().find_map(|name| system_program(name).err()).map(|e| format!("{e:#}"))
}

/// True when a test that needs a cluster has to be skipped; says so, loudly, and why.
///
/// # Panics
/// When something is missing and `BATON_REQUIRE_QEMU=1` says that it must be there.
#[must_use]
pub fn skip_without_ceph(test: &str) -> bool {
    skip_if(test, missing())
}

/// Where an OSD keeps objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objects {
    /// In memory: one that is killed has lost them.
    Memory,
    /// In a file of the test's directory: they survive a kill.
    Disk,
}

/// A running cluster.
#[derive(Debug)]
pub struct Ceph {
    /// Holds every object.
    pub osd: Daemon,
    /// Holds the maps: who is where, and who is on the blocklist.
    pub mon: Daemon,
    dir: PathBuf,
}

impl Ceph {
    /// A new cluster in `dir/ceph`, with a pool for block images.
    pub fn start(dir: &Path) -> Result<Self> {
        Self::start_with(dir, Objects::Memory, "")
    }

    /// The same, with more lines for the section `[global]` of its configuration.
    pub fn start_with(dir: &Path, objects: Objects, more: &str) -> Result<Self> {
        let dir = dir.join("ceph");
        for part in ["run", "mon", "osd"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let fsid = uuid()?;
        // The newer protocol only: one port.
        let address = format!("v2:{}", free_port()?);
        fs::write(dir.join("ceph.conf"), configuration(&dir, &fsid, &address, objects, more))?;
        let mon = start_mon(&dir, &fsid, &address)?;
        let osd = start_osd(&dir)?;
        let ceph = Self { osd, mon, dir };
        ceph.wait_up()?;
        ceph.ceph(&["osd", "pool", "create", POOL, "8"])?;
        ceph.rbd(&["pool", "init", POOL])?;
        Ok(ceph)
    }

    /// The clients' configuration file.
    #[must_use]
    pub fn conf(&self) -> PathBuf {
        self.dir.join("ceph.conf")
    }

    /// A new, empty image of the pool.
    pub fn create_image(&self, name: &str, bytes: u64) -> Result<()> {
        self.rbd(&["create", "--size", &format!("{bytes}B"), &image(name)]).map(drop)
    }

    /// Makes an image larger.
    pub fn grow_image(&self, name: &str, bytes: u64) -> Result<()> {
        self.rbd(&["resize", "--size", &format!("{bytes}B"), &image(name)]).map(drop)
    }

    /// What an image holds, as Ceph's own tool finds it.
    pub fn export(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.dir.join("export");
        let _ = fs::remove_file(&path);
        let to = path.to_str().context("a path that is text")?;
        self.rbd(&["export", "--no-progress", &image(name), to])?;
        Ok(fs::read(path)?)
    }

    /// `rbd://POOL/IMAGE` of this cluster, as its administrator.
    #[must_use]
    pub fn uri(&self, name: &str) -> String {
        format!("rbd://{}?conf={}", image(name), self.conf().display())
    }

    /// A user of its own, whose key is where this cluster's configuration looks for it.
    pub fn add_user(&self, name: &str, mon: &str, osd: &str) -> Result<()> {
        let entity = format!("client.{name}");
        let args = ["auth", "get-or-create", &entity, "mon", mon, "osd", osd];
        fs::write(self.dir.join(format!("{entity}.keyring")), self.ceph(&args)?)?;
        Ok(())
    }

    /// Addresses of the clients that watch an image: those that have it open for writing.
    pub fn clients_of(&self, name: &str) -> Result<Vec<String>> {
        let text = self.rbd(&["status", "--format", "json", &image(name)])?;
        let status: serde_json::Value = serde_json::from_str(&text)?;
        let watchers = status["watchers"].as_array().context("no watchers")?;
        let address = |w: &serde_json::Value| w["address"].as_str().map(str::to_owned);
        watchers.iter().map(|w| address(w).context("no address")).collect()
    }

    /// Takes a client's right to do anything away.
    pub fn blocklist(&self, client: &str) -> Result<()> {
        self.ceph(&["osd", "blocklist", "add", client, FOR_EVER_S]).map(drop)
    }

    /// Who is on the blocklist, and until when. Addresses are whole ones: the number behind one may begin with another's.
    pub fn blocklisted(&self) -> Result<BTreeMap<String, String>> {
        let text = self.ceph(&["osd", "blocklist", "ls"])?;
        let entry = |line: &str| {
            line.split_once(' ').map(|(client, until)| (client.to_owned(), until.trim().to_owned()))
        };
        text.lines().map(|line| entry(line).with_context(|| format!("no entry: {line}"))).collect()
    }

    /// Runs `ceph` as the administrator.
    pub fn ceph(&self, args: &[&str]) -> Result<String> {
        run(&self.dir, "ceph", args)
    }

    /// Runs `rados` as the administrator.
    pub fn rados(&self, args: &[&str]) -> Result<String> {
        run(&self.dir, "rados", args)
    }

    /// Runs `rbd` as the administrator.
    pub fn rbd(&self, args: &[&str]) -> Result<String> {
        run(&self.dir, "rbd", args)
    }

    /// The same, given up as soon as a daemon of the cluster is dead: whoever asks may be the one to start it again. A
    /// frozen one is waited for.
    pub fn rbd_while_up(&mut self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(system_program("rbd")?);
        command.arg("--conf").arg(self.conf()).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let until = Instant::now() + START_TIMEOUT;
        while child.try_wait()?.is_none() {
            let up = self.mon.is_running()? && self.osd.is_running()?;
            if !up || Instant::now() > until {
                child.kill()?;
                child.wait()?;
                bail!(
                    "`rbd {}`: {}",
                    args.join(" "),
                    if up { "no answer" } else { "a daemon died" }
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("`rbd {}`: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Asks every group of the pool's objects something. The answer is not waited for here: whoever asks may be the one
    /// to start a daemon again.
    pub fn ask_all_groups(&self) -> Result<Daemon> {
        let mut command = Command::new(system_program("rados")?);
        command.arg("--conf").arg(self.conf()).args(["--pool", POOL, "ls"]);
        Daemon::start_command(&self.dir, "question", command)
    }

    /// Starts the monitor again after a kill or an end.
    pub fn restart_mon(&mut self) -> Result<()> {
        self.mon = run_mon(&self.dir)?;
        Ok(())
    }

    /// Starts the OSD again after a kill or an end.
    pub fn restart_osd(&mut self) -> Result<()> {
        self.osd = run_osd(&self.dir)?;
        Ok(())
    }

    fn wait_up(&self) -> Result<()> {
        let until = Instant::now() + START_TIMEOUT;
        while !self.ceph(&["osd", "stat"])?.contains(" 1 up") {
            ensure!(Instant::now() < until, "the OSD did not come up:\n{}", self.osd.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// Name of an image with its pool.
fn image(name: &str) -> String {
    format!("{POOL}/{name}")
}

fn uuid() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned())
}

fn run(dir: &Path, program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", COMMAND_TIMEOUT_S]);
    command.arg(system_program(program)?).arg("--conf").arg(dir.join("ceph.conf")).args(args);
    said(&mut command)
}

fn said(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed ({}):\n{error}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Where the OSD's classes are, of which images need one. Debian 13's OSD (18.2.7) looks for them below its working
/// directory.
fn classes() -> Option<PathBuf> {
    let libraries = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|dir| dir.path());
    libraries
        .chain([PathBuf::from("/usr/lib64")])
        .map(|dir| dir.join("rados-classes"))
        .find(|dir| dir.join("libcls_rbd.so").exists())
}

fn configuration(dir: &Path, fsid: &str, mon: &str, objects: Objects, more: &str) -> String {
    let dir = dir.display();
    let store = match objects {
        Objects::Memory => "memstore",
        Objects::Disk => "bluestore",
    };
    let classes = classes().map_or(String::new(), |at| format!("osd class dir = {}", at.display()));
    format!(
        "[global]
fsid = {fsid}
mon host = [{mon}]
mon initial members = one
public network = 127.0.0.0/8
keyring = {dir}/$name.keyring
run dir = {dir}/run
crash dir = {dir}/run
admin socket =
# One copy of everything, also on a disk that is nearly full.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon allow pool delete = true
mon data avail crit = 1
mon osd full ratio = .99
mon osd nearfull ratio = .98
mon osd backfillfull ratio = .985
# One monitor need not wait for what others propose.
paxos propose interval = 0.02
{more}
[mon]
mon data = {dir}/mon
[osd]
osd data = {dir}/osd
keyring = {dir}/osd/keyring
osd objectstore = {store}
{classes}
# Taken as it is needed.
memstore device bytes = 8589934592
# Else an object is a list of all the writes that it was made of, which each read and write goes through.
memstore page set = true
# A sparse file.
bluestore block size = 1073741824
bluestore block create = true
bluestore fsck on mount = false
# The database keeps four old logs of this size, which small writes go through: more than the disk has, by default.
bluestore rocksdb options annex = write_buffer_size=16777216,max_total_wal_size=67108864
osd memory target = 939524096
"
    )
}

fn start_mon(dir: &Path, fsid: &str, address: &str) -> Result<Daemon> {
    let [admin, of_mon, map] = ["client.admin.keyring", "mon.keyring", "monmap"];
    let tool = |args: &[&str]| {
        said(Command::new(system_program("ceph-authtool")?).current_dir(dir).args(args))
    };
    let all = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"];
    tool(&[&["--create-keyring", admin, "--gen-key", "-n", "client.admin"], &all[..]].concat())?;
    tool(&["--create-keyring", of_mon, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])?;
    tool(&[of_mon, "--import-keyring", admin])?;
    let address = format!("[{address}]");
    let args = ["--create", "--fsid", fsid, "--addv", "one", &address, map];
    said(Command::new(system_program("monmaptool")?).current_dir(dir).args(args))?;
    let mut mkfs = Command::new(system_program("ceph-mon")?);
    mkfs.current_dir(dir).arg("--conf").arg(dir.join("ceph.conf"));
    said(mkfs.args(["-i", "one", "--mkfs", "--monmap", map, "--keyring", of_mon]))?;
    let mut daemon = run_mon(dir)?;
    wait_for_answer(dir, &mut daemon)?;
    Ok(daemon)
}

fn run_mon(dir: &Path) -> Result<Daemon> {
    let mut mon = Command::new(system_program("ceph-mon")?);
    mon.arg("--conf").arg(dir.join("ceph.conf"));
    mon.args(["-i", "one", "-f", "--log-to-stderr=true"]);
    Daemon::start_command(dir, "mon", mon)
}

/// The monitor takes connections before it answers them; a command waits for that, but not for the first.
fn wait_for_answer(dir: &Path, mon: &mut Daemon) -> Result<()> {
    let until = Instant::now() + START_TIMEOUT;
    loop {
        match run(dir, "ceph", &["--connect-timeout", "5", "mon", "stat"]) {
            Ok(_) => return Ok(()),
            Err(e) if !mon.is_running()? || Instant::now() > until => {
                return Err(e.context(format!("the monitor does not answer:\n{}", mon.log())));
            }
            Err(_) => {}
        }
    }
}

fn start_osd(dir: &Path) -> Result<Daemon> {
    let id = uuid()?;
    let number = run(dir, "ceph", &["osd", "new", &id])?;
    ensure!(number.trim() == "0", "the first OSD is number {number}");
    said(osd(dir)?.args(["--mkfs", "--mkkey", "--no-mon-config", "--osd-uuid", &id]))?;
    let keyring = dir.join("osd/keyring").display().to_string();
    let caps = ["osd", "allow *", "mon", "allow profile osd"];
    run(dir, "ceph", &[&["auth", "add", "osd.0", "-i", &keyring], &caps[..]].concat())?;
    run_osd(dir)
}

fn osd(dir: &Path) -> Result<Command> {
    let mut command = Command::new(system_program("ceph-osd")?);
    command.arg("--conf").arg(dir.join("ceph.conf")).args(["-i", "0"]);
    // As Ceph's own packages are built; Debian's has the library beside it and does not link it. The second is what the
    // packages' units give it (/etc/default/ceph), bytes.
    command.env("LD_PRELOAD", "libtcmalloc_minimal.so.4");
    command.env("TCMALLOC_MAX_TOTAL_THREAD_CACHE_BYTES", "134217728");
    Ok(command)
}

fn run_osd(dir: &Path) -> Result<Daemon> {
    let mut command = osd(dir)?;
    command.args(["-f", "--log-to-stderr=true"]);
    Daemon::start_command(dir, "osd", command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::TestDir;

    #[test]
    fn a_cluster_serves_images_and_goes_with_its_test() {
        if skip_without_ceph("a_cluster_serves_images_and_goes_with_its_test") {
            return;
        }
        let dir = TestDir::new("ceph").unwrap();
        let begun = Instant::now();
        let ceph = Ceph::start(dir.path()).unwrap();
        eprintln!("a cluster in {:?}", begun.elapsed());
        ceph.create_image("one", 64 << 20).unwrap();
        assert_eq!(ceph.rbd(&["ls", POOL]).unwrap().trim(), "one");
        ceph.grow_image("one", 128 << 20).unwrap();
        let info = ceph.rbd(&["info", "--format", "json", "rbd/one"]).unwrap();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["size"], 128 << 20);
        assert_eq!(ceph.clients_of("one").unwrap(), Vec::<String>::new());
        ceph.add_user("vm", "profile rbd", "profile rbd pool=rbd").unwrap();
        assert_eq!(ceph.rbd(&["--id", "vm", "ls", POOL]).unwrap().trim(), "one");
        ceph.blocklist("127.0.0.1:0/71").unwrap();
        let listed = ceph.blocklisted().unwrap();
        assert!(listed.contains_key("127.0.0.1:0/71") && !listed.contains_key("127.0.0.1:0/7"));
        let pids = [ceph.mon.pid(), ceph.osd.pid()];
        drop(ceph);
        for pid in pids {
            assert!(!Path::new(&format!("/proc/{pid}")).exists());
        }
    }

    #[test]
    fn small_writes_do_not_fill_a_disk() {
        if skip_without_ceph("small_writes_do_not_fill_a_disk") {
            return;
        }
        let dir = TestDir::new("ceph").unwrap();
        let mut ceph = Ceph::start_with(dir.path(), Objects::Disk, "").unwrap();
        ceph.create_image("one", 16 << 20).unwrap();
        let write = ["bench", "--io-type", "write", "--io-pattern", "rand", "rbd/one"];
        let much = ["--io-size", "32K", "--io-threads", "16", "--io-total", "1G"];
        ceph.rbd_while_up(&[&write[..], &much[..]].concat()).unwrap();
    }
}
