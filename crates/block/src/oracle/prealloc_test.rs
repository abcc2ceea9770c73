//! Space that is taken at once, when an image is made and when it grows: QEMU finds the image sound, and zeros in it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::guest::{ask, policy};
use super::image::{Base, Shape, noise};
use super::qemu::{self, assert_clean, content, text};
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
use crate::{Preallocation, create_image};

fn open(path: &Path) -> Arc<Disk> {
    Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy(Engine::Auto)).unwrap()
}

fn image(options: &str, size: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), size]);
    (dir, path)
}

#[test]
fn preallocated_images_are_sound_read_as_zeros_and_do_not_grow() {
    let modes = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    for (cluster_bits, refcount_order, version, size) in
        [(16, 4, 3, 5 << 20), (9, 6, 3, (3 << 20) + 512), (12, 0, 3, 9 << 20), (21, 4, 2, 90 << 20), (16, 4, 3, 0)]
    {
        for mode in modes {
            println!("{cluster_bits} {refcount_order} {version} {size} {mode:?}");
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk.qcow2");
            let params = CreateParams {
                cluster_bits: ClusterBits::new(cluster_bits).unwrap(),
                refcount_order,
                version,
                ..CreateParams::new(size)
            };
            let policy = policy(Engine::Auto);
            create_image(&policy.storage, &path, &params, mode).unwrap();
            assert!(create_image(&policy.storage, &path, &params, mode).is_err(), "it exists");
            assert_clean(&path);
            assert!(content(&path) == vec![0; size as usize]);
            let made = fs::metadata(&path).unwrap();
            let taken = made.blocks() * 512;
            match mode {
                Preallocation::Falloc | Preallocation::Full => assert!(taken >= size, "{taken}"),
                _ => assert!(taken < size / 2 + (6 << cluster_bits), "{taken}"),
            }
            if size == 0 {
                continue;
            }
            let disk = open(&path);
            let model = play(
                &disk,
                vec![0; size as usize],
                &Shape { version, ..Shape::new(1 << cluster_bits) },
                &mut Rng::new(1),
            );
            disk.close().unwrap();
            drop(disk);
            assert_clean(&path);
            model.check_all(&content(&path)).unwrap();
        }
    }
}

/// An image that grows, with space taken for its new part, reads as zeros there, and is not changed in its tables by writes.
fn assert_grown(options: &str, backing: Option<u64>, mode: Preallocation) {
    let name = match mode {
        Preallocation::Off => "off",
        Preallocation::Metadata => "metadata",
        Preallocation::Falloc => "falloc",
        Preallocation::Full => "full",
    };
    println!("{options} over {backing:?}: {name}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some(size) = backing {
        fs::write(dir.path().join("base.raw"), noise(size as usize, &mut Rng::new(7))).unwrap();
        args.extend(["-b", "base.raw", "-F", "raw"]);
    }
    let (old, new) = ((2 << 20) + 512, 10 << 20);
    let size = old.to_string();
    let data = options.contains("data_file").then(|| dir.path().join("data.raw"));
    let with_data = data.as_ref().map(|data| options.replace("data_file=x", &format!("data_file={}", data.display())));
    if let Some(options) = &with_data {
        args[5] = options;
    }
    args.extend([text(&path), &size]);
    qemu::img(&args);
    qemu::io(&path, &["write -q -P 1 1M 1M".into()]);
    let mut expected = content(&path);
    expected.resize(new, 0);
    let disk = open(&path);
    disk.resize_with(new as u64, mode).unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_clean(&path);
    assert_same(&content(&path), &expected);
    let len = fs::metadata(&path).unwrap().len();
    let taken = fs::metadata(data.as_ref().unwrap_or(&path)).unwrap().blocks() * 512;
    match mode {
        Preallocation::Falloc | Preallocation::Full => assert!(taken >= 8 << 20, "{taken}"),
        _ => assert!(taken < 6 << 20, "{taken}"),
    }
    let bytes = noise(new - (3 << 20), &mut Rng::new(1));
    let disk = open(&path);
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&bytes);
    ask(&mut queue, Request::Write { offset: 3 << 20, data: vec![buffer.seg(0, buffer.len())] }).unwrap();
    drop(queue);
    disk.close().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len() == len, mode != Preallocation::Off || data.is_some());
    expected[3 << 20..].copy_from_slice(&bytes);
    assert_same(&content(&path), &expected);
    assert_clean(&path);
}

#[test]
fn the_new_part_of_a_disk_takes_its_space_at_once_if_that_is_asked_for() {
    for mode in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        assert_grown("cluster_size=65536", None, mode);
        assert_grown("cluster_size=512", None, mode);
        assert_grown("cluster_size=4096,compat=0.10", Some(5 << 20), mode);
        assert_grown("cluster_size=4096", Some(5 << 20), mode);
        assert_grown("cluster_size=65536,extended_l2=on", Some(5 << 20), mode);
        assert_grown("cluster_size=65536,data_file=x", None, mode);
    }
    assert_grown("data_file=x,data_file_raw=on", None, Preallocation::Full);
}

#[test]
fn edge_41_images_with_data_files_are_made_with_their_space_taken() {
    let modes = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    for (raw, extended_l2) in [(false, false), (true, false), (false, true), (true, true)] {
        for mode in modes {
            println!("raw {raw}, extended {extended_l2}, {mode:?}");
            let dir = tempfile::tempdir().unwrap();
            let (path, data) = (dir.path().join("disk.qcow2"), dir.path().join("data.raw"));
            let size = (5 << 20) + 512;
            let params = CreateParams {
                data_file: Some(text(&data).as_bytes().to_vec()),
                data_file_raw: raw,
                extended_l2,
                ..CreateParams::new(size)
            };
            let storage = policy(Engine::Auto).storage;
            create_image(&storage, &path, &params, mode).unwrap();
            assert_clean(&path);
            assert!(content(&path) == vec![0; size as usize]);
            let made = fs::metadata(&data).unwrap();
            assert_eq!(made.len(), size);
            let taken = made.blocks() * 512;
            let is_taken = matches!(mode, Preallocation::Falloc | Preallocation::Full);
            assert!(if is_taken { taken >= size } else { taken < 1 << 20 }, "{taken}");
            let map = qemu::img(&["map", "--output=json", "-f", "qcow2", text(&path)]);
            let mapped = raw || (mode != Preallocation::Off && !extended_l2);
            assert_eq!(map.contains("\"data\": true"), mapped, "{map}");
            let disk = open(&path);
            let shape = Shape { data_file: true, ..Shape::new(65536) };
            let model = play(&disk, vec![0; size as usize], &shape, &mut Rng::new(1));
            disk.close().unwrap();
            drop(disk);
            assert_clean(&path);
            model.check_all(&content(&path)).unwrap();
            if raw {
                assert!(fs::read(&data).unwrap() == content(&path), "the data file is not the disk");
            }
            // What exists is not written over, and what failed leaves nothing behind.
            fs::remove_file(&path).unwrap();
            let before = fs::read(&data).unwrap();
            assert!(create_image(&storage, &path, &params, mode).is_err());
            assert!(!path.exists() && fs::read(&data).unwrap() == before);
        }
    }
}

#[test]
fn preallocation_that_makes_no_sense_is_refused_as_in_qemu() {
    let (_dir, path) = image("compat=1.1", "4M");
    let before = fs::read(&path).unwrap();
    let disk = open(&path);
    assert_eq!(disk.resize_with(1 << 20, Preallocation::Full).unwrap_err().kind(), ErrorKind::Invalid);
    disk.close().unwrap();
    let theirs =
        qemu::run("qemu-img", &["resize", "--preallocation=full", "--shrink", "-f", "qcow2", text(&path), "1M"]);
    assert!(theirs.status != 0, "{theirs:?}");
    assert!(fs::read(&path).unwrap() == before);
    let raw = path.with_extension("raw");
    fs::write(&raw, vec![1; 1 << 20]).unwrap();
    let disk = Disk::open(&DiskSpec::new(&raw, Format::Raw), &policy(Engine::Auto)).unwrap();
    assert_eq!(disk.resize_with(4 << 20, Preallocation::Metadata).unwrap_err().kind(), ErrorKind::Invalid);
    for (mode, size) in [(Preallocation::Falloc, 4 << 20), (Preallocation::Full, 8 << 20)] {
        disk.resize_with(size, mode).unwrap();
        assert!(fs::metadata(&raw).unwrap().blocks() * 512 >= size);
    }
    disk.close().unwrap();
    let mut expected = vec![1; 1 << 20];
    expected.resize(8 << 20, 0);
    assert!(fs::read(&raw).unwrap() == expected);
}

#[test]
fn writing_into_a_preallocated_image_allocates_nothing() {
    for mode in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        create_image(&policy(Engine::Auto).storage, &path, &CreateParams::new(8 << 20), mode).unwrap();
        let len = fs::metadata(&path).unwrap().len();
        let bytes = noise(8 << 20, &mut Rng::new(1));
        let disk = open(&path);
        let mut queue = disk.queue().unwrap();
        let buffer = Buffer::from_bytes(&bytes);
        ask(&mut queue, Request::Write { offset: 0, data: vec![buffer.seg(0, buffer.len())] }).unwrap();
        drop(queue);
        disk.close().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), len);
        assert_same(&content(&path), &bytes);
    }
}

#[test]
fn edge_19_preallocated_clusters_with_subclusters_let_the_backing_file_show_through() {
    let dir = tempfile::tempdir().unwrap();
    let (path, base) = (dir.path().join("disk.qcow2"), dir.path().join("base"));
    let bytes = noise(5 << 20, &mut Rng::new(3));
    fs::write(&base, &bytes).unwrap();
    let params = CreateParams {
        extended_l2: true,
        backing: Some((b"base".to_vec(), "raw".into())),
        ..CreateParams::new(bytes.len() as u64)
    };
    create_image(&policy(Engine::Auto).storage, &path, &params, Preallocation::Metadata).unwrap();
    assert_clean(&path);
    assert_same(&content(&path), &bytes);
    let disk = open(&path);
    let shape = Shape { options: &["extended_l2=on"], base: Base::Raw(100), ..Shape::new(65536) };
    let model = play(&disk, bytes, &shape, &mut Rng::new(4));
    disk.close().unwrap();
    drop(disk);
    assert_clean(&path);
    model.check_all(&content(&path)).unwrap();
}

#[test]
fn preallocation_over_a_backing_file_is_refused_as_in_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let params = CreateParams { backing: Some((b"base".to_vec(), "raw".into())), ..CreateParams::new(1 << 20) };
    let error = create_image(&policy(Engine::Auto).storage, &path, &params, Preallocation::Metadata).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(!path.exists());
}
