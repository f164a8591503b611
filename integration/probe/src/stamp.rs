//! Stamped sectors: every sector says which volume, place, writer and write it belongs to.
//!
//! A disk that loses, delays, misplaces, tears or invents data is told apart by what a block holds when it is
//! read back. Pure: bytes in, verdict out.
//!
//! Layout of one 512-byte sector, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 8 | volume |
//! | 16 | 8 | sector, counted from the start of the volume |
//! | 24 | 8 | epoch |
//! | 32 | 8 | sequence |
//! | 40 | 4 | writer |
//! | 44 | 464 | filler that depends on all of the above |
//! | 508 | 4 | CRC-32C of bytes 0 to 507 |

use std::fmt;

/// Bytes in a sector: the unit of virtio-blk, whatever block size the disk reports.
pub const SECTOR: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"BatonStm");
const CRC_AT: usize = 508;
const FILLER_AT: usize = 44;

/// When a block was written: a later write has a greater version. `NONE` stands for "never written", and so for
/// zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// The writer's term of office. Compared first.
    pub epoch: u64,
    /// Counted by the writer within the epoch; 0 is never used for a write.
    pub sequence: u64,
}

impl Version {
    /// The version of a block nobody has written.
    pub const NONE: Self = Self { epoch: 0, sequence: 0 };

    /// The write that follows this one in the same epoch.
    #[must_use]
    pub fn next(self) -> Self {
        Self { epoch: self.epoch, sequence: self.sequence + 1 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.sequence)
    }
}

/// The identity of one sector's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Which disk; chosen by the test.
    pub volume: u64,
    /// Place on the disk, in sectors.
    pub sector: u64,
    /// Who wrote it; tells two writers of one epoch apart.
    pub writer: u32,
    /// Which write it was.
    pub version: Version,
}

/// What a single sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zero,
    Stamped(Stamp),
    Garbage,
}

impl Stamp {
    /// Fills one sector.
    ///
    /// # Panics
    /// When `sector` is not [`SECTOR`] bytes long.
    pub fn encode(&self, sector: &mut [u8]) {
        assert_eq!(sector.len(), SECTOR, "a stamp fills exactly one sector");
        sector[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        sector[8..16].copy_from_slice(&self.volume.to_le_bytes());
        sector[16..24].copy_from_slice(&self.sector.to_le_bytes());
        sector[24..32].copy_from_slice(&self.version.epoch.to_le_bytes());
        sector[32..40].copy_from_slice(&self.version.sequence.to_le_bytes());
        sector[40..44].copy_from_slice(&self.writer.to_le_bytes());
        // An arbitrary odd constant spreads neighbouring identities apart, so that no two sectors share bytes.
        let mut state =
            (self.volume ^ self.sector.rotate_left(20) ^ self.version.sequence.rotate_left(40))
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                | 1;
        for word in sector[FILLER_AT..CRC_AT].chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        let crc = crc32c::crc32c(&sector[..CRC_AT]);
        sector[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }

    fn decode(sector: &[u8]) -> Content {
        let crc = u32::from_le_bytes(sector[CRC_AT..].try_into().expect("four bytes"));
        if crc == 0 && sector.iter().all(|&b| b == 0) {
            return Content::Zero;
        }
        let word =
            |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
        if word(0) != MAGIC || crc != crc32c::crc32c(&sector[..CRC_AT]) {
            return Content::Garbage;
        }
        Content::Stamped(Stamp {
            volume: word(8),
            sector: word(16),
            writer: u32::from_le_bytes(sector[40..44].try_into().expect("four bytes")),
            version: Version { epoch: word(24), sequence: word(32) },
        })
    }
}

/// Stamps a whole block whose first sector is `stamp.sector`.
pub fn encode_block(stamp: Stamp, block: &mut [u8]) {
    for (i, sector) in block.chunks_exact_mut(SECTOR).enumerate() {
        Stamp { sector: stamp.sector + i as u64, ..stamp }.encode(sector);
    }
}

/// What a block may hold.
#[derive(Clone, Copy, Debug)]
pub struct Expect {
    /// Which disk.
    pub volume: u64,
    /// The block's first sector.
    pub sector: u64,
    /// The last write of this block that was acknowledged.
    pub acked: Version,
    /// The last write of this block that was sent; more than `acked` while, or after, it is not known to have
    /// happened.
    pub issued: Version,
}

/// What a block was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One version, and one that may be there.
    Good(Version),
    /// A mixture of versions that may all be there, because a write was sent and never acknowledged.
    Unsettled,
    /// Zeros where an acknowledged write should be.
    Zero,
    /// An old version where a newer write was acknowledged.
    Stale(Version),
    /// A version that nobody has sent.
    Future(Version),
    /// Another volume's or another place's data.
    Misplaced {
        /// Where the data belongs.
        volume: u64,
        /// Where the data belongs, in sectors.
        sector: u64,
    },
    /// Parts of different writes, at least one of them not allowed.
    Torn {
        /// The oldest version in the block.
        oldest: Version,
        /// The newest version in the block.
        newest: Version,
    },
    /// Bytes that are no stamp.
    Corrupt {
        /// The first such sector of the volume.
        sector: u64,
    },
}

impl Verdict {
    /// Whether the block is as it must be.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Good(_) | Self::Unsettled)
    }

    /// Whether acknowledged data is missing (as opposed to wrong data being there).
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Zero | Self::Stale(_))
    }
}

/// Judges one block that was read back.
///
/// # Panics
/// When `block` is empty or not a whole number of sectors.
#[must_use]
pub fn check_block(block: &[u8], expect: &Expect) -> Verdict {
    assert!(
        !block.is_empty() && block.len().is_multiple_of(SECTOR),
        "a block is a whole number of sectors"
    );
    let mut oldest = None;
    let mut newest = Version::NONE;
    for (i, sector) in block.chunks_exact(SECTOR).enumerate() {
        let at = expect.sector + i as u64;
        let version = match Stamp::decode(sector) {
            Content::Garbage => return Verdict::Corrupt { sector: at },
            Content::Zero => Version::NONE,
            Content::Stamped(s) if s.volume != expect.volume || s.sector != at => {
                return Verdict::Misplaced { volume: s.volume, sector: s.sector };
            }
            Content::Stamped(s) => s.version,
        };
        oldest = Some(oldest.map_or(version, |o: Version| o.min(version)));
        newest = newest.max(version);
    }
    let oldest = oldest.expect("the block is not empty");
    let allowed = oldest >= expect.acked && newest <= expect.issued;
    match (oldest == newest, allowed) {
        (true, true) => Verdict::Good(oldest),
        (false, true) => Verdict::Unsettled,
        (false, false) => Verdict::Torn { oldest, newest },
        (true, false) if newest > expect.issued => Verdict::Future(newest),
        (true, false) if oldest == Version::NONE => Verdict::Zero,
        (true, false) => Verdict::Stale(oldest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOLUME: u64 = 7;
    const BLOCK: usize = 8 * SECTOR;

    fn v(sequence: u64) -> Version {
        Version { epoch: 3, sequence }
    }

    fn block(sector: u64, version: Version) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        encode_block(Stamp { volume: VOLUME, sector, writer: 1, version }, &mut bytes);
        bytes
    }

    fn expect(acked: u64, issued: u64) -> Expect {
        Expect { volume: VOLUME, sector: 64, acked: v(acked), issued: v(issued) }
    }

    #[test]
    fn what_was_written_is_good() {
        assert_eq!(check_block(&block(64, v(5)), &expect(5, 5)), Verdict::Good(v(5)));
    }

    #[test]
    fn an_unacknowledged_write_may_be_there_or_not_or_in_parts() {
        assert_eq!(check_block(&block(64, v(5)), &expect(5, 6)), Verdict::Good(v(5)));
        assert_eq!(check_block(&block(64, v(6)), &expect(5, 6)), Verdict::Good(v(6)));
        let mut mixed = block(64, v(5));
        mixed[..SECTOR].copy_from_slice(&block(64, v(6))[..SECTOR]);
        assert_eq!(check_block(&mixed, &expect(5, 6)), Verdict::Unsettled);
    }

    #[test]
    fn zeros_are_good_only_where_nothing_was_acknowledged() {
        let zeros = vec![0; BLOCK];
        let fresh = Expect { acked: Version::NONE, ..expect(0, 1) };
        assert_eq!(check_block(&zeros, &fresh), Verdict::Good(Version::NONE));
        assert_eq!(check_block(&zeros, &expect(5, 5)), Verdict::Zero);
    }

    #[test]
    fn each_kind_of_damage_has_its_name() {
        assert_eq!(check_block(&block(64, v(4)), &expect(5, 5)), Verdict::Stale(v(4)));
        assert_eq!(check_block(&block(64, v(6)), &expect(5, 5)), Verdict::Future(v(6)));
        assert_eq!(
            check_block(&block(72, v(5)), &expect(5, 5)),
            Verdict::Misplaced { volume: VOLUME, sector: 72 }
        );
        let other_disk = Expect { volume: 8, ..expect(5, 5) };
        assert_eq!(
            check_block(&block(64, v(5)), &other_disk),
            Verdict::Misplaced { volume: VOLUME, sector: 64 }
        );
        let mut torn = block(64, v(5));
        torn[7 * SECTOR..].copy_from_slice(&block(64, v(4))[7 * SECTOR..]);
        assert_eq!(check_block(&torn, &expect(5, 5)), Verdict::Torn { oldest: v(4), newest: v(5) });
        let mut half_zero = block(64, v(5));
        half_zero[SECTOR..2 * SECTOR].fill(0);
        assert_eq!(
            check_block(&half_zero, &expect(5, 5)),
            Verdict::Torn { oldest: Version::NONE, newest: v(5) }
        );
    }

    #[test]
    fn a_later_epoch_outranks_any_sequence() {
        let old = Version { epoch: 2, sequence: 900 };
        assert_eq!(check_block(&block(64, old), &expect(1, 1)), Verdict::Stale(old));
    }

    proptest! {
        #[test]
        fn one_changed_bit_is_never_good(at in 0..BLOCK, bit in 0..8_u32) {
            let mut bytes = block(64, v(5));
            bytes[at] ^= 1 << bit;
            let sector = 64 + (at / SECTOR) as u64;
            prop_assert_eq!(check_block(&bytes, &expect(5, 5)), Verdict::Corrupt { sector });
        }
    }
}
