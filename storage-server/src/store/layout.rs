//! Byte layouts of the data directory (`docs/on-disk.md` has the same tables) and the limits that follow from them.
//!
//! Pure: bytes in, values out. Knows no files.

/// Size of an extent and of a slot. Changing it makes a new format.
pub const EXTENT_BYTES: u64 = 1 << 20;
/// Smallest unit of a volume's size.
pub const SECTOR_BYTES: u64 = 512;
/// 1 PiB: 2^30 extents, which is what the extent map's three levels address.
pub const MAX_VOLUME_BYTES: u64 = 1 << 50;
/// Slot 0 is the pool header and means "hole" in maps; `u32::MAX` stays unused.
pub(super) const MAX_SLOTS: u32 = u32::MAX - 2;
/// Format of pool.dat, meta.redb and the journal, one number for all.
/// 1: the first.
pub(super) const FORMAT_VERSION: u32 = 1;

pub(super) const POOL_FILE: &str = "pool.dat";
pub(super) const META_FILE: &str = "meta.redb";
pub(super) const META_FILE_NEW: &str = "meta.redb.new";
pub(super) const JOURNAL_FILES: [&str; 2] = ["extents.0.log", "extents.1.log"];
pub(super) const LOCK_FILE: &str = "lock";

/// Random name of a pool, in all its files, so that files of two pools are never mixed.
pub(super) type PoolId = [u8; 16];

const POOL_MAGIC: [u8; 8] = *b"BATNPOOL";
pub(super) const POOL_HEADER_BYTES: usize = 64;

/// What the first 64 bytes of pool.dat say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PoolHeader {
    pub(super) version: u32,
    pub(super) extent_bytes: u32,
    pub(super) pool_id: PoolId,
}

impl PoolHeader {
    pub(super) fn encode(&self) -> [u8; POOL_HEADER_BYTES] {
        let mut bytes = [0; POOL_HEADER_BYTES];
        bytes[0..8].copy_from_slice(&POOL_MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.extent_bytes.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.pool_id);
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` if this is no pool header or a damaged one. The version is not judged here.
    pub(super) fn decode(bytes: &[u8; POOL_HEADER_BYTES]) -> Option<Self> {
        let crc = crc32c::crc32c(&bytes[..60]);
        if bytes[0..8] != POOL_MAGIC || u32_at(bytes, 60) != crc {
            return None;
        }
        let mut pool_id = PoolId::default();
        pool_id.copy_from_slice(&bytes[16..32]);
        Some(Self { version: u32_at(bytes, 8), extent_bytes: u32_at(bytes, 12), pool_id })
    }
}

pub(super) const MARK_BYTES: usize = 32;
/// Where marks lie in slot 0: change numbers in turn, each on a page of its own.
pub(super) const MARK_OFFSETS: [u64; 2] = [4096, 8192];
const MARK_MAGIC: [u8; 8] = *b"BATNMARK";

/// Change `change` of meta.redb was acknowledged. The checksum starts from the pool's id.
pub(super) fn encode_mark(change: u64, pool_id: &PoolId) -> [u8; MARK_BYTES] {
    let mut bytes = [0; MARK_BYTES];
    bytes[0..8].copy_from_slice(&MARK_MAGIC);
    bytes[8..16].copy_from_slice(&change.to_le_bytes());
    let crc = pool_crc(pool_id, &bytes[..28]);
    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// `None` if this is no mark, a damaged one or another pool's.
pub(super) fn decode_mark(bytes: &[u8; MARK_BYTES], pool_id: &PoolId) -> Option<u64> {
    let whole = bytes[0..8] == MARK_MAGIC && u32_at(bytes, 28) == pool_crc(pool_id, &bytes[..28]);
    whole.then(|| u64_at(bytes, 8))
}

pub(super) const RECORD_BYTES: usize = 32;
/// First two bytes of every journal record; the third is the kind.
const RECORD_MAGIC: [u8; 2] = *b"XM";
const KIND_MAP: u8 = 1;
const KIND_UNMAP: u8 = 2;

/// One change of one volume's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// Grows by one from record to record; a gap ends a replay.
    pub(super) seq: u64,
    pub(super) volume: u64,
    pub(super) extent: u32,
    /// The slot now behind the extent; 0 when it became a hole.
    pub(super) slot: u32,
}

impl Record {
    /// The checksum starts from the pool's id: records of another pool are invalid here.
    pub(super) fn encode(&self, pool_id: &PoolId) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..2].copy_from_slice(&RECORD_MAGIC);
        bytes[2] = if self.slot == 0 { KIND_UNMAP } else { KIND_MAP };
        bytes[4..8].copy_from_slice(&self.extent.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.volume.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.seq.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.slot.to_le_bytes());
        let crc = pool_crc(pool_id, &bytes[..28]);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; RECORD_BYTES], pool_id: &PoolId) -> Option<Self> {
        let slot = u32_at(bytes, 24);
        let kind_fits = matches!((bytes[2], slot), (KIND_MAP, 1..) | (KIND_UNMAP, 0));
        if bytes[0..2] != RECORD_MAGIC
            || !kind_fits
            || bytes[3] != 0
            || u32_at(bytes, 28) != pool_crc(pool_id, &bytes[..28])
        {
            return None;
        }
        Some(Self {
            seq: u64_at(bytes, 16),
            volume: u64_at(bytes, 8),
            extent: u32_at(bytes, 4),
            slot,
        })
    }
}

/// Bytes of another pool fail it.
fn pool_crc(pool_id: &PoolId, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(pool_id), bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut le = [0; 4];
    le.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(le)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut le = [0; 8];
    le.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(le)
}

const _: () = assert!(EXTENT_BYTES.is_power_of_two() && EXTENT_BYTES <= u32::MAX as u64);
const _: () = assert!(MAX_VOLUME_BYTES / EXTENT_BYTES <= u32::MAX as u64);

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PoolId = [7; 16];

    #[test]
    fn golden_record() {
        let record = Record {
            seq: 0x0102_0304_0506_0708,
            volume: 0x1112_1314_1516_1718,
            extent: 0x2122_2324,
            slot: 0x3132_3334,
        };
        let bytes = record.encode(&ID);
        assert_eq!(
            bytes[..28],
            [
                b'X', b'M', 1, 0, 0x24, 0x23, 0x22, 0x21, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12,
                0x11, 8, 7, 6, 5, 4, 3, 2, 1, 0x34, 0x33, 0x32, 0x31
            ]
        );
        assert_eq!(u32_at(&bytes, 28), 0x91B5_B0D0);
        assert_eq!(Record::decode(&bytes, &ID), Some(record));
        assert_eq!(Record::decode(&bytes, &[8; 16]), None, "another pool's record");
    }

    #[test]
    fn golden_header() {
        let header = PoolHeader { version: 1, extent_bytes: 0x10_0000, pool_id: ID };
        let bytes = header.encode();
        assert_eq!(bytes[..16], *b"BATNPOOL\x01\0\0\0\0\0\x10\0");
        assert_eq!(bytes[16..32], ID);
        assert_eq!(PoolHeader::decode(&bytes), Some(header));
    }

    #[test]
    fn golden_mark() {
        let bytes = encode_mark(0x0102_0304_0506_0708, &ID);
        assert_eq!(bytes[..16], *b"BATNMARK\x08\x07\x06\x05\x04\x03\x02\x01");
        assert_eq!(bytes[16..28], [0; 12]);
        assert_eq!(decode_mark(&bytes, &ID), Some(0x0102_0304_0506_0708));
        assert_eq!(decode_mark(&bytes, &[8; 16]), None, "another pool's mark");
        assert_eq!(decode_mark(&[0; MARK_BYTES], &ID), None);
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let mark = encode_mark(9, &ID);
        for bit in 0..MARK_BYTES * 8 {
            let mut bad = mark;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_mark(&bad, &ID), None, "bit {bit}");
        }
        let record = Record { seq: 9, volume: 5, extent: 3, slot: 0 }.encode(&ID);
        for bit in 0..RECORD_BYTES * 8 {
            let mut bad = record;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&bad, &ID), None, "bit {bit}");
        }
        let header = PoolHeader { version: 1, extent_bytes: 4096, pool_id: ID }.encode();
        for bit in 0..POOL_HEADER_BYTES * 8 {
            let mut bad = header;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(PoolHeader::decode(&bad), None, "bit {bit}");
        }
    }
}
