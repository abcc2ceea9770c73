use std::path::Path;

use super::*;
use crate::bytes::{ByteQueue, ByteRequest, Memory};
use crate::chain::OpenPolicy;
use crate::io::sim::{Rng, World};
use crate::io::{Buffer, Storage};
use crate::protocol::Protocol;
use crate::spec::{DiskSpec, Format};
use crate::{Preallocation, create_image};

const FILE: &str = "/file";
const SIZE: u64 = 1 << 20;

fn policy(world: &World) -> OpenPolicy {
    let temp_dir = PathBuf::from("/");
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir,
        ..OpenPolicy::host()
    }
}

/// A world with an image of 1 MiB.
fn world_with_image() -> World {
    let world = World::new(7);
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    let params = cowhand_qcow2::CreateParams::new(SIZE);
    create_image(&storage, Path::new(FILE), &params, Preallocation::Off).unwrap();
    world
}

fn spec(format: Format, rules: Vec<Rule>, limits: Limits) -> DiskSpec {
    let of = FileSpec::host(Path::new(FILE));
    let debug = Debug { config: None, rules, limits, of };
    let file = FileSpec { path: FILE.into(), protocol: Protocol::Debug(Box::new(debug)) };
    DiskSpec { force_raw: true, ..DiskSpec::new(Path::new(""), format).in_file(file) }
}

fn rule(group: &str, options: &[(&str, &str)]) -> Rule {
    Rule::parse(group, options.iter().copied()).unwrap()
}

fn memory(len: u64, value: u8) -> Memory {
    Memory::new(Buffer::from_bytes(&vec![value; len as usize]))
}

fn write(queue: &mut ByteQueue, offset: u64, len: u64) -> Result<()> {
    queue.run(ByteRequest::Write { offset, memory: memory(len, 9), durable: false }).0
}

fn read(queue: &mut ByteQueue, offset: u64, len: u64) -> Result<()> {
    queue.run(ByteRequest::Read { offset, memory: memory(len, 0) }).0
}

fn errno(result: Result<()>) -> i32 {
    result.err().and_then(|e| e.host_error().and_then(io::Error::raw_os_error)).unwrap_or(0)
}

#[test]
fn a_fault_meets_what_it_is_for() {
    let world = World::orderly();
    world.put(Path::new(FILE), vec![1; SIZE as usize]);
    let once = [("event", "none"), ("iotype", "read"), ("sector", "8"), ("errno", "28"), ("once", "on")];
    let always = [("event", "none"), ("iotype", "flush")];
    let rules = vec![rule("inject-error", &once), rule("inject-error", &always)];
    let disk = crate::Disk::open(&spec(Format::Raw, rules, Limits::default()), &policy(&world)).unwrap();
    let mut queue = disk.byte_queue().unwrap();
    // There is nothing to flush yet.
    queue.run(ByteRequest::Flush).0.unwrap();
    write(&mut queue, 4096, 512).unwrap();
    read(&mut queue, 0, 4096).unwrap();
    assert_eq!(errno(read(&mut queue, 4000, 200)), libc::ENOSPC);
    read(&mut queue, 4000, 200).unwrap();
    assert_eq!(errno(queue.run(ByteRequest::Flush).0), libc::EIO);
}

#[test]
fn states_count_what_has_happened() {
    let world = World::orderly();
    world.put(Path::new(FILE), vec![1; SIZE as usize]);
    let rules = vec![
        rule("set-state", &[("event", "write_aio"), ("state", "1"), ("new_state", "2")]),
        rule("inject-error", &[("event", "write_aio"), ("state", "2"), ("once", "on")]),
    ];
    let disk = crate::Disk::open(&spec(Format::Raw, rules, Limits::default()), &policy(&world)).unwrap();
    let mut queue = disk.byte_queue().unwrap();
    write(&mut queue, 0, 512).unwrap();
    read(&mut queue, 0, 512).unwrap();
    assert_eq!(errno(write(&mut queue, 0, 512)), libc::EIO);
    write(&mut queue, 0, 512).unwrap();
}

#[test]
fn content_is_told_from_metadata() {
    let world = world_with_image();
    let rules = vec![rule("inject-error", &[("event", "write_aio"), ("iotype", "write"), ("once", "on")])];
    let spec = spec(Format::Qcow2, rules, Limits::default());
    let disk = crate::Disk::open(&spec, &policy(&world)).unwrap();
    let mut queue = disk.byte_queue().unwrap();
    assert_eq!(errno(write(&mut queue, 0, 65536)), libc::EIO);
    write(&mut queue, 0, 65536).unwrap();
    read(&mut queue, 0, 65536).unwrap();
    drop(queue);
    disk.close().unwrap();
    let report = crate::check::check(&spec, &Default::default(), &policy(&world), |_| {}).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}

#[test]
fn tables_are_told_from_other_metadata() {
    let world = world_with_image();
    let rules = vec![rule("inject-error", &[("event", "l2_load"), ("once", "on")])];
    let spec = spec(Format::Qcow2, rules, Limits::default());
    for written in [false, true] {
        let disk = crate::Disk::open(&spec, &policy(&world)).unwrap();
        let mut queue = disk.byte_queue().unwrap();
        // Without a table there is nothing to load.
        assert_eq!(errno(read(&mut queue, 0, 512)), if written { libc::EIO } else { 0 });
        read(&mut queue, 0, 512).unwrap();
        write(&mut queue, 0, 512).unwrap();
    }
}

/// Whatever the limits, a disk is what it would be without them.
#[test]
fn limits_do_not_change_what_is_done() {
    for seed in 0..12 {
        let world = world_with_image();
        let mut dice = Rng::new(seed);
        let align = 512 << dice.below(4);
        let mut some = |unit: u32| (dice.below(3) > 0).then(|| unit * (1 + dice.below(12) as u32));
        let (opt_write_zero, opt_discard) = (some(align), some(align));
        let limits = Limits {
            align: Some(align),
            max_transfer: some(align),
            opt_write_zero,
            max_write_zero: some(opt_write_zero.unwrap_or(align)),
            opt_discard,
            max_discard: some(opt_discard.unwrap_or(align)),
        };
        let spec = spec(Format::Qcow2, Vec::new(), limits);
        let disk = crate::Disk::open(&spec, &policy(&world)).unwrap();
        let mut queue = disk.byte_queue().unwrap();
        let mut model = vec![0; SIZE as usize];
        for _ in 0..60 {
            let offset = dice.below(SIZE);
            let len = 1 + dice.below((SIZE - offset).min(100_000));
            let bytes = offset as usize..(offset + len) as usize;
            match dice.below(3) {
                0 => {
                    write(&mut queue, offset, len).unwrap();
                    model[bytes].fill(9);
                }
                1 => {
                    let request = ByteRequest::WriteZeroes {
                        offset,
                        len,
                        unmap: dice.one_in(2),
                        fast_only: false,
                        durable: false,
                    };
                    queue.run(request).0.unwrap();
                    model[bytes].fill(0);
                }
                _ => {
                    let (result, memory) = queue.run(ByteRequest::Read { offset, memory: memory(len, 1) });
                    result.unwrap();
                    assert!(memory.unwrap().into_buffer()[..] == model[bytes], "seed {seed}");
                }
            }
        }
        drop(queue);
        disk.close().unwrap();
        let report = crate::check::check(&spec, &Default::default(), &policy(&world), |_| {}).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "seed {seed}");
    }
}

#[test]
fn pieces_are_whole_units_between_the_ends() {
    let split = |range: Range<u64>, unit, most| pieces(range, unit, most).map(|r| (r.start, r.end)).collect::<Vec<_>>();
    assert_eq!(split(5..47, Some(10), Some(20)), [(5, 10), (10, 30), (30, 40), (40, 47)]);
    assert_eq!(split(3..7, Some(10), None), [(3, 7)]);
    assert_eq!(split(0..25, None, Some(10)), [(0, 10), (10, 20), (20, 25)]);
    assert_eq!(split(0..0, None, None), []);
}

#[test]
fn rules_come_from_a_file_too() {
    let text = "# first\n[inject-error]\nevent = \"read_aio\"\nerrno =\"5\"\n\n[set-state]\nevent = \"none\"\nnew_state = \"3\"\n";
    let expected = [
        rule("inject-error", &[("event", "read_aio"), ("errno", "5")]),
        rule("set-state", &[("event", "none"), ("new_state", "3")]),
    ];
    assert_eq!(config::parse(text).unwrap(), expected);
    for (text, said) in [
        ("event = \"none\"", "no group defined"),
        ("[foo]", "There is no option group 'foo'"),
        ("[set-state]\nevent", "line 2 is no key = \"value\""),
        ("[set-state]\nevent = \"x\"", "invalid parameter value: x"),
        ("[inject-error]\nerrno = \"5\"", "Missing event name for rule"),
    ] {
        assert_eq!(config::parse(text), Err(said.into()));
    }
    let inside = Event::named("cluster_free").unwrap_err();
    assert!(inside.contains("does not happen in cowhand"), "{inside}");
}
