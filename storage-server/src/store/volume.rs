//! One volume: byte ranges in, pieces of slots out.
//!
//! The path of a read or write of mapped extents takes no lock and allocates nothing: pin, one system call, unpin.
//! Does not know who may use the volume; that is the gate above.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use baton_protocol::VolumeId;
use serde::Serialize;

use super::core::{Core, UNMAP_BATCH};
use super::error::IoError;
use super::extent_map::ExtentMap;
use super::layout::EXTENT_BYTES;
use super::meta::VolumeRow;
use super::pool_file::{PUNCH_ALIGN, slot_offset};
use super::read_plan::ReadPlan;

/// A volume as lists show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VolumeInfo {
    /// In JSON a string of 16 hexadecimal digits: many readers cannot hold 64 bits in a number.
    #[serde(serialize_with = "as_text")]
    pub id: VolumeId,
    pub name: String,
    pub size_bytes: u64,
    /// Space its mapped extents take in the pool.
    pub allocated_bytes: u64,
    pub created_unix_s: u64,
}

fn as_text<S: serde::Serializer>(id: &VolumeId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

/// Shared by everyone who uses the volume; all methods work from any thread.
#[derive(Debug)]
pub struct Volume {
    pub(super) core: Arc<Core>,
    id: VolumeId,
    name: String,
    created_unix_s: u64,
    /// Only grows.
    size_bytes: AtomicU64,
    pub(super) map: ExtentMap,
    /// Mapped extents, plus those whose slots are being zeroed.
    pub(super) allocated: AtomicU64,
    deleted: AtomicBool,
    access: RwLock<Option<Arc<[u8]>>>,
}

/// One extent's part of a byte range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) extent: u32,
    /// Offset inside the extent.
    pub(super) within: u64,
    /// 1..=EXTENT_BYTES
    pub(super) len: usize,
}

/// Cuts a range inside a volume at extent borders.
pub(super) fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let (mut at, end) = (offset, offset + len);
    std::iter::from_fn(move || {
        let within = at % EXTENT_BYTES;
        let len = (end - at).min(EXTENT_BYTES - within);
        let piece = Piece { extent: extent_of(at), within, len: usize::try_from(len).ok()? };
        at += len;
        (len > 0).then_some(piece)
    })
}

/// The extent of a byte inside (or just behind) a volume.
#[allow(clippy::cast_possible_truncation, reason = "volumes have at most 2^30 extents")]
pub(super) fn extent_of(offset: u64) -> u32 {
    (offset / EXTENT_BYTES) as u32
}

/// A mapped extent that keeps its slot while this lives.
struct Pin<'a> {
    volume: &'a Volume,
    extent: u32,
    slot: u32,
}

impl Pin<'_> {
    fn offset(&self, within: u64) -> u64 {
        slot_offset(self.slot) + within
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.volume.unpin(self.extent);
    }
}

/// How partly covered extents are treated, and extents in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InPlace {
    /// Zero the whole pages inside, leave the rest.
    Pages,
    /// Zero every byte.
    Exact,
}

impl Volume {
    pub(super) fn new(core: Arc<Core>, id: u64, row: VolumeRow, map: ExtentMap) -> Self {
        let mut allocated = 0;
        map.for_each(|_, _, _| allocated += 1);
        Self {
            core,
            id: VolumeId(id),
            name: row.name,
            created_unix_s: row.created_unix_s,
            size_bytes: AtomicU64::new(row.size_bytes),
            map,
            allocated: AtomicU64::new(allocated),
            deleted: AtomicBool::new(false),
            access: RwLock::new(row.access.map(Arc::from)),
        }
    }

    pub fn id(&self) -> VolumeId {
        self.id
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Grows when the volume is resized.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    pub fn info(&self) -> VolumeInfo {
        VolumeInfo {
            id: self.id,
            name: self.name.clone(),
            size_bytes: self.size_bytes(),
            allocated_bytes: self.allocated.load(Ordering::Relaxed) * EXTENT_BYTES,
            created_unix_s: self.created_unix_s,
        }
    }

    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::SeqCst)
    }

    /// Reads if that takes no disk access. `Ok(false)`: it would wait, `buf` is of no use, call `read` where waiting
    /// is allowed.
    pub fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<bool, IoError> {
        self.check(offset, buf.len() as u64)?;
        let mut rest = buf;
        for piece in pieces(offset, rest.len() as u64) {
            let (now, later) = rest.split_at_mut(piece.len);
            rest = later;
            match self.pin(piece.extent) {
                None => now.fill(0),
                Some(pin) => {
                    if !self.core.pool.try_read(pin.offset(piece.within), now)? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Reads; may wait for the disk. Holes are zeros.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.check(offset, buf.len() as u64)?;
        let mut rest = buf;
        for piece in pieces(offset, rest.len() as u64) {
            let (now, later) = rest.split_at_mut(piece.len);
            rest = later;
            match self.pin(piece.extent) {
                None => now.fill(0),
                Some(pin) => self.core.pool.read(pin.offset(piece.within), now)?,
            }
        }
        Ok(())
    }

    /// Calls `pass_on` with where the bytes are in memory, if they all are: for a system call that copies from there.
    /// The places are good inside the call only, and a call that meets a failing disk says EFAULT. `None`: some are a
    /// hole, on disk only, or in more than one extent.
    pub fn with_resident<T>(
        &self,
        offset: u64,
        len: usize,
        pass_on: impl FnOnce(*const u8) -> T,
    ) -> Option<T> {
        self.check(offset, len as u64).ok()?;
        let piece = pieces(offset, len as u64).next().filter(|piece| piece.len == len)?;
        let pin = self.pin(piece.extent)?;
        self.core.pool.resident(pin.offset(piece.within), len).map(pass_on)
    }

    /// Where the bytes are, for a caller that reads them itself. The places stay valid while the plan lives.
    pub fn plan_read(self: &Arc<Self>, offset: u64, len: usize) -> Result<ReadPlan, IoError> {
        self.check(offset, len as u64)?;
        Ok(ReadPlan::new(Arc::clone(self), offset, len))
    }

    /// Writes; when this returns the bytes survive a kill of the process, after `Store::sync` a power loss.
    /// After an error any part of the range may be written.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let mut rest = data;
        self.write_with(offset, data.len() as u64, |pool, at, len| {
            let (now, later) = rest.split_at(len);
            rest = later;
            pool.write_all_at(now, at)
        })
    }

    /// The same with bytes from elsewhere: `put` writes the next so many of them at a place of the pool file, and is
    /// called for each part of the range in turn.
    pub fn write_with(
        &self,
        offset: u64,
        len: u64,
        mut put: impl FnMut(&File, u64, usize) -> io::Result<()>,
    ) -> Result<(), IoError> {
        self.check_writable(offset, len)?;
        for piece in pieces(offset, len) {
            let pin = match self.pin(piece.extent) {
                Some(pin) => pin,
                None => self.map_and_pin(piece.extent)?,
            };
            put(self.core.pool.file(), pin.offset(piece.within), piece.len)?;
        }
        Ok(())
    }

    /// Gives space back: extents wholly inside become holes, of others the whole 4 KiB pages inside become zeros,
    /// and the rest keeps its bytes.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let size = self.check_writable(offset, len)?;
        self.release(offset, len, size, InPlace::Pages)
    }

    /// Makes exactly these bytes zero and never needs a new extent. With `unmap` space is given back where whole
    /// extents are covered; without, all extents keep theirs.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), IoError> {
        let size = self.check_writable(offset, len)?;
        if unmap {
            return self.release(offset, len, size, InPlace::Exact);
        }
        let mut at = extent_of(offset);
        let end = extent_of((offset + len).next_multiple_of(EXTENT_BYTES));
        let mut batch = Vec::new();
        while at < end && len > 0 {
            batch.clear();
            at = self.map.collect_mapped(at, end, UNMAP_BATCH, &mut batch);
            for piece in batch.iter().map(|e| piece_of(*e, offset, len)) {
                if let Some(pin) = self.pin(piece.extent) {
                    let pool = &self.core.pool;
                    pool.zero(pin.offset(piece.within), piece.len as u64)?;
                }
            }
        }
        Ok(())
    }

    fn release(&self, offset: u64, len: u64, size: u64, mode: InPlace) -> Result<(), IoError> {
        let end = offset + len;
        let whole = extent_of(offset.next_multiple_of(EXTENT_BYTES));
        // An extent that the volume's end cuts is whole when the range reaches that end.
        let whole_end = if end == size {
            extent_of(end.next_multiple_of(EXTENT_BYTES))
        } else {
            extent_of(end)
        };
        if len == 0 {
            return Ok(());
        }
        let ends = [extent_of(offset), extent_of(end - 1)];
        let distinct = if ends[0] == ends[1] { 1 } else { 2 };
        for &extent in &ends[..distinct] {
            if !(whole..whole_end).contains(&extent) {
                self.zero_in_place(piece_of(extent, offset, len), mode)?;
            }
        }
        let mut at = whole;
        let mut batch = Vec::new();
        while at < whole_end {
            batch.clear();
            at = self.map.collect_mapped(at, whole_end, UNMAP_BATCH, &mut batch);
            for extent in self.core.unmap(self, &batch, size)? {
                self.zero_in_place(piece_of(extent, offset, len), mode)?;
            }
        }
        Ok(())
    }

    /// For extents that are not freed. A hole has nothing to zero.
    fn zero_in_place(&self, piece: Piece, mode: InPlace) -> Result<(), IoError> {
        let Some(pin) = self.pin(piece.extent) else {
            return Ok(());
        };
        let pool = &self.core.pool;
        let (from, to) = (piece.within, piece.within + piece.len as u64);
        match mode {
            InPlace::Exact => pool.zero_and_release(pin.offset(from), to - from)?,
            InPlace::Pages => {
                let from = from.next_multiple_of(PUNCH_ALIGN);
                let to = to / PUNCH_ALIGN * PUNCH_ALIGN;
                if from < to {
                    pool.punch(pin.offset(from), to - from)?;
                }
            }
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: u64) -> Result<u64, IoError> {
        let size_bytes = self.size_bytes();
        if offset.checked_add(len).is_none_or(|end| end > size_bytes) {
            return Err(IoError::OutOfRange { offset, len, size_bytes });
        }
        self.check_alive()?;
        Ok(size_bytes)
    }

    fn check_writable(&self, offset: u64, len: u64) -> Result<u64, IoError> {
        let size = self.check(offset, len)?;
        self.core.change_begins()?;
        Ok(size)
    }

    pub(super) fn check_alive(&self) -> Result<(), IoError> {
        if self.deleted.load(Ordering::Relaxed) {
            return Err(IoError::Deleted);
        }
        Ok(())
    }

    fn pin(&self, extent: u32) -> Option<Pin<'_>> {
        let slot = self.map.pin(extent)?;
        Some(Pin { volume: self, extent, slot })
    }

    fn map_and_pin(&self, extent: u32) -> Result<Pin<'_>, IoError> {
        let slot = self.core.map_extent(self, extent)?;
        Ok(Pin { volume: self, extent, slot })
    }

    /// Gives a pin back. The last user of a deleted volume's extent frees it: either the deletion sees the pin gone
    /// or we see the flag, as both sides write first and look second (all SeqCst).
    pub(super) fn unpin(&self, extent: u32) {
        if !self.map.unpin(extent) || !self.deleted.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = self.core.unmap_deleted(self, &[extent]) {
            tracing::warn!(volume = %self.id, %error, "an extent of a deleted volume is freed at the next start");
        }
    }

    /// Called by the store under the state lock, after the new size is durable.
    pub(super) fn set_size(&self, size_bytes: u64) {
        let _state = self.core.state();
        self.size_bytes.store(size_bytes, Ordering::Release);
    }

    /// After this no extent is mapped any more; `free_all` returns what is.
    pub(super) fn set_deleted(&self) {
        let _state = self.core.state();
        self.deleted.store(true, Ordering::SeqCst);
    }

    /// Frees all extents of a deleted volume; those in use follow when their last user is done.
    pub(super) fn free_all(&self) -> Result<(), IoError> {
        let end = extent_of(super::layout::MAX_VOLUME_BYTES);
        let (mut at, mut batch) = (0, Vec::new());
        while at < end {
            batch.clear();
            at = self.map.collect_mapped(at, end, UNMAP_BATCH, &mut batch);
            self.core.unmap_deleted(self, &batch)?;
        }
        Ok(())
    }

    pub(super) fn access(&self) -> Option<Arc<[u8]>> {
        let access = self.access.read();
        access.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_access(&self, record: &[u8]) {
        let access = self.access.write();
        *access.unwrap_or_else(PoisonError::into_inner) = Some(Arc::from(record));
    }
}

/// The part of a range that lies in one extent which it touches.
fn piece_of(extent: u32, offset: u64, len: u64) -> Piece {
    let start = u64::from(extent) * EXTENT_BYTES;
    let from = offset.max(start) - start;
    let to = (offset + len).min(start + EXTENT_BYTES) - start;
    Piece {
        extent,
        within: from,
        len: usize::try_from(to.saturating_sub(from)).expect("at most an extent"),
    }
}
