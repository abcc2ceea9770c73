//! Compressed writes: QEMU judges what the engine compressed, and says what is to be refused.

use std::fs;
use std::path::Path;

use super::guest::{ask, policy, read_all};
use super::image::{noise, random_disk};
use super::qemu::{self, text};
use super::read_test::assert_same;
use super::{dice, matrix};
use crate::disk::{Disk, DiskQueue};
use crate::error::ErrorKind;
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{Cache, DiskSpec, Format};
use crate::sync::Arc;

fn open(path: &Path) -> Arc<Disk> {
    Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy(Engine::Auto)).unwrap()
}

fn create(path: &Path, options: &str, size: u64) {
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, text(path), &size.to_string()]);
}

/// Content of all sorts: half of it shrinks, some of it is zero, and some does not shrink at all.
fn mixed(size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut content = random_disk(size, rng);
    let some = content.len() / 5;
    let random: Vec<u8> = (0..some / 8 + 1).flat_map(|_| rng.next_u64().to_le_bytes()).collect();
    content[some..2 * some].copy_from_slice(&random[..some]);
    content
}

/// Writes the whole disk compressed: requests of one to five clusters, in any order, several in flight.
fn fill(disk: &Arc<Disk>, content: &[u8], cluster: usize, rng: &mut Rng) {
    let mut queue = disk.queue().unwrap();
    let mut parts = Vec::new();
    let mut at = 0;
    while at < content.len() {
        let len = (cluster * (1 + rng.below(5) as usize)).min(content.len() - at);
        parts.push((at, Buffer::from_bytes(&content[at..at + len])));
        at += len;
    }
    for i in (1..parts.len()).rev() {
        parts.swap(i, rng.below(i as u64 + 1) as usize);
    }
    let mut events = Vec::new();
    for (at, buffer) in &parts {
        let data = vec![buffer.seg(0, buffer.len())];
        queue.submit(0, Request::WriteCompressed { offset: *at as u64, data });
        while queue.in_flight() >= 8 {
            wait(&mut queue, &mut events);
        }
    }
    while queue.in_flight() > 0 {
        wait(&mut queue, &mut events);
    }
}

fn wait(queue: &mut DiskQueue, events: &mut Vec<Event>) {
    queue.wait(Wait::Block, events).unwrap();
    for event in events.drain(..) {
        let Event::Done { result, .. } = event else { continue };
        result.unwrap();
    }
}

fn compressed_clusters(path: &Path) -> usize {
    qemu::img(&["map", "--output=json", "-f", "qcow2", text(path)]).matches(r#""compressed": true"#).count()
}

/// Fills an image of these options, and lets QEMU look at it.
fn assert_compressed_well(options: &str, cluster: u64, cache: Cache, rng: &mut Rng) {
    println!("{options} {cluster} {cache:?}");
    let dir = super::direct_io_dir();
    let path = dir.path().join("disk.qcow2");
    let clusters = if cluster > 65536 { 5 } else { (2 << 20) / cluster };
    let size = clusters * cluster + 512 * rng.below(cluster / 512);
    let content = mixed(size, rng);
    create(&path, &format!("cluster_size={cluster}{options}"), size);
    let spec = DiskSpec { cache, ..DiskSpec::new(&path, Format::Qcow2) };
    let disk = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    fill(&disk, &content, cluster as usize, rng);
    assert_same(&read_all(&disk, 2, rng), &content);
    disk.close().unwrap();
    qemu::assert_clean(&path);
    assert_same(&qemu::content(&path), &content);
    assert!(compressed_clusters(&path) > 0);
    assert_eq!(fs::metadata(&path).unwrap().len() % 512, 0);
    // And once more by a fresh look.
    assert_same(&read_all(&open(&path), 2, rng), &content);
}

#[test]
fn edges_22_to_26_compressed_writes_are_sound_with_every_cluster_size_and_codec() {
    let mut rng = dice("compressed writes");
    for bits in 9..=21 {
        let codec = if bits % 2 == 0 { "" } else { ",compression_type=zstd" };
        assert_compressed_well(codec, 1 << bits, Cache::Writeback, &mut rng);
    }
    for (options, cluster) in [
        (",compression_type=zstd", 65536),
        (",compression_type=zstd", 4096),
        (",compression_type=zstd,extended_l2=on", 16384),
        (",extended_l2=on", 65536),
        (",compat=0.10", 65536),
    ] {
        assert_compressed_well(options, cluster, Cache::Writeback, &mut rng);
    }
    for cluster in [512, 65536] {
        assert_compressed_well("", cluster, Cache::None, &mut rng);
    }
}

#[test]
fn edge_26_packing_stops_at_the_largest_count_of_every_refcount_width() {
    let mut rng = dice("compressed writes, refcounts");
    for shape in matrix::refcount_widths() {
        assert_compressed_well(&format!(",refcount_bits={}", shape.refcount_bits), 4096, Cache::Writeback, &mut rng);
    }
}

/// The sources of this crate: text as it comes.
fn sources() -> Vec<u8> {
    let mut text = Vec::new();
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                text.extend(fs::read(path).unwrap());
            }
        }
    }
    text.resize(text.len().next_multiple_of(65536), 0);
    text
}

#[test]
fn images_are_hardly_larger_than_those_that_qemu_compresses() {
    let mut rng = dice("compressed size");
    let dir = tempfile::tempdir().unwrap();
    let (raw, ours, theirs) = (dir.path().join("raw"), dir.path().join("ours"), dir.path().join("theirs"));
    // The binary of this test too, as far as it need be.
    let mut content = sources();
    let binary = fs::read(std::env::current_exe().unwrap()).unwrap();
    content.extend(&binary[..binary.len().min(8 << 20) / 65536 * 65536]);
    fs::write(&raw, &content).unwrap();
    for codec in ["zlib", "zstd"] {
        let option = format!("compression_type={codec}");
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &option, text(&raw), text(&theirs)];
        qemu::img(&convert);
        create(&ours, &option, content.len() as u64);
        let disk = open(&ours);
        fill(&disk, &content, 65536, &mut rng);
        disk.close().unwrap();
        let len = |path: &Path| fs::metadata(path).unwrap().len() as f64;
        let ratio = len(&ours) / len(&theirs);
        println!("{codec}: {ratio:.4} times as large as QEMU's {} bytes of {}", len(&theirs), content.len());
        assert!(ratio <= 1.03, "{codec}: {ratio}");
        fs::remove_file(&theirs).unwrap();
    }
}

#[test]
fn what_qemu_refuses_to_compress_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let buffer = Buffer::from_bytes(&[5; 65536]);
    let compress = |disk: &Arc<Disk>, offset| {
        let mut queue = disk.queue().unwrap();
        ask(&mut queue, Request::WriteCompressed { offset, data: vec![buffer.seg(0, 65536)] })
    };
    let qemu_refuses = |offset: u64| {
        let command = format!("write -c -P 5 {offset} 64k");
        qemu::run("qemu-io", &["-f", "qcow2", "-c", &command, text(&path)]).said.contains("failed")
    };
    let commands = ["write -P 1 0 64k", "write -c -P 2 64k 64k", "write -z 128k 64k", "write -z -u 192k 64k"];
    for options in ["preallocation=off", "preallocation=metadata", "extended_l2=on"] {
        create(&path, options, 1 << 20);
        let prefilled = options.starts_with("preallocation=m");
        let commands = if prefilled { &commands[..1] } else { &commands[..] };
        qemu::io(&path, &commands.iter().map(|c| (*c).to_string()).collect::<Vec<_>>());
        let before = qemu::content(&path);
        for offset in [0, 65536, 131_072, 196_608, 512 << 10] {
            let copy = dir.path().join("copy.qcow2");
            fs::copy(&path, &copy).unwrap();
            let disk = open(&copy);
            let ours = compress(&disk, offset);
            disk.close().unwrap();
            let theirs = qemu_refuses(offset);
            assert_eq!(ours.is_err(), theirs, "{options} at {offset}: {ours:?}");
            if let Err(e) = ours {
                assert_eq!(e.kind(), ErrorKind::Invalid, "{e}");
                assert_same(&qemu::content(&copy), &before);
            }
            qemu::assert_clean(&copy);
            // As it was, for the next one.
            if !theirs {
                qemu::io(&path, &[format!("write -z -u {offset} 64k")]);
            }
        }
    }
    let data_file = format!("data_file={}", text(&dir.path().join("data.raw")));
    create(&path, &data_file, 1 << 20);
    assert_eq!(compress(&open(&path), 0).unwrap_err().kind(), ErrorKind::Unsupported);
    let raw = dir.path().join("raw");
    fs::write(&raw, noise(1 << 20, &mut dice("refused"))).unwrap();
    let disk = Disk::open(&DiskSpec::new(&raw, Format::Raw), &policy(Engine::Auto)).unwrap();
    assert_eq!(compress(&disk, 0).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// How fast the engine fills an image and reads it again.
#[test]
#[ignore = "a tool: COWHAND_SAMPLE=file shows how fast (build with --release)"]
fn speed() {
    use std::time::Instant;
    let mut rng = dice("compress speed");
    let mut content = fs::read(std::env::var("COWHAND_SAMPLE").unwrap()).unwrap();
    content.truncate(content.len() / 65536 * 65536);
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("disk.qcow2"), dir.path().join("raw"));
    fs::write(&raw, &content).unwrap();
    let mb = content.len() as f64 / 1e6;
    for codec in ["zlib", "zstd"] {
        let option = format!("compression_type={codec}");
        let begin = Instant::now();
        qemu::img(&["convert", "-c", "-W", "-f", "raw", "-O", "qcow2", "-o", &option, text(&raw), text(&path)]);
        println!("{codec}: QEMU converts {:.0} MB/s", mb / begin.elapsed().as_secs_f64());
        create(&path, &option, content.len() as u64);
        let disk = open(&path);
        let begin = Instant::now();
        fill(&disk, &content, 65536, &mut rng);
        println!("{codec}: we write {:.0} MB/s", mb / begin.elapsed().as_secs_f64());
        disk.close().unwrap();
        let disk = open(&path);
        let mut queue = disk.queue().unwrap();
        for (name, len) in [("4 KiB alone", 4096), ("64 KiB alone", 65536), ("1 MiB", 1 << 20)] {
            let buffer = Buffer::zeroed(len);
            let offsets = (0..content.len() as u64 - (1 << 20)).step_by((1 << 20) + 65536);
            let (begin, count) = (Instant::now(), offsets.clone().count());
            for offset in offsets {
                ask(&mut queue, Request::Read { offset, data: vec![buffer.seg(0, len)] }).unwrap();
            }
            println!("{codec}: reads of {name} take {:.0} µs", begin.elapsed().as_secs_f64() * 1e6 / count as f64);
        }
    }
}
