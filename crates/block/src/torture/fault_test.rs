//! Failures at every single step of one story, rather than at a seed's choice.

use super::*;

fn policy(world: &World) -> OpenPolicy {
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: vec![PathBuf::from("/")],
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    }
}

fn open(world: &World, metadata_cache: Option<u64>) -> Arc<Disk> {
    let spec = DiskSpec { metadata_cache, ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) };
    Disk::open(&spec, &policy(world)).unwrap()
}

/// Sends a request and serves it to its end; from step `faulty` on every operation fails, unless it is flushed.
fn serve(world: &World, queue: &mut DiskQueue, request: Request, faulty: u64) -> bool {
    queue.submit(0, request);
    let mut events = Vec::new();
    for step in 0.. {
        if step == faulty {
            world.set_faults(Faults { io: 1, ..Faults::default() });
        }
        queue.wait(Wait::Poll, &mut events).unwrap();
        if !events.is_empty() {
            break;
        }
        world.step();
    }
    world.set_faults(Faults::default());
    matches!(events.pop(), Some(Event::Done { result: Ok(()), .. }))
}

fn write(world: &World, queue: &mut DiskQueue, offset: u64, bytes: &[u8], faulty: u64) -> bool {
    let buffer = Buffer::from_bytes(bytes);
    serve(world, queue, Request::Write { offset, data: vec![buffer.seg(0, buffer.len())] }, faulty)
}

/// With a cache of eight slices, seven of them changed, a write is made that needs two more in one L2 table: the second one forces
/// a commit in the middle of taking the write's clusters into the mapping. Everything fails from step `faulty` on.
fn write_across_slices(faulty: u64) -> Result<bool, String> {
    let world = World::new(faulty);
    let params = CreateParams { cluster_bits: ClusterBits::new(13).unwrap(), ..CreateParams::new(64 << 20) };
    make(&world, Path::new(IMAGE), &params)?;
    let disk = open(&world, Some(1));
    let mut queue = disk.queue().unwrap();
    for slice in 0..7 {
        assert!(write(&world, &mut queue, slice << 22, &[1; 8192], u64::MAX));
    }
    let written = write(&world, &mut queue, (9 << 22) - 8192, &[2; 16384], faulty);
    assert!(serve(&world, &mut queue, Request::Flush, u64::MAX));
    assert!(serve(&world, &mut queue, Request::Flush, u64::MAX));
    // Takes whatever is free.
    assert!(write(&world, &mut queue, 0, &[3; 1 << 20], u64::MAX));
    drop(queue);
    disk.close().map_err(text)?;
    drop(disk);
    check::check(&world.content(Path::new(IMAGE)).unwrap()).map(|()| written)
}

#[test]
fn a_write_that_fails_between_two_slices_gives_back_only_what_is_not_mapped() {
    let failed: Vec<_> =
        (0..30).filter_map(|n| write_across_slices(n).err().map(|e| format!("step {n}: {e}"))).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(!write_across_slices(4).unwrap());
    assert!(write_across_slices(u64::MAX).unwrap());
}

#[test]
fn writing_and_discarding_without_a_flush_does_not_grow_the_file_for_ever() {
    let world = World::orderly();
    let params = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(1 << 20) };
    make(&world, Path::new(IMAGE), &params).unwrap();
    let disk = open(&world, None);
    let mut queue = disk.queue().unwrap();
    for _ in 0..60_000 {
        assert!(write(&world, &mut queue, 0, &[1; 512], u64::MAX));
        assert!(serve(&world, &mut queue, Request::Discard { offset: 0, len: 512 }, u64::MAX));
    }
    let len = world.content(Path::new(IMAGE)).unwrap().len();
    assert!(len < 16 << 20, "{len} bytes");
}
