use cowhand_qcow2::ClusterBits;

use super::*;

fn refcounts(bits: u32, refcount_order: u32, entries: u64, file_clusters: u64) -> Refcounts {
    let cluster_bits = ClusterBits::new(bits).unwrap();
    let geometry = Geometry { cluster_bits, version: 3, extended_l2: false, has_data_file: false, refcount_order };
    // Blocks lie in the clusters from the second on; all clusters are in use, as far as the table reaches.
    let entry = |i: u64| RefTableEntry::new(HostOffset::new((i + 2) << bits)).unwrap();
    let table = (0..entries).map(entry).collect();
    Refcounts::new(geometry, HostOffset::new(1 << bits), table, file_clusters, None, Arc::default(), 1 << 30)
}

/// Every cluster that the growth takes, and no other, is counted in its blocks, which the new table names.
fn assert_counts_itself(refcounts: &Refcounts, growth: &Growth) {
    let grown = refcounts.build_growth(growth).unwrap();
    let bits = refcounts.geometry.cluster_bits;
    let per_block = refcounts.geometry.refcount_block_entries();
    let mut used: Vec<u64> = grown.blocks.iter().map(|b| b.1).collect();
    let table = bits.index_of(grown.offset.get());
    used.extend(table..table + bits.clusters_for(grown.table.len() as u64 * 8));
    let mut counted = Vec::new();
    for (index, place, bytes) in &grown.blocks {
        assert_eq!(grown.table[*index as usize].raw(), place << bits.bits());
        for i in 0..per_block {
            if refcount::get(refcounts.geometry.refcount_order, bytes, i as usize).unwrap() == 1 {
                counted.push(index * per_block + i);
            }
        }
    }
    assert_eq!(counted, used);
}

#[test]
fn growth_counts_all_of_itself_at_any_size_edge_29() {
    for (bits, order) in [(9, 6), (9, 5), (9, 4), (10, 6), (16, 4)] {
        let per_cluster = (1u64 << bits) / 8;
        for tables in [1, 2, 5, 64, 500, 2700, 5400] {
            let entries = tables * per_cluster;
            if entries * 8 > 4 << 20 {
                continue;
            }
            let mut refcounts = refcounts(bits, order, entries, 0);
            let growth = refcounts.plan_growth(entries).unwrap();
            assert_counts_itself(&refcounts, &growth);
        }
    }
}

#[test]
fn growth_behind_a_longer_file_counts_all_of_itself() {
    let mut refcounts = refcounts(9, 6, 64, 70_001);
    let growth = refcounts.plan_growth(64).unwrap();
    assert_counts_itself(&refcounts, &growth);
}

#[test]
fn growth_that_failed_leaves_its_place_to_nobody() {
    let mut refcounts = refcounts(9, 6, 64, 4096);
    let first = refcounts.plan_growth(64).unwrap();
    let failed = refcounts.build_growth(&first).unwrap();
    let second = refcounts.plan_growth(64).unwrap();
    let grown = refcounts.build_growth(&second).unwrap();
    let end = failed.offset.get() + failed.table.len() as u64 * 8;
    assert!(grown.blocks.iter().all(|b| b.1 << 9 >= end) && grown.offset.get() >= end);
    refcounts.grown(grown);
    // Clusters of the failed one are free, but not known to be zero.
    assert!(!refcounts.allocate(1, 1).is_ok_and(|extent| extent.zeroed && extent.host.get() < end));
}

/// Refcounts of 64 to a block, of which the first alone is there, and counts its first clusters.
fn one_block(used: u64, limit: Option<u64>, reserved: Layout) -> Refcounts {
    let cluster_bits = ClusterBits::new(9).unwrap();
    let geometry = Geometry { cluster_bits, version: 3, extended_l2: false, has_data_file: false, refcount_order: 6 };
    let mut table = vec![RefTableEntry::default(); 64];
    table[0] = RefTableEntry::new(HostOffset::new(1024)).unwrap();
    let limit = limit.map(|clusters| clusters * 512);
    let mut refcounts = Refcounts::new(geometry, HostOffset::new(512), table, used, limit, Arc::new(reserved), 1 << 20);
    let mut block = [0; 512];
    (0..used as usize).for_each(|cluster| refcount::set(6, &mut block, cluster, 1).unwrap());
    refcounts.loaded(0, &block);
    refcounts
}

/// The clusters that are given out next, and where the block with that index is afterwards.
fn given(refcounts: &mut Refcounts, wanted: u64, index: usize) -> (Range<u64>, u64) {
    let extent = refcounts.allocate(wanted, 1).unwrap();
    let first = extent.host.get() / 512;
    let clusters = first..first + extent.clusters;
    let place = refcounts.table().1[index].raw() / 512;
    assert!(clusters.clone().all(|cluster| refcounts.get(cluster).unwrap() == 1));
    assert!(place == 0 || refcounts.get(place).unwrap() == 1 && !clusters.contains(&place));
    (clusters, place)
}

#[test]
fn an_extent_goes_on_into_what_a_new_block_counts_which_lies_behind_it() {
    let mut refcounts = one_block(60, None, Layout::default());
    assert_eq!(given(&mut refcounts, 20, 1), (60..80, 80));
    assert_eq!(given(&mut refcounts, 5, 1), (81..86, 80));
    // Up to a second new block: the first one has the last cluster that it counts.
    assert_eq!(given(&mut refcounts, 500, 2), (86..191, 191));
    assert_eq!(given(&mut refcounts, 1, 3), (192..193, 193));
}

#[test]
fn a_new_block_takes_an_extents_last_cluster_where_there_is_none_behind_it() {
    let mut refcounts = one_block(60, Some(70), Layout::default());
    assert_eq!(given(&mut refcounts, 20, 1), (60..69, 69));
    assert!(matches!(refcounts.allocate(1, 1), Err(Need::Space)));
    let reserved = |clusters| {
        let part =
            super::super::layout::Part { what: super::super::layout::Structure::L1Table, clusters, shared: false };
        Layout::new(vec![part]).unwrap()
    };
    let mut refcounts = one_block(60, None, reserved(70..75));
    assert_eq!(given(&mut refcounts, 20, 1), (60..69, 69));
    // The only one that is free there.
    let mut refcounts = one_block(64, None, reserved(65..70));
    assert_eq!(given(&mut refcounts, 2, 1), (70..72, 64));
    let mut refcounts = one_block(60, None, reserved(64..70));
    assert_eq!(given(&mut refcounts, 20, 1), (60..64, 0));
    assert_eq!(given(&mut refcounts, 2, 1), (70..72, 72));
}
