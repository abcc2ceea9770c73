use std::path::{Path, PathBuf};

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::{Disk, DiskQueue};
use crate::io::Storage;
use crate::io::sim::World;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::torture::assert_sound;
use crate::{Preallocation, create_image};

const IMAGE: &str = "/disk.qcow2";
const CLUSTER: usize = 4096;

fn disk(refcount_order: u32) -> (World, Arc<Disk>) {
    let world = World::orderly();
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let cluster_bits = ClusterBits::new(12).unwrap();
    let params = CreateParams { cluster_bits, refcount_order, ..CreateParams::new(1 << 20) };
    create_image(&storage, Path::new(IMAGE), &params, Preallocation::Off).unwrap();
    let policy = OpenPolicy {
        storage,
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    let disk = Disk::open(&DiskSpec::new(Path::new(IMAGE), Format::Qcow2), &policy).unwrap();
    (world, disk)
}

fn ask(queue: &mut DiskQueue, request: Request) -> Result<()> {
    queue.submit(0, request);
    let mut events = Vec::new();
    queue.wait(Wait::Block, &mut events).unwrap();
    match events.pop() {
        Some(Event::Done { result, .. }) => result,
        other => panic!("no answer but {other:?}"),
    }
}

/// A cluster that shrinks to about half, and always to as much for bytes of one sort.
fn content(byte: u8) -> Buffer {
    let noise = (0..CLUSTER as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as u8 & 0x0f);
    Buffer::from_bytes(&noise.map(|low| low ^ byte).collect::<Vec<_>>())
}

fn compress(queue: &mut DiskQueue, cluster: u64, byte: u8) -> Result<()> {
    let buffer = content(byte);
    let offset = cluster * CLUSTER as u64;
    ask(queue, Request::WriteCompressed { offset, data: vec![buffer.seg(0, CLUSTER)] })
}

fn discard(queue: &mut DiskQueue, cluster: u64) {
    ask(queue, Request::Discard { offset: cluster * CLUSTER as u64, len: CLUSTER as u64 }).unwrap();
    // The first flush drops it from the mapping, the second finds that nobody uses it.
    (0..3).for_each(|_| ask(queue, Request::Flush).unwrap());
}

#[track_caller]
fn assert_holds(queue: &mut DiskQueue, cluster: u64, byte: u8) {
    let buffer = Buffer::zeroed(CLUSTER);
    let offset = cluster * CLUSTER as u64;
    ask(queue, Request::Read { offset, data: vec![buffer.seg(0, CLUSTER)] }).unwrap();
    assert!(buffer[..] == content(byte)[..], "cluster {cluster} does not hold {byte:#x}");
}

fn length(world: &World) -> u64 {
    world.content(Path::new(IMAGE)).unwrap().len() as u64
}

#[test]
fn clusters_are_packed_until_the_refcount_is_full_edge_26() {
    for (order, shared) in [(0, 1), (1, 3), (2, 15), (4, 1000)] {
        let (world, disk) = disk(order);
        let mut queue = disk.queue().unwrap();
        // The first one brings an L2 table along.
        ask(&mut queue, Request::Write { offset: 0, data: vec![content(0).seg(0, CLUSTER)] }).unwrap();
        let before = length(&world);
        let small = Buffer::from_bytes(&[7; CLUSTER]);
        for i in 0..60 {
            let offset = (i + 1) * CLUSTER as u64;
            ask(&mut queue, Request::WriteCompressed { offset, data: vec![small.seg(0, CLUSTER)] }).unwrap();
        }
        let used = (length(&world) - before).div_ceil(CLUSTER as u64);
        assert_eq!(used, 60u64.div_ceil(shared), "{} bits", 1 << order);
        drop(queue);
        disk.close().unwrap();
        assert_sound(&world.content(Path::new(IMAGE)).unwrap());
        assert_eq!(length(&world) % 512, 0);
    }
}

#[test]
fn data_that_runs_on_into_the_next_cluster_counts_in_both_edge_23() {
    let (world, disk) = disk(4);
    let mut queue = disk.queue().unwrap();
    (0..7).for_each(|i| compress(&mut queue, i, i as u8).unwrap());
    // Each takes half a cluster and a little: all seven together need less than five.
    assert!(length(&world) < (4 + 1 + 5) * CLUSTER as u64, "{}", length(&world));
    (0..7).for_each(|i| assert_holds(&mut queue, i, i as u8));
    // Neighbours stay when one goes.
    [1, 4].into_iter().for_each(|i| discard(&mut queue, i));
    [0, 2, 3, 5, 6].into_iter().for_each(|i| assert_holds(&mut queue, i, i as u8));
    drop(queue);
    disk.close().unwrap();
    assert_sound(&world.content(Path::new(IMAGE)).unwrap());
}

#[test]
fn what_was_decoded_is_forgotten_when_another_cluster_comes_to_lie_there() {
    let (world, disk) = disk(4);
    let mut queue = disk.queue().unwrap();
    compress(&mut queue, 0, 1).unwrap();
    assert_holds(&mut queue, 0, 1);
    let before = length(&world);
    discard(&mut queue, 0);
    compress(&mut queue, 0, 2).unwrap();
    assert_eq!(length(&world), before, "the second one was to take the first one's place");
    assert_holds(&mut queue, 0, 2);
}

#[test]
fn nothing_is_packed_behind_what_has_been_freed_edge_31() {
    let (world, disk) = disk(4);
    let mut queue = disk.queue().unwrap();
    compress(&mut queue, 0, 1).unwrap();
    discard(&mut queue, 0);
    // A plain cluster takes the place.
    let plain = content(3);
    ask(&mut queue, Request::Write { offset: 0, data: vec![plain.seg(0, CLUSTER)] }).unwrap();
    compress(&mut queue, 1, 2).unwrap();
    assert_holds(&mut queue, 0, 3);
    assert_holds(&mut queue, 1, 2);
    drop(queue);
    disk.close().unwrap();
    assert_sound(&world.content(Path::new(IMAGE)).unwrap());
}

#[test]
fn write_compressed_over_what_is_there_returns_error_and_leaves_it() {
    let (_, disk) = disk(4);
    let mut queue = disk.queue().unwrap();
    compress(&mut queue, 0, 1).unwrap();
    ask(&mut queue, Request::Write { offset: CLUSTER as u64, data: vec![content(2).seg(0, CLUSTER)] }).unwrap();
    for (cluster, byte) in [(0, 1), (1, 2)] {
        assert_eq!(compress(&mut queue, cluster, 9).unwrap_err().kind(), ErrorKind::Invalid);
        assert_holds(&mut queue, cluster, byte);
    }
    // Where there are only zeros it is fine.
    ask(&mut queue, Request::WriteZeroes { offset: 2 * CLUSTER as u64, len: CLUSTER as u64, unmap: true }).unwrap();
    compress(&mut queue, 2, 3).unwrap();
    assert_holds(&mut queue, 2, 3);
}

#[test]
fn write_compressed_of_parts_of_clusters_returns_error() {
    let (_, disk) = disk(4);
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::zeroed(CLUSTER);
    for (offset, len) in [(512, CLUSTER), (0, 512), (CLUSTER as u64, CLUSTER - 512)] {
        let error = ask(&mut queue, Request::WriteCompressed { offset, data: vec![buffer.seg(0, len)] }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{offset}+{len}");
    }
}
