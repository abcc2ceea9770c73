//! What the device tells its queues while they run.

use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of the identity that GET_ID gives.
pub(super) const ID_LEN: usize = 20;

/// Shared between a device and the workers of its queues.
#[derive(Debug)]
pub struct BlockSettings {
    /// Whether writes may stay in caches until a flush.
    writeback: AtomicBool,
    /// Whether discards and zero writes were offered.
    discard: bool,
    id: [u8; ID_LEN],
}

impl BlockSettings {
    /// With writes cached. Of `serial`, the first 20 bytes are what the guest reads as the disk's identity.
    #[must_use]
    pub fn new(serial: &str, discard: bool) -> Self {
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self { writeback: AtomicBool::new(true), discard, id }
    }

    /// Whether a write may complete before it is durable.
    #[must_use]
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    /// Changes it, for all writes that are taken from a queue from now on.
    pub fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Release);
    }

    /// Whether the guest may discard and write zeros.
    #[must_use]
    pub fn discard(&self) -> bool {
        self.discard
    }

    /// The identity, padded with zeros.
    #[must_use]
    pub fn id(&self) -> &[u8; ID_LEN] {
        &self.id
    }
}
