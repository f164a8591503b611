//! Connections, pools and images of Ceph as values: opened, used, and closed
//! when dropped. One call of the library each; decides nothing.
//!
//! Everything here but the `aio` functions may wait for the cluster, for ever
//! if that is away. No queue thread calls those.

use std::ffi::{CStr, CString, c_char, c_int};
use std::mem::MaybeUninit;
use std::{io, ptr};

use super::library::{self, Api, COMPARE_EQUAL, Handle, LOCK_EXCLUSIVE, Updated, Watcher};

/// A negative error number of Ceph as the system's.
pub(super) fn check(code: c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(()) }
}

/// A text for C. Ceph's names and paths have no zero bytes: the URI refuses them.
fn c_text(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// A text that C has put into a buffer.
fn text_in(buffer: &[u8]) -> String {
    let text = buffer.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn or_null(text: Option<&CString>) -> *const c_char {
    text.map_or(ptr::null(), |text| text.as_ptr())
}

/// A client of a cluster.
#[derive(Debug)]
pub(super) struct Cluster {
    api: &'static Api,
    handle: Handle,
}

// SAFETY: librados and librbd may be called on one handle from any thread.
unsafe impl Send for Cluster {}
// SAFETY: as above; nothing of Rust is behind the address.
unsafe impl Sync for Cluster {}

impl Cluster {
    /// Not connected yet.
    pub(super) fn new(api: &'static Api, user: &str) -> io::Result<Self> {
        let (cluster, name) = (c_text("ceph")?, c_text(&format!("client.{user}"))?);
        let mut handle = ptr::null_mut();
        // SAFETY: three valid pointers; no flags are defined.
        check(unsafe {
            (api.rados.rados_create2)(&raw mut handle, cluster.as_ptr(), name.as_ptr(), 0)
        })?;
        Ok(Self { api, handle })
    }

    /// Reads a configuration file; `None`: where Ceph's own programs look.
    pub(super) fn read_conf(&self, path: Option<&str>) -> io::Result<()> {
        let path = path.map(c_text).transpose()?;
        // SAFETY: a handle that was created, and a path or null.
        check(unsafe { (self.api.rados.rados_conf_read_file)(self.handle, or_null(path.as_ref())) })
    }

    pub(super) fn set(&self, key: &str, value: &str) -> io::Result<()> {
        let (key, value) = (c_text(key)?, c_text(value)?);
        // SAFETY: a handle that was created, and two texts.
        check(unsafe { (self.api.rados.rados_conf_set)(self.handle, key.as_ptr(), value.as_ptr()) })
    }

    pub(super) fn connect(&self) -> io::Result<()> {
        // SAFETY: a handle that was created.
        check(unsafe { (self.api.rados.rados_connect)(self.handle) })
    }

    /// Address and nonce: what others see of this client, and what a blocklist names.
    pub(super) fn address(&self) -> io::Result<String> {
        let mut text = ptr::null_mut();
        // SAFETY: a connected handle and a place for a pointer.
        check(unsafe { (self.api.rados.rados_getaddrs)(self.handle, &raw mut text) })?;
        // SAFETY: on success it is a text of the library's.
        let address = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        // SAFETY: from the library, and not used any more.
        unsafe { (self.api.rados.rados_buffer_free)(text) };
        Ok(address)
    }

    /// Lets the cluster refuse everything of a client, and waits until every
    /// request of ours goes to servers that know.
    pub(super) fn blocklist(&self, client: &str, seconds: u32) -> io::Result<()> {
        let client = c_text(client)?;
        // SAFETY: a connected handle; the text is not changed, only declared so.
        check(unsafe {
            (self.api.rados.rados_blocklist_add)(self.handle, client.as_ptr().cast_mut(), seconds)
        })?;
        self.barrier()
    }

    /// Ends an entry of the blocklist. Needs more than the profile `rbd`.
    pub(super) fn unlist(&self, client: &str) -> io::Result<()> {
        let command = serde_json::json!({
            "prefix": "osd blocklist", "blocklistop": "rm", "addr": client,
        });
        let command = c_text(&command.to_string())?;
        let mut commands = [command.as_ptr()];
        let (mut out, mut out_len) = (ptr::null_mut(), 0);
        let (mut said, mut said_len) = (ptr::null_mut(), 0);
        // SAFETY: a connected handle, one command, no input, and places for two buffers.
        let done = unsafe {
            (self.api.rados.rados_mon_command)(
                self.handle,
                commands.as_mut_ptr(),
                commands.len(),
                ptr::null(),
                0,
                &raw mut out,
                &raw mut out_len,
                &raw mut said,
                &raw mut said_len,
            )
        };
        for buffer in [out, said].into_iter().filter(|buffer| !buffer.is_null()) {
            // SAFETY: from the library, and not used any more.
            unsafe { (self.api.rados.rados_buffer_free)(buffer) };
        }
        match check(done) {
            // It has ended already.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Names the cluster.
    pub(super) fn fsid(&self) -> io::Result<String> {
        let mut buffer = [0u8; 64];
        // SAFETY: a connected handle and a buffer of that length.
        check(unsafe {
            (self.api.rados.rados_cluster_fsid)(
                self.handle,
                buffer.as_mut_ptr().cast(),
                buffer.len(),
            )
        })?;
        Ok(text_in(&buffer))
    }

    /// Waits until every request of ours goes to servers that know what the
    /// monitors have decided by now: a blocklist, above all.
    pub(super) fn barrier(&self) -> io::Result<()> {
        // SAFETY: a connected handle.
        check(unsafe { (self.api.rados.rados_wait_for_latest_osdmap)(self.handle) })
    }

    pub(super) fn pool(self, name: &str, namespace: Option<&str>) -> io::Result<Pool> {
        let (name, namespace) = (c_text(name)?, namespace.map(c_text).transpose()?);
        let mut handle = ptr::null_mut();
        // SAFETY: a connected handle, a text, a place for a handle.
        check(unsafe {
            (self.api.rados.rados_ioctx_create)(self.handle, name.as_ptr(), &raw mut handle)
        })?;
        if let Some(namespace) = namespace {
            // SAFETY: a pool's handle and a text.
            unsafe { (self.api.rados.rados_ioctx_set_namespace)(handle, namespace.as_ptr()) };
        }
        Ok(Pool { handle, cluster: self })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Also frees a handle that never was connected.
        // SAFETY: the last use of the handle.
        unsafe { (self.api.rados.rados_shutdown)(self.handle) };
    }
}

/// A pool, or a namespace of it.
#[derive(Debug)]
pub(super) struct Pool {
    handle: Handle,
    pub(super) cluster: Cluster,
}

// SAFETY: as of [`Cluster`].
unsafe impl Send for Pool {}
// SAFETY: as of [`Cluster`].
unsafe impl Sync for Pool {}

impl Pool {
    /// The pool's own note of this name.
    pub(super) fn note(&self, key: &str) -> io::Result<Option<String>> {
        let get = self.cluster.api.rbd.rbd_pool_metadata_get;
        note(key, |key, buffer, len| {
            // SAFETY: a pool's handle, a text, and a buffer of that length.
            unsafe { get(self.handle, key, buffer, len) }
        })
    }

    pub(super) fn image(
        self,
        name: &str,
        snapshot: Option<&str>,
        read_only: bool,
    ) -> io::Result<Image> {
        let (name, snapshot) = (c_text(name)?, snapshot.map(c_text).transpose()?);
        let rbd = &self.cluster.api.rbd;
        let open = if read_only { rbd.rbd_open_read_only } else { rbd.rbd_open };
        let mut handle = ptr::null_mut();
        // SAFETY: a pool's handle, texts or null, and a place for a handle.
        check(unsafe {
            open(self.handle, name.as_ptr(), &raw mut handle, or_null(snapshot.as_ref()))
        })?;
        Ok(Image { handle, rbd, pool: self })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the last use of the handle; images hold their pool.
        unsafe { (self.cluster.api.rados.rados_ioctx_destroy)(self.handle) };
    }
}

/// The pool of an image's objects. Used within the life of the image.
#[derive(Debug)]
pub(super) struct ObjectPool {
    pub(super) handle: Handle,
    pub(super) rados: &'static library::Rados,
}

// SAFETY: as of [`Cluster`].
unsafe impl Send for ObjectPool {}
// SAFETY: as of [`Cluster`].
unsafe impl Sync for ObjectPool {}

impl Drop for ObjectPool {
    fn drop(&mut self) {
        // SAFETY: the last use of the handle.
        unsafe { (self.rados.rados_ioctx_destroy)(self.handle) };
    }
}

/// Where an image's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Of the objects' names.
    pub(super) prefix: String,
    pub(super) object_bytes: u64,
    /// The number of the pool that has them.
    pub(super) pool: i64,
}

/// A note, in as large a buffer as it takes.
fn note(
    key: &str,
    mut get: impl FnMut(*const c_char, *mut c_char, *mut usize) -> c_int,
) -> io::Result<Option<String>> {
    let key = c_text(key)?;
    let mut buffer = vec![0u8; 256];
    loop {
        let mut len = buffer.len();
        match check(get(key.as_ptr(), buffer.as_mut_ptr().cast(), &raw mut len)) {
            Ok(()) => return Ok(Some(text_in(&buffer))),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => return Ok(None),
                Some(libc::ERANGE) if len > buffer.len() => buffer.resize(len, 0),
                _ => return Err(error),
            },
        }
    }
}

/// An open image.
#[derive(Debug)]
pub(super) struct Image {
    handle: Handle,
    rbd: &'static library::Rbd,
    pub(super) pool: Pool,
}

// SAFETY: as of [`Cluster`].
unsafe impl Send for Image {}
// SAFETY: as of [`Cluster`].
unsafe impl Sync for Image {}

impl Image {
    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    pub(super) fn rbd(&self) -> &'static library::Rbd {
        self.rbd
    }

    pub(super) fn size_bytes(&self) -> io::Result<u64> {
        let mut bytes = 0;
        // SAFETY: an image's handle and a place for the number; so below.
        check(unsafe { (self.rbd.rbd_get_size)(self.handle, &raw mut bytes) })?;
        Ok(bytes)
    }

    pub(super) fn features(&self) -> io::Result<u64> {
        let mut features = 0;
        // SAFETY: as above.
        check(unsafe { (self.rbd.rbd_get_features)(self.handle, &raw mut features) })?;
        Ok(features)
    }

    /// How its objects are called, and how large they are.
    pub(super) fn layout(&self) -> io::Result<Layout> {
        let mut prefix = [0u8; 64];
        // SAFETY: an image's handle and a buffer of the length given, which is filled with a text.
        check(unsafe {
            (self.rbd.rbd_get_block_name_prefix)(
                self.handle,
                prefix.as_mut_ptr().cast(),
                prefix.len(),
            )
        })?;
        let mut info = MaybeUninit::<library::Info>::uninit();
        // SAFETY: a place of the size given, which is filled.
        let info = unsafe {
            check((self.rbd.rbd_stat)(self.handle, info.as_mut_ptr(), size_of_val(&info)))?;
            info.assume_init()
        };
        // SAFETY: an image's handle.
        let pool = unsafe { (self.rbd.rbd_get_data_pool_id)(self.handle) };
        Ok(Layout { prefix: text_in(&prefix), object_bytes: info.object_bytes, pool })
    }

    /// What librbd goes by for this image, from whichever place: names and values.
    pub(super) fn settings(&self) -> io::Result<Vec<(String, String)>> {
        let empty = library::Setting { name: ptr::null_mut(), value: ptr::null_mut(), source: 0 };
        let mut list = vec![empty; 128];
        loop {
            let mut count = c_int::try_from(list.len()).unwrap_or(c_int::MAX);
            // SAFETY: an image's handle, and places for as many settings as given.
            let listed = check(unsafe {
                (self.rbd.rbd_config_image_list)(self.handle, list.as_mut_ptr(), &raw mut count)
            });
            let found = usize::try_from(count).unwrap_or(0);
            match listed {
                Err(e) if e.raw_os_error() == Some(libc::ERANGE) && found > list.len() => {
                    list.resize(found, empty);
                    continue;
                }
                other => other?,
            }
            // SAFETY: the library filled in that many pairs of texts.
            let text = |text| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
            let settings = list[..found].iter().map(|one| (text(one.name), text(one.value)));
            let settings = settings.collect();
            // SAFETY: its own texts, which are not used any more.
            unsafe { (self.rbd.rbd_config_image_list_cleanup)(list.as_mut_ptr(), count) };
            return Ok(settings);
        }
    }

    /// Where its objects are: the part of the pool that a layout names.
    pub(super) fn open_pool(&self, pool: i64, namespace: Option<&str>) -> io::Result<ObjectPool> {
        let api = self.pool.cluster.api;
        let namespace = namespace.map(c_text).transpose()?;
        let mut handle = ptr::null_mut();
        // SAFETY: a connected handle and a place for another.
        check(unsafe {
            (api.rados.rados_ioctx_create2)(self.pool.cluster.handle, pool, &raw mut handle)
        })?;
        if let Some(namespace) = namespace {
            // SAFETY: a pool's handle and a text.
            unsafe { (api.rados.rados_ioctx_set_namespace)(handle, namespace.as_ptr()) };
        }
        Ok(ObjectPool { handle, rados: &api.rados })
    }

    /// What tells it from other images of its pool, for ever.
    pub(super) fn id(&self) -> io::Result<String> {
        let mut buffer = [0u8; 64];
        // SAFETY: a buffer of the length given, which is filled with a text.
        check(unsafe {
            (self.rbd.rbd_get_id)(self.handle, buffer.as_mut_ptr().cast(), buffer.len())
        })?;
        Ok(text_in(&buffer))
    }

    /// Takes the exclusive lock, to be given up only by [`Image::unlock`] or the end.
    pub(super) fn lock(&self) -> io::Result<()> {
        // SAFETY: an image's handle.
        check(unsafe { (self.rbd.rbd_lock_acquire)(self.handle, LOCK_EXCLUSIVE) })
    }

    pub(super) fn unlock(&self) -> io::Result<()> {
        // SAFETY: an image's handle.
        check(unsafe { (self.rbd.rbd_lock_release)(self.handle) })
    }

    /// Takes the lock from a client that was fenced. No error if it has none any more.
    pub(super) fn break_lock(&self, client: &str) -> io::Result<()> {
        let client = c_text(client)?;
        // SAFETY: an image's handle and a text.
        let broken =
            unsafe { (self.rbd.rbd_lock_break)(self.handle, LOCK_EXCLUSIVE, client.as_ptr()) };
        match check(broken) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// The client that has the lock.
    pub(super) fn lock_owner(&self) -> io::Result<Option<String>> {
        let (mut mode, mut owners, mut count) = (0, [ptr::null_mut(); 4], 4);
        // SAFETY: a place for the mode, and for as many pointers as given.
        let found = check(unsafe {
            (self.rbd.rbd_lock_get_owners)(
                self.handle,
                &raw mut mode,
                owners.as_mut_ptr(),
                &raw mut count,
            )
        });
        match found {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            other => other?,
        }
        if count == 0 {
            return Ok(None);
        }
        // SAFETY: the library filled in that many texts.
        let owner = unsafe { CStr::from_ptr(owners[0]) }.to_string_lossy().into_owned();
        // SAFETY: its own texts, which are not used any more.
        unsafe { (self.rbd.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count) };
        Ok(Some(owner))
    }

    /// The clients that have the image open for writing and were heard of lately.
    pub(super) fn watchers(&self) -> io::Result<Vec<String>> {
        let empty = Watcher { address: ptr::null_mut(), id: 0, cookie: 0 };
        let mut list = vec![empty; 8];
        loop {
            let mut count = list.len();
            // SAFETY: room for as many watchers as given.
            let found = check(unsafe {
                (self.rbd.rbd_watchers_list)(self.handle, list.as_mut_ptr(), &raw mut count)
            });
            match found {
                Err(e) if e.raw_os_error() == Some(libc::ERANGE) && count > list.len() => {
                    list.resize(count, empty);
                    continue;
                }
                other => other?,
            }
            let addresses = list[..count].iter().map(|watcher| {
                // SAFETY: the library filled in that many.
                unsafe { CStr::from_ptr(watcher.address) }.to_string_lossy().into_owned()
            });
            let addresses = addresses.collect();
            // SAFETY: its own texts, which are not used any more.
            unsafe { (self.rbd.rbd_watchers_list_cleanup)(list.as_mut_ptr(), count) };
            return Ok(addresses);
        }
    }

    /// The image's own note of this name.
    pub(super) fn note(&self, key: &str) -> io::Result<Option<String>> {
        note(key, |key, buffer, len| {
            // SAFETY: an image's handle, a text, and a buffer of that length.
            unsafe { (self.rbd.rbd_metadata_get)(self.handle, key, buffer, len) }
        })
    }

    /// Changes a note of the image `id` if it is still `old`; whether it was.
    /// librbd keeps notes in its header object and cannot compare; RADOS can.
    pub(super) fn swap_note(
        &self,
        id: &str,
        key: &str,
        old: Option<&str>,
        new: &str,
    ) -> io::Result<bool> {
        let rados = &self.pool.cluster.api.rados;
        let object = c_text(&format!("rbd_header.{id}"))?;
        let key = c_text(&format!("metadata_{key}"))?;
        let old = old.unwrap_or_default();
        let (keys, values, lengths) = ([key.as_ptr()], [new.as_ptr().cast()], [new.len()]);
        let mut compared = 0;
        // SAFETY: the texts and places live until the operation has been carried
        // out and released; an absent note compares as an empty one.
        let swapped = unsafe {
            let op = (rados.rados_create_write_op)();
            (rados.rados_write_op_omap_cmp)(
                op,
                key.as_ptr(),
                COMPARE_EQUAL,
                old.as_ptr().cast(),
                old.len(),
                &raw mut compared,
            );
            (rados.rados_write_op_omap_set)(
                op,
                keys.as_ptr(),
                values.as_ptr(),
                lengths.as_ptr(),
                keys.len(),
            );
            let pool = self.pool.handle;
            let done =
                (rados.rados_write_op_operate)(op, pool, object.as_ptr(), ptr::null_mut(), 0);
            (rados.rados_release_write_op)(op);
            done
        };
        match check(swapped) {
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Names the image for ever, and no other of any cluster.
    pub(super) fn place(&self, id: &str, namespace: Option<&str>) -> io::Result<String> {
        // SAFETY: a pool's handle.
        let pool = unsafe { (self.pool.cluster.api.rados.rados_ioctx_get_id)(self.pool.handle) };
        let fsid = self.pool.cluster.fsid()?;
        Ok(format!("{fsid}/{pool}/{}/{id}", namespace.unwrap_or_default()))
    }

    /// Has `updated` called with `argument` whenever the image may have changed.
    ///
    /// # Safety
    /// It may be called, from any thread, until [`Image::unwatch`] has returned.
    pub(super) unsafe fn watch(
        &self,
        updated: Updated,
        argument: *mut std::ffi::c_void,
    ) -> io::Result<u64> {
        let mut handle = 0;
        // SAFETY: the caller's to vouch for.
        check(unsafe {
            (self.rbd.rbd_update_watch)(self.handle, &raw mut handle, updated, argument)
        })?;
        Ok(handle)
    }

    pub(super) fn unwatch(&self, watch: u64) -> io::Result<()> {
        // SAFETY: an image's handle and a watch of it.
        check(unsafe { (self.rbd.rbd_update_unwatch)(self.handle, watch) })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Waits for what is in flight; gives the lock back. An error leaves
        // nothing that could be tried again.
        // SAFETY: the last use of the handle.
        unsafe { (self.rbd.rbd_close)(self.handle) };
    }
}
