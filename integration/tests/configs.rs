//! The files in `configs/` can be used as they are: the daemons start from them, systemd accepts the units, and the
//! descriptor says what the program says of itself.

use baton_integration::baton::READY_TIMEOUT;
use baton_integration::daemon::Daemon;
use baton_integration::workspace::{TestDir, program};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

fn read(name: &str) -> String {
    fs::read_to_string(configs().join(name)).unwrap()
}

/// The example with every optional key switched on, so that each is known to exist and its value to be good.
fn all_keys(text: &str) -> String {
    let lines = text.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line));
    let all: String = lines.flat_map(|line| [line, "\n"]).collect();
    assert!(all.len() < text.len(), "optional keys are shown as `#: key = value`");
    all
}

/// Replaces paths and addresses of the example by ones that a test may use.
fn replaced(text: &str, pairs: &[(&str, String)]) -> String {
    pairs.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the example has no {from} any more");
        text.replace(from, to)
    })
}

/// An authority, and certificates for whom the examples name.
fn make_certificates(dir: &str) {
    let made = Command::new(program("baton-agent").unwrap())
        .args(["dev-ca", "--host", "host-a", "--coordinator", "coordinator", "--operator", "me"])
        .args(["--dir", dir])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[test]
fn a_backend_starts_from_the_example_of_a_vm() {
    let dir = TestDir::new("configs").unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    for disk in ["web-1-root", "shared-data"] {
        File::create(dir.join(disk)).unwrap().set_len(1 << 20).unwrap();
    }
    let example = read("vm.toml");
    for text in [example.clone(), all_keys(&example).replace("\"kvm\"", &own_group())] {
        let text = replaced(
            &text,
            &[
                ("baton://127.0.0.1:7700", format!("file://{}", dir.path().display())),
                ("/run/baton/web-1/", at("")),
            ],
        );
        let file = dir.join("vm.toml");
        fs::write(&file, text).unwrap();
        let args = ["--config".as_ref(), file.as_os_str()];
        let program = program("baton-backend").unwrap();
        let mut daemon = Daemon::start(dir.path(), "backend", &program, args).unwrap();
        for disk in ["root", "shared-data"] {
            let listening = format!("listening socket={}", at(&format!("{disk}.sock")));
            daemon.wait_line(&listening, READY_TIMEOUT).unwrap();
        }
        assert!(daemon.terminate(READY_TIMEOUT).unwrap().success());
    }
}

/// The only group that anybody may give a socket to.
fn own_group() -> String {
    format!("\"{}\"", nix::unistd::getegid())
}

#[test]
fn a_storage_server_starts_from_its_example() {
    let dir = TestDir::new("configs").unwrap();
    let text = all_keys(&read("baton-storage.toml"));
    let text = replaced(
        &text,
        &[
            ("127.0.0.1:7700", "127.0.0.1:0".to_owned()),
            ("127.0.0.1:7701", "127.0.0.1:0".to_owned()),
            ("/run/baton-storage/data.sock", dir.join("s").display().to_string()),
            ("/var/lib/baton/storage", dir.join("data").display().to_string()),
        ],
    );
    let file = dir.join("baton-storage.toml");
    fs::write(&file, text).unwrap();
    let args = ["--config".as_ref(), file.as_os_str()];
    let program = program("baton-storage").unwrap();
    let mut daemon = Daemon::start(dir.path(), "storage", &program, args).unwrap();
    daemon.wait_line("listening data=127.0.0.1:", READY_TIMEOUT).unwrap();
    assert!(daemon.terminate(READY_TIMEOUT).unwrap().success());
}

#[test]
fn an_agent_starts_from_its_example() {
    let dir = TestDir::new("configs").unwrap();
    let program = program("baton-agent").unwrap();
    let run = |daemon: &str, args: &[&str]| {
        let mut daemon = Daemon::start(dir.path(), daemon, &program, args).unwrap();
        daemon.wait_line("listening api=unix:", READY_TIMEOUT).unwrap();
        assert!(daemon.terminate(READY_TIMEOUT).unwrap().success());
    };
    let at = |name: &str| dir.join(name).display().to_string();
    make_certificates(&at("tls"));
    let text = replaced(
        &all_keys(&read("baton-agent.toml")),
        &[
            ("/run/baton/agent.sock", at("agent.sock")),
            ("/etc/baton/tls", at("tls")),
            ("/var/lib/baton/agent", at("state")),
            ("\"/run/baton\"", format!("\"{}\"", at("run"))),
        ],
    );
    let file = at("baton-agent.toml");
    fs::write(&file, text).unwrap();
    run("agent", &["--config", &file]);
}

#[test]
fn a_coordinator_starts_from_its_example() {
    let dir = TestDir::new("configs").unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    make_certificates(&at("tls"));
    let text = replaced(
        &all_keys(&read("baton-coordinator.toml")),
        &[
            ("127.0.0.1:7720", "127.0.0.1:0".to_owned()),
            ("/etc/baton/tls", at("tls")),
            ("/var/lib/baton/coordinator", at("")),
            ("die_after_write = 1", "die_after_write = 1000".to_owned()),
        ],
    );
    coordinator_says(&dir, &text, &["listening api=127.0.0.1:"]);
}

/// A coordinator with this configuration says these things, and ends when it is told to.
fn coordinator_says(dir: &TestDir, text: &str, lines: &[&str]) {
    let file = dir.join("baton-coordinator.toml").display().to_string();
    fs::write(&file, text).unwrap();
    let program = program("baton-coordinator").unwrap();
    let mut daemon =
        Daemon::start(dir.path(), "coordinator", &program, ["--config", &file]).unwrap();
    for line in lines {
        daemon.wait_line(line, READY_TIMEOUT).unwrap();
    }
    assert!(daemon.terminate(READY_TIMEOUT).unwrap().success());
}

/// Nobody is at its endpoints: it waits for etcd, and says so.
#[test]
fn one_of_several_coordinators_starts_from_its_example() {
    use std::os::unix::fs::PermissionsExt;
    let dir = TestDir::new("configs").unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    make_certificates(&at("tls"));
    fs::write(dir.join("tls/password"), "p").unwrap();
    fs::set_permissions(dir.join("tls/password"), fs::Permissions::from_mode(0o600)).unwrap();
    let text = replaced(
        &all_keys(&read("baton-coordinator-etcd.toml")),
        &[
            ("127.0.0.1:7720", "127.0.0.1:0".to_owned()),
            ("/etc/baton/tls", at("tls")),
            ("/etc/baton/etcd/client.pem", at("tls/coordinator-coordinator.pem")),
            ("/etc/baton/etcd/client.key", at("tls/coordinator-coordinator.key")),
            ("/etc/baton/etcd", at("tls")),
            // Where nobody listens.
            ("127.0.0.1:2379", "127.0.0.1:1".to_owned()),
            ("127.0.0.1:22379", "127.0.0.1:2".to_owned()),
            ("127.0.0.1:32379", "127.0.0.1:3".to_owned()),
        ],
    );
    coordinator_says(&dir, &text, &["waiting for etcd", "role=follower"]);
}

/// The file printed in docs/operations.md, with nothing but its paths and its own address replaced.
#[test]
fn a_coordinator_starts_from_the_file_in_the_manual() {
    let manual = fs::read_to_string(configs().join("../docs/operations.md")).unwrap();
    let blocks: Vec<&str> =
        manual.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(blocks.len(), 1, "each printed file needs a test");
    let dir = TestDir::new("manual").unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    let text = replaced(
        blocks[0],
        &[("127.0.0.1:7720", "127.0.0.1:0".to_owned()), ("/var/lib/baton/coordinator", at(""))],
    );
    coordinator_says(&dir, &text, &["listening api=127.0.0.1:"]);
}

#[test]
fn every_toml_file_has_a_test_here() {
    let mut names: Vec<_> = fs::read_dir(configs())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "baton-agent.toml",
            "baton-coordinator-etcd.toml",
            "baton-coordinator.toml",
            "baton-storage.toml",
            "vm.toml"
        ]
    );
}

/// Whoever starts a backend, it may do the same, from the first of these lines to the end of the section.
#[test]
fn both_units_of_a_backend_are_confined_alike() {
    let confined = |unit: &str| {
        let text = read(&format!("systemd/{unit}@.service"));
        let (_, rest) = text.split_once("\nNoNewPrivileges=yes\n").unwrap();
        rest.split("\n[Install]").next().unwrap().trim().to_owned()
    };
    let alone = confined("baton-backend");
    assert!(alone.lines().count() > 15);
    assert_eq!(alone, confined("baton-agent-backend"));
}

#[test]
fn systemd_accepts_the_units() {
    let dir = TestDir::new("configs").unwrap();
    let mut units = Vec::new();
    for entry in fs::read_dir(configs().join("systemd")).unwrap() {
        let path = entry.unwrap().path();
        // An instance, so that %i is expanded, of a program that exists.
        let name = path.file_name().unwrap().to_str().unwrap().replace('@', "@web-1");
        let bin = program("baton-backend").unwrap();
        let bin = format!("{}/", bin.parent().unwrap().display());
        fs::write(dir.join(&name), fs::read_to_string(&path).unwrap().replace("/usr/bin/", &bin))
            .unwrap();
        units.push(dir.join(&name));
    }
    assert_eq!(units.len(), 6, "{units:?}");
    let Ok(output) = Command::new("systemd-analyze").arg("verify").args(&units).output() else {
        eprintln!("**** SKIPPED: systemd_accepts_the_units: there is no systemd-analyze ****");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn systemd_passes_the_socket() {
    let dir = TestDir::new("configs").unwrap();
    File::create(dir.join("disk")).unwrap().set_len(1 << 20).unwrap();
    let socket = dir.join("root.sock");
    let config =
        format!("[[disk]]\nname = \"root\"\nvolume = \"file://{}\"\n", dir.join("disk").display());
    fs::write(dir.join("vm.toml"), config).unwrap();
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--listen").arg(&socket).arg("--fdname=root");
    command.arg(program("baton-backend").unwrap()).arg("--config").arg(dir.join("vm.toml"));
    if Command::new("systemd-socket-activate").arg("--version").output().is_err() {
        eprintln!(
            "**** SKIPPED: systemd_passes_the_socket: there is no systemd-socket-activate ****"
        );
        return;
    }
    let mut daemon = Daemon::start_command(dir.path(), "activated", command).unwrap();
    daemon.wait_socket(&socket, READY_TIMEOUT).unwrap();
    // The backend starts when somebody connects, and serves the one who did.
    let mut front_end = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    daemon.wait_line("listening socket=systemd", READY_TIMEOUT).unwrap();
    let features = ask_features(&mut front_end);
    let version_1 = 1_u64 << 32;
    assert_eq!(features & version_1, version_1, "{features:#x}");
    assert!(daemon.terminate(READY_TIMEOUT).unwrap().success());
    assert!(socket.exists(), "the socket is systemd's, who keeps it");
}

/// VHOST_USER_GET_FEATURES, version 1, no payload.
fn ask_features(front_end: &mut std::os::unix::net::UnixStream) -> u64 {
    use std::io::{Read, Write};
    let request: Vec<u8> = [1_u32, 1, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    front_end.write_all(&request).unwrap();
    front_end.set_read_timeout(Some(READY_TIMEOUT)).unwrap();
    let mut reply = [0; 20];
    front_end.read_exact(&mut reply).unwrap();
    u64::from_le_bytes(reply[12..].try_into().unwrap())
}

#[test]
fn the_descriptor_agrees_with_the_program() {
    let descriptor: Value = serde_json::from_str(&read("50-baton-blk.json")).unwrap();
    let output =
        Command::new(program("baton-backend").unwrap()).arg("--print-capabilities").output();
    let said: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    assert_eq!(descriptor["type"], said["type"]);
    assert_eq!(descriptor["binary"], "/usr/bin/baton-backend");
}
