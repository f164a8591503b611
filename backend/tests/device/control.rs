//! The control socket: what it tells, and that nothing a client does disturbs anybody.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_backend::control::server::{CLIENTS_MAX, ControlServer, LINE_BYTES_MAX};
use baton_backend::control::{Vm, VmDisk};
use baton_backend::socket::{FrontEnds, Permissions};
use baton_integration::blk::Request;
use baton_integration::raw_frontend::Options;
use baton_integration::workspace::TestDir;
use baton_remote_client::VolumeState;
use serde_json::{Value, json};

use crate::device::{DISK_BYTES, Device, SOON};
use crate::volume::Mode;

struct Control {
    path: PathBuf,
    _server: ControlServer,
    _dir: TestDir,
}

impl Control {
    fn of(device: &Device) -> Self {
        let dir = TestDir::new("control").unwrap();
        let path = dir.join("control.sock");
        let socket = FrontEnds::bind(&path, &Permissions { mode: 0o600, group: None }).unwrap();
        let disk = VmDisk {
            disk: Arc::clone(&device.disk),
            socket: "/s".to_owned(),
            volume: "baton://s:1/v".to_owned(),
        };
        let vm =
            Vm { owner: "h:vm".to_owned(), disks: vec![disk], handoff: None, cooperative: None };
        Self { path, _server: ControlServer::spawn(socket, Arc::new(vm)).unwrap(), _dir: dir }
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self(BufReader::new(stream))
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line:?}"))
    }

    fn ask(&mut self, line: &str) -> Value {
        writeln!(self.0.get_mut(), "{line}").unwrap();
        self.answer()
    }

    fn status(&mut self) -> Value {
        self.ask("{\"cmd\":\"status\"}")
    }
}

#[test]
fn status_follows_the_disk() {
    let device = Device::start(Mode::Hold);
    let control = Control::of(&device);
    let mut client = Client::connect(&control.path);
    let quiet = json!({
        "name": "disk", "socket": "/s", "volume": "baton://s:1/v", "state": "connected",
        "rings_running": 0, "queues": 2, "in_flight": 0, "logging": false, "drained": false,
        "size_bytes": DISK_BYTES, "front_end": null,
    });
    let status = client.status();
    assert_eq!(status, json!({"pid": std::process::id(), "owner": "h:vm", "disks": [quiet]}));
    let mut front_end = device.connect(Options { queues: 2, ..Options::default() });
    front_end.start_logging().unwrap();
    // The process at the other end of its socket is this one.
    assert_eq!(client.status()["disks"][0]["front_end"], std::process::id());
    for sector in 0..3 {
        front_end.queue(0).submit(&Request::Read { sector, len: 512 }).unwrap();
    }
    front_end.queue(0).kick().unwrap();
    device.volume.wait_held(0, 3);
    device.volume.set_state(VolumeState::Reconnecting);
    // The queue says what it did at the end of its round; the answer to this message comes after that.
    front_end.set_vring_addr(0, true).unwrap();
    let disk = &client.status()["disks"][0];
    let told = ["state", "rings_running", "in_flight", "logging", "drained"].map(|key| &disk[key]);
    assert_eq!(json!(told), json!(["reconnecting", 2, 3, true, false]));
    device.volume.set_mode(Mode::Immediate);
    for queue in 0..2 {
        front_end.enable(queue, false).unwrap();
    }
    front_end.get_vring_base(1).unwrap();
    let disk = &client.status()["disks"][0];
    let told = ["rings_running", "in_flight", "logging", "drained"].map(|key| &disk[key]);
    assert_eq!(json!(told), json!([0, 0, true, true]));
    drop(front_end);
    // The disk's thread hears of it when it hears of it.
    while client.status()["disks"][0]["front_end"] != Value::Null {
        std::thread::yield_now();
    }
}

#[test]
fn several_requests_in_one_piece_are_answered_one_by_one() {
    let device = Device::start(Mode::Immediate);
    let control = Control::of(&device);
    let mut client = Client::connect(&control.path);
    let stream = client.0.get_mut();
    stream.write_all(b"{\"cmd\":\"sta").unwrap();
    stream.write_all(b"tus\"}\r\n\n{\"cmd\":\"dance\"}\nnonsense\n").unwrap();
    assert_eq!(client.answer()["owner"], "h:vm");
    assert_eq!(client.answer()["error"]["type"], "unknown-command");
    assert_eq!(client.answer()["error"]["type"], "bad-request");
    assert_eq!(client.status()["owner"], "h:vm");
}

#[test]
fn clients_and_lines_are_bounded_and_io_goes_on() {
    let device = Device::start(Mode::Immediate);
    let control = Control::of(&device);
    let mut front_end = device.front_end();
    let mut clients: Vec<Client> =
        (0..CLIENTS_MAX).map(|_| Client::connect(&control.path)).collect();
    clients.iter_mut().for_each(|client| assert_eq!(client.status()["owner"], "h:vm"));
    let mut refused = Client::connect(&control.path);
    assert_eq!(refused.answer()["error"]["type"], "too-many-clients");
    front_end.queue(0).write(0, &[1; 512]).unwrap();
    // Too long a line ends that client, which makes room for another.
    let mut endless = clients.pop().expect("eight");
    endless.0.get_mut().write_all(&vec![b'x'; LINE_BYTES_MAX + 1]).unwrap();
    assert_eq!(endless.answer()["error"]["type"], "bad-request");
    assert_eq!(endless.0.read(&mut [0]).unwrap_or(0), 0, "closed");
    front_end.queue(0).write(0, &[2; 512]).unwrap();
    let deadline = std::time::Instant::now() + SOON;
    while Client::connect(&control.path).status_or_refusal() != "h:vm" {
        assert!(std::time::Instant::now() < deadline, "its place is never free again");
    }
}

impl Client {
    /// The owner, or nothing when there is no place.
    fn status_or_refusal(&mut self) -> String {
        // A refused client may find its connection closed already.
        let _ = writeln!(self.0.get_mut(), "{{\"cmd\":\"status\"}}");
        let mut line = String::new();
        let _ = self.0.read_line(&mut line);
        let answer: Value = serde_json::from_str(&line).unwrap_or_default();
        answer["owner"].as_str().unwrap_or_default().to_owned()
    }
}

#[test]
fn the_socket_is_its_owners_and_goes_with_the_server() {
    let device = Device::start(Mode::Immediate);
    let control = Control::of(&device);
    let mode = std::fs::metadata(&control.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = Client::connect(&control.path);
    client.status();
    let path = control.path.clone();
    drop(control);
    assert!(!path.exists());
    assert_eq!(client.0.read(&mut [0]).unwrap_or(0), 0, "its client is let go");
}
