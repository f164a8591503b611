//! A backend on a file, and what the tests share.

use baton_integration::baton::Backend;
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::workspace::TestDir;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Sparse, and large enough that hostile sector numbers can be kept away from verified ones.
pub(crate) const DISK_BYTES: u64 = 256 << 20;
pub(crate) const SECTORS: u64 = DISK_BYTES / 512;
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// For things that must not happen.
pub(crate) const A_WHILE: Duration = Duration::from_millis(150);

pub(crate) struct Stack {
    pub(crate) backend: Backend,
    pub(crate) dir: TestDir,
}

impl Stack {
    pub(crate) fn start(more_args: &[&str]) -> Self {
        let dir = TestDir::new("dev").unwrap();
        let uri = disk(dir.path());
        let backend = Backend::start(dir.path(), "vm", &uri, more_args).unwrap();
        Self { backend, dir }
    }

    pub(crate) fn connect(&self, options: Options) -> RawFrontend {
        RawFrontend::connect(&self.backend.socket, options).unwrap()
    }

    pub(crate) fn front_end(&self) -> RawFrontend {
        self.connect(Options::default())
    }

    /// Lines of the log that contain `text`.
    pub(crate) fn lines(&self, text: &str) -> usize {
        self.backend.daemon.log().lines().filter(|line| line.contains(text)).count()
    }

    /// Open descriptors and threads of the process.
    pub(crate) fn footprint(&self) -> (usize, usize) {
        let count = |what| {
            fs::read_dir(format!("/proc/{}/{what}", self.backend.daemon.pid())).unwrap().count()
        };
        (count("fd"), count("task"))
    }
}

/// Makes the disk, and says how to name it.
pub(crate) fn disk(dir: &Path) -> String {
    let path = image(dir);
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    format!("file://{}", path.display())
}

pub(crate) fn image(dir: &Path) -> PathBuf {
    dir.join("disk.img")
}

/// A small generator, so that a seed is all there is to repeat a run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

/// Says what was measured; seen with `--nocapture` and when the test fails.
#[allow(clippy::print_stdout, reason = "the test runner keeps it with the test's own output")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

/// A seed: from the environment, or a new one each second. Printed, so that a failure can be repeated.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("BATON_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap();
        now.as_secs() << 20 | 1
    });
    say(&format!("BATON_SEED={seed}"));
    seed
}

/// Little-endian words, as most message bodies are.
pub(crate) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// As [`words`], of 32 bits.
pub(crate) fn halves(halves: &[u32]) -> Vec<u8> {
    halves.iter().flat_map(|w| w.to_le_bytes()).collect()
}
