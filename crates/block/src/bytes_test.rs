use std::path::{Path, PathBuf};

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::*;
use crate::io::Storage;
use crate::io::sim::{Rng, World};
use crate::{DiskSpec, Format, OpenPolicy, Preallocation, create_image};

const SIZE: u64 = 64 << 10;
const RAW: &str = "/disk.raw";
const QCOW2: &str = "/disk.qcow2";

fn policy(world: &World) -> OpenPolicy {
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    }
}

fn open(world: &World, format: Format) -> Arc<Disk> {
    let path = if format == Format::Raw { RAW } else { QCOW2 };
    Disk::open(&DiskSpec::new(Path::new(path), format), &policy(world)).unwrap()
}

/// An image of 4 KiB clusters, over a backing file or not.
fn make_qcow2(world: &World, backing: Option<&str>) {
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let backing = backing.map(|name| (name.as_bytes().to_vec(), "raw".into()));
    let params = CreateParams { cluster_bits: ClusterBits::new(12).unwrap(), backing, ..CreateParams::new(SIZE) };
    create_image(&storage, Path::new(QCOW2), &params, Preallocation::Off).unwrap();
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

fn zeroes(offset: u64, len: u64, fast_only: bool) -> ByteRequest {
    ByteRequest::WriteZeroes { offset, len, unmap: true, fast_only, durable: true }
}

/// Requests of any offset and length, beside a model; several at once where they do not overlap.
fn bytes_like_a_model(format: Format, backing: Option<&str>, seed: u64) {
    let world = World::new(seed);
    let mut model = vec![0; SIZE as usize];
    if backing.is_some() {
        model.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i / 100) as u8);
    }
    world.put(Path::new(RAW), model.clone());
    if format == Format::Qcow2 {
        make_qcow2(&world, backing.map(|_| "disk.raw"));
    }
    let disk = open(&world, format);
    let mut queue = disk.byte_queue().unwrap();
    queue.copy_on_read(seed % 2 == 1);
    let mut rng = Rng::new(seed);
    for turn in 0..300_u64 {
        let offset = rng.below(SIZE);
        let len = (rng.below(700) * (1 + 9 * rng.below(2))).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        match rng.below(6) {
            0 => assert!(queue.run(zeroes(offset, len, false)).0.map(|()| model[range].fill(0)).is_ok()),
            1 => {
                queue.run(ByteRequest::Discard { offset, len }).0.unwrap();
                let found = read(&mut queue, offset, len);
                // It may be zero or as it was, a byte at a time.
                let both = found.iter().zip(&mut model[range]);
                both.for_each(|(found, byte)| {
                    assert!(*found == 0 || found == byte);
                    *byte = *found;
                });
            }
            2 | 3 => {
                // Two writers whose bytes do not meet though their sectors may.
                let middle = offset + rng.below(len + 1);
                for (tag, (from, to)) in [(offset, middle), (middle, offset + len)].into_iter().enumerate() {
                    let value = (turn as u8).wrapping_mul(2) + tag as u8;
                    let memory = filled(to - from, value);
                    queue.submit(tag as u64, ByteRequest::Write { offset: from, memory, durable: rng.one_in(9) });
                    model[from as usize..to as usize].fill(value);
                }
                while queue.in_flight() > 0 {
                    queue.wait().unwrap();
                }
                let done = queue.finished();
                assert_eq!(done.len(), 2);
                done.into_iter().for_each(|done| done.result.unwrap());
            }
            _ => assert_eq!(read(&mut queue, offset, len), model[range], "{len} bytes at {offset}"),
        }
    }
    drop(queue);
    disk.close().unwrap();
    let disk = open(&world, format);
    let found = read(&mut disk.byte_queue().unwrap(), 0, SIZE);
    assert!(found == model, "seed {seed}");
}

#[test]
fn any_bytes_of_a_raw_disk_are_read_and_written() {
    (0..8).for_each(|seed| bytes_like_a_model(Format::Raw, None, seed));
}

#[test]
fn any_bytes_of_an_image_are_read_and_written() {
    (0..16).for_each(|seed| bytes_like_a_model(Format::Qcow2, None, seed));
}

#[test]
fn any_bytes_of_an_overlay_are_read_and_written() {
    (0..16).for_each(|seed| bytes_like_a_model(Format::Qcow2, Some("disk.raw"), seed));
}

#[test]
fn a_raw_file_grows_by_the_bytes_written_alone() {
    let world = World::orderly();
    world.put(Path::new(RAW), vec![1; 1000]);
    let disk = open(&world, Format::Raw);
    let mut queue = disk.byte_queue().unwrap();
    write(&mut queue, 999, 10, 2).unwrap();
    assert!(write(&mut queue, 1020, 5, 2).is_err());
    drop(queue);
    disk.close().unwrap();
    let content = world.content(Path::new(RAW)).unwrap();
    assert_eq!((content.len(), content[998], content[999]), (1009, 1, 2));
}

#[test]
fn what_lies_past_the_end_is_an_io_error() {
    let world = World::orderly();
    make_qcow2(&world, None);
    let disk = open(&world, Format::Qcow2);
    let mut queue = disk.byte_queue().unwrap();
    for (offset, len) in [(SIZE - 1, 2), (SIZE, 1), (SIZE + 1, 0), (u64::MAX, 2)] {
        assert_eq!(write(&mut queue, offset, len, 1).unwrap_err().strerror(), "Input/output error");
    }
    write(&mut queue, SIZE, 0, 1).unwrap();
    write(&mut queue, SIZE - 1, 1, 1).unwrap();
}

#[test]
fn parts_of_memory_are_read_and_written_in_their_order() {
    let world = World::orderly();
    make_qcow2(&world, None);
    let disk = open(&world, Format::Qcow2);
    let mut queue = disk.byte_queue().unwrap();
    let memory = || Memory::of_parts(Buffer::from_bytes(b"abcdefgh"), vec![4..6, 0..3, 3..3]).unwrap();
    queue.run(ByteRequest::Write { offset: 700, memory: memory(), durable: false }).0.unwrap();
    assert_eq!(read(&mut queue, 699, 7), b"\0efabc\0");
    let into = Memory::of_parts(Buffer::from_bytes(b"........"), vec![6..8, 1..2]).unwrap();
    let (result, memory) = queue.run(ByteRequest::Read { offset: 700, memory: into });
    result.unwrap();
    assert_eq!(&memory.unwrap().into_buffer()[..], b".a....ef");
    let nowhere = |parts| Memory::of_parts(Buffer::zeroed(8), parts).is_none();
    assert!(nowhere(vec![0..5, 4..6]) && nowhere(vec![0..1, 7..9]));
}

#[test]
fn zeros_that_must_be_written_are_refused_where_they_must_not_be() {
    let world = World::orderly();
    make_qcow2(&world, None);
    let disk = open(&world, Format::Qcow2);
    let mut queue = disk.byte_queue().unwrap();
    write(&mut queue, 0, 8192, 7).unwrap();
    assert_eq!(queue.run(zeroes(4096, 100, true)).0.unwrap_err().strerror(), "Operation not supported");
    assert_eq!(read(&mut queue, 4096, 100), [7; 100]);
    queue.run(zeroes(4096, 4096, true)).0.unwrap();
    assert_eq!(read(&mut queue, 4095, 2), [7, 0]);
}

#[test]
fn zeros_are_said_by_the_image_itself() {
    let world = World::orderly();
    make_qcow2(&world, None);
    let disk = open(&world, Format::Qcow2);
    let mut queue = disk.byte_queue().unwrap();
    queue.run(zeroes(5000, 5000, false)).0.unwrap();
    let extents: Vec<_> = disk.extents(0..SIZE).unwrap().map(|e| e.map(|e| (e.range, e.content)).unwrap()).collect();
    let zeros = (4096..12288, Content::Zero);
    assert_eq!(extents, [(0..4096, Content::Nothing), zeros, (12288..SIZE, Content::Nothing)]);
}

#[test]
fn what_is_read_from_below_is_copied_by_clusters_if_it_is_asked_for() {
    let world = World::orderly();
    world.put(Path::new(RAW), vec![9; SIZE as usize]);
    make_qcow2(&world, Some("disk.raw"));
    let disk = open(&world, Format::Qcow2);
    let depths = |disk: &Arc<Disk>| {
        let extents = disk.extents(0..disk.size()).unwrap().map(Result::unwrap);
        extents.map(|extent| (extent.range, extent.depth)).collect::<Vec<_>>()
    };
    let mut queue = disk.byte_queue().unwrap();
    read(&mut queue, 5000, 10);
    assert_eq!(depths(&disk), [(0..SIZE, 1)]);
    queue.copy_on_read(true);
    assert_eq!(read(&mut queue, 5000, 4000), [9; 4000]);
    assert_eq!(depths(&disk), [(0..4096, 1), (4096..12288, 0), (12288..SIZE, 1)]);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let world = World::orderly();
    make_qcow2(&world, None);
    let before = world.content(Path::new(QCOW2));
    let spec = DiskSpec { readonly: true, ..DiskSpec::new(Path::new(QCOW2), Format::Qcow2) };
    let disk = Disk::open(&spec, &policy(&world)).unwrap();
    let mut queue = disk.byte_queue().unwrap();
    assert_eq!(write(&mut queue, 3, 5, 1).unwrap_err().strerror(), "Operation not permitted");
    assert_eq!(queue.run(zeroes(0, 4096, false)).0.unwrap_err().strerror(), "Operation not permitted");
    drop(queue);
    drop(disk);
    assert!(world.content(Path::new(QCOW2)) == before);
}
