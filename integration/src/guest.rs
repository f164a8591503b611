//! What a test guest is made of: a kernel, and an initramfs with busybox, the virtio modules and the probe.
//!
//! The kernel, its modules and busybox are unpacked by `scripts/setup.sh` into the target directory. The
//! initramfs is written here, in the "newc" cpio form, without compression: an emulated CPU copies faster than it
//! unpacks.

use crate::workspace::{program, system_program, target_dir};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for m in $(/bin/busybox cat /modules/order); do
    [ ! -e /modules/$m.ko ] || /bin/busybox insmod /modules/$m.ko
done
exec /bin/baton-probe /dev/ttyS1
";

/// The files that boot.
#[derive(Clone, Debug)]
pub struct GuestFiles {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs, in the directory given to [`GuestFiles::prepare`].
    pub initramfs: PathBuf,
}

/// Says what is missing to boot a guest here; `None` when nothing is.
#[must_use]
pub fn missing() -> Option<String> {
    let need = || -> Result<()> {
        system_program("qemu-system-x86_64")?;
        system_program("mke2fs")?;
        kernel()?;
        Ok(())
    };
    need().err().map(|e| format!("{e:#}"))
}

/// True when a test that needs a guest has to be skipped; says so, loudly, and why.
///
/// # Panics
/// When something is missing and `BATON_REQUIRE_QEMU=1` says that it must be there.
#[must_use]
pub fn skip_without_qemu(test: &str) -> bool {
    skip_if(test, missing())
}

/// [`skip_without_qemu`] for a test that needs only the system's program `name`, such as qemu-storage-daemon.
///
/// # Panics
/// When it is missing and `BATON_REQUIRE_QEMU=1` says that it must be there.
#[must_use]
pub fn skip_without_program(test: &str, name: &str) -> bool {
    skip_if(test, system_program(name).err().map(|e| format!("{e:#}")))
}

/// [`skip_without_qemu`] for a test that cannot run because of `why`.
///
/// # Panics
/// When there is a reason and `BATON_REQUIRE_QEMU=1` forbids it.
#[must_use]
pub fn skip_if(test: &str, why: Option<String>) -> bool {
    let Some(why) = why else { return false };
    assert!(
        std::env::var_os("BATON_REQUIRE_QEMU").is_none_or(|v| v != "1"),
        "BATON_REQUIRE_QEMU=1 forbids to skip {test}: {why}"
    );
    // Written past the test runner's capture, which hides what a passing test prints.
    let _ = writeln!(std::io::stderr(), "\n**** SKIPPED: {test}: {why} ****\n");
    true
}

fn kernel() -> Result<PathBuf> {
    let path = target_dir()?.join("guest/vmlinuz");
    if path.is_file() {
        Ok(path)
    } else {
        bail!("there is no guest kernel at {}; run scripts/setup.sh --test", path.display())
    }
}

impl GuestFiles {
    /// Builds the initramfs in `dir`.
    pub fn prepare(dir: &Path) -> Result<Self> {
        let kernel = kernel()?;
        let guest = target_dir()?.join("guest");
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "lib", "lib64", "mnt", "modules", "proc", "sbin", "sys", "tmp"]
        {
            archive.folder(folder);
        }
        archive.file("init", INIT.as_bytes(), 0o755);
        archive.file("bin/busybox", &read(&guest.join("busybox"))?, 0o755);
        archive.file("modules/order", &read(&guest.join("modules.order"))?, 0o644);
        for entry in fs::read_dir(guest.join("modules"))? {
            let path = entry?.path();
            let name = path
                .file_name()
                .context("a directory entry has a name")?
                .to_string_lossy()
                .into_owned();
            archive.file(&format!("modules/{name}"), &read(&path)?, 0o644);
        }
        let mut libraries = BTreeMap::new();
        for (name, path) in [
            ("bin/baton-probe", program("baton-probe")?),
            ("sbin/mke2fs", system_program("mke2fs")?),
        ] {
            archive.file(name, &read(&path)?, 0o755);
            libraries.extend(libraries_of(&path)?);
        }
        for (name, path) in &libraries {
            // The loader is named by its full path in each program, the others are looked for in /lib.
            let folder = if name.starts_with("ld-linux") { "lib64" } else { "lib" };
            archive.file(&format!("{folder}/{name}"), &read(path)?, 0o755);
        }
        let initramfs = dir.join("initramfs.cpio");
        fs::write(&initramfs, archive.finish())
            .with_context(|| format!("cannot write {}", initramfs.display()))?;
        Ok(Self { kernel, initramfs })
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The shared libraries of a program and their paths, by file name, as the system's own loader finds them.
fn libraries_of(program: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut found = BTreeMap::new();
    for word in text.split_whitespace().filter(|w| w.starts_with('/')) {
        let path = PathBuf::from(word);
        if let (Some(name), true) = (path.file_name(), path.is_file()) {
            found.insert(name.to_string_lossy().into_owned(), path);
        }
    }
    Ok(found)
}

/// A cpio archive in the form the kernel unpacks.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn folder(&mut self, name: &str) {
        self.entry(name, &[], 0o040_755);
    }

    fn file(&mut self, name: &str, content: &[u8], mode: u32) {
        self.entry(name, content, 0o100_000 | mode);
    }

    fn entry(&mut self, name: &str, content: &[u8], mode: u32) {
        self.inode += 1;
        // magic, inode, mode, uid, gid, links, mtime, size, 4 device numbers, name length with its zero, checksum
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.inode,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", &[], 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_entries_are_padded_and_sized() {
        let mut archive = Archive::default();
        archive.file("a", b"12345", 0o644);
        let bytes = archive.finish();
        // 110 header + "a\0" = 112; 5 content bytes padded to 8.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[6 + 6 * 8..6 + 7 * 8], b"00000005");
        assert_eq!(&bytes[112..120], b"12345\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
    }
}
