use std::path::{Path, PathBuf};

use cowhand_qcow2::CreateParams;

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::DiskQueue;
use crate::io::sim::{Faults, World};
use crate::io::{Buffer, Storage};
use crate::qcow2::create::create_image;
use crate::request::{Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::{Overlay, Preallocation};

const CLUSTER: u64 = 65536;

fn disk(world: &World) -> Arc<Disk> {
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let path = Path::new("/disk.qcow2");
    create_image(&storage, path, &CreateParams::new(8 * CLUSTER), Preallocation::Off).unwrap();
    let policy = OpenPolicy {
        storage,
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy).unwrap()
}

fn ask(world: &World, queue: &mut DiskQueue, request: Request) {
    queue.submit(0, request);
    while queue.in_flight() > 0 {
        world.step();
        queue.wait(Wait::Poll, &mut Vec::new()).unwrap();
    }
}

fn write(world: &World, queue: &mut DiskQueue, offset: u64) {
    let buffer = Buffer::from_bytes(&[1; 512]);
    ask(world, queue, Request::Write { offset, data: vec![buffer.seg(0, 512)] });
}

/// First and end of the clusters of each range.
fn taken(tracker: &DirtyTracker) -> Vec<(u64, u64)> {
    std::iter::from_fn(|| tracker.next(u64::MAX)).map(|range| (range.start / CLUSTER, range.end / CLUSTER)).collect()
}

#[test]
fn everything_that_changes_content_is_marked() {
    let world = World::new(1);
    let disk = disk(&world);
    let mut queue = disk.queue().unwrap();
    let tracker = disk.track_writes(None, true).unwrap();
    assert_eq!((tracker.dirty(), taken(&tracker)), (8 * CLUSTER, vec![(0, 8)]));
    let buffer = Buffer::zeroed(512);
    ask(&world, &mut queue, Request::Read { offset: 0, data: vec![buffer.seg(0, 512)] });
    ask(&world, &mut queue, Request::Flush);
    assert_eq!(taken(&tracker), []);
    write(&world, &mut queue, 3 * CLUSTER + 512);
    // In place, where no task would be needed otherwise.
    write(&world, &mut queue, 3 * CLUSTER + 512);
    assert_eq!(taken(&tracker), [(3, 4)]);
    write(&world, &mut queue, 3 * CLUSTER + 512);
    ask(&world, &mut queue, Request::Discard { offset: 0, len: CLUSTER });
    ask(&world, &mut queue, Request::WriteZeroes { offset: 5 * CLUSTER, len: 2 * CLUSTER, unmap: false });
    assert_eq!(taken(&tracker), [(5, 7), (0, 1), (3, 4)], "it goes round");
    disk.create_snapshot("a").unwrap();
    disk.snapshot_to(Overlay::new(Path::new("/over"))).unwrap();
    assert_eq!(taken(&tracker), []);
    disk.create_snapshot("a").unwrap();
    write(&world, &mut queue, 0);
    taken(&tracker);
    disk.apply_snapshot("a").unwrap();
    assert_eq!(tracker.dirty(), 8 * CLUSTER);
    taken(&tracker);
    disk.resize(6 * CLUSTER).unwrap();
    assert_eq!(tracker.dirty(), 0);
    disk.resize(9 * CLUSTER).unwrap();
    assert_eq!(taken(&tracker), [(6, 9)]);
    tracker.give_back(&(0..1));
    assert_eq!(taken(&tracker), [(0, 1)]);
    tracker.finish().unwrap();
    assert!(disk.hooks().is_none());
}

#[test]
fn a_write_that_failed_or_was_cut_off_is_marked_too() {
    let world = World::new(2);
    let disk = disk(&world);
    let mut queue = disk.queue().unwrap();
    let tracker = disk.track_writes(None, false).unwrap();
    world.set_faults(Faults { io: 1, ..Faults::default() });
    write(&world, &mut queue, CLUSTER);
    world.set_faults(Faults::default());
    assert_eq!(taken(&tracker), [(1, 2)]);
    let buffer = Buffer::zeroed(512);
    queue.submit(0, Request::Write { offset: 2 * CLUSTER, data: vec![buffer.seg(0, 512)] });
    queue.wait(Wait::Poll, &mut Vec::new()).unwrap();
    assert_eq!(taken(&tracker), [], "not before it is over");
    drop(queue);
    assert_eq!(taken(&tracker), [(2, 3)]);
}
