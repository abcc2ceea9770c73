use cowhand_qcow2::{ClusterBits, CreateParams};

use super::*;
use crate::bytes::{ByteQueue, ByteRequest, Memory};
use crate::check::{CheckOptions, check};
use crate::error::ErrorKind;
use crate::io::sim::{Rng, World};
use crate::io::{Buffer, Storage};
use crate::spec::Format;
use crate::status::Content;
use crate::{Preallocation, create_image};

const FILE: &str = "/file";

fn policy(world: &World) -> OpenPolicy {
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    }
}

fn raw(file: FileSpec) -> DiskSpec {
    DiskSpec { force_raw: true, ..DiskSpec::new(Path::new(""), Format::Raw).in_file(file) }
}

fn null(null: Null) -> FileSpec {
    FileSpec { path: "null-co://".into(), protocol: Protocol::Null(null) }
}

fn part(offset: u64, size: Option<u64>) -> FileSpec {
    let part = Part { offset, size, of: FileSpec::host(Path::new(FILE)) };
    FileSpec { path: FILE.into(), protocol: Protocol::Part(Box::new(part)) }
}

fn filled(len: u64, value: u8) -> Memory {
    Memory::new(Buffer::from_bytes(&vec![value; len as usize]))
}

fn read(queue: &mut ByteQueue, offset: u64, len: u64) -> Vec<u8> {
    let (result, memory) = queue.run(ByteRequest::Read { offset, memory: filled(len, 0xee) });
    result.unwrap();
    memory.unwrap().into_buffer().to_vec()
}

fn write(queue: &mut ByteQueue, offset: u64, len: u64, value: u8) -> Result<()> {
    queue.run(ByteRequest::Write { offset, memory: filled(len, value), durable: false }).0
}

#[test]
fn nothing_takes_all_and_reads_as_zeros() {
    let world = World::orderly();
    for read_zeroes in [false, true] {
        let size = 1 << 30;
        let spec = raw(null(Null { size, read_zeroes, ..Null::default() }));
        let disk = Disk::open(&spec, &policy(&world)).unwrap();
        let mut queue = disk.byte_queue().unwrap();
        write(&mut queue, size - 5000, 5000, 7).unwrap();
        assert_eq!(read(&mut queue, size - 5000, 5000), [0; 5000]);
        assert!(write(&mut queue, size - 5000, 5001, 7).is_err());
        let extents: Vec<_> = disk.extents(0..size).unwrap().map(|extent| extent.unwrap().content).collect();
        assert_eq!(extents, [if read_zeroes { Content::Zero } else { Content::Data }]);
        drop(queue);
        disk.close().unwrap();
    }
}

#[test]
fn what_takes_time_does_not_hold_the_others_up() {
    let host = OpenPolicy::host();
    let spec = raw(null(Null { latency: std::time::Duration::from_millis(50), ..Null::default() }));
    let mut queue = Disk::open(&spec, &host).unwrap().byte_queue().unwrap();
    let started = std::time::Instant::now();
    (0..2).for_each(|tag| queue.submit(tag, ByteRequest::Read { offset: 0, memory: filled(512, 1) }));
    while queue.in_flight() > 0 {
        queue.wait().unwrap();
    }
    assert!(started.elapsed() >= std::time::Duration::from_millis(50));
}

#[test]
fn a_part_of_a_file_ends_where_it_ends() {
    for seed in 0..20 {
        let world = World::new(seed);
        let mut model: Vec<u8> = (0..64 << 10).map(|i| (i / 100) as u8).collect();
        world.put(Path::new(FILE), model.clone());
        let (offset, size) = (5000, 20 << 10);
        let disk = Disk::open(&raw(part(offset, Some(size))), &policy(&world)).unwrap();
        assert_eq!(disk.size(), size);
        let mut queue = disk.byte_queue().unwrap();
        let mut dice = Rng::new(seed);
        for _ in 0..40 {
            let at = dice.below(size);
            let len = 1 + dice.below((size - at).min(3000));
            let (start, end) = ((offset + at) as usize, (offset + at + len) as usize);
            match dice.below(3) {
                0 => assert_eq!(read(&mut queue, at, len), model[start..end]),
                1 => {
                    write(&mut queue, at, len, 9).unwrap();
                    model[start..end].fill(9);
                }
                _ => {
                    let request =
                        ByteRequest::WriteZeroes { offset: at, len, unmap: true, fast_only: false, durable: false };
                    queue.run(request).0.unwrap();
                    model[start..end].fill(0);
                }
            }
        }
        drop(queue);
        disk.close().unwrap();
        assert_eq!(world.content(Path::new(FILE)).unwrap(), model, "seed {seed}");
    }
}

#[test]
fn a_part_that_is_not_there_is_refused() {
    let world = World::orderly();
    world.put(Path::new(FILE), vec![0; 4096]);
    for (offset, size, said) in [
        (4097, None, "Offset (4097) cannot be greater than size of the containing file (4096)"),
        (
            512,
            Some(4096),
            "The sum of offset (512) and size (4096) has to be smaller or equal to the  actual size of the containing file \
             (4096)",
        ),
    ] {
        let error = Disk::open(&raw(part(offset, size)), &policy(&world)).err().unwrap();
        assert_eq!(error.reason(), said);
    }
}

#[test]
fn an_image_does_not_grow_out_of_its_part() {
    let world = World::orderly();
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let params = CreateParams { cluster_bits: ClusterBits::new(12).unwrap(), ..CreateParams::new(1 << 20) };
    create_image(&storage, Path::new(FILE), &params, Preallocation::Off).unwrap();
    let mut bytes = world.content(Path::new(FILE)).unwrap();
    let size = bytes.len().next_multiple_of(4096) as u64 + (64 << 10);
    bytes.resize(size as usize, 0);
    bytes.extend([0xaa; 4096]);
    world.put(Path::new(FILE), bytes.clone());
    let spec = DiskSpec::new(Path::new(""), Format::Qcow2).in_file(part(0, Some(size)));
    let disk = Disk::open(&spec, &policy(&world)).unwrap();
    let mut queue = disk.byte_queue().unwrap();
    let error = write(&mut queue, 0, 128 << 10, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    write(&mut queue, 0, 8192, 7).unwrap();
    drop(queue);
    disk.close().unwrap();
    let after = world.content(Path::new(FILE)).unwrap();
    assert_eq!(after[size as usize..], bytes[size as usize..]);
    let report = check(&spec, &CheckOptions::default(), &policy(&world), |_| {}).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}

#[test]
fn an_image_may_lie_in_the_disk_of_another_one() {
    let world = World::new(1);
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let small = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(64 << 10) };
    create_image(&storage, Path::new("/inner"), &small, Preallocation::Off).unwrap();
    let inner = world.content(Path::new("/inner")).unwrap();
    create_image(&storage, Path::new(FILE), &CreateParams::new(1 << 20), Preallocation::Off).unwrap();
    let outer = DiskSpec::new(Path::new(FILE), Format::Qcow2);
    let disk = Disk::open(&outer, &policy(&world)).unwrap();
    let mut queue = disk.byte_queue().unwrap();
    let memory = Memory::new(Buffer::from_bytes(&inner));
    queue.run(ByteRequest::Write { offset: 0, memory, durable: true }).0.unwrap();
    drop(queue);
    disk.close().unwrap();

    let nested = FileSpec { path: FILE.into(), protocol: Protocol::Image(Box::new(outer.clone())) };
    let spec = DiskSpec::new(Path::new(""), Format::Qcow2).in_file(nested);
    for round in 0..3 {
        let disk = Disk::open(&spec, &policy(&world)).unwrap();
        assert_eq!(disk.size(), 64 << 10);
        let mut queue = disk.byte_queue().unwrap();
        if round > 0 {
            assert_eq!(read(&mut queue, 1000, 3000), [round; 3000]);
        }
        write(&mut queue, 1000, 3000, round + 1).unwrap();
        drop(queue);
        disk.close().unwrap();
    }
    for spec in [&outer, &spec] {
        let report = check(spec, &CheckOptions::default(), &policy(&world), |_| {}).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0));
    }
}
