//! The front-end's memory (section "Memory access"): mapped regions, and its own addresses translated.
//!
//! Changed only while no ring runs: a worker keeps the memory that it began with until its queue is drained.

use std::fs::File;
use std::sync::Arc;

use cowhand_virtio::Memory;
use rustix::fs::{FileType, fstat};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::device::{Refusal, refuse};
use crate::sigbus::Guarded;
use crate::wake::Wake;

/// As many as a front-end may have, one message for each (SET_MEM_TABLE carries fewer).
pub(crate) const MAX_REGIONS: usize = 509;

struct Region {
    /// Where the front-end has it.
    user: u64,
    /// Before what it guards.
    _guarded: Guarded,
    mapped: Arc<GuestRegionMmap>,
}

/// All regions, and the memory that the workers see of them.
pub(crate) struct Regions {
    regions: Vec<Region>,
    memory: Memory,
    /// Rung when the front-end has taken memory away that is mapped.
    lost: Wake,
}

impl Regions {
    /// No memory yet. `lost` is rung when the front-end takes memory away that is mapped.
    pub(crate) fn new(lost: Wake) -> Self {
        Self { regions: Vec::new(), memory: Memory::new(GuestMemoryMmap::new()), lost }
    }

    /// The memory, to be shared with workers; changes show in it.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The memory as it stands.
    pub(crate) fn snapshot(&self) -> Arc<GuestMemoryMmap> {
        self.memory.memory().into_inner()
    }

    /// Maps one more region.
    ///
    /// # Errors
    /// There are too many, it overlaps another one, or it cannot be mapped; then nothing has changed.
    pub(crate) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<(), Refusal> {
        if self.regions.len() == MAX_REGIONS {
            return refuse(format!("more than {MAX_REGIONS} memory regions"));
        }
        self.regions.push(map(region, file, &self.lost)?);
        self.publish().inspect_err(|_| drop(self.regions.pop()))
    }

    /// Forgets a region. What else the message says of it (its offset) does not matter.
    ///
    /// # Errors
    /// There is none there.
    pub(crate) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<(), Refusal> {
        let is = |r: &Region| {
            (r.user, r.mapped.start_addr().raw_value(), r.mapped.len())
                == (region.user_addr, region.guest_phys_addr, region.memory_size)
        };
        let Some(at) = self.regions.iter().position(is) else {
            let at = region.guest_phys_addr;
            return refuse(format!("no memory region at {at:#x} to be removed"));
        };
        self.regions.remove(at);
        self.publish()
    }

    /// Replaces all regions.
    ///
    /// # Errors
    /// One cannot be mapped, or they overlap; then nothing has changed.
    pub(crate) fn replace(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<(), Refusal> {
        if regions.len() != files.len() {
            return refuse(format!("{} memory regions with {} descriptors", regions.len(), files.len()));
        }
        let new =
            regions.iter().zip(files).map(|(region, file)| map(region, file, &self.lost)).collect::<Result<_, _>>()?;
        let old = std::mem::replace(&mut self.regions, new);
        self.publish().inspect_err(|_| self.regions = old)
    }

    /// The guest's address of an address of the front-end.
    ///
    /// # Errors
    /// It lies in no region.
    pub(crate) fn translate(&self, user: u64) -> Result<GuestAddress, Refusal> {
        let inside = |r: &&Region| user.checked_sub(r.user).is_some_and(|offset| offset < r.mapped.len());
        match self.regions.iter().find(inside) {
            // Below the region's end, which is an address.
            Some(region) => Ok(region.mapped.start_addr().unchecked_add(user - region.user)),
            None => refuse(format!("the address {user:#x} lies in no memory region")),
        }
    }

    fn publish(&self) -> Result<(), Refusal> {
        let mut mapped: Vec<_> = self.regions.iter().map(|region| region.mapped.clone()).collect();
        mapped.sort_by_key(|region| region.start_addr());
        let memory = if mapped.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_arc_regions(mapped).map_err(|error| Refusal(format!("memory regions: {error}")))?
        };
        match self.memory.lock() {
            Ok(lock) => lock.replace(memory),
            // Nobody panics while it is held; and what it guards is replaced as a whole.
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
        Ok(())
    }
}

fn map(region: &VhostUserMemoryRegion, file: File, lost: &Wake) -> Result<Region, Refusal> {
    let start = GuestAddress(region.guest_phys_addr);
    let wrong = |error: &dyn std::fmt::Display| Refusal(format!("memory region at {:#x}: {error}", start.0));
    let len = usize::try_from(region.memory_size).map_err(|error| wrong(&error))?;
    // Else the front-end's addresses of it, and what is computed with them, would wrap around.
    if region.user_addr.checked_add(region.memory_size).is_none() {
        return Err(wrong(&"it ends past the end of all addresses"));
    }
    // To touch what lies behind the end of a file is a SIGBUS. Devices have no such end.
    let stat = fstat(&file).map_err(|error| wrong(&error))?;
    let end = region.mmap_offset.checked_add(region.memory_size);
    let has = FileType::from_raw_mode(stat.st_mode).is_file().then(|| u64::try_from(stat.st_size).unwrap_or(0));
    if has.is_some_and(|has| end.is_none_or(|end| end > has)) {
        return Err(wrong(&"its file is shorter"));
    }
    let file = FileOffset::new(file, region.mmap_offset);
    let mapped = GuestRegionMmap::from_range(start, len, Some(file)).map_err(|error| wrong(&error))?;
    let guarded = Guarded::new(mapped.as_ptr().cast(), len, lost).map_err(|error| wrong(&error))?;
    Ok(Region { user: region.user_addr, _guarded: guarded, mapped: Arc::new(mapped) })
}
