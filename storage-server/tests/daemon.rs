//! The program: flags, exit codes, signals, and what a killed server leaves.

mod common;

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use baton_protocol::{Event, EventKind, Opcode, QueueId, Status};
use common::{Client, Daemon, create, daemon_command, greeting, http, json, wait_for};
use nix::sys::signal::Signal;

const SIZE: u64 = 64 << 20;

/// Runs to its end; exit code and what it said.
fn fails(mut command: Command) -> (i32, String) {
    let output = command.stdin(Stdio::null()).output().expect("it runs");
    let text = String::from_utf8(output.stderr).expect("text");
    (output.status.code().expect("an exit code"), text)
}

#[test]
fn each_mistake_is_one_sentence_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("a directory");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, "[pool]\ndata_dirr = \"x\"\n").expect("written");
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "").expect("written");
    let (file, plain) = (file.to_str().expect("text"), plain.to_str().expect("text"));
    for (flags, code, names) in [
        (vec!["--listen", &taken], 1, taken.as_str()),
        (vec!["--admin-listen", &taken], 1, "admin"),
        (vec!["--listen", "nonsense"], 2, "nonsense"),
        (vec!["--pool-size", "7Q"], 2, "7Q"),
        (vec!["--workers", "0"], 2, "1 to 64"),
        (vec!["--poll-us", "101"], 2, "from 0 to 100"),
        (vec!["--log-level", "loud"], 2, "loud"),
        (vec!["--config", "/nowhere/at-all.toml"], 2, "/nowhere/at-all.toml"),
        (vec!["--config", file], 2, "data_dirr"),
        (vec!["--listen-unix", plain], 1, "not a socket"),
        (vec!["--listen-unix", "/nowhere/at-all.sock"], 1, "/nowhere/at-all.sock"),
        (vec!["--no-such-flag"], 2, "--no-such-flag"),
    ] {
        let mut command = daemon_command(dir.path());
        // The last one wins is clap's error; so only flags not given yet, or replaced.
        if flags.contains(&"--listen") || flags.contains(&"--admin-listen") {
            command = Command::new(env!("CARGO_BIN_EXE_baton-storage"));
            command.arg("--data-dir").arg(dir.path().join("data"));
            let other = if flags.contains(&"--listen") { "--admin-listen" } else { "--listen" };
            command.args([other, "127.0.0.1:0"]);
        }
        command.args(&flags);
        let (got, text) = fails(command);
        assert_eq!(got, code, "{flags:?}: {text}");
        assert!(text.contains(names), "{flags:?}: {text}");
        assert!(!dir.path().join("data").exists(), "{flags:?} left a directory");
    }
    let (code, text) = fails(Command::new(env!("CARGO_BIN_EXE_baton-storage")));
    assert_eq!(code, 2);
    assert!(text.contains("--data-dir"), "{text}");
}

#[test]
fn a_directory_in_use_or_unusable_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = Daemon::start(dir.path());
    let (code, text) = fails(daemon_command(dir.path()));
    assert_eq!(code, 1);
    assert!(text.contains("in use") && text.contains("data"), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    drop(running);
    let under_a_file = dir.path().join("file");
    std::fs::write(&under_a_file, "").expect("written");
    let (code, text) = fails(daemon_command(&under_a_file));
    assert_eq!(code, 1);
    assert!(text.contains("file/data"), "{text}");
}

/// What only a busy connection needs, a pipe among it, is given back when it has done nothing for a while.
#[test]
fn an_idle_connection_holds_nothing_that_large_writes_needed() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = Daemon::start(dir.path());
    create(server.admin, "d", SIZE);
    let mut owner = Client::welcomed(server.data, "d", "h", 1);
    let fds = format!("/proc/{}/fd", server.child.id());
    let pipes = || {
        let links = std::fs::read_dir(&fds).expect("its own child").flatten();
        let named = links.filter_map(|link| std::fs::read_link(link.path()).ok());
        named.filter(|name| name.to_string_lossy().starts_with("pipe:")).count()
    };
    let before = pipes();
    for _ in 0..2 {
        wait_for("both ends of a pipe", || {
            assert_eq!(owner.write(0, &vec![1; 128 << 10]), Status::Ok);
            pipes() == before + 2
        });
        wait_for("the pipe is closed", || pipes() == before);
    }
}

/// Kill -9 loses nothing that was acknowledged, and nobody's place.
#[test]
fn a_killed_server_comes_back_with_data_and_owner() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = Daemon::start(dir.path());
    create(first.admin, "d", SIZE);
    let mut owner = Client::welcomed(first.data, "d", "h", 1);
    for n in 0..64u8 {
        assert_eq!(owner.write(u64::from(n) * (1 << 19), &[n; 8192]), Status::Ok);
    }
    assert_eq!(owner.call(Opcode::Discard, 0, 1 << 20).0, Status::Ok);
    first.kill();

    let second = Daemon::start(dir.path());
    let (status, text) =
        Client::greet(second.data, &greeting("d", "thief", 2)).err().expect("owned");
    assert_eq!(status, Status::NotOwner, "{text}");
    let mut hello = greeting("d", "h", 1);
    (hello.epoch, hello.resume_from) = (1, owner.seq + 1);
    let (mut again, welcome) = Client::greet(second.data, &hello).expect("rejoins with its epoch");
    assert_eq!(welcome.epoch.0, 1);
    for n in 0..64u8 {
        let expected = if n < 2 { 0 } else { n };
        assert_eq!(again.read(u64::from(n) * (1 << 19), 8192), [expected; 8192], "{n}");
    }
}

/// An epoch that was given is never given to another, whenever the server dies.
#[test]
fn epochs_survive_kills() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut last = 0;
    for round in 0..5u64 {
        let daemon = Daemon::start(dir.path());
        if round == 0 {
            create(daemon.admin, "d", SIZE);
        }
        let mut stale = greeting("d", "h", 100 + round - u64::from(round > 0));
        stale.epoch = last;
        let client = Client::welcomed(daemon.data, "d", "h", 200 + round);
        assert!(client.epoch.0 > last, "round {round}");
        if round > 0 {
            let refused = Client::greet(daemon.data, &stale).err().expect("fenced");
            assert_eq!(refused.0, Status::StaleEpoch);
        }
        last = client.epoch.0;
        daemon.kill();
    }
}

#[test]
fn sigterm_tells_clients_and_ends_with_zero() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let dir = tempfile::tempdir().expect("a directory");
        let mut daemon = Daemon::start(dir.path());
        create(daemon.admin, "d", SIZE);
        let mut hello = greeting("d", "h", 1);
        hello.queue = QueueId::CONTROL.0;
        let (mut control, welcome) = Client::greet(daemon.data, &hello).expect("welcomed");
        control.send(Opcode::Event, welcome.event_id, 0);
        (hello.queue, hello.epoch) = (0, 1);
        let (mut queue, _) = Client::greet(daemon.data, &hello).expect("welcomed");
        let data = daemon.data;
        let acknowledged = std::thread::spawn(move || {
            let mut done = 0u64;
            loop {
                let sent = queue.header(Opcode::Write, done % 1000 * 4096, 4096);
                let mut header = sent;
                header.payload_len = 4096;
                let bytes = [&header.encode()[..], &[(done % 251).to_le_bytes()[0]; 4096]].concat();
                if std::io::Write::write_all(&mut queue.stream, &bytes).is_err() {
                    return done;
                }
                match queue.try_reply() {
                    Ok((reply, _)) if reply.status == Status::Ok => done += 1,
                    _ => return done,
                }
            }
        });
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        daemon.signal(signal);
        let (_, body) = control.reply();
        assert_eq!(Event::decode(&body).expect("an event").kind, EventKind::GoingAway);
        assert!(control.is_closed());
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(begun.elapsed() < Duration::from_secs(15), "bounded");
        assert!(std::net::TcpStream::connect(data).is_err(), "nobody listens");
        let done = acknowledged.join().expect("no panic");
        assert!(done > 0, "there was load");
        // Everything acknowledged is there.
        let again = Daemon::start(dir.path());
        let mut owner = Client::welcomed(again.data, "d", "h", 2);
        for n in done.saturating_sub(1000)..done {
            let expected = (n % 251).to_le_bytes()[0];
            assert_eq!(
                owner.read(n % 1000 * 4096, 4096)[..16],
                [expected; 16],
                "write {n} of {done}"
            );
        }
    }
}

#[test]
fn an_idle_client_does_not_delay_the_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut daemon = Daemon::start(dir.path());
    create(daemon.admin, "d", SIZE);
    let owner = Client::welcomed(daemon.data, "d", "h", 1);
    let silent = Client::connect(daemon.data);
    let begun = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    drop((owner, silent));
}

#[test]
fn a_unix_socket_serves_and_is_replaced_after_a_kill() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s.sock");
    let start = || {
        let mut command = daemon_command(dir.path());
        command.arg("--listen-unix").arg(&path);
        Daemon::from(command)
    };
    let first = start();
    assert!(first.ready.contains(&format!("unix={}", path.display())), "{}", first.ready);
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o660);
    create(first.admin, "d", SIZE);
    let hello = |socket: &mut UnixStream| {
        use std::io::{Read, Write};
        socket.write_all(&greeting("d", "h", 1).bytes()).expect("sent");
        let mut welcome = [0; 112];
        socket.read_exact(&mut welcome).expect("welcomed");
        baton_protocol::Welcome::decode(&welcome[32..]).expect("a WELCOME")
    };
    let mut socket = UnixStream::connect(&path).expect("it listens");
    assert_eq!(hello(&mut socket).size_bytes, SIZE);
    let (_, text) = http(first.admin, "GET", "/v1/volumes/d", "");
    let peer = json(&text)["sessions"][0]["peer"].as_str().expect("a peer").to_owned();
    assert_eq!(peer, format!("unix pid {}", std::process::id()));
    // A second server may not take the path of a living one.
    let other = tempfile::tempdir().expect("a directory");
    let mut command = daemon_command(other.path());
    command.arg("--listen-unix").arg(&path);
    let (code, text) = fails(command);
    assert!(code == 1 && text.contains("in use"), "{text}");
    first.kill();
    let mut second = start();
    let mut socket = UnixStream::connect(&path).expect("the stale socket was replaced");
    assert_eq!(hello(&mut socket).size_bytes, SIZE);
    second.signal(Signal::SIGTERM);
    assert_eq!(second.wait().code(), Some(0));
    assert!(!path.exists(), "removed at a clean end");
}

#[test]
fn logs_can_be_json() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut command = daemon_command(dir.path());
    command.args(["--log-format", "json", "--listen-unix", "/nowhere/at-all.sock"]);
    let (code, _) = fails(command);
    assert_eq!(code, 1);
    let mut command = daemon_command(dir.path());
    command.args(["--log-format", "json", "--no-io-uring"]);
    let mut daemon = Daemon::from(command);
    create(daemon.admin, "d", SIZE);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

/// Makes every `io_uring_setup` of the command fail, as container runtimes do.
fn forbid_io_uring(command: &mut Command) {
    let op = |code: u32, k: u32| libc::sock_filter {
        code: u16::try_from(code).expect("a code"),
        jt: 0,
        jf: 0,
        k,
    };
    let setup = u32::try_from(libc::SYS_io_uring_setup).expect("a number");
    let eperm = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).expect("a number");
    let program = [
        // The number of the system call is the first word of what a filter sees.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { jf: 1, ..op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, setup) },
        op(libc::BPF_RET | libc::BPF_K, eperm),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let mut program = program;
        let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        // SAFETY: two system calls of the child, the second of which reads the four entries.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
                    == 0
        };
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: it only makes system calls, which is allowed after a fork.
    unsafe { command.pre_exec(install) };
}

#[test]
fn where_io_uring_is_forbidden_threads_read_and_it_is_said_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("config.toml");
    let text = "[danger_zone]\nenabled = true\ncold_reads = true\n";
    std::fs::write(&config, text).expect("written");
    let mut command = daemon_command(dir.path());
    command.arg("--config").arg(&config).args(["--workers", "3"]);
    forbid_io_uring(&mut command);
    let mut daemon = Daemon::from(command);
    create(daemon.admin, "d", SIZE);
    let mut owner = Client::welcomed(daemon.data, "d", "h", 1);
    assert_eq!(owner.write(0, &[5; 8192]), Status::Ok);
    for _ in 0..100 {
        assert_eq!(owner.read(0, 8192), [5; 8192]);
    }
    assert!(common::metric(daemon.admin, "baton_cold_reads_total") >= 100);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    let log = daemon.said();
    let said = log.lines().filter(|line| line.contains("io_uring cannot be used")).count();
    assert_eq!(said, 1, "{log}");
}

/// Slices of the workers of a process, ns; 0 where the kernel (before 6.12) does not tell.
fn worker_slices(pid: u32) -> Vec<u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let tasks = tasks.map(|task| task.expect("a thread").path());
    let is_worker = |task: &std::path::PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("worker-"))
    };
    let slice = |task: std::path::PathBuf| {
        let thread = task.file_name().and_then(|name| name.to_str()?.parse::<libc::pid_t>().ok());
        // SAFETY: zeros are a value of it.
        let mut told: libc::sched_attr = unsafe { std::mem::zeroed() };
        let size = size_of_val(&told);
        let thread = thread.expect("a number");
        // SAFETY: the kernel writes at most `size` bytes.
        let done =
            unsafe { libc::syscall(libc::SYS_sched_getattr, thread, &raw mut told, size, 0) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        told.sched_runtime
    };
    tasks.filter(is_worker).map(slice).collect()
}

#[test]
fn workers_have_a_short_slice_unless_it_is_not_wanted() {
    let dir = tempfile::tempdir().expect("a directory");
    let usual = {
        let mut command = daemon_command(dir.path());
        let server = Daemon::from({
            command.args(["--no-short-slice", "--workers", "2"]);
            command
        });
        // A thread takes its name when it begins, maybe after the server listens.
        let both = || worker_slices(server.child.id()).len() == 2;
        wait_for("two workers", both);
        worker_slices(server.child.id())
    };
    let mut command = daemon_command(dir.path());
    command.args(["--workers", "2"]);
    let server = Daemon::from(command);
    wait_for("short slices", || {
        usual.contains(&0) || worker_slices(server.child.id()) == [300_000; 2]
    });
    assert!(!usual.contains(&300_000), "{usual:?}");
}
