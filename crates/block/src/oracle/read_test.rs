//! QEMU makes an image, the engine reads it: every byte as `qemu-img convert` has it.

use std::path::Path;

use super::guest::{ask, policy, read_all};
use super::image::{Base, Made, Shape, make};
use super::{dice, qemu};
use crate::disk::Disk;
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::request::Request;
use crate::spec::{Cache, DiskSpec, Format};

/// Reads the image with the engine and compares.
fn assert_reads_as_qemu(path: &Path, engine: Engine, cache: Cache, rng: &mut Rng) {
    let spec = DiskSpec {
        readonly: true,
        cache,
        // The least there is: every slice comes and goes.
        metadata_cache: rng.one_in(2).then_some(1),
        ..DiskSpec::new(path, Format::Qcow2)
    };
    let expected = qemu::content(path);
    let disk = Disk::open(&spec, &policy(engine)).unwrap();
    let found = read_all(&disk, 3, rng);
    disk.close().unwrap();
    assert_same(&found, &expected);
}

pub(super) fn assert_same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "sizes");
    let at = found.iter().zip(expected).position(|(a, b)| a != b);
    let Some(at) = at else { return };
    let end = found.len().min(at + 16);
    panic!("byte {at:#x}: {:02x?}, QEMU has {:02x?}", &found[at..end], &expected[at..end]);
}

fn all(name: &str, shapes: &[Shape]) {
    let mut rng = dice(name);
    for shape in shapes {
        println!("{shape:?}");
        let dir = tempfile::tempdir().unwrap();
        let Made { path, snapshot } = make(dir.path(), shape, &mut rng);
        let engine = if rng.one_in(2) { Engine::Auto } else { Engine::Threads };
        assert_reads_as_qemu(&path, engine, Cache::Writeback, &mut rng);
        if snapshot.is_some() {
            qemu::img(&["snapshot", "-a", super::image::SNAPSHOT, path.to_str().unwrap()]);
            assert_reads_as_qemu(&path, engine, Cache::Writeback, &mut rng);
        }
    }
}

#[test]
fn edge_01_version_2_images_read_as_qemu_reads_them() {
    let shape = |cluster, base| Shape { version: 2, base, ..Shape::new(cluster) };
    all(
        "version 2",
        &[
            shape(512, Base::None),
            shape(4096, Base::Raw(100)),
            shape(65536, Base::Qcow2(60)),
            shape(2 << 20, Base::None),
            Shape { compressed: true, ..shape(65536, Base::None) },
            Shape { snapshot: true, ..shape(4096, Base::None) },
        ],
    );
}

#[test]
fn edge_28_images_of_every_refcount_width_read_as_qemu_reads_them() {
    let shapes = [1, 2, 4, 8, 16, 32, 64].map(|bits| Shape { refcount_bits: bits, ..Shape::new(4096) });
    all("refcount widths", &shapes);
}

#[test]
fn images_of_every_cluster_size_read_as_qemu_reads_them() {
    let sizes = [512, 1024, 2048, 8192, 16384, 65536, 262_144, 1 << 20, 2 << 20];
    all("cluster sizes", &sizes.map(Shape::new));
}

#[test]
fn edge_20_backing_files_shorter_and_longer_read_as_qemu_reads_them() {
    let shapes = [
        (512, Base::Raw(55)),
        (65536, Base::Raw(130)),
        (4096, Base::Qcow2(35)),
        (65536, Base::Qcow2(150)),
        (2 << 20, Base::Raw(70)),
    ];
    all("backing files", &shapes.map(|(cluster, base)| Shape { base, ..Shape::new(cluster) }));
}

#[test]
fn edge_51_chains_of_relative_names_read_as_qemu_reads_them() {
    let shapes = [(4096, 3), (65536, 6), (512, 2)];
    all("chains", &shapes.map(|(cluster, depth)| Shape { base: Base::Chain(depth), ..Shape::new(cluster) }));
}

#[test]
fn edge_17_preallocated_and_zeroed_images_read_as_qemu_reads_them() {
    let options: [&[&str]; 4] =
        [&["preallocation=metadata"], &["preallocation=falloc"], &["preallocation=full"], &["lazy_refcounts=on"]];
    all("preallocation", &options.map(|options| Shape { options, ..Shape::new(65536) }));
    let small = Shape { options: &["preallocation=metadata"], ..Shape::new(512) };
    all("preallocation, small clusters", &[small.clone(), Shape { empty: true, ..small }]);
}

#[test]
fn edge_19_extended_l2_images_read_as_qemu_reads_them() {
    let options: &[&str] = &["extended_l2=on"];
    let shape = |cluster, base| Shape { options, base, ..Shape::new(cluster) };
    all(
        "extended L2",
        &[
            shape(16384, Base::None),
            shape(65536, Base::Raw(70)),
            shape(2 << 20, Base::Qcow2(100)),
            shape(16384, Base::Chain(4)),
            Shape { compressed: true, ..shape(65536, Base::None) },
            Shape { snapshot: true, ..shape(16384, Base::Qcow2(120)) },
        ],
    );
}

#[test]
fn edge_22_compressed_zlib_clusters_read_as_qemu_reads_them() {
    let shape = |cluster, base| Shape { compressed: true, base, ..Shape::new(cluster) };
    all(
        "zlib",
        &[
            shape(512, Base::None),
            shape(4096, Base::Raw(90)),
            shape(65536, Base::None),
            shape(65536, Base::Chain(2)),
            shape(2 << 20, Base::None),
            Shape { refcount_bits: 1, ..shape(65536, Base::None) },
        ],
    );
}

#[test]
fn edge_04_compressed_zstd_clusters_read_as_qemu_reads_them() {
    let shape =
        |cluster, base| Shape { compressed: true, base, options: &["compression_type=zstd"], ..Shape::new(cluster) };
    all("zstd", &[shape(512, Base::None), shape(65536, Base::Raw(120)), shape(65536, Base::None)]);
    all("zstd, 2M", &[shape(2 << 20, Base::None)]);
}

#[test]
fn images_with_internal_snapshots_read_as_qemu_reads_them() {
    let shape = |cluster, base| Shape { snapshot: true, base, ..Shape::new(cluster) };
    all(
        "snapshots",
        &[
            shape(4096, Base::None),
            shape(65536, Base::Qcow2(90)),
            Shape { compressed: true, ..shape(65536, Base::None) },
            Shape { refcount_bits: 2, ..shape(512, Base::None) },
        ],
    );
}

#[test]
fn images_read_past_the_page_cache_as_qemu_reads_them() {
    let mut rng = dice("cache=none");
    for shape in [
        Shape { base: Base::Raw(90), ..Shape::new(512) },
        Shape { base: Base::Chain(2), compressed: true, ..Shape::new(65536) },
    ] {
        let dir = super::direct_io_dir();
        let made = make(dir.path(), &shape, &mut rng);
        for engine in [Engine::Auto, Engine::Threads] {
            assert_reads_as_qemu(&made.path, engine, Cache::None, &mut rng);
        }
    }
}

#[test]
fn edge_48_clusters_past_the_end_of_the_file_read_as_zeros() {
    let mut rng = dice("clusters past the end");
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { options: &["preallocation=metadata"], empty: true, ..Shape::new(65536) };
    let path = make(dir.path(), &shape, &mut rng).path;
    qemu::io(&path, &["write -q -P 7 0 64k".into()]);
    // Preallocated data lies after the metadata: cut it off in the middle of a cluster.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len - 10 * 65536 - 3 * 512).unwrap();
    assert_reads_as_qemu(&path, Engine::Auto, Cache::Writeback, &mut rng);
}

#[test]
fn requests_that_need_no_io_are_answered_to_a_blocking_wait() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = dice("no I/O");
    let path = make(dir.path(), &Shape { empty: true, ..Shape::new(65536) }, &mut rng).path;
    for engine in [Engine::Auto, Engine::Threads] {
        let spec = DiskSpec { readonly: true, ..DiskSpec::new(&path, Format::Qcow2) };
        let disk = Disk::open(&spec, &policy(engine)).unwrap();
        let mut queue = disk.queue().unwrap();
        let buffer = Buffer::from_bytes(&[7; 4096]);
        ask(&mut queue, Request::Read { offset: 0, data: vec![buffer.seg(0, 4096)] }).unwrap();
        assert_eq!(*buffer, [0; 4096]);
        drop(queue);
        // Nothing is to be written either.
        disk.close().unwrap();
    }
}
