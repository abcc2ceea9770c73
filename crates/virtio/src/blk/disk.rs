//! The engine's disks as backends.

use std::sync::Arc;

use cowhand_block::{Disk, Limits, RequestQueue};

use super::BlockBackend;

/// A disk of the engine behind a block device. Closing it is the owner's business, after the device has stopped.
pub struct DiskBackend(pub Arc<Disk>);

impl BlockBackend for DiskBackend {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_only(&self) -> bool {
        self.0.is_read_only()
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn open_queue(&self) -> cowhand_block::Result<Box<dyn RequestQueue>> {
        Ok(Box::new(self.0.queue()?))
    }
}
