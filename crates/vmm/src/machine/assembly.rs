//! Putting a machine together, and taking it apart.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::late::{self, LateRam};
use super::{Config, MachineError};
use crate::arch::{self, BootSource, InitrdRange, Loaded, Platform, PlatformParts, layout};
use crate::bus::Bus;
use crate::console::output::{ConsoleOutput, Sink};
use crate::control::{Control, Exit};
use crate::interrupts::{InterruptRouter, KvmDoorbells, KvmMsiAllocator};
use crate::kvm::{self, KvmError};
use crate::memory::{self, GuestMemory};
use crate::pci::{Ecam, PciHost, PciHostConfig, Window, Windows};
use crate::vcpu::{Buses, VcpuThread};

/// A machine, put together and not yet running.
///
/// Fields are dropped in this order: what refers to the guest's memory goes before it.
pub struct Machine {
    vcpus: Vec<VcpuFd>,
    buses: Buses,
    platform: Platform,
    pci: PciHost,
    control: Arc<Control>,
    late: Option<Arc<LateRam>>,
    _vm: Arc<VmFd>,
    _memory: GuestMemoryMmap<()>,
}

impl Machine {
    /// Puts a machine together. The initrd is read when the guest runs.
    ///
    /// # Errors
    /// When anything of it is not to be had.
    pub fn new(kvm: &Kvm, config: &Config, sink: &Sink) -> Result<Self, MachineError> {
        let max = (kvm.get_max_vcpus() as u64).min(arch::MAX_CPUS.into()) as u32;
        if !(1..=max).contains(&config.cpus) {
            return Err(MachineError::Cpus { asked: config.cpus, max });
        }
        let memory = memory::create(config.memory)?;
        let template = arch::cpu_template(kvm, config.cpus)?;
        let window64 = layout::pci_window64(config.memory, arch::address_bits(&template));
        let control = Arc::new(Control::new().map_err(MachineError::system("event"))?);

        // One after the other: waking a thread for it, and waiting for that one, costs more than the copying that could be done beside.
        let loaded = load(&memory, config, window64.clone())?;
        let KernelSide { vm, buses, platform, pci, late } =
            KernelSide::new(kvm, config, sink, &memory, loaded.initrd, &window64, &control)?;
        let vcpus = (0..config.cpus)
            .map(|index| arch::create_vcpu(&vm, index, &template, &loaded.entry))
            .collect::<Result<_, KvmError>>()?;
        Ok(Self { vcpus, buses, platform, pci, control, late, _vm: vm, _memory: memory })
    }

    /// What the machine's end is told to.
    pub(super) fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// The buses that the vCPUs' accesses go to.
    #[cfg(test)]
    pub(super) fn buses(&self) -> &Buses {
        &self.buses
    }

    /// The machine's platform.
    pub(super) fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Starts the vCPUs, each on its thread, and beside them the one that reads the initrd.
    ///
    /// # Errors
    /// When the system gives no thread; those that were started have ended then.
    pub(super) fn start(&mut self) -> Result<RunningThreads, MachineError> {
        let mut running = RunningThreads { vcpus: Vec::new(), initrd: None, control: self.control.clone() };
        for (index, vcpu) in (0..).zip(self.vcpus.drain(..)) {
            let thread = VcpuThread::spawn(index, vcpu, self.buses.clone(), self.control.clone())
                .map_err(MachineError::system("vCPU thread"))?;
            running.vcpus.push(thread);
        }
        if let Some(late) = self.late.take() {
            let control = self.control.clone();
            let fill = move || {
                if let Err(e) = late.fill() {
                    control.end(Exit::Failed(e.to_string()));
                }
            };
            let thread = std::thread::Builder::new().name("initrd".into()).spawn(fill);
            running.initrd = Some(thread.map_err(MachineError::system("initrd thread"))?);
        }
        Ok(running)
    }
}

impl Drop for Machine {
    /// Every request that a device has taken is completed before the machine is gone. The vCPUs have stopped by then.
    fn drop(&mut self) {
        self.pci.shutdown();
    }
}

/// The machine's threads; dropping this ends the machine and waits for them.
pub(super) struct RunningThreads {
    vcpus: Vec<VcpuThread>,
    initrd: Option<JoinHandle<()>>,
    control: Arc<Control>,
}

impl Drop for RunningThreads {
    fn drop(&mut self) {
        // Counts only when there was no other reason.
        self.control.end(Exit::Failed("the control thread gave up".into()));
        // First, as a vCPU may wait for it.
        if self.initrd.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that reads the initrd panicked");
        }
        self.vcpus.drain(..).for_each(VcpuThread::join);
    }
}

/// Loads the kernel and the firmware tables.
fn load(memory: &GuestMemoryMmap<()>, config: &Config, window64: Range<u64>) -> Result<Loaded, MachineError> {
    let source = BootSource {
        kernel: config.kernel.parts(),
        initrd: config.initrd.as_ref().map(super::NamedFile::parts),
        cmdline: &config.cmdline,
    };
    let loaded = arch::load(memory, config.memory, &source)?;
    arch::write_firmware_tables(memory, config.cpus, window64)
        .map_err(|e| MachineError::system("firmware tables")(io::Error::other(e)))?;
    Ok(loaded)
}

/// Makes `memory` the guest's RAM, but for the initrd's pages, which come later.
fn add_memory(
    vm: &Arc<VmFd>,
    memory: &GuestMemoryMmap<()>,
    config: &Config,
    initrd: Option<InitrdRange>,
    mmio: &Bus,
) -> Result<Option<Arc<LateRam>>, MachineError> {
    let initrd = initrd.filter(|range| range.len > 0).zip(config.initrd.as_ref());
    let without = initrd.map_or(0..0, |(range, _)| late::pages(&range));
    let mut slots = 0..;
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        let (below, above) = (start..end.min(without.start).max(start), start.max(without.end).min(end)..end);
        for (part, number) in [below, above].into_iter().filter(|part| !part.is_empty()).zip(&mut slots) {
            kvm::add_memory(vm, memory, number, &part)?;
        }
    }
    let Some((range, file)) = initrd else { return Ok(None) };
    let file = file.try_clone().map_err(MachineError::system("initrd"))?;
    let slot = slots.next().unwrap_or_default();
    LateRam::new(memory, range, file, (vm.clone(), slot), mmio).map(Some)
}

/// What does not need to know what the guest boots.
struct KernelSide {
    vm: Arc<VmFd>,
    buses: Buses,
    platform: Platform,
    pci: PciHost,
    late: Option<Arc<LateRam>>,
}

impl KernelSide {
    fn new(
        kvm: &Kvm,
        config: &Config,
        sink: &Sink,
        memory: &GuestMemoryMmap<()>,
        initrd: Option<InitrdRange>,
        window64: &Range<u64>,
        control: &Arc<Control>,
    ) -> Result<Self, MachineError> {
        let vm = Arc::new(kvm::create_vm(kvm)?);
        let buses = Buses { pio: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        // First of all: once KVM has devices and interrupts to look after, each slot waits for a grace period of theirs.
        let late = add_memory(&vm, memory, config, initrd, &buses.mmio)?;
        arch::prepare_vm(&vm)?;
        let router = Arc::new(InterruptRouter::new(vm.clone()));
        // The configuration ports enclose the reset control register, which is the platform's: it passes the rest on.
        let pci_config_ports = Arc::new(Bus::new());
        let pci = PciHost::new(PciHostConfig {
            windows: Windows {
                mem32: window(&layout::PCI_WINDOW32),
                mem64: Some(window64).filter(|w| !w.is_empty()).map(window),
            },
            ecam: Ecam { base: layout::PCI_ECAM.start, buses: u16::from(layout::PCI_LAST_BUS) + 1 },
            mmio: buses.mmio.clone(),
            pio: pci_config_ports.clone(),
            msi: Arc::new(KvmMsiAllocator(router.clone())),
            doorbells: Arc::new(KvmDoorbells(vm.clone())),
            memory: GuestMemory::new(memory.clone()),
        })?;
        for device in &config.devices {
            pci.add_virtio(device.make()?)?;
        }
        let sink = sink.try_clone().map_err(MachineError::system("console"))?;
        let parts = PlatformParts {
            buses: &buses,
            router: &router,
            control,
            console: ConsoleOutput::new(sink, config.panic_line, control.clone()),
            pci_config_ports,
        };
        let platform = Platform::new(parts).map_err(MachineError::system("platform devices"))?;
        Ok(Self { vm, buses, platform, pci, late })
    }
}

fn window(range: &Range<u64>) -> Window {
    Window { base: range.start, len: range.end - range.start }
}
