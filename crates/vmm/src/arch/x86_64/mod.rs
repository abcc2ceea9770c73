//! x86_64: what [`super`] asks of an architecture.

mod acpi;
mod boot;
mod cpuid;
mod e820;
pub mod layout;
mod linux;
mod platform;
mod pvh;
mod registers;

use std::io;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::irq::MsiMessage;
use crate::kvm::KvmError;

pub use acpi::write_tables as write_firmware_tables;
pub use boot::{BootError, BootSource, EntryPoint, InitrdRange, Loaded, load};
pub use cpuid::{CpuTemplate, MAX_CPUS};
pub use platform::{Platform, PlatformParts};

/// The capabilities that this architecture needs beyond [`crate::kvm::REQUIRED`].
pub const REQUIRED: &[(Cap, &str)] = &[
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

/// The tiny guest (`resources/tiny-guest`): prints, and powers off.
pub const TINY_GUEST: &[u8] = include_bytes!("../../../../../resources/tiny-guest/x86_64.elf");
/// What the tiny guest prints.
pub const TINY_GUEST_SAYS: &str = "hello from the tiny guest";

/// Prepares a new VM for its vCPUs: the pages that VT-x needs for real mode, and the interrupt controllers.
///
/// # Errors
/// When KVM refuses.
pub fn prepare_vm(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(KvmError::ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(KvmError::ioctl("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP"))
}

/// Creates vCPU `index` and brings it to where the guest starts: the first at `entry`, the others waiting for it.
///
/// # Errors
/// When KVM refuses.
pub fn create_vcpu(vm: &VmFd, index: u32, template: &CpuTemplate, entry: &EntryPoint) -> Result<VcpuFd, KvmError> {
    let vcpu = vm.create_vcpu(index.into()).map_err(KvmError::ioctl("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(&template.for_cpu(index)?).map_err(KvmError::ioctl("KVM_SET_CPUID2"))?;
    registers::set_msrs(&vcpu)?;
    if index == 0 {
        registers::enter(&vcpu, entry)?;
    }
    Ok(vcpu)
}

/// The processor's template for guests with `cpus` vCPUs.
///
/// # Errors
/// When KVM does not say what it supports.
pub fn cpu_template(kvm: &Kvm, cpus: u32) -> Result<CpuTemplate, KvmError> {
    CpuTemplate::new(kvm, cpus)
}

/// The fixed routes of the wired interrupts.
#[must_use]
pub fn wired_routes() -> Vec<kvm_irq_routing_entry> {
    (0..layout::IOAPIC_PINS)
        .map(|pin| {
            let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
            entry
        })
        .collect()
}

/// The route of `gsi` to an MSI.
#[must_use]
pub fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

/// Where the guest is, for messages.
#[must_use]
pub fn instruction_pointer(vcpu: &VcpuFd) -> Option<u64> {
    vcpu.get_regs().ok().map(|regs| regs.rip)
}

/// The bits of a guest-physical address.
#[must_use]
pub fn address_bits(template: &CpuTemplate) -> u32 {
    template.address_bits()
}

/// Whether the processor shows VT-x or SVM; a KVM without it is one that works in software, and may not run everything.
#[must_use]
pub fn hardware_virtualization() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

fn invalid(what: &'static str) -> KvmError {
    KvmError::Ioctl { what, source: io::ErrorKind::InvalidData.into() }
}
