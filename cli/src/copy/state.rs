//! The file that lets a copy go on where it was ended: who copies what, and a digest for each piece that is at the
//! destination and made durable there.
//!
//! ```text
//!  0       magic, and a line of JSON: [`About`]; zeros up to 16384
//!  16384   a digest of 32 bytes for each piece; zeros: not copied yet
//! ```
//!
//! A digest is written after the destination was flushed. One that a power loss has torn is a wrong one, which the
//! verification notices.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use baton_remote_client::lock_file;
use serde::{Deserialize, Serialize};

use super::piece::{Digest, NO_DIGEST, PIECE_BYTES, Pieces};

const MAGIC: &[u8; 16] = b"baton copy v1 \n\0";
const HEAD_BYTES: usize = 16 << 10;
/// Digests that are read or written at once.
const BATCH: u64 = 2048;

/// One end of a copy, as it must be found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    pub(super) uri: String,
    pub(super) size_bytes: u64,
    /// What else tells it from another of this name and size; may be empty.
    pub(super) mark: String,
}

/// What a state file is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct About {
    pub(super) source: End,
    pub(super) destination: End,
    /// The owner as which the destination is claimed.
    pub(super) owner: String,
    piece_bytes: u64,
}

impl About {
    pub(super) fn new(source: End, destination: End, owner: String) -> Self {
        Self { source, destination, owner, piece_bytes: PIECE_BYTES }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("cannot use the state file {}: {source}; name another one with --state", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is in use: this copy runs already", .0.display())]
    InUse(PathBuf),
    #[error("{} is not the state of a copy of this version; name another file with --state", .0.display())]
    Foreign(PathBuf),
    #[error(
        "{} belongs to a copy of {from} to {to}; name another file with --state, or remove this one to give that copy up",
        path.display()
    )]
    Other { path: PathBuf, from: String, to: String },
    #[error(
        "the {role} is not the one that {} knows: {what}; remove that file to begin again",
        path.display()
    )]
    Changed { path: PathBuf, role: &'static str, what: String },
    #[error("these URIs are too long for a state file")]
    TooLong,
}

impl StateError {
    pub(crate) fn is_refusal(&self) -> bool {
        !matches!(self, Self::File { .. })
    }
}

/// An open state file, locked against a second copy.
#[derive(Debug)]
pub(super) struct State {
    held: StateFile,
    pieces: Pieces,
    about: About,
    /// It was there, with this copy in it.
    pub(super) resumed: bool,
}

/// A state file that no other copy uses, taken before an end is opened: a second run of a copy would claim the
/// destination from the first.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    file: File,
    found: Option<About>,
}

impl StateFile {
    /// Makes it when it is not there.
    pub(super) fn take(path: &Path) -> Result<Self, StateError> {
        let failed = |source| StateError::File { path: path.to_owned(), source };
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(failed)?;
        lock_file(&file).map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => StateError::InUse(path.to_owned()),
            _ => failed(error),
        })?;
        let found = head(path, &file)?;
        Ok(Self { path: path.to_owned(), file, found })
    }

    /// The copy that was begun in it, which must be one from here to there.
    pub(super) fn begun(&self, from: &str, to: &str) -> Result<Option<&About>, StateError> {
        if let Some(found) = &self.found {
            same_ends(&self.path, found, from, to)?;
        }
        Ok(self.found.as_ref())
    }
}

impl Drop for StateFile {
    /// Nothing was begun in it.
    fn drop(&mut self) {
        if self.found.is_none() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// `None`: the file is empty.
fn head(path: &Path, file: &File) -> Result<Option<About>, StateError> {
    let failed = |source| StateError::File { path: path.to_owned(), source };
    if file.metadata().map_err(failed)?.len() == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; HEAD_BYTES];
    let foreign = || StateError::Foreign(path.to_owned());
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(foreign()),
        other => other.map_err(failed)?,
    }
    let text = bytes.strip_prefix(MAGIC).ok_or_else(foreign)?;
    let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
    let about: About = serde_json::from_slice(&text[..end]).map_err(|_| foreign())?;
    if about.piece_bytes == PIECE_BYTES { Ok(Some(about)) } else { Err(foreign()) }
}

impl State {
    /// Begins this copy in the file, or goes on with it. What is in it must be about the same ends.
    pub(super) fn open(mut held: StateFile, about: &About) -> Result<Self, StateError> {
        let resumed = held.found.is_some();
        let about = match &held.found {
            None => {
                let written = write_head(&held.file, about)?;
                let path = || held.path.clone();
                written.map_err(|source| StateError::File { path: path(), source })?;
                held.found.insert(about.clone()).clone()
            }
            Some(found) => {
                compare(&held.path, found, about)?;
                found.clone()
            }
        };
        let pieces = Pieces { size_bytes: about.source.size_bytes };
        Ok(Self { held, pieces, about, resumed })
    }

    pub(super) fn path(&self) -> &Path {
        &self.held.path
    }

    pub(super) fn about(&self) -> &About {
        &self.about
    }

    fn failed(&self, source: io::Error) -> StateError {
        StateError::File { path: self.held.path.clone(), source }
    }

    /// Tells `each` the digest of every piece, in order.
    pub(super) fn each(&self, mut each: impl FnMut(u64, &Digest)) -> Result<(), StateError> {
        let count = self.pieces.count();
        let mut first = 0;
        while first < count {
            let now = BATCH.min(count - first);
            let mut bytes = vec![0; usize::try_from(now * 32).expect("a batch")];
            let mut filled = 0;
            while filled < bytes.len() {
                match self.held.file.read_at(&mut bytes[filled..], at(first) + filled as u64) {
                    // Behind the last digest that was written are none.
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.failed(error)),
                }
            }
            for (piece, digest) in (first..).zip(bytes.as_chunks::<32>().0) {
                each(piece, digest);
            }
            first += now;
        }
        Ok(())
    }

    /// The digest of one piece.
    pub(super) fn read(&self, piece: u64) -> Result<Digest, StateError> {
        let mut digest = NO_DIGEST;
        match self.held.file.read_exact_at(&mut digest, at(piece)) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(NO_DIGEST),
            other => other.map(|()| digest).map_err(|error| self.failed(error)),
        }
    }

    /// Notes `count` pieces from `first` on, which all have the digest that `of` gives.
    pub(super) fn write(
        &self,
        first: u64,
        count: u64,
        of: impl Fn(u64) -> Digest,
    ) -> Result<(), StateError> {
        let mut done = 0;
        while done < count {
            let now = BATCH.min(count - done);
            let bytes: Vec<u8> = (first + done..first + done + now).flat_map(&of).collect();
            self.held.file.write_all_at(&bytes, at(first + done)).map_err(|e| self.failed(e))?;
            done += now;
        }
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<(), StateError> {
        self.held.file.sync_data().map_err(|error| self.failed(error))
    }

    /// The copy is done.
    pub(super) fn remove(self) -> Result<(), StateError> {
        std::fs::remove_file(&self.held.path).map_err(|error| self.failed(error))
    }
}

fn at(piece: u64) -> u64 {
    HEAD_BYTES as u64 + piece * 32
}

fn write_head(file: &File, about: &About) -> Result<io::Result<()>, StateError> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(serde_json::to_vec(about).expect("plain data"));
    if bytes.len() >= HEAD_BYTES {
        return Err(StateError::TooLong);
    }
    bytes.resize(HEAD_BYTES, 0);
    Ok(file.write_all_at(&bytes, 0).and_then(|()| file.sync_all()))
}

fn same_ends(path: &Path, found: &About, from: &str, to: &str) -> Result<(), StateError> {
    if found.source.uri == from && found.destination.uri == to {
        return Ok(());
    }
    let (from, to) = (found.source.uri.clone(), found.destination.uri.clone());
    Err(StateError::Other { path: path.to_owned(), from, to })
}

fn compare(path: &Path, found: &About, now: &About) -> Result<(), StateError> {
    same_ends(path, found, &now.source.uri, &now.destination.uri)?;
    let path = path.to_owned();
    for (role, found, now) in [
        ("source", &found.source, &now.source),
        ("destination", &found.destination, &now.destination),
    ] {
        // A destination that has grown is still it.
        let fits = match role {
            "source" => now.size_bytes == found.size_bytes,
            _ => now.size_bytes >= found.size_bytes,
        };
        if !fits {
            let what = format!("it had {} bytes and has {}", found.size_bytes, now.size_bytes);
            return Err(StateError::Changed { path, role, what });
        }
        if found.mark != now.mark {
            let what = "it was changed or replaced since the copy began".to_owned();
            return Err(StateError::Changed { path, role, what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(uri: &str, size_bytes: u64, mark: &str) -> End {
        End { uri: uri.to_owned(), size_bytes, mark: mark.to_owned() }
    }

    fn about(from: End, to: End) -> About {
        About::new(from, to, "me".to_owned())
    }

    fn open(path: &Path, about: About) -> Result<State, StateError> {
        State::open(StateFile::take(path)?, &about)
    }

    const SIZE: u64 = 5 * PIECE_BYTES;

    #[test]
    fn what_was_noted_is_found_again_and_nothing_else() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("state");
        let this = about(end("a", SIZE, "x"), end("b", SIZE, ""));
        let made = StateFile::take(&path).expect("made");
        assert!(made.begun("a", "b").expect("empty").is_none());
        drop(made);
        assert!(!path.exists(), "nothing was begun in it");
        let state = open(&path, this.clone()).expect("made");
        assert!(!state.resumed);
        state.write(1, 2, |n| [u8::try_from(n).expect("small"); 32]).expect("written");
        let again = open(&path, this.clone()).expect_err("locked").to_string();
        assert!(again.contains("runs already"), "{again}");
        drop(state);
        let later = About { owner: "another".to_owned(), ..this.clone() };
        let state = open(&path, later).expect("found");
        assert!(state.resumed && state.about().owner == "me", "the owner is the one of before");
        let mut found = Vec::new();
        state.each(|n, digest| found.push((n, digest[0]))).expect("read");
        assert_eq!(found, [(0, 0), (1, 1), (2, 2), (3, 0), (4, 0)]);
        assert_eq!((state.read(2).expect("2")[9], state.read(4).expect("4")), (2, NO_DIGEST));
        state.remove().expect("removed");
        assert!(!path.exists());
    }

    #[test]
    fn another_copy_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("state");
        let this = about(end("a", SIZE, "x"), end("b", SIZE, "y"));
        drop(open(&path, this.clone()).expect("made"));
        for (other, why) in [
            (about(end("c", SIZE, "x"), this.destination.clone()), "copy of a to b"),
            (about(this.source.clone(), end("c", SIZE, "y")), "copy of a to b"),
            (about(end("a", SIZE + 512, "x"), this.destination.clone()), "source is not the one"),
            (about(end("a", SIZE, "z"), this.destination.clone()), "source is not the one"),
            (about(this.source.clone(), end("b", SIZE - 512, "y")), "destination is not the one"),
            (about(this.source.clone(), end("b", SIZE, "z")), "destination is not the one"),
        ] {
            let error = open(&path, other).expect_err(why);
            assert!(error.to_string().contains(why) && error.is_refusal(), "{error}");
        }
        let grown = about(this.source.clone(), end("b", SIZE + 512, "y"));
        assert!(open(&path, grown).expect("it has grown").resumed);
        for other in
            [&b"my diary"[..], &[7; HEAD_BYTES], &[&MAGIC[..], &[b'x'; HEAD_BYTES]].concat()]
        {
            std::fs::write(&path, other).expect("written");
            let error = open(&path, this.clone()).expect_err("foreign").to_string();
            assert!(error.contains("is not the state of a copy"), "{error}");
            assert_eq!(std::fs::read(&path).expect("read"), other, "it was not touched");
        }
    }
}
