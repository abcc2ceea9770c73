//! What a device model and a transport expect of each other.
//!
//! The life of a device: `inactive -- activate --> active -- stop/reset --> inactive`, as often as the guest likes. While
//! active the device owns its queues and the threads that serve them; while inactive nothing of it touches guest memory.

use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory as devices hold it: it may be replaced (memory hot plug) while they run.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The device's way to interrupt the driver. Called from any thread; never blocks on a lock that is held while a device
/// is activated, stopped or reset.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that queue `queue` has new used buffers.
    fn signal_queue(&self, queue: u16);

    /// Tells the driver that the configuration space has changed. The transport counts the generation up first.
    fn signal_config(&self);

    /// Sets DEVICE_NEEDS_RESET (sect. 2.1.2) and tells the driver: the device cannot go on by itself.
    fn signal_needs_reset(&self);
}

/// One queue that the driver has enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Its index among the device's queues; queues that the driver left disabled are skipped.
    pub index: u16,
    /// The rings: marked ready, and inside guest memory when the device was activated.
    pub queue: Queue,
    /// Signalled (non-blocking eventfd) when the driver has made buffers available.
    pub kick: EventFd,
}

/// All that a device gets when the driver says DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// The negotiated features: a subset of [`VirtioDevice::features`], with VIRTIO_F_VERSION_1.
    pub features: u64,
    /// The enabled queues, in the order of their indices. VIRTIO_F_EVENT_IDX is already set in them.
    pub queues: Vec<ActiveQueue>,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not be activated; the transport answers with DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The device is active already.
    #[error("the device is active already")]
    AlreadyActive,
    /// The driver left a queue disabled that the device cannot do without.
    #[error("queue {0}, which the device needs, is not enabled")]
    QueueMissing(u16),
    /// A thread or a descriptor could not be made.
    #[error("a queue's thread cannot be started: {0}")]
    Start(#[from] io::Error),
}

/// A virtio device model. The transport serialises the calls.
pub trait VirtioDevice: Send {
    /// The device type (sect. 5): 2 is a block device, 4 an entropy source.
    fn device_type(&self) -> u32;

    /// All features that the device offers, VIRTIO_F_VERSION_1 among them.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two each; as many entries as the device has queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Bytes of the device's configuration space; 0 when it has none.
    fn config_len(&self) -> usize {
        0
    }

    /// Reads `data.len()` bytes at `offset` of the configuration space. Bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = offset;
        data.fill(0);
    }

    /// The driver writes the configuration space. What it may not write is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver has set FEATURES_OK with this subset of [`features`](Self::features): fields that depend on it take
    /// their initial values.
    fn negotiated(&mut self, features: u64) {
        let _ = features;
    }

    /// Starts to serve the queues.
    ///
    /// # Errors
    /// When a thread cannot be started or a needed queue is missing; the device is inactive then, and nothing of it runs.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving: every request taken from a queue is completed into the used ring before this returns, and nothing
    /// of the device touches guest memory afterwards. Gives the queues back as they stand, so that they can be
    /// saved, or activated again. An inactive device gives none back.
    fn stop(&mut self) -> Vec<ActiveQueue>;

    /// [`stop`](Self::stop), and back to the state before the first activation.
    fn reset(&mut self) {
        drop(self.stop());
    }
}
