use cowhand_qcow2::ClusterBits;

use super::*;

const M: u64 = 1 << 20;

fn geometry(cluster_bits: u32, version: u32) -> Geometry {
    let cluster_bits = ClusterBits::new(cluster_bits).unwrap();
    Geometry { cluster_bits, version, extended_l2: false, has_data_file: false, refcount_order: 4 }
}

/// What is kept of an image of `size` bytes in clusters of 64 KiB.
fn kept(tuning: Tuning, size: u64) -> Result<Option<u64>, String> {
    tuning.metadata_cache(&geometry(16, 3), size)
}

fn sizes(total: u64, l2: u64, refcounts: u64) -> Tuning {
    let given = |size| Some(size).filter(|&size| size != 0);
    Tuning { total: given(total), l2: given(l2), refcounts: given(refcounts), ..Tuning::default() }
}

#[test]
fn what_is_said_is_kept_as_far_as_tables_reach() {
    // 64 MiB have 8 KiB of L2 entries, which is one cluster.
    assert_eq!(kept(Tuning::default(), 64 * M), Ok(None));
    assert_eq!(kept(sizes(0, M, 0), 64 * M), Ok(Some(5 << 16)));
    assert_eq!(kept(sizes(0, 0, M), 64 * M), Ok(Some(M + (1 << 16))));
    assert_eq!(kept(sizes(2 * M, 0, 0), 64 * M), Ok(Some(2 * M)));
    assert_eq!(kept(sizes(2 * M, M, 0), 64 * M), Ok(Some(2 * M)));
    assert_eq!(kept(sizes(0, 64 * M, 0), 1 << 40), Ok(Some(64 * M + (4 << 16))));
}

#[test]
fn what_cannot_be_is_said_in_qemus_words() {
    let all = "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time";
    let entry = |entry| Tuning { entry: Some(entry), ..Tuning::default() };
    let bad_entry = "L2 cache entry size must be a power of two between 512 and the cluster size (65536)";
    for (tuning, said) in [
        (sizes(M, 1, 1), all),
        (sizes(M, 2 * M, 0), "l2-cache-size may not exceed cache-size"),
        (sizes(M, 0, 2 * M), "refcount-cache-size may not exceed cache-size"),
        (sizes(0, 0, 256 << 40), "Refcount cache size too big"),
        (entry(256), bad_entry),
        (entry(4242), bad_entry),
        (entry(128 << 10), bad_entry),
    ] {
        assert_eq!(kept(tuning, 64 * M), Err(said.into()));
    }
    for good in [512, 16 << 10, 64 << 10] {
        assert_eq!(kept(entry(good), 64 * M), Ok(None));
    }
    let many = Tuning { l2: Some(1 << 40), entry: Some(512), ..Tuning::default() };
    assert_eq!(many.metadata_cache(&geometry(18, 3), 32 << 50), Err("L2 cache size too big".into()));
    assert_eq!(many.metadata_cache(&geometry(18, 3), 16 << 50).map(|kept| kept.is_some()), Ok(true));
    let lazy = Tuning { lazy_refcounts: true, ..Tuning::default() };
    let said = "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
    assert_eq!(lazy.metadata_cache(&geometry(16, 2), M), Err(said.into()));
    assert_eq!(lazy.metadata_cache(&geometry(16, 3), M), Ok(None));
}

#[test]
fn new_sizes_take_the_place_of_those_they_contradict() {
    assert_eq!(sizes(0, 2 * M, M).changed(sizes(M, 0, 0)), sizes(M, 0, 0));
    assert_eq!(sizes(M, 2 * M, 0).changed(sizes(0, 0, M)), sizes(0, 2 * M, M));
    assert_eq!(sizes(2 * M, 0, 0).changed(sizes(0, M, 0)), sizes(2 * M, M, 0));
    // What contradicts itself is refused later.
    assert_eq!(sizes(0, 0, 0).changed(sizes(1, 2, 3)), sizes(1, 2, 3));
}
