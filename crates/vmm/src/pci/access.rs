//! The two ways to configuration space: ECAM (PCIe 4.0 sect. 7.2.2) and the ports 0xCF8 to 0xCFF (PCI 3.0 sect. 3.2.2.3.2).
//!
//! Both decode an address and pass an aligned byte, word or double word on; whatever else a guest tries reads as all
//! ones and writes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::address::Bdf;
use super::tree::PciTree;
use crate::bus::BusDevice;

/// Bytes of ECAM for each bus.
pub(super) const ECAM_BUS_LEN: u64 = 1 << 20;
/// The first of the ports.
pub(super) const PORTS_BASE: u64 = 0xcf8;
/// How many there are.
pub(super) const PORTS_LEN: u64 = 8;

const ENABLE: u32 = 1 << 31;
/// Bits 30:24 and 1:0 of CONFIG_ADDRESS are reserved, and read as zero.
const ADDRESS_BITS: u32 = ENABLE | 0x00ff_fffc;

/// Memory-mapped configuration space.
pub(super) struct Ecam(pub Arc<PciTree>);

impl Ecam {
    /// The register that an aligned access names.
    fn decode(offset: u64, len: usize) -> Option<(Bdf, u16)> {
        let bdf = Bdf::from_bits(u16::try_from(offset >> 12).ok()?);
        (matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64)).then_some((bdf, (offset & 0xfff) as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::decode(offset, data.len()) {
            Some((bdf, register)) => self.0.read(bdf, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register)) = Self::decode(offset, data.len()) {
            self.0.write(bdf, register, data);
        }
    }
}

/// CONFIG_ADDRESS and CONFIG_DATA.
pub(super) struct ConfigPorts {
    tree: Arc<PciTree>,
    address: AtomicU32,
}

impl ConfigPorts {
    pub(super) fn new(tree: Arc<PciTree>) -> Self {
        Self { tree, address: AtomicU32::new(0) }
    }

    pub(super) fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }

    /// The register behind an access to CONFIG_DATA; nothing while the mechanism is off.
    fn decode(&self, offset: u64, len: usize) -> Option<(Bdf, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let byte = offset.checked_sub(4)?;
        let fits = matches!(len, 1 | 2 | 4) && byte.is_multiple_of(len as u64) && byte + len as u64 <= 4;
        let register = (address & 0xfc) as u16 | byte as u16;
        (address & ENABLE != 0 && fits).then(|| (Bdf::from_bits((address >> 8) as u16), register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            return;
        }
        match self.decode(offset, data.len()) {
            Some((bdf, register)) => self.tree.read(bdf, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0
            && let Ok(value) = <[u8; 4]>::try_from(data)
        {
            self.address.store(u32::from_le_bytes(value) & ADDRESS_BITS, Ordering::Relaxed);
        } else if let Some((bdf, register)) = self.decode(offset, data.len()) {
            self.tree.write(bdf, register, data);
        }
    }
}

#[cfg(test)]
#[path = "access_test.rs"]
mod tests;
