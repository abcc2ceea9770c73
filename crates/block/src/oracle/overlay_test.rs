//! A disk that went on in overlays while a guest used it: QEMU reads the chain, finds nothing wrong in it, and writes on.

use std::path::{Path, PathBuf};

use cowhand_qcow2::ClusterBits;

use super::dice;
use super::guest::{policy, read_all};
use super::image::{Base, Made, Shape, make};
use super::qemu::{self, assert_clean, content, text};
use super::read_test::assert_same;
use super::write_test::play;
use crate::disk::Disk;
use crate::error::ErrorKind;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::spec::{Cache, DiskSpec, Format};
use crate::sync::Arc;
use crate::{Overlay, OverlayOptions, OverlaySource};

fn open(path: &Path, format: Format) -> Arc<Disk> {
    Disk::open(&DiskSpec::new(path, format), &policy(Engine::Auto)).unwrap()
}

/// Has the disk go on twice, in a new overlay and in one that QEMU made, a guest using it in between.
fn go_on_twice(top: &Path, format: Format, shape: &Shape, spec: &DiskSpec, rng: &mut Rng) {
    let dir = top.parent().unwrap();
    let (first, second) = (dir.join("first.over"), dir.join("second.over"));
    let disk = Disk::open(spec, &policy(Engine::Auto)).unwrap();
    let mut held: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    let options = OverlayOptions { cluster_bits: ClusterBits::new(14).unwrap(), extended_l2: rng.one_in(2) };
    let new = Overlay { path: first.clone(), source: OverlaySource::New(options) };
    let play_on = |rng: &mut Rng| {
        let shape = Shape { cluster: disk.limits().discard_granularity.into(), ..shape.clone() };
        let model = play(&disk, read_all(&disk, 1, rng), &shape, rng);
        let bytes = read_all(&disk, 2, rng);
        model.check_all(&bytes).unwrap();
        bytes
    };
    held.push((top.to_path_buf(), play_on(rng)));
    disk.snapshot_to(new).unwrap();
    held.push((first.clone(), play_on(rng)));
    // By its name alone, as the image lies beside it; QEMU takes the size from there, and may read it by now.
    let backing = first.file_name().unwrap().to_str().unwrap();
    let size = disk.size().to_string();
    qemu::img(&["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", text(&second), &size]);
    disk.snapshot_to(Overlay::prepared(&second)).unwrap();
    held.push((second.clone(), play_on(rng)));
    // The images below are QEMU's to read while we write, and nobody's to write.
    assert_same(&content(&first), &held[1].1);
    assert_clean(&first);
    let ended = qemu::run("qemu-io", &["-f", "qcow2", "-c", "write -q 0 512", text(&first)]);
    assert!(ended.status != 0 && ended.said.contains("lock"), "{ended:?}");
    disk.close().unwrap();
    let info = qemu::img(&["info", "--backing-chain", text(&second)]);
    let images: Vec<_> = info.lines().filter_map(|line| line.strip_prefix("image: ")).collect();
    assert_eq!(images[..3], [text(&second), text(&first), text(top)], "{info}");
    for (path, bytes) in &held {
        if path != top || format == Format::Qcow2 {
            assert_clean(path);
            assert_same(&content(path), bytes);
        }
    }
    // QEMU writes on, and we read what it wrote.
    qemu::io(&second, &["write -q -P 77 512 60k".into(), "discard -q 0 64k".into(), "write -q -P 78 1k 512".into()]);
    assert_clean(&second);
    let after = content(&second);
    let disk = open(&second, Format::Qcow2);
    assert_same(&read_all(&disk, 2, rng), &after);
    play(&disk, after, &Shape::new(65536), rng).check_all(&read_all(&disk, 1, rng)).unwrap();
    disk.close().unwrap();
    let (raw, flat) = (dir.join("flat.raw"), content(&second));
    std::fs::write(&raw, flat).unwrap();
    qemu::img(&["compare", "-q", "-f", "raw", "-F", "qcow2", text(&raw), text(&second)]);
}

#[test]
fn chains_that_live_snapshots_make_are_what_qemu_reads_and_writes_on() {
    let mut rng = dice("chains_that_live_snapshots_make_are_what_qemu_reads_and_writes_on");
    for shape in [
        Shape::new(65536),
        Shape { base: Base::Raw(60), ..Shape::new(4096) },
        Shape { base: Base::Chain(2), ..Shape::new(65536) },
        Shape { version: 2, base: Base::Qcow2(140), ..Shape::new(65536) },
        Shape { options: &["extended_l2=on"], base: Base::Raw(120), ..Shape::new(65536) },
        Shape { snapshot: true, compressed: true, ..Shape::new(16384) },
        Shape { data_file: true, ..Shape::new(65536) },
    ] {
        println!("{shape:?}");
        let dir = tempfile::tempdir().unwrap();
        let Made { path, .. } = make(dir.path(), &shape, &mut rng);
        go_on_twice(&path, Format::Qcow2, &shape, &DiskSpec::new(&path, Format::Qcow2), &mut rng);
    }
}

#[test]
fn raw_disks_go_on_in_overlays_that_qemu_reads() {
    let mut rng = dice("raw_disks_go_on_in_overlays_that_qemu_reads");
    let dir = super::direct_io_dir();
    for cache in [Cache::Writeback, Cache::None] {
        let path = dir.path().join(format!("{cache:?}.raw"));
        std::fs::write(&path, vec![5; 3 << 20]).unwrap();
        let spec = DiskSpec { cache, ..DiskSpec::new(&path, Format::Raw) };
        go_on_twice(&path, Format::Raw, &Shape::new(65536), &spec, &mut rng);
        ["first.over", "second.over"].iter().for_each(|name| std::fs::remove_file(dir.path().join(name)).unwrap());
    }
}

#[test]
fn an_overlay_that_another_process_uses_is_refused() {
    let mut rng = dice("an_overlay_that_another_process_uses_is_refused");
    let dir = tempfile::tempdir().unwrap();
    let Made { path, .. } = make(dir.path(), &Shape::new(65536), &mut rng);
    let disk = open(&path, Format::Qcow2);
    let over = dir.path().join("over.qcow2");
    let args = ["create", "-q", "-u", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", text(&over)];
    qemu::img(&[&args[..], &[&disk.size().to_string()]].concat());
    let other = Disk::open(&DiskSpec::new(&over, Format::Qcow2), &policy(Engine::Auto));
    assert_eq!(other.err().map(|e| e.kind()), Some(ErrorKind::Locked), "its backing file is being written");
    // Its very bytes, as whoever writes it holds them.
    let spec = DiskSpec { force_raw: true, ..DiskSpec::new(&over, Format::Raw) };
    let held = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    let refused = disk.snapshot_to(Overlay::prepared(&over)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked, "{refused}");
    drop(held);
    disk.snapshot_to(Overlay::prepared(&over)).unwrap();
}
