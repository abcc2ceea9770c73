use std::io::Write;

use super::*;
use crate::arch::TINY_GUEST;
use crate::memory;

const MEMORY: u64 = 64 << 20;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn source<'a>(kernel: &'a File, initrd: Option<&'a File>) -> BootSource<'a> {
    let initrd = initrd.map(|file| (file, Path::new("initrd")));
    BootSource { kernel: (kernel, Path::new("kernel")), initrd, cmdline: "console=ttyS0" }
}

fn load_bytes(kernel: &[u8], initrd: Option<&[u8]>) -> (GuestMemoryMmap<()>, Result<Loaded, BootError>) {
    let memory = memory::create(MEMORY).unwrap();
    let (kernel, initrd) = (file(kernel), initrd.map(file));
    let result = load(&memory, MEMORY, &source(&kernel, initrd.as_ref()));
    (memory, result)
}

/// A bzImage that is only a header and a payload, with the fields that matter.
fn bzimage(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    image[0x1f1] = 1; // setup_sects
    image[0x1f4..0x1f8].copy_from_slice(&(4096_u32 / 16).to_le_bytes()); // syssize
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x211] = 1; // loadflags: loaded high
    image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    image[0x236] = 1; // xloadflags: 64-bit entry
    image[0x238..0x23c].copy_from_slice(&2048_u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x100_0000_u32.to_le_bytes());
    image[1024..].fill(0xab);
    change(&mut image);
    image
}

#[test]
fn pvh_kernel_is_entered_where_its_note_says_and_told_of_its_initrd() {
    let (memory, loaded) = load_bytes(TINY_GUEST, Some(b"initrd"));
    let loaded = loaded.unwrap();
    assert!(matches!(loaded.entry, EntryPoint::Pvh { address } if address >= layout::HIGH_MEMORY));
    let info = layout::PVH_START_INFO;
    assert_eq!(memory.read_obj::<u32>(GuestAddress(info)).unwrap(), 0x336e_c578);
    let modules: u64 = memory.read_obj(GuestAddress(info + 16)).unwrap();
    let [base, len]: [u64; 2] = [0, 8].map(|at| memory.read_obj(GuestAddress(modules + at)).unwrap());
    assert_eq!(loaded.initrd, Some(InitrdRange { base, len }));
    assert_eq!((base, len), (MEMORY - 4096, 6));
}

#[test]
fn bzimage_is_loaded_high_and_entered_in_64_bit_mode() {
    let (memory, loaded) = load_bytes(&bzimage(|_| {}), Some(b"initrd"));
    let loaded = loaded.unwrap();
    assert_eq!(loaded.entry, EntryPoint::Linux64 { address: layout::HIGH_MEMORY + 0x200 });
    assert_eq!(loaded.initrd, Some(InitrdRange { base: MEMORY - 4096, len: 6 }));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(layout::HIGH_MEMORY + 4095)).unwrap(), 0xab);
    let initrd: u32 = memory.read_obj(GuestAddress(layout::BOOT_PARAMS + 0x218)).unwrap();
    assert_eq!(u64::from(initrd), MEMORY - 4096);
    let rsdp: u64 = memory.read_obj(GuestAddress(layout::BOOT_PARAMS + 0x70)).unwrap();
    assert_eq!(rsdp, layout::ACPI_TABLES.start);
    let mut cmdline = [0; 14];
    memory.read_slice(&mut cmdline, GuestAddress(layout::CMDLINE)).unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
}

#[test]
fn bzimage_without_64_bit_entry_or_too_old_returns_error() {
    for change in [(0x236, 0), (0x207, 1)] {
        let image = bzimage(|image| image[change.0] = change.1);
        assert!(matches!(load_bytes(&image, None).1, Err(BootError::Unbootable { .. })), "{change:?}");
    }
}

#[test]
fn bzimage_that_needs_more_memory_than_there_is_returns_error() {
    let image = bzimage(|image| image[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes()));
    assert!(matches!(load_bytes(&image, None).1, Err(BootError::KernelTooLarge { .. })));
    let image = bzimage(|image| image[0x258..0x260].copy_from_slice(&u64::MAX.to_le_bytes()));
    assert!(matches!(load_bytes(&image, None).1, Err(BootError::KernelTooLarge { .. })));
}

#[test]
fn bzimage_cut_short_or_larger_than_it_says_returns_error() {
    for len in [1024, 1025, 1024 + 4000] {
        let result = load_bytes(&bzimage(|_| {})[..len], None).1;
        assert!(matches!(result, Err(BootError::Unbootable { .. })), "{len}");
    }
    let image = bzimage(|image| {
        image[0x258..0x260].fill(0);
        image[0x260..0x264].copy_from_slice(&2048_u32.to_le_bytes());
    });
    assert!(matches!(load_bytes(&image, None).1, Err(BootError::Unbootable { .. })));
}

#[test]
fn initrd_that_would_reach_into_the_kernel_returns_error() {
    let (_, result) = load_bytes(&bzimage(|_| {}), Some(&vec![0; 33 << 20]));
    assert!(matches!(result, Err(BootError::InitrdTooLarge { .. })));
    assert!(load_bytes(&bzimage(|_| {}), Some(&vec![0; 32 << 20])).1.is_ok());
}

#[test]
fn initrd_stays_below_the_address_that_the_kernel_can_reach() {
    let image = bzimage(|image| image[0x22c..0x230].copy_from_slice(&0x2ff_ffff_u32.to_le_bytes()));
    let (memory, result) = load_bytes(&image, Some(b"initrd"));
    result.unwrap();
    let initrd: u32 = memory.read_obj(GuestAddress(layout::BOOT_PARAMS + 0x218)).unwrap();
    assert_eq!(initrd, 0x300_0000 - 4096);
}

#[test]
fn command_line_longer_than_the_kernel_takes_returns_error() {
    let image = bzimage(|image| image[0x238..0x23c].copy_from_slice(&8_u32.to_le_bytes()));
    assert!(matches!(load_bytes(&image, None).1, Err(BootError::CmdlineTooLong { len: 13, max: 8 })));
}

#[test]
fn command_line_with_a_zero_byte_returns_error() {
    let memory = memory::create(MEMORY).unwrap();
    assert!(matches!(write_cmdline(&memory, "a\0b", 100), Err(BootError::CmdlineZero)));
}

#[test]
fn the_tiny_guest_is_what_its_source_says() {
    let output = tempfile::NamedTempFile::new().unwrap();
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/../../resources/tiny-guest/build");
    let status = std::process::Command::new(build).arg("x86_64").arg(output.path()).status().unwrap();
    assert!(status.success());
    assert_eq!(std::fs::read(output.path()).unwrap(), TINY_GUEST, "run resources/tiny-guest/build");
}
