use std::path::Path;

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::super::compare::{Verdict, compare};
use super::*;
use crate::chain::OpenPolicy;
use crate::io::Storage;
use crate::io::sim::World;
use crate::qcow2::create::{Preallocation, create_image};
use crate::request::{Event, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::status::Content;

const SIZE: u64 = 4 << 20;

struct Room {
    storage: Arc<dyn Storage>,
}

impl Room {
    fn new() -> Self {
        Self { storage: Arc::new(World::orderly()) }
    }

    fn policy(&self) -> OpenPolicy {
        OpenPolicy { storage: self.storage.clone(), ..OpenPolicy::host() }
    }

    fn image(&self, name: &str, params: &CreateParams) -> Arc<Disk> {
        create_image(&self.storage, Path::new(name), params, Preallocation::Off).unwrap();
        self.open(DiskSpec::new(Path::new(name), Format::Qcow2)).unwrap()
    }

    fn open(&self, spec: DiskSpec) -> Result<Arc<Disk>> {
        Disk::open(&spec, &self.policy())
    }
}

fn params(cluster_bits: u32) -> CreateParams {
    CreateParams { cluster_bits: ClusterBits::new(cluster_bits).unwrap(), ..CreateParams::new(SIZE) }
}

fn request(disk: &Arc<Disk>, request: Request) -> Result<()> {
    let mut queue = disk.queue().unwrap();
    queue.submit(0, request);
    let mut events = Vec::new();
    queue.wait(Wait::Block, &mut events).unwrap();
    let Some(Event::Done { result, .. }) = events.pop() else { panic!("no end") };
    result
}

fn fill(disk: &Arc<Disk>, range: Range<u64>, byte: u8) {
    let mut buffer = Buffer::zeroed((range.end - range.start) as usize);
    buffer.fill(byte);
    let data = vec![buffer.seg(0, buffer.len())];
    request(disk, Request::Write { offset: range.start, data }).unwrap();
}

/// Some data, some zeros that were written, some that are marked, and a lot of nothing.
fn fill_some(disk: &Arc<Disk>) {
    fill(disk, 512..70_144, 1);
    fill(disk, 200_704..233_472, 2);
    fill(disk, 204_800..217_088, 0);
    request(disk, Request::WriteZeroes { offset: 1 << 20, len: 65536, unmap: false }).unwrap();
    fill(disk, SIZE - 4096..SIZE, 3);
}

fn same(a: &Arc<Disk>, b: &Arc<Disk>) -> Verdict {
    compare(a, b, false, None).unwrap()
}

/// Bytes that are data, or compressed data, in the topmost layer.
fn allocated(disk: &Arc<Disk>) -> u64 {
    let extents = disk.extents(0..disk.size()).unwrap().map(std::result::Result::unwrap);
    let data = extents.filter(|e| e.depth == 0 && matches!(e.content, Content::Data | Content::Compressed));
    data.map(|e| e.range.end - e.range.start).sum()
}

#[test]
fn copies_what_there_is_and_nothing_else() {
    for (bits, compressed, out_of_order, workers) in
        [(16, false, false, 8), (9, false, true, 3), (16, true, false, 8), (21, true, true, 1), (12, true, false, 16)]
    {
        let room = Room::new();
        let source = room.image("/source", &params(16));
        fill_some(&source);
        let target = room.image("/target", &params(bits));
        let options = CopyOptions { compressed, out_of_order, workers, target_is_zero: true, ..CopyOptions::default() };
        copy(std::slice::from_ref(&source), &target, &options, None).unwrap();
        assert_eq!(same(&source, &target), Verdict::Same, "{bits} {compressed}");
        let most = if bits == 21 { SIZE } else { 5 << 16 };
        assert!(allocated(&target) <= most, "{bits}: {} bytes", allocated(&target));
    }
}

#[test]
fn copies_disks_one_behind_another() {
    let room = Room::new();
    let sources = ["/a", "/b"].map(|name| room.image(name, &params(16)));
    fill(&sources[0], SIZE - 512..SIZE, 1);
    fill(&sources[1], 0..512, 2);
    let target = room.image("/target", &CreateParams::new(2 * SIZE));
    let options = CopyOptions { target_is_zero: true, compressed: true, ..CopyOptions::default() };
    copy(&sources, &target, &options, None).unwrap();
    let buffer = Buffer::zeroed(1024);
    let data = vec![buffer.seg(0, 1024)];
    request(&target, Request::Read { offset: SIZE - 512, data }).unwrap();
    assert!(buffer[..512].iter().all(|&b| b == 1) && buffer[512..].iter().all(|&b| b == 2));
}

#[test]
fn zeros_become_data_when_nothing_is_to_be_left_out() {
    let room = Room::new();
    let source = room.image("/source", &params(16));
    fill(&source, 0..65536, 1);
    let target = room.image("/target", &params(16));
    let options = CopyOptions { target_is_zero: true, sparse: 0, ..CopyOptions::default() };
    copy(std::slice::from_ref(&source), &target, &options, None).unwrap();
    assert_eq!((allocated(&target), same(&source, &target)), (SIZE, Verdict::Same));
}

#[test]
fn what_a_target_held_before_is_overwritten_by_zeros() {
    let room = Room::new();
    let source = room.image("/source", &params(16));
    fill_some(&source);
    let target = room.image("/target", &params(16));
    fill(&target, 0..SIZE, 7);
    copy(std::slice::from_ref(&source), &target, &CopyOptions::default(), None).unwrap();
    assert_eq!(same(&source, &target), Verdict::Same);
}

#[test]
fn over_a_backing_file_only_the_topmost_layer_is_copied() {
    let room = Room::new();
    let base = room.image("/base", &params(16));
    fill(&base, 0..1 << 20, 1);
    base.close().unwrap();
    drop(base);
    let over = |name| {
        let backing = Some((b"base".to_vec(), "qcow2".to_string()));
        room.image(name, &CreateParams { backing, ..params(16) })
    };
    let (source, target) = (over("/source"), over("/target"));
    fill(&source, 65536..131_072, 2);
    request(&source, Request::WriteZeroes { offset: 1 << 18, len: 65536, unmap: true }).unwrap();
    let options = CopyOptions { over_backing: true, ..CopyOptions::default() };
    copy(std::slice::from_ref(&source), &target, &options, None).unwrap();
    assert_eq!((allocated(&target), same(&source, &target)), (65536, Verdict::Same));
}

#[test]
fn a_target_that_is_too_small_is_refused() {
    let room = Room::new();
    let source = room.image("/source", &params(16));
    let target = room.image("/target", &CreateParams::new(SIZE - 512));
    let error = copy(&[source], &target, &CopyOptions::default(), None).unwrap_err();
    assert_eq!((error.doing, error.error.kind()), (Doing::Working, ErrorKind::Invalid));
}

#[test]
fn progress_ends_with_all_of_it() {
    let room = Room::new();
    let source = room.image("/source", &params(16));
    fill(&source, 0..3 << 20, 5);
    let target = room.image("/target", &params(16));
    let seen: Rc<RefCell<Vec<(u64, u64)>>> = Rc::default();
    let listener: Listener = {
        let seen = seen.clone();
        Rc::new(move |event| {
            if let CopyEvent::Progress { done, total } = event {
                seen.borrow_mut().push((done, total));
            }
        })
    };
    let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    copy(&[source], &target, &options, Some(listener)).unwrap();
    let seen = seen.borrow();
    assert_eq!((seen.first(), seen.last()), (Some(&(0, 3 << 20)), Some(&(3 << 20, 3 << 20))));
}

/// A compressed cluster whose bytes are no stream.
fn damaged(room: &Room) -> Arc<Disk> {
    let source = room.image("/source", &params(16));
    for at in [0, 1 << 16] {
        let mut buffer = Buffer::zeroed(1 << 16);
        buffer.fill(9);
        let data = vec![buffer.seg(0, buffer.len())];
        request(&source, Request::WriteCompressed { offset: at, data }).unwrap();
    }
    source.close().unwrap();
    drop(source);
    let queue = Queue::new(room.storage.driver().unwrap());
    let file =
        room.storage.open(Path::new("/source"), crate::io::OpenMode { write: true, ..Default::default() }).unwrap();
    let task = {
        let queue = queue.clone();
        async move {
            let length = file.length().unwrap() as usize;
            let whole = queue.read_buffer(&file, 0, length).await.unwrap();
            // The first L2 entry that is compressed; behind the header no other structure of so small an image has such bits.
            let entries = whole.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().unwrap()));
            let host = entries.skip(8192).find(|entry| entry >> 62 == 1).unwrap() & ((1 << 54) - 1);
            let mut bad = Buffer::zeroed(16);
            bad.fill(0xff);
            queue.write_buffer(&file, host, bad).await.unwrap();
            Ok(())
        }
    };
    crate::disk::block_on(&queue, task).unwrap();
    room.open(DiskSpec { readonly: true, ..DiskSpec::new(Path::new("/source"), Format::Qcow2) }).unwrap()
}

#[test]
fn what_cannot_be_read_ends_the_copy_or_is_told_and_zero() {
    let room = Room::new();
    let source = damaged(&room);
    let target = room.image("/target", &params(16));
    let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    let error = copy(std::slice::from_ref(&source), &target, &options, None).unwrap_err();
    assert_eq!((error.doing, error.offset), (Doing::Reading, 0));

    let target = room.image("/salvaged", &params(16));
    let told: Rc<RefCell<Vec<u64>>> = Rc::default();
    let listener: Listener = {
        let told = told.clone();
        Rc::new(move |event| {
            if let CopyEvent::Unreadable { offset, .. } = event {
                told.borrow_mut().push(offset);
            }
        })
    };
    copy(&[source], &target, &CopyOptions { salvage: true, ..options }, Some(listener)).unwrap();
    assert_eq!(*told.borrow(), (0..1 << 16).step_by(512).collect::<Vec<_>>());
    let buffer = Buffer::zeroed(1 << 17);
    request(&target, Request::Read { offset: 0, data: vec![buffer.seg(0, 1 << 17)] }).unwrap();
    assert!(buffer[..1 << 16].iter().all(|&b| b == 0) && buffer[1 << 16..].iter().all(|&b| b == 9));
}

#[test]
fn a_snapshot_is_copied_as_the_disk_was() {
    let room = Room::new();
    let source = room.image("/source", &params(16));
    fill(&source, 0..65536, 1);
    source.create_snapshot("then").unwrap();
    fill(&source, 0..131_072, 2);
    source.close().unwrap();
    drop(source);
    let view = room.open(DiskSpec { readonly: true, ..DiskSpec::new(Path::new("/source"), Format::Qcow2) }).unwrap();
    assert!(view.view_snapshot(|s| s.name == "other").is_err());
    view.view_snapshot(|s| s.name == "then").unwrap();
    let target = room.image("/target", &params(16));
    let options = CopyOptions { target_is_zero: true, ..CopyOptions::default() };
    copy(&[view], &target, &options, None).unwrap();
    let buffer = Buffer::zeroed(131_072);
    request(&target, Request::Read { offset: 0, data: vec![buffer.seg(0, 131_072)] }).unwrap();
    assert!(buffer[..65536].iter().all(|&b| b == 1) && buffer[65536..].iter().all(|&b| b == 0));
}

#[test]
fn bits_are_set_beside_those_that_are() {
    let room = Room::new();
    let disk = room.image("/disk", &params(16));
    for (name, enabled) in [("on", true), ("off", false)] {
        disk.create_bitmap(name, Some(65536), enabled).unwrap();
        disk.set_in_bitmap(name, &[0..1, 131_071..131_073]).unwrap();
        disk.set_in_bitmap(name, std::slice::from_ref(&(SIZE - 512..u64::MAX))).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    let disk = room.open(DiskSpec::new(Path::new("/disk"), Format::Qcow2)).unwrap();
    for name in ["on", "off"] {
        assert_eq!(disk.bitmap_ranges(name).unwrap(), [0..3 << 16, SIZE - 65536..SIZE], "{name}");
    }
    assert!(disk.set_in_bitmap("other", &[]).is_err());
}
