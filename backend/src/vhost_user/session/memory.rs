//! The guest's memory as the front-end shares it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{DrainLimit, Session};
use crate::memory::{GuestMemory, MemoryRegion};
use crate::vhost_user::message::{MEM_SLOTS_MAX, Region};
use crate::vhost_user::refused::Refused;

impl Session<'_> {
    pub(super) fn set_memory(
        &mut self,
        regions: Vec<Arc<MemoryRegion>>,
        limit: DrainLimit<'_>,
    ) -> Result<(), Refused> {
        if regions.len() as u64 > MEM_SLOTS_MAX {
            return Err(Refused::MemoryTable);
        }
        let memory = GuestMemory::new(regions).map_err(|_| Refused::MemoryTable)?;
        self.memory = Arc::new(memory);
        for index in 0..self.rings.len() {
            if self.rings[index].running && self.setup(index).is_none() {
                tracing::warn!(
                    disk = self.disk.name,
                    queue = index,
                    "the front-end took away the memory of a running ring; it stops"
                );
                self.stop(index, limit);
            }
        }
        self.apply_all();
        Ok(())
    }

    pub(super) fn remove_region(
        &mut self,
        gone: Region,
        limit: DrainLimit<'_>,
    ) -> Result<(), Refused> {
        let mut regions = self.memory.regions().to_vec();
        let is_gone = |region: &Arc<MemoryRegion>| {
            let have = region.description();
            (have.guest_addr, have.size, have.user_addr)
                == (gone.guest_addr, gone.size, gone.user_addr)
        };
        let at = regions.iter().position(is_gone).ok_or(Refused::NoSuchRegion)?;
        regions.remove(at);
        self.set_memory(regions, limit)
    }
}

pub(super) fn map_region(region: Region, fd: &OwnedFd) -> Result<Arc<MemoryRegion>, Refused> {
    MemoryRegion::map(region, fd)
        .map(Arc::new)
        .map_err(|source| Refused::Map { what: "a memory region", source })
}
