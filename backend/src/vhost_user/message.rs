//! vhost-user messages: bytes and passed descriptors to a [`Request`], and
//! replies to bytes. Pure; knows no socket.
//!
//! Every message has a 12-byte header, little-endian on every machine that runs
//! this: request number, flags, size of the body that follows. A body of the
//! wrong size or a missing descriptor is a [`MessageError`]; an unknown request
//! is [`Request::Unknown`], so that it can be refused without losing the
//! connection.

use std::os::fd::OwnedFd;

/// Size of the header, bytes.
pub const HEADER_BYTES: usize = 12;
/// Longest body, bytes: a memory table of 32 regions is the largest message
/// this back-end knows; the bound keeps a hostile size from being allocated.
pub const BODY_BYTES_MAX: usize = 4096;
/// Most descriptors in one message (a memory table of 32 regions).
pub const FDS_MAX: usize = 32;
/// Memory regions a front-end may have; what QEMU and cloud-hypervisor need at
/// most with one slot per hot-plugged DIMM.
pub const MEM_SLOTS_MAX: u64 = 509;
/// Largest configuration space a front-end may ask for.
pub const CONFIG_BYTES_MAX: u32 = 256;

const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In the u64 of SET_VRING_KICK, CALL and ERR: no descriptor was passed.
const VRING_NO_FD: u64 = 1 << 8;

/// Number of the one message this back-end sends on its own: the configuration
/// space changed.
pub const BACKEND_CONFIG_CHANGE: u32 = 2;

/// A message header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request number.
    pub request: u32,
    /// The sender wants a reply whatever the request.
    pub need_reply: bool,
    /// Bytes of the body.
    pub size: usize,
}

/// Where a memory region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front-end's own memory, in which ring addresses are given.
    pub user_addr: u64,
    /// Offset of the region in its descriptor.
    pub mmap_offset: u64,
}

/// Addresses of a ring, in the front-end's own memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringAddr {
    /// Ring.
    pub index: u32,
    /// Bit 0: writes to the used ring are logged at `log_guest_addr`.
    pub flags: u32,
    /// Descriptor table.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
    /// Guest physical address of the used ring, for the dirty log.
    pub log_guest_addr: u64,
}

/// The region that tracks requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightDescription {
    /// Bytes.
    pub mmap_size: u64,
    /// Offset in the descriptor.
    pub mmap_offset: u64,
    /// Rings.
    pub num_queues: u16,
    /// Entries per ring.
    pub queue_size: u16,
}

/// Direction of a device-state transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateDirection {
    /// The back-end writes its state.
    Save,
    /// The back-end reads its state.
    Load,
}

/// What a front-end asks.
#[derive(Debug)]
pub enum Request {
    /// GET_FEATURES.
    GetFeatures,
    /// SET_FEATURES.
    SetFeatures(u64),
    /// SET_OWNER.
    SetOwner,
    /// RESET_OWNER (deprecated; treated as a reset).
    ResetOwner,
    /// SET_MEM_TABLE.
    SetMemTable(Vec<(Region, OwnedFd)>),
    /// SET_LOG_BASE with a descriptor.
    SetLogBase {
        /// Bytes.
        mmap_size: u64,
        /// Offset in the descriptor.
        mmap_offset: u64,
        /// The log.
        fd: OwnedFd,
    },
    /// SET_VRING_NUM.
    SetVringNum {
        /// Ring.
        index: u32,
        /// Entries.
        num: u32,
    },
    /// SET_VRING_ADDR.
    SetVringAddr(VringAddr),
    /// SET_VRING_BASE.
    SetVringBase {
        /// Ring.
        index: u32,
        /// Next available entry.
        base: u32,
    },
    /// GET_VRING_BASE.
    GetVringBase {
        /// Ring.
        index: u32,
    },
    /// SET_VRING_KICK.
    SetVringKick {
        /// Ring.
        index: u32,
        /// The event, or `None` where the front-end wants polling.
        fd: Option<OwnedFd>,
    },
    /// SET_VRING_CALL.
    SetVringCall {
        /// Ring.
        index: u32,
        /// The event, or `None` for no interrupts.
        fd: Option<OwnedFd>,
    },
    /// SET_VRING_ERR.
    SetVringErr {
        /// Ring.
        index: u32,
        /// The event.
        fd: Option<OwnedFd>,
    },
    /// GET_PROTOCOL_FEATURES.
    GetProtocolFeatures,
    /// SET_PROTOCOL_FEATURES.
    SetProtocolFeatures(u64),
    /// GET_QUEUE_NUM.
    GetQueueNum,
    /// SET_VRING_ENABLE.
    SetVringEnable {
        /// Ring.
        index: u32,
        /// On or off.
        enable: bool,
    },
    /// SET_BACKEND_REQ_FD: the socket for the back-end's own messages.
    SetBackendReqFd(OwnedFd),
    /// GET_CONFIG.
    GetConfig {
        /// First byte.
        offset: u32,
        /// Bytes.
        size: u32,
        /// Passed back as it came.
        flags: u32,
    },
    /// SET_CONFIG.
    SetConfig {
        /// First byte.
        offset: u32,
        /// The bytes.
        payload: Vec<u8>,
    },
    /// GET_INFLIGHT_FD.
    GetInflightFd(InflightDescription),
    /// SET_INFLIGHT_FD.
    SetInflightFd(InflightDescription, OwnedFd),
    /// RESET_DEVICE.
    ResetDevice,
    /// GET_MAX_MEM_SLOTS.
    GetMaxMemSlots,
    /// ADD_MEM_REG.
    AddMemRegion(Region, OwnedFd),
    /// REM_MEM_REG.
    RemoveMemRegion(Region),
    /// SET_DEVICE_STATE_FD.
    SetDeviceStateFd(StateDirection, OwnedFd),
    /// CHECK_DEVICE_STATE.
    CheckDeviceState,
    /// A request this back-end does not have.
    Unknown(u32),
}

/// Whether a request has an answer of its own. A refusal has no place in that
/// answer, and a front-end that gets none waits for ever.
#[must_use]
pub fn has_own_answer(request: u32) -> bool {
    // GET_FEATURES, SET_LOG_BASE, GET_VRING_BASE, GET_PROTOCOL_FEATURES,
    // GET_QUEUE_NUM, GET_CONFIG, GET_INFLIGHT_FD, GET_MAX_MEM_SLOTS,
    // SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE.
    matches!(request, 1 | 6 | 11 | 15 | 17 | 24 | 31 | 36 | 42 | 43)
}

/// Why a message cannot be read. The connection is beyond repair.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not version 1, or a reply where a request belongs.
    #[error("the front-end sent a header with flags {0:#x}, which is not a version-1 request")]
    Flags(u32),
    /// A body longer than any known message.
    #[error("the front-end sent a message of {0} bytes; the longest known has {BODY_BYTES_MAX}")]
    TooLong(usize),
    /// The body does not fit the request.
    #[error("vhost-user request {request} came with a body of {size} bytes, which does not fit it")]
    Size {
        /// Request number.
        request: u32,
        /// Bytes.
        size: usize,
    },
    /// The number of descriptors does not fit the request.
    #[error("vhost-user request {request} came with {fds} file descriptors, which does not fit it")]
    Descriptors {
        /// Request number.
        request: u32,
        /// Descriptors received.
        fds: usize,
    },
    /// A field has a value outside its range.
    #[error("vhost-user request {request} has a value out of range")]
    Value {
        /// Request number.
        request: u32,
    },
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`MessageError::Flags`], [`MessageError::TooLong`].
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, MessageError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let flags = word(4);
        if flags & 3 != VERSION || flags & FLAG_REPLY != 0 {
            return Err(MessageError::Flags(flags));
        }
        let size = word(8) as usize;
        if size > BODY_BYTES_MAX {
            return Err(MessageError::TooLong(size));
        }
        Ok(Self { request: word(0), need_reply: flags & FLAG_NEED_REPLY != 0, size })
    }

    /// The header of a reply to `request`, or of a message of our own.
    #[must_use]
    pub fn encode(request: u32, reply: bool, size: usize) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&request.to_le_bytes());
        let flags = VERSION | if reply { FLAG_REPLY } else { 0 };
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        let size = u32::try_from(size).expect("replies are small");
        bytes[8..12].copy_from_slice(&size.to_le_bytes());
        bytes
    }
}

/// Cuts integers off the front of a body; `None` when it is too short.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    fn region(&mut self) -> Option<Region> {
        Some(Region {
            guest_addr: self.u64()?,
            size: self.u64()?,
            user_addr: self.u64()?,
            mmap_offset: self.u64()?,
        })
    }
    fn inflight(&mut self) -> Option<InflightDescription> {
        let description = InflightDescription {
            mmap_size: self.u64()?,
            mmap_offset: self.u64()?,
            num_queues: self.u16()?,
            queue_size: self.u16()?,
        };
        // repr(C) of two u64 and two u16 has four bytes of padding, which QEMU
        // leaves out and the vhost crate sends.
        if self.0.len() == 4 {
            self.0 = &[];
        }
        Some(description)
    }
}

impl Request {
    /// Reads a message. Descriptors that do not belong to it are closed.
    ///
    /// # Errors
    /// [`MessageError`] when body or descriptors do not fit the request.
    pub fn decode(header: Header, body: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let request = header.request;
        let bad_size = MessageError::Size { request, size: body.len() };
        let bad_fds = MessageError::Descriptors { request, fds: fds.len() };
        let bad_value = MessageError::Value { request };
        let mut fds = fds.into_iter();
        let mut f = Fields(body);
        let mut one_fd = || match (fds.next(), fds.next()) {
            (Some(fd), None) => Ok(fd),
            _ => Err(bad_fds.clone()),
        };
        macro_rules! field {
            ($e:expr) => {
                $e.ok_or_else(|| bad_size.clone())?
            };
        }
        let parsed = match request {
            1 => Self::GetFeatures,
            2 => Self::SetFeatures(field!(f.u64())),
            3 => Self::SetOwner,
            4 => Self::ResetOwner,
            5 => {
                let count = field!(f.u32()) as usize;
                let _padding = field!(f.u32());
                if count > FDS_MAX {
                    return Err(bad_value);
                }
                let mut regions = Vec::with_capacity(count);
                for _ in 0..count {
                    let region = field!(f.region());
                    let fd = fds.next().ok_or_else(|| bad_fds.clone())?;
                    regions.push((region, fd));
                }
                if fds.next().is_some() {
                    return Err(bad_fds);
                }
                Self::SetMemTable(regions)
            }
            6 => {
                let (mmap_size, mmap_offset) = (field!(f.u64()), field!(f.u64()));
                Self::SetLogBase { mmap_size, mmap_offset, fd: one_fd()? }
            }
            8 => Self::SetVringNum { index: field!(f.u32()), num: field!(f.u32()) },
            9 => Self::SetVringAddr(VringAddr {
                index: field!(f.u32()),
                flags: field!(f.u32()),
                desc: field!(f.u64()),
                used: field!(f.u64()),
                avail: field!(f.u64()),
                log_guest_addr: field!(f.u64()),
            }),
            10 => Self::SetVringBase { index: field!(f.u32()), base: field!(f.u32()) },
            11 => {
                let index = field!(f.u32());
                let _base = field!(f.u32());
                Self::GetVringBase { index }
            }
            12..=14 => {
                let value = field!(f.u64());
                let fd = if value & VRING_NO_FD == 0 { Some(one_fd()?) } else { None };
                let index = u32::try_from(value & 0xff).expect("eight bits");
                match request {
                    12 => Self::SetVringKick { index, fd },
                    13 => Self::SetVringCall { index, fd },
                    _ => Self::SetVringErr { index, fd },
                }
            }
            15 => Self::GetProtocolFeatures,
            16 => Self::SetProtocolFeatures(field!(f.u64())),
            17 => Self::GetQueueNum,
            18 => {
                let index = field!(f.u32());
                match field!(f.u32()) {
                    0 => Self::SetVringEnable { index, enable: false },
                    1 => Self::SetVringEnable { index, enable: true },
                    _ => return Err(bad_value),
                }
            }
            21 => Self::SetBackendReqFd(one_fd()?),
            24 | 25 => {
                let (offset, size, flags) = (field!(f.u32()), field!(f.u32()), field!(f.u32()));
                if size > CONFIG_BYTES_MAX || f.0.len() != size as usize {
                    return Err(bad_size);
                }
                let payload = std::mem::take(&mut f.0);
                if request == 24 {
                    Self::GetConfig { offset, size, flags }
                } else {
                    Self::SetConfig { offset, payload: payload.to_vec() }
                }
            }
            31 => Self::GetInflightFd(field!(f.inflight())),
            32 => Self::SetInflightFd(field!(f.inflight()), one_fd()?),
            34 => Self::ResetDevice,
            36 => Self::GetMaxMemSlots,
            37 | 38 => {
                let _padding = field!(f.u64());
                let region = field!(f.region());
                if request == 37 {
                    Self::AddMemRegion(region, one_fd()?)
                } else {
                    // A descriptor may come along (QEMU sends one); it is closed.
                    Self::RemoveMemRegion(region)
                }
            }
            42 => {
                let direction = match field!(f.u32()) {
                    0 => StateDirection::Save,
                    1 => StateDirection::Load,
                    _ => return Err(bad_value),
                };
                let _phase = field!(f.u32());
                Self::SetDeviceStateFd(direction, one_fd()?)
            }
            43 => Self::CheckDeviceState,
            // Its body is whatever it is.
            _ => return Ok(Self::Unknown(request)),
        };
        if f.0.is_empty() { Ok(parsed) } else { Err(bad_size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(request: u32) -> Header {
        Header { request, need_reply: false, size: 0 }
    }

    fn some_fd() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("/dev/null").into()
    }

    #[test]
    fn golden_headers() {
        let bytes = [2, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0];
        assert_eq!(Header::decode(&bytes), Ok(Header { request: 2, need_reply: true, size: 8 }));
        assert_eq!(Header::encode(2, true, 8), [2, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        let with_flags = |flags| Header::decode(&[2, 0, 0, 0, flags, 0, 0, 0, 8, 0, 0, 0]);
        assert!(matches!(with_flags(5), Err(MessageError::Flags(5))), "a reply");
        assert!(matches!(with_flags(2), Err(MessageError::Flags(2))), "version 2");
        let long = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(Header::decode(&long), Err(MessageError::TooLong(65536)));
    }

    #[test]
    fn golden_bodies() {
        let addr: Vec<u8> = [1u32, 1]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .chain([0x10u64, 0x20, 0x30, 0x40].iter().flat_map(|v| v.to_le_bytes()))
            .collect();
        let Ok(Request::SetVringAddr(parsed)) = Request::decode(header(9), &addr, vec![]) else {
            panic!()
        };
        assert_eq!(
            parsed,
            VringAddr {
                index: 1,
                flags: 1,
                desc: 0x10,
                used: 0x20,
                avail: 0x30,
                log_guest_addr: 0x40
            }
        );
        let kick = 3u64.to_le_bytes();
        assert!(matches!(
            Request::decode(header(12), &kick, vec![some_fd()]),
            Ok(Request::SetVringKick { index: 3, fd: Some(_) })
        ));
        let no_fd = 0x103u64.to_le_bytes();
        assert!(matches!(
            Request::decode(header(13), &no_fd, vec![]),
            Ok(Request::SetVringCall { index: 3, fd: None })
        ));
        assert!(matches!(
            Request::decode(header(12), &kick, vec![]),
            Err(MessageError::Descriptors { .. })
        ));
        // 20 bytes as QEMU sends it, 24 as the vhost crate does.
        for len in [20, 24] {
            assert!(matches!(
                Request::decode(header(31), &vec![0; len], vec![]),
                Ok(Request::GetInflightFd(_))
            ));
        }
        assert!(matches!(
            Request::decode(header(31), &[0; 22], vec![]),
            Err(MessageError::Size { .. })
        ));
        assert!(matches!(
            Request::decode(header(99), &[1, 2, 3], vec![]),
            Ok(Request::Unknown(99))
        ));
    }

    #[test]
    fn a_memory_table_needs_one_descriptor_per_region() {
        let mut body = vec![];
        body.extend_from_slice(&2u32.to_le_bytes());
        body.extend_from_slice(&0u32.to_le_bytes());
        body.extend_from_slice(&[7; 64]);
        let decode =
            |n: usize| Request::decode(header(5), &body, (0..n).map(|_| some_fd()).collect());
        assert!(matches!(decode(2), Ok(Request::SetMemTable(regions)) if regions.len() == 2));
        assert!(matches!(decode(1), Err(MessageError::Descriptors { .. })));
        assert!(matches!(decode(3), Err(MessageError::Descriptors { .. })));
        let huge = [255, 255, 255, 255, 0, 0, 0, 0];
        assert!(matches!(
            Request::decode(header(5), &huge, vec![]),
            Err(MessageError::Value { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(request in 0u32..50, body in prop::collection::vec(any::<u8>(), 0..200), fds in 0usize..4) {
            let _ = Request::decode(header(request), &body, (0..fds).map(|_| some_fd()).collect());
        }
    }
}
