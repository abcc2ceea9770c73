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
