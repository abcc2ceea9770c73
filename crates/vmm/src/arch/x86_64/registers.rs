//! Where a vCPU starts: segments, control registers, page tables, model-specific registers.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::boot::EntryPoint;
use super::platform::{RESET_OFFSET, RESET_VALUE};
use super::{invalid, layout};
use crate::kvm::KvmError;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Linux' `__BOOT_CS` and `__BOOT_DS` (boot protocol, "64-bit boot protocol").
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const SEGMENT_CODE_EXECUTE_READ_ACCESSED: u8 = 0xb;
const SEGMENT_DATA_READ_WRITE_ACCESSED: u8 = 0x3;
const SEGMENT_BUSY_TSS: u8 = 0xb;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// What firmware would have set: memory is write-back where nothing else is said, and string instructions are fast.
pub(super) fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK), entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING)];
    let msrs = Msrs::from_entries(&entries).map_err(|_| invalid("KVM_SET_MSRS"))?;
    let count = vcpu.set_msrs(&msrs).map_err(KvmError::ioctl("KVM_SET_MSRS"))?;
    if count != entries.len() {
        tracing::debug!("KVM does not know MSR {:#x}", entries.get(count).map_or(0, |e| e.index));
    }
    Ok(())
}

fn flat_segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    let code = type_ == SEGMENT_CODE_EXECUTE_READ_ACCESSED;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        // Default operand size 32; must be clear in 64-bit code.
        db: u8::from(!(code && long)),
        s: 1,
        l: u8::from(code && long),
        g: 1,
        avl: 0,
        padding: 0,
        unusable: 0,
    }
}

/// Puts the boot processor at the kernel's entry point.
pub(super) fn enter(vcpu: &VcpuFd, entry: &EntryPoint) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::ioctl("KVM_GET_SREGS"))?;
    let long = matches!(entry, EntryPoint::Linux64 { .. });
    sregs.cs = flat_segment(CODE_SELECTOR, SEGMENT_CODE_EXECUTE_READ_ACCESSED, long);
    let data = flat_segment(DATA_SELECTOR, SEGMENT_DATA_READ_WRITE_ACCESSED, long);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: SEGMENT_BUSY_TSS, present: 1, ..Default::default() };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&GDT_ENTRIES) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs).map_err(KvmError::ioctl("KVM_SET_SREGS"))?;

    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match *entry {
        EntryPoint::Linux64 { address } => (regs.rip, regs.rsi) = (address, layout::BOOT_PARAMS),
        EntryPoint::Pvh { address } => (regs.rip, regs.rbx) = (address, layout::PVH_START_INFO),
    }
    vcpu.set_regs(&regs).map_err(KvmError::ioctl("KVM_SET_REGS"))
}

/// The GDT that the segments come from, for kernels that reload them before they have their own: null, unused, 64-bit code,
/// data.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// The same with 32-bit code.
const GDT_ENTRIES_32: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// What stands at the reset vector: 16-bit code that writes the ACPI reset register. Linux reboots a machine with
/// hardware-reduced ACPI by EFI, and where there is none (here) by a jump to the BIOS's entry in real mode, without ever
/// trying the reset register itself (`reboot_init()` in arch/x86/kernel/reboot.c).
const RESET_CODE: [u8; 9] = [
    0xba,
    (PORT_RESET & 0xff) as u8,
    (PORT_RESET >> 8) as u8, // mov $PORT_RESET, %dx
    0xb0,
    RESET_VALUE, // mov $RESET_VALUE, %al
    0xee,        // out %al, %dx
    0xf4,        // hlt
    0xeb,
    0xfd, // jmp to the hlt
];
const PORT_RESET: u16 = layout::PORT_ACPI.start + RESET_OFFSET;

/// Writes what [`enter`] refers to, and the reset code: the GDT, and for 64-bit entry page tables that map the first GiB onto itself.
pub(super) fn write_tables(memory: &GuestMemoryMmap<()>, entry: &EntryPoint) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    memory.write_slice(&RESET_CODE, GuestAddress(layout::RESET_VECTOR))?;
    let long = matches!(entry, EntryPoint::Linux64 { .. });
    let gdt = if long { GDT_ENTRIES } else { GDT_ENTRIES_32 };
    for (offset, descriptor) in (0..).step_by(8).zip(gdt) {
        memory.write_obj(descriptor, GuestAddress(layout::GDT + offset))?;
    }
    if long {
        let (pml4, pdpt, pd) = (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
        memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
        memory.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
        let mut directory = [0; 4096];
        for (index, entry) in (0u64..).zip(directory.chunks_exact_mut(8)) {
            entry.copy_from_slice(&((index << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes());
        }
        memory.write_slice(&directory, GuestAddress(pd))?;
    }
    Ok(())
}
