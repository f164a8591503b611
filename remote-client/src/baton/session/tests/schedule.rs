//! Random schedules against an oracle: requests, bytes in both directions,
//! replies out of order, broken connections, restarts, time.

use std::time::Duration;

use baton_protocol::{Epoch, Opcode, Seq, Status};
use proptest::prelude::*;

use super::super::*;
use super::server::frame;
use super::{Memory, Pair, pattern};

const SECTORS: usize = 64;
const BYTES: usize = SECTORS * 512;

#[derive(Clone, Debug)]
enum Step {
    Submit { what: u8, sector: usize, sectors: usize },
    Send(usize),
    Serve(usize),
    Answer(usize),
    Receive(usize),
    Cut,
    Restart,
    Wait(u64),
    Direct(bool),
    Fence,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop_oneof![1 => 1usize..40, 3 => 1usize..6000, 2 => Just(usize::MAX)];
    prop_oneof![
        8 => (0u8..6, 0..SECTORS, 1usize..24)
            .prop_map(|(what, sector, sectors)| Step::Submit { what, sector, sectors }),
        8 => bytes.clone().prop_map(Step::Send),
        8 => bytes.clone().prop_map(Step::Serve),
        8 => any::<prop::sample::Index>().prop_map(|i| Step::Answer(i.index(1 << 16))),
        8 => bytes.prop_map(Step::Receive),
        1 => Just(Step::Cut),
        1 => Just(Step::Restart),
        1 => (0u64..12_000).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Direct),
    ]
}

/// Operation, first byte, bytes, data of a write.
type Flight = (Op, usize, usize, Vec<u8>);

/// What the guest may rely on. Requests in flight never overlap, so each byte
/// has one right value.
struct World {
    pair: Pair,
    disk: Vec<u8>,
    /// By tag.
    flights: Vec<Option<Flight>>,
    completed: usize,
}

impl World {
    fn new() -> Self {
        let mut pair = Pair::new(BYTES, 12);
        pair.server.payload_max = 4096;
        pair.server.window_requests = 40;
        Self { pair, disk: vec![0; BYTES], flights: Vec::new(), completed: 0 }
    }

    fn submit(&mut self, what: u8, sector: usize, sectors: usize) {
        let at = sector * 512;
        let len = sectors.min(SECTORS - sector) * 512;
        let overlaps = |f: &Flight| at < f.1 + f.2 && f.1 < at + len;
        if self.pair.session.in_flight() >= 12 || self.flights.iter().flatten().any(overlaps) {
            return;
        }
        let tag = u32::try_from(self.flights.len()).expect("small");
        let data = pattern(len, self.flights.len());
        let (offset, bytes) = (at as u64, len as u64);
        let cut = len / 3;
        let lens = [cut, 0, len - cut];
        let (op, memory) = match what {
            0 | 1 => (Op::Read { offset }, Memory::new(&lens, None)),
            2 | 3 => (Op::Write { offset }, Memory::new(&lens, Some(&data))),
            4 => (Op::Discard { offset, len: bytes }, Memory::new(&[], None)),
            _ => (Op::WriteZeroes { offset, len: bytes, unmap: false }, Memory::new(&[], None)),
        };
        self.pair.submit(tag, op, memory);
        self.flights.push(Some((op, at, len, data)));
    }

    fn check_completions(&mut self) -> Result<(), TestCaseError> {
        let tags: Vec<u32> = self.pair.done.iter().map(|c| c.tag.0).collect();
        for tag in tags {
            let (result, bytes) = self.pair.finish(tag);
            prop_assert_eq!(result, Ok(()));
            let flight = self.flights[tag as usize].take();
            prop_assert!(flight.is_some(), "tag {} was completed twice", tag);
            let (op, at, len, data) = flight.expect("checked");
            match op {
                Op::Read { .. } => prop_assert!(bytes == self.disk[at..at + len], "stale read"),
                Op::Write { .. } => self.disk[at..at + len].copy_from_slice(&data),
                _ => self.disk[at..at + len].fill(0),
            }
            self.completed += 1;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let p = &mut self.pair;
        p.connect();
        match *step {
            Step::Submit { what, sector, sectors } => self.submit(what, sector, sectors),
            Step::Send(n) => drop(p.send(n)),
            Step::Serve(n) => drop(p.serve(n)),
            Step::Answer(i) if !p.connection.replies.is_empty() => {
                p.answer(i % p.connection.replies.len());
            }
            Step::Answer(_) => {}
            Step::Receive(n) => drop(p.receive(n)),
            Step::Cut => p.cut(),
            Step::Restart => {
                p.server.restart();
                p.cut();
            }
            Step::Wait(ms) => p.advance(Duration::from_millis(ms)),
            Step::Direct(direct) => p.direct = direct,
            Step::Fence => p.server.epoch.0 += 1,
        }
        self.pair.collect();
        self.check_completions()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_request_completes_once_with_the_right_data(steps in prop::collection::vec(step(), 1..250)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step)?;
        }
        world.pair.settle();
        world.check_completions()?;
        prop_assert_eq!(world.completed, world.flights.len());
        prop_assert!(world.pair.server.disk == world.disk, "the disk is not what was acknowledged");
    }

    #[test]
    fn after_a_fence_nothing_changes_any_more(
        before in prop::collection::vec(step(), 1..150),
        after in prop::collection::vec(step(), 1..100),
    ) {
        let mut world = World::new();
        for step in &before {
            world.step(step)?;
        }
        world.step(&Step::Fence)?;
        let disk = world.pair.server.disk.clone();
        for step in &after {
            world.step(step)?;
        }
        // What the server had answered before may still arrive; then something
        // must be asked for the fence to be noticed.
        world.pair.drive();
        world.check_completions()?;
        world.pair.submit(10_000, Op::Flush, Memory::new(&[], None));
        for _ in 0..20 {
            world.pair.drive();
            world.pair.advance(Duration::from_secs(6));
        }
        prop_assert!(world.pair.done.is_empty());
        prop_assert_eq!(world.pair.session.state(), State::Fenced);
        prop_assert!(world.pair.server.disk == disk, "a fenced client changed the disk");
    }

    /// A server that sends anything at all.
    #[test]
    fn any_bytes_are_survived(
        pieces in prop::collection::vec((0u8..4, prop::collection::vec(any::<u8>(), 0..200), 1u64..9, any::<u8>(), any::<u8>()), 1..20),
        welcomed: bool,
        direct: bool,
    ) {
        let mut p = Pair::new(BYTES, 8);
        p.direct = direct;
        if welcomed {
            p.drive();
        }
        p.read(1, 0, 1024);
        p.write(2, 1024, &[1; 2048]);
        p.read(3, 4096, 8192);
        p.connect();
        p.send(usize::MAX);
        for (kind, body, seq, opcode, status) in pieces {
            let opcode = Opcode::from_number(opcode % 9 + 1).expect("in range");
            let status = Status::from_number(u16::from(status % 13)).expect("in range");
            let bytes = match kind {
                0 => body,
                1 => frame(Opcode::Read, Status::Ok, Seq(seq), Epoch(5), &body.repeat(8)),
                2 => frame(opcode, Status::Ok, Seq(seq), Epoch(5), &body),
                _ => frame(opcode, status, Seq(seq), Epoch(5), &body),
            };
            p.to_client.extend(bytes);
            p.receive(usize::MAX);
        }
        p.flights.values().for_each(Memory::check_guards);
    }
}
