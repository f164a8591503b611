//! Ceph's client libraries, found when the first image is opened: a host
//! without Ceph runs the same program.
//!
//! The declarations are of the C interfaces of librados 2 and librbd 1, of
//! Pacific (16.2) or newer. Nothing is ever unloaded: the libraries keep
//! threads.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::error::RbdError;

const RADOS: &str = "librados.so.2";
const RBD: &str = "librbd.so.1";

/// `rados_t`, `rados_ioctx_t`, `rbd_image_t` or `rbd_completion_t`: an address
/// that only the libraries look behind.
pub(super) type Handle = *mut c_void;
/// `rbd_callback_t` or `rados_callback_t`: the completion, and what was given with it.
pub(super) type Completed = unsafe extern "C" fn(Handle, *mut c_void);
/// `rbd_update_callback_t`.
pub(super) type Updated = unsafe extern "C" fn(*mut c_void);

/// `rbd_image_watcher_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Watcher {
    pub(super) address: *mut c_char,
    pub(super) id: i64,
    pub(super) cookie: u64,
}

/// `rbd_config_option_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    pub(super) name: *mut c_char,
    pub(super) value: *mut c_char,
    pub(super) source: c_int,
}

/// `rbd_image_info_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Info {
    pub(super) size: u64,
    pub(super) object_bytes: u64,
    pub(super) objects: u64,
    pub(super) order: c_int,
    pub(super) prefix: [c_char; 24],
    pub(super) parent_pool: i64,
    pub(super) parent: [c_char; 96],
}

/// `RBD_LOCK_MODE_EXCLUSIVE`.
pub(super) const LOCK_EXCLUSIVE: c_int = 0;
/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`: the range keeps its space.
pub(super) const ZEROES_KEEP_SPACE: c_int = 1;
/// `LIBRADOS_CMPXATTR_OP_EQ`.
pub(super) const COMPARE_EQUAL: u8 = 1;
/// `RBD_FEATURE_EXCLUSIVE_LOCK`.
pub(super) const FEATURE_EXCLUSIVE_LOCK: u64 = 1 << 2;
/// Features with which an object that exists holds all that the image has there, as soon as a write is answered:
/// LAYERING, EXCLUSIVE_LOCK, OBJECT_MAP, FAST_DIFF, DEEP_FLATTEN, DATA_POOL and OPERATIONS. Not among them:
/// STRIPINGV2, JOURNALING, MIGRATING, NON_PRIMARY, DIRTY_CACHE, and whatever will be invented.
pub(super) const FEATURES_PLAIN: u64 = 0b1_1011_1101;

macro_rules! functions {
    ($table:ident: $($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// One library's functions, by the names they have in C.
        #[derive(Debug)]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $table {
            /// The name of the first function that is missing, if any is.
            fn find(library: &Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the type is the one of the C header.
                        let found = unsafe { library.get(stringify!($name).as_bytes()) };
                        *found.map_err(|_| stringify!($name))?
                    },)*
                })
            }
        }
    };
}

functions! { Rados:
    rados_create2(*mut Handle, *const c_char, *const c_char, u64) -> c_int;
    rados_conf_read_file(Handle, *const c_char) -> c_int;
    rados_conf_set(Handle, *const c_char, *const c_char) -> c_int;
    rados_connect(Handle) -> c_int;
    rados_shutdown(Handle);
    rados_getaddrs(Handle, *mut *mut c_char) -> c_int;
    rados_buffer_free(*mut c_char);
    rados_blocklist_add(Handle, *mut c_char, u32) -> c_int;
    rados_wait_for_latest_osdmap(Handle) -> c_int;
    rados_mon_command(
        Handle, *mut *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize, *mut *mut c_char,
        *mut usize
    ) -> c_int;
    rados_cluster_fsid(Handle, *mut c_char, usize) -> c_int;
    rados_ioctx_get_id(Handle) -> i64;
    rados_create_write_op() -> Handle;
    rados_release_write_op(Handle);
    rados_write_op_omap_cmp(Handle, *const c_char, u8, *const c_char, usize, *mut c_int);
    rados_write_op_omap_set(
        Handle, *const *const c_char, *const *const c_char, *const usize, usize
    );
    rados_write_op_operate(Handle, Handle, *const c_char, *mut c_void, c_int) -> c_int;
    rados_ioctx_create(Handle, *const c_char, *mut Handle) -> c_int;
    rados_ioctx_set_namespace(Handle, *const c_char);
    rados_ioctx_destroy(Handle);
    rados_ioctx_create2(Handle, i64, *mut Handle) -> c_int;
    rados_aio_create_completion2(*mut c_void, Completed, *mut Handle) -> c_int;
    rados_aio_read(Handle, *const c_char, Handle, *mut c_char, usize, u64) -> c_int;
    rados_aio_get_return_value(Handle) -> c_int;
    rados_aio_release(Handle);
}

functions! { Rbd:
    rbd_open(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_open_read_only(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
    rbd_close(Handle) -> c_int;
    rbd_get_size(Handle, *mut u64) -> c_int;
    rbd_get_features(Handle, *mut u64) -> c_int;
    rbd_get_id(Handle, *mut c_char, usize) -> c_int;
    rbd_stat(Handle, *mut Info, usize) -> c_int;
    rbd_get_block_name_prefix(Handle, *mut c_char, usize) -> c_int;
    rbd_get_data_pool_id(Handle) -> i64;
    rbd_config_image_list(Handle, *mut Setting, *mut c_int) -> c_int;
    rbd_config_image_list_cleanup(*mut Setting, c_int);
    rbd_lock_acquire(Handle, c_int) -> c_int;
    rbd_lock_release(Handle) -> c_int;
    rbd_lock_break(Handle, c_int, *const c_char) -> c_int;
    rbd_lock_get_owners(Handle, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
    rbd_lock_get_owners_cleanup(*mut *mut c_char, usize);
    rbd_watchers_list(Handle, *mut Watcher, *mut usize) -> c_int;
    rbd_watchers_list_cleanup(*mut Watcher, usize);
    rbd_metadata_get(Handle, *const c_char, *mut c_char, *mut usize) -> c_int;
    rbd_pool_metadata_get(Handle, *const c_char, *mut c_char, *mut usize) -> c_int;
    rbd_update_watch(Handle, *mut u64, Updated, *mut c_void) -> c_int;
    rbd_update_unwatch(Handle, u64) -> c_int;
    rbd_aio_create_completion(*mut c_void, Completed, *mut Handle) -> c_int;
    rbd_aio_get_return_value(Handle) -> isize;
    rbd_aio_release(Handle);
    rbd_aio_read(Handle, u64, usize, *mut c_char, Handle) -> c_int;
    rbd_aio_writev(Handle, *const libc::iovec, c_int, u64, Handle) -> c_int;
    rbd_aio_flush(Handle, Handle) -> c_int;
    rbd_aio_discard(Handle, u64, u64, Handle) -> c_int;
    rbd_aio_write_zeroes(Handle, u64, usize, Handle, c_int, c_int) -> c_int;
}

/// Both libraries.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) rados: Rados,
    pub(super) rbd: Rbd,
}

impl Api {
    /// The host's libraries. Tried again after a failure: they may be installed
    /// while a program waits for them.
    pub(super) fn loaded() -> Result<&'static Self, RbdError> {
        static LOADED: OnceLock<Api> = OnceLock::new();
        match LOADED.get() {
            Some(api) => Ok(api),
            None => {
                let api = Self::load(RADOS, RBD)?;
                Ok(LOADED.get_or_init(|| api))
            }
        }
    }

    fn load(rados: &'static str, rbd: &'static str) -> Result<Self, RbdError> {
        let [rados_library, rbd_library] = [open(rados)?, open(rbd)?];
        let too_old = |name| move |symbol| RbdError::OldLibrary { name, symbol };
        let rados = Rados::find(&rados_library).map_err(too_old(rados))?;
        let rbd = Rbd::find(&rbd_library).map_err(too_old(rbd))?;
        // They are used from now on and for ever.
        std::mem::forget((rados_library, rbd_library));
        Ok(Self { rados, rbd })
    }
}

fn open(name: &'static str) -> Result<Library, RbdError> {
    // SAFETY: what Ceph's libraries do when they are loaded is what every
    // program that is linked with them has done, too.
    unsafe { Library::new(name) }.map_err(|source| RbdError::NoLibrary { name, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_one_sentence() {
        let error = Api::load("librados.so.0", RBD).unwrap_err().to_string();
        assert!(error.contains("cannot load `librados.so.0`"), "{error}");
        assert!(error.contains("apt-get install librbd1"), "{error}");
    }

    #[test]
    fn a_library_without_a_function_is_one_sentence() {
        // A real library that has none of the functions.
        let error = Api::load("libc.so.6", "libc.so.6").unwrap_err().to_string();
        assert!(error.contains("`libc.so.6` has no `rados_create2`"), "{error}");
        assert!(error.contains("16.2"), "{error}");
    }
}
