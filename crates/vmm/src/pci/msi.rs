//! MSI (PCI 3.0 sect. 6.8.1) with one vector and a 64-bit address: what a root port reports hot-plug events by.

use std::sync::Arc;

use super::address::Bdf;
use super::config::ConfigSpace;
use crate::irq::{MsiMessage, MsiVector};

const CAPABILITY_ID: u8 = 0x05;
const CONTROL_ENABLE: u16 = 1;
const CONTROL_64BIT: u16 = 1 << 7;

/// The MSI capability of one function.
pub(super) struct Msi {
    offset: usize,
    irq: Arc<dyn MsiVector>,
    routed: Option<MsiMessage>,
}

impl Msi {
    /// Adds the capability to `config`; nothing when it does not fit.
    pub(super) fn add(config: &mut ConfigSpace, irq: Arc<dyn MsiVector>) -> Option<Self> {
        let mut body = [0; 12];
        body[..2].copy_from_slice(&CONTROL_64BIT.to_le_bytes());
        let offset = config.add_capability(CAPABILITY_ID, &body)?;
        config.allow_u16(offset + 2, CONTROL_ENABLE);
        config.allow_u32(offset + 4, !3);
        config.allow_u32(offset + 8, !0);
        config.allow_u16(offset + 12, !0);
        Some(Self { offset, irq, routed: None })
    }

    /// Makes the route follow what the guest has written into `config`.
    pub(super) fn update(&mut self, config: &ConfigSpace, bdf: Bdf) {
        let message = (config.u16(self.offset + 2) & CONTROL_ENABLE != 0).then(|| MsiMessage {
            address: u64::from(config.u32(self.offset + 4)) | (u64::from(config.u32(self.offset + 8)) << 32),
            data: u32::from(config.u16(self.offset + 12)),
            device_id: bdf.requester_id(),
        });
        if message == self.routed {
            return;
        }
        let done = match message {
            Some(message) => self.irq.route(message),
            None => self.irq.mask(),
        };
        match done {
            Ok(()) => self.routed = message,
            Err(error) => {
                self.routed = None;
                tracing::debug!(%error, ?message, "a port's interrupt cannot be routed");
            }
        }
    }

    /// Interrupts the guest; nothing while MSI is off.
    pub(super) fn signal(&self) {
        if self.routed.is_some() {
            // Fails only when the counter is full, and then the interrupt is on its way already.
            let _ = self.irq.eventfd().write(1);
        }
    }
}
