//! Putting a machine together, and taking it apart.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;

use super::{Config, MachineError};
use crate::arch::{self, BootSource, EntryPoint, Platform, PlatformParts, layout};
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
    _vm: Arc<VmFd>,
    _memory: GuestMemoryMmap<()>,
}

impl Machine {
    /// Puts a machine together. The files are read while KVM sets up.
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

        let (entry, kernel_side) = std::thread::scope(|scope| {
            let loader = std::thread::Builder::new()
                .name("loader".into())
                .spawn_scoped(scope, || load(&memory, config, window64.clone()))
                .map_err(MachineError::system("loader thread"))?;
            let kernel_side = KernelSide::new(kvm, config, sink, &memory, &window64, &control);
            let entry = loader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok::<_, MachineError>((entry, kernel_side?))
        })?;
        let KernelSide { vm, buses, platform, pci } = kernel_side;
        let vcpus = (0..config.cpus)
            .map(|index| arch::create_vcpu(&vm, index, &template, &entry))
            .collect::<Result<_, KvmError>>()?;
        Ok(Self { vcpus, buses, platform, pci, control, _vm: vm, _memory: memory })
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

    /// Starts the vCPUs, each on its thread.
    ///
    /// # Errors
    /// When the system gives no thread; those that were started have ended then.
    pub(super) fn start(&mut self) -> Result<RunningVcpus, MachineError> {
        let mut running = RunningVcpus { threads: Vec::new(), control: self.control.clone() };
        for (index, vcpu) in (0..).zip(self.vcpus.drain(..)) {
            let thread = VcpuThread::spawn(index, vcpu, self.buses.clone(), self.control.clone())
                .map_err(MachineError::system("vCPU thread"))?;
            running.threads.push(thread);
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

/// The vCPU threads; dropping this ends the machine and waits for them.
pub(super) struct RunningVcpus {
    threads: Vec<VcpuThread>,
    control: Arc<Control>,
}

impl Drop for RunningVcpus {
    fn drop(&mut self) {
        // Counts only when there was no other reason.
        self.control.end(Exit::Failed("the control thread gave up".into()));
        self.threads.drain(..).for_each(VcpuThread::join);
    }
}

/// Loads kernel, initrd and firmware tables.
fn load(memory: &GuestMemoryMmap<()>, config: &Config, window64: Range<u64>) -> Result<EntryPoint, MachineError> {
    let source = BootSource {
        kernel: config.kernel.parts(),
        initrd: config.initrd.as_ref().map(super::NamedFile::parts),
        cmdline: &config.cmdline,
    };
    let entry = arch::load(memory, config.memory, &source)?;
    arch::write_firmware_tables(memory, config.cpus, window64)
        .map_err(|e| MachineError::system("firmware tables")(io::Error::other(e)))?;
    Ok(entry)
}

/// What does not need to know what the guest boots.
struct KernelSide {
    vm: Arc<VmFd>,
    buses: Buses,
    platform: Platform,
    pci: PciHost,
}

impl KernelSide {
    fn new(
        kvm: &Kvm,
        config: &Config,
        sink: &Sink,
        memory: &GuestMemoryMmap<()>,
        window64: &Range<u64>,
        control: &Arc<Control>,
    ) -> Result<Self, MachineError> {
        let vm = Arc::new(kvm::create_vm(kvm)?);
        kvm::add_memory(&vm, memory)?;
        arch::prepare_vm(&vm)?;
        let router = Arc::new(InterruptRouter::new(vm.clone()));
        let buses = Buses { pio: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
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
        Ok(Self { vm, buses, platform, pci })
    }
}

fn window(range: &Range<u64>) -> Window {
    Window { base: range.start, len: range.end - range.start }
}
