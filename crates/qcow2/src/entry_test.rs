//! Sharp edges of L1 and L2 entries.

use proptest::prelude::*;

use crate::*;

fn geometry(bits: u32) -> Geometry {
    Geometry {
        cluster_bits: ClusterBits::new(bits).unwrap(),
        version: 3,
        extended_l2: false,
        has_data_file: false,
        refcount_order: 4,
    }
}

const G: fn() -> Geometry = || geometry(16);
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

fn decode(raw: u64, geometry: Geometry) -> Result<L2Kind, FormatError> {
    L2Entry::from_raw(raw).decode(&geometry)
}

fn host(at: u64) -> HostOffset {
    HostOffset::new(at)
}

#[test]
fn l1_entry_reads_offset_and_copied() {
    let entry = L1Entry::from_raw(COPIED | 0x50000);
    assert_eq!(entry.offset(&G()), Ok(Some(host(0x50000))));
    assert!(entry.copied());
    assert_eq!(L1Entry::new(host(0x50000), true), Ok(entry));
    assert_eq!(L1Entry::UNALLOCATED.offset(&G()), Ok(None));
}

#[test]
fn edge_18_l1_entry_with_unaligned_offset_or_reserved_bits_is_corrupt() {
    assert!(matches!(L1Entry::from_raw(0x50200).offset(&G()), Err(FormatError::Misaligned { value: 0x50200, .. })));
    for bit in (0..9).chain(56..63) {
        let error = L1Entry::from_raw(0x50000 | 1 << bit).offset(&G());
        assert_eq!(error.unwrap_err().class(), ErrorClass::Corrupt, "bit {bit}");
    }
}

#[test]
fn edge_18_entries_for_the_header_or_past_2_56_cannot_be_made() {
    for offset in [0, 1, 0x10100, 1 << 56, COPIED] {
        assert!(L1Entry::new(host(offset), false).is_err(), "{offset:#x}");
        assert!(L2Entry::data(host(offset), false).is_err(), "{offset:#x}");
        assert!(L2Entry::zero(Some(host(offset)), false).is_err(), "{offset:#x}");
        assert!(RefTableEntry::new(host(offset)).is_err(), "{offset:#x}");
    }
}

#[test]
fn edge_14_copied_is_never_on_a_compressed_entry() {
    let range = CompressedRange { host: host(0x50123), len: 1000 };
    let entry = L2Entry::compressed(range, &G()).unwrap();
    assert!(!entry.copied());
    assert_eq!(entry.with_copied(true), entry);
    // QEMU reads such an entry, and its check reports it.
    let odd = L2Entry::from_raw(entry.raw() | COPIED);
    assert_eq!(odd.decode(&G()), entry.decode(&G()));
    assert_eq!(odd.with_copied(true), entry);
}

#[test]
fn edge_14_with_copied_changes_nothing_but_the_flag() {
    let data = L2Entry::data(host(0x50000), false).unwrap();
    assert_eq!(data.with_copied(true), L2Entry::data(host(0x50000), true).unwrap());
    assert_eq!(data.with_copied(true).with_copied(false), data);
    assert_eq!(L2Entry::UNALLOCATED.with_copied(true), L2Entry::UNALLOCATED);
    let plain_zero = L2Entry::zero(None, true).unwrap();
    assert_eq!(plain_zero.with_copied(true), plain_zero);
    assert_eq!(L1Entry::UNALLOCATED.with_copied(true), L1Entry::UNALLOCATED);
}

#[test]
fn edge_15_compressed_is_tested_before_zero_and_zero_before_offset_0() {
    // Bit 0 of a compressed entry is a bit of the offset.
    let odd = decode(COMPRESSED | 0x50001, G()).unwrap();
    assert_eq!(odd, L2Kind::Compressed(CompressedRange { host: host(0x50001), len: 511 }));
    assert_eq!(decode(1, G()), Ok(L2Kind::Zero { host: None, copied: false }));
    assert_eq!(decode(0, G()), Ok(L2Kind::Unallocated));
}

#[test]
fn edge_16_offset_0_with_copied_is_a_cluster_of_a_data_file_only() {
    let external = Geometry { has_data_file: true, ..G() };
    assert_eq!(decode(COPIED, external), Ok(L2Kind::Data { host: host(0), copied: true }));
    assert_eq!(decode(COPIED | 1, external), Ok(L2Kind::Zero { host: Some(host(0)), copied: true }));
    assert_eq!(decode(0, external), Ok(L2Kind::Unallocated));
    assert_eq!(decode(COPIED, G()), Ok(L2Kind::Unallocated));
    assert_eq!(decode(COPIED | 1, G()), Ok(L2Kind::Zero { host: None, copied: false }));
    assert_eq!(L2Entry::data(host(0), true).unwrap().raw(), COPIED);
}

#[test]
fn edge_16_data_file_clusters_lie_at_their_guest_offset() {
    let external = Geometry { has_data_file: true, ..G() };
    assert!(external.check_data_file_mapping(GuestOffset::new(0x51234), host(0x50000)).is_ok());
    assert!(external.check_data_file_mapping(GuestOffset::new(0x51234), host(0x60000)).is_err());
    assert!(G().check_data_file_mapping(GuestOffset::new(0x51234), host(0x60000)).is_ok());
}

#[test]
fn edge_17_zero_bit_in_version_2_or_extended_l2_is_corrupt() {
    for wrong in [Geometry { version: 2, ..G() }, Geometry { extended_l2: true, ..G() }] {
        for raw in [1, 0x50001, COPIED | 0x50001] {
            assert!(matches!(decode(raw, wrong), Err(FormatError::ReservedBits { reserved: 1, .. })), "{raw:#x}");
        }
    }
}

#[test]
fn edge_17_zero_with_an_offset_is_preallocated() {
    assert_eq!(decode(COPIED | 0x50001, G()), Ok(L2Kind::Zero { host: Some(host(0x50000)), copied: true }));
    assert_eq!(decode(0x50001, G()), Ok(L2Kind::Zero { host: Some(host(0x50000)), copied: false }));
}

#[test]
fn edge_18_l2_entry_with_unaligned_offset_or_reserved_bits_is_corrupt() {
    for offset in [0x200, 0x8000, 0x50200] {
        assert!(matches!(decode(offset, G()), Err(FormatError::Misaligned { .. })), "{offset:#x}");
        assert!(matches!(decode(offset | 1, G()), Err(FormatError::Misaligned { .. })), "{offset:#x}");
    }
    for bit in (1..9).chain(56..62) {
        assert!(matches!(decode(0x50000 | 1 << bit, G()), Err(FormatError::ReservedBits { .. })), "bit {bit}");
    }
}

#[test]
fn edge_22_compressed_length_counts_from_the_offset_to_the_last_sectors_end() {
    // 64 KiB clusters: x = 54, so sectors − 1 stand in bits 54 to 61.
    let raw = COMPRESSED | 5 << 54 | 0x5_0123;
    let range = CompressedRange { host: host(0x5_0123), len: 6 * 512 - 0x123 };
    assert_eq!(decode(raw, G()), Ok(L2Kind::Compressed(range)));
    assert_eq!(range.end() % 512, 0);
}

#[test]
fn edge_22_smallest_and_largest_clusters_place_the_fields_apart() {
    let small = decode(COMPRESSED | 1 << 61 | 0x1_0001, geometry(9));
    assert_eq!(small, Ok(L2Kind::Compressed(CompressedRange { host: host(0x1_0001), len: 1023 })));
    let large = decode(COMPRESSED | 0x1fff << 49 | 0x1ff_ffff_ffff_ffff & ((1 << 49) - 1), geometry(21));
    let range = CompressedRange { host: host((1 << 49) - 1), len: 0x2000 * 512 - 511 };
    assert_eq!(large, Ok(L2Kind::Compressed(range)));
}

#[test]
fn edge_22_compressed_offset_bits_beyond_55_are_corrupt() {
    assert!(matches!(decode(COMPRESSED | 1 << 56 | 0x50000, geometry(9)), Err(FormatError::ReservedBits { .. })));
}

#[test]
fn edge_18_compressed_data_in_the_header_is_corrupt() {
    assert!(matches!(decode(COMPRESSED, G()), Err(FormatError::InsideHeader { .. })));
    assert!(matches!(decode(COMPRESSED | 0xffff, G()), Err(FormatError::InsideHeader { .. })));
}

#[test]
fn edge_23_compressed_data_names_every_cluster_that_it_touches() {
    let bits = ClusterBits::DEFAULT;
    let clusters = |at, len| CompressedRange { host: host(at), len }.clusters(bits);
    assert_eq!(clusters(0x50000, 0x10000), (host(0x50000), 1));
    assert_eq!(clusters(0x50001, 0x10000), (host(0x50000), 2));
    assert_eq!(clusters(0x5fe00, 512), (host(0x50000), 1));
    assert_eq!(clusters(0x5fe00, 513), (host(0x50000), 2));
    assert_eq!(clusters(0x5fe00, 0), (host(0x50000), 1));
}

#[test]
fn edge_26_compressed_clusters_exclude_a_data_file() {
    let external = Geometry { has_data_file: true, ..G() };
    assert!(decode(COMPRESSED | 0x50000, external).is_err());
    assert!(L2Entry::compressed(CompressedRange { host: host(0x50000), len: 1 }, &external).is_err());
}

#[test]
fn edge_49_compressed_offset_is_bounded_by_the_field() {
    let range = |at| CompressedRange { host: host(at), len: 1 };
    for (bits, end) in [(9, 1 << 56), (14, 1 << 56), (16, 1 << 54), (21, 1u64 << 49)] {
        let geometry = geometry(bits);
        assert_eq!(geometry.compressed_offset_end(), end);
        assert!(L2Entry::compressed(range(end - 1), &geometry).is_ok(), "{bits}");
        assert!(L2Entry::compressed(range(end), &geometry).is_err(), "{bits}");
    }
}

#[test]
fn compressed_length_out_of_bounds_cannot_be_encoded() {
    let encode = |at, len| L2Entry::compressed(CompressedRange { host: host(at), len }, &G());
    assert!(encode(0x50000, 0).is_err());
    assert!(encode(0x50000, 256 * 512).is_ok());
    assert!(encode(0x50000, 256 * 512 + 1).is_err());
    assert!(encode(0x50001, 256 * 512).is_err());
    assert!(encode(0x50001, u64::MAX).is_err());
}

#[test]
fn edge_36_vm_state_lies_at_the_first_l1_entry_past_the_disk() {
    let covered = G().l2_coverage();
    assert_eq!(covered, 512 << 20);
    for (size, at) in [(0, 0), (1, covered), (covered, covered), (covered + 1, 2 * covered)] {
        assert_eq!(G().vm_state_offset(size), Some(GuestOffset::new(at)));
    }
    assert_eq!(G().vm_state_offset(u64::MAX), None);
}

#[test]
fn indices_split_a_guest_offset_and_come_together_again() {
    for bits in 9..=21 {
        for extended_l2 in [false, bits >= 14] {
            let g = Geometry { extended_l2, ..geometry(bits) };
            for offset in [0, 511, 512, 0x1234_5678_9abc, (1 << 56) - 1, u64::MAX] {
                let guest = GuestOffset::new(offset);
                let cluster = g.l1_index(guest) * g.l2_entries() + g.l2_index(guest);
                assert_eq!((cluster << bits) + g.cluster_bits.offset_in(offset), offset);
                let within = g.subcluster_index(guest) * g.subcluster_size();
                assert!(g.cluster_bits.offset_in(offset) - within < g.subcluster_size());
            }
        }
    }
}

#[test]
fn refcount_indices_split_a_host_offset() {
    let g = Geometry { refcount_order: 0, ..geometry(9) };
    assert_eq!((g.refcount_block_entries(), g.refcount_block_coverage()), (4096, 2 << 20));
    assert_eq!((g.refcount_table_index(host(0x20_0200)), g.refcount_block_index(host(0x20_0200))), (1, 1));
}

#[test]
fn cluster_arithmetic_is_checked() {
    let bits = ClusterBits::DEFAULT;
    assert_eq!((bits.align_down(0x1ffff), bits.align_up(0x10001)), (0x10000, Some(0x20000)));
    assert_eq!(bits.align_up(u64::MAX), None);
    assert_eq!((bits.clusters_for(0), bits.clusters_for(1), bits.clusters_for(0x10001)), (0, 1, 2));
    assert_eq!(host(u64::MAX).checked_add(1), None);
    assert_eq!(format!("{}", host(0x1000)), "0x1000");
    assert!(ClusterBits::new(8).is_err() && ClusterBits::new(22).is_err());
}

proptest! {
    #[test]
    fn every_decoded_entry_encodes_to_itself(raw in any::<u64>(), bits in 9u32..=21, version in 2u32..=3, flags in 0..4) {
        let g = Geometry { version, extended_l2: flags & 1 != 0 && bits >= 14, has_data_file: flags & 2 != 0, ..geometry(bits) };
        // Random offsets are hardly ever aligned: make the half of them so.
        let raw = if raw & 2 == 0 { raw & !((g.cluster_bits.size() - 2) & !1) & !(0x3f << 56) } else { raw };
        match L2Entry::from_raw(raw).decode(&g) {
            Ok(L2Kind::Data { host, copied }) => prop_assert_eq!(L2Entry::data(host, copied).unwrap().raw(), raw),
            Ok(L2Kind::Zero { host: Some(host), copied }) => {
                prop_assert_eq!(L2Entry::zero(Some(host), copied).unwrap().raw(), raw);
            }
            Ok(L2Kind::Zero { host: None, .. }) => prop_assert_eq!(raw & !COPIED, 1),
            Ok(L2Kind::Unallocated) => prop_assert_eq!(raw & !COPIED, 0),
            Ok(L2Kind::Compressed(range)) => {
                prop_assert_eq!(L2Entry::compressed(range, &g).unwrap().raw(), raw & !COPIED);
            }
            Err(error) => prop_assert_eq!(error.class(), ErrorClass::Corrupt),
        }
    }

    #[test]
    fn compressed_ranges_cover_what_was_asked(at in 0u64..1 << 49, len in 1u64..1 << 21, bits in 9u32..=21) {
        let g = geometry(bits);
        let asked = CompressedRange { host: HostOffset::new(at), len };
        if let Ok(entry) = L2Entry::compressed(asked, &g) {
            let Ok(L2Kind::Compressed(got)) = entry.decode(&g) else { panic!("it decodes") };
            prop_assert_eq!(got.host, asked.host);
            prop_assert!(got.len >= len && got.len - len < 512);
        } else {
            prop_assert!(at < g.cluster_bits.size() || at % 512 + len > g.cluster_bits.size() * 2);
        }
    }
}

#[test]
fn a_check_sees_through_reserved_bits_and_gets_offsets_that_are_wrong() {
    for bit in (0..9).chain(56..63) {
        let entry = L1Entry::from_raw(COPIED | 0x50000 | 1 << bit);
        assert_eq!(entry.without_reserved().offset(&G()), Ok(Some(host(0x50000))), "bit {bit}");
        assert!(entry.without_reserved().copied());
    }
    assert_eq!(L1Entry::from_raw(COPIED | 0x50200 | 7).offset_bits(), 0x50200);
    assert_eq!(L2Entry::from_raw(COPIED | 0x50200 | 7).offset_bits(), 0x50200);

    let v2 = Geometry { version: 2, ..G() };
    let zero = L2Entry::from_raw(0x50000 | 0x155);
    assert_eq!(zero.without_reserved(&G()).raw(), 0x50001);
    assert_eq!(zero.without_reserved(&v2).raw(), 0x50000);
    let compressed = L2Entry::from_raw(COMPRESSED | 0x50155);
    assert_eq!(compressed.without_reserved(&G()), compressed);
}
