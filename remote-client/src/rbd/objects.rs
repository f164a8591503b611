//! An image's objects, read past librbd.
//!
//! A quarter of what a small read costs a host with Ceph is librbd's own
//! bookkeeping for it (docs/performance.md). An object that exists holds all that
//! the image has in its range (what came from a parent was copied there before its
//! first write), so a read that stays within one object can ask for that. Whatever
//! is not a plain success is librbd's to answer: only it knows what an object means
//! that is not there.
//!
//! Writes always go through librbd, which keeps the object map, snapshots and
//! the exclusive lock.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::image::{Image, Layout, ObjectPool};
use super::library::{FEATURES_PLAIN, Handle, Rados};
use super::request::Piece;
use crate::volume::Op;

/// Objects that are remembered as absent at most: a bit each.
const REMEMBERED_MAX: u64 = 1 << 20;
/// The longest name of an object, bytes, with its end.
const NAME_BYTES: usize = 96;

/// The objects of an open image.
#[derive(Debug)]
pub(super) struct Objects {
    layout: Layout,
    /// No feature and no setting is in the way.
    allowed: AtomicBool,
    way: Arc<Way>,
    // Dropped in this order.
    pool: ObjectPool,
    image: Arc<Image>,
}

/// Part of one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) object: u64,
    /// From the start of the object, bytes.
    pub(super) at: u64,
}

/// What reads on their way share: it is there until the last is back.
#[derive(Debug)]
pub(super) struct Way {
    /// Open until nothing is on its way.
    pub(super) image: Handle,
    pub(super) rados: &'static Rados,
    absent: Absent,
    out: Mutex<usize>,
    none_out: Condvar,
}

// SAFETY: librbd may be called on one image from any thread.
unsafe impl Send for Way {}
// SAFETY: as above; nothing of Rust is behind the address.
unsafe impl Sync for Way {}

impl Objects {
    /// `None`: this image's objects have names of another kind. May wait for the cluster.
    pub(super) fn new(image: &Arc<Image>, namespace: Option<&str>) -> io::Result<Option<Self>> {
        let layout = image.layout()?;
        let named = layout.prefix.starts_with("rbd_data.");
        if !named || layout.prefix.len() + 18 > NAME_BYTES || layout.object_bytes == 0 {
            return Ok(None);
        }
        let count = image.size_bytes()?.div_ceil(layout.object_bytes);
        let pool = image.open_pool(layout.pool, namespace)?;
        let way = Way {
            image: image.handle(),
            rados: pool.rados,
            absent: Absent::new(count),
            out: Mutex::new(0),
            none_out: Condvar::new(),
        };
        let image = Arc::clone(image);
        let allowed = AtomicBool::new(false);
        let objects = Self { layout, allowed, way: Arc::new(way), pool, image };
        objects.look();
        Ok(Some(objects))
    }

    /// Looks whether anything is in the way. May wait for the cluster.
    pub(super) fn look(&self) {
        let found = self.image.features().and_then(|f| Ok(obstacle(f, &self.image.settings()?)));
        let allowed = match &found {
            Ok(None) => true,
            Ok(Some(obstacle)) => {
                tracing::debug!(obstacle, "reads go through librbd");
                false
            }
            Err(error) => {
                tracing::debug!(%error, "reads go through librbd: its settings cannot be read");
                false
            }
        };
        self.allowed.store(allowed, Ordering::Release);
    }

    /// Where a piece can be read, if it can.
    pub(super) fn place(&self, piece: &Piece) -> Option<Place> {
        let Op::Read { offset } = piece.op else { return None };
        let place = within(self.layout.object_bytes, offset, piece.len)?;
        let may = self.allowed.load(Ordering::Acquire) && !self.way.absent.has(place.object);
        may.then_some(place)
    }

    /// After a change that may have made objects.
    pub(super) fn changed(&self, op: Op, len: u64) {
        if let Op::Write { offset } = op
            && len > 0
        {
            let bytes = self.layout.object_bytes;
            (offset / bytes..=(offset + len - 1) / bytes).for_each(|n| self.way.absent.forget(n));
        }
    }

    /// What a read on its way holds.
    pub(super) fn enter(&self) -> Arc<Way> {
        *self.way.out.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Arc::clone(&self.way)
    }

    /// Begins a read; the library calls back for `completion` unless this is an error.
    ///
    /// # Safety
    /// `to` is valid until then.
    pub(super) unsafe fn read(
        &self,
        place: Place,
        to: *mut [u8],
        completion: Handle,
    ) -> libc::c_int {
        let name = name(&self.layout.prefix, place.object);
        // SAFETY: a pool's handle, a text that the library copies, and the caller's to vouch for.
        unsafe {
            (self.pool.rados.rados_aio_read)(
                self.pool.handle,
                name.as_ptr().cast(),
                completion,
                to.cast(),
                to.len(),
                place.at,
            )
        }
    }
}

impl Drop for Objects {
    /// Waits for what is on its way, as [`Image`] does for what librbd has.
    fn drop(&mut self) {
        let out = self.way.out.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.way.none_out.wait_while(out, |out| *out > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Way {
    /// A read is back. The image may be closed from now on.
    pub(super) fn leave(&self) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        *out -= 1;
        if *out == 0 {
            self.none_out.notify_all();
        }
    }

    /// What became of a read of `len` bytes of an object; `None`: librbd shall say.
    pub(super) fn outcome(&self, object: u64, result: libc::c_int, len: usize) -> Option<isize> {
        match usize::try_from(result) {
            // An object ends after the last byte that was written; zeros follow.
            Ok(bytes) if bytes <= len => isize::try_from(len).ok(),
            _ if result == -libc::ESHUTDOWN => Some(-(libc::ESHUTDOWN as isize)),
            _ => {
                if result == -libc::ENOENT {
                    self.absent.note(object);
                }
                None
            }
        }
    }
}

/// Objects that were not there when they were read. Only a hint.
#[derive(Debug)]
struct Absent(Box<[AtomicU64]>);

impl Absent {
    fn new(objects: u64) -> Self {
        let words = objects.min(REMEMBERED_MAX).div_ceil(64);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    fn bit(&self, object: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.0.get(usize::try_from(object / 64).ok()?)?;
        Some((word, 1 << (object % 64)))
    }

    fn has(&self, object: u64) -> bool {
        self.bit(object).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn note(&self, object: u64) {
        if let Some((word, bit)) = self.bit(object) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn forget(&self, object: u64) {
        if self.has(object)
            && let Some((word, bit)) = self.bit(object)
        {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// The part of an object that a range is, if it is one of a single object.
fn within(object_bytes: u64, offset: u64, len: u64) -> Option<Place> {
    let (object, at) = (offset / object_bytes, offset % object_bytes);
    (len > 0 && len <= object_bytes - at).then_some(Place { object, at })
}

/// `PREFIX.NUMBER`, with sixteen hexadecimal digits, as a text for C.
fn name(prefix: &str, object: u64) -> [u8; NAME_BYTES] {
    let mut name = [0; NAME_BYTES];
    write!(&mut name[..], "{prefix}.{object:016x}").expect("prefixes are short enough");
    name
}

/// What makes librbd's answer to a read another than the object's bytes, or
/// what it was told to do with reads.
fn obstacle(features: u64, settings: &[(String, String)]) -> Option<String> {
    if features & !FEATURES_PLAIN != 0 {
        return Some(format!("features {features:#x}"));
    }
    let in_the_way = |name: &str, value: &str| match name {
        // Answered writes are in a file of the host.
        "rbd_persistent_cache_mode" => value != "disabled",
        "rbd_read_from_replica_policy" => value != "default",
        // Librbd counts what it does itself.
        _ => name.starts_with("rbd_qos_") && name.ends_with("_limit") && value != "0",
    };
    let found = settings.iter().find(|(name, value)| in_the_way(name, value));
    found.map(|(name, value)| format!("{name}={value}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rbd::library::FEATURE_EXCLUSIVE_LOCK;

    #[test]
    fn a_range_of_one_object_has_its_place_there() {
        let object = 4 << 20;
        let place = |object, at| Some(Place { object, at });
        assert_eq!(within(object, 0, 512), place(0, 0));
        assert_eq!(within(object, object - 512, 512), place(0, object - 512));
        assert_eq!(within(object, 3 * object, object), place(3, 0));
        assert_eq!(within(object, object - 512, 1024), None);
        assert_eq!(within(object, 512, object), None);
        assert_eq!(within(object, 0, 0), None);
        assert_eq!(within(object, u64::MAX - 511, 512), place(u64::MAX / object, object - 512));
    }

    #[test]
    fn objects_are_called_as_librbd_calls_them() {
        let text = name("rbd_data.1f2e", 0xabc);
        assert_eq!(&text[..32], b"rbd_data.1f2e.0000000000000abc\0\0");
    }

    #[test]
    fn whatever_changes_what_a_read_means_is_in_the_way() {
        let plain: Vec<_> = [
            ("rbd_cache", "false"),
            ("rbd_persistent_cache_mode", "disabled"),
            ("rbd_read_from_replica_policy", "default"),
            ("rbd_qos_iops_limit", "0"),
            ("rbd_qos_iops_burst", "10"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        let default = 0b11_1101;
        for features in [FEATURE_EXCLUSIVE_LOCK, default, default | 1 << 7 | 1 << 8] {
            assert_eq!(obstacle(features, &plain), None, "{features:#x}");
        }
        for bit in [1, 6, 9, 10, 11, 12, 63] {
            assert!(obstacle(default | 1 << bit, &plain).is_some(), "{bit}");
        }
        for (name, value) in [
            ("rbd_persistent_cache_mode", "rwl"),
            ("rbd_read_from_replica_policy", "balance"),
            ("rbd_qos_read_bps_limit", "1048576"),
        ] {
            let mut settings = plain.clone();
            settings.push((name.to_owned(), value.to_owned()));
            let said = obstacle(default, &settings);
            assert_eq!(said, Some(format!("{name}={value}")));
        }
    }

    #[test]
    fn absent_objects_are_remembered_until_they_are_written() {
        let absent = Absent::new(130);
        for object in [0, 63, 64, 129] {
            assert!(!absent.has(object));
            absent.note(object);
            assert!(absent.has(object) && !absent.has(object + 1));
            absent.forget(object);
            assert!(!absent.has(object));
        }
        // Beyond what is remembered each read asks.
        for object in [192, u64::MAX] {
            absent.note(object);
            assert!(!absent.has(object));
        }
        assert_eq!(Absent::new(u64::MAX).0.len(), 1 << 14);
    }
}
