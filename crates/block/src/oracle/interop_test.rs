//! Both sides on one image and in one chain: how many sorts of images the matrix has, images that the engine makes, writes and gives
//! to QEMU, which writes too, and chains whose layers are made by turns.

use std::collections::BTreeSet;
use std::path::Path;

use cowhand_qcow2::{ClusterBits, Compression, CreateParams, Header};

use super::guest::{ask, policy, read_all};
use super::image::{Base, Shape, noise, scribble};
use super::read_test::assert_same;
use super::write_test::play;
use super::{dice, matrix, qemu};
use crate::disk::{Disk, block_on};
use crate::io::Buffer;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::qcow2::create;
use crate::queue::Queue;
use crate::request::Request;
use crate::spec::{DiskSpec, Format};

/// What is promised of the matrix.
const SORTS: usize = 60;

#[test]
fn at_least_sixty_sorts_of_images_are_read_and_written() {
    let sorts: BTreeSet<String> = matrix::all_sorts().iter().map(|shape| format!("{shape:?}")).collect();
    println!("{} sorts of images that QEMU makes, {} that the engine makes", sorts.len(), our_sorts().len());
    assert!(sorts.len() >= SORTS, "{}", sorts.len());
    let ours: BTreeSet<String> = our_sorts().iter().map(|sort| format!("{sort:?}")).collect();
    assert!(ours.len() >= SORTS, "{}", ours.len());
}

/// What an image is like that the engine makes.
#[derive(Clone, Copy, Debug)]
struct Ours {
    bits: u32,
    version: u32,
    order: u32,
    extended: bool,
    zstd: bool,
    lazy: bool,
    /// Over a raw file.
    backed: bool,
}

fn our_sorts() -> Vec<Ours> {
    let plain = Ours { bits: 16, version: 3, order: 4, extended: false, zstd: false, lazy: false, backed: false };
    let bits = [9, 10, 11, 12, 13, 14, 15, 16, 18, 21];
    let mut sorts = Vec::new();
    for bits in bits {
        for backed in [false, true] {
            sorts.push(Ours { bits, version: 2, backed, ..plain });
            sorts.push(Ours { bits, order: bits % 7, zstd: bits % 2 == 0, lazy: bits % 3 == 0, backed, ..plain });
            if bits >= 14 {
                sorts.push(Ours { bits, extended: true, order: (bits + 3) % 7, backed, ..plain });
            }
        }
    }
    for order in 0..=6 {
        sorts.push(Ours { bits: 9, order, zstd: true, ..plain });
        sorts.push(Ours { bits: 12, order, lazy: true, backed: true, ..plain });
    }
    sorts
}

impl Ours {
    fn shape(self) -> Shape {
        let base = if self.backed { Base::Raw(100) } else { Base::None };
        Shape { version: self.version, refcount_bits: 1 << self.order, base, ..Shape::new(1 << self.bits) }
    }

    fn params(self, size: u64, backing: Option<(&str, Format)>) -> CreateParams {
        CreateParams {
            version: self.version,
            cluster_bits: ClusterBits::new(self.bits).unwrap(),
            refcount_order: self.order,
            compression: if self.zstd { Compression::Zstd } else { Compression::Zlib },
            extended_l2: self.extended,
            lazy_refcounts: self.lazy,
            backing: backing.map(|(name, format)| (name.as_bytes().to_vec(), format.name().into())),
            ..CreateParams::new(size)
        }
    }
}

fn make(path: &Path, params: CreateParams) {
    let storage = policy(Engine::Auto).storage;
    let file = storage.create(path).unwrap();
    let queue = Queue::new(storage.blocking_driver().unwrap());
    let task = {
        let (queue, path) = (queue.clone(), path.to_path_buf());
        async move { create::create(&queue, &file, &path, &params, false).await }
    };
    block_on(&queue, task).unwrap();
}

/// The engine writes at random; QEMU finds nothing wrong, and reads what was written.
fn write(path: &Path, shape: &Shape, rng: &mut Rng) {
    let initial = qemu::content(path);
    let disk = Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy(Engine::Auto)).unwrap();
    let model = play(&disk, initial, shape, rng);
    disk.close().unwrap();
    qemu::assert_clean(path);
    model.check_all(&qemu::content(path)).unwrap();
}

fn assert_reads_as_qemu(path: &Path, rng: &mut Rng) {
    let spec = DiskSpec { readonly: true, ..DiskSpec::new(path, Format::Qcow2) };
    let disk = Disk::open(&spec, &policy(Engine::Auto)).unwrap();
    let found = read_all(&disk, 2, rng);
    disk.close().unwrap();
    assert_same(&found, &qemu::content(path));
}

#[test]
fn images_of_ours_are_written_by_both_in_turn() {
    let mut rng = dice("our images");
    for sort in our_sorts() {
        println!("{sort:?}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let clusters = if sort.bits > 16 { 6 } else { 40 };
        let size = ((clusters << sort.bits).max(200 << 10)) + 512 * rng.below(8);
        let backing = sort.backed.then_some(("base.raw", Format::Raw));
        if sort.backed {
            std::fs::write(dir.path().join("base.raw"), noise(size as usize / 1024 * 512, &mut rng)).unwrap();
        }
        make(&path, sort.params(size, backing));
        qemu::assert_clean(&path);
        let shape = sort.shape();
        write(&path, &shape, &mut rng);
        scribble(&path, &shape, size, &mut rng);
        assert_reads_as_qemu(&path, &mut rng);
        write(&path, &shape, &mut rng);
    }
}

#[test]
fn chains_of_layers_that_each_side_made_read_alike() {
    let mut rng = dice("mixed chains");
    let sorts = our_sorts();
    for _ in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let mut below = ("base.raw".to_string(), Format::Raw);
        std::fs::write(dir.path().join(&below.0), noise(300 << 10, &mut rng)).unwrap();
        for layer in 0..4 {
            let name = format!("layer{layer}.qcow2");
            let path = dir.path().join(&name);
            let size = (200 << 10) + 512 * rng.below(400);
            let mut sort = sorts[rng.below(sorts.len() as u64) as usize];
            sort.bits = sort.bits.min(16);
            sort.backed = true;
            let shape = sort.shape();
            if rng.one_in(2) {
                make(&path, sort.params(size, Some((&below.0, below.1))));
            } else {
                let compat = if sort.version == 2 { "0.10" } else { "1.1" };
                let options = format!("compat={compat},cluster_size={}", 1 << sort.bits);
                let (size, format) = (size.to_string(), below.1.name());
                let path = qemu::text(&path);
                qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, "-b", &below.0, "-F", format, path, &size]);
            }
            println!("layer {layer}: {sort:?}");
            if rng.one_in(2) {
                write(&path, &shape, &mut rng);
            } else {
                scribble(&path, &shape, size, &mut rng);
            }
            assert_reads_as_qemu(&path, &mut rng);
            below = (name, Format::Qcow2);
        }
    }
}

/// Two images alike that QEMU made, with these options.
fn twins(dir: &Path, options: &str, size: u64) -> [std::path::PathBuf; 2] {
    ["ours.qcow2", "theirs.qcow2"].map(|name| {
        let path = dir.join(name);
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, qemu::text(&path), &size.to_string()]);
        path
    })
}

fn open(path: &Path) -> crate::sync::Arc<Disk> {
    Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy(Engine::Auto)).unwrap()
}

#[test]
fn data_that_is_written_at_once_and_refcount_blocks_lie_where_qemu_lays_them() {
    let dir = tempfile::tempdir().unwrap();
    for (options, clusters) in [("cluster_size=4k,refcount_bits=64", 2038), ("cluster_size=512,refcount_bits=32", 1500)]
    {
        let cluster = if options.contains("4k") { 4096 } else { 512 };
        let [ours, theirs] = twins(dir.path(), options, clusters * cluster);
        qemu::io(&theirs, &[format!("write -q -P 1 0 {}", clusters * cluster)]);
        let disk = open(&ours);
        let mut queue = disk.queue().unwrap();
        let data = Buffer::from_bytes(&vec![1; (clusters * cluster) as usize]);
        ask(&mut queue, Request::Write { offset: 0, data: vec![data.seg(0, data.len())] }).unwrap();
        drop(queue);
        disk.close().unwrap();
        qemu::assert_clean(&ours);
        let laid = |path: &Path| {
            let image = std::fs::read(path).unwrap();
            let header = Header::parse(&image, image.len() as u64).unwrap();
            let table = image[header.refcount_table_offset.get() as usize..][..cluster as usize].to_vec();
            (table, qemu::img(&["map", "--output=json", "-f", "qcow2", qemu::text(path)]))
        };
        assert_eq!(laid(&ours), laid(&theirs), "{options}");
    }
}

#[test]
fn a_new_bitmap_is_written_once_where_qemu_writes_it() {
    let dir = tempfile::tempdir().unwrap();
    let [ours, theirs] = twins(dir.path(), "cluster_size=64k", 10 << 20);
    qemu::img(&["bitmap", "--add", "-f", "qcow2", qemu::text(&theirs), "b"]);
    let disk = open(&ours);
    disk.create_bitmap("b", None, true).unwrap();
    disk.close().unwrap();
    let directory = |path: &Path| {
        let image = std::fs::read(path).unwrap();
        let place = Header::parse(&image, image.len() as u64).unwrap().bitmaps_extension().unwrap().unwrap();
        image[place.directory_offset.get() as usize..][..place.directory_size as usize].to_vec()
    };
    // Its table's place and its flags are in there.
    assert_eq!(directory(&ours), directory(&theirs));
    qemu::assert_clean(&ours);
}
