//! What a function behind a port is to the port above it, and where its BAR answers on the memory bus.

use std::sync::Arc;

use super::address::Bdf;
use super::window::Window;
use crate::bus::{Bus, BusDevice};

/// What the bridge above a function forwards to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Upstream {
    /// Where the function is.
    pub bdf: Bdf,
    /// The bridge's memory window and prefetchable window; both empty while its memory decoding is off.
    pub windows: [Option<Window>; 2],
}

impl Upstream {
    /// Whether accesses to all of `base..base + len` reach the function.
    pub(super) fn forwards(&self, base: u64, len: u64) -> bool {
        self.windows.iter().flatten().any(|window| window.contains(base, len))
    }
}

/// A function in the slot of a root port. All calls may come from any thread, several at once.
pub(super) trait PciFunction: Send + Sync {
    /// The guest reads configuration space: an aligned byte, word or double word.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// The guest writes configuration space: an aligned byte, word or double word.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// What the port forwards has changed; nothing is forwarded while the link is down.
    fn set_upstream(&self, upstream: Option<Upstream>);

    /// Back to the state after power-on: stops and drains the device, then its registers take their initial values, which include
    /// the addresses assigned at the start.
    fn reset(&self);

    /// Stops and drains the device for good and takes it off the buses.
    fn shutdown(&self);
}

/// Where a BAR answers on the memory bus, if anywhere.
pub(super) struct BarMapping {
    bus: Arc<Bus>,
    device: Arc<dyn BusDevice>,
    len: u64,
    base: Option<u64>,
}

impl BarMapping {
    /// A BAR of `len` bytes that answers nowhere yet.
    pub(super) fn new(bus: Arc<Bus>, device: Arc<dyn BusDevice>, len: u64) -> Self {
        Self { bus, device, len, base: None }
    }

    /// Moves the BAR to `base`. Where another device answers there already, the BAR answers nowhere: a guest can hide its
    /// own devices, and never others. Gives the place where it answers.
    pub(super) fn place(&mut self, base: Option<u64>) -> Option<u64> {
        if base == self.base {
            return self.base;
        }
        if let Some(old) = self.base.take() {
            self.bus.remove(old);
        }
        if let Some(new) = base {
            match self.bus.insert(new, self.len, self.device.clone()) {
                Ok(()) => self.base = Some(new),
                Err(error) => tracing::debug!(%error, "a BAR cannot be placed"),
            }
        }
        self.base
    }
}

impl Drop for BarMapping {
    fn drop(&mut self) {
        self.place(None);
    }
}
