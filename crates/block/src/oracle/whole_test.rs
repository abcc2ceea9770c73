//! Changes of a whole disk, both ways: snapshots and sizes by the engine are judged by QEMU, and those by QEMU are used by the engine.

use std::fs;
use std::path::{Path, PathBuf};

use cowhand_qcow2::{Header, Snapshot};

use super::dice;
use super::guest::{ask, policy, read_all};
use super::image::{Base, Made, SNAPSHOT, Shape, make};
use super::qemu::{self, assert_clean, content, content_with, text};
use super::read_test::assert_same;
use super::write_test::play;
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

fn snapshot_content(path: &Path, name: &str) -> Vec<u8> {
    content_with(path, &["-l", &format!("snapshot.name={name}")])
}

/// An image of a shape in a directory of its own.
fn made(shape: &Shape, rng: &mut Rng) -> (tempfile::TempDir, Made) {
    let dir = tempfile::tempdir().unwrap();
    let made = make(dir.path(), shape, rng);
    (dir, made)
}

fn shapes() -> Vec<Shape> {
    vec![
        Shape::new(65536),
        Shape { base: Base::Raw(60), ..Shape::new(512) },
        Shape { refcount_bits: 8, base: Base::Qcow2(140), ..Shape::new(4096) },
        Shape { refcount_bits: 64, compressed: true, ..Shape::new(65536) },
        Shape { refcount_bits: 2, ..Shape::new(1024) },
        Shape { version: 2, base: Base::Raw(150), ..Shape::new(65536) },
        Shape { options: &["extended_l2=on"], base: Base::Raw(120), ..Shape::new(65536) },
        Shape { snapshot: true, base: Base::Chain(2), ..Shape::new(16384) },
        Shape { snapshot: true, compressed: true, refcount_bits: 32, ..Shape::new(2 << 20) },
    ]
}

#[test]
fn edge_37_and_38_snapshots_that_the_engine_takes_are_what_qemu_reads() {
    let mut rng = dice("edge_37_and_38_snapshots_that_the_engine_takes_are_what_qemu_reads");
    for shape in shapes() {
        println!("{shape:?}");
        let (_dir, Made { path, snapshot }) = made(&shape, &mut rng);
        let first = content(&path);
        let disk = open(&path);
        disk.create_snapshot("first").unwrap();
        let second = play(&disk, first.clone(), &shape, &mut rng);
        // Two trees and the active one are all that 2-bit refcounts can count.
        disk.create_snapshot("second").unwrap();
        let second_bytes = read_all(&disk, 2, &mut rng);
        second.check_all(&second_bytes).unwrap();
        let now = play(&disk, second_bytes.clone(), &shape, &mut rng);
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        now.check_all(&content(&path)).unwrap();
        assert_same(&snapshot_content(&path, "first"), &first);
        assert_same(&snapshot_content(&path, "second"), &second_bytes);
        if let Some(snapshot) = snapshot {
            assert_same(&snapshot_content(&path, SNAPSHOT), &snapshot);
        }
        qemu::img(&["snapshot", "-d", "first", text(&path)]);
        let disk = open(&path);
        disk.apply_snapshot("second").unwrap();
        assert_same(&read_all(&disk, 2, &mut rng), &second_bytes);
        let now = play(&disk, second_bytes.clone(), &shape, &mut rng);
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        now.check_all(&content(&path)).unwrap();
        assert_same(&snapshot_content(&path, "second"), &second_bytes);
        let disk = open(&path);
        disk.delete_snapshot("second").unwrap();
        let now = play(&disk, read_all(&disk, 1, &mut rng), &shape, &mut rng);
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        now.check_all(&content(&path)).unwrap();
    }
}

#[test]
fn edge_35_snapshots_that_qemu_took_are_listed_applied_and_deleted() {
    let mut rng = dice("edge_35_snapshots_that_qemu_took_are_listed_applied_and_deleted");
    for shape in shapes().into_iter().filter(|shape| !shape.snapshot && shape.refcount_bits > 2) {
        println!("{shape:?}");
        let (_dir, Made { path, .. }) = made(&shape, &mut rng);
        let before = content(&path);
        qemu::img(&["snapshot", "-c", "before", text(&path)]);
        qemu::io(&path, &["write -q -P 7 0 100k".into(), "discard -q 0 64k".into()]);
        let after = content(&path);
        qemu::img(&["snapshot", "-c", "after", text(&path)]);
        let disk = open(&path);
        let listed = disk.snapshots().unwrap();
        let seen: Vec<_> = listed.iter().map(|s| (s.id.as_str(), s.name.as_str(), s.disk_size)).collect();
        assert_eq!(seen, [("1", "before", Some(disk.size())), ("2", "after", Some(disk.size()))]);
        assert!(listed[0].date.as_secs() > 1_700_000_000 && listed[0].vm_state_size == 0, "{listed:?}");
        assert_eq!(disk.apply_snapshot("nobody").unwrap_err().kind(), ErrorKind::NotFound);
        disk.apply_snapshot("before").unwrap();
        assert_same(&read_all(&disk, 2, &mut rng), &before);
        disk.delete_snapshot("1").unwrap();
        disk.apply_snapshot("after").unwrap();
        assert_same(&read_all(&disk, 2, &mut rng), &after);
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        assert_same(&content(&path), &after);
        qemu::img(&["snapshot", "-d", "after", text(&path)]);
        assert_clean(&path);
    }
}

/// Sizes in the order in which a disk takes them, and what it must hold then: what it held, cut or with zeros added.
fn resized(mut bytes: Vec<u8>, size: u64) -> Vec<u8> {
    bytes.resize(size as usize, 0);
    bytes
}

#[test]
fn edge_20_sizes_that_the_engine_gives_are_what_qemu_reads() {
    let mut rng = dice("edge_20_sizes_that_the_engine_gives_are_what_qemu_reads");
    for shape in shapes() {
        println!("{shape:?}");
        let (_dir, Made { path, snapshot }) = made(&shape, &mut rng);
        let mut bytes = content(&path);
        let (size, cluster) = (bytes.len() as u64, shape.cluster);
        let cut = size / 3 / 512 * 512;
        for size in [cut, cut + 512, size + 3 * cluster + 512, cluster, size / 2 / 512 * 512, size * 3 / 2 / 512 * 512]
        {
            let disk = open(&path);
            disk.resize(size).unwrap();
            assert_eq!(disk.size(), size);
            bytes = resized(bytes, size);
            assert_same(&read_all(&disk, 2, &mut rng), &bytes);
            let model = play(&disk, bytes.clone(), &shape, &mut rng);
            disk.close().unwrap();
            drop(disk);
            assert_clean(&path);
            bytes = content(&path);
            assert_eq!(bytes.len() as u64, size);
            model.check_all(&bytes).unwrap();
            if let Some(snapshot) = &snapshot {
                // Of which `convert` shows as much as the disk has now.
                let shown = snapshot_content(&path, SNAPSHOT);
                let len = shown.len().min(snapshot.len());
                assert_same(&shown[..len], &snapshot[..len]);
            }
        }
        if let Some(snapshot) = snapshot {
            let disk = open(&path);
            disk.apply_snapshot(SNAPSHOT).unwrap();
            assert_same(&read_all(&disk, 2, &mut rng), &snapshot);
        }
    }
}

/// How many refcount blocks an image has.
fn refcount_blocks(path: &Path) -> usize {
    let image = fs::read(path).unwrap();
    let header = Header::parse(&image, image.len() as u64).unwrap();
    let table = header.refcount_table_offset.get() as usize;
    let len = header.refcount_table_clusters as usize * header.cluster_bits.size() as usize;
    image[table..table + len].chunks(8).filter(|entry| *entry != [0; 8]).count()
}

#[test]
fn edge_33_refcount_blocks_that_count_nothing_any_more_are_given_back() {
    let mut rng = dice("edge_33_refcount_blocks_that_count_nothing_any_more_are_given_back");
    for (cluster, refcount_bits, size, by_qemu) in
        [(512, 64, 3 << 20, false), (512, 64, 3 << 20, true), (4096, 64, 24 << 20, false), (4096, 16, 24 << 20, true)]
    {
        let options = format!("cluster_size={cluster},refcount_bits={refcount_bits}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), &size.to_string()]);
        let chunk = size / 12;
        let mut order: Vec<u64> = (0..12).collect();
        (1..order.len()).for_each(|i| order.swap(i, rng.below(i as u64 + 1) as usize));
        if by_qemu {
            qemu::io(
                &path,
                &order.iter().map(|i| format!("write -q -P 255 {} {chunk}", i * chunk)).collect::<Vec<_>>(),
            );
        } else {
            let disk = open(&path);
            let mut queue = disk.queue().unwrap();
            for i in order {
                let data = Buffer::from_bytes(&vec![255; chunk as usize]);
                let write = Request::Write { offset: i * chunk, data: vec![data.seg(0, data.len())] };
                ask(&mut queue, write).unwrap();
            }
            drop(queue);
            disk.close().unwrap();
        }
        let before = refcount_blocks(&path);
        let theirs = dir.path().join("theirs.qcow2");
        fs::copy(&path, &theirs).unwrap();
        qemu::img(&["resize", "-q", "-f", "qcow2", "--shrink", text(&theirs), "512k"]);
        let disk = open(&path);
        disk.resize(512 << 10).unwrap();
        assert_same(&read_all(&disk, 1, &mut rng), &vec![255; 512 << 10]);
        disk.close().unwrap();
        assert_clean(&path);
        let after = refcount_blocks(&path);
        println!("{options}: {before} blocks, {after} after, QEMU leaves {}", refcount_blocks(&theirs));
        // QEMU looks once, and keeps a block that counted only those that it drops.
        assert!(after < before && after <= refcount_blocks(&theirs));
        // And the disk grows again.
        let disk = open(&path);
        disk.resize(size).unwrap();
        let model = play(&disk, resized(vec![255; 512 << 10], size), &Shape::new(cluster), &mut rng);
        disk.close().unwrap();
        assert_clean(&path);
        model.check_all(&content(&path)).unwrap();
    }
}

#[test]
fn edge_39_snapshots_of_other_sizes_are_applied_with_their_size() {
    let mut rng = dice("edge_39_snapshots_of_other_sizes_are_applied_with_their_size");
    for shape in [
        Shape { base: Base::Raw(150), ..Shape::new(4096) },
        Shape { compressed: true, ..Shape::new(65536) },
        Shape { base: Base::Qcow2(120), ..Shape::new(512) },
    ] {
        println!("{shape:?}");
        let (_dir, Made { path, .. }) = made(&shape, &mut rng);
        let middle = content(&path);
        let size = middle.len() as u64;
        let disk = open(&path);
        disk.create_snapshot("middle").unwrap();
        disk.resize(size / 4 / 512 * 512).unwrap();
        let small = resized(middle.clone(), disk.size());
        disk.create_snapshot("small").unwrap();
        disk.resize(size * 2).unwrap();
        let large = resized(small.clone(), size * 2);
        disk.create_snapshot("large").unwrap();
        for (name, bytes) in [("small", &small), ("large", &large), ("middle", &middle), ("large", &large)] {
            disk.apply_snapshot(name).unwrap();
            assert_same(&read_all(&disk, 2, &mut rng), bytes);
        }
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        for (name, bytes) in [("small", &small), ("large", &large), ("middle", &middle)] {
            // `convert -l` takes the size that the disk has now; going there takes the snapshot's.
            qemu::img(&["snapshot", "-a", name, text(&path)]);
            assert_same(&content(&path), bytes);
            assert_clean(&path);
        }
        // And QEMU's sizes are read by us.
        qemu::img(&["resize", "-q", "-f", "qcow2", "--shrink", text(&path), "3M"]);
        let disk = open(&path);
        assert_same(&read_all(&disk, 2, &mut rng), &resized(middle, 3 << 20));
        disk.apply_snapshot("large").unwrap();
        assert_same(&read_all(&disk, 2, &mut rng), &large);
    }
}

#[test]
fn edge_41_disks_with_a_data_file_change_their_size_and_a_raw_one_stays_raw() {
    let mut rng = dice("edge_41_disks_with_a_data_file_change_their_size_and_a_raw_one_stays_raw");
    for raw in ["off", "on"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, data) = (dir.path().join("disk.qcow2"), dir.path().join("disk.data"));
        let options = format!("data_file={},data_file_raw={raw},cluster_size=4096", text(&data));
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "5M"]);
        qemu::io(&path, &["write -q -P 9 0 5M".into()]);
        let mut bytes = content(&path);
        for size in [(3 << 20) + 512, 9 << 20, 1 << 20, 4 << 20] {
            let disk = open(&path);
            assert_eq!(disk.create_snapshot("a").unwrap_err().kind(), ErrorKind::Unsupported);
            disk.resize(size).unwrap();
            bytes = resized(bytes, size);
            assert_same(&read_all(&disk, 2, &mut rng), &bytes);
            disk.close().unwrap();
            drop(disk);
            assert_clean(&path);
            assert_same(&content(&path), &bytes);
            if raw == "on" {
                assert_same(&fs::read(&data).unwrap(), &bytes);
            }
        }
    }
}

fn image(options: &str, size: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
    qemu::io(&path, &["write -q -P 9 0 300k".into()]);
    (dir, path)
}

#[test]
fn edge_39_version_2_with_snapshots_keeps_its_size_as_in_qemu() {
    let (_dir, path) = image("compat=0.10", "4M");
    let disk = open(&path);
    disk.resize(5 << 20).unwrap();
    disk.create_snapshot("a").unwrap();
    assert_eq!(disk.resize(6 << 20).unwrap_err().kind(), ErrorKind::Unsupported);
    disk.close().unwrap();
    drop(disk);
    assert_ne!(qemu::run("qemu-img", &["resize", "-f", "qcow2", text(&path), "6M"]).status, 0);
    assert_eq!(content(&path).len(), 5 << 20);
    assert_clean(&path);
}

#[test]
fn edge_52_a_snapshot_that_overflows_refcounts_leaves_the_image_as_it_was() {
    for (bits, fit) in [(1, 0), (2, 2)] {
        let (_dir, path) = image(&format!("refcount_bits={bits},cluster_size=4096"), "4M");
        let before = content(&path);
        let disk = open(&path);
        for name in 0..fit {
            disk.create_snapshot(&name.to_string()).unwrap();
        }
        let error = disk.create_snapshot("one too many").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(&format!("{bits}-bit refcounts")), "{error}");
        assert_eq!(disk.snapshots().unwrap().len(), fit);
        disk.close().unwrap();
        drop(disk);
        // No leaks, and all COPIED flags are back.
        assert_clean(&path);
        assert_same(&content(&path), &before);
    }
}

#[test]
fn sizes_that_make_no_sense_are_refused_and_nothing_changes() {
    let (_dir, path) = image("cluster_size=512", "4M");
    let disk = open(&path);
    let before = fs::read(&path).unwrap();
    for size in [4097, 513, (16 << 30) * 8 + 512, u64::MAX / 512 * 512] {
        assert_eq!(disk.resize(size).unwrap_err().kind(), ErrorKind::Invalid, "{size}");
    }
    for name in ["", &"x".repeat(256)] {
        assert_eq!(disk.create_snapshot(name).unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert!(fs::read(&path).unwrap() == before);
    disk.resize(4 << 20).unwrap();
    assert!(fs::read(&path).unwrap() == before, "the size that it has");
    drop(disk);
    let readonly = DiskSpec { readonly: true, ..DiskSpec::new(&path, Format::Qcow2) };
    let disk = Disk::open(&readonly, &policy(Engine::Auto)).unwrap();
    assert_eq!(disk.resize(8 << 20).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(disk.create_snapshot("a").unwrap_err().kind(), ErrorKind::ReadOnly);
}

#[test]
fn a_disk_can_lose_all_its_bytes_and_get_others() {
    for cluster in ["512", "64k"] {
        let (_dir, path) = image(&format!("cluster_size={cluster}"), "4M");
        let disk = open(&path);
        disk.resize(0).unwrap();
        disk.create_snapshot("nothing").unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        let disk = open(&path);
        disk.resize(9 << 20).unwrap();
        disk.apply_snapshot("nothing").unwrap();
        assert_eq!(disk.size(), 0);
        disk.delete_snapshot("nothing").unwrap();
        disk.resize(9 << 20).unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
        assert!(content(&path) == vec![0; 9 << 20]);
    }
}

fn number(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | usize::from(*byte))
}

/// An image of 512 MiB (one L1 entry) whose snapshot has a VM state, and whose active table still has it, as after a `loadvm`.
fn with_vm_state() -> (tempfile::TempDir, PathBuf) {
    let (dir, path) = image("cluster_size=64k", "1G");
    qemu::io(&path, &["write -q -P 5 512M 200k".into()]);
    qemu::img(&["snapshot", "-c", "state", text(&path)]);
    // The disk becomes half as large: what is behind it is VM state then.
    let mut bytes = fs::read(&path).unwrap();
    let size = (512u64 << 20).to_be_bytes();
    bytes[24..32].copy_from_slice(&size);
    let table = number(&bytes, 64);
    bytes[table + 32..table + 36].copy_from_slice(&200_000u32.to_be_bytes());
    bytes[table + 40..table + 48].copy_from_slice(&200_000u64.to_be_bytes());
    bytes[table + 48..table + 56].copy_from_slice(&size);
    fs::write(&path, bytes).unwrap();
    assert_clean(&path);
    (dir, path)
}

/// The first cluster of the VM state in the only snapshot.
fn vm_state(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap();
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    let (snapshots, _) =
        Snapshot::parse_table(&bytes[header.snapshots_offset.get() as usize..], 1, &header.geometry()).unwrap();
    assert_eq!((snapshots[0].vm_state_size, snapshots[0].l1_size), (200_000, 2));
    let masked = |at| number(&bytes, at) & 0x00ff_ffff_ffff_fe00;
    let table = masked(snapshots[0].l1_table_offset.get() as usize + 8);
    bytes[masked(table)..][..65536].to_vec()
}

#[test]
fn edge_36_a_vm_state_is_kept_with_its_snapshot_and_never_becomes_part_of_the_disk() {
    for steps in 0..4 {
        let (_dir, path) = with_vm_state();
        assert_eq!(vm_state(&path), [5; 65536]);
        let disk = open(&path);
        assert_eq!(disk.snapshots().unwrap()[0].vm_state_size, 200_000);
        if steps & 1 != 0 {
            disk.apply_snapshot("state").unwrap();
        }
        if steps & 2 != 0 {
            disk.create_snapshot("another").unwrap();
            disk.delete_snapshot("another").unwrap();
        }
        disk.resize(1 << 30).unwrap();
        let mut queue = disk.queue().unwrap();
        let buffer = Buffer::from_bytes(&[0xee; 300 << 10]);
        ask(&mut queue, Request::Read { offset: 512 << 20, data: vec![buffer.seg(0, buffer.len())] }).unwrap();
        assert!(buffer.iter().all(|&byte| byte == 0));
        drop(queue);
        disk.apply_snapshot("1").unwrap();
        assert_eq!(disk.size(), 512 << 20);
        disk.close().unwrap();
        drop(disk);
        assert_eq!(vm_state(&path), [5; 65536]);
        assert_clean(&path);
        qemu::img(&["snapshot", "-a", "state", text(&path)]);
        qemu::img(&["snapshot", "-d", "state", text(&path)]);
        assert_clean(&path);
    }
}

#[test]
fn edge_35_what_is_not_known_of_snapshots_is_kept() {
    let (_dir, path) = image("cluster_size=4096", "4M");
    qemu::img(&["snapshot", "-c", "old", text(&path)]);
    let mut bytes = fs::read(&path).unwrap();
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    let geometry = header.geometry();
    let table = header.snapshots_offset.get() as usize;
    let (mut snapshots, _) = Snapshot::parse_table(&bytes[table..], 1, &geometry).unwrap();
    snapshots[0].unknown_extra = b"from the future".to_vec();
    let encoded = Snapshot::encode_table(&snapshots, &geometry).unwrap();
    bytes.resize(bytes.len().max(table + encoded.len()), 0);
    bytes[table..table + encoded.len()].copy_from_slice(&encoded);
    fs::write(&path, bytes).unwrap();
    let disk = open(&path);
    disk.create_snapshot("new").unwrap();
    disk.close().unwrap();
    drop(disk);
    let bytes = fs::read(&path).unwrap();
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    let (after, _) = Snapshot::parse_table(&bytes[header.snapshots_offset.get() as usize..], 2, &geometry).unwrap();
    assert_eq!(after[0], snapshots[0]);
    assert_clean(&path);
}

#[test]
fn many_snapshots_and_long_names_move_the_table_and_leave_no_leaks() {
    let (_dir, path) = image("cluster_size=512,refcount_bits=64", "4M");
    let disk = open(&path);
    for i in 0..40 {
        disk.create_snapshot(&format!("{i}-{}", "n".repeat(200))).unwrap();
    }
    for i in (1..40).step_by(2) {
        disk.delete_snapshot(&i.to_string()).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    assert_clean(&path);
    let said = qemu::img(&["snapshot", "-l", text(&path)]);
    assert_eq!(said.lines().count(), 2 + 20, "{said}");
    let disk = open(&path);
    assert_eq!(disk.create_snapshot("next").unwrap().id, "41");
}

#[test]
fn a_raw_disk_changes_its_size_and_has_no_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    fs::write(&path, [7; 8192]).unwrap();
    let disk = Disk::open(&DiskSpec::new(&path, Format::Raw), &policy(Engine::Auto)).unwrap();
    let mut queue = disk.queue().unwrap();
    for size in [4096, 12288, 512] {
        disk.resize(size).unwrap();
        assert_eq!((disk.size(), fs::metadata(&path).unwrap().len()), (size, size));
        let buffer = Buffer::zeroed(512);
        let read = |offset| Request::Read { offset, data: vec![buffer.seg(0, 512)] };
        ask(&mut queue, read(size - 512)).unwrap();
        assert_eq!(buffer[..], if size == 12288 { [0; 512] } else { [7; 512] });
        assert!(ask(&mut queue, read(size)).is_err());
    }
    assert!(disk.snapshots().unwrap().is_empty());
    assert_eq!(disk.create_snapshot("a").unwrap_err().kind(), ErrorKind::Unsupported);
    // The file is as long as it is asked to be; the disk's last sector is a whole one.
    disk.resize(100).unwrap();
    assert_eq!((disk.size(), fs::metadata(&path).unwrap().len()), (512, 100));
}
