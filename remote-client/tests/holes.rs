//! What a volume knows of its holes, asked of files and of real NBD servers.

mod common;
mod nbd_server;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use baton_remote_client::{Extent, IoError, OpenOptions, Tag, VolumeQueue, open};
use common::{collect, options};
use nbd_server::{NbdServer, disk, skip_without};

const BYTES: u64 = 64 << 20;
/// Where the disk has data: first byte, bytes; multiples of what any file system
/// keeps holes of.
const DATA: [(u64, u64); 3] = [(0, 1 << 20), (16 << 20, 64 << 10), (48 << 20, 16 << 20)];

fn sparse(dir: &std::path::Path) -> String {
    let path = disk(dir, BYTES);
    let file = std::fs::File::options().write(true).open(&path).expect("open");
    for (offset, len) in DATA {
        let bytes = vec![7; usize::try_from(len).expect("small")];
        file.write_all_at(&bytes, offset).expect("write");
    }
    path
}

fn mapping() -> OpenOptions {
    OpenOptions { read_only: true, map: true, ..options() }
}

/// One question; what it was answered, without the end.
fn ask(
    queue: &mut dyn VolumeQueue,
    offset: u64,
    len: u64,
    room: usize,
) -> Option<Result<Vec<Extent>, IoError>> {
    let mut into = vec![Extent { len: u64::MAX, zeros: 9 }; room];
    // SAFETY: the memory outlives the request, which is waited for.
    if !unsafe { queue.submit_map(Tag(3), offset, len, &mut into) } {
        return None;
    }
    let done = collect(queue, 1, Duration::from_secs(20));
    assert_eq!((done.len(), done[0].tag), (1, Tag(3)));
    let end = into.iter().position(|extent| extent.len == 0).unwrap_or(room);
    Some(done[0].result.map(|()| into[..end].to_vec()))
}

/// All of it, in as many questions as it takes; neighbours of one kind joined.
fn whole(queue: &mut dyn VolumeQueue, room: usize) -> Vec<(u64, u64, bool)> {
    let (mut at, mut found) = (0, Vec::<(u64, u64, bool)>::new());
    while at < BYTES {
        let extents = ask(queue, at, BYTES - at, room).expect("it tells").expect("an answer");
        assert!(!extents.is_empty() && extents.len() <= room);
        for extent in extents {
            let (len, zeros) = (extent.len.min(BYTES - at), extent.zeros != 0);
            match found.last_mut() {
                Some((_, before, kind)) if *kind == zeros => *before += len,
                _ => found.push((at, len, zeros)),
            }
            at += len;
        }
    }
    found
}

fn tells_its_holes(uri: &str) {
    let volume = open(uri, &mapping()).expect("open");
    let mut queue = volume.open_queue(0, 4).expect("queue");
    let data = |room, queue: &mut dyn VolumeQueue| -> Vec<(u64, u64)> {
        whole(queue, room).into_iter().filter(|e| !e.2).map(|e| (e.0, e.1)).collect()
    };
    // Less room than there are extents is only more questions.
    for room in [1, 2, 100] {
        assert_eq!(data(room, &mut *queue), DATA, "{uri}, {room}");
    }
    for (offset, len) in [(BYTES, 4096), (0, BYTES + 4096), (0, 0), (u64::MAX - 511, 512)] {
        let answer = ask(&mut *queue, offset, len, 1);
        assert_eq!(answer, Some(Err(IoError::OutOfRange)), "{offset} {len}");
    }
}

#[test]
fn a_file_tells_its_holes() {
    let dir = tempfile::tempdir().expect("directory");
    tells_its_holes(&format!("file://{}", sparse(dir.path())));
}

#[test]
fn nbdkit_tells_its_holes() {
    if skip_without("nbdkit_tells_its_holes", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = sparse(dir.path());
    let server = NbdServer::nbdkit(dir.path(), &["file", &path]);
    tells_its_holes(&server.uri(""));
}

/// Extended headers, and so the wide form of the answer.
#[test]
fn qemu_tells_its_holes() {
    if skip_without("qemu_tells_its_holes", "qemu-nbd") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = sparse(dir.path());
    let server = NbdServer::qemu(dir.path(), &["--shared=8", "--read-only", &path]);
    tells_its_holes(&server.uri("disk"));
}

/// Servers that cannot tell, and clients that did not say that they would ask.
#[test]
fn who_cannot_tell_says_so() {
    if skip_without("who_cannot_tell_says_so", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = sparse(dir.path());
    for (args, map) in [(&["--no-sr", "file", &path][..], true), (&["file", &path], false)] {
        let dir = tempfile::tempdir().expect("directory");
        let server = NbdServer::nbdkit(dir.path(), args);
        let volume = open(&server.uri(""), &OpenOptions { map, ..mapping() }).expect("open");
        let mut queue = volume.open_queue(0, 4).expect("queue");
        assert_eq!(ask(&mut *queue, 0, 4096, 1), None, "{args:?}");
    }
}

/// A question that was not answered is asked again, and a server that cannot tell any
/// more is no hang.
#[test]
fn a_question_outlives_its_server() {
    if skip_without("a_question_outlives_its_server", "nbdkit") {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let path = sparse(dir.path());
    let slow = ["--filter=delay", "file", &path, "delay-extents=300ms"];
    let mut server = NbdServer::nbdkit(dir.path(), &slow);
    let volume = open(&server.uri(""), &mapping()).expect("open");
    let mut queue = volume.open_queue(0, 4).expect("queue");
    for more in [None, Some("--no-sr")] {
        let mut into = [Extent::default(); 8];
        // SAFETY: the memory outlives the request, which is waited for.
        assert!(unsafe { queue.submit_map(Tag(1), 0, BYTES, &mut into) });
        assert_eq!(collect(&mut *queue, 1, Duration::from_millis(50)), []);
        server.kill();
        if let Some(more) = more {
            server.add_argument(more);
        }
        server.restart();
        let done = collect(&mut *queue, 1, Duration::from_secs(20));
        let want = if more.is_none() { Ok(()) } else { Err(IoError::Unsupported) };
        assert_eq!((done.len(), done[0].result), (1, want));
        if more.is_none() {
            assert_eq!(into[0], Extent { len: DATA[0].1, zeros: 0 });
        }
    }
}
