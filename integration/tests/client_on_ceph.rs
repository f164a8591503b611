//! The RBD driver on a real Ceph cluster, without a backend between: what a guest's requests do to an image, and what
//! they do while the cluster is away or has refused the client.

use baton_integration::baton::wait_until;
use baton_integration::ceph::{Ceph, Objects, skip_without_ceph};
use baton_integration::workspace::TestDir;
use baton_protocol::Epoch;
use baton_protocol::access::{Input, Seen};
use baton_remote_client::rbd::ImageRecord;
use baton_remote_client::{
    IoError, Op, OpenError, OpenOptions, Tag, VolumeEvent, VolumeState, VolumeUri, open,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use completions::collect;
use image::{IMAGE_BYTES, MIB, SOON, cluster, opened, parts, pattern, run};

#[path = "support/completions.rs"]
mod completions;
#[path = "support/image.rs"]
mod image;

/// Longer than the driver takes to call a cluster slow.
const SLOW: Duration = Duration::from_secs(15);

fn refused(uri: &str, options: &OpenOptions) -> String {
    let error = open(uri, options).expect_err(uri);
    assert!(matches!(error, OpenError::Rbd(_)), "{error:?}");
    error.to_string()
}

/// Where the image has objects, bytes from its start, as Ceph's own tool finds them.
fn allocated(ceph: &Ceph, image: &str) -> Vec<u64> {
    let info = ceph.rbd(&["info", "--format", "json", image]).unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let prefix = format!("{}.", info["block_name_prefix"].as_str().unwrap());
    let objects = ceph.rados(&["-p", "rbd", "ls"]).unwrap();
    let number = |name: &str| u64::from_str_radix(name.strip_prefix(&prefix)?, 16).ok();
    objects.lines().filter_map(number).map(|number| number * 4 * MIB).collect()
}

/// Memory of this process, bytes.
fn resident_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn an_image_holds_what_its_requests_say() {
    let Some((_dir, ceph)) = cluster("an_image_holds_what_its_requests_say") else { return };
    let volume = opened(&ceph.uri("v"));
    let geometry = volume.geometry();
    assert_eq!((geometry.size_bytes, geometry.read_only), (IMAGE_BYTES, false));
    assert!(geometry.id[0] != 0);
    let mut queue = volume.open_queue(0, 64).unwrap();
    assert!(volume.open_queue(0, 64).is_err(), "it is open");
    let queue = &mut *queue;
    let size = usize::try_from(IMAGE_BYTES).unwrap();
    let mut model = vec![0u8; size];

    // Over the edges of objects (4 MiB), and longer than one piece.
    for (at, len) in [(0, 512), (4096, 8192), (4 * MIB - 1536, 4096), (8 * MIB + 512, 9 << 20)] {
        let mut data = pattern(len, len);
        run(queue, Op::Write { offset: at }, &mut data).unwrap();
        let at = usize::try_from(at).unwrap();
        model[at..at + len].copy_from_slice(&data);
        let mut back = vec![0u8; len];
        run(queue, Op::Read { offset: at as u64 }, &mut back).unwrap();
        assert!(back == data, "{len} bytes at {at}");
    }
    // Zeros and discards of any size; none is lost, and neither touches its neighbours.
    let zeroes = |offset, len, unmap| Op::WriteZeroes { offset, len, unmap };
    for (op, at, len) in [
        (zeroes(4096, 512, false), 4096, 512),
        (zeroes(8 * MIB + 1024, 5 * MIB + 512, true), 8 * MIB + 1024, 5 * MIB + 512),
        (Op::Discard { offset: 4 * MIB - 512, len: 1024 }, 4 * MIB - 512, 1024),
        (Op::Discard { offset: 14 * MIB, len: 64 << 10 }, 14 * MIB, 64 << 10),
    ] {
        run(queue, op, &mut []).unwrap();
        let at = usize::try_from(at).unwrap();
        model[at..at + usize::try_from(len).unwrap()].fill(0);
    }
    run(queue, Op::Flush, &mut []).unwrap();
    let mut whole = vec![1u8; size];
    run(queue, Op::Read { offset: 0 }, &mut whole).unwrap();
    assert!(whole == model, "the driver reads something else");
    assert!(ceph.export("v").unwrap() == model, "Ceph reads something else");
    // Zeros that are to keep their space do, which a discard would not: an object of them is there.
    run(queue, zeroes(32 * MIB, 4 * MIB, false), &mut []).unwrap();
    run(queue, zeroes(36 * MIB, 4 * MIB, true), &mut []).unwrap();
    let objects = allocated(&ceph, "rbd/v");
    assert!(objects.contains(&(32 * MIB)) && !objects.contains(&(36 * MIB)), "{objects:?}");

    let out = Err(IoError::OutOfRange);
    assert_eq!(run(queue, Op::Write { offset: IMAGE_BYTES - 512 }, &mut [1; 1024]), out);
    assert_eq!(run(queue, Op::Read { offset: 1 }, &mut [1; 512]), out);
    assert_eq!(run(queue, Op::Discard { offset: IMAGE_BYTES, len: 512 }, &mut []), out);
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn many_requests_of_two_queues_are_all_answered() {
    let Some((_dir, ceph)) = cluster("many_requests_of_two_queues_are_all_answered") else {
        return;
    };
    let volume = opened(&ceph.uri("v"));
    // More than may be out at once.
    const LEN: usize = 3 << 20;
    let mut queues = [0, 1].map(|index| volume.open_queue(index, 64).unwrap());
    let mut data: Vec<Vec<u8>> = (0..20).map(|n| pattern(LEN, n)).collect();
    for (n, data) in data.iter_mut().enumerate() {
        let op = Op::Write { offset: (n * LEN) as u64 };
        // SAFETY: the buffers live to the end of the test.
        unsafe { queues[n % 2].submit(Tag(u32::try_from(n).unwrap()), op, &parts(data)) };
    }
    for (index, queue) in queues.iter_mut().enumerate() {
        let done = collect(&mut **queue, 10, SOON);
        let mut tags: Vec<_> = done.iter().map(|one| (one.tag.0, one.result)).collect();
        tags.sort_unstable_by_key(|(tag, _)| *tag);
        let wanted: Vec<_> =
            (0..20).filter(|n| *n as usize % 2 == index).map(|n| (n, Ok(()))).collect();
        assert_eq!(tags, wanted);
    }
    let mut back = vec![0u8; LEN];
    for (n, data) in data.iter().enumerate() {
        run(&mut *queues[1 - n % 2], Op::Read { offset: (n * LEN) as u64 }, &mut back).unwrap();
        assert!(&back == data, "write {n}");
    }
}

/// As a backend's threads wait: in their own epoll instance, which a queue that goes is to leave, also with an answer out.
#[test]
fn a_queue_wakes_who_watches_it_and_nobody_once_it_is_gone() {
    let name = "a_queue_wakes_who_watches_it_and_nobody_once_it_is_gone";
    let Some((_dir, ceph)) = cluster(name) else { return };
    let volume = opened(&ceph.uri("v"));
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let woken = |timeout_ms: u16| {
        let mut events = [EpollEvent::empty(); 4];
        let n = epoll.wait(&mut events, EpollTimeout::from(timeout_ms)).unwrap();
        events[..n].iter().map(EpollEvent::data).collect::<Vec<_>>()
    };
    for data in [7, 8] {
        let mut queue = volume.open_queue(0, 4).unwrap();
        queue.watch_in(&epoll, data).unwrap();
        let (mut buffer, mut done) = ([1; 512], Vec::new());
        // SAFETY: the buffer outlives the request.
        unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &parts(&mut buffer)) };
        queue.poll(&mut done);
        while done.is_empty() {
            let woken = woken(10_000);
            assert!(!woken.is_empty() && woken.iter().all(|by| *by == data), "{woken:?}");
            queue.poll(&mut done);
        }
        // One answer is there and not taken, another is out.
        // SAFETY: what is written is copied when it is submitted.
        unsafe { queue.submit(Tag(2), Op::Write { offset: 0 }, &parts(&mut buffer)) };
        assert!(woken(10_000).contains(&data));
        ceph.osd.freeze().unwrap();
        // SAFETY: as above.
        unsafe { queue.submit(Tag(3), Op::Write { offset: 0 }, &parts(&mut buffer)) };
        drop(queue);
        assert!(woken(0).is_empty(), "by a queue that is gone");
        ceph.osd.thaw().unwrap();
    }
}

#[test]
fn growth_is_told_and_snapshots_are_read_only() {
    let Some((_dir, ceph)) = cluster("growth_is_told_and_snapshots_are_read_only") else { return };
    let volume = opened(&ceph.uri("v"));
    let news = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&news);
    volume.set_listener(Arc::new(move |event| heard.lock().unwrap().push(event)));
    let mut queue = volume.open_queue(0, 8).unwrap();
    let mut old = pattern(4096, 1);
    run(&mut *queue, Op::Write { offset: 0 }, &mut old).unwrap();
    run(&mut *queue, Op::Flush, &mut []).unwrap();
    ceph.rbd(&["snap", "create", "rbd/v@then"]).unwrap();
    run(&mut *queue, Op::Write { offset: 0 }, &mut pattern(4096, 2)).unwrap();

    // Somebody else's command, while this client has the image locked.
    ceph.grow_image("v", 2 * IMAGE_BYTES).unwrap();
    wait_until("the growth is told", SOON, || {
        news.lock().unwrap().contains(&VolumeEvent::Resized(2 * IMAGE_BYTES))
    })
    .unwrap();
    assert_eq!(volume.geometry().size_bytes, 2 * IMAGE_BYTES);
    run(&mut *queue, Op::Write { offset: 2 * IMAGE_BYTES - 512 }, &mut [7; 512]).unwrap();

    let uri = ceph.uri("v").replace("rbd/v?", "rbd/v@then?");
    let snapshot = opened(&uri);
    assert_eq!(snapshot.geometry().size_bytes, IMAGE_BYTES);
    assert!(snapshot.geometry().read_only);
    let mut reader = snapshot.open_queue(0, 8).unwrap();
    let mut back = vec![0; 4096];
    run(&mut *reader, Op::Read { offset: 0 }, &mut back).unwrap();
    assert!(back == old, "the snapshot has changed");
    assert_eq!(run(&mut *reader, Op::Write { offset: 0 }, &mut back), Err(IoError::ReadOnly));
    assert_eq!(run(&mut *reader, Op::Flush, &mut []), Ok(()));
}

#[test]
fn what_cannot_be_opened_says_why() {
    let Some((dir, ceph)) = cluster("what_cannot_be_opened_says_why") else { return };
    let plain = OpenOptions::new("host/vm");
    let uri = ceph.uri("v");
    let says = |uri: &str, part: &str| {
        let said = refused(uri, &plain);
        assert!(said.contains(part), "{uri}: {said}");
    };
    says(&uri.replace("rbd/v?", "rbd/w?"), "no image `rbd/w`");
    says(&uri.replace("rbd/v?", "vms/v?"), "no pool `vms`");
    says(&uri.replace("rbd/v?", "rbd/v@s?"), "no snapshot `rbd/v@s`");
    says(&format!("{uri}&id=nobody"), "does not let `client.nobody` in");
    ceph.add_user("vm", "profile rbd", "profile rbd pool=rbd").unwrap();
    ceph.add_user("other", "profile rbd", "profile rbd pool=vms").unwrap();
    says(&format!("{uri}&id=other"), "give it `mon 'profile rbd' osd 'profile rbd pool=rbd'`");
    let key = dir.join("ceph/client.wrong.keyring");
    fs::write(&key, "[client.wrong]\nkey = AQAAAAAAAAAAABAAbR6E0W1v3dmUxPqdHBCqUQ==\n").unwrap();
    says(&format!("{uri}&id=wrong"), "does not let `client.wrong` in");
    says("rbd://rbd/v?conf=/nowhere/ceph.conf", "cannot read Ceph's configuration `/nowhere");
    ceph.rbd(&["create", "--size", "1M", "--image-feature", "layering", "rbd/unlocked"]).unwrap();
    says(&uri.replace("rbd/v?", "rbd/unlocked?"), "rbd feature enable rbd/unlocked exclusive-lock");
    ceph.rbd(&["config", "image", "set", "rbd/v", "rbd_cache", "true"]).unwrap();
    says(&uri, "rbd config image remove rbd/v rbd_cache");
    ceph.rbd(&["config", "image", "remove", "rbd/v", "rbd_cache"]).unwrap();
    ceph.rbd(&["image-meta", "set", "rbd/v", "baton.access", "{}"]).unwrap();
    says(&uri, "rbd image-meta remove rbd/v baton.access");
    ceph.rbd(&["image-meta", "remove", "rbd/v", "baton.access"]).unwrap();

    // A user with no more than the profile can do everything here, fencing included.
    let volume = opened(&format!("{uri}&id=vm"));
    let other = refused(&uri, &OpenOptions::new("host/other"));
    assert!(other.contains("belongs to `host/vm`"), "{other}");
    // Not given back: it stays this VM's.
    volume.close(false);
    drop(volume);
    let other = refused(&uri, &OpenOptions::new("host/other"));
    assert!(other.contains("belongs to `host/vm`"), "{other}");
    let volume = opened(&uri);
    volume.close(true);
    drop(volume);
    let volume = open(&uri, &OpenOptions::new("host/other")).unwrap();
    let conf = dir.join("away.conf");
    fs::write(&conf, "[global]\nmon host = 127.0.0.1:1\nkeyring = /dev/null\n").unwrap();
    drop(volume);
    let hurried = OpenOptions { connect_timeout: Duration::from_secs(1), ..plain.clone() };
    let away = refused(&format!("rbd://rbd/v?conf={}", conf.display()), &hurried);
    assert!(away.contains("no monitor") || away.contains("let `client.admin` in"), "{away}");
}

/// The access record decides who may write, so a change that was answered is in it, whoever else changed it then.
#[test]
fn no_change_of_an_access_record_is_lost() {
    let Some((_dir, ceph)) = cluster("no_change_of_an_access_record_is_lost") else { return };
    let VolumeUri::Rbd(uri) = ceph.uri("v").parse().unwrap() else { panic!("an image") };
    const EACH: u64 = 12;
    let change = || {
        let image = ImageRecord::connect(&uri, SOON).unwrap();
        for _ in 0..EACH {
            // Each takes a number.
            image.change(Input::Fence { term: None, nominee: None, seen: None }).unwrap();
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(change))));
    let seat = ImageRecord::connect(&uri, SOON).unwrap().read().unwrap();
    assert_eq!((seat.record.next_epoch.0, seat.record.version), (1 + 4 * EACH, 4 * EACH));
}

/// What engines.md promises of each client, asked of the client itself, whose host and whose cluster say the opposite.
#[test]
fn what_the_driver_counts_on_is_set_whatever_host_and_cluster_say() {
    let name = "what_the_driver_counts_on_is_set_whatever_host_and_cluster_say";
    if skip_without_ceph(name) {
        return;
    }
    let dir = TestDir::new("settings").unwrap();
    // The option, what it is to be, and what the host says.
    let options = [
        ("rbd_cache", "false", "true"),
        ("rbd_persistent_cache_mode", "disabled", "ssd"),
        ("rbd_disable_zero_copy_writes", "true", "false"),
        ("rbd_io_scheduler", "none", "simple"),
        ("rbd_non_blocking_aio", "false", "true"),
        ("librados_thread_count", "1", "2"),
        ("ms_tcp_prefetch_max_size", "32768", "4096"),
        ("rbd_discard_granularity_bytes", "4096", "65536"),
        ("rbd_skip_partial_discard", "false", "true"),
        ("rbd_blocklist_on_break_lock", "false", "true"),
        ("rados_osd_op_timeout", "0", "30"),
        ("rados_mon_op_timeout", "0", "30"),
        ("objecter_inflight_ops", "0", "1024"),
        ("objecter_inflight_op_bytes", "0", "104857600"),
    ];
    let socket = |what: &str| dir.join(&format!("{what}.sock"));
    let mut lines = format!("[client.vm]\nadmin socket = {}\n", socket("$pid.$cctid").display());
    for (key, _, host) in options {
        lines += &format!("{key} = {host}\n");
    }
    let ceph = Ceph::start_with(dir.path(), Objects::Memory, &lines).unwrap();
    ceph.create_image("v", IMAGE_BYTES).unwrap();
    ceph.add_user("vm", "profile rbd", "profile rbd pool=rbd").unwrap();
    // A client that takes another number of threads from the monitors aborts, Ceph's tool too: only ours are told.
    let cluster = options.iter().filter(|(key, _, _)| *key != "librados_thread_count");
    for (key, _, host) in cluster {
        ceph.ceph(&["config", "set", "client", key, host]).unwrap();
    }
    let volume = opened(&format!("{}&id=vm", ceph.uri("v")));
    let mut queue = volume.open_queue(0, 8).unwrap();
    run(&mut *queue, Op::Write { offset: 0 }, &mut [1; 512]).unwrap();

    let mine = format!("{}.", std::process::id());
    let sockets: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    let is_mine = |path: &std::path::PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&mine))
    };
    let clients: Vec<_> = sockets.into_iter().filter(is_mine).collect();
    assert!(!clients.is_empty(), "no client of ours has a socket");
    let config = |client: &std::path::Path, what| -> serde_json::Value {
        let ask = ["--admin-daemon", client.to_str().unwrap(), "config", what];
        serde_json::from_str(&ceph.ceph(&ask).unwrap()).unwrap()
    };
    ceph.ceph(&["config", "set", "client.vm", "librados_thread_count", "3"]).unwrap();
    for client in &clients {
        wait_until("the client has heard of it", SOON, || {
            config(client, "diff")["diff"]["librados_thread_count"]["mon"] == 3
        })
        .unwrap();
        let set = config(client, "show");
        for (key, want, host) in options {
            let found = set[key].as_str().unwrap_or_else(|| panic!("no {key}"));
            let number = |text: &str| text.parse::<f64>().ok();
            let same = |a: &str, b: &str| a == b || number(a).is_some_and(|n| number(b) == Some(n));
            assert!(same(found, want) && !same(found, host), "{key} is {found}, not {want}");
        }
    }
}

/// The lock proves nothing: a client that hung when it had given the lock back could still write.
#[test]
fn an_earlier_client_is_fenced_though_it_has_no_lock() {
    let Some((_dir, ceph)) = cluster("an_earlier_client_is_fenced_though_it_has_no_lock") else {
        return;
    };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 8).unwrap();
    run(&mut *queue, Op::Write { offset: 0 }, &mut [1; 512]).unwrap();
    let client = ceph.clients_of("v").unwrap().remove(0);
    let info = ceph.rbd(&["info", "--format", "json", "rbd/v"]).unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let header = format!("rbd_header.{}", info["id"].as_str().unwrap());
    let lock = ["-p", "rbd", "lock", "info", &header, "rbd_lock"];
    let lock: serde_json::Value = serde_json::from_str(&ceph.rados(&lock).unwrap()).unwrap();
    let locker = &lock["lockers"][0];
    let (name, cookie) = (locker["name"].as_str().unwrap(), locker["cookie"].as_str().unwrap());
    let unlock = ["-p", "rbd", "--lock-cookie", cookie, "lock", "break", &header, "rbd_lock", name];
    ceph.rados(&unlock).unwrap();

    let next = opened(&ceph.uri("v"));
    assert!(ceph.blocklisted().unwrap().contains_key(&client), "{client}");
    let mut late = [2; 512];
    // SAFETY: the buffer lives to the end of the test.
    unsafe { queue.submit(Tag(1), Op::Write { offset: 0 }, &parts(&mut late)) };
    wait_until("it notices", SOON, || {
        queue.poll(&mut Vec::new());
        volume.state() == VolumeState::Fenced
    })
    .unwrap();
    let mut queue = next.open_queue(0, 8).unwrap();
    let mut back = [0; 512];
    run(&mut *queue, Op::Read { offset: 0 }, &mut back).unwrap();
    assert_eq!(back, [1; 512]);

    // By force: who has the image is on the blocklist before the record says that another may have it.
    let VolumeUri::Rbd(uri) = ceph.uri("v").parse().unwrap() else { panic!("an image") };
    let image = ImageRecord::connect(&uri, SOON).unwrap();
    let client = image.read().unwrap().client.unwrap();
    let stale = Some(Seen { owner: Some("host/other"), next_epoch: Epoch(1) });
    let fence = |seen| image.fence(Input::Fence { term: None, nominee: Some("host/new"), seen });
    assert!(fence(stale).is_err() && !ceph.blocklisted().unwrap().contains_key(&client));
    let fenced = fence(None).unwrap();
    assert_eq!(fenced.record.owner.unwrap().name, "host/new");
    assert!(ceph.blocklisted().unwrap().contains_key(&client), "{client}");
    assert!(refused(&ceph.uri("v"), &OpenOptions::new("host/vm")).contains("was fenced"));
}

#[test]
fn a_blocklisted_client_is_fenced_for_good() {
    let Some((_dir, ceph)) = cluster("a_blocklisted_client_is_fenced_for_good") else { return };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 64).unwrap();
    run(&mut *queue, Op::Write { offset: 0 }, &mut [1; 512]).unwrap();
    let clients = ceph.clients_of("v").unwrap();
    let [client] = clients.as_slice() else { panic!("{clients:?}") };

    // Writes go on while the fence falls.
    let mut data = vec![2u8; 4096];
    let mut answered = 0;
    std::thread::scope(|scope| {
        let fence = scope.spawn(|| ceph.blocklist(client));
        let until = Instant::now() + SOON;
        while volume.state() != VolumeState::Fenced {
            assert!(Instant::now() < until, "not fenced");
            while queue.in_flight() < 16 {
                // SAFETY: the buffer lives to the end of the test.
                unsafe { queue.submit(Tag(9), Op::Write { offset: MIB }, &parts(&mut data)) };
            }
            for one in collect(&mut *queue, 1, Duration::from_millis(100)) {
                assert_eq!(one.result, Ok(()), "no request of a fenced volume fails");
                answered += 1;
            }
        }
        fence.join().unwrap().unwrap();
    });
    assert!(answered > 0);
    let taken_over = opened(&ceph.uri("v"));
    let before = ceph.export("v").unwrap();
    // The lock was broken, and the entry is still the one that outlives whatever may be frozen.
    let listed = ceph.blocklisted().unwrap();
    let year = listed[client][..4].parse::<u32>().unwrap();
    assert!(year >= 2035, "{listed:?}");
    // Neither writes nor flushes are answered, and none of them lands.
    data.fill(3);
    for op in [Op::Write { offset: 0 }, Op::Flush, Op::Write { offset: 2 * MIB }] {
        // SAFETY: as above.
        unsafe { queue.submit(Tag(10), op, &parts(&mut data)) };
    }
    assert_eq!(collect(&mut *queue, 1, Duration::from_secs(2)), []);
    assert!(queue.in_flight() >= 3);
    assert!(ceph.export("v").unwrap() == before, "a fenced client has written");
    let closing = Instant::now();
    drop(queue);
    volume.close(true);
    assert!(closing.elapsed() < SLOW);
    // It had nothing to give back.
    let mut queue = taken_over.open_queue(0, 8).unwrap();
    run(&mut *queue, Op::Write { offset: 0 }, &mut [5; 512]).unwrap();
    run(&mut *queue, Op::Flush, &mut []).unwrap();
}

#[test]
fn a_cluster_that_is_away_parks_requests_and_goes_on() {
    let Some((_dir, ceph)) = cluster("a_cluster_that_is_away_parks_requests_and_goes_on") else {
        return;
    };
    let volume = opened(&ceph.uri("v"));
    let mut queue = volume.open_queue(0, 64).unwrap();
    run(&mut *queue, Op::Write { offset: 0 }, &mut [1; 512]).unwrap();
    ceph.osd.freeze().unwrap();
    // A guest may change its memory as soon as a request is submitted: what is written is what was there then.
    let submitted = pattern(4 << 20, 99);
    let mut changing = submitted.clone();
    // SAFETY: the buffer lives to the end of the test.
    unsafe { queue.submit(Tag(7), Op::Write { offset: 60 * MIB }, &parts(&mut changing)) };
    changing.fill(0);
    // More than what may be out.
    let mut data: Vec<_> = (0..12).map(|n| pattern(4 << 20, n)).collect();
    for (n, data) in data.iter_mut().enumerate() {
        let op = Op::Write { offset: n as u64 * 4 * MIB };
        // SAFETY: the buffers live to the end of the test.
        unsafe { queue.submit(Tag(0), op, &parts(data)) };
    }
    // The queue's own descriptor tells when it is time to look: nobody looks before.
    let (until, mut done) = (Instant::now() + SLOW, Vec::new());
    queue.poll(&mut done);
    while volume.state() == VolumeState::Connected {
        let left = PollTimeout::try_from(until.saturating_duration_since(Instant::now())).unwrap();
        let mut fds = [PollFd::new(queue.wake_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, left), Ok(1), "nobody says that the cluster is slow");
        queue.poll(&mut done);
        assert_eq!(done, []);
    }
    assert_eq!(volume.state(), VolumeState::Reconnecting);
    // What waits, waits in the guest's memory: a request that is not out costs none here.
    let before = resident_bytes();
    for n in 0..100 {
        // SAFETY: the buffer lives to the end of the test.
        unsafe {
            queue.submit(Tag(8), Op::Write { offset: n % 15 * 4 * MIB }, &parts(&mut data[0]))
        };
    }
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 100 * MIB, "400 MiB of requests cost {grown} bytes");
    // A queue that is given up does not wait, and takes nothing of the guest's with it.
    let mut gone = volume.open_queue(1, 8).unwrap();
    let mut read = vec![9u8; 4096];
    // SAFETY: the queue is dropped before the buffer.
    unsafe { gone.submit(Tag(0), Op::Read { offset: 0 }, &parts(&mut read)) };
    let begun = Instant::now();
    drop(gone);
    assert!(begun.elapsed() < Duration::from_secs(1));

    ceph.osd.thaw().unwrap();
    let done = collect(&mut *queue, 113, SOON);
    assert!(done.len() == 113 && done.iter().all(|one| one.result.is_ok()), "{done:?}");
    assert_eq!(volume.state(), VolumeState::Connected);
    assert_eq!(read, [9u8; 4096], "nobody waited for this answer");
    let mut back = vec![0; 4 << 20];
    run(&mut *queue, Op::Read { offset: 60 * MIB }, &mut back).unwrap();
    assert!(back == submitted, "what was written is not what was submitted");
    // The first buffer was written everywhere, after all others.
    for n in 0..12 {
        run(&mut *queue, Op::Read { offset: n * 4 * MIB }, &mut back).unwrap();
        assert!(back == data[0], "write {n}");
    }
    ceph.osd.freeze().unwrap();
    // SAFETY: the buffer lives to the end of the test.
    unsafe { queue.submit(Tag(0), Op::Write { offset: 0 }, &parts(&mut read)) };
    let begun = Instant::now();
    drop(queue);
    volume.close(true);
    assert!(begun.elapsed() < SLOW, "the end waits for the cluster");
    ceph.osd.thaw().unwrap();
}
