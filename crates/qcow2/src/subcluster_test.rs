//! Sharp edges of extended L2 bitmaps.

use proptest::prelude::*;

use crate::*;

const DATA: L2Kind = L2Kind::Data { host: HostOffset::new(0x50000), copied: true };

#[test]
fn edge_19_subcluster_both_allocated_and_zero_is_corrupt() {
    for bit in 0..32 {
        let both = SubclusterBitmap::from_raw(1 << bit | 1 << (bit + 32));
        assert!(both.validate(&DATA).is_err(), "{bit}");
    }
    assert!(SubclusterBitmap::from_raw(0xffff_0000_0000_ffff).validate(&DATA).is_ok());
}

#[test]
fn edge_19_allocated_subcluster_needs_a_host_cluster() {
    assert!(SubclusterBitmap::from_raw(1).validate(&L2Kind::Unallocated).is_err());
    assert!(SubclusterBitmap::ALL_ZERO.validate(&L2Kind::Unallocated).is_ok());
    assert!(SubclusterBitmap::ALL_ALLOCATED.validate(&DATA).is_ok());
}

#[test]
fn edge_19_cluster_with_nothing_allocated_may_own_a_host_cluster() {
    assert!(SubclusterBitmap::NONE.validate(&DATA).is_ok());
}

#[test]
fn edge_19_bitmap_says_nothing_of_a_compressed_cluster() {
    let compressed = L2Kind::Compressed(CompressedRange { host: HostOffset::new(0x50000), len: 512 });
    assert!(SubclusterBitmap::from_raw(u64::MAX).validate(&compressed).is_ok());
}

#[test]
fn ranges_are_set_and_read_back_as_runs() {
    let bitmap = SubclusterBitmap::NONE.with_range(4, 8, Subcluster::Allocated).with_range(8, 24, Subcluster::Zero);
    assert_eq!(bitmap.run(0), Some((Subcluster::Unallocated, 4)));
    assert_eq!(bitmap.run(4), Some((Subcluster::Allocated, 4)));
    assert_eq!(bitmap.run(5), Some((Subcluster::Allocated, 3)));
    assert_eq!(bitmap.run(8), Some((Subcluster::Zero, 24)));
    assert_eq!(bitmap.run(32), None);
    assert_eq!(SubclusterBitmap::NONE.run(0), Some((Subcluster::Unallocated, 32)));
    assert_eq!(SubclusterBitmap::NONE.with_range(31, u32::MAX, Subcluster::Zero).raw(), 1 << 63);
    assert_eq!(SubclusterBitmap::NONE.with_range(0, 32, Subcluster::Allocated), SubclusterBitmap::ALL_ALLOCATED);
}

proptest! {
    #[test]
    fn with_range_sets_those_and_no_others(raw in any::<u64>(), first in 0u32..32, count in 0u32..40, kind in 0..3) {
        let kind = [Subcluster::Unallocated, Subcluster::Zero, Subcluster::Allocated][kind as usize];
        let before = SubclusterBitmap::from_raw(raw & !(raw << 32));
        let after = before.with_range(first, count, kind);
        prop_assert!(after.validate(&DATA).is_ok());
        for i in 0..32 {
            let expected = if (first..first + count).contains(&i) { Some(kind) } else { before.get(i) };
            prop_assert_eq!(after.get(i), expected);
        }
    }
}
