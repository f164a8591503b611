//! A disk server on a test volume, and what several tests do with it.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use baton_backend::disk::{DiskOptions, DiskServer, Shutdown};
use baton_backend::handoff::MemberHandle;
use baton_backend::queue::Disk;
use baton_backend::socket::{FrontEnds, Permissions};
use baton_integration::raw_frontend::{Options, Queue, RawFrontend};
use baton_integration::vhost_user::{protocol, request};
use baton_integration::workspace::TestDir;

use crate::volume::{Mode, TestVolume};

/// Size of the disk.
pub(crate) const DISK_BYTES: u64 = 16 << 20;
/// For things that happen at once on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// For things that must not happen.
pub(crate) const A_WHILE: Duration = Duration::from_millis(150);

pub(crate) struct Device {
    pub(crate) volume: Arc<TestVolume>,
    shutdown: Arc<Shutdown>,
    pub(crate) socket: PathBuf,
    pub(crate) disk: Arc<Disk>,
    server: Option<JoinHandle<()>>,
    _dir: TestDir,
}

impl Device {
    pub(crate) fn start(mode: Mode) -> Self {
        Self::serve(TestVolume::new(DISK_BYTES, mode), None)
    }

    /// Serves a volume that may have a place in its VM's handoff.
    pub(crate) fn serve(volume: Arc<TestVolume>, member: Option<MemberHandle>) -> Self {
        let dir = TestDir::new("device").unwrap();
        let socket = dir.join("disk.sock");
        let options = DiskOptions {
            name: "disk".to_owned(),
            num_queues: 2,
            queue_size: 128,
            read_only: false,
            poll_us: poll_us(),
        };
        let permissions = Permissions { mode: 0o600, group: None };
        let front_ends = FrontEnds::bind(&socket, &permissions).unwrap();
        let server = DiskServer::new(Arc::<TestVolume>::clone(&volume), &options, member).unwrap();
        let shutdown = Arc::new(Shutdown::new().unwrap());
        let disk = Arc::clone(server.disk());
        let server = {
            let shutdown = Arc::clone(&shutdown);
            std::thread::spawn(move || server.run(front_ends, &shutdown))
        };
        Self { volume, shutdown, socket, disk, server: Some(server), _dir: dir }
    }

    pub(crate) fn connect(&self, options: Options) -> RawFrontend {
        RawFrontend::connect(&self.socket, options).unwrap()
    }

    pub(crate) fn front_end(&self) -> RawFrontend {
        self.connect(Options::default())
    }

    /// What SIGTERM does.
    pub(crate) fn shut_down(&self) {
        self.shutdown.set();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shutdown.set();
        self.volume.set_mode(Mode::Immediate);
        let ended = self.server.take().expect("taken once").join();
        if !std::thread::panicking() {
            ended.expect("the disk server panicked");
        }
    }
}

/// Options whose memory table is sent whole, so that it may be sent again.
pub(crate) fn whole_table() -> Options {
    let all = Options::default();
    Options { protocol: all.protocol & !protocol::CONFIGURE_MEM_SLOTS, ..all }
}

/// The body of SET_VRING_ADDR for a queue, for when the queue itself is elsewhere.
pub(crate) fn vring_addr(front_end: &mut RawFrontend, index: u16, flags: u32) -> Vec<u8> {
    let (descriptors, avail, used) = front_end.queue(index).ring.addresses();
    let mut body = [u32::from(index), flags].map(u32::to_le_bytes).concat();
    for gpa in [descriptors, used, avail] {
        body.extend(front_end.memory().user_address(gpa).to_le_bytes());
    }
    body.extend(used.to_le_bytes());
    body
}

/// Verified I/O on one queue until told to stop, with `depth` requests at a time. Returns how many there were.
///
/// Writes a block and reads it back, so that a completion that comes too early, twice or with the wrong head shows.
pub(crate) fn verified_load(queue: &mut Queue, first_sector: u64, stop: &dyn Fn() -> bool) -> u64 {
    use baton_integration::blk::{OK, Request};
    const DEPTH: u64 = 16;
    let mut rounds = 0_u64;
    while !stop() {
        let block = |slot: u64| {
            let value = (rounds.wrapping_mul(31) + slot + first_sector) & 0xff;
            vec![u8::try_from(value).unwrap(); 1024]
        };
        let mut pending = std::collections::BTreeMap::new();
        for slot in 0..DEPTH {
            let sector = first_sector + 2 * slot;
            let head = queue.submit(&Request::Write { sector, data: &block(slot) }).unwrap();
            assert!(pending.insert(head, slot).is_none());
        }
        queue.kick().unwrap();
        let mut reads = std::collections::BTreeMap::new();
        while !(pending.is_empty() && reads.is_empty()) {
            let done = queue.wait_completion(SOON).unwrap().expect("a completion is lost");
            assert_eq!(done.status, OK);
            if let Some(slot) = pending.remove(&done.head) {
                let read = Request::Read { sector: first_sector + 2 * slot, len: 1024 };
                reads.insert(queue.submit(&read).unwrap(), slot);
                queue.kick().unwrap();
            } else {
                let slot = reads.remove(&done.head).expect("a head that is in flight");
                assert_eq!(done.data, block(slot), "round {rounds} slot {slot}");
            }
        }
        rounds += 1;
    }
    rounds * DEPTH * 2
}

/// GET_VRING_BASE of queue 0 on a front-end whose queue may be elsewhere.
pub(crate) fn get_base(front_end: &RawFrontend) -> u16 {
    front_end.get_vring_base(0).unwrap()
}

/// Sends a request and says whether it was acknowledged.
pub(crate) fn accepted(front_end: &RawFrontend, number: u32, body: &[u8]) -> bool {
    front_end.send(number, body, &[]).is_ok()
}

/// SET_VRING_NUM.
pub(crate) fn set_num(front_end: &RawFrontend, index: u32, num: u32) -> bool {
    accepted(front_end, request::SET_VRING_NUM, &[index, num].map(u32::to_le_bytes).concat())
}

/// Of every device here; `BATON_POLL_US` runs the tests with polling on.
fn poll_us() -> u64 {
    std::env::var("BATON_POLL_US").map_or(0, |text| text.parse().expect("microseconds"))
}
