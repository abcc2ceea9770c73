use std::path::{Path, PathBuf};

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::{Disk, block_on};
use crate::io::sim::World;
use crate::node::Node;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;
use crate::{Preallocation, create_image};

const IMAGE: &str = "/disk.qcow2";

/// Gives out runs of these lengths, one after the other: where they are, and the image as it is when it was closed.
fn runs(cluster_bits: u32, refcount_order: u32, metadata_cache: Option<u64>, lengths: &[u64]) -> (Vec<u64>, Vec<u8>) {
    let world = World::orderly();
    let storage: Arc<dyn crate::io::Storage> = Arc::new(world.clone());
    let params = CreateParams {
        cluster_bits: ClusterBits::new(cluster_bits).unwrap(),
        refcount_order,
        ..CreateParams::new(1 << 20)
    };
    create_image(&storage, Path::new(IMAGE), &params, Preallocation::Off).unwrap();
    let policy = OpenPolicy {
        storage: storage.clone(),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    let spec = DiskSpec { metadata_cache, ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) };
    let disk = Disk::open(&spec, &policy).unwrap();
    let queue = Queue::new(storage.driver().unwrap());
    let task = {
        let (disk, queue, lengths) = (disk.clone(), queue.clone(), lengths.to_vec());
        async move {
            let node = disk.node();
            let Node::Qcow2(image) = &*node else { panic!("not an image") };
            let mut places = Vec::new();
            for clusters in lengths {
                let run = image.allocate_run(&queue, clusters).await?;
                assert_eq!(run.clusters, clusters);
                places.push(run.host.get() >> cluster_bits);
                image.finish(&queue).await?;
            }
            Ok(places)
        }
    };
    let places = block_on(&queue, task).unwrap();
    disk.close().unwrap();
    (places, world.content(Path::new(IMAGE)).unwrap())
}

/// The count of each cluster, by the file.
fn counts(image: &[u8]) -> Vec<u64> {
    let header = cowhand_qcow2::Header::parse(image, image.len() as u64).unwrap();
    let number = |at: u64| image[at as usize..at as usize + 8].iter().fold(0u64, |v, b| v << 8 | u64::from(*b));
    let mut counts = Vec::new();
    for i in 0..u64::from(header.refcount_table_clusters) * header.cluster_bits.size() / 8 {
        let block = number(header.refcount_table_offset.get() + i * 8) as usize;
        let bytes = if block == 0 { &[][..] } else { &image[block..block + header.cluster_bits.size() as usize] };
        for entry in 0..header.refcount_block_entries() as usize {
            counts.push(cowhand_qcow2::refcount::get(header.refcount_order, bytes, entry).unwrap_or(0));
        }
    }
    counts
}

#[test]
fn run_longer_than_blocks_and_the_table_reach_lies_together_and_is_counted() {
    for (bits, order, cache) in [(9, 6, None), (9, 6, Some(1)), (9, 4, Some(1)), (12, 3, None), (16, 4, None)] {
        let lengths = [1, 70, 700, 3, if bits == 9 { 6000 } else { 900 }];
        let (places, image) = runs(bits, order, cache, &lengths);
        let counts = counts(&image);
        let mut used = std::collections::BTreeSet::new();
        for (place, clusters) in places.iter().zip(lengths) {
            for cluster in *place..place + clusters {
                assert!(used.insert(cluster), "cluster {cluster} was given out twice");
                assert_eq!(counts[cluster as usize], 1, "cluster {cluster}");
            }
        }
        // What is counted besides is the image's own metadata, which is sound.
        assert!(counts.iter().all(|&count| count <= 1));
        crate::torture::assert_sound(&image);
    }
}

#[test]
fn run_takes_the_first_room_that_is_long_enough() {
    let (places, _) = runs(16, 4, None, &[2, 5, 1]);
    // Header, refcount table, refcount block and L1 table come first.
    assert_eq!(places, [4, 6, 11]);
}
