use std::path::{Path, PathBuf};

use cowhand_qcow2::CreateParams;

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::io::sim::World;
use crate::io::{Buffer, Storage};
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;
use crate::{Preallocation, create_image};

const IMAGE: &str = "/disk.qcow2";
const CLUSTER: usize = 65536;
const REFBLOCK: u64 = 2 * CLUSTER as u64;

fn open(world: &World) -> Result<Arc<Disk>> {
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    Disk::open(&DiskSpec::new(Path::new(IMAGE), Format::Qcow2), &policy)
}

fn write(disk: &Arc<Disk>, byte: u8) -> bool {
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&[byte; CLUSTER]);
    queue.submit(0, Request::Write { offset: 0, data: vec![buffer.seg(0, CLUSTER)] });
    let mut events = Vec::new();
    queue.wait(Wait::Block, &mut events).unwrap();
    matches!(events.pop(), Some(Event::Done { result: Ok(()), .. }))
}

/// An image with one cluster written, a snapshot of that, and the cluster written again; changed by `damage`, which gets the places
/// of the snapshot table and of the snapshot's L1 and L2 tables.
fn damaged(damage: impl FnOnce(&mut [u8], [u64; 3])) -> World {
    let world = World::orderly();
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    create_image(&storage, Path::new(IMAGE), &CreateParams::new(2 << 30), Preallocation::Off).unwrap();
    let disk = open(&world).unwrap();
    assert!(write(&disk, 1));
    disk.create_snapshot("a").unwrap();
    assert!(write(&disk, 2));
    disk.close().unwrap();
    drop(disk);
    let mut image = world.content(Path::new(IMAGE)).unwrap();
    let header = Header::parse(&image, image.len() as u64).unwrap();
    let table = header.snapshots_offset.get();
    let (snapshots, _) = Snapshot::parse_table(&image[table as usize..], 1, &header.geometry()).unwrap();
    let l1 = snapshots[0].l1_table_offset.get();
    let l2 = number(&image, l1) & !(1 << 63);
    damage(&mut image, [table, l1, l2]);
    world.put(Path::new(IMAGE), image);
    world
}

fn number(image: &[u8], at: u64) -> u64 {
    image[at as usize..at as usize + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn set(image: &mut [u8], at: u64, value: u64) {
    image[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

#[test]
fn snapshot_tables_that_are_other_metadata_are_refused_edge_43() {
    let refused = |damage: &dyn Fn(&mut [u8], [u64; 3])| {
        let world = damaged(|image, places| damage(image, places));
        let before = world.content(Path::new(IMAGE));
        let error = open(&world).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(world.content(Path::new(IMAGE)), before);
    };
    // The snapshot's L1 table is the refcount block, the active L1 table, the snapshot table, or past the end of the file.
    refused(&|image, [table, ..]| set(image, table, REFBLOCK));
    refused(&|image, [table, ..]| set(image, table, number(image, 40)));
    refused(&|image, [table, ..]| set(image, table, table));
    refused(&|image, [table, ..]| set(image, table, 1 << 40));
    // An active L2 table is the snapshot's L1 table, or the snapshot table.
    refused(&|image, [_, l1, _]| set(image, number(image, 40) + 8, l1 | 1 << 63));
    refused(&|image, [table, ..]| set(image, number(image, 40) + 8, table | 1 << 63));
}

#[test]
fn snapshot_tables_are_not_given_out_though_counted_as_free_edge_43() {
    let mut l2_at = 0;
    let world = damaged(|image, [table, l1, l2]| {
        l2_at = l2 as usize;
        for place in [table, l1, l2] {
            let count = (REFBLOCK + place / CLUSTER as u64 * 2) as usize;
            image[count..count + 2].fill(0);
        }
    });
    let l2 = || world.content(Path::new(IMAGE)).unwrap()[l2_at..][..CLUSTER].to_vec();
    let before = l2();
    let disk = open(&world).unwrap();
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&[7; 10 * CLUSTER]);
    queue.submit(0, Request::Write { offset: 1 << 20, data: vec![buffer.seg(0, buffer.len())] });
    queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    drop(queue);
    assert_eq!(disk.snapshots().unwrap()[0].name, "a");
    disk.close().unwrap();
    drop(disk);
    open(&world).unwrap();
    assert!(l2() == before, "the snapshot's L2 table was given out");
}

#[test]
fn trees_of_snapshots_that_name_metadata_are_neither_taken_over_nor_freed_edge_39() {
    for damage in [0, 1] {
        let world = damaged(|image, [_, l1, l2]| match damage {
            // An L2 table that is the refcount block, and data that is.
            0 => set(image, l1, REFBLOCK),
            _ => set(image, l2, REFBLOCK),
        });
        let disk = open(&world).unwrap();
        let refblock = || world.content(Path::new(IMAGE)).unwrap()[REFBLOCK as usize..][..2].to_vec();
        let before = refblock();
        assert_eq!(disk.apply_snapshot("a").unwrap_err().kind(), ErrorKind::Corrupt);
        // Deleting it loses what it leads to, and nothing else.
        disk.delete_snapshot("a").unwrap();
        assert_eq!(refblock(), before);
        assert!(write(&disk, 3));
        disk.close().unwrap();
    }
}

#[test]
fn snapshot_whose_table_lies_past_the_end_is_not_applied_edge_39() {
    let world = damaged(|image, [_, l1, _]| set(image, l1, 1 << 40));
    let disk = open(&world).unwrap();
    assert_eq!(disk.apply_snapshot("a").unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(disk.delete_snapshot("a").unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(write(&disk, 3));
}

#[test]
fn copied_flags_are_only_in_active_tables_edge_14() {
    let world = damaged(|_, _| {});
    let disk = open(&world).unwrap();
    disk.create_snapshot("b").unwrap();
    disk.apply_snapshot("a").unwrap();
    disk.close().unwrap();
    let image = world.content(Path::new(IMAGE)).unwrap();
    let header = Header::parse(&image, image.len() as u64).unwrap();
    let (snapshots, _) =
        Snapshot::parse_table(&image[header.snapshots_offset.get() as usize..], 2, &header.geometry()).unwrap();
    for snapshot in &snapshots {
        let l2 = number(&image, snapshot.l1_table_offset.get());
        assert_eq!(l2 >> 63, 0);
        assert_eq!(number(&image, l2) >> 63, 0);
    }
    assert_ne!(snapshots[0].l1_table_offset, header.l1_table_offset);
}

#[test]
fn snapshot_is_found_by_its_id_before_its_name() {
    let world = damaged(|_, _| {});
    let disk = open(&world).unwrap();
    let named_one = disk.create_snapshot("1").unwrap();
    assert_eq!(named_one.id, "2");
    disk.delete_snapshot("1").unwrap();
    assert_eq!(disk.snapshots().unwrap(), [named_one]);
    disk.delete_snapshot("1").unwrap();
    assert!(disk.snapshots().unwrap().is_empty());
}
