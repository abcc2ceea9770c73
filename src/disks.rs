//! The disks of a machine: opened from their descriptions, put before the guest, closed on every way out.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use cowhand_block::{Disk, DiskSpec, OpenPolicy};
use cowhand_virtio::VirtioDevice;
use cowhand_virtio::blk::{Block, BlockOptions, DiskBackend};
use cowhand_vmm::machine::{DeviceError, DeviceSource};

use crate::{EXIT_FAILURE, EXIT_USAGE, Failure};

/// The most queues that a disk gets when it is not said how many: more threads than that gain nothing.
const DEFAULT_QUEUES_MAX: u32 = 64;

/// Open disks, in the order in which the guest sees them.
pub(crate) struct Disks {
    disks: Vec<Arc<Disk>>,
    sources: Vec<DiskSource>,
}

/// Where a disk's device comes from.
#[derive(Clone)]
struct DiskSource {
    disk: Arc<Disk>,
    options: BlockOptions,
}

impl DeviceSource for DiskSource {
    fn make(&self) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        let backend = Arc::new(DiskBackend(self.disk.clone()));
        let device = Block::new(backend, self.options.clone())
            .map_err(|e| DeviceError(format!("disk {}: {e}", self.options.id)))?;
        Ok(Box::new(device))
    }
}

impl Disks {
    /// Opens all of `specs`; files that images refer to are opened below `allow_dirs` only (if empty, below each image's own
    /// directory). When one fails, the others are closed again.
    ///
    /// # Errors
    /// Names the disk's file and what is wrong with it.
    pub(crate) fn open(specs: &[DiskSpec], allow_dirs: &[PathBuf], cpus: u32) -> Result<Self, Failure> {
        let policy = OpenPolicy { allow_dirs: allow_dirs.to_vec(), ..OpenPolicy::host() };
        let mut disks = Self { disks: Vec::new(), sources: Vec::new() };
        let mut ids = HashSet::new();
        for (index, spec) in specs.iter().enumerate() {
            let id = spec.id.clone().unwrap_or_else(|| default_id(index));
            if !ids.insert(id.clone()) {
                disks.close()?;
                let message = format!("--disk: two disks are called {id}; give one another id=");
                return Err(Failure { message, status: EXIT_USAGE });
            }
            if spec.socket.is_some() {
                disks.close()?;
                let message =
                    "--disk: socket= is for `cowhand vhost-user-blk`: here the disk is served to the guest alone";
                return Err(Failure { message: message.into(), status: EXIT_USAGE });
            }
            let disk = match Disk::open(spec, &policy) {
                Ok(disk) => disk,
                Err(error) => {
                    disks.close()?;
                    return Err(error.into());
                }
            };
            let queues = spec.queues.unwrap_or(cpus.clamp(1, DEFAULT_QUEUES_MAX) as u16);
            let options = BlockOptions { id, serial: spec.serial.clone(), queues, ..BlockOptions::default() };
            disks.disks.push(disk.clone());
            disks.sources.push(DiskSource { disk, options });
        }
        Ok(disks)
    }

    /// The devices that show the disks to a guest.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Box<dyn DeviceSource>> {
        self.sources.iter().cloned().map(|source| Box::new(source) as Box<dyn DeviceSource>)
    }

    /// Flushes and unlocks all disks. No machine may use them any more.
    ///
    /// # Errors
    /// The first failure; the other disks are closed all the same.
    pub(crate) fn close(self) -> Result<(), Failure> {
        drop(self.sources);
        let mut result = Ok(());
        for disk in self.disks {
            if let Err(error) = disk.close() {
                let failure = Failure { message: error.to_string(), status: EXIT_FAILURE };
                result = result.and(Err(failure));
            }
        }
        result
    }
}

/// The name of the disk that the guest sees as `/dev/vda`, `/dev/vdb`, …
pub(crate) fn default_id(index: usize) -> String {
    let mut letters = String::new();
    let mut rest = index + 1;
    while rest > 0 {
        letters.insert(0, char::from(b'a' + ((rest - 1) % 26) as u8));
        rest = (rest - 1) / 26;
    }
    format!("vd{letters}")
}

#[cfg(test)]
#[path = "disks_test.rs"]
mod tests;
