//! Reads that go to an image's objects past librbd: that they do, that they say the same as librbd's, and that they
//! do not where librbd's answer would be another.
//!
//! Where a read went is seen by an object that librbd's map of objects does not know: librbd answers zeros for it, and
//! the object has something else.

use baton_integration::baton::wait_until;
use baton_integration::ceph::Ceph;
use baton_remote_client::{Op, OpenOptions, Tag, VolumeQueue, VolumeState, open};
use std::fs;
use std::time::{Duration, Instant};

use completions::collect;
use image::{IMAGE_BYTES, MIB, SOON, cluster, opened, parts, pattern, run};

#[path = "support/completions.rs"]
mod completions;
#[path = "support/image.rs"]
mod image;

/// The object that librbd does not know of.
const STRANGE: u64 = 5;

/// Puts 512 bytes where the image `v` has none; what they are.
fn put_strange(ceph: &Ceph) -> [u8; 512] {
    let info = ceph.rbd(&["info", "--format", "json", "rbd/v"]).unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let object = format!("{}.{STRANGE:016x}", info["block_name_prefix"].as_str().unwrap());
    let file = ceph.conf().with_file_name("strange");
    let bytes = [0x5a; 512];
    fs::write(&file, bytes).unwrap();
    ceph.rados(&["-p", "rbd", "put", &object, file.to_str().unwrap()]).unwrap();
    bytes
}

/// Whether a read finds what librbd does not.
fn reads_directly(queue: &mut dyn VolumeQueue) -> bool {
    let mut found = [9; 512];
    run(queue, Op::Read { offset: STRANGE * 4 * MIB }, &mut found).unwrap();
    assert!(found == [0x5a; 512] || found == [0; 512], "{found:?}");
    found != [0; 512]
}

#[test]
fn reads_of_one_object_go_there_unless_they_are_told_not_to() {
    let Some((_dir, ceph)) = cluster("reads_of_one_object_go_there_unless_they_are_told_not_to")
    else {
        return;
    };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 8).unwrap();
    put_strange(&ceph);
    assert!(reads_directly(&mut *queue));
    // The rest of the object, which ends before, is zeros.
    let mut back = [9; 4096];
    run(&mut *queue, Op::Read { offset: STRANGE * 4 * MIB }, &mut back).unwrap();
    assert_eq!((&back[..512], &back[512..]), (&[0x5a; 512][..], &[0; 3584][..]));
    // Of two objects librbd is asked.
    let mut back = [9; 1024];
    run(&mut *queue, Op::Read { offset: STRANGE * 4 * MIB - 512 }, &mut back).unwrap();
    assert_eq!(back, [0; 1024]);
    drop(queue);
    volume.close(true);

    let volume = opened(&format!("{}&direct-reads=off", ceph.uri("v")));
    let mut queue = volume.open_queue(0, 8).unwrap();
    assert!(!reads_directly(&mut *queue));
}

/// An operator's limit is not gone around, also when it comes while the image is open.
#[test]
fn what_librbd_has_to_do_with_reads_it_does() {
    let Some((_dir, ceph)) = cluster("what_librbd_has_to_do_with_reads_it_does") else { return };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 8).unwrap();
    put_strange(&ceph);
    let mut wait = |what: &str, direct: bool| {
        wait_until(what, SOON, || reads_directly(&mut *queue) == direct).unwrap();
    };
    for (key, value) in
        [("rbd_qos_read_iops_limit", "100000"), ("rbd_read_from_replica_policy", "balance")]
    {
        wait("reads go to objects", true);
        ceph.rbd(&["config", "image", "set", "rbd/v", key, value]).unwrap();
        wait("reads go through librbd", false);
        ceph.rbd(&["config", "image", "remove", "rbd/v", key]).unwrap();
    }
    wait("reads go to objects again", true);
}

/// The answers are the same as librbd's, for ranges with and without objects, before and after changes of all kinds.
#[test]
fn a_clone_reads_as_librbd_reads_it() {
    let Some((_dir, ceph)) = cluster("a_clone_reads_as_librbd_reads_it") else { return };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 64).unwrap();
    let size = usize::try_from(IMAGE_BYTES).unwrap();
    let mut model = vec![0u8; size];
    let write = |queue: &mut dyn VolumeQueue, model: &mut [u8], at: u64, len, seed| {
        let mut data = pattern(len, seed);
        run(queue, Op::Write { offset: at }, &mut data).unwrap();
        let at = usize::try_from(at).unwrap();
        model[at..at + len].copy_from_slice(&data);
    };
    for (n, at) in [0, 4 * MIB + 512, 12 * MIB, 20 * MIB - 4096].into_iter().enumerate() {
        write(&mut *queue, &mut model, at, 16 << 10, n);
    }
    drop(queue);
    volume.close(true);
    ceph.rbd(&["snap", "create", "rbd/v@s"]).unwrap();
    ceph.rbd(&["snap", "protect", "rbd/v@s"]).unwrap();
    ceph.rbd(&["clone", "rbd/v@s", "rbd/c"]).unwrap();
    // A clone has the notes of its parent.
    ceph.rbd(&["image-meta", "remove", "rbd/c", "baton.access"]).unwrap();

    let volume = opened(&ceph.uri("c"));
    let mut queue = volume.open_queue(0, 64).unwrap();
    let queue = &mut *queue;
    let compare = |queue: &mut dyn VolumeQueue, model: &[u8], what: &str| {
        for at in (0..size).step_by(64 << 10) {
            let mut back = vec![9u8; 64 << 10];
            run(queue, Op::Read { offset: at as u64 }, &mut back).unwrap();
            assert!(back == model[at..at + back.len()], "{what}: {at}");
        }
    };
    compare(queue, &model, "all of it the parent's");
    // What was absent when it was read, beside and on top of what the parent has.
    write(queue, &mut model, 512, 512, 7);
    write(queue, &mut model, 12 * MIB + 8192, 4096, 8);
    write(queue, &mut model, 40 * MIB, 64 << 10, 9);
    compare(queue, &model, "after writes");
    let zeroes = |offset, len| Op::WriteZeroes { offset, len, unmap: true };
    for (op, at, len) in [
        (zeroes(0, 4 * MIB), 0, 4 * MIB),
        (Op::Discard { offset: 12 * MIB, len: 4 * MIB }, 12 * MIB, 4 * MIB),
        (zeroes(40 * MIB + 512, 1024), 40 * MIB + 512, 1024),
    ] {
        run(queue, op, &mut []).unwrap();
        model[usize::try_from(at).unwrap()..][..usize::try_from(len).unwrap()].fill(0);
    }
    compare(queue, &model, "the parent does not come back");
    // What a snapshot has of it stays, and so does what is read.
    ceph.rbd(&["snap", "create", "rbd/c@s"]).unwrap();
    write(queue, &mut model, 40 * MIB + 4096, 4096, 10);
    compare(queue, &model, "after a snapshot");
    ceph.rbd(&["flatten", "--no-progress", "rbd/c"]).unwrap();
    compare(queue, &model, "flattened");
    assert!(ceph.export("c").unwrap() == model, "Ceph's own tool reads something else");
}

/// A client that only reads learns by that that it was fenced.
#[test]
fn a_fenced_reader_gets_no_answer() {
    let Some((_dir, ceph)) = cluster("a_fenced_reader_gets_no_answer") else { return };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 64).unwrap();
    put_strange(&ceph);
    assert!(reads_directly(&mut *queue));
    let clients = ceph.clients_of("v").unwrap();
    let mut buffer = vec![0u8; 512];
    std::thread::scope(|scope| {
        let fence = scope.spawn(|| ceph.blocklist(&clients[0]));
        let until = Instant::now() + SOON;
        while volume.state() != VolumeState::Fenced {
            assert!(Instant::now() < until, "not fenced");
            if queue.in_flight() < 16 {
                let op = Op::Read { offset: STRANGE * 4 * MIB };
                // SAFETY: the buffer lives to the end of the test.
                unsafe { queue.submit(Tag(9), op, &parts(&mut buffer)) };
            }
            for one in collect(&mut *queue, 1, Duration::from_millis(100)) {
                assert_eq!(one.result, Ok(()), "no request of a fenced volume fails");
            }
        }
        fence.join().unwrap().unwrap();
    });
    // SAFETY: as above.
    unsafe { queue.submit(Tag(10), Op::Read { offset: 0 }, &parts(&mut buffer)) };
    assert_eq!(collect(&mut *queue, 1, Duration::from_secs(1)), []);
}

/// The thread that submits serves a guest's ring: it waits for nothing, however many requests the cluster owes it, and
/// an image that is closed meanwhile neither hangs nor crashes.
#[test]
fn more_reads_than_librados_would_have_out_do_not_hold_up_the_queue() {
    let name = "more_reads_than_librados_would_have_out_do_not_hold_up_the_queue";
    let Some((_dir, ceph)) = cluster(name) else { return };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 64).unwrap();
    let strange = put_strange(&ceph);
    assert!(reads_directly(&mut *queue));
    ceph.osd.freeze().unwrap();
    // Its own limit is 1024.
    const READS: usize = 3000;
    let mut buffers = vec![[9u8; 512]; READS];
    let begun = Instant::now();
    for buffer in &mut buffers {
        let op = Op::Read { offset: STRANGE * 4 * MIB };
        // SAFETY: the buffers live to the end of the test.
        unsafe { queue.submit(Tag(1), op, &parts(buffer)) };
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "the queue was held up");
    ceph.osd.thaw().unwrap();
    let done = collect(&mut *queue, READS, SOON);
    assert!(done.len() == READS && done.iter().all(|one| one.result.is_ok()));
    assert!(buffers.iter().all(|buffer| *buffer == strange));

    // Who only reads has no lock that librbd would wait with.
    let only_reads = OpenOptions { read_only: true, ..OpenOptions::new("host/other") };
    let reader = open(&ceph.uri("v"), &only_reads).unwrap();
    let mut late = [9; 512];
    let reads = reader.open_queue(0, 8).unwrap();
    ceph.osd.freeze().unwrap();
    for (volume, mut queue) in [(volume, queue), (reader, reads)] {
        for offset in [STRANGE * 4 * MIB, 0] {
            // SAFETY: the buffer lives to the end of the test.
            unsafe { queue.submit(Tag(1), Op::Read { offset }, &parts(&mut late)) };
        }
        let begun = Instant::now();
        drop(queue);
        volume.close(true);
        assert!(begun.elapsed() < Duration::from_secs(15), "the end waits for the cluster");
    }
    ceph.osd.thaw().unwrap();
    // They come back now, to nobody.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(late, [9; 512]);
    let volume = opened(&ceph.uri("v"));
    assert!(reads_directly(&mut *volume.open_queue(0, 8).unwrap()));
}
