use super::*;

#[test]
fn ranges_ascend_and_do_not_overlap() {
    for memory in [layout::MIN_MEMORY, 512 << 20, 3 << 30, 8 << 30, 300 << 30] {
        let map = map(memory);
        for pair in map.windows(2) {
            assert!(pair[0].base + pair[0].len <= pair[1].base, "{memory:#x}: {pair:x?}");
        }
    }
}

#[test]
fn ram_adds_up_but_for_the_area_below_1_mib() {
    let ram: u64 = map(8 << 30).iter().filter(|r| r.kind == RAM).map(|r| r.len).sum();
    assert_eq!(ram, (8 << 30) - (layout::HIGH_MEMORY - layout::LOW_MEMORY_END));
}

#[test]
fn ecam_is_reserved() {
    let ecam = &layout::PCI_ECAM;
    let range = Range { base: ecam.start, len: ecam.end - ecam.start, kind: RESERVED };
    assert!(map(4 << 30).contains(&range));
}
