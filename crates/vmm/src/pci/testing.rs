//! Test support: a machine without KVM, and a device that only remembers what was done to it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cowhand_virtio::{ActivateError, Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Ecam, PciHost, PciHostConfig, Window, Windows};
use crate::bus::Bus;
use crate::irq::{DoorbellRegistry, MsiAllocator, MsiMessage, MsiVector};

pub const ECAM: u64 = 0xe000_0000;
pub const MEM32: Window = Window { base: 0xc000_0000, len: 0x1000_0000 };
pub const MEM64: Window = Window { base: 0x40_0000_0000, len: 0x1_0000_0000 };

/// One vector: where it is routed, and how often it was.
pub struct FakeVector {
    pub event: EventFd,
    pub routed: Mutex<Option<MsiMessage>>,
    pub routes: Mutex<Vec<MsiMessage>>,
    pub refuse: AtomicBool,
}

impl FakeVector {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            routed: Mutex::default(),
            routes: Mutex::default(),
            refuse: AtomicBool::new(false),
        })
    }

    /// Interrupts sent since the last time.
    pub fn taken(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }

    pub fn routed(&self) -> Option<MsiMessage> {
        *self.routed.lock().unwrap()
    }
}

impl MsiVector for FakeVector {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::Error::other("refused"));
        }
        *self.routed.lock().unwrap() = Some(message);
        self.routes.lock().unwrap().push(message);
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        *self.routed.lock().unwrap() = None;
        Ok(())
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}

#[derive(Default)]
pub struct FakeMsi {
    pub vectors: Mutex<Vec<Arc<FakeVector>>>,
}

impl FakeMsi {
    pub fn vector(&self, index: usize) -> Arc<FakeVector> {
        self.vectors.lock().unwrap()[index].clone()
    }
}

impl MsiAllocator for FakeMsi {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector = FakeVector::new();
        self.vectors.lock().unwrap().push(vector.clone());
        Ok(vector)
    }
}

/// Which addresses are connected.
#[derive(Default)]
pub struct FakeDoorbells {
    pub connected: Mutex<Vec<(u64, EventFd)>>,
    pub refuse: AtomicBool,
}

impl FakeDoorbells {
    pub fn addresses(&self) -> Vec<u64> {
        self.connected.lock().unwrap().iter().map(|(address, _)| *address).collect()
    }
}

impl DoorbellRegistry for FakeDoorbells {
    fn register(&self, event: &EventFd, address: u64) -> io::Result<()> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(io::Error::other("refused"));
        }
        self.connected.lock().unwrap().push((address, event.try_clone().unwrap()));
        Ok(())
    }

    fn unregister(&self, _event: &EventFd, address: u64) -> io::Result<()> {
        let mut connected = self.connected.lock().unwrap();
        let before = connected.len();
        connected.retain(|(other, _)| *other != address);
        if connected.len() < before { Ok(()) } else { Err(io::Error::other("no such doorbell")) }
    }
}

/// What happened to a [`FakeDevice`].
#[derive(Default)]
pub struct Seen {
    pub log: Mutex<Vec<String>>,
    pub queues: Mutex<Vec<ActiveQueue>>,
    pub interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    pub config: Mutex<[u8; 8]>,
    pub refuse: AtomicBool,
}

impl Seen {
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    pub fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.interrupt.lock().unwrap().clone().unwrap()
    }

    fn note(&self, text: impl Into<String>) {
        self.log.lock().unwrap().push(text.into());
    }
}

/// A device with two queues and eight bytes of configuration.
pub struct FakeDevice(pub Arc<Seen>);

/// Offered by [`FakeDevice`]: VERSION_1, EVENT_IDX, and bits 0 and 5.
pub const FEATURES: u64 = (1 << 32) | (1 << 29) | 0x21;

impl VirtioDevice for FakeDevice {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }

    fn config_len(&self) -> usize {
        8
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = self.0.config.lock().unwrap();
        for (to, from) in data.iter_mut().zip(config.get(offset as usize..).unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.note(format!("config {offset} {data:?}"));
    }

    fn negotiated(&mut self, features: u64) {
        self.0.note(format!("negotiated {features:#x}"));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.0.refuse.load(Ordering::SeqCst) {
            return Err(ActivateError::QueueMissing(1));
        }
        self.0.note(format!("activate {:#x} queues {}", activation.features, activation.queues.len()));
        *self.0.queues.lock().unwrap() = activation.queues;
        *self.0.interrupt.lock().unwrap() = Some(activation.interrupt);
        Ok(())
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.0.note("stop");
        *self.0.interrupt.lock().unwrap() = None;
        std::mem::take(&mut *self.0.queues.lock().unwrap())
    }
}

/// A machine with a PCI host and nothing else.
pub struct World {
    pub mmio: Arc<Bus>,
    pub pio: Arc<Bus>,
    pub msi: Arc<FakeMsi>,
    pub doorbells: Arc<FakeDoorbells>,
    pub memory: Memory,
    pub host: PciHost,
}

pub fn memory() -> Memory {
    Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
}

impl World {
    pub fn new() -> Self {
        let (mmio, pio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let (msi, doorbells) = (Arc::new(FakeMsi::default()), Arc::new(FakeDoorbells::default()));
        let memory = memory();
        let host = PciHost::new(PciHostConfig {
            windows: Windows { mem32: MEM32, mem64: Some(MEM64) },
            ecam: Ecam { base: ECAM, buses: 256 },
            mmio: mmio.clone(),
            pio: pio.clone(),
            msi: msi.clone(),
            doorbells: doorbells.clone(),
            memory: memory.clone(),
        })
        .unwrap();
        Self { mmio, pio, msi, doorbells, memory, host }
    }

    /// A device at 01:00.0, decoding switched on in it and in its port.
    pub fn with_device() -> (Self, Arc<Seen>) {
        let (world, seen) = (Self::new(), Arc::new(Seen::default()));
        world.host.add_virtio(Box::new(FakeDevice(seen.clone()))).unwrap();
        world.decode();
        (world, seen)
    }

    pub fn decode(&self) {
        self.config_write(PORT, 4, &[6, 0]);
        self.config_write(DEVICE, 4, &[6, 0]);
    }

    pub fn config<const N: usize>(&self, (bus, device, function): (u64, u64, u64), offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.mmio.read(ECAM + (bus << 20) + (device << 15) + (function << 12) + offset, &mut data);
        data
    }

    pub fn config_u16(&self, at: (u64, u64, u64), offset: u64) -> u16 {
        u16::from_le_bytes(self.config(at, offset))
    }

    pub fn config_u32(&self, at: (u64, u64, u64), offset: u64) -> u32 {
        u32::from_le_bytes(self.config(at, offset))
    }

    pub fn config_write(&self, (bus, device, function): (u64, u64, u64), offset: u64, data: &[u8]) {
        self.mmio.write(ECAM + (bus << 20) + (device << 15) + (function << 12) + offset, data);
    }

    /// The offset of a capability (of the `cfg_type` given, for vendor-specific ones).
    pub fn capability(&self, at: (u64, u64, u64), id: u8, cfg_type: Option<u8>) -> u64 {
        let [mut offset] = self.config::<1>(at, 0x34);
        for _ in 0..48 {
            assert_ne!(offset, 0, "no capability {id:#x} {cfg_type:?}");
            let [found, next, _, kind] = self.config(at, offset.into());
            if found == id && cfg_type.is_none_or(|cfg_type| cfg_type == kind) {
                return offset.into();
            }
            offset = next;
        }
        panic!("the capability list loops");
    }

    pub fn bar<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.mmio.read(MEM64.base + offset, &mut data);
        data
    }

    pub fn bar_write(&self, offset: u64, data: &[u8]) {
        self.mmio.write(MEM64.base + offset, data);
    }
}

pub const PORT: (u64, u64, u64) = (0, 1, 0);
pub const DEVICE: (u64, u64, u64) = (1, 0, 0);
