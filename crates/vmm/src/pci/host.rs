//! The PCI host: made once by the machine, given devices, reset with the guest, shut down at the end.
//!
//! Locks: the allocator's, while a port is made. Devices are called without it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cowhand_virtio::{Memory, VirtioDevice};

use super::PciError;
use super::access::{self, ConfigPorts, ECAM_BUS_LEN, PORTS_BASE, PORTS_LEN};
use super::root_port::{PortLayout, RootPort};
use super::tree::PciTree;
use super::virtio::{Machine, VirtioFunction};
use super::window::{Window, WindowAllocator};
use crate::bus::Bus;
use crate::irq::{DoorbellRegistry, MsiAllocator};

/// Each port gets this much of each window: what Linux reserves for a port with hot plug, so that it keeps what it finds.
const PORT_WINDOW: u64 = 2 << 20;
/// Windows of bridges begin and end on multiples of this.
const WINDOW_ALIGN: u64 = 1 << 20;

/// The address ranges that the machine leaves to PCI (and names in the host bridge's `_CRS`).
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Below 4 GiB: 2 MiB for each port.
    pub mem32: Window,
    /// Above 4 GiB, for prefetchable BARs: 2 MiB for each port. Without it they stand below 4 GiB too.
    pub mem64: Option<Window>,
}

/// Where configuration space is mapped.
#[derive(Clone, Copy, Debug)]
pub struct Ecam {
    /// A multiple of 1 MiB for each bus.
    pub base: u64,
    /// Buses 0 to `buses - 1`, at most 256; bus 0 takes one, each port another.
    pub buses: u16,
}

/// What the host is made of.
pub struct PciHostConfig {
    /// Addresses for BARs.
    pub windows: Windows,
    /// Addresses for configuration space.
    pub ecam: Ecam,
    /// Where ECAM and BARs are placed.
    pub mmio: Arc<Bus>,
    /// Where 0xCF8 to 0xCFF are placed.
    pub pio: Arc<Bus>,
    /// Interrupt vectors.
    pub msi: Arc<dyn MsiAllocator>,
    /// Doorbells inside the kernel.
    pub doorbells: Arc<dyn DoorbellRegistry>,
    /// Guest memory, for the devices.
    pub memory: Memory,
}

/// Names a root port and its slot, for as long as the host lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(usize);

#[cfg(test)]
impl PortId {
    /// The port that was added first.
    pub(super) fn first() -> Self {
        Self(0)
    }
}

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

struct Resources {
    mem32: WindowAllocator,
    mem64: Option<WindowAllocator>,
    buses: u16,
    /// The prefetchable window of each port, in which its device's BAR goes.
    windows: Vec<Window>,
}

/// The PCI host.
pub struct PciHost {
    tree: Arc<PciTree>,
    ports_device: Arc<ConfigPorts>,
    machine: Machine,
    pio: Arc<Bus>,
    ecam: Ecam,
    resources: Mutex<Resources>,
    down: AtomicBool,
}

impl PciHost {
    /// A host with nothing below it but the host bridge, answering on ECAM and on the ports.
    ///
    /// # Errors
    /// When another device stands where configuration space should.
    pub fn new(config: PciHostConfig) -> Result<Self, PciError> {
        let tree = Arc::new(PciTree::new());
        let ports_device = Arc::new(ConfigPorts::new(tree.clone()));
        let ecam_len = u64::from(config.ecam.buses) * ECAM_BUS_LEN;
        config.mmio.insert(config.ecam.base, ecam_len, Arc::new(access::Ecam(tree.clone())))?;
        if let Err(error) = config.pio.insert(PORTS_BASE, PORTS_LEN, ports_device.clone()) {
            config.mmio.remove(config.ecam.base);
            return Err(error.into());
        }
        let resources = Resources {
            mem32: WindowAllocator::new(config.windows.mem32),
            mem64: config.windows.mem64.map(WindowAllocator::new),
            buses: config.ecam.buses.min(256),
            windows: Vec::new(),
        };
        let machine =
            Machine { mmio: config.mmio, msi: config.msi, doorbells: config.doorbells, memory: config.memory };
        let resources = Mutex::new(resources);
        Ok(Self {
            tree,
            ports_device,
            machine,
            pio: config.pio,
            ecam: config.ecam,
            resources,
            down: AtomicBool::new(false),
        })
    }

    /// Adds a root port with an empty slot, before the guest first runs.
    ///
    /// # Errors
    /// When bus numbers, windows or interrupt vectors have run out.
    pub fn add_port(&self) -> Result<PortId, PciError> {
        let mut resources = self.resources();
        let index = resources.windows.len();
        let bdf = PciTree::port_address(index).ok_or(PciError::NoPortLeft)?;
        let secondary = u8::try_from(index + 1).map_err(|_| PciError::NoPortLeft)?;
        if u16::from(secondary) >= resources.buses {
            return Err(PciError::NoPortLeft);
        }
        let irq = self.machine.msi.allocate().map_err(PciError::Interrupt)?;
        let no_room = || PciError::NoRoom { len: PORT_WINDOW };
        let memory = resources.mem32.allocate(PORT_WINDOW, WINDOW_ALIGN).ok_or_else(no_room)?;
        let resources = &mut *resources;
        let prefetchable = resources.mem64.as_mut().unwrap_or(&mut resources.mem32);
        let prefetch = prefetchable.allocate(PORT_WINDOW, WINDOW_ALIGN).ok_or_else(no_room)?;
        let layout = PortLayout { bdf, secondary, memory, prefetch };
        let port = RootPort::new(layout, irq).ok_or(PciError::CapabilitiesDoNotFit)?;
        resources.windows.push(prefetch);
        Ok(PortId(self.tree.add_port(Arc::new(port))))
    }

    /// Adds a port with `device` in its slot, before the guest first runs.
    ///
    /// # Errors
    /// As [`add_port`](Self::add_port); or the device does not fit into PCI.
    pub fn add_virtio(&self, device: Box<dyn VirtioDevice>) -> Result<PortId, PciError> {
        let id = self.add_port()?;
        let function = self.function(id, device)?;
        self.port(id)?.plug_cold(function).map_err(|_| PciError::Occupied(id))?;
        Ok(id)
    }

    /// Puts `device` into the empty slot of a port while the guest runs, and tells the guest.
    ///
    /// # Errors
    /// When there is no such port, its slot is taken, or the device does not fit into PCI.
    pub fn hot_add(&self, id: PortId, device: Box<dyn VirtioDevice>) -> Result<(), PciError> {
        let port = self.port(id)?;
        if port.occupied() {
            return Err(PciError::Occupied(id));
        }
        let function = self.function(id, device)?;
        port.plug(function).map_err(|_| PciError::Occupied(id))
    }

    /// Asks the guest to let the port's device go; it is gone when [`occupied`](Self::occupied) says so. A guest may take
    /// its time (Linux waits five seconds) or refuse. Says whether there is a device.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn request_removal(&self, id: PortId) -> Result<bool, PciError> {
        Ok(self.port(id)?.request_unplug())
    }

    /// Takes the port's device out without asking the guest; the device is stopped and drained. Says whether there was one.
    ///
    /// For guests that do not answer [`request_removal`](Self::request_removal): virtio drivers of Linux (seen in 6.1) wait
    /// without end for a device that is gone to confirm its reset, and such a guest cannot shut down any more.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn remove(&self, id: PortId) -> Result<bool, PciError> {
        Ok(self.port(id)?.unplug())
    }

    /// Whether the port's slot holds a device.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn occupied(&self, id: PortId) -> Result<bool, PciError> {
        Ok(self.port(id)?.occupied())
    }

    /// The guest is rebooted: all devices are stopped and drained, and everything is as it was at power-on. No vCPU may
    /// run meanwhile.
    pub fn reset(&self) {
        self.tree.reset();
        self.ports_device.reset();
    }

    /// Stops and drains all devices for good, and takes everything off the buses. Once is enough; dropping the host does it
    /// too.
    pub fn shutdown(&self) {
        if self.down.swap(true, Ordering::AcqRel) {
            return;
        }
        for port in self.tree.ports() {
            port.shutdown();
        }
        self.machine.mmio.remove(self.ecam.base);
        self.pio.remove(PORTS_BASE);
    }

    fn function(&self, id: PortId, device: Box<dyn VirtioDevice>) -> Result<Arc<VirtioFunction>, PciError> {
        let window = self.resources().windows.get(id.0).copied().ok_or(PciError::NoSuchPort(id))?;
        Ok(Arc::new(VirtioFunction::new(device, &self.machine, window)?))
    }

    fn port(&self, id: PortId) -> Result<Arc<RootPort>, PciError> {
        self.tree.port(id.0).ok_or(PciError::NoSuchPort(id))
    }

    fn resources(&self) -> MutexGuard<'_, Resources> {
        self.resources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PciHost {
    fn drop(&mut self) {
        // The buses hold the tree, and the tree's devices hold the buses: nothing would ever be dropped otherwise.
        self.shutdown();
    }
}

impl fmt::Debug for PciHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciHost").field("ecam", &self.ecam).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "host_test.rs"]
mod tests;
