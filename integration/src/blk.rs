//! virtio-blk requests on a raw queue: well-formed ones, for tests that need a disk rather than a hostile driver.

use crate::raw_frontend::Queue;
use crate::ring::Descriptor;
use anyhow::{Context, Result, bail};
use std::time::Duration;

/// Longer than any stall a test causes on purpose; whoever waits for less says so.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Statuses of virtio 1.2, 5.2.6.
pub const OK: u8 = 0;
/// The device or the driver erred.
pub const IOERR: u8 = 1;
/// The device does not know the request.
pub const UNSUPP: u8 = 2;
/// What lies in the status byte before the device writes it.
pub const UNTOUCHED: u8 = 0xaa;

const SECTOR: usize = 512;
const HEADER_BYTES: usize = 16;
const ID_BYTES: usize = 20;

/// A request.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Reads `len` bytes.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: usize,
    },
    /// Writes bytes.
    Write {
        /// First sector.
        sector: u64,
        /// What to write.
        data: &'a [u8],
    },
    /// Makes all completed writes durable.
    Flush,
    /// Discards sectors.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u32,
    },
    /// Zeroes sectors.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u32,
        /// Whether the space may be freed.
        unmap: bool,
    },
    /// Asks for the disk's name.
    GetId,
    /// Any type with any readable and writable data.
    Other {
        /// The type field.
        kind: u32,
        /// The sector field.
        sector: u64,
        /// Readable data after the header.
        data: &'a [u8],
        /// Bytes of writable data before the status.
        writable: usize,
    },
}

impl Request<'_> {
    /// Type, sector, readable bytes, length of writable data.
    fn parts(&self) -> (u32, u64, Vec<u8>, usize) {
        let range = |sector: u64, sectors: u32, flags: u32| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            bytes
        };
        match *self {
            Self::Read { sector, len } => (0, sector, Vec::new(), len),
            Self::Write { sector, data } => (1, sector, data.to_vec(), 0),
            Self::Flush => (4, 0, Vec::new(), 0),
            Self::GetId => (8, 0, Vec::new(), ID_BYTES),
            Self::Discard { sector, sectors } => (11, 0, range(sector, sectors, 0), 0),
            Self::WriteZeroes { sector, sectors, unmap } => {
                (13, 0, range(sector, sectors, u32::from(unmap)), 0)
            }
            Self::Other { kind, sector, data, writable } => (kind, sector, data.to_vec(), writable),
        }
    }
}

/// Where a request that the device has lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    header: u64,
    status: u64,
    readable: Option<(u64, usize)>,
    writable: Option<(u64, usize)>,
}

/// A completed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The chain's head, as returned by [`Queue::submit`].
    pub head: u32,
    /// What the device answered.
    pub status: u8,
    /// Writable data as the device left it.
    pub data: Vec<u8>,
    /// Bytes the device says it wrote, with the status.
    pub written: u32,
}

/// The header of a request.
#[must_use]
pub fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

impl Queue {
    /// Publishes a request without a kick. Returns its head.
    pub fn submit(&mut self, request: &Request<'_>) -> Result<u32> {
        let head = self.stage_request(request)?;
        self.ring.commit();
        Ok(head)
    }

    /// Publishes requests without a kick, so that the device sees all of them or none.
    pub fn submit_batch(&mut self, requests: &[Request<'_>]) -> Result<()> {
        for request in requests {
            self.stage_request(request)?;
        }
        self.ring.commit();
        Ok(())
    }

    fn stage_request(&mut self, request: &Request<'_>) -> Result<u32> {
        let (kind, sector, readable, writable) = request.parts();
        let pending = Pending {
            header: self.take(HEADER_BYTES)?,
            status: self.take(1)?,
            readable: if readable.is_empty() {
                None
            } else {
                Some((self.take(readable.len())?, readable.len()))
            },
            writable: if writable == 0 { None } else { Some((self.take(writable)?, writable)) },
        };
        self.memory.write(pending.header, &header(kind, sector));
        self.memory.write(pending.status, &[UNTOUCHED]);
        let len = |n: usize| u32::try_from(n).context("data is shorter than 4 GiB");
        let mut chain = vec![Descriptor::readable(pending.header, 16)];
        if let Some((at, bytes)) = pending.readable {
            self.memory.write(at, &readable);
            chain.push(Descriptor::readable(at, len(bytes)?));
        }
        if let Some((at, bytes)) = pending.writable {
            chain.push(Descriptor::writable(at, len(bytes)?));
        }
        chain.push(Descriptor::writable(pending.status, 1));
        let head = self.ring.link(&chain)?;
        self.ring.stage(head);
        self.pending.insert(u32::from(head), pending);
        Ok(u32::from(head))
    }

    /// Waits for the next request to complete, in the device's order. `None` when the time is over.
    pub fn wait_completion(&mut self, timeout: Duration) -> Result<Option<Completion>> {
        let Some(used) = self.wait_used(timeout)? else { return Ok(None) };
        self.ring.release(used.head)?;
        let pending = self
            .pending
            .remove(&used.head)
            .context("the device completed a chain that is no request")?;
        let completion = Completion {
            head: used.head,
            status: self.memory.read(pending.status, 1)[0],
            data: pending.writable.map(|(at, len)| self.memory.read(at, len)).unwrap_or_default(),
            written: used.len,
        };
        self.give(pending.header, HEADER_BYTES);
        self.give(pending.status, 1);
        for (at, len) in [pending.readable, pending.writable].into_iter().flatten() {
            self.give(at, len);
        }
        Ok(Some(completion))
    }

    /// One request from start to end, on a queue with nothing else in flight.
    pub fn request(&mut self, request: &Request<'_>) -> Result<Completion> {
        let head = self.submit(request)?;
        self.kick()?;
        let done = self.wait_completion(REQUEST_TIMEOUT)?;
        let done =
            done.with_context(|| format!("no completion in {REQUEST_TIMEOUT:?} of {request:?}"))?;
        if done.head != head {
            bail!("head {} completed instead of {head}: the queue was not idle", done.head);
        }
        Ok(done)
    }

    /// Reads, and fails unless the device says OK.
    pub fn read(&mut self, sector: u64, len: usize) -> Result<Vec<u8>> {
        let done = self.request(&Request::Read { sector, len })?;
        done.ok().with_context(|| format!("read of {len} bytes at sector {sector}"))
    }

    /// Writes, and fails unless the device says OK.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        let done = self.request(&Request::Write { sector, data })?;
        done.ok()
            .map(drop)
            .with_context(|| format!("write of {} bytes at sector {sector}", data.len()))
    }

    /// Flushes, and fails unless the device says OK.
    pub fn flush(&mut self) -> Result<()> {
        self.request(&Request::Flush)?.ok().map(drop).context("flush")
    }

    fn take(&mut self, len: usize) -> Result<u64> {
        if let Some(at) = self.spare.get_mut(&len).and_then(Vec::pop) {
            return Ok(at);
        }
        // Data on pages of its own, so that a dirty log can be read request by request.
        self.memory.alloc(len, if len >= SECTOR { 4096 } else { 16 })
    }

    fn give(&mut self, at: u64, len: usize) {
        self.spare.entry(len).or_default().push(at);
    }
}

impl Completion {
    /// The data, if the device said OK.
    pub fn ok(self) -> Result<Vec<u8>> {
        match self.status {
            OK => Ok(self.data),
            IOERR => bail!("the device reports an I/O error"),
            UNSUPP => bail!("the device does not support the request"),
            other => bail!("the device left the status at {other:#x}"),
        }
    }
}
