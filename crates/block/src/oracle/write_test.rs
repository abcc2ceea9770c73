//! The engine writes, QEMU judges: no errors and no leaks after a clean close, and every byte as the model has it.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicU32;

use cowhand_qcow2::{ClusterBits, CreateParams};

use super::guest::{Guest, ask, no_journal, policy, read_all};
use super::image::{Base, Made, SNAPSHOT, Shape, make};
use super::model::Model;
use super::read_test::assert_same;
use super::{dice, matrix, qemu};
use crate::disk::{Disk, block_on};
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::qcow2::create;
use crate::queue::Queue;
use crate::request::Request;
use crate::spec::{Cache, DetectZeroes, DiskSpec, Format};
use crate::sync::{Arc, Mutex};

/// Plays a guest on the disk; afterwards the model says what it must hold.
pub(super) fn play(disk: &Arc<Disk>, initial: Vec<u8>, shape: &Shape, rng: &mut Rng) -> Model {
    let shows_below = shape.version == 2 && shape.base != Base::None;
    let mut model = Model::new(initial);
    if disk.spec().discard && disk.spec().format == Format::Qcow2 && !shows_below {
        model = model.discards_leave_zeros(shape.cluster);
    }
    let model = Mutex::new(model);
    let ops = AtomicU32::new(0);
    let requests = if shape.cluster > 1 << 20 { 120 } else { 350 };
    let cluster = shape.cluster / 512;
    // Clusters that are packed together share a count, and 2 bits would have none left for a snapshot.
    let compresses = shape.refcount_bits != 2;
    let guest = Guest {
        disk,
        model: &model,
        ops: &ops,
        requests,
        queues: 2,
        depth: 10,
        cluster,
        compresses,
        journal: &no_journal,
    };
    guest.play(rng);
    std::mem::replace(&mut *model.lock(), Model::new(Vec::new()))
}

/// A guest on an image; then QEMU looks at it. Twice, so that what the first life left is used by the second.
pub(super) fn assert_written_well(made: &Made, shape: &Shape, spec: &DiskSpec, engine: Engine, rng: &mut Rng) {
    for _ in 0..2 {
        let initial = qemu::content(&made.path);
        let disk = Disk::open(spec, &policy(engine)).unwrap();
        let model = play(&disk, initial, shape, rng);
        disk.close().unwrap();
        qemu::assert_clean(&made.path);
        model.check_all(&qemu::content(&made.path)).unwrap();
        if let Some(snapshot) = &made.snapshot {
            let name = format!("snapshot.name={SNAPSHOT}");
            assert_same(&qemu::content_with(&made.path, &["-l", &name]), snapshot);
        }
    }
    if let Some(snapshot) = &made.snapshot {
        qemu::img(&["snapshot", "-a", SNAPSHOT, qemu::text(&made.path)]);
        assert_same(&qemu::content(&made.path), snapshot);
        qemu::img(&["snapshot", "-d", SNAPSHOT, qemu::text(&made.path)]);
        qemu::assert_clean(&made.path);
    }
}

fn all(name: &str, shapes: &[Shape]) {
    matrix::each(name, shapes, assert_written_well);
}

#[test]
fn edge_01_and_21_version_2_images_are_written_well() {
    all("version 2", &matrix::version_2());
}

#[test]
fn edge_21_zeros_over_a_backing_file_in_version_2_lie_inside_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base.raw"), dir.path().join("disk.qcow2"));
    fs::write(&base, vec![1; 4 << 20]).unwrap();
    let options = "compat=0.10,cluster_size=4096";
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", qemu::text(&path)]);
    let disk = Disk::open(&DiskSpec::new(&path, Format::Qcow2), &policy(Engine::Auto)).unwrap();
    let mut queue = disk.queue().unwrap();
    ask(&mut queue, Request::WriteZeroes { offset: 1 << 20, len: 1 << 20, unmap: true }).unwrap();
    drop(queue);
    disk.close().unwrap();
    qemu::assert_clean(&path);
    let expected = [vec![1; 1 << 20], vec![0; 1 << 20], vec![1; 2 << 20]].concat();
    assert_same(&qemu::content(&path), &expected);
}

#[test]
fn edge_28_images_of_every_refcount_width_are_written_well() {
    all("refcount widths", &matrix::refcount_widths());
    let small = [1, 64].map(|bits| Shape { refcount_bits: bits, ..Shape::new(512) });
    all("refcount widths, small clusters", &small);
}

#[test]
fn images_of_every_cluster_size_are_written_well() {
    all("cluster sizes", &matrix::cluster_sizes());
}

#[test]
fn edge_20_overlays_on_shorter_and_longer_files_are_written_well() {
    all("backing files", &matrix::backing_files());
    all("chains", &matrix::chains());
}

#[test]
fn edge_19_extended_l2_images_are_written_well() {
    all("extended L2", &matrix::extended_l2());
}

#[test]
fn edges_16_and_41_images_with_data_files_are_written_well() {
    all("data files", &matrix::data_files());
}

#[test]
fn edge_41_a_raw_data_file_reads_by_itself_as_the_disk() {
    let mut rng = dice("raw data file");
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { data_file: true, options: &["data_file_raw=on"], ..Shape::new(65536) };
    let made = make(dir.path(), &shape, &mut rng);
    let initial = qemu::content(&made.path);
    let disk = Disk::open(&DiskSpec::new(&made.path, Format::Qcow2), &policy(Engine::Auto)).unwrap();
    let model = play(&disk, initial, &shape, &mut rng);
    disk.close().unwrap();
    let mut raw = fs::read(dir.path().join("data.raw")).unwrap();
    raw.resize(model.sectors() as usize * 512, 0);
    model.check_all(&raw).unwrap();
    assert!(qemu::img(&["info", "-f", "qcow2", qemu::text(&made.path)]).contains("data file raw: true"));
}

#[test]
fn edge_17_preallocated_clusters_are_used_again() {
    all("preallocation", &matrix::preallocated());
}

#[test]
fn edge_25_compressed_clusters_are_replaced_without_harm_to_their_neighbours() {
    all("zlib", &matrix::zlib());
    all("zstd", &matrix::zstd());
}

#[test]
fn edge_38_internal_snapshots_keep_their_content_while_the_disk_is_written() {
    all("snapshots", &matrix::snapshots());
}

#[test]
fn edge_34_lazy_refcounts_survive_an_open_and_a_write() {
    let mut rng = dice("lazy refcounts");
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { options: &["lazy_refcounts=on"], ..Shape::new(65536) };
    let made = make(dir.path(), &shape, &mut rng);
    assert_written_well(&made, &shape, &DiskSpec::new(&made.path, Format::Qcow2), Engine::Auto, &mut rng);
    let info = qemu::img(&["info", "--output=json", qemu::text(&made.path)]);
    assert!(info.contains(r#""lazy-refcounts": true"#), "{info}");
}

#[test]
fn edge_45_images_are_written_well_past_the_page_cache() {
    let mut rng = dice("cache=none");
    for shape in [
        Shape { base: Base::Raw(90), ..Shape::new(512) },
        Shape { base: Base::Chain(2), compressed: true, ..Shape::new(65536) },
        Shape { snapshot: true, ..Shape::new(4096) },
    ] {
        for engine in [Engine::Auto, Engine::Threads] {
            println!("{shape:?} {engine:?}");
            let dir = super::direct_io_dir();
            let made = make(dir.path(), &shape, &mut rng);
            let spec = DiskSpec { cache: Cache::None, ..DiskSpec::new(&made.path, Format::Qcow2) };
            assert_written_well(&made, &shape, &spec, engine, &mut rng);
        }
    }
}

#[test]
fn images_are_written_well_when_zeros_are_detected_and_discards_ignored() {
    let mut rng = dice("options");
    let shapes = [
        Shape::new(4096),
        Shape { base: Base::Raw(90), ..Shape::new(65536) },
        Shape { version: 2, base: Base::Qcow2(90), ..Shape::new(4096) },
    ];
    for shape in shapes {
        for (detect_zeroes, discard, cache) in [
            (DetectZeroes::On, true, Cache::Writeback),
            (DetectZeroes::Unmap, true, Cache::Unsafe),
            (DetectZeroes::Unmap, false, Cache::Writeback),
        ] {
            println!("{shape:?} {detect_zeroes:?} discard {discard}");
            let dir = tempfile::tempdir().unwrap();
            let made = make(dir.path(), &shape, &mut rng);
            let spec = DiskSpec { detect_zeroes, discard, cache, ..DiskSpec::new(&made.path, Format::Qcow2) };
            assert_written_well(&made, &shape, &spec, Engine::Auto, &mut rng);
        }
    }
}

#[test]
fn zeros_that_are_detected_take_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", qemu::text(&path), "8M"]);
    let before = fs::metadata(&path).unwrap().len();
    let spec = DiskSpec { detect_zeroes: DetectZeroes::Unmap, ..DiskSpec::new(&path, Format::Qcow2) };
    let disk = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    let mut queue = disk.queue().unwrap();
    let zeros = Buffer::zeroed(4 << 20);
    ask(&mut queue, Request::Write { offset: 0, data: vec![zeros.seg(0, zeros.len())] }).unwrap();
    drop(queue);
    disk.close().unwrap();
    qemu::assert_clean(&path);
    assert_eq!(fs::metadata(&path).unwrap().len(), before);
}

#[test]
fn edge_44_and_33_discarded_space_goes_back_to_the_host_and_is_used_again() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", qemu::text(&path), "16M"]);
    let used = || fs::metadata(&path).unwrap().blocks() * 512;
    let empty = used();
    let data = Buffer::from_bytes(&vec![0x5a; 8 << 20]);
    let disk = Disk::open(&DiskSpec::new(&path, Format::Qcow2), &policy(Engine::Auto)).unwrap();
    let mut queue = disk.queue().unwrap();
    let mut longest = 0;
    for round in 0..6 {
        ask(&mut queue, Request::Write { offset: 0, data: vec![data.seg(0, data.len())] }).unwrap();
        ask(&mut queue, Request::Flush).unwrap();
        assert!(used() >= empty + (8 << 20));
        ask(&mut queue, Request::Discard { offset: 0, len: 8 << 20 }).unwrap();
        // The first flush drops the mapping, the second finds that nobody uses the clusters any more.
        (0..3).for_each(|_| ask(&mut queue, Request::Flush).unwrap());
        assert!(used() < empty + (1 << 20), "{} bytes used after a discard", used() - empty);
        let len = fs::metadata(&path).unwrap().len();
        if round == 0 {
            longest = len;
        }
        assert!(len <= longest + (1 << 20), "the file grew to {len}");
    }
    drop(queue);
    disk.close().unwrap();
    qemu::assert_clean(&path);
}

#[test]
fn a_raw_disk_is_written_well() {
    let mut rng = dice("raw");
    for engine in [Engine::Auto, Engine::Threads] {
        for cache in [Cache::Writeback, Cache::None] {
            let dir = super::direct_io_dir();
            let path = dir.path().join("disk.raw");
            let initial = super::image::random_disk((3 << 20) + 512, &mut rng);
            fs::write(&path, &initial).unwrap();
            let spec = DiskSpec { cache, ..DiskSpec::new(&path, Format::Raw) };
            let disk = Disk::open(&spec, &policy(engine)).unwrap();
            let model = play(&disk, initial, &Shape::new(4096), &mut rng);
            disk.close().unwrap();
            model.check_all(&fs::read(&path).unwrap()).unwrap();
        }
    }
}

#[test]
fn an_ephemeral_disk_leaves_its_images_as_they_were() {
    let mut rng = dice("ephemeral");
    for base in [Base::None, Base::Chain(2)] {
        let shape = Shape { base, compressed: true, ..Shape::new(4096) };
        let dir = tempfile::tempdir().unwrap();
        let made = make(dir.path(), &shape, &mut rng);
        let before = files(dir.path());
        let initial = qemu::content(&made.path);
        let spec = DiskSpec { ephemeral: true, ..DiskSpec::new(&made.path, Format::Qcow2) };
        let disk = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
        // The overlay's clusters are not the image's.
        let model = play(&disk, initial, &Shape::new(65536), &mut rng);
        model.check_all(&read_all(&disk, 2, &mut rng)).unwrap();
        disk.close().unwrap();
        assert!(before == files(dir.path()), "a file has changed");
    }
}

/// Every file of a directory: its name, its bytes, and when it was changed last.
fn files(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>, std::time::SystemTime)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn images_that_the_engine_made_are_written_well() {
    let mut rng = dice("our own images");
    for (bits, version, order) in [(9, 3, 0), (9, 2, 4), (12, 3, 6), (16, 3, 4), (16, 2, 4), (21, 3, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let storage = policy(Engine::Auto).storage;
        let file = storage.create(&path).unwrap();
        let params = CreateParams {
            version,
            cluster_bits: ClusterBits::new(bits).unwrap(),
            refcount_order: order,
            ..CreateParams::new((3 << 20) + 512 * rng.below(5000))
        };
        let queue = Queue::new(storage.blocking_driver().unwrap());
        let task = {
            let (queue, path) = (queue.clone(), path.clone());
            async move { create::create(&queue, &file, &path, &params, false).await }
        };
        block_on(&queue, task).unwrap();
        qemu::assert_clean(&path);
        let shape = Shape { version, refcount_bits: 1 << order, ..Shape::new(1 << bits) };
        println!("{shape:?}");
        let made = Made { path: path.clone(), snapshot: None };
        assert_written_well(&made, &shape, &DiskSpec::new(&path, Format::Qcow2), Engine::Auto, &mut rng);
    }
}
