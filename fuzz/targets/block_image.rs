//! A hostile image in use: opened over the memory driver, read, written, discarded, snapshotted, resized, checked and repaired. Whatever
//! its bytes, nothing panics, hangs or takes memory without bound.
//!
//! The input is the image; its last 64 bytes are what is done with it: a byte of options, and operations of four bytes each.

#![no_main]

mod memory;

use std::path::Path;
use std::sync::Arc;

use cowhand_block::check::{self, CheckOptions, Repair};
use cowhand_block::io::{IoSeg, Storage};
use cowhand_block::{Disk, DiskQueue, DiskSpec, Event, Format, OpenPolicy, Request, RequestQueue, Wait};
use libfuzzer_sys::fuzz_target;

/// Bytes of the input that say what is done.
const SCRIPT: usize = 64;

/// No file grows past this, as on a full disk.
const FILE_MAX: u64 = 2 << 20;

const IMAGE: &str = "/disk.qcow2";

fuzz_target!(|data: &[u8]| {
    let (image, script) = data.split_at(data.len().saturating_sub(SCRIPT));
    let [options, operations @ ..] = script else { return };
    let world = cowhand_block::io::memory::memory();
    world.limit_files(FILE_MAX);
    world.put(Path::new(IMAGE), image.to_vec());
    // What the images of the corpus name as their backing file.
    world.put(Path::new("/base.img"), vec![0xba; 40_000]);
    let policy = OpenPolicy {
        probe: false,
        storage: Arc::new(world.clone()) as Arc<dyn Storage>,
        allow_dirs: vec!["/".into()],
        temp_dir: "/".into(),
        ..OpenPolicy::host()
    };
    if options & 1 != 0 {
        check(&policy, Repair::None);
    }
    if options & 2 != 0 {
        check(&policy, Repair::All);
    }
    let spec = DiskSpec {
        readonly: options & 4 != 0,
        ephemeral: options & 8 != 0,
        metadata_cache: (options & 16 != 0).then_some(1),
        ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2)
    };
    if let Ok(disk) = Disk::open(&spec, &policy) {
        use_disk(&disk, operations);
        let _ = disk.close();
    }
    check(&policy, if options & 32 == 0 { Repair::All } else { Repair::Leaks });
    // A repaired image is no less safe to use.
    if let Ok(disk) = Disk::open(&spec, &policy) {
        use_disk(&disk, &operations[..operations.len().min(16)]);
        let _ = disk.close();
    }
});

fn check(policy: &OpenPolicy, repair: Repair) {
    let _ = check::check(&DiskSpec::new(Path::new(IMAGE), Format::Qcow2), &CheckOptions { repair, lock: true }, policy, |_| {});
}

fn use_disk(disk: &Arc<Disk>, operations: &[u8]) {
    let Ok(mut queue) = disk.queue() else { return };
    for operation in operations.chunks_exact(4) {
        let &[what, high, low, length] = operation else { return };
        let part = u64::from(high) << 8 | u64::from(low);
        let size = disk.size();
        // Somewhere on the disk, or a little past its end.
        let offset = (size >> 16).saturating_mul(part) & !511;
        let offset = if what & 0x80 == 0 { offset } else { size.saturating_sub(part * 512) };
        let len = (512 * (1 + u64::from(length))).min(size.saturating_sub(offset).max(512));
        match what % 12 {
            0..=2 => read(&mut queue, offset, len as usize),
            3 | 4 => write(&mut queue, offset, len as usize, low),
            5 => serve(&mut queue, Request::Discard { offset, len }),
            6 => serve(&mut queue, Request::WriteZeroes { offset, len, unmap: length & 1 == 0 }),
            7 => serve(&mut queue, Request::Flush),
            8 => drop(disk.create_snapshot("fuzz")),
            9 => drop(disk.apply_snapshot("1")),
            10 => drop(disk.delete_snapshot("1")),
            _ => drop(disk.resize(part * 512 * (1 + u64::from(length & 3)))),
        }
    }
}

fn read(queue: &mut DiskQueue, offset: u64, len: usize) {
    let mut bytes = vec![0; len];
    let data = vec![seg(&mut bytes)];
    serve(queue, Request::Read { offset, data });
}

fn write(queue: &mut DiskQueue, offset: u64, len: usize, byte: u8) {
    let mut bytes = vec![byte; len];
    let data = vec![seg(&mut bytes)];
    serve(queue, Request::Write { offset, data });
}

fn seg(bytes: &mut [u8]) -> IoSeg {
    // SAFETY: both callers keep the bytes, and do not touch them, until the request has ended.
    unsafe { IoSeg::new(bytes.as_mut_ptr(), bytes.len()) }
}

fn serve(queue: &mut DiskQueue, request: Request) {
    queue.submit(0, request);
    let mut events = Vec::new();
    while events.is_empty() {
        queue.wait(Wait::Block, &mut events).expect("the memory driver does not fail");
    }
    assert!(matches!(events.as_slice(), [Event::Done { .. }]));
}
