//! Whatever the format's types can say is written, and read back as it was: of every field and in every geometry.

use proptest::prelude::*;

use crate::{
    BitmapFlags, BitmapKind, BitmapTableEntry, ClusterBits, CompressedRange, DirectoryEntry, Geometry, HostOffset,
    L1Entry, L2Entry, L2Kind, RefTableEntry, Snapshot, Subcluster, SubclusterBitmap, refcount,
};

fn geometries() -> impl Strategy<Value = Geometry> {
    (9u32..=21, 2u32..=3, any::<bool>(), any::<bool>(), 0u32..=6).prop_map(
        |(bits, version, extended, external, order)| Geometry {
            cluster_bits: ClusterBits::new(bits).unwrap(),
            version,
            extended_l2: version == 3 && extended && bits >= 14,
            has_data_file: version == 3 && external,
            refcount_order: if version == 2 { 4 } else { order },
        },
    )
}

/// The start of a cluster that an entry can name; not the header's.
fn place(geometry: &Geometry, number: u64) -> HostOffset {
    let bits = geometry.cluster_bits.bits();
    HostOffset::new((1 + number % ((1 << (56 - bits)) - 1)) << bits)
}

proptest! {
    #[test]
    fn l1_and_refcount_table_entries(geometry in geometries(), number in any::<u64>(), copied in any::<bool>()) {
        let host = place(&geometry, number);
        let entry = L1Entry::from_raw(L1Entry::new(host, copied).unwrap().raw());
        prop_assert_eq!(entry.offset(&geometry), Ok(Some(host)));
        prop_assert_eq!(entry.copied(), copied);
        prop_assert_eq!(entry.with_copied(!copied).copied(), !copied);
        let entry = RefTableEntry::from_raw(RefTableEntry::new(host).unwrap().raw());
        prop_assert_eq!(entry.offset(&geometry), Ok(Some(host)));
    }

    #[test]
    fn l2_entries(geometry in geometries(), number in any::<u64>(), copied in any::<bool>()) {
        let host = place(&geometry, number);
        let data = L2Entry::data(host, copied).unwrap();
        prop_assert_eq!(L2Entry::from_raw(data.raw()).decode(&geometry), Ok(L2Kind::Data { host, copied }));
        if geometry.version == 3 && !geometry.extended_l2 {
            for host in [None, Some(host)] {
                // Without a place there is nothing to be the only reference to.
                let copied = copied && host.is_some();
                let zero = L2Entry::zero(host, copied).unwrap();
                prop_assert_eq!(L2Entry::from_raw(zero.raw()).decode(&geometry), Ok(L2Kind::Zero { host, copied }));
            }
        }
    }

    #[test]
    fn compressed_entries(geometry in geometries(), at in any::<u64>(), len in any::<u64>()) {
        let size = geometry.cluster_bits.size();
        let geometry = Geometry { has_data_file: false, ..geometry };
        let range = CompressedRange { host: HostOffset::new(size + at % (1 << 40)), len: 1 + len % size };
        let Ok(entry) = L2Entry::compressed(range, &geometry) else {
            return Err(TestCaseError::fail("a range of at most a cluster can be written"));
        };
        let Ok(L2Kind::Compressed(found)) = L2Entry::from_raw(entry.raw()).decode(&geometry) else {
            return Err(TestCaseError::fail("it is not read as compressed"));
        };
        prop_assert_eq!(found.host, range.host);
        prop_assert!((range.len..range.len + 512).contains(&found.len));
    }

    #[test]
    fn subclusters(kinds in proptest::collection::vec(0u8..3, 32)) {
        let kind = |kind| [Subcluster::Unallocated, Subcluster::Zero, Subcluster::Allocated][usize::from(kind)];
        let mut bitmap = SubclusterBitmap::NONE;
        for (index, &which) in (0u32..).zip(&kinds) {
            bitmap = bitmap.with_range(index, 1, kind(which));
        }
        let again = SubclusterBitmap::from_raw(bitmap.raw());
        let mut at = 0;
        // By runs, which cover each subcluster once.
        while at < 32 {
            let (found, count) = again.run(at).unwrap();
            prop_assert!(count >= 1 && at + count <= 32);
            prop_assert!((at..at + count).all(|i| kind(kinds[i as usize]) == found));
            prop_assert!(at + count == 32 || kind(kinds[(at + count) as usize]) != found);
            at += count;
        }
    }

    #[test]
    fn refcount_blocks(order in 0u32..=6, counts in proptest::collection::vec(any::<u64>(), 1..200)) {
        let mut block = vec![0xa5; ((counts.len() << order).div_ceil(8)).next_multiple_of(8)];
        for (i, count) in counts.iter().enumerate() {
            refcount::set(order, &mut block, i, count & refcount::max(order)).unwrap();
        }
        for (i, count) in counts.iter().enumerate() {
            prop_assert_eq!(refcount::get(order, &block, i), Ok(count & refcount::max(order)));
        }
    }

    #[test]
    fn snapshot_tables_of_every_field(
        geometry in geometries(),
        fields in proptest::collection::vec(
            (
                (proptest::collection::vec(any::<u8>(), 0..30), proptest::collection::vec(any::<u8>(), 0..300)),
                (any::<u64>(), 0u32..1 << 16, any::<u64>(), any::<u64>()),
                (any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>()),
                proptest::collection::vec(any::<u8>(), 0..50),
            ),
            0..5,
        ),
    ) {
        let snapshot = |((id, name), (at, l1_size, state, size), (sec, nsec, clock, icount), extra)| Snapshot {
            l1_table_offset: place(&geometry, at),
            l1_size,
            id,
            name,
            date_sec: sec,
            date_nsec: nsec,
            vm_clock_nsec: clock,
            vm_state_size: state,
            disk_size: Some(size),
            icount: Some(icount),
            unknown_extra: extra,
        };
        let table: Vec<_> = fields.into_iter().map(snapshot).collect();
        let bytes = Snapshot::encode_table(&table, &geometry).unwrap();
        let count = u32::try_from(table.len()).unwrap();
        prop_assert_eq!(Snapshot::parse_table(&bytes, count, &geometry), Ok((table, bytes.len())));
    }

    #[test]
    fn bitmap_directories_and_tables(
        geometry in geometries(),
        entries in proptest::collection::vec(
            (
                (any::<u64>(), 0u32..=256, 0u32..8, 9u8..=31),
                proptest::collection::vec(any::<u8>(), 1..60),
                proptest::collection::vec(any::<u8>(), 0..40),
            ),
            0..6,
        ),
        number in any::<u64>(),
    ) {
        let entry = |((at, size, flags, granularity_bits), name, extra_data)| DirectoryEntry {
            table_offset: place(&geometry, at),
            table_size: size,
            flags: BitmapFlags::from_bits_truncate(flags),
            kind: BitmapKind::DirtyTracking,
            granularity_bits,
            name,
            extra_data,
        };
        let directory: Vec<_> = entries.into_iter().map(entry).collect();
        let mut bytes = Vec::new();
        directory.iter().for_each(|entry| entry.encode(&geometry, &mut bytes).unwrap());
        let count = u32::try_from(directory.len()).unwrap();
        prop_assert_eq!(DirectoryEntry::parse_directory(&bytes, count, &geometry), Ok(directory));
        for entry in [BitmapTableEntry::AllZeros, BitmapTableEntry::AllOnes, BitmapTableEntry::Cluster(place(&geometry, number))] {
            prop_assert_eq!(BitmapTableEntry::decode(entry.encode().unwrap(), &geometry), Ok(entry));
        }
    }
}
