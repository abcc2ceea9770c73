use super::*;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

#[test]
fn memory_of_hundreds_of_gib_lies_around_the_hole() {
    let memory = create(300 << 30).unwrap();
    assert_eq!(memory.num_regions(), 2);
    assert!(!memory.address_in_range(GuestAddress(layout::LOW_RAM_LIMIT)));
    let last = GuestAddress(layout::HIGH_RAM_BASE + (297 << 30) - 8);
    memory.write_obj(0x1234_5678_u64, last).unwrap();
    assert_eq!(memory.read_obj::<u64>(last).unwrap(), 0x1234_5678);
}

#[test]
fn regions_are_successive_parts_of_one_file() {
    let memory = create(4 << 30).unwrap();
    let offsets: Vec<u64> = memory.iter().map(|r| r.file_offset().unwrap().start()).collect();
    assert_eq!(offsets, [0, layout::LOW_RAM_LIMIT]);
}

#[test]
fn memory_too_small_or_too_large_returns_error() {
    assert!(matches!(create(4096), Err(MemoryError::Size { .. })));
    assert!(matches!(create(u64::MAX), Err(MemoryError::Size { .. })));
}

#[test]
fn fill_puts_a_files_bytes_where_they_belong() {
    use std::io::Write;
    use vm_memory::Bytes;
    let memory = create(64 << 20).unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    fill(&memory, GuestAddress(0x10_0123), &file, 777, 2_500_000).unwrap();
    let mut found = vec![0; 2_500_002];
    memory.read_slice(&mut found, GuestAddress(0x10_0122)).unwrap();
    assert_eq!(found[1..=2_500_000], bytes[777..777 + 2_500_000]);
    assert_eq!((found[0], found[2_500_001]), (0, 0));
}

#[test]
fn fill_past_the_files_end_or_outside_memory_returns_error() {
    let memory = create(64 << 20).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let early = fill(&memory, GuestAddress(0), &file, 0, 4097).unwrap_err();
    assert_eq!(early.kind(), io::ErrorKind::UnexpectedEof);
    assert!(fill(&memory, GuestAddress((64 << 20) - 4), &file, 0, 8).is_err());
    assert!(fill(&memory, GuestAddress(1 << 40), &file, 0, 8).is_err());
    assert!(fill(&memory, GuestAddress(0), &file, 0, u64::MAX).is_err());
}
