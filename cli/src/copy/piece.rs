//! A disk in pieces, what of a piece is zeros, and the digests of pieces. Pure.

use sha2::{Digest as _, Sha256};

/// What is read, checked and noted at once. Large, so that a server far away is kept busy by a few, and a note of
/// 32 bytes for each is little.
pub(super) const PIECE_BYTES: u64 = 4 << 20;

/// Zeros are looked for in blocks of this size: less is less than any file system gives back.
const GRAIN_BYTES: usize = 4096;
/// Fewer zeros than this between data are written as data: a request costs more.
const GAP_BYTES: usize = 32 << 10;
/// A piece is written in at most so many requests.
pub(super) const RUNS_MAX: usize = 16;

/// Of the bytes of a piece. All zeros: none, which SHA-256 has never given.
pub(super) type Digest = [u8; 32];
pub(super) const NO_DIGEST: Digest = [0; 32];

/// How a disk falls into pieces; the last one may be shorter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pieces {
    pub(super) size_bytes: u64,
}

impl Pieces {
    pub(super) fn count(self) -> u64 {
        self.size_bytes.div_ceil(PIECE_BYTES)
    }

    pub(super) fn offset(self, piece: u64) -> u64 {
        piece * PIECE_BYTES
    }

    /// Bytes of `count` pieces from `first` on.
    pub(super) fn bytes(self, first: u64, count: u64) -> u64 {
        let end = ((first + count) * PIECE_BYTES).min(self.size_bytes);
        end.saturating_sub(self.offset(first))
    }
}

/// Neighbouring bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) at: usize,
    pub(super) len: usize,
    pub(super) zeros: bool,
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Most data differs from zeros early; `align_to` makes the rest fast.
    // SAFETY: any bytes are valid integers.
    let (head, words, tail) = unsafe { bytes.align_to::<u128>() };
    head.iter().chain(tail).all(|b| *b == 0) && words.iter().all(|w| *w == 0)
}

/// What to write for `bytes`: at most [`RUNS_MAX`] runs, one behind the other.
pub(super) fn runs(bytes: &[u8]) -> Vec<Run> {
    let mut gap = GAP_BYTES;
    loop {
        let found = runs_with(bytes, gap);
        if found.len() <= RUNS_MAX {
            return found;
        }
        gap *= 2;
    }
}

fn runs_with(bytes: &[u8], gap: usize) -> Vec<Run> {
    let mut found: Vec<Run> = Vec::new();
    for (n, grain) in bytes.chunks(GRAIN_BYTES).enumerate() {
        let (at, len, zeros) = (n * GRAIN_BYTES, grain.len(), is_zero(grain));
        match found.last_mut() {
            Some(last) if last.zeros == zeros => last.len += len,
            // A gap that is too small for a request of its own becomes data.
            Some(last) if last.zeros && last.len < gap => {
                last.zeros = false;
                last.len += len;
                join(&mut found);
            }
            _ => found.push(Run { at, len, zeros }),
        }
    }
    if found.len() > 1
        && let Some(last) = found.last_mut()
        && last.zeros
        && last.len < gap
    {
        last.zeros = false;
        join(&mut found);
    }
    found
}

/// Joins the last run, of data, to one of data before it.
fn join(found: &mut Vec<Run>) {
    if let [.., before, last] = &mut found[..]
        && !before.zeros
    {
        before.len += last.len;
        found.pop();
    }
}

pub(super) fn digest(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes).into()
}

/// Digests of pieces that are all zeros.
#[derive(Debug)]
pub(super) struct ZeroDigests {
    pieces: Pieces,
    whole: Digest,
    last: Digest,
}

impl ZeroDigests {
    pub(super) fn new(pieces: Pieces) -> Self {
        let of = |len: u64| digest(&vec![0; usize::try_from(len).expect("at most a piece")]);
        let last = pieces.count().saturating_sub(1);
        Self { pieces, whole: of(PIECE_BYTES), last: of(pieces.bytes(last, 1)) }
    }

    pub(super) fn of(&self, piece: u64) -> Digest {
        if piece + 1 == self.pieces.count() { self.last } else { self.whole }
    }
}

/// The digest of a disk: SHA-256 of the digests of its pieces, in order.
#[derive(Debug, Default)]
pub(super) struct Whole(Sha256);

impl Whole {
    pub(super) fn add(&mut self, piece: &Digest) {
        self.0.update(piece);
    }

    pub(super) fn hex(self) -> String {
        hex(&self.0.finalize())
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Whether each piece is done.
#[derive(Debug)]
pub(super) struct Marks(Vec<u64>);

impl Marks {
    pub(super) fn new(count: u64) -> Self {
        Self(vec![0; usize::try_from(count.div_ceil(64)).expect("fits memory")])
    }

    fn at(piece: u64) -> (usize, u64) {
        (usize::try_from(piece / 64).expect("fits memory"), 1 << (piece % 64))
    }

    pub(super) fn set(&mut self, piece: u64) {
        let (word, bit) = Self::at(piece);
        self.0[word] |= bit;
    }

    pub(super) fn is_set(&self, piece: u64) -> bool {
        let (word, bit) = Self::at(piece);
        self.0[word] & bit != 0
    }
}

/// At most `most` of what is set, spread evenly, the first and the last among them.
pub(super) fn sample(set: u64, most: u64) -> impl Fn(u64) -> bool {
    // `n` is the how-manieth of them.
    let (all, parts) = (set.saturating_sub(1).max(1), most - 1);
    move |n| set <= most || n == 0 || n * parts / all != (n - 1) * parts / all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(parts: &[(usize, u8)]) -> Vec<u8> {
        parts.iter().flat_map(|(len, byte)| vec![*byte; *len]).collect()
    }

    fn shapes(parts: &[(usize, u8)]) -> Vec<(usize, usize, bool)> {
        runs(&data(parts)).iter().map(|run| (run.at, run.len, run.zeros)).collect()
    }

    #[test]
    fn zeros_worth_a_request_are_runs_of_their_own() {
        const K: usize = 1024;
        assert_eq!(shapes(&[(64 * K, 0)]), [(0, 64 * K, true)]);
        assert_eq!(shapes(&[(512, 0)]), [(0, 512, true)]);
        assert_eq!(
            shapes(&[(4 * K, 1), (32 * K, 0), (4 * K, 1)]),
            [(0, 4 * K, false), (4 * K, 32 * K, true), (36 * K, 4 * K, false)]
        );
        // Too few zeros, in front, between and behind.
        assert_eq!(shapes(&[(28 * K, 0), (4 * K, 1), (28 * K, 0)]), [(0, 60 * K, false)]);
        assert_eq!(shapes(&[(4 * K, 1), (28 * K, 0), (4 * K, 1)]), [(0, 36 * K, false)]);
        // One byte makes its block data.
        assert_eq!(
            shapes(&[(64 * K, 0), (1, 1), (64 * K - 1, 0)]),
            [(0, 64 * K, true), (64 * K, 4 * K, false), (68 * K, 60 * K, true)]
        );
    }

    #[test]
    fn runs_are_few_and_keep_every_byte() {
        // Alternating, the worst there is, and a seeded mix.
        let mut seed = 7u64;
        for round in 0..4u8 {
            let mut parts = Vec::new();
            let mut left = 4usize << 20;
            while left > 0 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let grains =
                    if round == 0 { 8 } else { 1 + usize::try_from(seed >> 57).unwrap_or(1) };
                let len = (grains * GRAIN_BYTES).min(left);
                parts.push((len, u8::from(parts.len() % 2 == 0)));
                left -= len;
            }
            let bytes = data(&parts);
            let found = runs(&bytes);
            assert!(found.len() <= RUNS_MAX);
            let mut at = 0;
            for run in found {
                assert_eq!(run.at, at);
                assert!(!run.zeros || is_zero(&bytes[at..at + run.len]));
                at += run.len;
            }
            assert_eq!(at, bytes.len());
        }
    }

    #[test]
    fn a_digest_anybody_can_check() {
        // printf 'abc' | sha256sum | xxd -r -p | sha256sum
        let mut whole = Whole::default();
        whole.add(&digest(b"abc"));
        assert_eq!(whole.hex(), "4f8b42c22dd3729b519ba6f68d2da7cc5b2d606d05daed5ad5128cc03e6c6358");
    }

    #[test]
    fn the_last_piece_may_be_short() {
        let pieces = Pieces { size_bytes: 2 * PIECE_BYTES + 512 };
        assert_eq!(pieces.count(), 3);
        assert_eq!((pieces.bytes(0, 1), pieces.bytes(2, 1)), (PIECE_BYTES, 512));
        assert_eq!(pieces.bytes(1, 2), PIECE_BYTES + 512);
        let zeros = ZeroDigests::new(pieces);
        assert_eq!(zeros.of(2), digest(&[0; 512]));
        assert_ne!(zeros.of(1), zeros.of(2));
    }

    #[test]
    fn a_sample_has_the_ends_and_is_not_larger_than_asked() {
        for set in [1u64, 2, 3, 31, 32, 33, 100, 12_345] {
            let is_in = sample(set, 32);
            let taken: Vec<_> = (0..set).filter(|n| is_in(*n)).collect();
            assert_eq!(taken.len() as u64, set.min(32), "{set}");
            assert_eq!((taken.first(), taken.last()), (Some(&0), Some(&(set - 1))), "{set}");
        }
    }
}
