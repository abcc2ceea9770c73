//! Who answers at which bus, device and function: the host bridge, the root ports, and one device behind each.
//!
//! Locks: the list of ports is locked only to find one; no port is called under it.

use std::sync::{Arc, PoisonError, RwLock};

use super::address::Bdf;
use super::host_bridge::HostBridge;
use super::root_port::RootPort;

/// Root ports fill devices 1 to 31 of bus 0, eight functions each.
pub(super) const MAX_PORTS: usize = 31 * 8;

/// The tree below the host bridge.
pub(super) struct PciTree {
    host_bridge: HostBridge,
    ports: RwLock<Vec<Arc<RootPort>>>,
}

impl PciTree {
    pub(super) fn new() -> Self {
        Self { host_bridge: HostBridge::new(), ports: RwLock::default() }
    }

    /// Where the port with `index` is, if there can be one.
    pub(super) fn port_address(index: usize) -> Option<Bdf> {
        (index < MAX_PORTS).then(|| Bdf::new(0, (1 + index / 8) as u8, (index % 8) as u8))
    }

    /// Appends a port; gives its index.
    pub(super) fn add_port(&self, port: Arc<RootPort>) -> usize {
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        ports.push(port);
        ports.len() - 1
    }

    /// The port with `index`.
    pub(super) fn port(&self, index: usize) -> Option<Arc<RootPort>> {
        self.ports.read().unwrap_or_else(PoisonError::into_inner).get(index).cloned()
    }

    /// All ports, in order.
    pub(super) fn ports(&self) -> Vec<Arc<RootPort>> {
        self.ports.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads configuration space: all ones where nobody answers.
    pub(super) fn read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if bdf == Bdf::new(0, 0, 0) {
            self.host_bridge.config_read(offset, data);
        } else if bdf.bus() == 0 {
            if let Some(port) = self.port_at(bdf) {
                port.config_read(offset, data);
            }
        } else if let Some(Some(device)) = self.find(|port| port.forward(bdf)) {
            device.config_read(offset, data);
        }
    }

    /// Writes configuration space.
    pub(super) fn write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        if bdf == Bdf::new(0, 0, 0) {
            self.host_bridge.config_write(offset, data);
        } else if bdf.bus() == 0 {
            if let Some(port) = self.port_at(bdf) {
                port.config_write(offset, data);
            }
        } else if let Some(Some(device)) = self.find(|port| port.forward(bdf)) {
            device.config_write(offset, data);
        }
    }

    /// Resets the host bridge and every port with its device.
    pub(super) fn reset(&self) {
        self.host_bridge.reset();
        for port in self.ports() {
            port.reset();
        }
    }

    fn port_at(&self, bdf: Bdf) -> Option<Arc<RootPort>> {
        self.find(|port| (port.bdf() == bdf).then(|| port.clone()))
    }

    fn find<T>(&self, mut ask: impl FnMut(&Arc<RootPort>) -> Option<T>) -> Option<T> {
        let count = self.ports.read().unwrap_or_else(PoisonError::into_inner).len();
        (0..count).find_map(|index| ask(&self.port(index)?))
    }
}
