//! What the backend makes of vhost-user messages: the right ones in the orders that VMMs use, and the wrong ones.

use crate::support::{A_WHILE, Random, SOON, Stack, halves, seed, words};
use baton_integration::baton::wait_until;
use baton_integration::blk::{OK, Request};
use baton_integration::memory::{BASE, SharedMap};
use baton_integration::raw_frontend::{Options, RawFrontend};
use baton_integration::vhost_user::{
    Channel, FLAG_NEED_REPLY, FLAG_REPLY, Message, feature, protocol, request,
};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

/// The whole of what cloud-hypervisor asks for.
const CH_PROTOCOL: u64 = protocol::CONFIG
    | protocol::MQ
    | protocol::CONFIGURE_MEM_SLOTS
    | protocol::REPLY_ACK
    | protocol::INFLIGHT_SHMFD
    | protocol::LOG_SHMFD
    | protocol::DEVICE_STATE;

fn channel(stack: &Stack) -> Channel {
    Channel::connect(&stack.backend.socket).unwrap()
}

/// Sends a message that asks for an acknowledgement; returns its number, or nothing when the connection ended.
fn acknowledged(
    channel: &Channel,
    number: u32,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Option<u64> {
    channel.send(number, FLAG_NEED_REPLY, body, fds).ok()?;
    let reply = channel.receive().ok()?;
    assert_eq!((reply.request, reply.flags & FLAG_REPLY), (number, FLAG_REPLY));
    Some(reply.u64().unwrap())
}

fn ask(channel: &Channel, number: u32, body: &[u8]) -> Message {
    channel.send(number, 0, body, &[]).unwrap();
    let reply = channel.receive().unwrap();
    assert_eq!((reply.request, reply.flags & FLAG_REPLY), (number, FLAG_REPLY));
    reply
}

/// Row 33 of the failure table: post-copy is refused before it begins. A monitor that is to copy memory behind the
/// switch asks every back-end for PAGEFAULT (vhost-user, "VHOST_USER_PROTOCOL_F_PAGEFAULT": "the backend can support
/// postcopy"), and QEMU fails the migration at its start when one has not got it.
#[test]
fn row_33_post_copy_is_not_offered() {
    const PAGEFAULT: u64 = 1 << 8;
    let stack = Stack::start(&[]);
    let channel = channel(&stack);
    let offered = ask(&channel, request::GET_PROTOCOL_FEATURES, &[]).u64().unwrap();
    assert_eq!(offered & (PAGEFAULT | protocol::LOG_SHMFD), protocol::LOG_SHMFD);
}

fn config_body(offset: u32, len: u32) -> Vec<u8> {
    let mut body = halves(&[offset, len, 0]);
    body.resize(12 + usize::try_from(len).unwrap(), 0);
    body
}

/// (number, body, descriptors) that is right, and whether it has an answer of its own.
type Known<'a> = (u32, Vec<u8>, Vec<BorrowedFd<'a>>, bool);

fn every_message<'a>(memory: &'a SharedMap, file: &'a File) -> Vec<Known<'a>> {
    let fd = memory.fd();
    let len = memory.len() as u64;
    let log = words(&[4096, 0]);
    let inflight = || [words(&[4096, 0]), [1_u16, 128].map(u16::to_le_bytes).concat()].concat();
    let region = words(&[0, BASE, len, 1 << 44, 0]);
    vec![
        (request::GET_FEATURES, vec![], vec![], true),
        (
            request::SET_FEATURES,
            words(&[feature::VERSION_1 | feature::PROTOCOL_FEATURES]),
            vec![],
            false,
        ),
        (request::SET_OWNER, vec![], vec![], false),
        (request::SET_MEM_TABLE, words(&[1, BASE, len, 1 << 44, 0]), vec![fd], false),
        (request::SET_LOG_BASE, log, vec![fd], true),
        (request::SET_VRING_NUM, halves(&[0, 128]), vec![], false),
        (request::SET_VRING_ADDR, [halves(&[0, 0]), words(&[0; 4])].concat(), vec![], false),
        (request::SET_VRING_BASE, halves(&[0, 0]), vec![], false),
        (request::GET_VRING_BASE, halves(&[0, 0]), vec![], true),
        (request::SET_VRING_CALL, words(&[0]), vec![fd], false),
        (request::SET_VRING_ERR, words(&[0]), vec![fd], false),
        (request::GET_PROTOCOL_FEATURES, vec![], vec![], true),
        (request::SET_PROTOCOL_FEATURES, words(&[protocol::REPLY_ACK]), vec![], false),
        (request::GET_QUEUE_NUM, vec![], vec![], true),
        (request::SET_VRING_ENABLE, halves(&[0, 0]), vec![], false),
        (request::GET_CONFIG, config_body(0, 60), vec![], true),
        (request::SET_CONFIG, [halves(&[32, 1, 0]), vec![1]].concat(), vec![], false),
        (request::GET_INFLIGHT_FD, inflight(), vec![], true),
        (request::SET_INFLIGHT_FD, inflight(), vec![fd], false),
        (request::RESET_DEVICE, vec![], vec![], false),
        (request::GET_MAX_MEM_SLOTS, vec![], vec![], true),
        (request::REM_MEM_REG, region.clone(), vec![], false),
        (request::ADD_MEM_REG, region, vec![fd], false),
        (request::SET_DEVICE_STATE_FD, halves(&[0, 0]), vec![file.as_fd()], true),
        (request::CHECK_DEVICE_STATE, vec![], vec![], true),
    ]
}

#[test]
fn every_message_is_answered_once() {
    let stack = Stack::start(&[]);
    let channel = channel(&stack);
    let memory = SharedMap::new("memory", 1 << 20).unwrap();
    let null = File::options().write(true).open("/dev/null").unwrap();
    for (number, body, fds, own) in every_message(&memory, &null) {
        if own {
            channel.send(number, 0, &body, &fds).unwrap();
            assert_eq!(channel.receive().unwrap().request, number);
        } else {
            assert_eq!(acknowledged(&channel, number, &body, &fds), Some(0), "request {number}");
            // Without being asked it says nothing; the next reply belongs to the next request. A region that was
            // added cannot be added again, and one that was removed not removed.
            if !matches!(number, request::ADD_MEM_REG | request::REM_MEM_REG) {
                channel.send(number, 0, &body, &fds).unwrap();
            }
        }
    }
    assert!(ask(&channel, request::GET_QUEUE_NUM, &[]).u64().unwrap() > 0);
}

#[test]
fn what_makes_no_sense_is_refused_and_the_connection_goes_on() {
    let stack = Stack::start(&["--num-queues", "2"]);
    let channel = channel(&stack);
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let refused: Vec<(&str, u32, Vec<u8>, Vec<BorrowedFd<'_>>)> = vec![
        ("a feature that was not offered", request::SET_FEATURES, words(&[1 << 40]), vec![]),
        ("a protocol feature likewise", request::SET_PROTOCOL_FEATURES, words(&[1 << 20]), vec![]),
        ("ring 2 of 2: size", request::SET_VRING_NUM, halves(&[2, 128]), vec![]),
        (
            "ring 2 of 2: address",
            request::SET_VRING_ADDR,
            [halves(&[2, 0]), words(&[0; 4])].concat(),
            vec![],
        ),
        ("ring 2 of 2: base", request::SET_VRING_BASE, halves(&[2, 0]), vec![]),
        ("ring 2 of 2: enable", request::SET_VRING_ENABLE, halves(&[2, 1]), vec![]),
        ("ring 2 of 2: kick", request::SET_VRING_KICK, words(&[2]), vec![event.as_fd()]),
        ("ring 255: call", request::SET_VRING_CALL, words(&[255]), vec![event.as_fd()]),
        ("a ring of 0", request::SET_VRING_NUM, halves(&[0, 0]), vec![]),
        ("a ring of 100", request::SET_VRING_NUM, halves(&[0, 100]), vec![]),
        ("a ring of 65536", request::SET_VRING_NUM, halves(&[0, 65536]), vec![]),
        ("a kick by polling", request::SET_VRING_KICK, words(&[0x100]), vec![]),
        ("the capacity", request::SET_CONFIG, [halves(&[0, 8, 0]), vec![0; 8]].concat(), vec![]),
        ("an unknown request", 63, vec![1, 2, 3], vec![]),
    ];
    for (name, number, body, fds) in refused {
        assert_eq!(acknowledged(&channel, number, &body, &fds), Some(1), "{name}");
    }
    assert_eq!(ask(&channel, request::GET_QUEUE_NUM, &[]).u64().unwrap(), 2);
}

/// A request that is answered with data has no place for a refusal, and its sender waits for ever without an answer.
#[test]
fn questions_that_cannot_be_answered_end_the_connection() {
    let stack = Stack::start(&["--num-queues", "2"]);
    let inflight = |queues: u16, size: u16| {
        [words(&[0, 0]), [queues, size].map(u16::to_le_bytes).concat()].concat()
    };
    let cases = [
        ("ring 2 of 2", request::GET_VRING_BASE, halves(&[2, 0])),
        ("no rings", request::GET_INFLIGHT_FD, inflight(0, 128)),
        ("three rings of 2", request::GET_INFLIGHT_FD, inflight(3, 128)),
        ("rings of 0", request::GET_INFLIGHT_FD, inflight(1, 0)),
        ("rings of 65535", request::GET_INFLIGHT_FD, inflight(1, u16::MAX)),
    ];
    for (name, number, body) in cases {
        let mut channel = channel(&stack);
        channel.set_timeout(SOON).unwrap();
        channel.send(number, 0, &body, &[]).unwrap();
        assert!(channel.receive().unwrap_err().to_string().contains("closed"), "{name}");
    }
    assert_eq!(stack.lines("front-end dropped:"), 5);
    stack.front_end().queue(0).read(0, 512).unwrap();
}

/// Tries something on a connection of its own, which must end; one line says why, and the next one is served.
fn ends_the_connection(stack: &Stack, name: &str, attempt: impl FnOnce(&Channel)) {
    let dropped = stack.lines("front-end dropped:");
    let one = channel(stack);
    attempt(&one);
    let mut rest = [0; 64];
    // Closed, or reset because it was closed with something unread.
    let ended = one.stream().read(&mut rest);
    assert!(matches!(ended, Ok(0) | Err(_)), "{name}: {ended:?}");
    wait_until(name, SOON, || stack.lines("front-end dropped:") > dropped).unwrap();
    assert_eq!(stack.lines("front-end dropped:"), dropped + 1, "{name}");
    assert!(ask(&channel(stack), request::GET_QUEUE_NUM, &[]).u64().unwrap() > 0, "{name}");
}

#[test]
fn malformed_messages_end_the_connection_with_one_line() {
    let stack = Stack::start(&[]);
    let memory = SharedMap::new("memory", 1 << 20).unwrap();
    let null = File::options().write(true).open("/dev/null").unwrap();
    let raw = |number: u32, flags: u32, size: u32| halves(&[number, flags, size]);
    let send = |name: &str, bytes: &[u8]| {
        ends_the_connection(&stack, name, |channel| {
            channel.send_bytes(bytes, &[]).unwrap();
            channel.stream().shutdown(std::net::Shutdown::Write).unwrap();
        });
    };
    send("half a header", &raw(1, 1, 0)[..5]);
    send("a reply", &raw(1, 5, 0));
    send("version 2", &raw(1, 2, 0));
    send("a body of 4 GiB", &raw(1, 1, u32::MAX));
    send("a body just too long", &raw(1, 1, 4097));
    send("half a body", &[raw(2, 1, 8), vec![0; 4]].concat());
    send("noise", &[0xa5; 4000]);
    for (number, body, fds, _) in every_message(&memory, &null) {
        let name = format!("request {number}");
        let wrong_size = |body: &[u8], what: &str| {
            ends_the_connection(&stack, &format!("{name} {what}"), |channel| {
                channel.send(number, FLAG_NEED_REPLY, body, &fds).unwrap();
            });
        };
        wrong_size(&[&body[..], &[0]].concat(), "a byte too long");
        if !body.is_empty() {
            wrong_size(&body[..body.len() - 1], "a byte too short");
        }
        if !fds.is_empty() {
            for count in [0, 2] {
                let fds = vec![fds[0]; count];
                ends_the_connection(
                    &stack,
                    &format!("{name} with {count} descriptors"),
                    |channel| {
                        channel.send(number, FLAG_NEED_REPLY, &body, &fds).unwrap();
                    },
                );
            }
        }
    }
}

#[test]
fn two_hundred_connections_leave_nothing_behind() {
    let stack = Stack::start(&["--num-queues", "2"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut front_end = stack.connect(options);
    front_end.queue(0).write(0, &[3; 512]).unwrap();
    let before = stack.footprint();
    for round in 0..200 {
        front_end.reconnect().unwrap();
        assert_eq!(front_end.queue(round % 2).read(0, 512).unwrap(), [3; 512]);
    }
    assert_eq!(stack.footprint(), before, "descriptors and threads");
}

/// Descriptors of messages that are refused, and more of them than any message has.
#[test]
fn noise_of_any_kind_leaves_nothing_behind() {
    let mut random = Random(seed());
    let mut stack = Stack::start(&[]);
    let mut front_end = stack.front_end();
    front_end.queue(0).write(0, &[3; 512]).unwrap();
    let before = stack.footprint();
    front_end.disconnect();
    let memory = SharedMap::new("memory", 1 << 20).unwrap();
    let null = File::options().write(true).open("/dev/null").unwrap();
    let known = every_message(&memory, &null);
    for _ in 0..400 {
        let mut channel = channel(&stack);
        channel.set_timeout(SOON).unwrap();
        for _ in 0..random.below(8) {
            // A right message with some bytes changed, or any at all.
            let (number, mut body, mut fds) = if random.below(2) == 0 {
                let (number, body, fds, _) =
                    &known[usize::try_from(random.below(known.len() as u64)).unwrap()];
                (*number, body.clone(), fds.clone())
            } else {
                let len = usize::try_from(random.below(80)).unwrap();
                let body = (0..len).map(|_| random.next().to_le_bytes()[3]).collect();
                (u32::try_from(random.below(50)).unwrap(), body, vec![])
            };
            for _ in 0..random.below(3) {
                if let Some(byte) = body.get_mut(usize::try_from(random.below(64)).unwrap()) {
                    *byte = random.pick(&[0, 1, 2, 0x7f, 0x80, 0xff]);
                }
            }
            if random.below(4) == 0 {
                fds = vec![memory.fd(); random.pick(&[0, 1, 2, 31, 32, 33, 64, 253])];
            }
            if channel.send(number, FLAG_NEED_REPLY, &body, &fds).is_err() {
                break;
            }
        }
        drop(channel);
    }
    front_end.reconnect().unwrap();
    assert_eq!(front_end.queue(0).read(0, 512).unwrap(), [3; 512]);
    assert_eq!(stack.footprint(), before, "descriptors and threads");
    assert!(stack.backend.daemon.is_running().unwrap());
}

/// cloud-hypervisor: its order of messages at the start, at a pause with device state, and when it connects again.
#[test]
fn cloud_hypervisor_starts_pauses_and_reconnects() {
    let mut stack = Stack::start(&["--num-queues", "1"]);
    // Memory, rings and the inflight region, without a connection of the harness's own making.
    let options = Options { start: false, protocol: CH_PROTOCOL, ..Options::default() };
    let mut front_end = stack.connect(options);
    front_end.disconnect();

    let memory = front_end.memory().map();
    let table = words(&[1, BASE, memory.len() as u64, front_end.memory().user_address(BASE), 0]);
    let (descriptors, avail, used) = front_end.queue(0).ring.addresses();
    let address = |gpa| front_end.memory().user_address(gpa);
    let addr =
        [halves(&[0, 0]), words(&[address(descriptors), address(used), address(avail), used])]
            .concat();
    let queue = front_end.take_queue(0);
    let mut queue = queue;
    let memory = front_end.memory().map();

    let set = |channel: &Channel, number: u32, body: &[u8], fds: &[BorrowedFd<'_>]| {
        assert_eq!(acknowledged(channel, number, body, fds), Some(0), "request {number}");
    };
    let activate = |channel: &Channel,
                    queue: &baton_integration::raw_frontend::Queue,
                    region: Option<Message>| {
        let base = u32::from(queue.ring.avail_index());
        let features = feature::VERSION_1
            | feature::PROTOCOL_FEATURES
            | feature::EVENT_IDX
            | feature::BLK_FLUSH;
        set(channel, request::SET_FEATURES, &words(&[features]), &[]);
        set(channel, request::SET_MEM_TABLE, &table, &[memory.fd()]);
        set(channel, request::SET_VRING_NUM, &halves(&[0, 128]), &[]);
        let region = region.unwrap_or_else(|| {
            let wanted =
                [words(&[0, 0]), [1_u16, 128, 0, 0].map(u16::to_le_bytes).concat()].concat();
            ask(channel, request::GET_INFLIGHT_FD, &wanted)
        });
        set(channel, request::SET_INFLIGHT_FD, &region.payload, &[region.fds[0].as_fd()]);
        set(channel, request::SET_VRING_ADDR, &addr, &[]);
        set(channel, request::SET_VRING_BASE, &halves(&[0, base]), &[]);
        set(channel, request::SET_VRING_CALL, &words(&[0]), &[queue.call.as_fd()]);
        set(channel, request::SET_VRING_KICK, &words(&[0]), &[queue.kick.as_fd()]);
        set(channel, request::SET_VRING_ENABLE, &halves(&[0, 1]), &[]);
        region
    };

    let first = channel(&stack);
    set(&first, request::SET_OWNER, &[], &[]);
    let offered = ask(&first, request::GET_FEATURES, &[]).u64().unwrap();
    assert_ne!(offered & feature::LOG_ALL, 0);
    let offered = ask(&first, request::GET_PROTOCOL_FEATURES, &[]).u64().unwrap();
    assert_eq!(offered & CH_PROTOCOL, CH_PROTOCOL);
    set(&first, request::SET_PROTOCOL_FEATURES, &words(&[CH_PROTOCOL]), &[]);
    assert_eq!(ask(&first, request::GET_QUEUE_NUM, &[]).u64().unwrap(), 1);
    ask(&first, request::GET_CONFIG, &config_body(0, 60));
    let region = activate(&first, &queue, None);
    queue.write(8, &[8; 512]).unwrap();

    // Pause for a snapshot: no GET_VRING_BASE before the state is asked for.
    set(&first, request::SET_VRING_ENABLE, &halves(&[0, 0]), &[]);
    let base = ask(&first, request::GET_VRING_BASE, &halves(&[0, 0]));
    assert_eq!(base.payload, halves(&[0, 1]));
    let (mut reader, writer) = std::io::pipe().unwrap();
    first.send(request::SET_DEVICE_STATE_FD, 0, &halves(&[0, 0]), &[writer.as_fd()]).unwrap();
    drop(writer);
    let reply = first.receive().unwrap();
    assert_eq!(
        (reply.u64().unwrap(), reply.fds.len()),
        (0x100, 0),
        "done, and no descriptor of ours"
    );
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert_eq!(ask(&first, request::CHECK_DEVICE_STATE, &[]).u64().unwrap(), 0);

    // And the other side of a migration: load, check, activate.
    drop(first);
    let second = channel(&stack);
    set(&second, request::SET_OWNER, &[], &[]);
    ask(&second, request::GET_FEATURES, &[]);
    set(&second, request::SET_PROTOCOL_FEATURES, &words(&[CH_PROTOCOL]), &[]);
    let (reader, writer) = std::io::pipe().unwrap();
    second.send(request::SET_DEVICE_STATE_FD, 0, &halves(&[1, 0]), &[reader.as_fd()]).unwrap();
    assert_eq!(second.receive().unwrap().u64().unwrap(), 0x100);
    std::io::Write::write_all(&mut &writer, &state).unwrap();
    drop(writer);
    assert_eq!(ask(&second, request::CHECK_DEVICE_STATE, &[]).u64().unwrap(), 0);
    let region = activate(&second, &queue, Some(region));
    assert_eq!(queue.read(8, 512).unwrap(), [8; 512]);

    // The process dies with requests on the ring; the VMM says avail.idx, asks for no features, keeps its region.
    stack.backend.daemon.kill().unwrap();
    for sector in 0..5 {
        queue.submit(&Request::Write { sector, data: &[9; 512] }).unwrap();
    }
    stack.backend.restart().unwrap();
    let third = channel(&stack);
    set(&third, request::SET_OWNER, &[], &[]);
    ask(&third, request::GET_FEATURES, &[]);
    set(&third, request::SET_PROTOCOL_FEATURES, &words(&[CH_PROTOCOL]), &[]);
    activate(&third, &queue, Some(region));
    for _ in 0..5 {
        assert_eq!(queue.wait_completion(SOON).unwrap().expect("a lost request").status, OK);
    }
    assert_eq!(queue.wait_completion(A_WHILE).unwrap(), None);
    assert_eq!(queue.read(4, 512).unwrap(), [9; 512]);
}

#[test]
fn a_reset_device_is_as_new() {
    let stack = Stack::start(&["--num-queues", "1"]);
    let all = Options::default();
    let mut front_end =
        stack.connect(Options { protocol: all.protocol & !protocol::CONFIGURE_MEM_SLOTS, ..all });
    front_end.set_config(32, &[0]).unwrap();
    front_end.queue(0).write(0, &[1; 512]).unwrap();
    front_end.send(request::RESET_DEVICE, &[], &[]).unwrap();
    assert_eq!(front_end.config(33).unwrap()[32], 1, "write-back again");
    front_end.queue(0).submit(&Request::Read { sector: 0, len: 512 }).unwrap();
    front_end.queue(0).kick_anyway().unwrap();
    assert_eq!(front_end.queue(0).wait_completion(A_WHILE).unwrap(), None, "rings have stopped");
    restart(&mut front_end);
    assert_eq!(front_end.queue(0).wait_completion(SOON).unwrap().expect("served").status, OK);
}

fn restart(front_end: &mut RawFrontend) {
    front_end.start().unwrap();
}
