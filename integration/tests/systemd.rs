//! Baton's units on hosts whose init is systemd: as they are installed, with the daemons that are dead or stopped coming
//! back, and a real guest that notices nothing.

use baton_integration::baton::wait_until;
use baton_integration::ceph::{Ceph, skip_without_ceph};
use baton_integration::cluster::{HOSTS, Trust, call};
use baton_integration::daemon::Daemon;
use baton_integration::guest::{GuestFiles, skip_without_program, skip_without_qemu};
use baton_integration::machine::{Machine, skip_without_systemd};
use baton_integration::port::free_port;
use baton_integration::probe::Probe;
use baton_integration::qemu::{BOOT_TIMEOUT, GuestConfig};
use baton_integration::workspace::{TestDir, system_program};
use serde_json::json;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);
const VM: &str = "web-1";
const AGENT: &str = "baton-agent";
const STORAGE: &str = "baton-storage";
const BACKEND: &str = "baton-agent-backend@web-1";

/// An example of `configs/` with some of it replaced.
fn example(name: &str, pairs: &[(&str, String)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs").join(name);
    let text = fs::read_to_string(path).unwrap();
    pairs.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{name} has no {from} any more");
        text.replace(from, to)
    })
}

/// The example of a VM without its second disk.
fn one_disk(pairs: &[(&str, String)]) -> String {
    let vm = example("vm.toml", pairs);
    let (one, _) = vm.split_once("[[disk]]\nname = \"shared-data\"").unwrap();
    one.to_owned()
}

/// A storage server's addresses, and its configuration.
fn storage() -> (SocketAddr, SocketAddr, String) {
    let (data, admin) = (free_port().unwrap(), free_port().unwrap());
    let pairs = [("127.0.0.1:7700", data.to_string()), ("127.0.0.1:7701", admin.to_string())];
    (data, admin, example("baton-storage.toml", &pairs))
}

fn create(machine: &Machine, admin: SocketAddr, volume: &str) {
    let admin = format!("http://{admin}");
    let args = ["volume", "create", volume, "--size", "64M", "--server", &admin];
    machine.run("baton", &args).unwrap();
}

/// All in this directory: others may not be readable for anybody, or not be there in a machine.
fn guest_files(dir: &Path) -> GuestFiles {
    let mut files = GuestFiles::prepare(dir).unwrap();
    fs::copy(&files.kernel, dir.join("vmlinuz")).unwrap();
    files.kernel = dir.join("vmlinuz");
    files
}

/// QEMU in a machine with one disk, run by `nobody` in the group of the sockets, as a monitor is that has no privileges.
fn boot(machine: &Machine, dir: &Path, socket: &str) -> (Daemon, Probe) {
    let config = GuestConfig::new(Path::new(socket));
    let files = guest_files(dir);
    let mut qemu = machine.command("setpriv").unwrap();
    qemu.args(["--reuid=65534", "--regid=kvm", "--clear-groups"])
        .arg(system_program("qemu-system-x86_64").unwrap())
        .args(config.arguments(dir, &files));
    let mut qemu = Daemon::start_command(dir, "guest", qemu).unwrap();
    qemu.wait_socket(&dir.join("guest.probe"), BOOT_TIMEOUT).unwrap();
    let probe = Probe::connect(&dir.join("guest.probe"), &dir.join("guest.probe.log")).unwrap();
    probe.wait_ready(BOOT_TIMEOUT).unwrap_or_else(|error| panic!("{error:#}\n{}", qemu.log()));
    (qemu, probe)
}

/// The guest works, and its backend, whom systemd starts again, is killed.
fn goes_on_after_a_kill(machine: &Machine, probe: &mut Probe) {
    probe.ask("load threads=2 depth=4 flush-every=50").unwrap();
    probe.wait_progress(100, SOON).unwrap();
    let pid = machine.main_pid("baton-backend@web-1").unwrap();
    machine.run("kill", &["-9", &pid.to_string()]).unwrap();
    probe.wait_progress(100, SOON).unwrap();
    probe.stop_load().unwrap();
}

/// The unit's process can do nothing that its user cannot, and is not root.
fn assert_unprivileged(machine: &Machine, unit: &str) {
    let pid = machine.main_pid(unit).unwrap();
    let status = fs::read_to_string(machine.path(&format!("/proc/{pid}/status"))).unwrap();
    let has = |line: &str| status.lines().any(|is| is.split_whitespace().eq(line.split(' ')));
    let nothing = "0000000000000000";
    let may = ["CapEff", "CapPrm", "CapBnd"].map(|set| format!("{set}: {nothing}"));
    let root = status.lines().any(|line| line.starts_with("Uid:\t0\t"));
    // Of others what they could get is not taken away, since nothing gives it to them.
    let bounded = if unit.contains("backend") { &may[..] } else { &may[..2] };
    assert!(!root && has("NoNewPrivs: 1") && bounded.iter().all(|line| has(line)), "{status}");
}

/// What the unit's process sees of the sockets of this host.
fn sees(machine: &Machine, unit: &str) -> Vec<String> {
    let pid = machine.main_pid(unit).unwrap();
    let root = machine.path(&format!("/proc/{pid}/root/run/baton"));
    let names = fs::read_dir(root).unwrap();
    let mut names: Vec<String> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A directory for anybody.
fn public(path: &Path) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
}

#[test]
fn a_guest_goes_on_while_units_die_and_are_stopped() {
    const NAME: &str = "a_guest_goes_on_while_units_die_and_are_stopped";
    if skip_without_qemu(NAME) || skip_without_systemd(NAME) {
        return;
    }
    let dir = TestDir::new("units").unwrap();
    public(dir.path());
    let (data, admin, storage) = storage();
    // One disk over TCP, the other over the server's unix socket.
    let by_path = "baton+unix:///shared-data?socket=/run/baton-storage/data.sock";
    let pairs = [
        ("127.0.0.1:7700", data.to_string()),
        (&*format!("baton://{data}/shared-data"), by_path.to_owned()),
    ];
    let vm = example("vm.toml", &pairs);
    let storage = storage.replace("#: unix =", "unix =");
    let agent = example("baton-agent.toml", &[("127.0.0.1:7700", data.to_string())]);
    let files =
        [("baton-storage.toml", storage), ("vm/web-1.toml", vm), ("baton-agent.toml", agent)];
    let machine = Machine::boot(dir.path(), "units", &files).unwrap();
    let backend = format!("baton-backend@{VM}");
    machine.uncomment(STORAGE, "Group=").unwrap();
    machine.start(STORAGE).unwrap();
    for volume in ["web-1-root", "shared-data"] {
        create(&machine, admin, volume);
    }
    machine.start(AGENT).unwrap();
    machine.start(&backend).unwrap();
    assert_unprivileged(&machine, STORAGE);
    assert_unprivileged(&machine, &backend);
    assert_eq!(sees(&machine, AGENT), ["agent.sock", "launch", "vmm", VM]);
    assert_eq!(sees(&machine, &backend), [VM]);
    let socket = format!("/run/baton/{VM}/root.sock");
    public(&dir.join("guest"));
    let (_qemu, mut probe) = boot(&machine, &dir.join("guest"), &socket);
    probe.ask("load threads=2 depth=4 flush-every=50").unwrap();
    probe.wait_progress(200, SOON).unwrap();

    // Killed: systemd starts them again.
    for unit in [&backend, STORAGE, &backend] {
        let pid = machine.main_pid(unit).unwrap();
        machine.run("kill", &["-9", &pid.to_string()]).unwrap();
        wait_until(&format!("{unit} is back"), SOON, || {
            machine.main_pid(unit).is_ok_and(|now| now != pid)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", machine.journal()));
        probe.wait_progress(200, SOON).unwrap();
    }
    // Stopped and started: what is others' in /run/baton stays there meanwhile.
    machine.systemctl(&["stop", STORAGE, AGENT]).unwrap();
    for path in [socket.as_str(), "/run/baton/vmm", "/run/baton/launch"] {
        assert!(machine.path(path).exists(), "{path} went with a daemon that is not its own");
    }
    machine.start(STORAGE).unwrap();
    machine.start(AGENT).unwrap();
    assert!(machine.path("/run/baton/agent.sock").exists());
    machine.systemctl(&["restart", &backend]).unwrap();
    probe.wait_progress(200, SOON).unwrap();
    let totals = probe.stop_load().unwrap();
    assert!(totals.writes >= 200, "{totals}");

    // The agent says what the journal has.
    let claim = ["--silent", "--unix-socket", "/run/baton/agent.sock", "--request", "PUT"];
    let what = ["--header", "content-type: application/json", "--data", "{\"role\":\"owner\"}"];
    let whose = ["http://agent/v1/vms/ch-1/backend"];
    let said = machine.run("curl", &[&claim[..], &what, &whose].concat()).unwrap();
    assert!(said.contains("no volume `ch-1-root`"), "{said}");

    // A wrong configuration is not tried for ever.
    fs::write(machine.path("/etc/baton/vm/web-2.toml"), "nonsense = 1\n").unwrap();
    let error = machine.start("baton-backend@web-2").unwrap_err();
    assert!(format!("{error:#}").contains("nonsense"), "{error:#}");
    wait_until("it is given up", SOON, || {
        machine.property("baton-backend@web-2", "ActiveState").is_ok_and(|now| now == "failed")
    })
    .unwrap();
}

/// systemd has the socket: the backend starts when the monitor connects, and the socket stays when it dies.
#[test]
fn a_guest_finds_its_disk_at_a_socket_of_systemd() {
    const NAME: &str = "a_guest_finds_its_disk_at_a_socket_of_systemd";
    if skip_without_qemu(NAME) || skip_without_systemd(NAME) {
        return;
    }
    let dir = TestDir::new("socket").unwrap();
    public(dir.path());
    let (data, admin, storage) = storage();
    let vm = one_disk(&[("127.0.0.1:7700", data.to_string())]);
    let vm = vm.replace("socket_path = \"/run/baton/web-1/root.sock\"", "");
    let files = [("baton-storage.toml", storage), ("vm/web-1.toml", vm)];
    let machine = Machine::boot(dir.path(), "socket", &files).unwrap();
    machine.start(STORAGE).unwrap();
    create(&machine, admin, "web-1-root");
    machine.start("baton-backend@web-1.socket").unwrap();
    assert!(machine.main_pid("baton-backend@web-1").is_err(), "nobody has asked yet");
    public(&dir.join("guest"));
    let (_qemu, mut probe) = boot(&machine, &dir.join("guest"), "/run/baton/web-1-root.sock");
    goes_on_after_a_kill(&machine, &mut probe);
}

/// Ceph's client library works within what a backend's unit allows, with a keyring that its user may read.
#[test]
fn a_guest_works_on_ceph_from_a_unit() {
    const NAME: &str = "a_guest_works_on_ceph_from_a_unit";
    if skip_without_qemu(NAME) || skip_without_systemd(NAME) || skip_without_ceph(NAME) {
        return;
    }
    let dir = TestDir::new("ceph-unit").unwrap();
    public(dir.path());
    let ceph = Ceph::start(dir.path()).unwrap();
    ceph.create_image("v", 64 << 20).unwrap();
    ceph.add_user("vm", "profile rbd", "profile rbd pool=rbd").unwrap();
    let (conf, own) = (fs::read_to_string(ceph.conf()).unwrap(), dir.path().to_str().unwrap());
    // What a client needs of it: nothing that lies in the cluster's own directory.
    let global = conf.split("\n[").next().unwrap();
    let global: Vec<&str> = global.lines().filter(|line| !line.contains(own)).collect();
    let conf = format!("{}\nkeyring = /etc/baton/$name.keyring\n", global.join("\n"));
    let key = fs::read_to_string(dir.join("ceph/client.vm.keyring")).unwrap();
    let volume = "rbd://rbd/v?conf=/etc/baton/ceph.conf&id=vm";
    let vm = one_disk(&[("baton://127.0.0.1:7700/web-1-root", volume.to_owned())]);
    let files = [("ceph.conf", conf), ("client.vm.keyring", key), ("vm/web-1.toml", vm)];
    let machine = Machine::boot(dir.path(), "ceph", &files).unwrap();
    machine.start("baton-backend@web-1").unwrap();
    public(&dir.join("guest"));
    let (_qemu, mut probe) = boot(&machine, &dir.join("guest"), "/run/baton/web-1/root.sock");
    goes_on_after_a_kill(&machine, &mut probe);
}

/// The coordinator's user may not read the key, and systemd passes it.
#[test]
fn a_coordinator_has_its_key_from_systemd() {
    const NAME: &str = "a_coordinator_has_its_key_from_systemd";
    if skip_without_systemd(NAME) {
        return;
    }
    let dir = TestDir::new("key").unwrap();
    let Trust::Certificates(tls) = Trust::certificates(dir.path()).unwrap() else { unreachable!() };
    let pem = |name: &str| fs::read_to_string(tls.join(name)).unwrap();
    let own = free_port().unwrap().to_string();
    let key = "key = \"/run/credentials/baton-coordinator.service/key\"";
    let pairs = [
        ("#: listen = \"127.0.0.1:7720\"", format!("listen = \"{own}\"")),
        ("#: [tls]", "[tls]".to_owned()),
        ("#: ca =", "ca =".to_owned()),
        ("#: cert =", "cert =".to_owned()),
        ("#: key =", format!("{key} #")),
        ("http://127.0.0.1:77", "https://127.0.0.1:77".to_owned()),
        ("admin = \"https:", "admin = \"http:".to_owned()),
    ];
    let files = [
        ("baton-coordinator.toml", example("baton-coordinator.toml", &pairs)),
        ("tls/ca.pem", pem("ca.pem")),
        ("tls/coordinator-coordinator.pem", pem("coordinator-coordinator.pem")),
        ("tls/coordinator-coordinator.key", pem("coordinator-coordinator.key")),
    ];
    let machine = Machine::boot(dir.path(), "key", &files).unwrap();
    machine.run("chmod", &["600", "/etc/baton/tls/coordinator-coordinator.key"]).unwrap();
    machine.uncomment("baton-coordinator", "LoadCredential=").unwrap();
    machine.start("baton-coordinator").unwrap();
    assert_unprivileged(&machine, "baton-coordinator");
    assert!(machine.journal().contains(&format!("listening api={own}")), "{}", machine.journal());
}

/// A VM host: its agent keeps the backend of a VM and drives its QEMU.
struct Host {
    machine: Machine,
    dir: PathBuf,
    guest: GuestConfig,
    files: GuestFiles,
}

impl Host {
    fn boot(
        dir: &Path,
        name: &str,
        agent: SocketAddr,
        volume: &str,
        more: &[(&str, String)],
    ) -> Self {
        let own = dir.join(name);
        fs::create_dir_all(&own).unwrap();
        let guest = GuestConfig {
            queues: 2,
            extra_args: ["-qmp", "unix:/run/baton/vmm/web-1.qmp,server=on,wait=off"]
                .map(str::to_owned)
                .into(),
            ..GuestConfig::new(Path::new("/run/baton/web-1/root.sock"))
        };
        let files = guest_files(&own);
        let mut command = vec![system_program("qemu-system-x86_64").unwrap().display().to_string()];
        let incoming = GuestConfig { incoming: true, ..guest.clone() };
        command.extend(incoming.arguments(&own, &files));
        let pairs = [
            ("host = \"host-a\"", format!("host = \"{name}\"")),
            ("#: address = \"unix:/run/baton/agent.sock\"", format!("address = \"{agent}\"")),
            ("#: hang_ms = 5000", "hang_ms = 1000".to_owned()),
            (
                "#: incoming_command = [\"/usr/bin/qemu-system-x86_64\"",
                format!("incoming_command = {} #", json!(command)),
            ),
            ("\"baton://127.0.0.1:7700/web-1-root\"", format!("\"{volume}\"")),
            ("#: num_queues = 4", "num_queues = 2".to_owned()),
        ];
        let mut files_there = more.to_vec();
        files_there.push(("baton-agent.toml", example("baton-agent.toml", &pairs)));
        let machine = Machine::boot(dir, name, &files_there).unwrap();
        machine.start(AGENT).unwrap();
        Self { machine, dir: own, guest, files }
    }

    fn start_guest(&self) -> (Daemon, Probe) {
        let mut qemu = self.machine.command("qemu-system-x86_64").unwrap();
        qemu.args(self.guest.arguments(&self.dir, &self.files));
        let mut qemu = Daemon::start_command(&self.dir, "guest", qemu).unwrap();
        qemu.wait_socket(&self.dir.join("guest.probe"), BOOT_TIMEOUT).unwrap();
        let probe = self.probe();
        probe.wait_ready(BOOT_TIMEOUT).unwrap();
        (qemu, probe)
    }

    fn probe(&self) -> Probe {
        Probe::connect(&self.dir.join("guest.probe"), &self.dir.join("guest.probe.log")).unwrap()
    }

    /// The guest goes on here.
    fn goes_on(&self, probe: &Probe, when: &str) {
        probe.wait_progress(100, SOON).unwrap_or_else(|error| {
            panic!("the guest stands still {when}: {error:#}\n{}", self.machine.journal())
        });
    }

    fn signal(&self, unit: &str, signal: &str) -> i32 {
        let pid = self.machine.main_pid(unit).unwrap();
        self.machine.run("kill", &[signal, &pid.to_string()]).unwrap();
        pid
    }

    /// Another process of this unit than that one.
    fn wait_another(&self, unit: &str, pid: i32) {
        let another = || self.machine.main_pid(unit).is_ok_and(|now| now != pid);
        wait_until(&format!("{unit} is started again"), SOON, another)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.machine.journal()));
    }
}

/// Two hosts, of which the first has the coordinator, too, and a storage server, if that is where the volume is.
struct Pair {
    hosts: [Host; 2],
    coordinator: String,
    agents: [SocketAddr; 2],
}

impl Pair {
    fn boot(dir: &Path, elsewhere: Option<&str>) -> Self {
        let (data, admin, storage) = storage();
        let [coordinator, a, b] = [(); 3].map(|()| free_port().unwrap());
        let listens = |host: &str| {
            format!("migration_uri = \"unix:{}\"", dir.join(host).join("in").display())
        };
        let second = format!("agent = \"http://{b}\"\n{}", listens(HOSTS[1]));
        let pairs = [
            ("#: listen = \"127.0.0.1:7720\"", format!("listen = \"{coordinator}\"")),
            ("127.0.0.1:7710", a.to_string()),
            ("#: migration_uri = \"tcp:10.0.0.1:49152\"", listens(HOSTS[0])),
            ("agent = \"http://127.0.0.1:7711\"", second),
            ("127.0.0.1:7700", data.to_string()),
            ("127.0.0.1:7701", admin.to_string()),
        ];
        let files = [
            ("baton-storage.toml", storage),
            ("baton-coordinator.toml", example("baton-coordinator.toml", &pairs)),
        ];
        let own = format!("baton://{data}/web-1-root");
        let volume = elsewhere.unwrap_or(&own);
        let hosts = [
            Host::boot(dir, HOSTS[0], a, volume, &files),
            Host::boot(dir, HOSTS[1], b, volume, &[]),
        ];
        let first = &hosts[0].machine;
        first.start(STORAGE).unwrap();
        if elsewhere.is_none() {
            create(first, admin, "web-1-root");
        }
        first.start("baton-coordinator").unwrap();
        let agents = [a, b];
        let claim = format!("http://{a}/v1/vms/{VM}/backend");
        call("PUT", &claim, Some(&json!({"role": "owner"})))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", first.journal()));
        Self { hosts, coordinator: format!("http://{coordinator}"), agents }
    }

    fn migrate(&self, to: usize) {
        let args = ["vm", "migrate", VM, "--to", HOSTS[to], "--coordinator", &self.coordinator];
        if let Err(error) = self.hosts[0].machine.run("baton", &args) {
            let journals = self.hosts.each_ref().map(|host| host.machine.journal());
            panic!("{error:#}\n{}", journals.join("\n----\n"));
        }
    }
}

/// There and back, with every unit of it killed on the way.
fn moves_there_and_back(pair: &Pair) {
    let [a, b] = &pair.hosts;
    let (_guest, mut probe) = a.start_guest();
    probe.ask("load threads=2 depth=4 flush-every=50").unwrap();
    a.goes_on(&probe, "at first");
    assert_unprivileged(&a.machine, BACKEND);
    assert_eq!(sees(&a.machine, BACKEND), ["launch", VM]);

    let pid = a.signal(BACKEND, "-KILL");
    a.wait_another(BACKEND, pid);
    a.goes_on(&probe, "after its backend was killed");
    assert!(a.machine.path("/run/baton/vmm/web-1.qmp").exists(), "the monitor's socket is gone");
    let backend = a.machine.main_pid(BACKEND).unwrap();
    a.machine.systemctl(&["restart", AGENT]).unwrap();
    a.goes_on(&probe, "after a restart of its agent");
    assert_eq!(a.machine.main_pid(BACKEND).unwrap(), backend, "a backend outlives its agent");

    pair.migrate(1);
    let mut probe = b.probe();
    probe.resynchronise().unwrap();
    b.goes_on(&probe, "where it was moved to");
    assert_eq!(a.machine.property(BACKEND, "ActiveState").unwrap(), "inactive");

    // What comes after it is no destination of a handoff any more.
    let pid = b.signal(BACKEND, "-KILL");
    b.wait_another(BACKEND, pid);
    b.goes_on(&probe, "after its backend was killed where it was moved to");
    // Both at once: the next agent finds neither.
    let (agent, backend) = (b.signal(AGENT, "-KILL"), b.signal(BACKEND, "-KILL"));
    b.wait_another(AGENT, agent);
    b.wait_another(BACKEND, backend);
    b.goes_on(&probe, "after agent and backend were killed");
    // It hangs.
    let pid = b.signal(BACKEND, "-STOP");
    b.wait_another(BACKEND, pid);
    b.goes_on(&probe, "after its backend hung");

    pair.migrate(0);
    let mut probe = a.probe();
    probe.resynchronise().unwrap();
    a.goes_on(&probe, "back home");
    let totals = probe.stop_load().unwrap();
    assert!(totals.writes >= 100, "{totals}");
    let stop = format!("http://{}/v1/vms/{VM}/backend", pair.agents[0]);
    call("DELETE", &stop, None).unwrap();
    for host in &pair.hosts {
        assert_eq!(host.machine.property(BACKEND, "ActiveState").unwrap(), "inactive");
    }
}

#[test]
fn a_guest_moves_between_hosts_whose_init_is_systemd() {
    const NAME: &str = "a_guest_moves_between_hosts_whose_init_is_systemd";
    if skip_without_qemu(NAME) || skip_without_systemd(NAME) {
        return;
    }
    let dir = TestDir::new("inits").unwrap();
    moves_there_and_back(&Pair::boot(dir.path(), None));
}

/// Without a fence nobody may start a backend behind the agent's back.
#[test]
fn a_guest_on_nbd_moves_between_hosts_whose_init_is_systemd() {
    const NAME: &str = "a_guest_on_nbd_moves_between_hosts_whose_init_is_systemd";
    if skip_without_qemu(NAME) || skip_without_systemd(NAME) || skip_without_program(NAME, "nbdkit")
    {
        return;
    }
    let dir = TestDir::new("inits-nbd").unwrap();
    let server = free_port().unwrap();
    let (ip, port) = (server.ip().to_string(), server.port().to_string());
    let args = ["--foreground", "--ipaddr", &ip, "--port", &port, "memory", "64M"];
    let nbdkit = system_program("nbdkit").unwrap();
    let _nbdkit = Daemon::start(dir.path(), "nbdkit", &nbdkit, args).unwrap();
    moves_there_and_back(&Pair::boot(dir.path(), Some(&format!("nbd://{server}/"))));
}
