use std::path::{Path, PathBuf};

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::{Disk, block_on};
use crate::error::ErrorKind;
use crate::io::Storage;
use crate::io::sim::World;
use crate::io::{Buffer, File};
use crate::qcow2::create;
use crate::queue::Queue;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

const IMAGE: &str = "/disk.qcow2";
/// What `create` makes of 64 KiB clusters: header, refcount table, refcount block, L1 table, and then the first L2 table.
const CLUSTER: usize = 65536;
const REFTABLE: usize = CLUSTER;
const REFBLOCK: usize = 2 * CLUSTER;
const L1: usize = 3 * CLUSTER;
const L2: usize = 4 * CLUSTER;
const COPIED: u64 = 1 << 63;

fn made(file: File, queue: &std::rc::Rc<Queue>) {
    let params = CreateParams { cluster_bits: ClusterBits::new(16).unwrap(), ..CreateParams::new(2 << 30) };
    let task = {
        let queue = queue.clone();
        async move { create::create(&queue, &file, Path::new(IMAGE), &params, false).await }
    };
    block_on(queue, task).unwrap();
}

fn open(world: &World, readonly: bool) -> crate::error::Result<Arc<Disk>> {
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    Disk::open(&DiskSpec { readonly, ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) }, &policy)
}

fn request(disk: &Arc<Disk>, offset: u64, write: bool) -> Result<Vec<u8>, ErrorKind> {
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&[7; CLUSTER]);
    let data = vec![buffer.seg(0, CLUSTER)];
    queue.submit(0, if write { Request::Write { offset, data } } else { Request::Read { offset, data } });
    let mut events = Vec::new();
    queue.wait(Wait::Block, &mut events).unwrap();
    match events.pop() {
        Some(Event::Done { result: Ok(()), .. }) => Ok(buffer.to_vec()),
        Some(Event::Done { result: Err(e), .. }) => Err(e.kind()),
        other => panic!("{other:?}"),
    }
}

/// An image with its first cluster written, changed by `damage`.
fn damaged(damage: impl FnOnce(&mut Vec<u8>)) -> World {
    let world = World::orderly();
    made(world.create(Path::new(IMAGE)).unwrap(), &Queue::new(world.driver().unwrap()));
    let disk = open(&world, false).unwrap();
    request(&disk, 0, true).unwrap();
    disk.close().unwrap();
    drop(disk);
    let mut image = world.content(Path::new(IMAGE)).unwrap();
    damage(&mut image);
    world.put(Path::new(IMAGE), image);
    world
}

fn set(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// The image is refused for writing and left as it was; reading it alone does no harm.
fn assert_refused(damage: impl FnOnce(&mut Vec<u8>)) {
    let world = damaged(damage);
    let before = world.content(Path::new(IMAGE));
    let error = open(&world, false).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_eq!(world.content(Path::new(IMAGE)), before);
    open(&world, true).unwrap();
}

#[test]
fn l2_table_that_is_another_structure_is_refused_edge_43() {
    for place in [REFTABLE, REFBLOCK, L1] {
        assert_refused(|image| set(image, L1, place as u64 | COPIED));
    }
}

#[test]
fn l2_table_named_twice_as_exclusive_is_refused_edge_43() {
    assert_refused(|image| set(image, L1 + 8, L2 as u64 | COPIED));
}

#[test]
fn refcount_block_that_is_another_structure_or_missing_is_refused_edge_43() {
    for place in [REFTABLE as u64, REFBLOCK as u64, L1 as u64, L2 as u64, 1 << 40] {
        assert_refused(|image| set(image, REFTABLE + 8, place));
    }
}

#[test]
fn table_entries_with_reserved_bits_are_refused_for_writing() {
    assert_refused(|image| set(image, L1 + 8, L2 as u64 | 1));
    assert_refused(|image| set(image, REFTABLE + 8, L2 as u64 | 1));
    assert_refused(|image| set(image, L1 + 8, L2 as u64 + 512));
}

#[test]
fn clusters_of_metadata_are_not_given_out_though_counted_as_free_edge_43() {
    let world = damaged(|image| image[REFBLOCK..REFBLOCK + CLUSTER].fill(0));
    let before = world.content(Path::new(IMAGE)).unwrap();
    let disk = open(&world, false).unwrap();
    for cluster in 1..10 {
        request(&disk, cluster * CLUSTER as u64, true).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    let after = world.content(Path::new(IMAGE)).unwrap();
    assert_eq!(after[..REFBLOCK], before[..REFBLOCK]);
    assert_eq!(after[L1..L2 + 8], before[L1..L2 + 8]);
    let disk = open(&world, false).unwrap();
    assert!(request(&disk, CLUSTER as u64, false).is_ok_and(|bytes| bytes == [7; CLUSTER]));
}

#[test]
fn guest_data_that_is_metadata_is_neither_written_nor_read_edge_43() {
    for place in [REFTABLE, REFBLOCK, L1, L2] {
        let world = damaged(|image| set(image, L2, place as u64 | COPIED));
        let mut expected = world.content(Path::new(IMAGE)).unwrap();
        let disk = open(&world, false).unwrap();
        assert_eq!(request(&disk, 0, false), Err(ErrorKind::Corrupt));
        assert_eq!(world.content(Path::new(IMAGE)), Some(expected.clone()));
        assert_eq!(request(&disk, 0, true), Err(ErrorKind::Corrupt));
        // Its neighbours are read; written nothing is any more, but for the header's mark.
        request(&disk, CLUSTER as u64, false).unwrap();
        assert_eq!(request(&disk, CLUSTER as u64, true), Err(ErrorKind::Corrupt));
        disk.close().unwrap();
        expected[79] |= 2;
        assert_eq!(world.content(Path::new(IMAGE)), Some(expected));
    }
}

#[test]
fn l1_entry_that_is_nothing_but_the_copied_flag_is_no_table() {
    let world = damaged(|image| set(image, L1 + 8, COPIED));
    let disk = open(&world, false).unwrap();
    let offset = 512 << 20;
    request(&disk, offset, true).unwrap();
    disk.close().unwrap();
    drop(disk);
    let disk = open(&world, false).unwrap();
    assert!(request(&disk, offset, false).is_ok_and(|bytes| bytes == [7; CLUSTER]));
}

#[test]
fn first_in_finds_the_first_cluster_of_metadata() {
    let part = |clusters| Part { what: Structure::L1Table, clusters, shared: false };
    let layout = Layout::new(vec![part(10..12), part(0..1), part(12..13), part(20..21)]).unwrap();
    assert_eq!(layout.first_in(&(1..10)), None);
    assert_eq!(layout.first_in(&(1..11)), Some(10));
    assert_eq!(layout.first_in(&(12..30)), Some(12));
    assert_eq!(layout.first_in(&(13..30)), Some(20));
    assert!(layout.contains(0) && !layout.contains(1) && !layout.contains(21));
}
