//! The host bridge at 00:00.0: nothing but an identity, which tells the guest that there is a bus.

use std::sync::{Mutex, PoisonError};

use super::config::{ConfigSpace, Identity};

const IDENTITY: Identity = Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: 0x06_00_00 };

/// The host bridge's configuration space.
pub(super) struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    pub(super) fn new() -> Self {
        Self { config: Mutex::new(initial()) }
    }

    pub(super) fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    pub(super) fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }

    pub(super) fn reset(&self) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = initial();
    }
}

fn initial() -> ConfigSpace {
    ConfigSpace::endpoint(IDENTITY, 0x1af4, 0x1100)
}
