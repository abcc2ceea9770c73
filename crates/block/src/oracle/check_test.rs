//! What our check says of sound images, held against `qemu-img check`: images of every sort that QEMU's tools make.

use std::fs;
use std::path::Path;

use super::dice;
use super::guest::policy;
use super::image::{Base, Shape, make};
use super::qemu::{self, text};
use crate::check::{self, CheckOptions, CheckReport, Message, Repair};
use crate::io::host::Engine;
use crate::spec::{DiskSpec, Format};
use crate::sync::{Arc, Mutex};

/// Our check: its numbers, and what it found.
pub(super) fn ours(path: &Path, repair: Repair) -> crate::error::Result<(CheckReport, Vec<Message>)> {
    let messages: Arc<Mutex<Vec<Message>>> = Arc::default();
    let sink = messages.clone();
    let options = CheckOptions { repair, ..CheckOptions::default() };
    let report = check::check(&DiskSpec::new(path, Format::Qcow2), &options, &policy(Engine::Auto), move |message| {
        if !matches!(message, Message::Progress { .. }) {
            sink.lock().push(message);
        }
    });
    let messages = messages.lock().clone();
    report.map(|report| (report, messages))
}

/// What `qemu-img check` says.
#[derive(Clone, Debug, Default)]
pub(super) struct Theirs {
    pub(super) status: i32,
    pub(super) corruptions: u64,
    pub(super) leaks: u64,
    pub(super) said: String,
}

impl Theirs {
    /// The number of this name, 0 where there is none.
    fn number(&self, name: &str) -> u64 {
        let name = format!("\"{name}\": ");
        let found = self.said.rfind(&name).map(|at| &self.said[at + name.len()..]);
        let digits = found.map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
        digits.map_or(0, |digits| digits.parse().unwrap())
    }
}

/// QEMU's check; with further arguments before the file.
pub(super) fn theirs(path: &Path, args: &[&str]) -> Theirs {
    let args = [&["check", "--output=json"], args, &[text(path)]].concat();
    let ended = qemu::run("qemu-img", &args);
    let mut theirs = Theirs { status: ended.status, said: ended.said, ..Theirs::default() };
    (theirs.corruptions, theirs.leaks) = (theirs.number("corruptions"), theirs.number("leaks"));
    theirs
}

/// Both find nothing, and agree about the numbers.
fn assert_both_clean(path: &Path) {
    let before = fs::read(path).unwrap();
    let theirs = theirs(path, &["-f", "qcow2"]);
    assert_eq!(theirs.status, 0, "{theirs:?}");
    assert_clean_as(path, &theirs);
    assert!(before == fs::read(path).unwrap(), "the check changed the image");
}

fn assert_clean_as(path: &Path, theirs: &Theirs) {
    let (report, messages) = ours(path, Repair::None).unwrap();
    assert!(report.is_clean(), "{messages:?}");
    let numbers = [
        ("image-end-offset", report.image_end_offset),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
    ];
    for (name, number) in numbers {
        assert_eq!(number, theirs.number(name), "{name}: {}", theirs.said);
    }
}

fn assert_shape_is_clean(shape: &Shape) {
    let dir = tempfile::tempdir().unwrap();
    let made = make(dir.path(), shape, &mut dice("check"));
    if shape.version > 2 {
        let image = text(&made.path);
        qemu::img(&["bitmap", "--add", "-g", "4096", image, "one"]);
        qemu::img(&["bitmap", "--add", "--disable", image, "two"]);
        qemu::io(&made.path, &["write -q 0 64k".into()]);
    }
    assert_both_clean(&made.path);
}

#[test]
fn sound_images_of_all_cluster_sizes_are_clean() {
    for bits in [9, 12, 16, 21] {
        assert_shape_is_clean(&Shape { snapshot: true, ..Shape::new(1 << bits) });
        assert_shape_is_clean(&Shape { version: 2, base: Base::Raw(70), ..Shape::new(1 << bits) });
    }
}

#[test]
fn sound_images_of_all_refcount_widths_are_clean() {
    for order in 0..7 {
        let snapshot = order > 0;
        assert_shape_is_clean(&Shape { refcount_bits: 1 << order, snapshot, ..Shape::new(4096) });
    }
}

#[test]
fn sound_compressed_images_are_clean() {
    assert_shape_is_clean(&Shape { compressed: true, snapshot: true, ..Shape::new(512) });
    assert_shape_is_clean(&Shape { compressed: true, snapshot: true, ..Shape::new(65536) });
    let options: &[&str] = &["compression_type=zstd"];
    assert_shape_is_clean(&Shape { compressed: true, options, ..Shape::new(1 << 21) });
}

#[test]
fn sound_images_with_extended_l2_entries_are_clean() {
    let options: &[&str] = &["extended_l2=on"];
    for cluster in [1 << 14, 1 << 16] {
        assert_shape_is_clean(&Shape { options, snapshot: true, ..Shape::new(cluster) });
        assert_shape_is_clean(&Shape { options, compressed: true, base: Base::Raw(50), ..Shape::new(cluster) });
    }
}

#[test]
fn sound_preallocated_and_lazy_images_are_clean() {
    for options in [&["preallocation=metadata"] as &[&str], &["preallocation=falloc"], &["lazy_refcounts=on"]] {
        assert_shape_is_clean(&Shape { options, ..Shape::new(4096) });
    }
}

#[test]
fn sound_images_with_an_external_data_file_are_clean() {
    for raw in ["off", "on"] {
        for extended in ["off", "on"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk.qcow2");
            let data = dir.path().join("data.raw");
            let options = format!("data_file={},data_file_raw={raw},extended_l2={extended}", data.display());
            qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "20M"]);
            qemu::io(&path, &["write -q 0 3M".into(), "write -q -z 1M 500k".into(), "discard -q 2M 64k".into()]);
            assert_both_clean(&path);
        }
    }
}

#[test]
fn sound_encrypted_images_are_clean() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let secret = ["--object", "secret,id=key,data=secret"];
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let create = [&["create", "-q", "-f", "qcow2"], &secret[..], &["-o", options, text(&path), "20M"]].concat();
    qemu::img(&create);
    let opened = format!("driver=qcow2,file.filename={},encrypt.key-secret=key", path.display());
    let write = [&secret[..], &["--image-opts", "-c", "write -q 1M 1M", &opened]].concat();
    qemu::succeed("qemu-io", &write);
    let check = [&["check", "--output=json"], &secret[..], &["--image-opts", &opened]].concat();
    let said = qemu::img(&check);
    assert_clean_as(&path, &Theirs { said, ..Theirs::default() });
}

#[test]
fn a_check_that_only_looks_leaves_writers_out_and_lets_readers_in() {
    let dir = tempfile::tempdir().unwrap();
    let made = make(dir.path(), &Shape::new(65536), &mut dice("check locks"));
    let spec = crate::spec::DiskSpec::new(&made.path, crate::spec::Format::Qcow2);
    let disk = crate::disk::Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    let locked = ours(&made.path, Repair::None).unwrap_err();
    assert_eq!(locked.kind(), crate::error::ErrorKind::Locked);
    disk.close().unwrap();
    let readonly = crate::spec::DiskSpec { readonly: true, ..spec };
    let disk = crate::disk::Disk::open(&readonly, &policy(Engine::Auto)).unwrap();
    assert!(ours(&made.path, Repair::None).unwrap().0.is_clean());
    assert_eq!(ours(&made.path, Repair::All).unwrap_err().kind(), crate::error::ErrorKind::Locked);
    disk.close().unwrap();
    // The lock is given back.
    ours(&made.path, Repair::All).unwrap();
}
