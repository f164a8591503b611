//! The VMs that the agent knows: those of its configuration, and those that a
//! coordinator sent, which it remembers over a restart.
//!
//! One of the configuration cannot be replaced over the API: the administrator
//! of the host has the last word.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::config::Config;
use super::definition::{DefinitionError, VmDefinition};

/// VMs that may be sent to one host.
const SENT_MAX: usize = 4096;

/// Why the VMs are not known.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The disk.
    #[error("cannot use {}", path.display())]
    Disk {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that is not ours.
    #[error("{} is damaged; remove it, and have the coordinator send again what was in it", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Defined by the administrator.
    #[error(
        "{0} is defined in this host's configuration file, otherwise than it was sent; change it there"
    )]
    Configured(String),
    /// A definition with a mistake.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// Too many.
    #[error("this host knows {SENT_MAX} VMs already; remove some")]
    Full,
}

/// All VMs of the host.
#[derive(Debug)]
pub(crate) struct Inventory {
    dir: PathBuf,
    configured: BTreeMap<String, VmDefinition>,
    sent: Mutex<BTreeMap<String, VmDefinition>>,
}

impl Inventory {
    pub(super) fn open(config: &Config) -> Result<Self, InventoryError> {
        let dir = config.state_dir.join("vms");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| InventoryError::Disk { path, source }
        };
        fs::create_dir_all(&dir).map_err(failed(&dir))?;
        let configured: BTreeMap<_, _> =
            config.vms.iter().map(|vm| (vm.name.clone(), vm.clone())).collect();
        let mut sent = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed(&dir))? {
            let path = entry.map_err(failed(&dir))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read(&path).map_err(failed(&path))?;
            let vm: VmDefinition = serde_json::from_slice(&text).map_err(|error| {
                InventoryError::Damaged { path: path.clone(), source: error.into() }
            })?;
            vm.check().map_err(|error| InventoryError::Damaged { path, source: error.into() })?;
            // The configuration was changed since.
            if !configured.contains_key(&vm.name) {
                sent.insert(vm.name.clone(), vm);
            }
        }
        Ok(Self { dir, configured, sent: Mutex::new(sent) })
    }

    pub(super) fn list(&self) -> Vec<VmDefinition> {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: BTreeMap<_, _> = self.configured.iter().collect();
        all.extend(sent.iter());
        all.into_values().cloned().collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<VmDefinition> {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        self.configured.get(name).or_else(|| sent.get(name)).cloned()
    }

    /// Remembers a definition; `true` if it is new. It is on the disk first.
    pub(super) fn put(&self, vm: &VmDefinition) -> Result<bool, InventoryError> {
        vm.check()?;
        if let Some(configured) = self.configured.get(&vm.name) {
            // The same disks are what matters; how the monitor is reached is the host's.
            let same = |disk: &super::definition::Disk| {
                configured
                    .disks
                    .iter()
                    .any(|other| (&other.name, &other.volume) == (&disk.name, &disk.volume))
            };
            if configured.disks.len() == vm.disks.len() && vm.disks.iter().all(same) {
                return Ok(false);
            }
            return Err(InventoryError::Configured(vm.name.clone()));
        }
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if sent.get(&vm.name) == Some(vm) {
            return Ok(false);
        }
        if sent.len() >= SENT_MAX && !sent.contains_key(&vm.name) {
            return Err(InventoryError::Full);
        }
        let path = self.dir.join(format!("{}.json", vm.name));
        write_durably(&path, &serde_json::to_vec_pretty(vm).unwrap_or_default())
            .map_err(|source| InventoryError::Disk { path, source })?;
        Ok(sent.insert(vm.name.clone(), vm.clone()).is_none())
    }

    /// Forgets a definition that was sent; `false` if there is none.
    pub(super) fn forget(&self, name: &str) -> Result<bool, InventoryError> {
        if self.configured.contains_key(name) {
            return Err(InventoryError::Configured(name.to_owned()));
        }
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        if !sent.contains_key(name) {
            return Ok(false);
        }
        let path = self.dir.join(format!("{name}.json"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(InventoryError::Disk { path, source: error });
            }
            _ => {}
        }
        sent.remove(name);
        Ok(true)
    }
}

pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    match path.parent() {
        Some(dir) => fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
