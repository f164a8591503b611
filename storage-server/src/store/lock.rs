//! Exclusive use of a data directory.
//!
//! Open-file-description locks: they end when the last reference to the open file goes, and the kernel keeps one for
//! I/O in flight. So a lock on `pool.dat` itself is held until the last write of a killed server has landed.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

/// `Ok(false)`: another open file holds the lock.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    #[allow(clippy::cast_possible_truncation, reason = "the constants are 0 and 1")]
    let whole_file = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file)) {
        Ok(_) => Ok(true),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_until_the_last_reference_goes() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().write(true).open(path.path()).unwrap();
        let first = open();
        assert!(try_lock(&first).unwrap());
        let second = open();
        assert!(!try_lock(&second).unwrap(), "also inside one process");
        let reference = first.try_clone().unwrap();
        drop(first);
        assert!(!try_lock(&second).unwrap());
        drop(reference);
        assert!(try_lock(&second).unwrap());
    }
}
