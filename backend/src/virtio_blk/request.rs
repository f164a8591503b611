//! The meaning of a request (virtio 1.2 5.2.6). Pure: lengths and header bytes
//! in, a [`Decision`] out.

use baton_protocol::units::SECTOR_BYTES;
use baton_remote_client::{IoError, Op};

use super::config_space::DISCARD_SECTORS_MAX;

/// Size of the header in front of every request, bytes.
pub const HEADER_BYTES: usize = 16;
/// Size of a discard or write-zeroes segment, bytes.
pub const SEGMENT_BYTES: usize = 16;
/// Size of the device ID string, bytes.
pub const ID_BYTES: usize = 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const SEGMENT_FLAG_UNMAP: u32 = 1;

/// The last byte of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed.
    IoErr = 1,
    /// Not something this device does.
    Unsupp = 2,
}

impl From<Result<(), IoError>> for Status {
    fn from(result: Result<(), IoError>) -> Self {
        match result {
            Ok(()) => Self::Ok,
            Err(IoError::Unsupported) => Self::Unsupp,
            Err(IoError::OutOfRange | IoError::NoSpace | IoError::ReadOnly | IoError::Io) => {
                Self::IoErr
            }
        }
    }
}

/// What the disk allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size, bytes.
    pub size_bytes: u64,
    /// Changes are refused.
    pub read_only: bool,
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Ask the storage. READ fills the writable buffers, WRITE stores the
    /// readable ones.
    Storage(Op),
    /// Copy the device ID into the writable buffers.
    GetId,
    /// Answer at once.
    Answer(Status),
}

/// The shape of a request.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// First bytes of the readable part.
    pub header: [u8; HEADER_BYTES],
    /// Readable bytes behind the header.
    pub readable_bytes: u64,
    /// Writable bytes in front of the status byte.
    pub writable_bytes: u64,
    /// First bytes of the readable part behind the header, zeros where there
    /// are fewer.
    pub segment: [u8; SEGMENT_BYTES],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Decides what to do.
#[must_use]
pub fn decide(shape: &Shape, limits: Limits) -> Decision {
    let sector = u64_at(&shape.header, 8);
    let answer = |status| Decision::Answer(status);
    match u32_at(&shape.header, 0) {
        T_IN => {
            if shape.readable_bytes != 0 {
                return answer(Status::IoErr);
            }
            transfer(sector, shape.writable_bytes, limits, |offset| Op::Read { offset })
        }
        // virtio 1.2 5.2.6.2: a write to a read-only device fails with IOERR.
        T_OUT | T_DISCARD | T_WRITE_ZEROES if limits.read_only => answer(Status::IoErr),
        T_OUT => {
            if shape.writable_bytes != 0 {
                return answer(Status::IoErr);
            }
            transfer(sector, shape.readable_bytes, limits, |offset| Op::Write { offset })
        }
        T_FLUSH => Decision::Storage(Op::Flush),
        T_GET_ID if shape.writable_bytes > 0 => Decision::GetId,
        T_GET_ID => answer(Status::IoErr),
        kind @ (T_DISCARD | T_WRITE_ZEROES) => zap(kind, shape, limits),
        _ => answer(Status::Unsupp),
    }
}

fn transfer(sector: u64, len: u64, limits: Limits, op: impl FnOnce(u64) -> Op) -> Decision {
    match byte_range(sector, len, limits) {
        Some(_) if len == 0 => Decision::Answer(Status::Ok),
        Some(offset) => Decision::Storage(op(offset)),
        None => Decision::Answer(Status::IoErr),
    }
}

fn zap(kind: u32, shape: &Shape, limits: Limits) -> Decision {
    let answer = |status| Decision::Answer(status);
    if shape.writable_bytes != 0 {
        return answer(Status::IoErr);
    }
    // More segments than the configuration space allows are as unsupported as
    // a broken one.
    if shape.readable_bytes != SEGMENT_BYTES as u64 {
        return answer(Status::Unsupp);
    }
    let sector = u64_at(&shape.segment, 0);
    let sectors = u32_at(&shape.segment, 8);
    let flags = u32_at(&shape.segment, 12);
    let unmap = flags & SEGMENT_FLAG_UNMAP != 0;
    // virtio 1.2 5.2.6.2: unknown flags, and unmap on a discard: UNSUPP.
    if flags & !SEGMENT_FLAG_UNMAP != 0 || (kind == T_DISCARD && unmap) {
        return answer(Status::Unsupp);
    }
    let len = u64::from(sectors) * SECTOR_BYTES;
    if sectors > DISCARD_SECTORS_MAX {
        return answer(Status::IoErr);
    }
    match byte_range(sector, len, limits) {
        Some(_) if len == 0 => answer(Status::Ok),
        Some(offset) if kind == T_DISCARD => Decision::Storage(Op::Discard { offset, len }),
        Some(offset) => Decision::Storage(Op::WriteZeroes { offset, len, unmap }),
        None => answer(Status::IoErr),
    }
}

/// First byte of the range, if it is whole sectors of the disk.
fn byte_range(sector: u64, len: u64, limits: Limits) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    let end = offset.checked_add(len)?;
    (len.is_multiple_of(SECTOR_BYTES) && end <= limits.size_bytes).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { size_bytes: 1 << 30, read_only: false };
    const SECTORS: u64 = (1 << 30) / 512;

    fn shape(kind: u32, sector: u64, readable_bytes: u64, writable_bytes: u64) -> Shape {
        let mut header = [0; 16];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        Shape { header, readable_bytes, writable_bytes, segment: [0; 16] }
    }

    fn segment(kind: u32, sector: u64, sectors: u32, flags: u32) -> Shape {
        let mut s = shape(kind, 0, 16, 0);
        s.segment[0..8].copy_from_slice(&sector.to_le_bytes());
        s.segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        s.segment[12..16].copy_from_slice(&flags.to_le_bytes());
        s
    }

    const OK: Decision = Decision::Answer(Status::Ok);
    const IOERR: Decision = Decision::Answer(Status::IoErr);
    const UNSUPP: Decision = Decision::Answer(Status::Unsupp);

    #[test]
    fn what_each_request_becomes() {
        let cases = [
            (shape(0, 8, 0, 4096), Decision::Storage(Op::Read { offset: 4096 })),
            (
                shape(0, SECTORS - 1, 0, 512),
                Decision::Storage(Op::Read { offset: (1 << 30) - 512 }),
            ),
            (shape(0, SECTORS - 1, 0, 1024), IOERR),
            (shape(0, SECTORS, 0, 512), IOERR),
            (shape(0, u64::MAX, 0, 512), IOERR),
            (shape(0, u64::MAX / 512, 0, 512), IOERR),
            (shape(0, 0, 0, 100), IOERR),
            (shape(0, 0, 0, 0), OK),
            (shape(0, 0, 512, 512), IOERR),
            (shape(1, 8, 512, 0), Decision::Storage(Op::Write { offset: 4096 })),
            (shape(1, 8, 512, 1), IOERR),
            (shape(1, SECTORS, 512, 0), IOERR),
            (shape(4, 77, 0, 0), Decision::Storage(Op::Flush)),
            (shape(8, 0, 0, 20), Decision::GetId),
            (shape(8, 0, 0, 0), IOERR),
            (shape(2, 0, 0, 512), UNSUPP),
            (shape(14, 0, 16, 0), UNSUPP),
            (shape(u32::MAX, 0, 0, 0), UNSUPP),
            (segment(11, 8, 8, 0), Decision::Storage(Op::Discard { offset: 4096, len: 4096 })),
            (segment(11, 8, 0, 0), OK),
            (segment(11, 8, 8, 1), UNSUPP),
            (segment(11, 8, 8, 2), UNSUPP),
            (segment(11, 0, u32::MAX, 0), IOERR),
            (segment(11, SECTORS, 1, 0), IOERR),
            (segment(11, u64::MAX, 1, 0), IOERR),
            (
                segment(13, 8, 8, 1),
                Decision::Storage(Op::WriteZeroes { offset: 4096, len: 4096, unmap: true }),
            ),
            (segment(13, 8, 8, 4), UNSUPP),
            (Shape { readable_bytes: 32, ..segment(11, 8, 8, 0) }, UNSUPP),
            (Shape { readable_bytes: 8, ..segment(11, 8, 8, 0) }, UNSUPP),
            (Shape { writable_bytes: 8, ..segment(11, 8, 8, 0) }, IOERR),
        ];
        for (shape, expected) in cases {
            assert_eq!(decide(&shape, LIMITS), expected, "{shape:?}");
        }
        let read_only = Limits { read_only: true, ..LIMITS };
        for request in [shape(1, 0, 512, 0), segment(11, 0, 8, 0), segment(13, 0, 8, 0)] {
            assert_eq!(decide(&request, read_only), IOERR);
        }
        assert!(matches!(
            decide(&shape(0, 0, 0, 512), read_only),
            Decision::Storage(Op::Read { .. })
        ));
    }

    proptest! {
        /// Whatever the guest writes, the storage is asked only for whole
        /// sectors of the disk.
        #[test]
        fn nothing_off_the_disk_reaches_the_storage(
            kind in prop_oneof![0u32..16, any::<u32>()],
            sector in prop_oneof![any::<u64>(), 0..SECTORS + 10],
            readable in prop_oneof![0u64..5000, any::<u64>(), Just(16u64)],
            writable in prop_oneof![0u64..5000, any::<u64>()],
            segment: [u8; 16],
            read_only: bool,
        ) {
            let s = Shape { segment, ..shape(kind, sector, readable, writable) };
            let limits = Limits { read_only, ..LIMITS };
            if let Decision::Storage(op) = decide(&s, limits) {
                let (offset, len, changes) = match op {
                    Op::Read { offset } => (offset, writable, false),
                    Op::Write { offset } => (offset, readable, true),
                    Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => (offset, len, true),
                    Op::Flush => (0, 512, false),
                };
                prop_assert!(len > 0 && len % 512 == 0 && offset % 512 == 0);
                prop_assert!(offset + len <= limits.size_bytes);
                prop_assert!(!(changes && read_only));
            }
        }
    }
}
