//! Sharp edges of the snapshot table.

use proptest::prelude::*;

use crate::*;

fn geometry(version: u32) -> Geometry {
    Geometry {
        cluster_bits: ClusterBits::DEFAULT,
        version,
        extended_l2: false,
        has_data_file: false,
        refcount_order: 4,
    }
}

fn snapshot() -> Snapshot {
    Snapshot {
        l1_table_offset: HostOffset::new(0x70000),
        l1_size: 2,
        id: b"1".to_vec(),
        name: b"before".to_vec(),
        date_sec: 1_700_000_000,
        date_nsec: 5,
        vm_clock_nsec: 7,
        vm_state_size: 6 << 30,
        disk_size: Some(1 << 30),
        icount: Some(u64::MAX),
        unknown_extra: b"later".to_vec(),
    }
}

fn encode(snapshot: &Snapshot, version: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    snapshot.encode(&geometry(version), &mut bytes).unwrap();
    bytes
}

#[test]
fn edge_35_entries_are_8_aligned_and_keep_unknown_extra_data() {
    let bytes = encode(&snapshot(), 3);
    assert_eq!(bytes.len(), (40usize + 24 + 5 + 1 + 6).next_multiple_of(8));
    assert_eq!(Snapshot::parse(&bytes, &geometry(3)), Ok((snapshot(), bytes.len())));
}

#[test]
fn edge_35_vm_state_size_of_64_bits_overrides_the_one_of_32() {
    let mut bytes = encode(&snapshot(), 3);
    // 6 GiB do not fit 32 bits.
    assert_eq!(bytes[32..36], [0; 4]);
    bytes[32..36].copy_from_slice(&77u32.to_be_bytes());
    assert_eq!(Snapshot::parse(&bytes, &geometry(3)).unwrap().0.vm_state_size, 6 << 30);
}

#[test]
fn edge_35_version_2_entry_without_extra_data_has_the_32_bit_size() {
    let mut bytes = vec![0; 48];
    bytes[5] = 7;
    bytes[11] = 1;
    bytes[13] = 1;
    bytes[35] = 77;
    bytes[40] = b'1';
    let (snapshot, len) = Snapshot::parse(&bytes, &geometry(2)).unwrap();
    assert_eq!((snapshot.vm_state_size, snapshot.disk_size, snapshot.icount, len), (77, None, None, 48));
    assert!(snapshot.is_complete(&geometry(2)) && !snapshot.is_complete(&geometry(3)));
}

#[test]
fn edge_35_version_3_needs_16_bytes_of_extra_data_on_writing() {
    let incomplete = Snapshot { disk_size: None, icount: None, unknown_extra: Vec::new(), ..snapshot() };
    assert!(incomplete.encode(&geometry(3), &mut Vec::new()).is_err());
    let bytes = encode(&incomplete, 2);
    assert_eq!(bytes[36..40], 8u32.to_be_bytes());
    // QEMU opens such an image of version 3, and its check reports it.
    assert!(!Snapshot::parse(&bytes, &geometry(3)).unwrap().0.is_complete(&geometry(3)));
}

#[test]
fn edge_35_gap_in_the_extra_data_cannot_be_written() {
    for gap in [Snapshot { disk_size: None, ..snapshot() }, Snapshot { icount: None, ..snapshot() }] {
        assert!(gap.encode(&geometry(2), &mut Vec::new()).is_err());
    }
}

#[test]
fn edge_08_extra_data_of_1_kib_is_the_most() {
    let large = Snapshot { unknown_extra: vec![1; 1000], ..snapshot() };
    let mut bytes = encode(&large, 3);
    assert_eq!(Snapshot::parse(&bytes, &geometry(3)).unwrap().0, large);
    let larger = Snapshot { unknown_extra: vec![1; 1001], ..snapshot() };
    assert!(larger.encode(&geometry(3), &mut Vec::new()).is_err());
    for len in [1025, u32::MAX] {
        bytes[36..40].copy_from_slice(&len.to_be_bytes());
        assert!(matches!(Snapshot::parse(&bytes, &geometry(3)), Err(FormatError::OutOfRange { .. })), "{len}");
    }
}

#[test]
fn edge_08_snapshot_table_is_bounded_in_entries_and_bytes() {
    assert!(matches!(Snapshot::parse_table(&[], 65537, &geometry(3)), Err(FormatError::OutOfRange { .. })));
    assert!(matches!(Snapshot::parse_table(&[], u32::MAX, &geometry(3)), Err(FormatError::OutOfRange { .. })));
    assert!(matches!(Snapshot::parse_table(&[], 65536, &geometry(3)), Err(FormatError::TooShort { .. })));
    // 1024 names of 64 KiB are over 64 MiB.
    let long = Snapshot { name: vec![b'n'; 65535], ..snapshot() };
    let table = encode(&long, 3).repeat(1024);
    let too_long = Err(FormatError::SnapshotTableTooLong { overhanging: 2 });
    assert_eq!(Snapshot::parse_table(&table, 1024, &geometry(3)), too_long);
    let mut table = encode(&snapshot(), 3).repeat(2);
    Snapshot::set_extra_len(&mut table[80..], 1025);
    let too_much = Err(FormatError::SnapshotExtraData { index: 1, len: 1025 });
    assert_eq!(Snapshot::parse_table(&table, 2, &geometry(3)), too_much);
    assert!(Snapshot::encode_table(&vec![long; 1024], &geometry(3)).is_err());
}

#[test]
fn truncated_snapshot_table_is_refused_at_every_length() {
    let bytes = encode(&snapshot(), 3);
    let needed = 40 + 24 + 5 + 1 + 6;
    for len in 0..needed {
        assert!(Snapshot::parse(&bytes[..len], &geometry(3)).is_err(), "{len}");
    }
    // The last entry's padding may be missing.
    assert_eq!(Snapshot::parse(&bytes[..needed], &geometry(3)).unwrap().1, needed);
}

#[test]
fn edge_39_snapshots_own_l1_table_is_validated() {
    for (offset, size) in [(0, 2), (0x70200, 2), (1 << 56, 2), (0x70000, (4 << 20) + 1), (0x70000, u32::MAX)] {
        let mut bytes = encode(&snapshot(), 3);
        bytes[..8].copy_from_slice(&u64::to_be_bytes(offset));
        bytes[8..12].copy_from_slice(&size.to_be_bytes());
        let error = Snapshot::parse(&bytes, &geometry(3)).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Corrupt, "{offset:#x} {size}");
        let wrong = Snapshot { l1_table_offset: HostOffset::new(offset), l1_size: size, ..snapshot() };
        assert!(wrong.encode(&geometry(3), &mut Vec::new()).is_err());
    }
}

proptest! {
    #[test]
    fn tables_round_trip(
        names in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..6),
        extra in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let table: Vec<_> = names.into_iter().map(|name| Snapshot { name, unknown_extra: extra.clone(), ..snapshot() }).collect();
        let mut bytes = Snapshot::encode_table(&table, &geometry(3)).unwrap();
        let len = bytes.len();
        bytes.extend_from_slice(&[0xff; 10]);
        let count = u32::try_from(table.len()).unwrap();
        prop_assert_eq!(Snapshot::parse_table(&bytes, count, &geometry(3)), Ok((table, len)));
    }

    #[test]
    fn random_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in any::<u32>()) {
        let _ = Snapshot::parse_table(&bytes, count, &geometry(3));
    }
}
