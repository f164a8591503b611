//! How librbd says that an image may have changed, its size above all.

use std::ffi::c_void;
use std::io;
use std::sync::Arc;

use super::image::Image;
use super::volume::Shared;

/// Called by the library when the image may have changed. Only the volume's
/// thread may ask the cluster how.
unsafe extern "C" fn updated(shared: *mut c_void) {
    // SAFETY: kept until the watch has ended.
    let shared = unsafe { &*shared.cast::<Shared>() };
    shared.updated();
}

/// The library's way to say that the image may have changed.
pub(super) struct Watch {
    number: u64,
    /// One reference, the library's.
    shared: *const Shared,
}

// SAFETY: it is the address of a value that all threads may use.
unsafe impl Send for Watch {}

impl Watch {
    pub(super) fn begin(image: &Image, shared: &Arc<Shared>) -> io::Result<Self> {
        let shared = Arc::into_raw(Arc::clone(shared));
        // SAFETY: the reference is given back only when no call can come any more.
        let begun = unsafe { image.watch(updated, shared.cast_mut().cast()) };
        match begun {
            Ok(number) => Ok(Self { number, shared }),
            Err(error) => {
                // SAFETY: as made above, and the library does not have it.
                drop(unsafe { Arc::from_raw(shared) });
                Err(error)
            }
        }
    }

    pub(super) fn end(self, image: &Image) {
        // Else a call may still come, and the reference stays for it.
        if image.unwatch(self.number).is_ok() {
            // SAFETY: as made by `begin`, and the library has forgotten it.
            drop(unsafe { Arc::from_raw(self.shared) });
        }
    }
}
