//! Corners of the format that QEMU's tools do not make by themselves: images of theirs, changed by hand.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::DeflateEncoder;

use cowhand_qcow2::{Autoclear, ExtensionKind, Header};

use super::guest::{ask, policy};
use super::image::noise;
use super::qemu::{self, text};
use super::read_test::assert_same;
use super::{dice, qemu::content};
use crate::disk::Disk;
use crate::error::ErrorKind;
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::request::Request;
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

const CLUSTER: usize = 65536;

fn create(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), "4M"]);
    path
}

fn open(path: &Path, readonly: bool) -> Arc<Disk> {
    Disk::open(&DiskSpec { readonly, ..DiskSpec::new(path, Format::Qcow2) }, &policy(Engine::Auto)).unwrap()
}

fn write(path: &Path, offset: u64, bytes: &[u8]) {
    let disk = open(path, false);
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(bytes);
    ask(&mut queue, Request::Write { offset, data: vec![buffer.seg(0, buffer.len())] }).unwrap();
    drop(queue);
    disk.close().unwrap();
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn edge_02_and_03_opening_for_writing_clears_autoclear_bits_and_keeps_all_else_of_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "compat=1.1");
    qemu::img(&["bitmap", "--add", text(&path), "changes"]);
    let mut image = fs::read(&path).unwrap();
    // A compatible bit and an autoclear bit that nobody knows, beside the bitmaps'.
    image[80..88].copy_from_slice(&0x4000_0000_0000_0000u64.to_be_bytes());
    assert_eq!(number(&image, 88), 1);
    image[88..96].copy_from_slice(&0x0100_0000_0000_0001u64.to_be_bytes());
    fs::write(&path, &image).unwrap();
    open(&path, true).close().unwrap();
    assert!(image == fs::read(&path).unwrap(), "reading changed the file");
    write(&path, 0, &[7; 4096]);
    let written = fs::read(&path).unwrap();
    // Bitmaps are kept up to date, and what names their directory has a new place in the header.
    assert_eq!(number(&written, 88), 1, "autoclear bits");
    let all_else = |bytes: &[u8]| {
        let mut header = Header::parse(bytes, bytes.len() as u64).unwrap();
        header.autoclear = Autoclear::empty();
        header.set_extension(ExtensionKind::Bitmaps, None);
        header
    };
    assert_eq!(all_else(&image), all_else(&written));
    assert!(image[..88] == written[..88] && image[96..112] == written[96..112]);
}

#[test]
fn edge_09_and_36_an_l1_table_larger_than_the_disk_is_used_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", text(&path), "16M"]);
    let (at, len) = (36, 4);
    qemu::img(&["resize", "-q", "--shrink", "-f", "qcow2", text(&path), "1M"]);
    let before = fs::read(&path).unwrap()[at..at + len].to_vec();
    let bytes = noise(1 << 20, &mut dice("large L1"));
    write(&path, 0, &bytes);
    assert_eq!(fs::read(&path).unwrap()[at..at + len], before);
    qemu::assert_clean(&path);
    assert_same(&content(&path), &bytes);
}

#[test]
fn edge_29_refcount_tables_grow_under_a_writer() {
    let mut rng = dice("growth");
    for bits in [64, 32] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let options = format!("cluster_size=512,refcount_bits={bits}");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "12M"]);
        let clusters = || u32::from_be_bytes(fs::read(&path).unwrap()[56..60].try_into().unwrap());
        let before = clusters();
        let bytes = noise(12 << 20, &mut rng);
        write(&path, 0, &bytes);
        assert!(clusters() > before, "the table did not grow");
        qemu::assert_clean(&path);
        assert_same(&content(&path), &bytes);
    }
}

/// An image whose first cluster is compressed, its data at the end of the file, a few bytes past a sector's start.
fn with_compressed(dir: &Path, data: &[u8]) -> PathBuf {
    let path = create(dir, "compat=1.1,cluster_size=65536");
    qemu::io(&path, &["write -q -P 9 0 128k".into()]);
    let mut image = fs::read(&path).unwrap();
    let l1 = number(&image, 40) as usize;
    let l2 = (number(&image, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    // Across the next cluster's start. (Sharp edge 23.)
    let at = image.len().next_multiple_of(CLUSTER) + CLUSTER - 300;
    let sectors = ((at % 512 + data.len()).div_ceil(512) - 1) as u64;
    let entry = 1u64 << 62 | sectors << 54 | at as u64;
    assert!(sectors < 1 << 8, "as many sectors as an entry can name");
    image[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
    image.resize(at, 0);
    image.extend(data);
    fs::write(&path, image).unwrap();
    path
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// What the first cluster reads as.
fn read_first(path: &Path) -> crate::error::Result<Vec<u8>> {
    let disk = open(path, true);
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&vec![0xee; CLUSTER]);
    let read = ask(&mut queue, Request::Read { offset: 0, data: vec![buffer.seg(0, CLUSTER)] });
    drop(queue);
    disk.close().unwrap();
    read.map(|()| buffer.to_vec())
}

#[test]
fn edge_23_24_and_25_a_window_of_32k_across_clusters_and_past_the_end_is_decoded() {
    let mut rng = dice("window");
    let dir = tempfile::tempdir().unwrap();
    // Repeats itself from so far that only a large window can say so.
    let part = noise(20_000, &mut rng);
    let mut bytes = [part.clone(), part.clone(), part.clone(), part].concat();
    bytes.truncate(CLUSTER);
    let compressed = deflate(&bytes);
    assert!(compressed.len() < 40_000, "the distances are short");
    let path = with_compressed(dir.path(), &compressed);
    assert_same(&read_first(&path).unwrap(), &bytes);
}

#[test]
fn edge_27_a_decompression_bomb_gives_one_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let bomb = deflate(&vec![0x5a; 100 << 20]);
    let path = with_compressed(dir.path(), &bomb[..bomb.len().min(100_000)]);
    assert_same(&read_first(&path).unwrap(), &[0x5a; CLUSTER]);
}

#[test]
fn edge_24_a_broken_compressed_cluster_is_an_error_and_harms_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let whole = deflate(&noise(CLUSTER, &mut dice("broken")));
    for data in [&whole[..whole.len() / 2], &[0xff; 600], &[0]] {
        let path = with_compressed(dir.path(), data);
        let error = read_first(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        let disk = open(&path, true);
        let mut queue = disk.queue().unwrap();
        let buffer = Buffer::zeroed(512);
        ask(&mut queue, Request::Read { offset: CLUSTER as u64, data: vec![buffer.seg(0, 512)] }).unwrap();
        assert_eq!(*buffer, [9; 512]);
        drop(queue);
        disk.close().unwrap();
        fs::remove_file(&path).unwrap();
    }
}
