//! bzImage kernels by Linux' 64-bit boot protocol (`Documentation/arch/x86/boot.rst` in Linux).

use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::boot::{self, BootError, BootSource, EntryPoint, Loaded};
use super::{e820, layout};
use crate::memory;

/// Where the setup header lies in the file.
const HEADER_START: usize = 0x1f1;
/// Where it ends at the latest.
pub(super) const HEADER_END: usize = HEADER_START + size_of::<setup_header>();
/// "HdrS".
const MAGIC: u32 = 0x5372_6448;
/// The first protocol with everything used here: `xloadflags`, `init_size`, `pref_address`.
const MIN_VERSION: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry, 0x200 behind the load address.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// `type_of_loader`: one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// The setup header at the start of a bzImage; none when `head` does not begin one.
pub(super) fn parse_header(head: &[u8]) -> Option<setup_header> {
    let bytes = head.get(HEADER_START..HEADER_END)?;
    let mut header = setup_header::default();
    header.as_mut_slice().copy_from_slice(bytes);
    (header.header == MAGIC).then_some(header)
}

/// Where the kernel puts itself, from its load address to the end of what it needs until it has found its memory:
/// a relocatable kernel below its preferred address moves there.
fn kernel_range(header: &setup_header) -> (u64, u64) {
    let start = header.pref_address.max(layout::HIGH_MEMORY);
    (layout::HIGH_MEMORY, start.saturating_add(header.init_size.into()))
}

/// The part of the file that is put into memory: everything behind the real-mode set-up code; none if some of it is missing.
fn payload(header: &setup_header, file_len: u64) -> Option<Range<u64>> {
    // Sect. "Details of header fields": 0 stands for 4, and the boot sector is not counted.
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let start = (sectors + 1) * 512;
    let len = u64::from(header.syssize) * 16;
    // The size is counted in paragraphs, the last of which the file may lack in part.
    (len > 0 && start + len < file_len + 16).then_some(start..file_len)
}

pub(super) fn load(
    memory: &GuestMemoryMmap<()>,
    size: u64,
    source: &BootSource<'_>,
    header: setup_header,
) -> Result<Loaded, BootError> {
    let (kernel, name) = source.kernel;
    let unbootable = |reason: String| BootError::Unbootable { file: name.to_path_buf(), reason };
    let version = header.version;
    if version < MIN_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unbootable(format!(
            "boot protocol {}.{:02} without 64-bit entry; an x86_64 kernel of the last ten years has it",
            version >> 8,
            version & 0xff
        )));
    }
    let low_end = boot::low_ram_end(memory);
    let (_, needed) = kernel_range(&header);
    if needed > low_end {
        return Err(BootError::KernelTooLarge { file: name.to_path_buf(), needed, memory: size });
    }
    let limit = low_end.min(u64::from(header.initrd_addr_max) + 1);
    let initrd = boot::place_initrd(source, needed, limit)?;
    boot::write_cmdline(memory, source.cmdline, (layout::CMDLINE_MAX - 1).min(header.cmdline_size as usize))?;

    let payload = payload(&header, kernel.metadata().map_err(BootError::read(name))?.len())
        .ok_or_else(|| unbootable("it is cut short".into()))?;
    // The kernel's own pages end where it says it needs; what is read must lie inside that.
    if payload.end - payload.start > needed - layout::HIGH_MEMORY {
        return Err(unbootable("it is larger than its header says".into()));
    }
    let (at, len) = (GuestAddress(layout::HIGH_MEMORY), payload.end - payload.start);
    memory::fill(memory, at, kernel, payload.start, len).map_err(BootError::read(name))?;

    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI_TABLES.start, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.code32_start = layout::HIGH_MEMORY as u32;
    if let Some(initrd) = initrd {
        // Below 4 GiB: `limit` is.
        params.hdr.ramdisk_image = initrd.base as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    let map = e820::map(size);
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.base, size: range.len, r#type: range.kind };
    }
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, GuestAddress(layout::BOOT_PARAMS))?;
    Ok(Loaded { entry: EntryPoint::Linux64 { address: layout::HIGH_MEMORY + ENTRY_64_OFFSET }, initrd })
}
