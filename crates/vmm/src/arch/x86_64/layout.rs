//! The guest-physical address map, port map and interrupt numbers of the x86_64 machine.
//!
//! ```text
//! 0                 RAM (boot structures below 0x9_fc00, ACPI tables from 0xe_0000, what is there of a BIOS at 0xf_f000)
//! 0xc000_0000       32-bit PCI window
//! 0xe000_0000       ECAM, 256 buses
//! 0xfec0_0000       I/O APIC
//! 0xfee0_0000       local APICs, MSI
//! 0xfffb_c000       KVM's identity map and TSS pages (VT-x real mode)
//! 4 GiB             the rest of RAM
//! window64(ram)     64-bit PCI window
//! ```

use std::ops::Range;

/// RAM below 4 GiB ends here at the latest; what does not fit lies above 4 GiB.
pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
/// RAM above the 32-bit hole starts here.
pub const HIGH_RAM_BASE: u64 = 1 << 32;
/// The most memory that a guest may have, in bytes: RAM and the 64-bit window stay below AMD's HyperTransport hole at 1012 GiB.
pub const MAX_MEMORY: u64 = 880 << 30;
/// The least memory that a guest may have, in bytes.
pub const MIN_MEMORY: u64 = 4 << 20;

/// The GDT of the boot processor.
pub const GDT: u64 = 0x500;
/// The PVH start information, its module list and memory map follow in the page.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux' "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// Page tables that map the first GiB onto itself: PML4, PDPT, PD.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line, in bytes with its terminating zero.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// Conventional memory ends here (where an EBDA would begin).
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first: the area where a kernel that was told nothing looks for it.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_f000;
/// All that there is of a BIOS.
pub const BIOS: Range<u64> = 0xf_f000..0x10_0000;
/// Where a real-mode processor starts, and where kernels jump to reboot.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Extended memory; bzImages are loaded here.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Where PCI devices' 32-bit BARs lie.
pub const PCI_WINDOW32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCIe's memory-mapped configuration space: 1 MiB for each bus.
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// The last PCI bus that [`PCI_ECAM`] covers.
pub const PCI_LAST_BUS: u8 = 255;
/// Bytes of the 64-bit window.
pub const PCI_WINDOW64_SIZE: u64 = 64 << 30;
/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM needs on VT-x for real mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on VT-x for real mode.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// PCI's CONFIG_ADDRESS and CONFIG_DATA, and in their midst the reset control register 0xcf9.
pub const PORT_PCI_CONFIG: Range<u16> = 0xcf8..0xd00;
/// The reset control register's offset in [`PORT_PCI_CONFIG`].
pub const PCI_RESET_CONTROL_OFFSET: u64 = 1;
/// COM1.
pub const PORT_COM1: Range<u16> = 0x3f8..0x400;
/// The keyboard controller's command port (only its reset command works).
pub const PORT_I8042_COMMAND: u16 = 0x64;
/// The pvpanic device.
pub const PORT_PVPANIC: u16 = 0x505;
/// ACPI: sleep control, sleep status, reset.
pub const PORT_ACPI: Range<u16> = 0x600..0x603;

/// COM1's interrupt.
pub const IRQ_COM1: u32 = 4;
/// The generic event device's interrupt.
pub const IRQ_GED: u32 = 5;
/// Pins of the I/O APIC: GSIs below this are wired interrupts.
pub const IOAPIC_PINS: u32 = 24;

/// RAM as `(guest address, bytes)`, correct around the 32-bit hole; `memory` in bytes.
#[must_use]
pub fn ram_ranges(memory: u64) -> Vec<(u64, u64)> {
    let low = memory.min(LOW_RAM_LIMIT);
    let mut ranges = vec![(0, low)];
    if memory > low {
        ranges.push((HIGH_RAM_BASE, memory - low));
    }
    ranges
}

/// The 64-bit PCI window of a guest with `memory` bytes: above all RAM, aligned to its own size where the processor's
/// `address_bits` leave room for that. Empty when the processor can address nothing above RAM.
#[must_use]
pub fn pci_window64(memory: u64, address_bits: u32) -> Range<u64> {
    let limit = 1u64 << address_bits.clamp(32, 52);
    let ram_end = HIGH_RAM_BASE + memory.saturating_sub(LOW_RAM_LIMIT);
    let start = ram_end.next_multiple_of(PCI_WINDOW64_SIZE);
    if start + PCI_WINDOW64_SIZE <= limit {
        return start..start + PCI_WINDOW64_SIZE;
    }
    // A processor with 36 address bits: what there is, from the next GiB on.
    let start = ram_end.next_multiple_of(1 << 30).min(limit);
    start..limit
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
