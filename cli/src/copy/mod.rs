//! `baton volume import` and `export`: a disk is copied from any volume to any other, checked, and goes on where it
//! was ended.
//!
//! ```text
//!  source ==> Reader --pieces--> Writer ==> destination        then: destination ==> Reader --> digests compared
//!               |                   |                                                             |
//!             holes             durable? ------------------> State <------------------------------+
//! ```
//!
//! | module | noun |
//! |---|---|
//! | [`side`] | an open end, and how it stands |
//! | [`piece`] | pieces, runs of zeros, digests |
//! | [`digests`] | the threads that make them |
//! | [`map`] | what a volume told of its holes |
//! | [`reader`], [`writer`] | what is under way at each end |
//! | [`state`] | the file that a copy goes on from |
//! | [`phase`] | the copy, the verification, and the look at both before going on |
//! | [`progress`] | how far it is |
//!
//! One thread moves the data: both ends are queues that never block, but for a file, whose reads the kernel has read
//! ahead. Digests are made beside it.

mod digests;
mod map;
mod phase;
mod piece;
mod progress;
mod reader;
mod side;
mod state;
mod writer;

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use baton_protocol::units::SECTOR_BYTES;
use baton_remote_client::{IoError, OpenError, QueueError, VolumeUri};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;

use crate::args::Copy;
use phase::Phases;
use piece::{Pieces, Whole};
use progress::{Audience, size, time};
pub(crate) use side::Role;
use side::Side;
pub(crate) use state::StateError;
use state::{About, State, StateFile};

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("cannot open the {role}: {source}{}", cause(source))]
    Open { role: Role, uri: String, source: Box<OpenError> },
    #[error("cannot open the {role} for I/O: {source}")]
    Queue { role: Role, source: QueueError },
    #[error("cannot make the file {}: {source}", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("the source and the destination are the same volume")]
    Same,
    #[error(
        "the destination has {has} bytes, {} less than the source; grow it, or name a larger one",
        needs - has
    )]
    TooSmall { has: u64, needs: u64 },
    #[error(
        "the source has {len} bytes, and a disk has whole sectors of 512: the last {} would be lost; fill it up (`truncate --size=%512 FILE`) and copy again",
        len - whole
    )]
    Ragged { len: u64, whole: u64 },
    #[error("the destination is read-only")]
    ReadOnly,
    #[error(transparent)]
    State(#[from] StateError),
    #[error(
        "the {role} has changed since the copy began, at byte {offset}; remove {} to begin again",
        state.display()
    )]
    Changed { role: Role, offset: u64, state: PathBuf },
    #[error(
        "{doing} failed at the {role}, near byte {offset}: {error}; when that is repaired, the same command goes on"
    )]
    Io { role: Role, doing: &'static str, offset: u64, error: IoError },
    #[error("the {0} was given to another owner; nothing more was written to it")]
    Fenced(Role),
    #[error("the {0} is gone, or no longer the volume that was opened; look at its server")]
    Lost(Role),
    #[error(
        "verification failed: {pieces} of the pieces differ, the first at byte {offset}; the same command copies those again"
    )]
    Differs { pieces: u64, offset: u64 },
    #[error("interrupted at {percent} % of {phase}; the same command goes on, by {}", state.display())]
    Interrupted { phase: &'static str, percent: u64, state: PathBuf },
    #[error("cannot wait for the volumes: {0}")]
    System(io::Error),
    #[error("cannot print: {0}")]
    Output(io::Error),
}

/// Why, where the sentence itself does not say.
fn cause(error: &OpenError) -> String {
    std::error::Error::source(error).map_or_else(String::new, |source| format!(" ({source})"))
}

/// What a copy did.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// Copied by this run, bytes.
    data: u64,
    zeros: u64,
    /// Done by runs before, bytes.
    before: u64,
}

/// Copies, verifies, tells.
pub(crate) fn run(copy: &Copy) -> Result<(), CopyError> {
    let signals = signals()?;
    let audience = Audience::new(copy.json);
    let begun = Instant::now();
    if copy.source.to_string() == copy.destination.to_string() {
        return Err(CopyError::Same);
    }
    let path = copy.state.clone().unwrap_or_else(|| state_path(copy));
    has_folder(&copy.destination)?;
    let held = StateFile::take(&path)?;
    let before = held.begun(&copy.source.to_string(), &copy.destination.to_string())?;
    let begun_before = before.is_some();
    let owner = before.map_or_else(|| owner(copy), |about| about.owner.clone());
    has_whole_sectors(&copy.source)?;
    let source = Side::open(Role::Source, &copy.source, &owner)?;
    make_file(&copy.destination, source.size_bytes())?;
    let destination = Side::open(Role::Destination, &copy.destination, &owner)?;
    let half = Cell::new(begun_before);
    let opened = Opened { source, destination, owner, half };
    let done = opened.copy(copy, held, audience, &signals);
    // A half-copied disk stays with the copy, so that no VM can start on it.
    opened.destination.volume.close(!opened.half.get());
    opened.source.volume.close(false);
    let (sums, digest) = done?;
    tell(copy, opened.source.size_bytes(), sums, digest.as_deref(), begun)
        .map_err(CopyError::Output)
}

struct Opened {
    source: Side,
    destination: Side,
    owner: String,
    /// Some of the destination may be written, and not all.
    half: Cell<bool>,
}

impl Opened {
    fn copy(
        &self,
        copy: &Copy,
        held: StateFile,
        audience: Audience,
        signals: &SignalFd,
    ) -> Result<(Sums, Option<String>), CopyError> {
        self.check()?;
        let about = About::new(self.source.end(), self.destination.end(), self.owner.clone());
        let state = State::open(held, &about)?;
        self.half.set(true);
        let pieces = Pieces { size_bytes: state.about().source.size_bytes };
        let phases = Phases {
            source: &self.source,
            destination: &self.destination,
            state: &state,
            pieces,
            audience,
            signals,
        };
        if state.resumed {
            phases.look_again()?;
        }
        let sums = phases.copy()?;
        let digest = if copy.no_verify {
            None
        } else {
            drop_cached(&copy.destination);
            phases.verify()?;
            let mut whole = Whole::default();
            state.each(|_, digest| whole.add(digest))?;
            Some(whole.hex())
        };
        state.remove()?;
        self.half.set(false);
        Ok((sums, digest))
    }

    fn check(&self) -> Result<(), CopyError> {
        let (needs, has) = (self.source.size_bytes(), self.destination.size_bytes());
        if is_one_file(&self.source.uri, &self.destination.uri) {
            return Err(CopyError::Same);
        }
        if self.destination.volume.geometry().read_only {
            return Err(CopyError::ReadOnly);
        }
        if has < needs {
            return Err(CopyError::TooSmall { has, needs });
        }
        Ok(())
    }
}

/// Interrupt and terminate become something to read. Before any thread is started, which has them blocked then, too.
fn signals() -> Result<SignalFd, CopyError> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGHUP);
    set.thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC))
        .map_err(|error| CopyError::System(error.into()))
}

/// Says who copies: no backend's name, and no other copy's.
fn owner(copy: &Copy) -> String {
    let host = nix::unistd::gethostname().unwrap_or_default();
    let mut host = host.to_string_lossy().into_owned();
    host.truncate(64);
    format!("baton-copy/{host}/{}", &ends_digest(copy)[..8])
}

fn ends_digest(copy: &Copy) -> String {
    piece::hex(&piece::digest(format!("{}\0{}", copy.source, copy.destination).as_bytes()))
}

/// Beside a file that is copied to; else in the folder that the command runs in.
fn state_path(copy: &Copy) -> PathBuf {
    match &copy.destination {
        VolumeUri::File { path } => {
            let mut name = path.clone().into_os_string();
            name.push(".baton-copy");
            PathBuf::from(name)
        }
        _ => PathBuf::from(format!("{}.baton-copy", &ends_digest(copy)[..16])),
    }
}

/// Opened, a file would be taken without what follows its last whole sector.
fn has_whole_sectors(uri: &VolumeUri) -> Result<(), CopyError> {
    let VolumeUri::File { path } = uri else { return Ok(()) };
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file);
    let len = file.map_or(0, |file| file.len());
    match len / SECTOR_BYTES * SECTOR_BYTES {
        whole if whole > 0 && whole != len => Err(CopyError::Ragged { len, whole }),
        _ => Ok(()),
    }
}

/// The state file lies beside the destination, whose folder is the one to be told of.
fn has_folder(uri: &VolumeUri) -> Result<(), CopyError> {
    let VolumeUri::File { path } = uri else { return Ok(()) };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let found = folder.map_or(Ok(()), |folder| std::fs::metadata(folder).map(drop));
    found.map_err(|source| CopyError::Make { path: path.clone(), source })
}

/// A file that is not there yet is made, of the source's size and without contents.
fn make_file(uri: &VolumeUri, size_bytes: u64) -> Result<(), CopyError> {
    let VolumeUri::File { path } = uri else { return Ok(()) };
    let failed = |source| CopyError::Make { path: path.clone(), source };
    match std::fs::File::options().write(true).create_new(true).open(path) {
        Ok(file) => file.set_len(size_bytes).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

fn is_one_file(a: &VolumeUri, b: &VolumeUri) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |uri: &VolumeUri| match uri {
        VolumeUri::File { path } => {
            std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
        }
        _ => None,
    };
    id(a).is_some() && id(a) == id(b)
}

/// What is verified shall come from the disk.
fn drop_cached(uri: &VolumeUri) {
    let advise = |path: &Path| {
        let file = std::fs::File::open(path)?;
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, advice).map_err(io::Error::from)
    };
    if let VolumeUri::File { path } = uri {
        // A hint: where it does nothing, the kernel's copy is verified.
        let _ = advise(path);
    }
}

fn tell(
    copy: &Copy,
    size_bytes: u64,
    sums: Sums,
    digest: Option<&str>,
    begun: Instant,
) -> io::Result<()> {
    let seconds = begun.elapsed().as_secs_f64();
    let text = if copy.json {
        let line = json!({
            "event": "done", "source": copy.source.to_string(), "destination": copy.destination.to_string(),
            "size_bytes": size_bytes, "data_bytes": sums.data, "zero_bytes": sums.zeros,
            "resumed_bytes": sums.before, "seconds": seconds, "verified": digest.is_some(), "digest": digest,
        });
        format!("{line}\n")
    } else {
        let before = match sums.before {
            0 => String::new(),
            before => format!(", {} by an earlier run", size(before)),
        };
        let took = time(begun.elapsed().as_secs());
        let copied = format!(
            "copied {}: {} of data, {} of zeros{before}, in {took}\n",
            size(size_bytes),
            size(sums.data),
            size(sums.zeros)
        );
        match digest {
            Some(digest) => format!("{copied}verified: sha256/4M {digest}\n"),
            None => format!("{copied}not verified\n"),
        }
    };
    let mut out = io::stdout().lock();
    io::Write::write_all(&mut out, text.as_bytes())?;
    io::Write::flush(&mut out)
}
