use std::cell::Cell;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::*;
use crate::io::host::{Engine, Host};
use crate::io::sim::World;
use crate::io::{Buffer, OpenMode};
use crate::qcow2::create;
use crate::request::{Event, RequestQueue, Wait};
use crate::testing::{Stuck, within_seconds};

const IMAGE: &str = "/disk.qcow2";

fn disk_in(world: &World) -> Arc<Disk> {
    disk_like(world, CreateParams::new(1 << 20))
}

fn disk_like(world: &World, params: CreateParams) -> Arc<Disk> {
    let file = world.create(Path::new(IMAGE)).unwrap();
    let queue = Queue::new(world.driver().unwrap());
    let task = {
        let queue = queue.clone();
        async move { create::create(&queue, &file, Path::new(IMAGE), &params, false).await }
    };
    block_on(&queue, task).unwrap();
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    Disk::open(&DiskSpec::new(Path::new(IMAGE), Format::Qcow2), &policy).unwrap()
}

fn write(queue: &mut DiskQueue, buffer: &Buffer) {
    queue.submit(1, Request::Write { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
}

/// Drops a queue with a write in flight; whether clusters could be used again before that write had ended.
fn freed_under_a_write(mapped: bool) -> bool {
    let world = World::orderly();
    let disk = disk_in(&world);
    let buffer = Buffer::zeroed(4096);
    if mapped {
        let mut queue = disk.queue().unwrap();
        write(&mut queue, &buffer);
        queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    }
    // Whether the disk believes, as the driver goes, that nobody uses what was dropped before.
    let passed = Rc::new(Cell::new(None));
    let note = {
        let (disk, passed) = (disk.clone(), passed.clone());
        move || {
            let grace = disk.grace();
            passed.set(Some(grace.passed(grace.stamp())));
        }
    };
    let mut queue = disk.queue_on(Box::new(Stuck::new(note)));
    write(&mut queue, &buffer);
    queue.wait(Wait::Poll, &mut Vec::new()).unwrap();
    drop(queue);
    passed.get().unwrap()
}

#[test]
fn dropping_a_queue_frees_no_cluster_under_a_direct_write() {
    assert!(!freed_under_a_write(true));
}

#[test]
fn dropping_a_queue_frees_no_cluster_under_a_task_that_writes() {
    assert!(!freed_under_a_write(false));
}

#[test]
fn dropping_a_queue_last_lets_the_disk_close_behind_it() {
    let world = World::orderly();
    let disk = disk_in(&world);
    let mut queue = disk.queue().unwrap();
    drop(disk);
    let buffer = Buffer::from_bytes(&[7; 4096]);
    write(&mut queue, &buffer);
    queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    drop(queue);
    assert!(world.content(Path::new(IMAGE)).unwrap().chunks(4096).any(|c| c == [7; 4096]));
}

/// An empty image on the host.
fn disk_on_host(dir: &tempfile::TempDir, engine: Engine) -> Arc<Disk> {
    let path = dir.path().join("disk.qcow2");
    let storage: Arc<dyn Storage> = Arc::new(Host::new(engine));
    let file = match storage.create(&path) {
        Ok(file) => file,
        Err(_) => storage.open(&path, OpenMode { write: true, ..OpenMode::default() }).unwrap(),
    };
    let queue = Queue::new(storage.blocking_driver().unwrap());
    let (task_queue, task_path) = (queue.clone(), path.clone());
    let params = CreateParams::new(64 << 20);
    let task = async move { create::create(&task_queue, &file, &task_path, &params, false).await };
    block_on(&queue, task).unwrap();
    let policy = OpenPolicy { storage, ..OpenPolicy::host() };
    Disk::open(&DiskSpec::new(&path, Format::Qcow2), &policy).unwrap()
}

#[test]
fn a_blocking_wait_does_not_sleep_on_a_request_that_needs_no_io() {
    for engine in [Engine::Auto, Engine::Threads] {
        within_seconds(move || {
            let dir = tempfile::tempdir().unwrap();
            let disk = disk_on_host(&dir, engine);
            let mut queue = disk.queue().unwrap();
            let buffer = Buffer::from_bytes(&[0xee; 4096]);
            queue.submit(7, Request::Read { offset: 1 << 20, data: vec![buffer.seg(0, 4096)] });
            let mut events = Vec::new();
            queue.wait(Wait::Block, &mut events).unwrap();
            assert!(matches!(events[..], [Event::Done { tag: 7, result: Ok(()), .. }]));
            assert!(buffer.iter().all(|&byte| byte == 0));
        });
    }
}

#[test]
fn opening_a_disk_that_fails_before_any_io_does_not_sleep() {
    within_seconds(|| {
        let dir = tempfile::tempdir().unwrap();
        let error = Disk::open(&DiskSpec::new(dir.path(), Format::Raw), &OpenPolicy::host()).err().unwrap();
        assert!(error.to_string().contains("is a directory"), "{error}");
    });
}

#[test]
fn a_disk_that_is_refused_keeps_its_autoclear_bits_edge_03() {
    let world = World::orderly();
    drop(disk_in(&world));
    let path = Path::new(IMAGE);
    let mut image = world.content(path).unwrap();
    // An autoclear bit, and a size that 4096 does not divide.
    image[95] = 0x80;
    image[30] = 2;
    world.put(path, image.clone());
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    let spec = DiskSpec { block_size: 4096, ..DiskSpec::new(path, Format::Qcow2) };
    let error = Disk::open(&spec, &policy).err().unwrap().to_string();
    assert!(error.contains("not a multiple of block-size=4096"), "{error}");
    assert_eq!(world.content(path).unwrap(), image);
}

/// The order in which a request for much, which needs no I/O, and a read that comes after it are answered.
fn answers(mut queue: DiskQueue, much: Request) -> Vec<u64> {
    let mut events = Vec::new();
    queue.submit(1, much);
    queue.wait(Wait::Poll, &mut events).unwrap();
    let buffer = Buffer::zeroed(512);
    queue.submit(2, Request::Read { offset: 0, data: vec![buffer.seg(0, 512)] });
    while queue.in_flight() > 0 {
        queue.wait(Wait::Block, &mut events).unwrap();
    }
    let tag = |event| match event {
        Event::Done { tag, result: Ok(()), .. } => tag,
        other => panic!("{other:?}"),
    };
    events.into_iter().map(tag).collect()
}

#[test]
fn a_large_discard_in_small_clusters_lets_others_go_first() {
    let world = World::orderly();
    let params = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(DISCARD_MAX) };
    let disk = disk_like(&world, params);
    assert_eq!(answers(disk.queue().unwrap(), Request::Discard { offset: 0, len: DISCARD_MAX }), [2, 1]);
}

#[test]
fn giving_many_clusters_back_lets_others_go_first() {
    let world = World::orderly();
    let params = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(8 << 20) };
    let disk = disk_like(&world, params);
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&vec![7; 8 << 20]);
    let ask = |queue: &mut DiskQueue, request| {
        queue.submit(0, request);
        queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    };
    ask(&mut queue, Request::Write { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
    // The commit that drops the mapping, when nothing is in flight that could still use what it named, frees 16384 clusters.
    ask(&mut queue, Request::Discard { offset: 0, len: 8 << 20 });
    world.start_trace();
    let mut quiet = 0;
    queue.submit(0, Request::Flush);
    while queue.in_flight() > 0 {
        let before = world.trace().len();
        queue.wait(Wait::Poll, &mut Vec::new()).unwrap();
        quiet += usize::from(world.trace().len() == before);
    }
    assert!(quiet >= 4, "{quiet} pauses in {} operations", world.trace().len());
}

#[test]
fn a_watched_descriptor_that_is_no_more_fails_the_wait() {
    for engine in [Engine::Auto, Engine::Threads] {
        within_seconds(move || {
            let dir = tempfile::tempdir().unwrap();
            let mut queue = disk_on_host(&dir, engine).queue().unwrap();
            // No descriptor has this number.
            queue.watch(RawFd::MAX, 3).unwrap();
            queue.wait(Wait::Block, &mut Vec::new()).unwrap_err();
        });
    }
}

/// Writes one cluster at `offset`, full of `byte`, and waits; how it ended.
fn write_cluster(queue: &mut DiskQueue, offset: u64, byte: u8) -> Result<()> {
    let buffer = Buffer::from_bytes(&[byte; 65536]);
    queue.submit(1, Request::Write { offset, data: vec![buffer.seg(0, buffer.len())] });
    let mut events = Vec::new();
    queue.wait(Wait::Block, &mut events).unwrap();
    let Some(Event::Done { result, .. }) = events.pop() else { panic!("no end") };
    result
}

#[test]
fn edge_53_an_image_on_a_block_device_fills_it_and_never_grows_past_it() {
    let world = World::orderly();
    let params = CreateParams { cluster_bits: ClusterBits::new(16).unwrap(), ..CreateParams::new(4 << 20) };
    drop(disk_like(&world, params));
    let mut device = world.content(Path::new(IMAGE)).unwrap();
    // Room for 12 clusters of data and an L2 table, and half a cluster that is of no use.
    device.resize(device.len().next_multiple_of(65536) + 13 * 65536 + 32768, 0);
    let len = device.len();
    world.put(Path::new("/dev/disk"), device);
    world.make_device(Path::new("/dev/disk"));
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    let disk = Disk::open(&DiskSpec::new(Path::new("/dev/disk"), Format::Qcow2), &policy).unwrap();
    let mut queue = disk.queue().unwrap();

    let results: Vec<_> = (0..20).map(|n| write_cluster(&mut queue, n * 65536, n as u8 + 1)).collect();
    // What is given back can be used again.
    queue.submit(1, Request::Discard { offset: 0, len: 65536 });
    queue.submit(2, Request::Flush);
    while queue.in_flight() > 0 {
        queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    }
    let again = write_cluster(&mut queue, 30 * 65536, 99);
    drop(queue);
    disk.close().unwrap();

    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 12);
    let refused = results[12].as_ref().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace, "{refused}");
    assert!(again.is_ok(), "{again:?}");
    let content = world.content(Path::new("/dev/disk")).unwrap();
    assert_eq!(content.len(), len);
    crate::torture::assert_sound(&content);
}
