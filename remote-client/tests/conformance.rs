//! What every driver promises, asked of every driver.
//!
//! The oracle is an array of bytes: whatever is written, zeroed, discarded and
//! flushed, in whatever sizes and pieces, reads back as the array says. What was
//! discarded may read as anything until it is written again.

mod common;
mod nbd_server;

use std::sync::Arc;
use std::time::Duration;

use baton_remote_client::{IoError, Op, Tag, Volume, VolumeQueue, VolumeState};
use common::{Buffer, Server, TinyServer, collect, opened, run};
use nbd_server::{NbdServer, disk, skip_without};

const BYTES: u64 = 8 << 20;

fn bytes(random: &mut fastrand::Rng, len: usize) -> Vec<u8> {
    (0..len).map(|_| random.u8(..)).collect()
}

fn conforms(volume: &Arc<dyn Volume>) {
    let geometry = volume.geometry();
    assert_eq!((geometry.size_bytes, geometry.read_only), (BYTES, false));
    assert_eq!(volume.state(), VolumeState::Connected);
    assert!(geometry.id.iter().any(|b| *b != 0), "a disk has an identity");
    let mut queue = volume.open_queue(0, 32).expect("queue");
    refuses(&mut *queue);
    agrees_with_an_array(&mut *queue, u64::from(geometry.block_bytes));
    takes_many_at_once(&mut *queue);
    takes_any_pieces(&mut *queue);
    assert_eq!(queue.in_flight(), 0);
    drop(queue);
    // What was dropped may be opened again.
    let mut queue = volume.open_queue(0, 4).expect("queue");
    assert_eq!(run(&mut *queue, Op::Flush, &mut Buffer(Vec::new())), Ok(()));
    drop(queue);
    volume.close(true);
}

fn refuses(queue: &mut dyn VolumeQueue) {
    let mut buffer = Buffer(vec![1; 8192]);
    for op in [
        Op::Read { offset: BYTES - 4096 },
        Op::Write { offset: BYTES - 4096 },
        Op::Write { offset: BYTES },
        Op::Discard { offset: BYTES, len: 4096 },
        Op::WriteZeroes { offset: BYTES - 4096, len: 8192, unmap: true },
    ] {
        assert_eq!(run(queue, op, &mut buffer), Err(IoError::OutOfRange), "{op:?}");
    }
}

fn agrees_with_an_array(queue: &mut dyn VolumeQueue, block: u64) {
    let mut random = fastrand::Rng::with_seed(0x5eed);
    // `None`: discarded, reads as anything.
    let mut array: Vec<Option<u8>> = vec![Some(0); usize::try_from(BYTES).expect("small")];
    let mut nothing = Buffer(Vec::new());
    for round in 0..300 {
        let most = if round % 10 == 0 { 2 << 20 } else { 64 << 10 };
        let offset = random.u64(..BYTES / block) * block;
        let len = ((1 + random.u64(..most / block)) * block).min(BYTES - offset);
        let at = usize::try_from(offset).expect("small");
        let n = usize::try_from(len).expect("small");
        let range = at..at + n;
        match random.u64(..8) {
            0..3 => {
                let bytes = bytes(&mut random, n);
                array[range].iter_mut().zip(&bytes).for_each(|(a, b)| *a = Some(*b));
                assert_eq!(run(queue, Op::Write { offset }, &mut Buffer(bytes)), Ok(()));
            }
            3 => {
                array[range].fill(None);
                assert_eq!(run(queue, Op::Discard { offset, len }, &mut nothing), Ok(()));
            }
            unmap @ 4..6 => {
                array[range].fill(Some(0));
                let op = Op::WriteZeroes { offset, len, unmap: unmap == 4 };
                assert_eq!(run(queue, op, &mut nothing), Ok(()));
            }
            6 => assert_eq!(run(queue, Op::Flush, &mut nothing), Ok(())),
            _ => {
                let mut back = Buffer(vec![0xee; n]);
                assert_eq!(run(queue, Op::Read { offset }, &mut back), Ok(()));
                let wrong =
                    array[range].iter().zip(&back.0).position(|(a, b)| a.is_some_and(|a| a != *b));
                assert_eq!(wrong, None, "round {round}: byte {wrong:?} behind {offset}");
            }
        }
    }
    let mut back = Buffer(vec![0xee; array.len()]);
    assert_eq!(run(queue, Op::Read { offset: 0 }, &mut back), Ok(()));
    let wrong = array.iter().zip(&back.0).position(|(a, b)| a.is_some_and(|a| a != *b));
    assert_eq!(wrong, None);
}

fn takes_many_at_once(queue: &mut dyn VolumeQueue) {
    const COUNT: u32 = 32;
    let mut buffers: Vec<_> = (1u8..=32).map(|n| Buffer(vec![n; 8192])).collect();
    for write in [true, false] {
        for (tag, buffer) in (0..COUNT).zip(&mut buffers) {
            let offset = u64::from(tag) * 16384;
            let op = if write { Op::Write { offset } } else { Op::Read { offset } };
            // SAFETY: the buffers live until all requests are done.
            unsafe { queue.submit(Tag(tag), op, &buffer.iov()) };
        }
        let mut done = collect(queue, COUNT as usize, Duration::from_secs(20));
        done.sort_by_key(|done| done.tag.0);
        let tags: Vec<_> = done.iter().map(|done| (done.tag.0, done.result)).collect();
        assert_eq!(tags, (0..COUNT).map(|tag| (tag, Ok(()))).collect::<Vec<_>>());
        if write {
            buffers.iter_mut().for_each(|buffer| buffer.0.fill(0xee));
        }
    }
    for (n, buffer) in buffers.iter().enumerate() {
        assert!(buffer.0.iter().all(|b| usize::from(*b) == n + 1), "request {n}");
    }
}

fn takes_any_pieces(queue: &mut dyn VolumeQueue) {
    let mut memory: Vec<u8> = bytes(&mut fastrand::Rng::with_seed(0x91ece5), 1 << 20);
    let pieces = |memory: &mut Vec<u8>| -> Vec<libc::iovec> {
        // Of one byte and of many, and more of them than a system call takes.
        let (few, many) = memory.split_at_mut(4096);
        let few = few.chunks_mut(1);
        let iov = |part: &mut [u8]| libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        };
        few.chain(many.chunks_mut(70_001)).map(iov).collect()
    };
    let mut transfer = |op, memory: &mut Vec<u8>| {
        // SAFETY: the memory outlives the request, which is waited for.
        unsafe { queue.submit(Tag(9), op, &pieces(memory)) };
        let done = collect(queue, 1, Duration::from_secs(20));
        assert_eq!((done.len(), done[0].result), (1, Ok(())));
    };
    let want = memory.clone();
    transfer(Op::Write { offset: 4096 }, &mut memory);
    memory.fill(0xee);
    transfer(Op::Read { offset: 4096 }, &mut memory);
    assert!(memory == want);
}

#[test]
fn a_local_file() {
    let dir = tempfile::tempdir().expect("directory");
    conforms(&opened(&format!("file://{}", disk(dir.path(), BYTES))));
}

#[test]
fn a_baton_volume() {
    let server = TinyServer::tcp(Server::new(usize::try_from(BYTES).expect("small")));
    conforms(&opened(&server.uri));
}

/// What nbdkit can leave out, cut, refuse and answer in another form.
#[test]
fn an_nbd_export_of_nbdkit() {
    if skip_without("an_nbd_export_of_nbdkit", "nbdkit") {
        return;
    }
    for args in [
        &["file", "DISK"][..],
        &["--no-sr", "file", "DISK"],
        &["--filter=nozero", "file", "DISK"],
        &["--filter=nozero", "file", "DISK", "zeromode=notrim"],
        &["--filter=fua", "file", "DISK", "fuamode=emulate"],
        &["--filter=fua", "file", "DISK", "fuamode=force"],
        &[
            "--filter=blocksize-policy",
            "file",
            "DISK",
            "blocksize-minimum=4096",
            "blocksize-preferred=65536",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
        &["--filter=noparallel", "--filter=multi-conn", "file", "DISK", "multi-conn-mode=disable"],
        &["--filter=delay", "memory", "8M", "rdelay=2ms"],
    ] {
        let dir = tempfile::tempdir().expect("directory");
        let path = disk(dir.path(), BYTES);
        let args: Vec<&str> =
            args.iter().map(|arg| if *arg == "DISK" { path.as_str() } else { arg }).collect();
        let server = NbdServer::nbdkit(dir.path(), &args);
        eprintln!("{args:?}");
        conforms(&opened(&server.uri("")));
    }
}

/// qemu-nbd: extended headers, one client or several.
#[test]
fn an_nbd_export_of_qemu() {
    if skip_without("an_nbd_export_of_qemu", "qemu-nbd") {
        return;
    }
    for shared in ["--shared=1", "--shared=8"] {
        let dir = tempfile::tempdir().expect("directory");
        let path = disk(dir.path(), BYTES);
        let server = NbdServer::qemu(dir.path(), &[shared, "--discard=unmap", &path]);
        let volume = opened(&server.uri("disk"));
        assert_eq!(volume.queues_max() > 1, shared == "--shared=8");
        conforms(&volume);
    }
}
