//! A disk of a few MiB that fills up and has room again: a tmpfs in a mount namespace of its own.

use std::ffi::OsStr;
use std::fs::{File, remove_file};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The disk is there as long as this is, also while no program uses it.
pub(crate) struct SmallDisk {
    /// Holds the namespace until its input ends.
    holder: Child,
    dir: PathBuf,
}

impl SmallDisk {
    /// At `dir`, for programs that [`SmallDisk::command`] starts. `None` where the kernel lets nobody make one.
    pub(crate) fn mount(dir: &Path, bytes: u64) -> Option<Self> {
        std::fs::create_dir_all(dir).expect("a directory");
        let script = format!(
            "mount -t tmpfs -o size={bytes} tmpfs '{}' && echo mounted && exec cat",
            dir.display()
        );
        let mut holder = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare is installed");
        let mut said = String::new();
        let out = holder.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut said).expect("text");
        let disk = Self { holder, dir: dir.to_owned() };
        (said == "mounted\n").then_some(disk)
    }

    /// Starts a program that sees the disk.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--preserve-credentials", "--user", "--mount", "--target"])
            .arg(self.holder.id().to_string())
            .arg(program);
        command
    }

    /// A file on it, as programs outside reach it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        let inside = self.dir.strip_prefix("/").expect("absolute");
        PathBuf::from(format!("/proc/{}/root", self.holder.id())).join(inside).join(name)
    }

    /// Not one page is left.
    pub(crate) fn fill(&self) {
        let mut ballast = File::create(self.path("ballast")).expect("created");
        for piece in [vec![7; 1 << 20], vec![7; 4096]] {
            let full = loop {
                if let Err(error) = ballast.write_all(&piece) {
                    break error;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
        }
    }

    /// There is room again.
    pub(crate) fn free(&self) {
        remove_file(self.path("ballast")).expect("removed");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}
