//! Sharp edges of the bitmap directory and the bitmap tables.

use proptest::prelude::*;

use crate::*;

fn geometry() -> Geometry {
    Geometry {
        cluster_bits: ClusterBits::DEFAULT,
        version: 3,
        extended_l2: false,
        has_data_file: false,
        refcount_order: 4,
    }
}

fn entry() -> DirectoryEntry {
    DirectoryEntry {
        table_offset: HostOffset::new(0x90000),
        table_size: 1,
        flags: BitmapFlags::AUTO,
        kind: BitmapKind::DirtyTracking,
        granularity_bits: 16,
        name: b"bitmap".to_vec(),
        extra_data: Vec::new(),
    }
}

fn encode(entry: &DirectoryEntry) -> Vec<u8> {
    let mut bytes = Vec::new();
    entry.encode(&geometry(), &mut bytes).unwrap();
    bytes
}

#[test]
fn edge_08_bitmap_entry_is_bounded() {
    for wrong in [
        DirectoryEntry { granularity_bits: 8, ..entry() },
        DirectoryEntry { granularity_bits: 32, ..entry() },
        DirectoryEntry { name: Vec::new(), ..entry() },
        DirectoryEntry { name: vec![b'n'; 1024], ..entry() },
        DirectoryEntry { table_size: 8193, ..entry() },
        DirectoryEntry { table_offset: HostOffset::new(0x90008), ..entry() },
        DirectoryEntry { table_offset: HostOffset::new(0), ..entry() },
        DirectoryEntry { table_offset: HostOffset::new(1 << 56), ..entry() },
        DirectoryEntry { flags: BitmapFlags::from_bits_retain(8), ..entry() },
        DirectoryEntry { extra_data: vec![0; 1025], ..entry() },
    ] {
        assert!(wrong.encode(&geometry(), &mut Vec::new()).is_err(), "{wrong:?}");
    }
    // 512 MiB in clusters of 64 KiB.
    let largest = DirectoryEntry { table_size: 8192, name: vec![b'n'; 1023], ..entry() };
    assert_eq!(DirectoryEntry::parse(&encode(&largest), &geometry()).unwrap().0, largest);
}

#[test]
fn bitmap_entry_with_a_wrong_field_in_the_file_is_refused() {
    // Flags, type, granularity, name length, extra data length, padding.
    for (at, byte) in
        [(15, 8), (12, 0x80), (16, 0), (16, 2), (17, 8), (17, 32), (19, 0), (18, 4), (21, 1), (20, 0xff), (31, 1)]
    {
        let mut bytes = encode(&entry());
        bytes[at] = byte;
        assert!(DirectoryEntry::parse(&bytes, &geometry()).is_err(), "{at} {byte}");
    }
    let bytes = encode(&entry());
    for len in 0..bytes.len() {
        assert!(DirectoryEntry::parse(&bytes[..len], &geometry()).is_err(), "{len}");
    }
}

#[test]
fn bitmap_directory_is_as_long_as_its_entries_and_names_are_unique() {
    let second = DirectoryEntry { name: b"other".to_vec(), ..entry() };
    let good = [encode(&entry()), encode(&second)].concat();
    assert_eq!(DirectoryEntry::parse_directory(&good, 2, &geometry()), Ok(vec![entry(), second]));
    assert!(DirectoryEntry::parse_directory(&good, 1, &geometry()).is_err());
    assert!(DirectoryEntry::parse_directory(&good, 3, &geometry()).is_err());
    assert!(DirectoryEntry::parse_directory(&good, u32::MAX, &geometry()).is_err());
    let twice = encode(&entry()).repeat(2);
    assert!(DirectoryEntry::parse_directory(&twice, 2, &geometry()).is_err());
}

#[test]
fn edge_40_table_entries_0_and_1_mean_all_zeros_and_all_ones() {
    let decode = |raw| BitmapTableEntry::decode(raw, &geometry());
    assert_eq!(decode(0), Ok(BitmapTableEntry::AllZeros));
    assert_eq!(decode(1), Ok(BitmapTableEntry::AllOnes));
    assert_eq!(decode(0x50000), Ok(BitmapTableEntry::Cluster(HostOffset::new(0x50000))));
    for raw in [2, 0x100, 0x50001, 0x50200, 0x8000, 1 << 56, 1 << 63 | 0x50000, u64::MAX] {
        assert_eq!(decode(raw).unwrap_err().class(), ErrorClass::Corrupt, "{raw:#x}");
    }
    for entry in
        [BitmapTableEntry::AllZeros, BitmapTableEntry::AllOnes, BitmapTableEntry::Cluster(HostOffset::new(1 << 20))]
    {
        assert_eq!(decode(entry.encode().unwrap()), Ok(entry));
    }
    assert!(BitmapTableEntry::Cluster(HostOffset::new(0)).encode().is_err());
}

#[test]
fn edge_55_bitmap_with_unknown_extra_data_is_kept_but_not_used() {
    let strange = DirectoryEntry { extra_data: b"what is this".to_vec(), ..entry() };
    assert!(!strange.is_usable());
    assert_eq!(DirectoryEntry::parse(&encode(&strange), &geometry()).unwrap().0, strange);
    let compatible = DirectoryEntry { flags: BitmapFlags::EXTRA_DATA_COMPATIBLE, ..strange };
    assert!(compatible.is_usable() && entry().is_usable());
}

#[test]
fn bitmap_data_covers_the_disk() {
    assert_eq!(entry().data_len(0), 0);
    assert_eq!(entry().data_len(1), 1);
    assert_eq!(entry().data_len(8 << 16), 1);
    assert_eq!(entry().data_len((8 << 16) + 1), 2);
    assert_eq!(DirectoryEntry { granularity_bits: 9, ..entry() }.data_len(u64::MAX), 1 << 52);
}

proptest! {
    #[test]
    fn entries_round_trip(
        name in proptest::collection::vec(any::<u8>(), 1..100),
        extra_data in proptest::collection::vec(any::<u8>(), 0..40),
        flags in 0u32..8,
        granularity_bits in 9u8..=31,
    ) {
        let entry = DirectoryEntry { name, extra_data, granularity_bits, flags: BitmapFlags::from_bits_truncate(flags), ..entry() };
        let mut bytes = encode(&entry);
        let len = bytes.len();
        prop_assert_eq!(len % 8, 0);
        bytes.extend_from_slice(&[0xff; 9]);
        prop_assert_eq!(DirectoryEntry::parse(&bytes, &geometry()), Ok((entry, len)));
    }

    #[test]
    fn random_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in any::<u32>()) {
        let _ = DirectoryEntry::parse_directory(&bytes, count, &geometry());
    }
}
