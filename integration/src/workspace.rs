//! Where things are: the target directory, the workspace's programs, and a scratch directory for each test.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The target directory this program was built into; the guest's files are in its `guest` folder.
pub fn target_dir() -> Result<PathBuf> {
    let profile = profile_dir()?;
    profile
        .parent()
        .map(Path::to_path_buf)
        .context("a profile's directory is in a target directory")
}

/// `target/debug` or `target/release`, where cargo puts programs.
fn profile_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot tell where this program is")?;
    let found = exe.ancestors().find(|dir| dir.ends_with("debug") || dir.ends_with("release"));
    found
        .map(Path::to_path_buf)
        .with_context(|| format!("{} is not in a cargo target directory", exe.display()))
}

/// A program of this workspace, freshly built in the profile of the caller.
///
/// A test that ran an old daemon would prove nothing, so the first call in each process lets cargo look whether
/// anything has to be built. `BATON_BIN_DIR` names a directory of programs to use as they are instead.
pub fn program(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("BATON_BIN_DIR") {
        return existing(Path::new(&dir), name);
    }
    static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| build().map_err(|e| format!("{e:#}")));
    if let Err(e) = built {
        bail!("{e}");
    }
    existing(&profile_dir()?, name)
}

fn build() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .args(["build", "--quiet", "--workspace", "--bins"])
        .env("CARGO_TARGET_DIR", target_dir()?);
    if profile_dir()?.ends_with("release") {
        command.arg("--release");
    }
    let output = command.output().context("cannot run cargo to build the workspace's programs")?;
    if !output.status.success() {
        bail!("cargo build failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn existing(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    if path.is_file() { Ok(path) } else { bail!("there is no program {name} in {}", dir.display()) }
}

/// A program of the system, by its name.
pub fn system_program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
        .with_context(|| format!("{name} is not installed; run scripts/setup.sh"))
}

/// A test's own directory, short enough for socket paths.
///
/// Removed at the end, unless the test panicked or `BATON_KEEP_LOGS` is set: then its path is printed.
#[derive(Debug)]
pub struct TestDir {
    path: PathBuf,
    keep: bool,
}

impl TestDir {
    /// A new directory with `name` in its name.
    pub fn new(name: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix(&format!("baton-{name}-")).tempdir()?;
        Ok(Self { path: dir.keep(), keep: false })
    }

    /// A new directory in memory (tmpfs), for data whose speed matters.
    pub fn in_memory(name: &str) -> Result<Self> {
        let dir =
            tempfile::Builder::new().prefix(&format!("baton-{name}-")).tempdir_in("/dev/shm")?;
        Ok(Self { path: dir.keep(), keep: false })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stays when this is dropped.
    pub fn keep(mut self) {
        self.keep = true;
    }

    /// A file in it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        if self.keep || std::thread::panicking() || std::env::var_os("BATON_KEEP_LOGS").is_some() {
            eprintln!("logs are kept in {}", self.path.display());
        } else {
            // Nothing more to do with a directory that cannot be removed.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_goes_with_its_test_and_stays_after_a_panic() {
        let dir = TestDir::new("gone").unwrap();
        let path = dir.path().to_path_buf();
        assert!(path.is_dir());
        drop(dir);
        assert!(!path.exists());

        let kept = std::thread::spawn(|| {
            let dir = TestDir::new("kept").unwrap();
            std::fs::write(dir.join("path"), "").unwrap();
            std::panic::panic_any(dir.path().to_path_buf());
        })
        .join()
        .unwrap_err();
        let kept = kept.downcast_ref::<PathBuf>().unwrap();
        assert!(kept.join("path").exists());
        std::fs::remove_dir_all(kept).unwrap();
    }
}
