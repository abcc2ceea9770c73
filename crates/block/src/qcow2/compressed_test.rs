use std::path::{Path, PathBuf};

use cowhand_qcow2::CreateParams;

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::{Disk, DiskQueue};
use crate::io::Storage;
use crate::io::sim::World;
use crate::protocol::Protocol;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::{Preallocation, create_image};

const IMAGE: &str = "/disk.qcow2";
const CLUSTER: usize = 65536;

fn finish(world: &World, queues: &mut [DiskQueue]) -> Vec<Result<()>> {
    let mut events = Vec::new();
    while queues.iter().any(|queue| queue.in_flight() > 0) {
        world.step();
        queues.iter_mut().for_each(|queue| queue.wait(Wait::Poll, &mut events).unwrap());
    }
    let result = |event| match event {
        Event::Done { result, .. } => result,
        Event::Ready { .. } => panic!("nothing is watched"),
    };
    events.into_iter().map(result).collect()
}

/// A disk with eight compressed clusters of their own numbers, in a world where `seed` decides.
fn disk(seed: u64) -> (World, Arc<Disk>) {
    let world = World::new(seed);
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    create_image(&storage, Path::new(IMAGE), &CreateParams::new(1 << 20), Preallocation::Off).unwrap();
    let policy = OpenPolicy {
        storage,
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    let disk = Disk::open(&DiskSpec::new(Path::new(IMAGE), Format::Qcow2), &policy).unwrap();
    let mut queues = [disk.queue().unwrap()];
    let bytes: Vec<u8> = (0..8 * CLUSTER).map(|i| (i / CLUSTER) as u8 + 1).collect();
    let buffer = Buffer::from_bytes(&bytes);
    queues[0].submit(0, Request::WriteCompressed { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
    finish(&world, &mut queues).into_iter().for_each(Result::unwrap);
    world.start_trace();
    (world, disk)
}

fn read(queue: &mut DiskQueue, cluster: u64, buffer: &Buffer) {
    let data = vec![buffer.seg(0, buffer.len())];
    queue.submit(0, Request::Read { offset: cluster * CLUSTER as u64, data });
}

fn count(world: &World, what: &str) -> usize {
    world.trace().iter().filter(|line| line.contains(what)).count()
}

#[test]
fn readers_of_one_cluster_decode_it_once() {
    for seed in 0..50 {
        let (world, disk) = disk(seed);
        let mut queues = [disk.queue().unwrap(), disk.queue().unwrap()];
        let buffers: Vec<Buffer> = (0..4).map(|_| Buffer::zeroed(4096)).collect();
        buffers.iter().enumerate().for_each(|(i, buffer)| read(&mut queues[i % 2], 3, buffer));
        finish(&world, &mut queues).into_iter().for_each(Result::unwrap);
        assert!(buffers.iter().all(|buffer| buffer[..] == [4; 4096]));
        assert_eq!(count(&world, "computes"), 1, "seed {seed}");
    }
}

#[test]
fn a_cluster_that_is_asked_for_alone_does_not_go_to_the_pool() {
    let (world, disk) = disk(1);
    let mut queues = [disk.queue().unwrap()];
    let buffer = Buffer::zeroed(4096);
    read(&mut queues[0], 5, &buffer);
    finish(&world, &mut queues).into_iter().for_each(Result::unwrap);
    assert!(buffer[..] == [6; 4096]);
    assert_eq!(count(&world, "computes"), 0);
}

#[test]
fn several_clusters_of_one_read_are_decoded_side_by_side() {
    let (world, disk) = disk(1);
    let mut queues = [disk.queue().unwrap()];
    let buffer = Buffer::zeroed(8 * CLUSTER);
    read(&mut queues[0], 0, &buffer);
    finish(&world, &mut queues).into_iter().for_each(Result::unwrap);
    assert!(buffer.chunks(CLUSTER).zip(1..).all(|(chunk, byte)| chunk.iter().all(|&b| b == byte)));
    // The last one may find the pool empty again.
    assert!(count(&world, "computes") >= 7);
}

#[test]
fn a_damaged_cluster_fails_for_each_of_its_readers_and_nobody_waits_for_ever_edge_24() {
    for seed in 0..20 {
        let (world, disk) = disk(seed);
        disk.close().unwrap();
        drop(disk);
        // All compressed bytes lie behind the metadata, packed in one cluster.
        let mut image = world.content(Path::new(IMAGE)).unwrap();
        let data = image.len() / CLUSTER * CLUSTER;
        image[data..].fill(0xff);
        world.put(Path::new(IMAGE), image);
        let policy = OpenPolicy {
            storage: Arc::new(world.clone()),
            allow_dirs: Vec::new(),
            probe: false,
            temp_dir: PathBuf::from("/"),
            ..OpenPolicy::host()
        };
        let disk = Disk::open(&DiskSpec::new(Path::new(IMAGE), Format::Qcow2), &policy).unwrap();
        let mut queues = [disk.queue().unwrap(), disk.queue().unwrap()];
        let buffers: Vec<Buffer> = (0..4).map(|_| Buffer::zeroed(4096)).collect();
        buffers.iter().enumerate().for_each(|(i, buffer)| read(&mut queues[i % 2], 3, buffer));
        let ended = finish(&world, &mut queues);
        assert!(
            ended.len() == 4 && ended.iter().all(|end| end.as_ref().is_err_and(|e| e.kind() == ErrorKind::Corrupt))
        );
    }
}

/// An image of `content`, whole clusters, all of them compressed.
fn compressed(world: &World, path: &str, content: &[u8]) -> DiskSpec {
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let policy = OpenPolicy {
        storage,
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    let params = CreateParams::new(content.len() as u64);
    create_image(&policy.storage, Path::new(path), &params, Preallocation::Off).unwrap();
    let spec = DiskSpec::new(Path::new(path), Format::Qcow2);
    let disk = Disk::open(&spec, &policy).unwrap();
    let mut queues = [disk.queue().unwrap()];
    let buffer = Buffer::from_bytes(content);
    queues[0].submit(0, Request::WriteCompressed { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
    finish(world, &mut queues).into_iter().for_each(Result::unwrap);
    drop(queues);
    disk.close().unwrap();
    spec
}

#[test]
fn compressed_clusters_in_compressed_clusters_do_not_wait_for_each_other() {
    const COUNT: usize = 40;
    let world = World::new(1);
    let bytes: Vec<u8> = (0..COUNT * CLUSTER).map(|i| (i / CLUSTER) as u8 + 1).collect();
    compressed(&world, "/inner", &bytes);
    let mut inner = world.content(Path::new("/inner")).unwrap();
    inner.resize(inner.len().next_multiple_of(CLUSTER), 0);
    let outer = compressed(&world, "/outer", &inner);
    let spec = DiskSpec { protocol: Protocol::Image(Box::new(outer.clone())), readonly: true, ..outer };
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let policy = OpenPolicy {
        storage,
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    let disk = Disk::open(&spec, &policy).unwrap();
    let mut queue = disk.queue().unwrap();
    let buffers: Vec<Buffer> = (0..COUNT).map(|_| Buffer::zeroed(4096)).collect();
    buffers.iter().enumerate().for_each(|(i, buffer)| read(&mut queue, i as u64, buffer));
    let mut events = Vec::new();
    for _ in 0..100_000 {
        world.step();
        queue.wait(Wait::Poll, &mut events).unwrap();
        if queue.in_flight() == 0 {
            break;
        }
    }
    assert_eq!(queue.in_flight(), 0, "they wait for each other");
    assert!(buffers.iter().enumerate().all(|(i, buffer)| buffer[..] == [i as u8 + 1; 4096]));
}
