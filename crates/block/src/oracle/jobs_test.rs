//! Overlays committed and rebased by the engine: QEMU reads the same from them, and from the images below, as it should be.

use std::fs;
use std::path::{Path, PathBuf};

use super::dice;
use super::guest::policy;
use super::image::{Base, Made, Shape, make, noise, scribble};
use super::qemu::{self, assert_clean, content, text};
use super::read_test::assert_same;
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::error::ErrorKind;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::jobs::amend::{AmendOptions, amend};
use crate::jobs::commit::{CommitOptions, commit};
use crate::jobs::rebase::{NewBacking, rebase, rebase_unsafe};
use crate::spec::{DiskSpec, Format};

fn shapes() -> Vec<Shape> {
    vec![
        Shape { base: Base::Raw(60), ..Shape::new(512) },
        Shape { base: Base::Qcow2(140), ..Shape::new(4096) },
        Shape { version: 2, base: Base::Raw(150), ..Shape::new(65536) },
        Shape { version: 2, base: Base::Qcow2(40), ..Shape::new(4096) },
        Shape { options: &["extended_l2=on"], base: Base::Raw(120), ..Shape::new(65536) },
        Shape { options: &["extended_l2=on"], base: Base::Chain(2), ..Shape::new(16384) },
        Shape { snapshot: true, base: Base::Qcow2(70), ..Shape::new(16384) },
        Shape { compressed: true, base: Base::Chain(3), ..Shape::new(65536) },
        Shape { data_file: true, base: Base::Qcow2(100), ..Shape::new(65536) },
        Shape { base: Base::Qcow2(100), ..Shape::new(2 << 20) },
    ]
}

fn of_shape(shape: &Shape, rng: &mut Rng) -> (tempfile::TempDir, PathBuf) {
    println!("{shape:?}");
    let dir = tempfile::tempdir().unwrap();
    let Made { path, .. } = make(dir.path(), shape, rng);
    (dir, path)
}

fn spec(path: &Path) -> DiskSpec {
    DiskSpec::new(path, Format::Qcow2)
}

/// The files of the chain, the topmost first, with their formats.
fn chain(path: &Path) -> Vec<(PathBuf, Format)> {
    let disk = Disk::open(&DiskSpec { readonly: true, ..spec(path) }, &policy(Engine::Auto)).unwrap();
    disk.layers().into_iter().map(|layer| (layer.path, layer.format)).collect()
}

fn converted(path: &Path, format: Format) -> Vec<u8> {
    match format {
        Format::Raw => fs::read(path).unwrap(),
        Format::Qcow2 => content(path),
    }
}

fn info(path: &Path) -> String {
    qemu::img(&["info", "-f", "qcow2", "--output=json", text(path)])
}

#[test]
fn what_is_committed_is_below_and_the_overlay_is_empty() {
    let mut rng = dice("what_is_committed_is_below_and_the_overlay_is_empty");
    for shape in shapes() {
        let (_dir, path) = of_shape(&shape, &mut rng);
        let before = content(&path);
        let (base, format) = chain(&path)[1].clone();
        let mut told = Vec::new();
        let (sender, heard) = std::sync::mpsc::channel();
        let progress = Box::new(move |done, all| sender.send((done, all)).unwrap());
        commit(&spec(&path), &policy(Engine::Auto), &CommitOptions::default(), progress).unwrap();
        told.extend(heard.try_iter());
        assert_eq!(told.last(), Some(&(before.len() as u64, before.len() as u64)));
        assert!(told.is_sorted());
        assert_clean(&path);
        assert_same(&content(&path), &before);
        let below = converted(&base, format);
        assert_same(&below[..before.len()], &before);
        if format == Format::Qcow2 {
            assert_clean(&base);
        }
        let map = qemu::img(&["map", "-f", "qcow2", "--output=json", text(&path)]);
        assert!(!map.contains("\"depth\": 0, \"present\": true"), "{map}");
        if shape.snapshot {
            qemu::img(&["snapshot", "-a", super::image::SNAPSHOT, text(&path)]);
            assert_clean(&path);
        }
    }
}

#[test]
fn a_deeper_image_takes_what_all_above_it_show() {
    let mut rng = dice("a_deeper_image_takes_what_all_above_it_show");
    for compressed in [false, true] {
        let shape = Shape { compressed, base: Base::Chain(3), ..Shape::new(4096) };
        let (_dir, path) = of_shape(&shape, &mut rng);
        let before = content(&path);
        let layers = chain(&path);
        let depth = 2 + rng.below(3) as usize;
        let (base, format) = layers[depth].clone();
        // By its name alone, as the headers have it.
        let options = CommitOptions { base: base.file_name().map(PathBuf::from), ..CommitOptions::default() };
        commit(&spec(&path), &policy(Engine::Auto), &options, Box::new(|_, _| {})).unwrap();
        assert_same(&content(&path), &before);
        assert_same(&converted(&base, format)[..before.len()], &before);
        for (path, _) in layers.iter().filter(|(_, format)| *format == Format::Qcow2) {
            assert_clean(path);
        }
    }
}

#[test]
fn an_overlay_that_is_kept_has_what_it_had() {
    let mut rng = dice("an_overlay_that_is_kept_has_what_it_had");
    let (_dir, path) = of_shape(&Shape { base: Base::Raw(100), ..Shape::new(65536) }, &mut rng);
    let bytes = fs::read(&path).unwrap();
    let options = CommitOptions { keep: true, ..CommitOptions::default() };
    commit(&spec(&path), &policy(Engine::Auto), &options, Box::new(|_, _| {})).unwrap();
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn what_cannot_be_committed_changes_no_byte() {
    let mut rng = dice("what_cannot_be_committed_changes_no_byte");
    let (dir, path) = of_shape(&Shape { base: Base::Raw(60), ..Shape::new(65536) }, &mut rng);
    let base = dir.path().join("base.raw");
    let before = (fs::read(&path).unwrap(), fs::read(&base).unwrap());
    let options = CommitOptions { base: Some(PathBuf::from("other.raw")), ..CommitOptions::default() };
    let error = commit(&spec(&path), &policy(Engine::Auto), &options, Box::new(|_, _| {})).unwrap_err();
    let expected = format!("Did not find 'other.raw' in the backing chain of '{}'", path.display());
    assert_eq!((error.kind(), error.reason()), (ErrorKind::NotFound, expected));
    let held = Disk::open(&DiskSpec::new(&base, Format::Raw), &policy(Engine::Auto)).unwrap();
    let error =
        commit(&spec(&path), &policy(Engine::Auto), &CommitOptions::default(), Box::new(|_, _| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    drop(held);
    let held = Disk::open(&spec(&path), &policy(Engine::Auto)).unwrap();
    let error =
        commit(&spec(&path), &policy(Engine::Auto), &CommitOptions::default(), Box::new(|_, _| {})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    drop(held);
    assert!((fs::read(&path).unwrap(), fs::read(&base).unwrap()) == before);
    let alone = dir.path().join("alone.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", text(&alone), "1M"]);
    let error =
        commit(&spec(&alone), &policy(Engine::Auto), &CommitOptions::default(), Box::new(|_, _| {})).unwrap_err();
    assert_eq!(error.reason(), "Image does not have a backing file");
}

/// Another image to stand on, that shares some of what the old one has.
fn other_base(dir: &Path, old: &[u8], format: Format, rng: &mut Rng) -> PathBuf {
    let path = dir.join(format!("other.{}", format.name()));
    let len = (old.len() as u64 * (50 + rng.below(100)) / 100).next_multiple_of(512) as usize;
    let mut bytes = old[..old.len().min(len)].to_vec();
    bytes.resize(len, 0);
    for _ in 0..20 {
        let at = 512 * rng.below(len as u64 / 512) as usize;
        let some = (512 * (1 + rng.below(200)) as usize).min(len - at);
        if rng.one_in(3) {
            bytes[at..at + some].fill(0);
        } else {
            bytes[at..at + some].copy_from_slice(&noise(some, rng));
        }
    }
    let raw = dir.join("other.tmp");
    fs::write(&raw, bytes).unwrap();
    qemu::img(&["convert", "-f", "raw", "-O", format.name(), text(&raw), text(&path)]);
    path
}

fn backing(path: &Path, format: Format) -> NewBacking {
    let name = text(path).as_bytes().to_vec();
    NewBacking { name: Some(name), format: Some(format.name().into()) }
}

#[test]
fn a_rebased_overlay_shows_the_same_over_another_image() {
    let mut rng = dice("a_rebased_overlay_shows_the_same_over_another_image");
    for shape in shapes() {
        let (dir, path) = of_shape(&shape, &mut rng);
        let before = content(&path);
        let (old, old_format) = chain(&path)[1].clone();
        let format = if rng.one_in(2) { Format::Raw } else { Format::Qcow2 };
        let other = other_base(dir.path(), &converted(&old, old_format), format, &mut rng);
        let compress = shape.cluster >= 4096 && !shape.data_file && rng.one_in(2);
        println!("over {} compressed: {compress}", other.display());
        let disk = Disk::open(&spec(&path), &policy(Engine::Auto)).unwrap();
        let new = Disk::open(&DiskSpec { readonly: true, ..DiskSpec::new(&other, format) }, &policy(Engine::Auto));
        rebase(&disk, Some(&new.unwrap()), &backing(&other, format), compress, Box::new(|_, _| {})).unwrap();
        disk.close().unwrap();
        assert_clean(&path);
        assert_same(&content(&path), &before);
        assert_eq!(chain(&path)[1], (other, format));
        // And then alone.
        let disk = Disk::open(&spec(&path), &policy(Engine::Auto)).unwrap();
        rebase(&disk, None, &NewBacking::default(), compress, Box::new(|_, _| {})).unwrap();
        disk.close().unwrap();
        assert_clean(&path);
        assert_same(&content(&path), &before);
        assert!(!info(&path).contains("backing"), "{}", info(&path));
        // What it has not is zeros, which an image below must not show through. (With version 2 QEMU's own rebase lets it.)
        let disk = Disk::open(&spec(&path), &policy(Engine::Auto)).unwrap();
        let new = DiskSpec { readonly: true, ..DiskSpec::new(&old, old_format) };
        let new = Disk::open(&new, &policy(Engine::Auto)).unwrap();
        rebase(&disk, Some(&new), &backing(&old, old_format), compress, Box::new(|_, _| {})).unwrap();
        disk.close().unwrap();
        drop(new);
        assert_clean(&path);
        assert_same(&content(&path), &before);
        qemu::img(&["rebase", "-f", "qcow2", "-b", "", text(&path)]);
        qemu::io(&path, &["write -q 0 4096".into()]);
        scribble(&path, &Shape { base: Base::None, ..shape.clone() }, before.len() as u64, &mut rng);
        assert_clean(&path);
    }
}

#[test]
fn a_rebase_to_an_image_further_down_copies_only_what_lies_between() {
    let mut rng = dice("a_rebase_to_an_image_further_down_copies_only_what_lies_between");
    for depth in 2..=4 {
        let shape = Shape { base: Base::Chain(3), ..Shape::new(4096) };
        let (_dir, path) = of_shape(&shape, &mut rng);
        let before = content(&path);
        let (other, format) = chain(&path)[depth].clone();
        let disk = Disk::open(&spec(&path), &policy(Engine::Auto)).unwrap();
        let new = DiskSpec { readonly: true, ..DiskSpec::new(&other, format) };
        let new = Disk::open(&new, &policy(Engine::Auto)).unwrap();
        rebase(&disk, Some(&new), &backing(&other, format), false, Box::new(|_, _| {})).unwrap();
        disk.close().unwrap();
        assert_clean(&path);
        assert_same(&content(&path), &before);
        assert_eq!(chain(&path)[1], (other, format));
    }
}

#[test]
fn an_unsafe_rebase_changes_the_header_alone() {
    let mut rng = dice("an_unsafe_rebase_changes_the_header_alone");
    for version in [2, 3] {
        let (dir, path) = of_shape(&Shape { version, base: Base::Raw(100), ..Shape::new(65536) }, &mut rng);
        let bytes = fs::read(&path).unwrap();
        let other = dir.path().join("nowhere.qcow2");
        let alone = DiskSpec { backing: crate::spec::Backing::Alone, ..spec(&path) };
        let disk = Disk::open(&alone, &policy(Engine::Auto)).unwrap();
        rebase_unsafe(&disk, &backing(&other, Format::Qcow2)).unwrap();
        disk.close().unwrap();
        assert!(fs::read(&path).unwrap()[65536..] == bytes[65536..]);
        let said = info(&path);
        assert!(said.contains(&format!("\"backing-filename\": \"{}\"", text(&other))), "{said}");
        assert!(said.contains("\"backing-filename-format\": \"qcow2\""), "{said}");
        let disk = Disk::open(&alone, &policy(Engine::Auto)).unwrap();
        rebase_unsafe(&disk, &NewBacking { name: Some(b"base.raw".to_vec()), format: Some("raw".into()) }).unwrap();
        let long = NewBacking { name: Some(vec![b'n'; 1024]), format: None };
        let error = rebase_unsafe(&disk, &long).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid, "{error}");
        disk.close().unwrap();
        assert_clean(&path);
    }
}

fn amended(path: &Path, options: &AmendOptions) -> crate::error::Result<()> {
    let disk = Disk::open(&spec(path), &policy(Engine::Auto)).unwrap();
    let result = amend(&disk, options, Box::new(|_, _| {}));
    disk.close().unwrap();
    result
}

#[test]
fn an_image_of_another_version_or_refcount_width_has_the_same_content() {
    let mut rng = dice("an_image_of_another_version_or_refcount_width_has_the_same_content");
    let with_snapshot = [
        Shape { snapshot: true, base: Base::Qcow2(70), ..Shape::new(16384) },
        Shape { version: 2, snapshot: true, compressed: true, ..Shape::new(4096) },
        Shape { snapshot: true, refcount_bits: 64, base: Base::Raw(100), ..Shape::new(512) },
    ];
    for shape in shapes().into_iter().chain(with_snapshot) {
        let (_dir, path) = of_shape(&shape, &mut rng);
        let before = content(&path);
        let snapshot = |path: &Path| super::qemu::content_with(path, &["-l", "snapshot.name=before"]);
        let kept = shape.snapshot.then(|| snapshot(&path));
        let up = AmendOptions { version: Some(3), ..AmendOptions::default() };
        amended(&path, &up).unwrap();
        let orders: Vec<u32> = (0..4).map(|_| rng.below(7) as u32).chain([4]).collect();
        for order in orders {
            // One bit cannot count a cluster that a snapshot shares.
            let order = if shape.snapshot || shape.compressed { order.max(3) } else { order };
            amended(&path, &AmendOptions { refcount_order: Some(order), ..AmendOptions::default() }).unwrap();
            assert_clean(&path);
            assert!(info(&path).contains(&format!("\"refcount-bits\": {},", 1 << order)), "{}", info(&path));
            assert_same(&content(&path), &before);
        }
        let lazy = AmendOptions { lazy_refcounts: Some(true), ..AmendOptions::default() };
        amended(&path, &lazy).unwrap();
        assert!(info(&path).contains("\"lazy-refcounts\": true"));
        let down = AmendOptions { version: Some(2), ..AmendOptions::default() };
        let downgraded = amended(&path, &down);
        if shape.data_file {
            assert_eq!(downgraded.unwrap_err().reason(), "Cannot downgrade an image with a data file");
        } else if shape.options.is_empty() {
            downgraded.unwrap();
            assert!(info(&path).contains("\"compat\": \"0.10\""));
        } else {
            let reason = downgraded.unwrap_err().reason();
            assert_eq!(reason, "Cannot downgrade an image with incompatible features 0x10 set");
        }
        assert_clean(&path);
        assert_same(&content(&path), &before);
        amended(&path, &up).unwrap();
        assert_clean(&path);
        assert_same(&content(&path), &before);
        if let Some(kept) = kept {
            assert_same(&snapshot(&path), &kept);
        }
        let size = before.len() as u64;
        scribble(&path, &Shape { compressed: false, ..shape.clone() }, size, &mut rng);
        assert_clean(&path);
    }
}

#[test]
fn what_cannot_be_amended_changes_no_byte() {
    let mut rng = dice("what_cannot_be_amended_changes_no_byte");
    let shape = Shape { snapshot: true, base: Base::Raw(60), ..Shape::new(65536) };
    let (_dir, path) = of_shape(&shape, &mut rng);
    let before = fs::read(&path).unwrap();
    let none = AmendOptions::default();
    let cases = [
        (
            AmendOptions { refcount_order: Some(0), ..none.clone() },
            "Cannot decrease refcount entry width to 1 bits: Cluster at",
        ),
        (
            AmendOptions { version: Some(2), refcount_order: Some(3), ..none.clone() },
            "Refcount widths other than 16 bits",
        ),
        (
            AmendOptions { version: Some(2), lazy_refcounts: Some(true), ..none.clone() },
            "Lazy refcounts only supported",
        ),
        (AmendOptions { backing_file: Some(b"other".to_vec()), ..none.clone() }, "Cannot amend the backing file"),
        (AmendOptions { backing_format: Some("qcow2".into()), ..none.clone() }, "Cannot amend the backing file"),
        (
            AmendOptions { data_file: Some(b"data".to_vec()), ..none.clone() },
            "data-file can only be set for images that",
        ),
        (AmendOptions { data_file_raw: Some(true), ..none.clone() }, "data-file-raw cannot be set on existing images"),
        (AmendOptions { size: Some(1000), ..none.clone() }, "The new size must be a multiple of 512"),
    ];
    for (options, expected) in cases {
        let reason = amended(&path, &options).unwrap_err().reason();
        assert!(reason.starts_with(expected), "{reason}");
        assert!(fs::read(&path).unwrap() == before, "{expected}");
    }
}

#[test]
fn what_is_committed_into_a_disk_that_is_raw_by_a_guess_does_not_make_an_image_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let [path, base] = ["over.qcow2", "base.raw"].map(|name| dir.path().join(name));
    fs::write(&base, vec![1; 1 << 20]).unwrap();
    let make = || {
        qemu::img(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&path)]);
        fs::write(dir.path().join("magic"), b"QFI\xfb\0\0\0\x03").unwrap();
        qemu::io(&path, &[format!("write -q -s {} 0 512", text(&dir.path().join("magic"))), "write -q 64k 64k".into()]);
    };
    let guessing = OpenPolicy { probe: true, ..policy(Engine::Auto) };
    let commit = || commit(&spec(&path), &guessing, &CommitOptions::default(), Box::new(|_, _| {}));
    make();
    // The header no longer says the format.
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|four| four == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at] = 0;
    fs::write(&path, bytes).unwrap();
    let refused = commit().unwrap_err();
    assert!(refused.strerror() == "Operation not permitted", "{refused}");
    assert_eq!(fs::read(&base).unwrap()[..512], [1; 512]);
    make();
    commit().unwrap();
    assert_eq!(fs::read(&base).unwrap()[..4], *b"QFI\xfb");
}
