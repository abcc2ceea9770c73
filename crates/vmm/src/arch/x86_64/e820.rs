//! The guest's memory map, as both boot protocols hand it over.

use super::layout;

/// Memory for the kernel to use.
pub(super) const RAM: u32 = 1;
/// Not to be touched.
pub(super) const RESERVED: u32 = 2;
/// ACPI tables.
pub(super) const ACPI: u32 = 3;

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) kind: u32,
}

/// The map of a guest with `memory` bytes, in ascending order. ECAM is in it because Linux uses no ECAM that is not
/// reserved.
pub(super) fn map(memory: u64) -> Vec<Range> {
    let range = |base, end: u64, kind| Range { base, len: end - base, kind };
    let mut map = vec![
        range(0, layout::LOW_MEMORY_END, RAM),
        range(layout::LOW_MEMORY_END, 0xa_0000, RESERVED),
        range(layout::ACPI_TABLES.start, layout::ACPI_TABLES.end, ACPI),
        range(layout::BIOS.start, layout::BIOS.end, RESERVED),
    ];
    for (base, len) in layout::ram_ranges(memory) {
        map.push(range(base.max(layout::HIGH_MEMORY), base + len, RAM));
    }
    map.push(range(layout::PCI_ECAM.start, layout::PCI_ECAM.end, RESERVED));
    map.sort_unstable_by_key(|range| range.base);
    map
}

#[cfg(test)]
#[path = "e820_test.rs"]
mod tests;
