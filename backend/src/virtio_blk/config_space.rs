//! The configuration space (virtio 1.2 5.2.4), as bytes.

use baton_protocol::units::SECTOR_BYTES;
use baton_remote_client::Geometry;

/// Size of `struct virtio_blk_config` up to the fields this device fills.
pub const CONFIG_BYTES: usize = 60;
/// Offset of `writeback`, the only byte a driver may write (5.2.4, 5.2.6.2).
pub const WRITEBACK_OFFSET: usize = 32;

/// Largest segment of a request, bytes. Any size would do; this is what a
/// driver is told.
pub const SIZE_MAX_BYTES: u32 = 1 << 20;
/// Largest discard and write-zeroes of one request: 1 GiB, so that a request
/// is never long at the server and a large one is many small ones.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Segments of a discard or write-zeroes request.
pub const DISCARD_SEGMENTS_MAX: u32 = 1;
/// The unit in which storage likes to be written: one page.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;
/// The unit in which storage likes to be read and written at length: one
/// extent and one frame of the wire.
const OPTIMAL_IO_BYTES: u32 = 1 << 20;

/// The bytes a driver reads.
#[must_use]
pub fn encode(
    geometry: &Geometry,
    queues: u16,
    queue_size: u16,
    writeback: bool,
) -> [u8; CONFIG_BYTES] {
    let mut b = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
    let block = geometry.block_bytes.max(512);
    put(0, &(geometry.size_bytes / SECTOR_BYTES).to_le_bytes()); // capacity
    put(8, &SIZE_MAX_BYTES.to_le_bytes()); // size_max
    // Header and status need a descriptor each.
    put(12, &u32::from(queue_size.saturating_sub(2).max(1)).to_le_bytes()); // seg_max
    put(20, &block.to_le_bytes()); // blk_size
    let exponent = (PHYSICAL_BLOCK_BYTES / block).max(1).ilog2();
    put(24, &[u8::try_from(exponent).expect("at most 3"), 0]); // physical_block_exp, alignment_offset
    let blocks = |bytes: u32| (bytes / block).max(1);
    put(26, &u16::try_from(blocks(PHYSICAL_BLOCK_BYTES)).unwrap_or(1).to_le_bytes()); // min_io_size
    put(28, &blocks(OPTIMAL_IO_BYTES).to_le_bytes()); // opt_io_size
    put(WRITEBACK_OFFSET, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes()); // num_queues
    if !geometry.read_only {
        let alignment = u64::from(geometry.discard_bytes.max(block)) / SECTOR_BYTES;
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &DISCARD_SEGMENTS_MAX.to_le_bytes());
        put(44, &u32::try_from(alignment).unwrap_or(1).to_le_bytes()); // discard_sector_alignment
        put(48, &DISCARD_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &DISCARD_SEGMENTS_MAX.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
    }
    b
}

/// The `size` bytes at `offset`. A driver may ask for more than this device
/// has (later versions have more fields): the rest reads as zeros, which means
/// "not there" in every field defined so far.
#[must_use]
pub fn read(config: &[u8; CONFIG_BYTES], offset: u32, size: u32) -> Vec<u8> {
    let offset = offset as usize;
    (offset..offset + size as usize).map(|at| config.get(at).copied().unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        id: [0; 20],
        size_bytes: 10 << 20,
        block_bytes: 512,
        discard_bytes: 1 << 20,
        read_only: false,
    };

    #[test]
    fn golden_config() {
        let mut golden = [0u8; 60];
        for (at, bytes) in [
            (0, &20480u64.to_le_bytes()[..]),
            (8, &(1u32 << 20).to_le_bytes()),
            (12, &126u32.to_le_bytes()),
            (20, &512u32.to_le_bytes()),
            (24, &[3, 0]),
            (26, &8u16.to_le_bytes()),
            (28, &2048u32.to_le_bytes()),
            (32, &[1]),
            (34, &4u16.to_le_bytes()),
            (36, &(1u32 << 21).to_le_bytes()),
            (40, &1u32.to_le_bytes()),
            (44, &2048u32.to_le_bytes()),
            (48, &(1u32 << 21).to_le_bytes()),
            (52, &1u32.to_le_bytes()),
            (56, &[1]),
        ] {
            golden[at..at + bytes.len()].copy_from_slice(bytes);
        }
        assert_eq!(encode(&GEOMETRY, 4, 128, true), golden);
    }

    #[test]
    fn a_read_only_disk_offers_no_discard() {
        let config = encode(&Geometry { read_only: true, ..GEOMETRY }, 1, 128, true);
        assert!(config[36..].iter().all(|b| *b == 0));
    }

    #[test]
    fn reading_past_the_end_gives_zeros() {
        let config = encode(&GEOMETRY, 1, 128, true);
        assert_eq!(read(&config, 0, 8), 20480u64.to_le_bytes());
        assert_eq!(read(&config, 56, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read(&config, 0x100, 2), [0, 0]);
        assert_eq!(read(&config, u32::MAX, 1), [0]);
    }
}
