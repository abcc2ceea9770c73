//! The one BAR of a virtio function: where each of its structures lies, and who answers there.
//!
//! Locks: the transport's, around the common and the device configuration; notifications, ISR and MSI-X take none of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::doorbell::{Doorbells, MULTIPLIER};
use super::interrupt::VirtioInterrupt;
use super::transport::Transport;
use crate::bus::BusDevice;
use crate::pci::msix::{ENTRY_LEN, Msix};

/// Bytes of the BAR.
pub(super) const BAR_LEN: u64 = 0x8000;
/// Structures stand on pages of their own, so that a guest can map them apart.
pub(super) const COMMON: u64 = 0x0000;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const NOTIFY: u64 = 0x3000;
pub(super) const MSIX_TABLE: u64 = 0x4000;
pub(super) const MSIX_PENDING: u64 = 0x6000;
const PAGE: u64 = 0x1000;

/// The most queues that a function can have: their vectors, and one for the configuration, must fit into the table.
pub(super) const MAX_QUEUES: usize = 256;
const _: () = assert!((MAX_QUEUES as u64 + 1) * ENTRY_LEN <= MSIX_PENDING - MSIX_TABLE);
const _: () = assert!(MAX_QUEUES as u64 * MULTIPLIER as u64 <= PAGE);

/// What answers in the BAR.
pub(super) struct VirtioBar {
    pub transport: Mutex<Transport>,
    pub interrupt: Arc<VirtioInterrupt>,
    pub doorbells: Arc<Doorbells>,
    pub msix: Arc<Msix>,
}

impl VirtioBar {
    pub(super) fn transport(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for VirtioBar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => self.transport().read_common(offset - COMMON, data),
            ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE..NOTIFY => self.transport().read_device(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PENDING => self.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PENDING..BAR_LEN => self.msix.read_pending(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.transport().write_common(offset - COMMON, data),
            DEVICE..NOTIFY => self.transport().write_device(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE if (offset - NOTIFY).is_multiple_of(MULTIPLIER.into()) => {
                self.doorbells.ring((offset - NOTIFY) / u64::from(MULTIPLIER));
            }
            MSIX_TABLE..MSIX_PENDING => self.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }
}
