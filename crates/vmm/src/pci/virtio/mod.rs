//! virtio over PCI (virtio 1.2 sect. 4.1), modern devices only: one function with its configuration space, its
//! capabilities and its BAR.
//!
//! Locks, in this order: the function's registers, the transport, the doorbells, a vector. Queue threads take only the last.

mod bar;
mod doorbell;
mod interrupt;
mod transport;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cowhand_virtio::{Memory, VirtioDevice};

use self::bar::{BAR_LEN, MAX_QUEUES, VirtioBar};
use self::doorbell::Doorbells;
use self::interrupt::VirtioInterrupt;
use self::transport::{COMMON_LEN, Transport};
use super::PciError;
use super::address::Bdf;
use super::config::{COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace, Identity, reg};
use super::express;
use super::function::{BarMapping, PciFunction, Upstream};
use super::msix::{self, Msix};
use super::window::Window;
use crate::bus::{Bus, BusDevice};
use crate::irq::{DoorbellRegistry, MsiAllocator};

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const REVISION: u8 = 1;
const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_VENDOR: u8 = 0x09;
/// BAR flags: 64 bits wide, prefetchable (the bridges' 64-bit window takes no others).
const BAR_FLAGS: u32 = 0b1100;

/// `cfg_type` of the capabilities (sect. 4.1.4).
mod cfg_type {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

/// What a function needs of the machine around it.
#[derive(Clone)]
pub(super) struct Machine {
    pub mmio: Arc<Bus>,
    pub msi: Arc<dyn MsiAllocator>,
    pub doorbells: Arc<dyn DoorbellRegistry>,
    pub memory: Memory,
}

/// Where the capabilities that are more than constants lie.
#[derive(Clone, Copy)]
struct Capabilities {
    msix: usize,
    pci_access: usize,
}

struct Registers {
    config: ConfigSpace,
    mapping: BarMapping,
    upstream: Option<Upstream>,
}

/// One virtio device as a PCI function.
pub(super) struct VirtioFunction {
    bar: Arc<VirtioBar>,
    capabilities: Capabilities,
    initial: ConfigSpace,
    registers: Mutex<Registers>,
}

impl VirtioFunction {
    /// A function for `device` whose BAR starts at the base of `window`, which the port above it forwards.
    pub(super) fn new(device: Box<dyn VirtioDevice>, machine: &Machine, window: Window) -> Result<Self, PciError> {
        let queues = device.queue_max_sizes().len();
        if queues > MAX_QUEUES {
            return Err(PciError::TooManyQueues { queues, max: MAX_QUEUES });
        }
        if window.len < BAR_LEN || !window.base.is_multiple_of(BAR_LEN) {
            return Err(PciError::NoRoom { len: BAR_LEN });
        }
        let irqs = (0..=queues).map(|_| machine.msi.allocate()).collect::<Result<Vec<_>, _>>();
        let msix = Arc::new(Msix::new(irqs.map_err(PciError::Interrupt)?));
        let (config, capabilities) =
            registers(&*device, msix.len(), window.base).ok_or(PciError::CapabilitiesDoNotFit)?;
        let interrupt = Arc::new(VirtioInterrupt::new(msix.clone(), queues));
        let doorbells = Arc::new(Doorbells::new(machine.doorbells.clone(), queues).map_err(PciError::Doorbell)?);
        let transport = Transport::new(device, machine.memory.clone(), interrupt.clone(), doorbells.clone());
        let bar = Arc::new(VirtioBar { transport: Mutex::new(transport), interrupt, doorbells, msix });
        let mapping = BarMapping::new(machine.mmio.clone(), bar.clone(), BAR_LEN);
        let initial = config.clone();
        let registers = Mutex::new(Registers { config, mapping, upstream: None });
        Ok(Self { bar, capabilities, initial, registers })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the BAR's place and the vectors follow the registers.
    fn settle(&self, registers: &mut Registers) {
        let config = &registers.config;
        let command = config.u16(reg::COMMAND);
        let base = u64::from(config.u32(reg::BAR0) & !0xf) | (u64::from(config.u32(reg::BAR0 + 4)) << 32);
        let forwarded = registers.upstream.is_some_and(|upstream| upstream.forwards(base, BAR_LEN));
        let bdf = registers.upstream.map_or(Bdf::new(0, 0, 0), |upstream| upstream.bdf);
        let control = config.u16(self.capabilities.msix + 2);
        let silent = command & COMMAND_MASTER == 0 || control & msix::CONTROL_MASK != 0;
        self.bar.msix.set_control(control & msix::CONTROL_ENABLE != 0, silent, bdf);
        let placed = registers.mapping.place((command & COMMAND_MEMORY != 0 && forwarded).then_some(base));
        self.bar.doorbells.set_base(placed.map(|base| base + bar::NOTIFY));
    }

    /// Whether an access reaches the data register of the PCI configuration access capability.
    fn reaches_data(&self, offset: u16, len: usize) -> bool {
        let data = self.capabilities.pci_access + 16;
        usize::from(offset) < data + 4 && usize::from(offset) + len > data
    }

    /// Where in the BAR the PCI configuration access capability points (sect. 4.1.4.9), and the width; nothing when it
    /// points elsewhere.
    fn window_into_bar(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let at = self.capabilities.pci_access;
        let offset = config.u32(at + 8);
        let len = config.u32(at + 12);
        let fits = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        let inside = u64::from(offset) + u64::from(len) <= BAR_LEN;
        (config.u8(at + 4) == 0 && fits && inside).then_some((u64::from(offset), len as usize))
    }
}

impl PciFunction for VirtioFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.reaches_data(offset, data.len()) {
            // The registers' lock is given back before the BAR is read, which may take any lock of the device.
            let window = self.window_into_bar(&self.lock().config);
            if let Some((at, len)) = window {
                let mut value = [0; 4];
                self.bar.read(at, &mut value[..len]);
                self.lock().config.set(self.capabilities.pci_access + 16, &value);
            }
        }
        self.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut registers = self.lock();
        registers.config.write(offset, data);
        if self.reaches_data(offset, data.len()) {
            let window = self.window_into_bar(&registers.config);
            let value = registers.config.u32(self.capabilities.pci_access + 16).to_le_bytes();
            drop(registers);
            if let Some((at, len)) = window {
                self.bar.write(at, &value[..len]);
            }
            return;
        }
        self.settle(&mut registers);
    }

    fn set_upstream(&self, upstream: Option<Upstream>) {
        let mut registers = self.lock();
        if registers.upstream != upstream {
            registers.upstream = upstream;
            self.settle(&mut registers);
        }
    }

    fn reset(&self) {
        self.bar.transport().reset();
        self.bar.msix.reset();
        let mut registers = self.lock();
        registers.config = self.initial.clone();
        self.settle(&mut registers);
    }

    fn shutdown(&self) {
        self.set_upstream(None);
        self.bar.transport().close();
        self.bar.msix.reset();
    }
}

/// The function's registers at power-on, and where their capabilities are.
fn registers(device: &dyn VirtioDevice, vectors: usize, base: u64) -> Option<(ConfigSpace, Capabilities)> {
    let device_type = device.device_type() as u16;
    let id = DEVICE_BASE.saturating_add(device_type);
    let identity = Identity { vendor: VENDOR, device: id, revision: REVISION, class: class(device_type) };
    let mut config = ConfigSpace::endpoint(identity, VENDOR, id);
    config.set_u32(reg::BAR0, base as u32 | BAR_FLAGS);
    config.set_u32(reg::BAR0 + 4, (base >> 32) as u32);
    config.allow_u32(reg::BAR0, !(BAR_LEN as u32 - 1));
    config.allow_u32(reg::BAR0 + 4, !0);

    let mut body = [0; 10];
    body[..2].copy_from_slice(&((vectors - 1) as u16).to_le_bytes());
    body[2..6].copy_from_slice(&(bar::MSIX_TABLE as u32).to_le_bytes());
    body[6..].copy_from_slice(&(bar::MSIX_PENDING as u32).to_le_bytes());
    let msix = config.add_capability(CAPABILITY_MSIX, &body)?;
    config.allow_u16(msix + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);

    express::add_endpoint(&mut config)?;
    let queues = device.queue_max_sizes().len() as u32;
    add_structure(&mut config, cfg_type::COMMON, bar::COMMON, COMMON_LEN as u32, None)?;
    add_structure(
        &mut config,
        cfg_type::NOTIFY,
        bar::NOTIFY,
        queues * doorbell::MULTIPLIER,
        Some(doorbell::MULTIPLIER),
    )?;
    add_structure(&mut config, cfg_type::ISR, bar::ISR, 1, None)?;
    if device.config_len() > 0 {
        add_structure(&mut config, cfg_type::DEVICE, bar::DEVICE, device.config_len() as u32, None)?;
    }
    let pci_access = add_structure(&mut config, cfg_type::PCI, 0, 0, Some(0))?;
    config.allow(pci_access + 4, &[0xff]);
    config.allow(pci_access + 8, &[0xff; 12]);
    Some((config, Capabilities { msix, pci_access }))
}

/// Adds a `virtio_pci_cap` for `len` bytes at `offset` of BAR 0, with the dword that some of them have at their end.
fn add_structure(config: &mut ConfigSpace, kind: u8, offset: u64, len: u32, extra: Option<u32>) -> Option<usize> {
    let mut body = [0; 18];
    let size = if extra.is_some() { 20 } else { 16 };
    body[0] = size;
    body[1] = kind;
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..14].copy_from_slice(&len.to_le_bytes());
    body[14..].copy_from_slice(&extra.unwrap_or(0).to_le_bytes());
    config.add_capability(CAPABILITY_VENDOR, &body[..usize::from(size) - 2])
}

/// The class code that fits a device type.
fn class(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_00_00,
        2 | 8 => 0x01_80_00,
        3 => 0x07_80_00,
        _ => 0xff_00_00,
    }
}

#[cfg(test)]
#[path = "function_test.rs"]
mod tests;
