//! A VMM reduced to what a migration needs: disks of a vhost-user back-end, a stamping guest on each, and orders on a
//! socket. The program `baton-vmm-stub` is this and nothing else, so that it can be killed and frozen.
//!
//! ```text
//!   run ──> log ──> stop ──> save DIR  ~~~~~~>  load DIR ──> run        (another process, started as it waits)
//!            └───────┴──> run: the source goes on
//! ```
//!
//! Like QEMU it has one thread for messages and orders: a back-end that does not answer GET_VRING_BASE stops all of
//! it. Like QEMU it goes on when the back-end dies, connects again, and shows it what was in flight.

use super::guest::{Guest, MEMORY_BYTES, QUEUE_SIZE, State};
use super::history::Recorder;
use crate::memory::GuestMemory;
use crate::raw_frontend::{Options, RawFrontend};
use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the guest looks for answers: two cores are shared with everything under test.
const TICK_MS: u16 = 2;
/// Between two tries to reach a back-end.
const RECONNECT: Duration = Duration::from_millis(50);
/// For the line of an order.
const ORDER_TIMEOUT: Duration = Duration::from_secs(1);

/// How to start one.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number of this process: in its stamps and its history. From 1.
    pub number: u64,
    /// Socket of the back-end of each disk.
    pub sockets: Vec<PathBuf>,
    /// Where orders come.
    pub control: PathBuf,
    /// Where the history goes.
    pub history: PathBuf,
    /// Its memory: a file for each disk in this directory.
    pub memory: PathBuf,
}

#[derive(Debug)]
struct Disk {
    frontend: RawFrontend,
    guest: Guest,
    memory: Arc<GuestMemory>,
    connected: bool,
    logging: bool,
}

/// The VMM.
#[derive(Debug)]
pub struct Vmm {
    disks: Vec<Disk>,
    recorder: Recorder,
    control: UnixListener,
    running: bool,
    /// The guest makes up requests; else it sends only what a sweep needs.
    busy: bool,
    last_try: Instant,
}

impl Vmm {
    /// Connects to all disks, without starting their rings, and listens for orders.
    pub fn start(config: &Config) -> Result<Self> {
        fs::create_dir_all(&config.memory)?;
        let disks = config.sockets.iter().enumerate().map(|(disk, socket)| {
            let path = config.memory.join(format!("ram-{disk}"));
            let memory = Arc::new(GuestMemory::of_file(&path, MEMORY_BYTES)?);
            let options = Options { queue_size: QUEUE_SIZE, start: false, ..Options::default() };
            let frontend = RawFrontend::connect_with(socket, options, Arc::clone(&memory))?;
            let guest = Guest::boot(config.number, disk, &memory)?;
            Ok(Disk { frontend, guest, memory, connected: true, logging: false })
        });
        let disks = disks.collect::<Result<_>>()?;
        // Whoever waits for this one waits for the connections.
        let control = UnixListener::bind(&config.control)
            .with_context(|| format!("cannot listen on {}", config.control.display()))?;
        Ok(Self {
            disks,
            recorder: Recorder::open(&config.history)?,
            control,
            running: false,
            busy: true,
            last_try: Instant::now(),
        })
    }

    /// Serves until it is told to quit.
    pub fn serve(&mut self) -> Result<()> {
        loop {
            if self.wait()? {
                let (stream, _) = self.control.accept()?;
                // Whoever asked may be gone; the order was carried out.
                match self.serve_order(&stream) {
                    Ok(true) => return Ok(()),
                    Ok(false) => {}
                    Err(error) => eprintln!("an order could not be answered: {error:#}"),
                }
            }
            if self.running {
                self.run_guests()?;
            }
        }
    }

    /// Sleeps for a tick, or until an order comes. Notices back-ends that are gone.
    fn wait(&mut self) -> Result<bool> {
        let mut fds = vec![PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        for disk in &self.disks {
            if let Ok(channel) = disk.frontend.channel() {
                fds.push(PollFd::new(channel.stream().as_fd(), PollFlags::empty()));
            }
        }
        match poll(&mut fds, PollTimeout::from(TICK_MS)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let came = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| !r.is_empty());
        let order = came(&fds[0]);
        let mut gone = fds[1..].iter().map(came).collect::<Vec<_>>().into_iter();
        drop(fds);
        for disk in &mut self.disks {
            if disk.frontend.channel().is_ok() && gone.next() == Some(true) {
                disk.lose("the back-end hung up");
            }
        }
        Ok(order)
    }

    fn run_guests(&mut self) -> Result<()> {
        if self.disks.iter().any(|disk| !disk.connected) && self.last_try.elapsed() > RECONNECT {
            self.last_try = Instant::now();
            for disk in self.disks.iter_mut().filter(|disk| !disk.connected) {
                match disk.frontend.reconnect() {
                    Ok(()) => disk.connected = true,
                    Err(error) => disk.frontend_gone(&error),
                }
            }
        }
        for disk in &mut self.disks {
            let queue = disk.frontend.queue(0);
            disk.guest.take_answers(queue, &mut self.recorder)?;
            disk.guest.send(queue, &mut self.recorder, self.busy)?;
        }
        Ok(())
    }

    /// True: it is time to end.
    fn serve_order(&mut self, stream: &UnixStream) -> Result<bool> {
        stream.set_read_timeout(Some(ORDER_TIMEOUT))?;
        stream.set_write_timeout(Some(ORDER_TIMEOUT))?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let order: Value = serde_json::from_str(&line)?;
        let quit = order["cmd"] == "quit";
        let answer = match self.order(&order) {
            Ok(answer) => answer,
            Err(error) => json!({ "error": format!("{error:#}") }),
        };
        writeln!(&*stream, "{answer}")?;
        Ok(quit)
    }

    fn order(&mut self, order: &Value) -> Result<Value> {
        let dir = || order["dir"].as_str().map(Path::new).context("the order names no directory");
        match order["cmd"].as_str().unwrap_or_default() {
            "run" => self.run(),
            "log" => self.disks.iter_mut().for_each(Disk::start_logging),
            "stop" => return self.stop(),
            "save" => self.save(dir()?)?,
            "load" => self.load(dir()?)?,
            "quiet" => self.busy = false,
            "sweep" => {
                self.busy = false;
                self.disks.iter_mut().for_each(|disk| disk.guest.begin_sweep());
            }
            "status" | "quit" => {}
            other => bail!("there is no order `{other}`"),
        }
        Ok(self.status())
    }

    fn run(&mut self) {
        if self.running {
            return;
        }
        self.running = true;
        for disk in self.disks.iter_mut().filter(|disk| disk.connected) {
            if let Err(error) = disk.frontend.start() {
                disk.frontend_gone(&error);
            } else if disk.logging {
                disk.logging = false;
                if let Err(error) = disk.frontend.stop_logging() {
                    disk.frontend_gone(&error);
                }
            }
        }
    }

    /// Rings stop disk after disk, in QEMU's order. A back-end that is gone does not keep it from stopping.
    fn stop(&mut self) -> Result<Value> {
        if !self.running {
            return Ok(self.status());
        }
        self.running = false;
        let mut lost = Vec::new();
        for (at, disk) in self.disks.iter_mut().enumerate() {
            if let Err(error) = disk.stop_ring() {
                lost.push(at);
                disk.frontend_gone(&error);
            }
            // What was answered before the stop was seen before the stop.
            disk.guest.take_answers(disk.frontend.queue(0), &mut self.recorder)?;
        }
        let mut answer = self.status();
        answer["lost"] = json!(lost);
        Ok(answer)
    }

    fn save(&self, dir: &Path) -> Result<()> {
        if self.running {
            bail!("a guest that runs cannot be saved");
        }
        fs::create_dir_all(dir)?;
        for (at, disk) in self.disks.iter().enumerate() {
            let memory = disk.memory.read(crate::memory::BASE, disk.memory.map().len());
            fs::write(dir.join(format!("ram-{at}")), memory)?;
            fs::write(dir.join(format!("state-{at}")), serde_json::to_vec(&disk.guest.save())?)?;
        }
        Ok(())
    }

    fn load(&mut self, dir: &Path) -> Result<()> {
        if self.running {
            bail!("a guest runs here already");
        }
        for (at, disk) in self.disks.iter_mut().enumerate() {
            let memory = fs::read(dir.join(format!("ram-{at}")))?;
            disk.memory.write(crate::memory::BASE, &memory);
            let state: State = serde_json::from_slice(&fs::read(dir.join(format!("state-{at}")))?)?;
            disk.guest.resume(state, disk.frontend.queue(0));
        }
        Ok(())
    }

    fn status(&self) -> Value {
        let each = |value: fn(&Disk) -> Value| self.disks.iter().map(value).collect::<Value>();
        json!({
            "running": self.running,
            "connected": each(|disk| json!(disk.connected)),
            "answered": each(|disk| json!(disk.guest.answered())),
            "outstanding": each(|disk| json!(disk.guest.outstanding())),
            "sweep_left": each(|disk| json!(disk.guest.sweep_left())),
        })
    }
}

impl Disk {
    fn start_logging(&mut self) {
        self.logging = true;
        // Without a back-end the next one learns of it.
        if let Err(error) = self.frontend.start_logging() {
            self.frontend_gone(&error);
        }
    }

    fn stop_ring(&mut self) -> Result<()> {
        if !self.connected {
            bail!("the back-end was gone already");
        }
        self.frontend.enable(0, false)?;
        let base = self.frontend.get_vring_base(0)?;
        let used = self.frontend.queue(0).ring.used_index();
        if base != used {
            bail!("the ring stopped at {base}, and the used index is {used}");
        }
        Ok(())
    }

    fn frontend_gone(&mut self, error: &anyhow::Error) {
        self.lose(&format!("{error:#}"));
    }

    fn lose(&mut self, why: &str) {
        if self.connected {
            eprintln!("the back-end is lost: {why}");
        }
        self.connected = false;
        self.frontend.disconnect();
    }
}
