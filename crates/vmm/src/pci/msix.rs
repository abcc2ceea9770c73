//! MSI-X (PCI 3.0 sect. 6.8.2): the vector table and the pending bits of one function, as they stand in its BAR.
//!
//! Masking is done here, not in the hypervisor: every signal comes through [`Msix::signal`], so a masked vector's signal
//! becomes its pending bit, and unmasking costs a call of the hypervisor only when the message has changed.
//!
//! Locks: each vector has its own, held while the hypervisor routes it; no other lock is taken inside.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::address::Bdf;
use crate::irq::{MsiMessage, MsiVector};

/// Bytes of one table entry.
pub(super) const ENTRY_LEN: u64 = 16;
/// Message control: MSI-X is on.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub(super) const CONTROL_MASK: u16 = 1 << 14;

struct Vector {
    irq: Arc<dyn MsiVector>,
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
    /// The message that the hypervisor routes the vector to.
    routed: Option<MsiMessage>,
}

impl Vector {
    fn reset(&mut self) {
        self.disconnect();
        self.address = 0;
        self.data = 0;
        self.masked = true;
        self.pending = false;
    }

    fn disconnect(&mut self) {
        if self.routed.take().is_some()
            && let Err(error) = self.irq.mask()
        {
            tracing::debug!(%error, "an MSI-X vector cannot be disconnected");
        }
    }

    /// Routes the vector as the guest asks, and sends what has been pending.
    fn connect(&mut self, device_id: u32) {
        let message = MsiMessage { address: self.address, data: self.data, device_id };
        if self.routed != Some(message) {
            match self.irq.route(message) {
                Ok(()) => self.routed = Some(message),
                Err(error) => {
                    tracing::debug!(%error, ?message, "an MSI-X vector cannot be routed");
                    self.disconnect();
                }
            }
        }
        if self.pending && self.routed.is_some() {
            self.pending = false;
            self.send();
        }
    }

    fn send(&self) {
        // Fails only when the counter is full, and then the interrupt is on its way already.
        let _ = self.irq.eventfd().write(1);
    }
}

/// The vectors of one function.
pub(super) struct Msix {
    vectors: Vec<Mutex<Vector>>,
    enabled: AtomicBool,
    /// The function-wide mask, or the function may not send.
    masked: AtomicBool,
    device_id: AtomicU32,
}

impl Msix {
    /// One vector for each of `irqs` (1 to 2048), all masked, MSI-X off.
    pub(super) fn new(irqs: Vec<Arc<dyn MsiVector>>) -> Self {
        let vector = |irq| Mutex::new(Vector { irq, address: 0, data: 0, masked: true, pending: false, routed: None });
        Self {
            vectors: irqs.into_iter().map(vector).collect(),
            enabled: AtomicBool::new(false),
            masked: AtomicBool::new(false),
            device_id: AtomicU32::new(0),
        }
    }

    /// The number of vectors.
    pub(super) fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Whether MSI-X is on.
    pub(super) fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// The guest has written message control, the bus master bit or the bus number.
    pub(super) fn set_control(&self, enabled: bool, masked: bool, bdf: Bdf) {
        let changed = [
            self.enabled.swap(enabled, Ordering::AcqRel) != enabled,
            self.masked.swap(masked, Ordering::AcqRel) != masked,
            self.device_id.swap(bdf.requester_id(), Ordering::AcqRel) != bdf.requester_id(),
        ];
        if changed.contains(&true) {
            for vector in &self.vectors {
                self.update(&mut lock(vector));
            }
        }
    }

    /// All vectors masked and unrouted, nothing pending, MSI-X off.
    pub(super) fn reset(&self) {
        self.enabled.store(false, Ordering::Release);
        self.masked.store(false, Ordering::Release);
        for vector in &self.vectors {
            lock(vector).reset();
        }
    }

    /// Interrupts the guest with vector `index`, or notes the interrupt as pending while it is masked. Nothing while MSI-X is off
    /// or without such a vector.
    pub(super) fn signal(&self, index: u16) {
        let Some(vector) = self.vectors.get(usize::from(index)) else { return };
        let mut vector = lock(vector);
        // Read under the vector's lock: a change of the control bits takes the lock afterwards, and finds what is pending.
        if !self.enabled() {
            return;
        }
        if self.masked.load(Ordering::Acquire) || vector.masked || vector.routed.is_none() {
            vector.pending = true;
        } else {
            vector.send();
        }
    }

    /// The guest reads the table.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((vector, at)) = self.entry(offset, data.len()) else { return };
        let vector = lock(vector);
        let mut entry = [0; ENTRY_LEN as usize];
        entry[..8].copy_from_slice(&vector.address.to_le_bytes());
        entry[8..12].copy_from_slice(&vector.data.to_le_bytes());
        entry[12] = u8::from(vector.masked);
        data.copy_from_slice(&entry[at..at + data.len()]);
    }

    /// The guest writes the table: aligned double words and quad words; others have no effect.
    pub(super) fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let Some((vector, at)) = self.entry(offset, data.len()) else { return };
        let mut vector = lock(vector);
        for (i, dword) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([dword[0], dword[1], dword[2], dword[3]]);
            match at / 4 + i {
                0 => vector.address = (vector.address & !0xffff_ffff) | u64::from(value & !3),
                1 => vector.address = (vector.address & 0xffff_ffff) | (u64::from(value) << 32),
                2 => vector.data = value,
                _ => vector.masked = value & 1 != 0,
            }
        }
        self.update(&mut vector);
    }

    /// The guest reads the pending bits.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(i as u64).saturating_mul(8);
            let first = usize::try_from(first).unwrap_or(usize::MAX);
            *byte = self
                .vectors
                .iter()
                .skip(first)
                .take(8)
                .enumerate()
                .fold(0, |bits, (n, vector)| bits | (u8::from(lock(vector).pending) << n));
        }
    }

    fn update(&self, vector: &mut Vector) {
        if !self.enabled() {
            vector.disconnect();
            vector.pending = false;
        } else if !vector.masked && !self.masked.load(Ordering::Acquire) {
            vector.connect(self.device_id.load(Ordering::Acquire));
        }
    }

    /// The vector whose entry holds all of `offset..offset + len`, and where in the entry.
    fn entry(&self, offset: u64, len: usize) -> Option<(&Mutex<Vector>, usize)> {
        let vector = self.vectors.get(usize::try_from(offset / ENTRY_LEN).ok()?)?;
        let at = (offset % ENTRY_LEN) as usize;
        (at + len <= ENTRY_LEN as usize).then_some((vector, at))
    }
}

fn lock(vector: &Mutex<Vector>) -> MutexGuard<'_, Vector> {
    vector.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "msix_test.rs"]
mod tests;
