use super::*;

#[test]
fn ram_below_the_hole_is_one_range() {
    assert_eq!(ram_ranges(512 << 20), [(0, 512 << 20)]);
    assert_eq!(ram_ranges(LOW_RAM_LIMIT), [(0, LOW_RAM_LIMIT)]);
}

#[test]
fn ram_that_reaches_the_hole_continues_above_4_gib() {
    assert_eq!(ram_ranges(4 << 30), [(0, LOW_RAM_LIMIT), (HIGH_RAM_BASE, 1 << 30)]);
    assert_eq!(ram_ranges(300 << 30), [(0, LOW_RAM_LIMIT), (HIGH_RAM_BASE, 297 << 30)]);
}

#[test]
fn window64_lies_above_ram_and_below_the_address_limit() {
    for bits in [36, 39, 40, 46, 48, 52, 57] {
        for memory in [512 << 20, 4 << 30, 300 << 30, MAX_MEMORY] {
            let window = pci_window64(memory, bits);
            let ram_end = HIGH_RAM_BASE + memory.saturating_sub(LOW_RAM_LIMIT);
            assert!(window.is_empty() || window.start >= ram_end, "{bits} {memory:#x} {window:x?}");
            assert!(window.is_empty() || window.end <= 1 << bits.min(52), "{bits} {memory:#x} {window:x?}");
        }
    }
}

#[test]
fn window64_of_the_largest_guest_stays_below_the_hypertransport_hole() {
    assert!(pci_window64(MAX_MEMORY, 48).end <= 0xfd_0000_0000);
}
