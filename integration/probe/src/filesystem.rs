//! A filesystem on the disk: make it, fill it, forget the cache, and see that everything is still there.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

const MOUNT_POINT: &str = "/mnt";

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct FsConfig {
    /// Files to write.
    pub files: u64,
    /// Bytes in each file.
    pub file_bytes: u64,
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsReport {
    /// Bytes written and read back.
    pub bytes: u64,
    /// CRC-32C over all files in order, the same when written and when read back.
    pub crc: u32,
}

/// Makes an ext4 filesystem on `device`, writes files, syncs, mounts again, and compares.
pub fn exercise(device: &Path, config: &FsConfig) -> io::Result<FsReport> {
    let made =
        Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(device).output()?;
    if !made.status.success() {
        return Err(io::Error::other(format!(
            "mke2fs failed: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        )));
    }
    fs::create_dir_all(MOUNT_POINT)?;
    mount(device)?;
    let written = write_files(config);
    // Always unmount, so that the disk can be used again after a failure.
    let unmounted = unmount();
    let written = written?;
    unmounted?;
    let read = verify(device, config)?;
    if read == written {
        Ok(read)
    } else {
        Err(io::Error::other(format!("files read back differ: wrote {written:?}, read {read:?}")))
    }
}

/// Mounts the filesystem made by [`exercise`] and reads all its files.
pub fn verify(device: &Path, config: &FsConfig) -> io::Result<FsReport> {
    mount(device)?;
    let read = read_files(config);
    unmount()?;
    read
}

fn write_files(config: &FsConfig) -> io::Result<FsReport> {
    let mut report = FsReport { bytes: 0, crc: 0 };
    for index in 0..config.files {
        let bytes = content(index, config.file_bytes);
        let mut file = File::create(format!("{MOUNT_POINT}/file-{index}"))?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        report.bytes += bytes.len() as u64;
        report.crc = crc32c::crc32c_append(report.crc, &bytes);
    }
    Ok(report)
}

fn read_files(config: &FsConfig) -> io::Result<FsReport> {
    let mut report = FsReport { bytes: 0, crc: 0 };
    for index in 0..config.files {
        let bytes = fs::read(format!("{MOUNT_POINT}/file-{index}"))?;
        report.bytes += bytes.len() as u64;
        report.crc = crc32c::crc32c_append(report.crc, &bytes);
    }
    Ok(report)
}

fn content(index: u64, len: u64) -> Vec<u8> {
    let mut state = (index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len.div_ceil(8))
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .take(usize::try_from(len).unwrap_or(usize::MAX))
        .collect()
}

fn mount(device: &Path) -> io::Result<()> {
    let text = |s: &str| CString::new(s).expect("no zero byte");
    let source = text(&device.to_string_lossy());
    let (target, kind) = (text(MOUNT_POINT), text("ext4"));
    // SAFETY: three zero-terminated strings that outlive the call, and no data.
    let rc = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null())
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Unmounting drops the page cache of the filesystem, so that the next read comes from the disk.
fn unmount() -> io::Result<()> {
    let target = CString::new(MOUNT_POINT).expect("no zero byte");
    // SAFETY: one zero-terminated string that outlives the call.
    let rc = unsafe { libc::umount2(target.as_ptr(), 0) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
