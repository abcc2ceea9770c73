use std::path::Path;

use cowhand_qcow2::CreateParams;

use super::*;
use crate::chain::OpenPolicy;
use crate::error::ErrorKind;
use crate::io::sim::World;
use crate::io::{Buffer, Storage};
use crate::new_image::{NewFormat, NewImage, make_image};
use crate::qcow2::create::Preallocation;
use crate::request::{Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};

const SIZE: u64 = 1 << 20;

fn open(world: &World, format: Format, readonly: bool) -> Result<Arc<Disk>> {
    let policy = OpenPolicy { storage: Arc::new(world.clone()), ..OpenPolicy::host() };
    Disk::open(&DiskSpec { readonly, lock: false, ..DiskSpec::new(Path::new("/disk"), format) }, &policy)
}

fn unfinished(path: &Path, format: NewFormat) -> NewImage {
    let hints = crate::FileHints::default();
    NewImage {
        path: path.to_path_buf(),
        format,
        preallocation: Preallocation::Off,
        replace: true,
        unfinished: true,
        hints,
    }
}

fn write(disk: &Arc<Disk>, offset: u64, flush: bool) {
    let mut queue = disk.queue().unwrap();
    let mut buffer = Buffer::zeroed(4096);
    buffer.fill(7);
    queue.submit(0, Request::Write { offset, data: vec![buffer.seg(0, 4096)] });
    queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    if flush {
        queue.submit(0, Request::Flush);
        queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    }
}

fn reads(disk: &Arc<Disk>, offset: u64) -> u8 {
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::zeroed(512);
    queue.submit(0, Request::Read { offset, data: vec![buffer.seg(0, 512)] });
    queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    buffer[0]
}

#[test]
fn an_image_opens_only_when_it_is_finished() {
    for version in [2, 3] {
        let world = World::orderly();
        let storage: Arc<dyn Storage> = Arc::new(world.clone());
        let params = CreateParams { version, ..CreateParams::new(SIZE) };
        let policy = OpenPolicy { storage, ..OpenPolicy::host() };
        let path = Path::new("/disk");
        make_image(&policy, &unfinished(path, NewFormat::Qcow2(Box::new(params), None))).unwrap();
        // Before anything is written as after.
        assert_eq!(open(&world, Format::Qcow2, true).err().unwrap().kind(), ErrorKind::Corrupt);
        let spec = DiskSpec { lock: false, unfinished: Some(SIZE), ..DiskSpec::new(path, Format::Qcow2) };
        let disk = Disk::open(&spec, &policy).unwrap();
        write(&disk, 65536, true);
        if version == 3 {
            disk.create_bitmap("b", None, true).unwrap();
        }
        let error = open(&world, Format::Qcow2, true).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("never finished"), "{error}");
        disk.finish_filling().unwrap();
        disk.close().unwrap();
        assert_eq!(reads(&open(&world, Format::Qcow2, true).unwrap(), 65536), 7);
    }
}

#[test]
fn a_raw_file_has_its_length_only_when_it_is_finished() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let length = || std::fs::metadata(&path).unwrap().len();
    let policy = OpenPolicy::host();
    make_image(&policy, &unfinished(&path, NewFormat::Raw(SIZE))).unwrap();
    let spec = DiskSpec { unfinished: Some(SIZE), ..DiskSpec::new(&path, Format::Raw) };
    let disk = Disk::open(&spec, &policy).unwrap();
    assert_eq!(length(), 512);
    write(&disk, 4096, true);
    assert_eq!(length(), 8192);
    disk.finish_filling().unwrap();
    assert_eq!((length(), reads(&disk, 4096), reads(&disk, SIZE - 512)), (SIZE, 7, 0));
}
