//! Address buses: which device answers at which guest address, for port I/O and for memory-mapped I/O.
//!
//! A bus decodes addresses and nothing else. It refuses overlapping devices when they are placed; what the guest
//! asks of addresses where nothing is placed is the caller's to answer (reads as all ones).
//!
//! Locks: the map's lock is held only to look a device up, never while the device runs, so a device may place or
//! remove others (a BAR that moves) from inside its own access.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// A device on a [`Bus`]. Called by any vCPU thread, several at once; every value may come from a hostile guest.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1 to 8 for port and memory accesses) at `offset` from the device's base.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` from the device's base.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device could not be placed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps around")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device answers in the range.
    #[error("bus range {base:#x}+{len:#x} overlaps another device")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
}

#[derive(Clone)]
struct Entry {
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address range.
#[derive(Default)]
pub struct Bus {
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Places `device` at `base..base + len`.
    ///
    /// # Errors
    /// When the range is empty, wraps around, or overlaps a placed device; the bus is as it was then.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|n| base.checked_add(n)).ok_or(BusError::BadRange { base, len })?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((start, entry)) = entries.range(..=last).next_back()
            && start + (entry.len - 1) >= base
        {
            return Err(BusError::Overlap { base, len });
        }
        entries.insert(base, Entry { len, device });
        Ok(())
    }

    /// Removes the device placed at exactly `base`; says whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).remove(&base).is_some()
    }

    /// Reads at `addr`. Where no device answers for the whole access, `data` is all ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        match self.find(addr, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at `addr`. Where no device answers for the whole access, nothing happens.
    pub fn write(&self, addr: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(addr, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = entries.range(..=addr).next_back()?;
        let offset = addr - base;
        let end = offset.checked_add(len as u64)?;
        (end <= entry.len).then(|| (offset, entry.device.clone()))
    }
}

#[cfg(test)]
#[path = "bus_test.rs"]
mod tests;
