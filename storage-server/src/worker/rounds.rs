//! Whose turn it is when connections of a worker have more to do than one turn does.
//!
//! In rounds: in each, a connection has a share of requests and bytes. What it has beyond that waits for the next round
//! in a queue, of which the worker serves one connection at a time and looks at all sockets in between. So who asks for
//! little is served within one turn of one other, however much the others have asked for, and who asks for much gets
//! the same as everybody who does.
//!
//! While somebody is there who asks for little, shares are small, so that one turn of another is short. Not otherwise:
//! with 256 KiB for everybody, streams of large reads and writes were a sixth slower (docs/performance.md).

use std::collections::VecDeque;

/// Requests of a connection in a round: as many as fill a batch of answers.
pub(super) const SHARE_REQUESTS: usize = 32;
/// Payload bytes of a connection in a round, but one request at least. What a turn receives at most; about 0.2 ms of
/// copying.
const SHARE_BYTES: u64 = 512 << 10;
/// The same while somebody asks for little: a batch of 4 KiB requests, some 50 us of copying.
const SMALL_SHARE_BYTES: u64 = 128 << 10;
/// Who has no more than this in a round asks for little.
const LITTLE_BYTES: u64 = 64 << 10;
/// For so many rounds after somebody asked for little: some ms, longer than the pauses of who waits for each answer.
const LITTLE_ROUNDS: u64 = 32;

/// The connections of a worker that wait for their next turn.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    waiting: VecDeque<usize>,
    number: u64,
    /// Of those that wait, the ones whose turn is in this round.
    left: usize,
    /// Shares are small until this round.
    small_until: u64,
}

impl Rounds {
    /// It has used its share of this round, and has more to do.
    pub(super) fn wait(&mut self, index: usize) {
        self.waiting.push_back(index);
    }

    /// Who is next. Called once between two looks at the sockets.
    pub(super) fn next(&mut self) -> Option<usize> {
        if self.left == 0 {
            self.number += 1;
            self.left = self.waiting.len();
        }
        self.left = self.left.saturating_sub(1);
        self.waiting.pop_front()
    }

    /// Payload bytes of a share, and the most that is received for one turn.
    pub(super) fn share_bytes(&self) -> u64 {
        if self.number < self.small_until { SMALL_SHARE_BYTES } else { SHARE_BYTES }
    }

    pub(super) fn is_anyone_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

/// What is left of a connection's share.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    round: u64,
    requests: usize,
    bytes: u64,
    /// What was taken of it, bytes.
    taken: u64,
}

impl Share {
    /// A new one if a new round has begun.
    pub(super) fn renew(&mut self, rounds: &mut Rounds) {
        if self.round == rounds.number {
            return;
        }
        if (1..=LITTLE_BYTES).contains(&self.taken) {
            rounds.small_until = rounds.number + LITTLE_ROUNDS;
        }
        let (requests, bytes) = (SHARE_REQUESTS, rounds.share_bytes());
        *self = Self { round: rounds.number, requests, bytes, taken: 0 };
    }

    pub(super) fn is_used_up(&self) -> bool {
        self.requests == 0 || self.bytes == 0
    }

    /// One more request, of so many payload bytes in it and its answer.
    pub(super) fn take(&mut self, bytes: usize) {
        self.requests = self.requests.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes as u64);
        self.taken = self.taken.saturating_add(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Connections with so many requests in flight each, of which every answer brings the next request.
    struct Worker {
        rounds: Rounds,
        conns: Vec<Conn>,
    }

    #[derive(Clone, Default)]
    struct Conn {
        bytes: usize,
        asked: usize,
        share: Share,
        waits: bool,
        served: usize,
        /// Requests of others that were served since it asked.
        waited: usize,
        waited_most: usize,
    }

    impl Worker {
        fn new(conns: &[(usize, usize)]) -> Self {
            let conn = |&(asked, bytes)| Conn { asked, bytes, ..Conn::default() };
            Self { rounds: Rounds::default(), conns: conns.iter().map(conn).collect() }
        }

        fn turn(&mut self, index: usize) {
            let conn = &mut self.conns[index];
            conn.share.renew(&mut self.rounds);
            let (before, mut left) = (conn.served, conn.asked);
            while left > 0 && !conn.share.is_used_up() {
                conn.share.take(conn.bytes);
                conn.served += 1;
                left -= 1;
            }
            conn.waits = left > 0;
            conn.waited_most = conn.waited_most.max(conn.waited);
            conn.waited = 0;
            let served = conn.served - before;
            if left > 0 {
                self.rounds.wait(index);
            }
            for (n, other) in self.conns.iter_mut().enumerate() {
                other.waited += if n == index { 0 } else { served };
            }
        }

        fn run(&mut self, looks: usize) {
            for _ in 0..looks {
                for index in 0..self.conns.len() {
                    if !self.conns[index].waits {
                        self.turn(index);
                    }
                }
                if let Some(index) = self.rounds.next() {
                    self.turn(index);
                }
            }
        }
    }

    #[test]
    fn who_asks_for_little_waits_for_one_turn_and_not_for_all() {
        let mut worker =
            Worker::new(&[(128, 4096), (128, 4096), (128, 4096), (128, 4096), (1, 4096)]);
        worker.run(1000);
        let small = &worker.conns[4];
        // The first look finds all of them.
        assert!(small.waited_most <= 4 * SHARE_REQUESTS, "{}", small.waited_most);
        worker.conns[4].waited_most = 0;
        worker.run(1000);
        assert!(worker.conns[4].waited_most <= SHARE_REQUESTS, "{}", worker.conns[4].waited_most);
    }

    #[test]
    fn all_who_ask_for_much_get_the_same() {
        // More than a share, exactly one, somewhat less at a time; small requests and large ones.
        for bytes in [4096, 256 << 10] {
            let mut worker = Worker::new(&[(512, bytes), (128, bytes), (33, bytes), (31, bytes)]);
            worker.run(4000);
            let served: Vec<usize> = worker.conns.iter().map(|conn| conn.served).collect();
            let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
            assert!(10 * least >= 9 * most, "{served:?}");
        }
    }

    /// The most bytes of others that it waits for, once all are known.
    fn waits_for(asked: usize, bytes: usize) -> usize {
        let mut worker = Worker::new(&[(64, 128 << 10), (64, 128 << 10), (asked, bytes)]);
        worker.run(100);
        worker.conns[2].waited_most = 0;
        worker.run(1000);
        worker.conns[2].waited_most * (128 << 10)
    }

    #[test]
    fn shares_are_small_while_somebody_asks_for_little() {
        let little = usize::try_from(SMALL_SHARE_BYTES).expect("small");
        assert_eq!(waits_for(1, 4096), little);
        assert_eq!(waits_for(4, 4096), little);
        // Who asks for more gets more, and so do the others.
        assert!(waits_for(64, 128 << 10) > 2 * little);
    }

    #[test]
    fn shares_are_large_again_when_who_asked_for_little_has_gone() {
        let mut worker = Worker::new(&[(64, 128 << 10), (1, 4096)]);
        worker.run(100);
        assert_eq!(worker.rounds.share_bytes(), SMALL_SHARE_BYTES);
        worker.conns[1].asked = 0;
        worker.run(usize::try_from(LITTLE_ROUNDS).expect("few") + 2);
        assert_eq!(worker.rounds.share_bytes(), SHARE_BYTES);
    }

    #[test]
    fn alone_nobody_waits_for_long() {
        let mut worker = Worker::new(&[(1000, 4096)]);
        worker.run(100);
        assert!(worker.conns[0].served >= 100 * SHARE_REQUESTS);
    }
}
