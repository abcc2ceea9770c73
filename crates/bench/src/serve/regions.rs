//! The front-end's memory: mapped regions, and its own addresses translated.

use std::fs::File;
use std::sync::Arc;

use cowhand_virtio::Memory;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// As many as a front-end may have.
pub const MAX_REGIONS: usize = 32;

struct Region {
    /// Where the front-end has it.
    user: u64,
    mapped: Arc<GuestRegionMmap>,
}

/// All regions, and the memory that the workers see of them.
pub struct Regions {
    regions: Vec<Region>,
    memory: Memory,
}

impl Regions {
    pub fn new() -> Self {
        Self { regions: Vec::new(), memory: Memory::new(GuestMemoryMmap::new()) }
    }

    /// The memory as it stands, to be shared with workers; changes show in it.
    pub fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Maps one more region.
    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        if self.regions.len() == MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        self.regions.push(map(region, file)?);
        self.publish()
    }

    /// Forgets a region. It is unmapped once no worker uses it.
    pub fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<()> {
        let is = |r: &Region| r.user == region.user_addr && r.mapped.start_addr().raw_value() == region.guest_phys_addr;
        let at = self.regions.iter().position(is).ok_or(Error::InvalidParam)?;
        self.regions.remove(at);
        self.publish()
    }

    /// Replaces all regions.
    pub fn replace(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        if regions.len() != files.len() || regions.len() > MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        self.regions = regions.iter().zip(files).map(|(region, file)| map(region, file)).collect::<Result<_>>()?;
        self.publish()
    }

    /// The guest's address of an address of the front-end.
    pub fn translate(&self, user: u64) -> Result<u64> {
        let inside = |r: &&Region| user.checked_sub(r.user).is_some_and(|offset| offset < r.mapped.len());
        let region = self.regions.iter().find(inside).ok_or(Error::InvalidParam)?;
        Ok(region.mapped.start_addr().raw_value() + (user - region.user))
    }

    fn publish(&self) -> Result<()> {
        let mut mapped: Vec<_> = self.regions.iter().map(|region| region.mapped.clone()).collect();
        mapped.sort_by_key(|region| region.start_addr());
        let memory = if mapped.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_arc_regions(mapped).map_err(|_| Error::InvalidParam)?
        };
        self.memory.lock().map_err(|_| Error::BackendInternalError)?.replace(memory);
        Ok(())
    }
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Region> {
    let len = usize::try_from(region.memory_size).map_err(|_| Error::InvalidParam)?;
    let start = GuestAddress(region.guest_phys_addr);
    let file = FileOffset::new(file, region.mmap_offset);
    let mapped = GuestRegionMmap::from_range(start, len, Some(file)).map_err(|error| {
        tracing::error!("cannot map the front-end's memory: {error}");
        Error::InvalidParam
    })?;
    Ok(Region { user: region.user_addr, mapped: Arc::new(mapped) })
}
