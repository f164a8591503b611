//! The program as its starters know it: flags, sockets, readiness, signals, memory, and one sentence per mistake.

use crate::support::{A_WHILE, DISK_BYTES, SOON, Stack, disk, image, say};
use baton_integration::baton::wait_until;
use baton_integration::blk::{OK, Request};
use baton_integration::daemon::Daemon;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::vhost_user::{Channel, request};
use baton_integration::workspace::{TestDir, program};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Where a passed descriptor is put: behind all that the test itself has open.
const PASSED: RawFd = 60;

fn backend() -> Command {
    Command::new(program("baton-backend").unwrap())
}

fn output(args: &[&str]) -> Output {
    backend().args(args).output().unwrap()
}

/// Has the child find `fd` at [`PASSED`].
fn pass(command: &mut Command, fd: &impl AsRawFd) {
    let fd = fd.as_raw_fd();
    // SAFETY: dup2 is async-signal-safe; the copy is not closed on exec.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(fd, PASSED) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
}

fn serves(socket: &Path) {
    let mut front_end = RawFrontend::connect(socket, Options::default()).unwrap();
    front_end.queue(0).write(1, &[1; 512]).unwrap();
    assert_eq!(front_end.queue(0).read(1, 512).unwrap(), [1; 512]);
}

#[test]
fn print_capabilities_makes_all_else_void() {
    for args in [
        &["--print-capabilities"][..],
        &["--socket-path", "/no/such", "--print-capabilities", "--nonsense"],
    ] {
        let out = output(args);
        assert!(out.status.success() && out.stderr.is_empty(), "{args:?}");
        let text: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(
            text,
            serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]})
        );
    }
}

#[test]
fn each_mistake_is_one_sentence_and_a_failure() {
    let dir = TestDir::new("err").unwrap();
    let uri = disk(dir.path());
    let path = |name: &str| dir.join(name).display().to_string();
    let (socket, image) = (path("s"), path("disk.img"));
    let write = |name: &str, text: &str| {
        fs::write(dir.join(name), text).unwrap();
        path(name)
    };
    let (plain, empty) = (write("plain", "data"), write("empty", ""));
    let typo = write("typo.toml", &format!("[[disk]]\nname = \"a\"\nvolum = \"{uri}\"\n"));
    let syntax = write("syntax.toml", "[[disk]\n");
    let twice = format!("[[disk]]\nname = \"a\"\nvolume = \"{uri}\"\nsocket_path = \"{socket}\"\n");
    let twice = write("twice.toml", &twice.repeat(2));
    let long = path(&"x".repeat(200));
    let locked = fs::File::options().write(true).open(dir.join("disk.img")).unwrap();
    drop(locked);
    let on = |more: &[&'static str]| -> Vec<String> {
        let base = ["--socket-path", &socket, "--volume", &uri];
        base.iter().chain(more).map(|s| (*s).to_owned()).collect()
    };
    let own = |args: &[&str]| -> Vec<String> { args.iter().map(|s| (*s).to_owned()).collect() };
    let cases: Vec<(i32, Vec<String>, &str)> = vec![
        (2, own(&[]), "--volume"),
        (2, own(&["--volume", &uri]), "--socket-path"),
        (2, own(&["--socket-path", &socket]), "--blk-file"),
        (2, on(&["--nonsense"]), "--nonsense"),
        (2, on(&["--num-queues", "x"]), "--num-queues"),
        (2, on(&["--num-queues", "65"]), "1 to 64"),
        (2, on(&["--queue-size", "100"]), "power of two"),
        (2, on(&["--socket-mode", "9"]), "octal"),
        (2, on(&["--poll-us", "101"]), "poll-us must be 0 to 100 microseconds, not 101"),
        (2, on(&["--fd", "3"]), "--fd"),
        (2, on(&["--log-level", "loud"]), "--log-level"),
        (2, own(&["--config", &path("none.toml")]), "none.toml"),
        (2, own(&["--config", &typo]), "line 3: unknown field `volum`"),
        (2, own(&["--config", &syntax]), "line 1"),
        (2, own(&["--config", &empty]), "[[disk]]"),
        (2, own(&["--config", &twice]), "share the name"),
        (1, own(&["--fd", "59", "--volume", &uri]), "59"),
        (1, own(&["--socket-path", &plain, "--volume", &uri]), "not a socket"),
        (1, own(&["--socket-path", &path("no/such"), "--volume", &uri]), "no/such"),
        (1, own(&["--socket-path", &long, "--volume", &uri]), "xxx"),
        (1, on(&["--socket-group", "no-such-group-here"]), "no-such-group-here"),
        (1, own(&["--socket-path", &socket, "--blk-file", &path("none.img")]), "none.img"),
        (1, own(&["--socket-path", &socket, "--blk-file", &empty]), "smaller than one sector"),
        (1, own(&["--socket-path", &socket, "--blk-file", &path("")]), "not a file"),
        (1, own(&["--socket-path", &socket, "--volume", "gopher://x/y"]), "gopher"),
        (1, own(&["--socket-path", &socket, "--volume", "nonsense"]), "nonsense"),
        (1, own(&["--socket-path", &socket, "--volume", "baton://127.0.0.1:1/v"]), "127.0.0.1:1"),
    ];
    for (code, args, expected) in cases {
        let out = backend().args(&args).output().unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
        // A driver may say on the way what it tries; the last line is the reason.
        let said: Vec<&str> =
            text.lines().filter(|line| line.starts_with("baton-backend: ")).collect();
        assert_eq!(said.len(), 1, "{args:?}: {text}");
        assert!(said[0].contains(expected), "{args:?}: {text}");
        assert_eq!(text.lines().last(), Some(said[0]), "{args:?}: {text}");
        assert!(!dir.join("s").exists(), "{args:?} left a socket behind");
    }
    assert_eq!(fs::read(&plain).unwrap(), b"data");
    assert_eq!(fs::metadata(&image).unwrap().len(), DISK_BYTES);
}

/// Who starts it notes first that it runs, and may be killed before.
#[test]
fn it_begins_when_its_starter_says_so_and_never_without() {
    let dir = TestDir::new("begin").unwrap();
    let (volume, socket) = (disk(dir.path()), dir.join("s"));
    let start = || {
        let socket = socket.display().to_string();
        backend()
            .args(["--wait-for-stdin", "--socket-path", &socket, "--volume", &volume])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut child = start();
    std::thread::sleep(A_WHILE);
    assert!(!socket.exists(), "it has not begun");
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    wait_until("it listens", SOON, || socket.exists()).unwrap();
    serves(&socket);
    child.kill().unwrap();
    child.wait().unwrap();
    fs::remove_file(&socket).unwrap();

    let mut child = start();
    drop(child.stdin.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("nothing was done") && said.lines().count() == 1, "{said}");
    assert!(!socket.exists());
}

#[test]
fn a_socket_and_a_file_have_one_server() {
    let stack = Stack::start(&[]);
    let socket = stack.backend.socket.display().to_string();
    let file = format!("file://{}", image(stack.dir.path()).display());
    let out = output(&["--socket-path", &socket, "--volume", &file]);
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && text.contains("in use"), "{text}");
    let other = stack.dir.join("other.sock").display().to_string();
    let out = output(&["--socket-path", &other, "--volume", &file]);
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && text.contains("in use by another process"), "{text}");
    assert!(!Path::new(&other).exists());
    serves(&stack.backend.socket);
}

#[test]
fn a_listening_descriptor_is_served_for_ever_and_a_connected_one_once() {
    let dir = TestDir::new("fd").unwrap();
    let uri = disk(dir.path());
    let path = dir.join("listen.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = backend();
    command.args(["--fd", &PASSED.to_string(), "--volume", &uri]);
    pass(&mut command, &listener);
    let mut daemon = Daemon::start_command(dir.path(), "listen", command).unwrap();
    daemon.wait_line("listening socket=fd:60", SOON).unwrap();
    serves(&path);
    serves(&path);
    assert!(daemon.terminate(SOON).unwrap().success());
    assert!(path.exists(), "a socket of somebody else stays");

    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = backend();
    command.args(["--fd", &PASSED.to_string(), "--volume", &uri]);
    pass(&mut command, &theirs);
    let mut daemon = Daemon::start_command(dir.path(), "connected", command).unwrap();
    drop(theirs);
    let channel = Channel::new(ours).unwrap();
    channel.send(request::GET_QUEUE_NUM, 0, &[], &[]).unwrap();
    assert_eq!(channel.receive().unwrap().u64().unwrap(), 4);
    drop(channel);
    assert!(daemon.wait_exit(SOON).unwrap().success(), "ends with its only front-end");
}

#[test]
fn several_disks_are_several_sockets_of_one_process() {
    let dir = TestDir::new("conf").unwrap();
    let mut text = String::new();
    for (name, more) in
        [("a", "num_queues = 1"), ("b", "read_only = true"), ("c", "socket_mode = \"600\"")]
    {
        let image = dir.join(&format!("{name}.img"));
        fs::write(&image, vec![name.as_bytes()[0]; 1 << 20]).unwrap();
        let (image, socket) = (image.display(), dir.join(&format!("{name}.sock")));
        text += &format!(
            "[[disk]]\nname = \"{name}\"\nvolume = \"file://{image}\"\nsocket_path = \"{}\"\n{more}\n",
            socket.display()
        );
    }
    fs::write(dir.join("vm.toml"), text).unwrap();
    let mut command = backend();
    command.arg("--config").arg(dir.join("vm.toml"));
    let mut daemon = Daemon::start_command(dir.path(), "vm", command).unwrap();
    daemon.wait_line("c.sock", SOON).unwrap();
    for name in ["a", "b", "c"] {
        let socket = dir.join(&format!("{name}.sock"));
        let mut front_end = RawFrontend::connect(&socket, Options::default()).unwrap();
        assert_eq!(front_end.max_queues(), if name == "a" { 1 } else { 4 });
        assert_eq!(front_end.queue(0).read(0, 512).unwrap(), [name.as_bytes()[0]; 512]);
        let write = Request::Write { sector: 0, data: &[0; 512] };
        assert_eq!(front_end.queue(0).request(&write).unwrap().status == OK, name != "b");
        let mode = fs::metadata(&socket).unwrap().mode() & 0o777;
        assert_eq!(mode, if name == "c" { 0o600 } else { 0o660 });
    }
    assert!(daemon.terminate(SOON).unwrap().success());
    assert!(["a", "b", "c"].iter().all(|name| !dir.join(&format!("{name}.sock")).exists()));
}

#[test]
fn the_socket_has_the_mode_and_group_it_was_told() {
    // A group that this user is in, whoever it is.
    let group = nix::unistd::getgid().to_string();
    let stack = Stack::start(&["--socket-mode", "0606", "--socket-group", &group]);
    let found = fs::metadata(&stack.backend.socket).unwrap();
    assert_eq!((found.permissions().mode() & 0o777, found.gid().to_string()), (0o606, group));
}

#[test]
fn systemd_passes_sockets_by_name_and_hears_when_it_is_ready() {
    let dir = TestDir::new("sd").unwrap();
    let path = dir.join("activated.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let notify = UnixDatagram::bind(dir.join("notify")).unwrap();
    notify.set_read_timeout(Some(SOON)).unwrap();
    // The shell becomes the program, so that the process id is known before the program starts.
    let mut command = Command::new("/bin/bash");
    command
        .args([
            "-c",
            "exec 3<&60 60<&-; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=disk exec \"$0\" \"$@\"",
        ])
        .arg(program("baton-backend").unwrap())
        .args(["--volume", &disk(dir.path())])
        .env("NOTIFY_SOCKET", dir.join("notify"));
    pass(&mut command, &listener);
    let mut daemon = Daemon::start_command(dir.path(), "sd", command).unwrap();
    let mut text = [0; 256];
    let len = notify.recv(&mut text).unwrap();
    assert!(text[..len].starts_with(b"READY=1"));
    serves(&path);
    let begun = Instant::now();
    assert!(daemon.terminate(SOON).unwrap().success());
    let len = notify.recv(&mut text).unwrap();
    assert!(text[..len].starts_with(b"STOPPING=1"), "{:?}", begun.elapsed());
    assert!(path.exists(), "the socket is systemd's");

    let out =
        backend().args(["--volume", &disk(dir.path())]).env("LISTEN_FDS", "1").output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && said.contains("FileDescriptorName"), "{said}");
}

#[test]
fn an_end_under_load_loses_nothing() {
    let mut stack = Stack::start(&["--num-queues", "1"]);
    let mut front_end = stack.front_end();
    for round in 0..5_u8 {
        let data = vec![round + 1; 4096];
        for slot in 0..40 {
            front_end.queue(0).submit(&Request::Write { sector: slot * 8, data: &data }).unwrap();
        }
        front_end.queue(0).kick_anyway().unwrap();
        assert!(stack.backend.daemon.terminate(SOON).unwrap().success());
        assert!(!stack.backend.socket.exists());
        stack.backend.restart().unwrap();
        front_end.reconnect().unwrap();
        for _ in 0..40 {
            let done =
                front_end.queue(0).wait_completion(SOON).unwrap().expect("a request is lost");
            assert_eq!(done.status, OK);
        }
        assert_eq!(front_end.queue(0).wait_completion(A_WHILE).unwrap(), None);
        for slot in 0..40 {
            assert_eq!(front_end.queue(0).read(slot * 8, 4096).unwrap(), data);
        }
    }
}

#[test]
fn it_needs_no_privileges() {
    if !nix::unistd::geteuid().is_root() {
        // Then every other test is this one.
        return;
    }
    let dir = TestDir::new("nobody").unwrap();
    let uri = disk(dir.path());
    let nobody = 65534;
    for path in [dir.path(), &image(dir.path())] {
        chown(path, Some(nobody), Some(nobody)).unwrap();
    }
    // The build directory may be closed to others.
    let copy = dir.join("baton-backend");
    fs::copy(program("baton-backend").unwrap(), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let socket = dir.join("s");
    let mut command = Command::new(copy);
    command.arg("--socket-path").arg(&socket).args(["--volume", &uri]).uid(nobody).gid(nobody);
    let mut daemon = Daemon::start_command(dir.path(), "nobody", command).unwrap();
    daemon.wait_line("listening", SOON).unwrap();
    assert_eq!(fs::metadata(&socket).unwrap().uid(), nobody);
    serves(&socket);
    assert!(daemon.terminate(SOON).unwrap().success());
}

/// Or it would grow, and wait for all processors, when a front-end starts its rings.
#[test]
fn the_table_of_open_files_is_long_enough_from_the_start() {
    let stack = Stack::start(&["--num-queues", "64"]);
    let path = format!("/proc/{}/status", stack.backend.daemon.pid());
    let status = fs::read_to_string(path).unwrap();
    let length = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
    assert!(length.trim().parse::<u64>().unwrap() >= 800, "{length}");
}

#[test]
fn an_idle_disk_costs_no_wake_up_and_little_memory() {
    for poll_us in ["0", "100"] {
        let stack = Stack::start(&["--num-queues", "4", "--poll-us", poll_us]);
        let mut front_end = stack.connect(Options { queues: 4, ..Options::default() });
        // Near enough to each other to be looked for.
        for at in 0..400 {
            front_end.queue(at % 4).write(0, &[1; 4096]).unwrap();
        }
        let daemon = &stack.backend.daemon;
        // The last threads go to sleep.
        std::thread::sleep(A_WHILE);
        let state = || (daemon.context_switches().unwrap(), daemon.cpu_time().unwrap());
        let before = state();
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(state(), before, "something ran, with --poll-us {poll_us}");
        let resident = daemon.resident_bytes().unwrap();
        say(&format!("resident: {} KiB", resident / 1024));
        assert!(resident < 12 << 20, "{resident} bytes");
    }
}

/// Reported, not judged: a busy machine is no fault of the program.
#[test]
fn the_first_request_is_served_soon_after_the_start() {
    let begun = Instant::now();
    let stack = Stack::start(&[]);
    stack.front_end().queue(0).read(0, 4096).unwrap();
    say(&format!("start to first served request: {:?}", begun.elapsed()));
}

#[test]
fn a_killed_process_leaves_a_socket_that_the_next_one_takes_over() {
    let mut stack = Stack::start(&[]);
    stack.backend.daemon.kill().unwrap();
    assert!(stack.backend.socket.exists());
    stack.backend.restart().unwrap();
    serves(&stack.backend.socket);
    wait_until("nothing beside the socket", SOON, || {
        let dir = fs::read_dir(stack.dir.path()).unwrap();
        dir.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains(".sock")).count()
            == 1
    })
    .unwrap();
}

/// What the process says of itself on its control socket, from before the VMM connects to its end.
#[test]
fn the_control_socket_tells_what_the_disk_is_doing() {
    let dir = TestDir::new("ctl").unwrap();
    let control = dir.join("control.sock");
    let arg = control.to_str().unwrap().to_owned();
    let mut stack = Stack::start(&["--control", &arg, "--num-queues", "2", "--owner", "h:vm"]);
    let status = || {
        let mut stream = UnixStream::connect(&control).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"{\"cmd\":\"status\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str::<serde_json::Value>(&line).unwrap()
    };
    let told = status();
    assert_eq!(told["pid"], stack.backend.daemon.pid());
    assert_eq!(told["owner"], "h:vm");
    let disk = &told["disks"][0];
    assert_eq!(disk["socket"], stack.backend.socket.to_str().unwrap());
    assert_eq!(disk["volume"], format!("file://{}", image(stack.dir.path()).display()));
    assert_eq!((&disk["queues"], &disk["size_bytes"]), (&2.into(), &DISK_BYTES.into()));
    let mut front_end = stack.front_end();
    front_end.start_logging().unwrap();
    front_end.queue(0).write(0, &[1; 512]).unwrap();
    let disk = &status()["disks"][0];
    assert_eq!((&disk["rings_running"], &disk["logging"]), (&1.into(), &true.into()));
    assert_eq!(disk["drained"], false);
    assert_eq!(front_end.get_vring_base(0).unwrap(), 1);
    assert_eq!(status()["disks"][0]["drained"], true);
    // A killed process leaves the file, and the next one takes the place.
    stack.backend.kill_and_restart().unwrap();
    front_end.reconnect().unwrap();
    assert_eq!(status()["disks"][0]["drained"], false);
    assert_eq!(front_end.queue(0).read(0, 512).unwrap(), [1; 512]);
    assert!(stack.backend.daemon.terminate(SOON).unwrap().success());
    assert!(!control.exists(), "removed at the end");
}

/// The disk that its log is on is full: a line is lost, and nothing else.
#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let dir = TestDir::new("full-log").unwrap();
    let socket = dir.join("s.sock");
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut child = backend()
        .arg("--volume")
        .arg(disk(dir.path()))
        .arg("--socket-path")
        .arg(&socket)
        .stderr(full)
        .spawn()
        .unwrap();
    // Each connection and its end have a line.
    wait_until("it listens", SOON, || UnixStream::connect(&socket).is_ok()).unwrap();
    for _ in 0..3 {
        serves(&socket);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
