//! pvpanic: a one-byte register by which the guest's kernel says that it panicked (QEMU's `docs/specs/pvpanic.rst`).

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::control::{Control, Exit};

/// The guest panicked and stays so.
const PANICKED: u8 = 1;
/// The guest panicked and boots a crash kernel.
const CRASH_LOADED: u8 = 2;

/// The pvpanic device.
pub struct Pvpanic(pub Arc<Control>);

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The events that are understood.
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        match data.first() {
            Some(byte) if byte & PANICKED != 0 => self.0.end(Exit::Panic),
            Some(byte) if byte & CRASH_LOADED != 0 => self.0.report_crash_kernel(),
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "pvpanic_test.rs"]
mod tests;
