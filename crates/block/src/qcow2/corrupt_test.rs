use std::path::{Path, PathBuf};

use cowhand_qcow2::{CreateParams, Header};

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::io::sim::World;
use crate::io::{Buffer, Storage};
use crate::node::Node;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;
use crate::{Preallocation, create_image};

const IMAGE: &str = "/disk.qcow2";
const CLUSTER: u64 = 65536;
/// The first cluster behind header, refcount table, refcount block and L1 table.
const FIRST: u64 = 4;
/// What an L2 table covers.
const COVERAGE: u64 = 512 << 20;

fn world(version: u32) -> World {
    let world = World::orderly();
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let params = CreateParams { version, ..CreateParams::new(4 * COVERAGE) };
    create_image(&storage, Path::new(IMAGE), &params, Preallocation::Off).unwrap();
    world
}

fn open(world: &World, readonly: bool) -> Result<Arc<Disk>> {
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    Disk::open(&DiskSpec { readonly, ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) }, &policy)
}

fn ask(disk: &Arc<Disk>, request: impl FnOnce(&Buffer) -> Request) -> Result<Vec<u8>> {
    let mut queue = disk.queue()?;
    let buffer = Buffer::from_bytes(&[7; CLUSTER as usize]);
    queue.submit(0, request(&buffer));
    let mut events = Vec::new();
    queue.wait(Wait::Block, &mut events).unwrap();
    match events.pop() {
        Some(Event::Done { result, .. }) => result.map(|()| buffer.to_vec()),
        other => panic!("{other:?}"),
    }
}

fn write(disk: &Arc<Disk>, offset: u64) -> Result<Vec<u8>> {
    ask(disk, |buffer| Request::Write { offset, data: vec![buffer.seg(0, buffer.len())] })
}

fn read(disk: &Arc<Disk>, offset: u64) -> Result<Vec<u8>> {
    ask(disk, |buffer| Request::Read { offset, data: vec![buffer.seg(0, buffer.len())] })
}

fn flush(disk: &Arc<Disk>) -> Result<Vec<u8>> {
    ask(disk, |_| Request::Flush)
}

fn is_marked(world: &World) -> bool {
    let image = world.content(Path::new(IMAGE)).unwrap();
    let header = Header::parse(&image, image.len() as u64).unwrap();
    header.incompatible.contains(Incompatible::CORRUPT)
}

/// Lets a structure lie in a cluster that counts as free.
fn occupy(disk: &Arc<Disk>, cluster: u64, structure: Structure) {
    let node = disk.node();
    let Node::Qcow2(image) = &*node else { panic!("a qcow2 image") };
    image.meta.lock().owners.claim_new(structure, cluster..cluster + 1).unwrap();
}

fn assert_corrupt<T: std::fmt::Debug>(result: Result<T>) {
    let error = result.unwrap_err();
    let line = error.to_string();
    assert!(error.kind() == ErrorKind::Corrupt && line.starts_with(IMAGE) && line.contains("repair"), "{line}");
}

#[test]
fn metadata_that_would_overlap_marks_the_image_and_ends_all_writing_edge_43() {
    for structure in [Structure::SnapshotTable, Structure::L2Table] {
        let world = world(3);
        let disk = open(&world, false).unwrap();
        write(&disk, 0).unwrap();
        flush(&disk).unwrap();
        occupy(&disk, FIRST + 2, structure);
        assert_corrupt(write(&disk, COVERAGE));
        assert!(is_marked(&world));
        // In place, elsewhere, as a whole: nothing is written any more.
        assert_corrupt(write(&disk, 0));
        assert_corrupt(write(&disk, 2 * COVERAGE));
        assert_corrupt(ask(&disk, |_| Request::Discard { offset: 0, len: CLUSTER }));
        assert_corrupt(ask(&disk, |_| Request::WriteZeroes { offset: 0, len: CLUSTER, unmap: false }));
        assert_corrupt(disk.resize(8 * COVERAGE));
        assert_corrupt(disk.create_snapshot("one"));
        // What was written before is there, and durable.
        assert_eq!(read(&disk, 0).unwrap(), [7; CLUSTER as usize]);
        flush(&disk).unwrap();
        disk.close().unwrap();
        assert_corrupt(open(&world, false).map(drop));
        assert_eq!(read(&open(&world, true).unwrap(), 0).unwrap(), [7; CLUSTER as usize]);
    }
}

#[test]
fn the_mark_is_durable_when_the_guest_hears_of_it_edge_43() {
    let world = world(3);
    let disk = open(&world, false).unwrap();
    occupy(&disk, FIRST, Structure::L1Table);
    assert_corrupt(write(&disk, 0));
    world.cut_power();
    disk.forget();
    assert!(is_marked(&world));
}

#[test]
fn version_2_has_no_room_for_the_mark_but_is_not_written_either_edge_43() {
    let world = world(2);
    let disk = open(&world, false).unwrap();
    occupy(&disk, FIRST, Structure::RefcountBlock);
    let before = world.content(Path::new(IMAGE));
    assert_corrupt(write(&disk, 0));
    assert_corrupt(write(&disk, COVERAGE));
    disk.forget();
    assert_eq!(world.content(Path::new(IMAGE)), before);
}

#[test]
fn guest_data_in_a_table_made_since_is_found_before_it_is_written_edge_43() {
    let world = world(3);
    let disk = open(&world, false).unwrap();
    write(&disk, 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    // The data's cluster, behind header, refcounts, L1 and L2 table, counts as free.
    let mut image = world.content(Path::new(IMAGE)).unwrap();
    let data = 5 * CLUSTER;
    let count = (2 * CLUSTER + 2 * 5) as usize;
    assert_eq!(image[count..count + 2], [0, 1]);
    image[count + 1] = 0;
    world.put(Path::new(IMAGE), image);
    let disk = open(&world, false).unwrap();
    // The table of this part of the disk takes it.
    write(&disk, COVERAGE).unwrap();
    flush(&disk).unwrap();
    assert_corrupt(write(&disk, 0));
    assert!(is_marked(&world));
    assert_eq!(read(&disk, COVERAGE).unwrap(), [7; CLUSTER as usize]);
    disk.close().unwrap();
    let image = world.content(Path::new(IMAGE)).unwrap();
    assert!(image[data as usize..][..CLUSTER as usize] != [7; CLUSTER as usize], "the table was written over");
}
