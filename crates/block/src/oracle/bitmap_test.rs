//! Persistent bitmaps, both ways: what QEMU's tools record is read by the engine, and what the engine records by QEMU (its NBD server
//! shows a bitmap's bits, `qemu-img map` prints them).

// A list of one range is what many bitmaps have.
#![allow(clippy::single_range_in_vec_init)]

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use cowhand_qcow2::{BitmapFlags, BitmapTableEntry, DirectoryEntry, Header};

use super::dice;
use super::guest::{ask, policy};
use super::image::{Base, Made, Shape, make, noise};
use super::qemu::{self, assert_clean, content, text};
use super::write_test::play;
use crate::bitmap::BitmapState;
use crate::disk::Disk;
use crate::error::ErrorKind;
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::request::Request;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

fn open(path: &Path) -> Arc<Disk> {
    Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy(Engine::Auto)).unwrap()
}

fn open_read_only(path: &Path) -> Arc<Disk> {
    let spec = DiskSpec { readonly: true, ..DiskSpec::new(path, Format::Qcow2) };
    Disk::open(&spec, &policy(Engine::Auto)).unwrap()
}

fn image(options: &str, size: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
    (dir, path)
}

fn add(path: &Path, options: &[&str], name: &str) {
    let mut args = vec!["bitmap", "--add"];
    args.extend(options);
    args.extend([text(path), name]);
    qemu::img(&args);
}

/// A server that ends with the test, or of itself when its client has gone.
struct Server(Child);

impl Server {
    /// Waits until it has ended, and the image is closed.
    fn wait(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A bitmap's set bits as QEMU has them.
fn qemu_ranges(path: &Path, name: &str) -> Vec<Range<u64>> {
    let socket = path.with_extension("sock");
    let args = ["-f", "qcow2", "-B", name, "-k", text(&socket), text(path)];
    let server = Server(qemu::command("qemu-nbd", &args).spawn().unwrap());
    let deadline = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let options =
        format!("driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}", text(&socket));
    let said = qemu::img(&["map", "--output=json", "--image-opts", &options]);
    server.wait();
    fs::remove_file(&socket).ok();
    let number = |line: &str, key: &str| -> u64 {
        let rest = line.split_once(&format!("\"{key}\": ")).unwrap().1;
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    // What is dirty is shown as if it were no data.
    for line in said.lines().filter(|line| line.contains("\"data\": false")) {
        let (start, len) = (number(line, "start"), number(line, "length"));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end += len,
            _ => ranges.push(start..start + len),
        }
    }
    ranges
}

/// What the file says of its bitmaps.
fn directory(path: &Path) -> Vec<DirectoryEntry> {
    let bytes = fs::read(path).unwrap();
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    let Some(place) = header.bitmaps_extension().unwrap() else { return Vec::new() };
    let bytes = &bytes[place.directory_offset.get() as usize..][..place.directory_size as usize];
    DirectoryEntry::parse_directory(bytes, place.nb_bitmaps, &header.geometry()).unwrap()
}

fn write(disk: &Arc<Disk>, offset: u64, len: usize) {
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&noise(len, &mut Rng::new(offset)));
    ask(&mut queue, Request::Write { offset, data: vec![buffer.seg(0, len)] }).unwrap();
}

fn shapes() -> Vec<Shape> {
    vec![
        Shape::new(65536),
        Shape { base: Base::Raw(60), ..Shape::new(1024) },
        Shape { refcount_bits: 8, base: Base::Qcow2(140), ..Shape::new(4096) },
        Shape { options: &["extended_l2=on"], base: Base::Raw(120), ..Shape::new(65536) },
        Shape { refcount_bits: 64, compressed: true, ..Shape::new(65536) },
        Shape { data_file: true, ..Shape::new(65536) },
        Shape { snapshot: true, ..Shape::new(512) },
    ]
}

/// Asserts that the ranges cover every byte in which the contents differ.
fn assert_covers(ranges: &[Range<u64>], before: &[u8], after: &[u8]) {
    for at in (0..before.len().min(after.len())).step_by(512) {
        let covered = ranges.iter().any(|range| range.contains(&(at as u64)));
        assert!(covered || before[at..at + 512] == after[at..at + 512], "{at:#x} changed and is said to be clean");
    }
}

#[test]
fn bits_that_the_engine_sets_are_what_qemu_reads_and_goes_on_from() {
    let mut rng = dice("bits_that_the_engine_sets_are_what_qemu_reads_and_goes_on_from");
    for shape in shapes() {
        println!("{shape:?}");
        let dir = tempfile::tempdir().unwrap();
        let Made { path, .. } = make(dir.path(), &shape, &mut rng);
        let before = content(&path);
        let granularity = 512 << rng.below(10);
        let disk = open(&path);
        disk.create_bitmap("mine", Some(granularity), true).unwrap();
        disk.create_bitmap("default", None, true).unwrap();
        disk.create_bitmap("off", Some(4096), false).unwrap();
        play(&disk, before.clone(), &shape, &mut rng);
        let ours = disk.bitmap_ranges("mine").unwrap();
        let theirs = disk.bitmap_ranges("default").unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        assert_covers(&ours, &before, &content(&path));
        assert_eq!(qemu_ranges(&path, "mine"), ours);
        assert_eq!(qemu_ranges(&path, "default"), theirs);
        assert_eq!(qemu_ranges(&path, "off"), []);
        assert!(qemu::img(&["info", text(&path)]).contains("name: mine"));
        // QEMU goes on where we ended, and we where QEMU did.
        qemu::io(&path, &["write -q -P 3 1k 512".into(), "discard -q 0 64k".into(), "write -q -z 100k 2k".into()]);
        let disk = open(&path);
        let now = disk.bitmap_ranges("mine").unwrap();
        assert!(now.first().is_some_and(|range| range.start == 0 && range.end >= 64 << 10), "{now:?}");
        write(&disk, 200 << 10, 512);
        disk.close().unwrap();
        drop(disk);
        let now = qemu_ranges(&path, "mine");
        assert!(now.iter().any(|range| range.contains(&(200 << 10))), "{now:?}");
        assert_clean(&path);
    }
}

#[test]
fn bits_that_qemu_sets_are_read() {
    for granularity in ["512", "4096", "65536", "1M"] {
        let (_dir, path) = image("cluster_size=64k", "6M");
        add(&path, &["-g", granularity], "changes");
        add(&path, &["-g", granularity, "--disable"], "off");
        add(&path, &["-g", granularity], "full");
        qemu::io(&path, &["write -q 0 6M".into()]);
        for name in ["changes", "off"] {
            qemu::img(&["bitmap", "--clear", text(&path), name]);
        }
        qemu::io(&path, &["write -q 70k 1k".into(), "write -q 3M 600k".into(), "discard -q 5M 64k".into()]);
        let (changes, full) = (qemu_ranges(&path, "changes"), qemu_ranges(&path, "full"));
        assert!(changes.len() >= 2 || granularity == "1M", "{changes:?}");
        assert_eq!(full, [0..6 << 20]);
        for readonly in [true, false] {
            let disk = if readonly { open_read_only(&path) } else { open(&path) };
            let listed = disk.bitmaps().unwrap();
            let seen: Vec<_> = listed.iter().map(|b| (b.name.as_str(), b.enabled, b.state)).collect();
            let good = BitmapState::Consistent;
            assert_eq!(seen, [("changes", true, good), ("off", false, good), ("full", true, good)]);
            assert_eq!(disk.bitmap_ranges("changes").unwrap(), changes);
            assert_eq!(disk.bitmap_ranges("full").unwrap(), full);
            assert_eq!(disk.bitmap_ranges("off").unwrap(), []);
            assert_eq!(disk.bitmap_ranges("nobody").unwrap_err().kind(), ErrorKind::NotFound);
            disk.close().unwrap();
        }
        assert_clean(&path);
    }
}

#[test]
fn every_change_of_a_bitmap_is_what_qemu_makes_of_it() {
    let mut rng = dice("every_change_of_a_bitmap_is_what_qemu_makes_of_it");
    for cluster in ["512", "4k", "64k", "2M"] {
        let (dir, ours) = image(&format!("cluster_size={cluster}"), "3M");
        let theirs = dir.path().join("qemu.qcow2");
        fs::copy(&ours, &theirs).unwrap();
        let names = ["a", "b", "c"];
        for (name, granularity) in names.iter().zip([512u64, 8192, 65536]) {
            open(&ours).create_bitmap(name, Some(granularity), true).unwrap();
            add(&theirs, &["-g", &granularity.to_string()], name);
        }
        for round in 0..12 {
            let (one, other) = (names[rng.below(3) as usize], names[rng.below(3) as usize]);
            let disk = open(&ours);
            let option = match rng.below(5) {
                0 => {
                    disk.enable_bitmap(one).unwrap();
                    "--enable"
                }
                1 => {
                    disk.disable_bitmap(one).unwrap();
                    "--disable"
                }
                2 => {
                    disk.clear_bitmap(one).unwrap();
                    "--clear"
                }
                3 => {
                    disk.merge_bitmap(one, other).unwrap();
                    "--merge"
                }
                _ => {
                    let (offset, len) = (512 * rng.below(2000), 512 * (1 + rng.below(40)));
                    write(&disk, offset, len as usize);
                    qemu::io(&theirs, &[format!("write -q {offset} {len}")]);
                    ""
                }
            };
            println!("{cluster} round {round}: {option} {one} {other}");
            match option {
                "" => {}
                "--merge" => drop(qemu::img(&["bitmap", option, other, text(&theirs), one])),
                _ => drop(qemu::img(&["bitmap", option, text(&theirs), one])),
            }
            for name in names {
                let theirs = open_read_only(&theirs);
                assert_eq!(disk.bitmap_ranges(name).unwrap(), theirs.bitmap_ranges(name).unwrap(), "{name}");
                assert_eq!(disk.bitmaps().unwrap(), theirs.bitmaps().unwrap());
            }
            disk.close().unwrap();
            drop(disk);
            assert_clean(&ours);
        }
        for name in names {
            assert_eq!(qemu_ranges(&ours, name), qemu_ranges(&theirs, name), "{name}");
        }
        let disk = open(&ours);
        names.iter().for_each(|name| disk.remove_bitmap(name).unwrap());
        assert_eq!(disk.bitmaps().unwrap(), []);
        drop(disk);
        assert_clean(&ours);
        let said = qemu::img(&["info", text(&ours)]);
        assert!(!said.contains("bitmap") && !said.contains("warning"), "{said}");
    }
}

#[test]
fn edge_57_bitmaps_come_and_go_beside_every_backing_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    for len in [1, 40, 200] {
        let base = dir.path().join("b".repeat(len));
        fs::write(&base, noise(100 << 10, &mut Rng::new(1))).unwrap();
        for cluster in ["1k", "4k", "64k"] {
            let options = format!("cluster_size={cluster}");
            let name = base.file_name().unwrap().to_str().unwrap();
            qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, "-b", name, "-F", "raw", text(&path)]);
            let before = content(&path);
            let disk = open(&path);
            let made = disk.create_bitmap("one", None, true);
            if let Err(e) = made {
                assert_eq!((cluster, e.kind()), ("1k", ErrorKind::Invalid), "{e}");
                drop(disk);
            } else {
                disk.create_bitmap("two", None, false).unwrap();
                drop(disk);
                assert_clean(&path);
                qemu::img(&["bitmap", "--merge", "one", text(&path), "two"]);
                qemu::img(&["bitmap", "--remove", text(&path), "one"]);
                open(&path).remove_bitmap("two").unwrap();
                let said = qemu::img(&["info", text(&path)]);
                assert!(!said.contains("bitmap") && !said.contains("warning"), "{said}");
            }
            assert_clean(&path);
            assert!(content(&path) == before, "{cluster} {len}");
        }
    }
}

#[test]
fn edge_40_a_writer_that_dies_leaves_enabled_bitmaps_in_use_and_others_good() {
    let (_dir, path) = image("cluster_size=64k", "4M");
    let disk = open(&path);
    disk.create_bitmap("on", None, true).unwrap();
    disk.create_bitmap("off", None, true).unwrap();
    write(&disk, 0, 4096);
    disk.disable_bitmap("off").unwrap();
    write(&disk, 1 << 20, 4096);
    disk.forget();
    drop(disk);
    assert!(directory(&path)[0].flags.contains(BitmapFlags::IN_USE | BitmapFlags::AUTO));
    assert!(directory(&path)[1].flags.is_empty());
    let said = qemu::img(&["info", "--output=json", text(&path)]);
    assert_eq!(said.matches("in-use").count(), 1, "{said}");
    assert_eq!(qemu_ranges(&path, "off"), [0..65536]);
    // QEMU marked and saved what it took for good; the other is what it was.
    let disk = open(&path);
    assert_eq!(
        disk.bitmaps().unwrap().iter().map(|b| b.state).collect::<Vec<_>>(),
        [BitmapState::Inconsistent, BitmapState::Consistent]
    );
    for refused in [
        disk.enable_bitmap("on"),
        disk.disable_bitmap("on"),
        disk.clear_bitmap("on"),
        disk.merge_bitmap("off", "on"),
        disk.merge_bitmap("on", "off"),
        disk.bitmap_ranges("on").map(drop),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
    }
    write(&disk, 2 << 20, 4096);
    disk.close().unwrap();
    drop(disk);
    assert!(directory(&path)[0].flags.contains(BitmapFlags::IN_USE));
    assert_clean(&path);
    let disk = open(&path);
    disk.remove_bitmap("on").unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_clean(&path);
    assert_eq!(qemu_ranges(&path, "off"), [0..65536]);
}

#[test]
fn edge_40_bitmaps_that_the_header_does_not_vouch_for_are_inconsistent_and_never_freed() {
    let (_dir, path) = image("cluster_size=64k", "4M");
    add(&path, &[], "one");
    add(&path, &["--disable"], "two");
    let mut bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[95], 1);
    bytes[95] = 0;
    fs::write(&path, &bytes).unwrap();
    let states = |disk: &Arc<Disk>| disk.bitmaps().unwrap().iter().map(|b| b.state).collect::<Vec<_>>();
    assert_eq!(states(&open_read_only(&path)), [BitmapState::Inconsistent; 2]);
    let disk = open(&path);
    assert_eq!(states(&disk), [BitmapState::Inconsistent; 2]);
    write(&disk, 0, 4096);
    assert_eq!(disk.clear_bitmap("two").unwrap_err().kind(), ErrorKind::Invalid);
    disk.remove_bitmap("one").unwrap();
    assert_eq!(states(&disk), [BitmapState::Inconsistent]);
    // With a new one, whose directory the header vouches for, those before are forgotten, as in QEMU.
    disk.create_bitmap("new", None, true).unwrap();
    assert_eq!(states(&disk), [BitmapState::Consistent]);
    write(&disk, 1 << 20, 4096);
    disk.close().unwrap();
    drop(disk);
    assert_eq!(qemu_ranges(&path, "new"), [1 << 20..(1 << 20) + 65536]);
    // What they took leaks.
    assert_eq!(qemu::run("qemu-img", &["check", "-f", "qcow2", text(&path)]).status, 3);
    assert_eq!(qemu::run("qemu-img", &["check", "-r", "leaks", "-f", "qcow2", text(&path)]).status, 0);
    assert_clean(&path);
}

#[test]
fn edge_40_tables_of_all_ones_and_all_zeros_are_read_and_written() {
    // One cluster of bits is 512 × 8 granules of 512 bytes.
    let (_dir, path) = image("cluster_size=512", "7M");
    let disk = open(&path);
    disk.create_bitmap("bits", Some(512), true).unwrap();
    write(&disk, 2 << 20, 2 << 20);
    write(&disk, 6 << 20, 1 << 20);
    write(&disk, 512, 512);
    disk.close().unwrap();
    drop(disk);
    let entry = &directory(&path)[0];
    let bytes = fs::read(&path).unwrap();
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    let table = &bytes[entry.table_offset.get() as usize..][..entry.table_size as usize * 8];
    let kinds = table
        .chunks(8)
        .map(|raw| BitmapTableEntry::decode(u64::from_be_bytes(raw.try_into().unwrap()), &header.geometry()).unwrap());
    let kinds: Vec<_> = kinds.collect();
    assert!(matches!(
        kinds[..],
        [
            BitmapTableEntry::Cluster(_),
            BitmapTableEntry::AllOnes,
            BitmapTableEntry::AllZeros,
            BitmapTableEntry::AllOnes
        ]
    ));
    let ranges = [512..1024, 2 << 20..4 << 20, 6 << 20..7 << 20];
    assert_eq!(qemu_ranges(&path, "bits"), ranges);
    assert_eq!(open(&path).bitmap_ranges("bits").unwrap(), ranges);
    assert_clean(&path);
}

#[test]
fn edge_08_names_and_granularities_have_bounds() {
    let (_dir, path) = image("cluster_size=64k", "4M");
    let disk = open(&path);
    let long = "n".repeat(1023);
    disk.create_bitmap(&long, Some(1 << 31), true).unwrap();
    for (name, granularity) in [
        ("", None),
        (&*"n".repeat(1024), None),
        (&*long, None),
        ("a", Some(256)),
        ("a", Some(1 << 32)),
        ("a", Some(513)),
        ("a", Some(0)),
    ] {
        assert_eq!(disk.create_bitmap(name, granularity, true).unwrap_err().kind(), ErrorKind::Invalid);
    }
    write(&disk, 0, 512);
    disk.close().unwrap();
    drop(disk);
    assert_clean(&path);
    assert_eq!(open_read_only(&path).bitmap_ranges(&long).unwrap(), [0..4 << 20]);
    // 2^41 bytes of 512 are the 512 MiB of bits that a bitmap may have.
    let (_dir, path) = image("cluster_size=64k", "3T");
    let disk = open(&path);
    assert_eq!(disk.create_bitmap("a", Some(512), true).unwrap_err().kind(), ErrorKind::Invalid);
    disk.create_bitmap("a", Some(1 << 20), true).unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_clean(&path);
    let (_dir, path) = image("compat=0.10", "1M");
    assert_eq!(open(&path).create_bitmap("a", None, true).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn edge_55_a_bitmap_with_unknown_extra_data_is_kept_and_not_used() {
    let (_dir, path) = image("cluster_size=64k", "4M");
    add(&path, &["--disable", "-g", "4096"], "strange");
    let mut bytes = fs::read(&path).unwrap();
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    let place = header.bitmaps_extension().unwrap().unwrap();
    let at = place.directory_offset.get() as usize;
    let mut entry = directory(&path).remove(0);
    entry.extra_data = b"who knows".to_vec();
    let mut encoded = Vec::new();
    entry.encode(&header.geometry(), &mut encoded).unwrap();
    // QEMU's file ends with the directory.
    bytes.resize(bytes.len().max(at + encoded.len()), 0);
    bytes[at..at + encoded.len()].copy_from_slice(&encoded);
    // The extension's data lies across the first sector's end, behind the type and length at byte 504.
    bytes[520..528].copy_from_slice(&(encoded.len() as u64).to_be_bytes());
    fs::write(&path, &bytes).unwrap();
    let disk = open(&path);
    assert_eq!(disk.bitmaps().unwrap()[0].state, BitmapState::UnknownExtraData);
    for refused in [disk.enable_bitmap("strange"), disk.clear_bitmap("strange"), disk.remove_bitmap("strange")] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
    }
    disk.create_bitmap("new", None, true).unwrap();
    write(&disk, 0, 4096);
    disk.close().unwrap();
    drop(disk);
    assert_eq!(directory(&path)[0], entry);
    let disk = open(&path);
    disk.remove_bitmap("new").unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_eq!(directory(&path), [entry]);
}

#[test]
fn bitmaps_keep_their_bits_when_the_size_changes_as_in_qemu() {
    for (cluster, options) in [("64k", "64k"), ("512", "512")] {
        let (dir, ours) = image(&format!("cluster_size={cluster}"), "3M");
        add(&ours, &["-g", options], "on");
        qemu::io(&ours, &["write -q 0 1k".into(), "write -q 2900k 100k".into()]);
        add(&ours, &["-g", options, "--disable"], "off");
        qemu::img(&["bitmap", "--merge", "on", text(&ours), "off"]);
        let theirs = dir.path().join("qemu.qcow2");
        fs::copy(&ours, &theirs).unwrap();
        let disk = open(&ours);
        for (size, text_size) in [(9 << 20, "9M"), (2500 << 10, "2500k"), (4 << 20, "4M"), (1536, "1536")] {
            disk.resize(size).unwrap();
            qemu::img(&["resize", "-q", "--shrink", text(&theirs), text_size]);
            for name in ["on", "off"] {
                let ranges = open_read_only(&theirs).bitmap_ranges(name).unwrap();
                assert_eq!(disk.bitmap_ranges(name).unwrap(), ranges, "{name} {text_size}");
            }
            if size > 2 << 20 {
                write(&disk, 2 << 20, 512);
                qemu::io(&theirs, &["write -q 2M 512".into()]);
            }
        }
        disk.close().unwrap();
        drop(disk);
        assert_clean(&ours);
        for name in ["on", "off"] {
            assert_eq!(qemu_ranges(&ours, name), qemu_ranges(&theirs, name), "{name}");
        }
    }
}

#[test]
fn going_back_to_a_snapshot_leaves_no_enabled_bitmap_that_says_clean() {
    let (_dir, path) = image("cluster_size=64k", "1M");
    let disk = open(&path);
    write(&disk, 0, 65536);
    disk.create_snapshot("s").unwrap();
    disk.resize(2 << 20).unwrap();
    disk.create_bitmap("on", None, true).unwrap();
    disk.create_bitmap("off", None, false).unwrap();
    write(&disk, 128 << 10, 512);
    disk.create_snapshot("later").unwrap();
    assert_eq!(disk.bitmap_ranges("on").unwrap(), [128 << 10..192 << 10]);
    disk.apply_snapshot("s").unwrap();
    assert_eq!(disk.bitmap_ranges("on").unwrap(), [0..1 << 20]);
    assert_eq!(disk.bitmap_ranges("off").unwrap(), []);
    disk.delete_snapshot("later").unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_clean(&path);
    assert_eq!(qemu_ranges(&path, "on"), [0..1 << 20]);
    assert_eq!(qemu_ranges(&path, "off"), []);
}

#[test]
fn damaged_bitmaps_are_refused_for_writing_and_the_file_is_left_as_it_is() {
    let (_dir, path) = image("cluster_size=64k", "4M");
    add(&path, &["-g", "512"], "one");
    qemu::io(&path, &["write -q 4k 4k".into()]);
    let good = fs::read(&path).unwrap();
    let table = directory(&path)[0].table_offset.get() as usize;
    let header = Header::parse(&good, good.len() as u64).unwrap();
    let place = header.bitmaps_extension().unwrap().unwrap().directory_offset.get() as usize;
    let damages: [(usize, Vec<u8>); 5] = [
        // Reserved bits; a cluster that is the L1 table's; one past the end.
        (table, 3u64.to_be_bytes().into()),
        (table, header.l1_table_offset.get().to_be_bytes().into()),
        (table, (1u64 << 40).to_be_bytes().into()),
        // A table too large for the disk; unknown flags.
        (place + 8, 9u32.to_be_bytes().into()),
        (place + 12, 0x80u32.to_be_bytes().into()),
    ];
    for (at, bytes) in damages {
        let mut damaged = good.clone();
        damaged[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(&path, &damaged).unwrap();
        let opened = Disk::open(&DiskSpec::new(&path, Format::Qcow2), &policy(Engine::Auto));
        let error = opened.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(fs::read(&path).unwrap() == damaged, "the file has changed");
        assert_eq!(content_read_only(&path), 4 << 20);
    }
}

fn content_read_only(path: &Path) -> u64 {
    let disk = open_read_only(path);
    let buffer = Buffer::zeroed(disk.size() as usize);
    ask(&mut disk.queue().unwrap(), Request::Read { offset: 0, data: vec![buffer.seg(0, buffer.len())] }).unwrap();
    disk.size()
}

#[test]
fn every_sort_of_write_sets_bits() {
    let (_dir, path) = image("cluster_size=64k", "1M");
    let disk = open(&path);
    disk.create_bitmap("all", Some(65536), true).unwrap();
    let buffer = Buffer::from_bytes(&[7; 65536]);
    let data = || vec![buffer.seg(0, buffer.len())];
    let mut queue = disk.queue().unwrap();
    let at = |cluster: u64| cluster << 16;
    for request in [
        Request::Write { offset: at(1), data: data() },
        Request::WriteCompressed { offset: at(3), data: data() },
        Request::WriteZeroes { offset: at(5), len: 65536, unmap: true },
        Request::Discard { offset: at(7), len: 65536 },
        Request::Read { offset: at(9), data: data() },
        Request::Flush,
    ] {
        ask(&mut queue, request).unwrap();
    }
    let expected = [1, 3, 5, 7].map(|cluster| at(cluster)..at(cluster + 1));
    assert_eq!(disk.bitmap_ranges("all").unwrap(), expected);
    disk.clear_bitmap("all").unwrap();
    // In place, by the shortest way.
    ask(&mut queue, Request::Write { offset: at(1), data: data() }).unwrap();
    assert_eq!(disk.bitmap_ranges("all").unwrap(), [at(1)..at(2)]);
    drop(queue);
    disk.close().unwrap();
    drop(disk);
    assert_eq!(qemu_ranges(&path, "all"), [at(1)..at(2)]);
    assert_clean(&path);
}
