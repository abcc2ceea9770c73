//! Tables: entries, refcounts, snapshots and bitmaps of every geometry parse without a panic, and what is accepted is
//! written back as it was.
//!
//! The input's first byte is the cluster size, the second the flags, the third a count; the rest is the table.

#![no_main]

mod memory;

use cowhand_qcow2::{
    BitmapTableEntry, ClusterBits, DirectoryEntry, Geometry, L1Entry, L2Entry, L2Kind, RefTableEntry, Snapshot,
    SubclusterBitmap, refcount,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [bits, flags, count, table @ ..] = data else { return };
    let cluster_bits = ClusterBits::new(9 + u32::from(bits % 13)).expect("9 to 21");
    let geometry = Geometry {
        cluster_bits,
        version: if flags & 1 == 0 { 3 } else { 2 },
        extended_l2: flags & 2 != 0 && cluster_bits.bits() >= 14,
        has_data_file: flags & 4 != 0,
        refcount_order: u32::from(flags >> 3) % 7,
    };
    entries(table, &geometry);
    refcounts(table, &geometry);
    snapshots(table, u32::from(*count), &geometry);
    bitmaps(table, u32::from(*count), &geometry);
});

fn entries(table: &[u8], geometry: &Geometry) {
    for word in table.chunks_exact(8) {
        let raw = u64::from_be_bytes(word.try_into().expect("8 bytes"));
        let _ = L1Entry::from_raw(raw).offset(geometry);
        let _ = RefTableEntry::from_raw(raw).offset(geometry);
        if let Ok(entry) = BitmapTableEntry::decode(raw, geometry) {
            assert_eq!(entry.encode(), Ok(raw));
        }
        let Ok(kind) = L2Entry::from_raw(raw).decode(geometry) else { continue };
        let _ = SubclusterBitmap::from_raw(raw.rotate_left(17)).validate(&kind);
        match kind {
            L2Kind::Unallocated | L2Kind::Zero { host: None, .. } => {}
            L2Kind::Zero { host, copied } => assert_eq!(L2Entry::zero(host, copied), Ok(L2Entry::from_raw(raw))),
            L2Kind::Data { host, copied } => assert_eq!(L2Entry::data(host, copied), Ok(L2Entry::from_raw(raw))),
            L2Kind::Compressed(range) => {
                assert!(range.len <= 2 * geometry.cluster_bits.size());
                assert!((1..=3).contains(&range.clusters(geometry.cluster_bits).1));
                let again = L2Entry::compressed(range, geometry).map(L2Entry::raw);
                assert_eq!(again, Ok(raw & !(1 << 63)));
            }
        }
    }
}

fn refcounts(table: &[u8], geometry: &Geometry) {
    let (order, mut copy) = (geometry.refcount_order, table.to_vec());
    for index in 0..table.len() * 8 >> order {
        let count = refcount::get(order, table, index).expect("inside the block");
        assert!(count <= refcount::max(order));
        refcount::set(order, &mut copy, index, count).expect("it was there before");
    }
    assert_eq!(copy, table);
}

fn snapshots(table: &[u8], count: u32, geometry: &Geometry) {
    let Ok((snapshots, len)) = Snapshot::parse_table(table, count, geometry) else { return };
    assert!(len <= table.len());
    if snapshots.iter().all(|s| s.is_complete(geometry)) {
        let bytes = Snapshot::encode_table(&snapshots, geometry).expect("a parsed table is written");
        let again = Snapshot::parse_table(&bytes, count, geometry).expect("a written table is read");
        assert_eq!(again, (snapshots, bytes.len()));
    }
}

fn bitmaps(table: &[u8], count: u32, geometry: &Geometry) {
    let Ok(directory) = DirectoryEntry::parse_directory(table, count, geometry) else { return };
    let mut bytes = Vec::new();
    for entry in &directory {
        entry.encode(geometry, &mut bytes).expect("a parsed entry is written");
    }
    assert_eq!(bytes, table);
}
