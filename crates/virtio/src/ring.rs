//! What every device does alike with a split ring: whether to interrupt, and what it means that a ring is broken.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The available ring's flag by which a driver without event index asks for no interrupts.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Why a ring cannot be used until the driver has reset the device.
#[derive(Debug, thiserror::Error)]
#[error("the driver's ring is broken: {0}")]
pub(crate) struct RingError(#[from] virtio_queue::Error);

/// Whether the driver wants to know of what was added to the used ring since this was last asked.
pub(crate) fn wants_interrupt(queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
    // Also the fence between our write of the used ring and our read of what the driver wants.
    let wants = queue.needs_notification(memory)?;
    if queue.event_idx_enabled() {
        return Ok(wants);
    }
    let flags: u16 =
        memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
}

/// Puts a chain into the used ring; says whether it went there (a head beyond the queue cannot be given back).
pub(crate) fn add_used(queue: &mut Queue, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<bool, RingError> {
    match queue.add_used(memory, head, len) {
        Ok(()) => Ok(true),
        Err(virtio_queue::Error::InvalidDescriptorIndex) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
