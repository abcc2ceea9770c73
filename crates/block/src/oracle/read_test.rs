//! QEMU makes an image, the engine reads it: every byte as `qemu-img convert` has it.

use super::guest::{ask, policy, read_all};
use super::image::{Base, SNAPSHOT, Shape, make};
use super::{dice, matrix, qemu};
use crate::disk::Disk;
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::request::Request;
use crate::spec::{Cache, DiskSpec, Format};

/// Reads the image with the engine and compares.
fn assert_reads_as_qemu(spec: &DiskSpec, engine: Engine, rng: &mut Rng) {
    let spec = DiskSpec { readonly: true, ..spec.clone() };
    let expected = qemu::content(&spec.path);
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
    matrix::each(name, shapes, |made, _, spec, engine, rng| {
        assert_reads_as_qemu(spec, engine, rng);
        if made.snapshot.is_some() {
            qemu::img(&["snapshot", "-a", SNAPSHOT, qemu::text(&made.path)]);
            assert_reads_as_qemu(spec, engine, rng);
        }
    });
}

#[test]
fn edge_01_version_2_images_read_as_qemu_reads_them() {
    all("version 2", &matrix::version_2());
}

#[test]
fn edge_28_images_of_every_refcount_width_read_as_qemu_reads_them() {
    all("refcount widths", &matrix::refcount_widths());
}

#[test]
fn images_of_every_cluster_size_read_as_qemu_reads_them() {
    all("cluster sizes", &matrix::cluster_sizes());
}

#[test]
fn edge_20_backing_files_shorter_and_longer_read_as_qemu_reads_them() {
    all("backing files", &matrix::backing_files());
}

#[test]
fn edge_51_chains_of_relative_names_read_as_qemu_reads_them() {
    all("chains", &matrix::chains());
}

#[test]
fn edge_17_preallocated_and_zeroed_images_read_as_qemu_reads_them() {
    all("preallocation", &matrix::preallocated());
}

#[test]
fn edge_34_images_with_lazy_refcounts_read_as_qemu_reads_them() {
    all("lazy refcounts", &matrix::lazy_refcounts());
}

#[test]
fn edge_19_extended_l2_images_read_as_qemu_reads_them() {
    all("extended L2", &matrix::extended_l2());
}

#[test]
fn edge_16_images_with_data_files_read_as_qemu_reads_them() {
    all("data files", &matrix::data_files());
}

#[test]
fn edge_22_compressed_zlib_clusters_read_as_qemu_reads_them() {
    all("zlib", &matrix::zlib());
}

#[test]
fn edge_04_compressed_zstd_clusters_read_as_qemu_reads_them() {
    all("zstd", &matrix::zstd());
}

#[test]
fn images_with_internal_snapshots_read_as_qemu_reads_them() {
    all("snapshots", &matrix::snapshots());
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
        let metadata_cache = rng.one_in(2).then_some(1);
        let spec = DiskSpec { cache: Cache::None, metadata_cache, ..DiskSpec::new(&made.path, Format::Qcow2) };
        for engine in [Engine::Auto, Engine::Threads] {
            assert_reads_as_qemu(&spec, engine, &mut rng);
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
    assert_reads_as_qemu(&DiskSpec::new(&path, Format::Qcow2), Engine::Auto, &mut rng);
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
