//! The commands a test gives the guest, one per line, and the answers.
//!
//! ```text
//!   test                                guest
//!   "write dev=vda count=8 seq=1"  ──>
//!                                  <──  "ok blocks=8"      or  "err write of block 3 failed: I/O error (os error 5)"
//! ```
//!
//! One answer per command, in order. Between answers a running load reports `io ...` lines every 200 ms and
//! `bad ...` lines for what it found. Arguments are `name=value` with decimal numbers; `seq` and `epoch` make the
//! stamp, `start` and `count` are in blocks of `bs` bytes.

use crate::device::{AlignedBuf, Device, Disk};
use crate::filesystem::{self, FsConfig};
use crate::load::{Load, LoadConfig};
use crate::stamp::{Expect, SECTOR, Stamp, Version, check_block, encode_block};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a running load reports.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// Where answers and reports go; shared by the agent and the reporter of a load.
pub type Output = Arc<Mutex<dyn Write + Send>>;

/// What the caller has to do after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Wait for the next command.
    Continue,
    /// Switch the machine off.
    PowerOff,
}

/// Carries out commands.
pub struct Agent {
    output: Output,
    load: Option<Running>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("load", &self.load.is_some()).finish_non_exhaustive()
    }
}

struct Running {
    load: Arc<Mutex<Option<Load>>>,
    reporter: JoinHandle<()>,
}

/// The arguments of one command.
struct Args<'a>(BTreeMap<&'a str, &'a str>);

impl Args<'_> {
    fn number(&self, name: &str, default: u64) -> Result<u64, String> {
        match self.0.get(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("{name}={text} is not a number")),
        }
    }

    fn size(&self, name: &str, default: usize) -> Result<usize, String> {
        usize::try_from(self.number(name, default as u64)?)
            .map_err(|_| format!("{name} is too large"))
    }

    fn device_name(&self) -> &str {
        self.0.get("dev").copied().unwrap_or("vda")
    }

    fn device_path(&self) -> PathBuf {
        Self::path_of(self.device_name())
    }

    fn path_of(name: &str) -> PathBuf {
        match name {
            path if path.starts_with('/') => PathBuf::from(path),
            name => PathBuf::from("/dev").join(name),
        }
    }

    fn open(&self) -> Result<Device, String> {
        self.open_at(&self.device_path())
    }

    /// All devices of `dev=vda,vdb`.
    fn open_all(&self) -> Result<Vec<Arc<dyn Disk>>, String> {
        let open = |name| -> Result<Arc<dyn Disk>, String> {
            Ok(Arc::new(self.open_at(&Self::path_of(name))?))
        };
        self.device_name().split(',').map(open).collect()
    }

    fn open_at(&self, path: &Path) -> Result<Device, String> {
        let direct = self.number("direct", 1)? != 0;
        Device::open(path, direct).map_err(|e| format!("cannot open {}: {e}", path.display()))
    }

    fn sysfs(&self, file: &str) -> Result<String, String> {
        let path = format!("/sys/block/{}/{file}", self.device_name());
        fs::read_to_string(&path)
            .map(|s| s.trim().to_owned())
            .map_err(|e| format!("cannot read {path}: {e}"))
    }

    fn blocks(&self) -> Result<Blocks, String> {
        let block_bytes = self.size("bs", 4096)?;
        if block_bytes == 0 || !block_bytes.is_multiple_of(SECTOR) {
            return Err(format!("bs={block_bytes} is not a positive multiple of {SECTOR}"));
        }
        let sequence = self.number("seq", 1)?;
        Ok(Blocks {
            block_bytes,
            start: self.number("start", 0)?,
            count: self.number("count", 1)?,
            volume: self.number("volume", 1)?,
            version: Version { epoch: self.number("epoch", 1)?, sequence },
            // A test that does not know how far a writer got gives the highest sequence it can have sent.
            issued: self.number("issued", sequence)?,
        })
    }
}

/// A range of blocks and the stamp they have.
struct Blocks {
    block_bytes: usize,
    start: u64,
    count: u64,
    volume: u64,
    version: Version,
    issued: u64,
}

impl Blocks {
    fn offset_of(&self, block: u64) -> u64 {
        block * self.block_bytes as u64
    }

    fn bytes(&self) -> (u64, u64) {
        (self.offset_of(self.start), self.offset_of(self.count))
    }

    fn range(&self) -> std::ops::Range<u64> {
        self.start..self.start + self.count
    }

    fn write(&self, disk: &dyn Disk) -> Result<String, String> {
        let mut buf = AlignedBuf::new(self.block_bytes);
        for block in self.range() {
            let sector = self.offset_of(block) / SECTOR as u64;
            encode_block(
                Stamp { volume: self.volume, sector, writer: 1, version: self.version },
                &mut buf,
            );
            disk.write_at(&buf, self.offset_of(block))
                .map_err(|e| format!("write of block {block} failed: {e}"))?;
        }
        Ok(format!("blocks={}", self.count))
    }

    fn verify(&self, disk: &dyn Disk) -> Result<String, String> {
        let mut buf = AlignedBuf::new(self.block_bytes);
        for block in self.range() {
            disk.read_at(&mut buf, self.offset_of(block))
                .map_err(|e| format!("read of block {block} failed: {e}"))?;
            let expect = Expect {
                volume: self.volume,
                sector: self.offset_of(block) / SECTOR as u64,
                acked: self.version,
                issued: Version { sequence: self.issued, ..self.version },
            };
            let verdict = check_block(&buf, &expect);
            if !verdict.is_good() {
                return Err(format!("block {block}: {verdict:?}, expected {}", self.version));
            }
        }
        Ok(format!("blocks={}", self.count))
    }

    fn verify_zero(&self, disk: &dyn Disk) -> Result<String, String> {
        let mut buf = AlignedBuf::new(self.block_bytes);
        for block in self.range() {
            disk.read_at(&mut buf, self.offset_of(block))
                .map_err(|e| format!("read of block {block} failed: {e}"))?;
            if buf.iter().any(|&b| b != 0) {
                return Err(format!("block {block} is not zero"));
            }
        }
        Ok(format!("blocks={}", self.count))
    }
}

impl Agent {
    /// An agent that answers to `output`.
    #[must_use]
    pub fn new(output: Output) -> Self {
        Self { output, load: None }
    }

    /// Carries out one command and answers it.
    pub fn handle(&mut self, line: &str) -> Next {
        let mut words = line.split_whitespace();
        let Some(command) = words.next() else {
            return Next::Continue;
        };
        let args = Args(words.map(|w| w.split_once('=').unwrap_or((w, ""))).collect());
        if command == "poweroff" {
            self.say("ok poweroff");
            return Next::PowerOff;
        }
        match self.run(command, &args) {
            Ok(text) => self.say(format!("ok {text}").trim_end()),
            Err(text) => self.say(&format!("err {text}")),
        }
        Next::Continue
    }

    fn say(&self, line: &str) {
        say(&self.output, line);
    }

    fn run(&mut self, command: &str, args: &Args<'_>) -> Result<String, String> {
        let failed = |what: &str, e: std::io::Error| format!("{what} failed: {e}");
        match command {
            // The token tells this answer from one that was on its way when the other end of the line changed.
            "ping" => Ok(args.0.get("token").map(|t| format!("token={t}")).unwrap_or_default()),
            "write" => args.blocks()?.write(&args.open()?),
            "verify" => args.blocks()?.verify(&args.open()?),
            "verify-zero" => args.blocks()?.verify_zero(&args.open()?),
            "flush" => args.open()?.flush().map(|()| String::new()).map_err(|e| failed("flush", e)),
            "discard" | "zeroout" => {
                let (at, len) = args.blocks()?.bytes();
                let device = args.open()?;
                let done = if command == "discard" {
                    device.discard(at, len)
                } else {
                    device.zero_out(at, len)
                };
                done.map(|()| format!("bytes={len}")).map_err(|e| failed(command, e))
            }
            "fs" | "fs-verify" => {
                let config = FsConfig {
                    files: args.number("files", 4)?,
                    file_bytes: args.number("bytes", 1 << 20)?,
                };
                let device = args.device_path();
                let run = if command == "fs" { filesystem::exercise } else { filesystem::verify };
                run(&device, &config)
                    .map(|r| format!("bytes={} crc={:08x}", r.bytes, r.crc))
                    .map_err(|e| failed(command, e))
            }
            "id" => Ok(format!("serial={}", args.sysfs("serial")?)),
            "size" => Ok(format!("bytes={}", sectors(args)? * SECTOR as u64)),
            "wait-size" => wait_size(args),
            "queues" => {
                let path = format!("/sys/block/{}/mq", args.device_name());
                let count =
                    fs::read_dir(&path).map_err(|e| format!("cannot read {path}: {e}"))?.count();
                Ok(format!("queues={count}"))
            }
            "limits" => {
                let names = [
                    "ro",
                    "queue/logical_block_size",
                    "queue/physical_block_size",
                    "queue/max_segments",
                    "queue/max_segment_size",
                    "queue/discard_max_bytes",
                    "queue/write_zeroes_max_bytes",
                    "queue/write_cache",
                ];
                let mut text = Vec::new();
                for name in names {
                    text.push(format!(
                        "{}={}",
                        name.rsplit('/').next().unwrap_or(name),
                        args.sysfs(name)?.replace(' ', "-")
                    ));
                }
                Ok(text.join(" "))
            }
            "load" => self.start_load(args),
            "stop" => self.stop_load(),
            other => Err(format!("unknown command '{other}'")),
        }
    }

    fn start_load(&mut self, args: &Args<'_>) -> Result<String, String> {
        if self.load.is_some() {
            return Err("a load is running already".to_owned());
        }
        let defaults = LoadConfig::default();
        let config = LoadConfig {
            workers: args.size("threads", 1)? * args.size("depth", defaults.workers)?,
            block_bytes: args.size("bs", defaults.block_bytes)?,
            blocks_per_worker: args.number("blocks", defaults.blocks_per_worker)?,
            offset: args.number("offset", defaults.offset)?,
            slots: args.size("slots", defaults.slots)?,
            volume: args.number("volume", defaults.volume)?,
            writer: u32::try_from(args.number("writer", 1)?)
                .map_err(|_| "writer is too large".to_owned())?,
            epoch: args.number("epoch", defaults.epoch)?,
            flush_every: args.number("flush-every", defaults.flush_every)?,
            seed: args.number("seed", defaults.seed)?,
        };
        if config.block_bytes == 0
            || !config.block_bytes.is_multiple_of(SECTOR)
            || config.blocks_per_worker == 0
        {
            return Err("bs must be a positive multiple of 512, and blocks positive".to_owned());
        }
        let disks = args.open_all()?;
        let load = Arc::new(Mutex::new(Some(Load::start(&disks, &config))));
        let (reported, output) = (Arc::clone(&load), Arc::clone(&self.output));
        let reporter = std::thread::spawn(move || report(&reported, &output));
        self.load = Some(Running { load, reporter });
        Ok(format!("workers={}", config.workers * disks.len()))
    }

    fn stop_load(&mut self) -> Result<String, String> {
        let running = self.load.take().ok_or("no load is running")?;
        let load = running.load.lock().expect("the reporter does not panic").take();
        let (totals, findings) = load.ok_or("the load is gone")?.stop();
        running.reporter.thread().unpark();
        // The reporter prints nothing after this.
        let _ = running.reporter.join();
        for finding in findings {
            self.say(&format!("bad {finding}"));
        }
        Ok(totals.to_string())
    }
}

fn say(output: &Output, line: &str) {
    let mut output = output.lock().expect("nobody panics while writing a line");
    // Nobody to tell if the line is gone; the test sees the silence.
    let _ = output.write_all(format!("{line}\n").as_bytes());
    let _ = output.flush();
}

fn report(load: &Mutex<Option<Load>>, output: &Output) {
    loop {
        std::thread::park_timeout(REPORT_EVERY);
        let guard = load.lock().expect("the agent does not panic");
        let Some(load) = guard.as_ref() else { return };
        for finding in load.take_findings() {
            say(output, &format!("bad {finding}"));
        }
        say(output, &format!("io {}", load.totals()));
    }
}

fn sectors(args: &Args<'_>) -> Result<u64, String> {
    let text = args.sysfs("size")?;
    text.parse().map_err(|_| format!("the kernel reports a size of '{text}'"))
}

fn wait_size(args: &Args<'_>) -> Result<String, String> {
    let want = args.number("bytes", 0)?;
    let deadline = Instant::now() + Duration::from_millis(args.number("timeout-ms", 5000)?);
    loop {
        let bytes = sectors(args)? * SECTOR as u64;
        if bytes == want {
            return Ok(format!("bytes={bytes}"));
        }
        if Instant::now() > deadline {
            return Err(format!("the disk has {bytes} bytes, not {want}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        agent: Agent,
        said: Arc<Mutex<Vec<u8>>>,
        file: tempfile::NamedTempFile,
    }

    impl Bench {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(4 << 20).unwrap();
            let said = Arc::new(Mutex::new(Vec::new()));
            Self { agent: Agent::new(said.clone()), said, file }
        }

        fn ask(&mut self, command: &str) -> String {
            let line = format!("{command} direct=0 dev={}", self.file.path().display());
            assert_eq!(self.agent.handle(&line), Next::Continue);
            let bytes = std::mem::take(&mut *self.said.lock().unwrap());
            String::from_utf8(bytes)
                .unwrap()
                .lines()
                .filter(|l| !l.starts_with("io "))
                .collect::<Vec<_>>()
                .join("\n")
        }
    }

    #[test]
    fn blocks_are_written_and_verified() {
        let mut bench = Bench::new();
        assert_eq!(bench.ask("write start=2 count=3 seq=9"), "ok blocks=3");
        assert_eq!(bench.ask("verify start=2 count=3 seq=9"), "ok blocks=3");
        assert_eq!(bench.ask("verify-zero start=5 count=3"), "ok blocks=3");
        let lost = bench.ask("verify start=4 count=2 seq=9");
        assert!(lost.starts_with("err block 5: Zero"), "{lost}");
        assert_eq!(bench.ask("verify-zero start=4"), "err block 4 is not zero");
        let stale = bench.ask("verify start=2 seq=10");
        assert!(stale.starts_with("err block 2: Stale"), "{stale}");
        assert_eq!(bench.ask("verify start=2 seq=8 issued=9"), "ok blocks=1");
    }

    #[test]
    fn a_load_starts_reports_and_stops() {
        let mut bench = Bench::new();
        assert_eq!(bench.ask("load threads=2 depth=2 blocks=16"), "ok workers=4");
        assert_eq!(bench.ask("load"), "err a load is running already");
        while bench.said.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        let line = String::from_utf8(bench.said.lock().unwrap().clone()).unwrap();
        assert!(
            line.starts_with("io ops=") && line.contains(" errs=0 stale=0 corrupt=0 max_gap_ms="),
            "{line}"
        );
        let end = bench.ask("stop");
        assert!(end.starts_with("ok ops=") && end.contains(" errs=0 stale=0 corrupt=0 "), "{end}");
        assert_eq!(bench.ask("stop"), "err no load is running");
    }

    #[test]
    fn nonsense_is_answered_and_survived() {
        let mut bench = Bench::new();
        assert_eq!(bench.ask("dance"), "err unknown command 'dance'");
        assert_eq!(bench.ask("write count=x"), "err count=x is not a number");
        assert_eq!(bench.ask("write bs=100"), "err bs=100 is not a positive multiple of 512");
        assert!(bench.agent.handle("write dev=/nowhere/disk") == Next::Continue);
        assert!(bench.ask("flush").ends_with("ok"));
        assert_eq!(bench.agent.handle("poweroff"), Next::PowerOff);
    }
}
