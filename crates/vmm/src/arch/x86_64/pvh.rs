//! ELF kernels by the PVH boot protocol (Xen's `docs/misc/pvh.pandoc`): a 32-bit entry named by a note.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{Elf, KernelLoader, elf::PvhBootCapability};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::boot::{self, BootError, BootSource, EntryPoint, Loaded};
use super::{e820, layout};

const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const START_VERSION: u32 = 1;
const MODULES: u64 = layout::PVH_START_INFO + 0x100;
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x200;

pub(super) fn load(memory: &GuestMemoryMmap<()>, size: u64, source: &BootSource<'_>) -> Result<Loaded, BootError> {
    let (kernel, name) = source.kernel;
    let unbootable = |reason: String| BootError::Unbootable { file: name.to_path_buf(), reason };
    let mut file = kernel;
    let loaded = Elf::load(memory, None, &mut file, Some(GuestAddress(layout::HIGH_MEMORY)))
        .map_err(|e| unbootable(format!("the ELF file is damaged, not for x86_64, or larger than the memory ({e})")))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(unbootable("it has no PVH note; give the bzImage (vmlinuz), or build it with CONFIG_PVH".into()));
    };
    let low_end = boot::low_ram_end(memory);
    if loaded.kernel_end > low_end {
        return Err(BootError::KernelTooLarge { file: name.to_path_buf(), needed: loaded.kernel_end, memory: size });
    }
    let initrd = boot::place_initrd(source, loaded.kernel_end, low_end)?;
    boot::write_cmdline(memory, source.cmdline, layout::CMDLINE_MAX - 1)?;

    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.base, size: initrd.len, ..Default::default() };
        memory.write_obj(module, GuestAddress(MODULES))?;
    }
    let map = e820::map(size);
    let mut at = GuestAddress(MEMORY_MAP);
    for range in &map {
        // The types are those of E820.
        let entry = hvm_memmap_table_entry { addr: range.base, size: range.len, type_: range.kind, reserved: 0 };
        memory.write_obj(entry, at)?;
        at = at.unchecked_add(size_of_val(&entry) as u64);
    }
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        flags: 0,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_TABLES.start,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    memory.write_obj(info, GuestAddress(layout::PVH_START_INFO))?;
    Ok(Loaded { entry: EntryPoint::Pvh { address: entry.raw_value() }, initrd })
}
