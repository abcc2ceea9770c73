//! Images made by QEMU's tools: of every shape, with random content.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::qemu::{self, text};
use crate::io::sim::Rng;
use crate::spec::Format;

/// What lies below an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    None,
    /// A raw file, so much of the image's size (in percent).
    Raw(u64),
    /// A qcow2 image, so much of the image's size (in percent).
    Qcow2(u64),
    /// This many overlays on a raw file, each of its own size and cluster size.
    Chain(u32),
}

/// What an image is like.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) version: u32,
    pub(super) cluster: u64,
    pub(super) refcount_bits: u32,
    pub(super) base: Base,
    /// Further options of `qemu-img create -o`.
    pub(super) options: &'static [&'static str],
    /// Compressed clusters, from `qemu-img convert -c` and `qemu-io write -c`, between others.
    pub(super) compressed: bool,
    /// An internal snapshot half-way.
    pub(super) snapshot: bool,
    /// Nothing is written to it.
    pub(super) empty: bool,
    /// Its data lies in a file of its own.
    pub(super) data_file: bool,
}

impl Shape {
    pub(super) const fn new(cluster: u64) -> Self {
        Self {
            version: 3,
            cluster,
            refcount_bits: 16,
            base: Base::None,
            options: &[],
            compressed: false,
            snapshot: false,
            empty: false,
            data_file: false,
        }
    }

    /// The whole `-o` of the image.
    fn create_options(&self, dir: &Path) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut options = format!("compat={compat},cluster_size={}", self.cluster);
        if self.version > 2 {
            options += &format!(",refcount_bits={}", self.refcount_bits);
        }
        for option in self.options {
            options += &format!(",{option}");
        }
        if self.data_file {
            options += &format!(",data_file={}", text(&dir.join("data.raw")));
        }
        options
    }
}

/// An image of some shape.
pub(super) struct Made {
    pub(super) path: PathBuf,
    /// What its internal snapshot holds.
    pub(super) snapshot: Option<Vec<u8>>,
}

/// The snapshot's name.
pub(super) const SNAPSHOT: &str = "before";

/// Makes an image in `dir`, with whatever lies below it.
pub(super) fn make(dir: &Path, shape: &Shape, rng: &mut Rng) -> Made {
    let clusters = match shape.cluster {
        512 => 5000 + rng.below(1000),
        513..=4096 => 1200 + rng.below(400),
        4097..=65536 => 100 + rng.below(40),
        _ => 8 + rng.below(4),
    };
    let size = clusters * shape.cluster + 512 * rng.below(shape.cluster / 512);
    let path = dir.join("disk.qcow2");
    let below = make_base(dir, shape, size, rng);
    if shape.compressed && below.is_none() {
        let raw = dir.join("content.raw");
        fs::write(&raw, random_disk(size, rng)).unwrap();
        let options = shape.create_options(dir);
        qemu::img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&path)]);
    } else {
        create(&path, &shape.create_options(dir), size, below.as_ref());
    }
    if !shape.empty {
        scribble(&path, shape, size, rng);
    }
    let mut snapshot = None;
    if shape.snapshot {
        snapshot = Some(qemu::content(&path));
        qemu::img(&["snapshot", "-c", SNAPSHOT, text(&path)]);
        scribble(&path, shape, size, rng);
    }
    Made { path, snapshot }
}

fn make_base(dir: &Path, shape: &Shape, size: u64, rng: &mut Rng) -> Option<(PathBuf, Format)> {
    let percent = |p: u64| (size * p / 100).next_multiple_of(512);
    match shape.base {
        Base::None => None,
        Base::Raw(p) => Some((raw_base(dir, percent(p), rng), Format::Raw)),
        Base::Qcow2(p) => {
            let path = dir.join("base.qcow2");
            qcow2_layer(&path, percent(p), None, shape.compressed, rng);
            Some((path, Format::Qcow2))
        }
        Base::Chain(depth) => {
            let mut below = (raw_base(dir, percent(80), rng), Format::Raw);
            for layer in 0..depth {
                let path = dir.join(format!("layer{layer}.qcow2"));
                let size = percent(70 + rng.below(60));
                qcow2_layer(&path, size, Some(&below), shape.compressed, rng);
                below = (path, Format::Qcow2);
            }
            Some(below)
        }
    }
}

fn raw_base(dir: &Path, size: u64, rng: &mut Rng) -> PathBuf {
    let path = dir.join("base.raw");
    fs::write(&path, random_disk(size, rng)).unwrap();
    path
}

/// A layer that is not the topmost, of a cluster size of its own.
fn qcow2_layer(path: &Path, size: u64, below: Option<&(PathBuf, Format)>, compressed: bool, rng: &mut Rng) {
    let cluster = 512 << rng.below(8);
    let options: &[&str] = if cluster >= 16384 && rng.one_in(2) { &["extended_l2=on"] } else { &[] };
    let shape = Shape { compressed, options, ..Shape::new(cluster) };
    create(path, &shape.create_options(path.parent().unwrap()), size, below);
    scribble(path, &shape, size, rng);
}

fn create(path: &Path, options: &str, size: u64, below: Option<&(PathBuf, Format)>) {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((base, format)) = below {
        // By its name alone: relative names are found beside the image. (Sharp edge 51.)
        args.extend(["-b", base.file_name().unwrap().to_str().unwrap(), "-F", format.name()]);
    }
    args.extend([text(path), &size]);
    qemu::img(&args);
}

/// Some of it zero; everywhere else each sector is like no other. Every other byte is the same, so that it can be compressed.
pub(super) fn random_disk(size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut disk = Vec::with_capacity(size as usize);
    while (disk.len() as u64) < size {
        let len = (512 * (1 + rng.below(300))).min(size - disk.len() as u64) as usize;
        if rng.one_in(3) {
            disk.resize(disk.len() + len, 0);
        } else {
            disk.extend(noise(len, rng));
        }
    }
    disk
}

pub(super) fn noise(len: usize, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let random = rng.next_u64().to_le_bytes();
        bytes.extend([random[0], 0x55, random[1], 0x55, random[2], 0x55, 0x55, 0x55]);
    }
    bytes.truncate(len);
    bytes
}

/// Random requests by qemu-io. What is written comes from a file of noise, so that a byte out of place shows.
pub(super) fn scribble(image: &Path, shape: &Shape, size: u64, rng: &mut Rng) {
    let pattern = image.with_extension(format!("{:x}", rng.next_u64()));
    fs::write(&pattern, noise(1 << 20, rng)).unwrap();
    let from = format!("-s {}", pattern.display());
    let mut commands = Vec::new();
    // QEMU compresses only into clusters that are not there yet, so these come first; a snapshot's second round has none.
    if shape.compressed && shape.base != Base::None && !shape.snapshot {
        let mut taken = BTreeSet::new();
        for _ in 0..20 {
            let cluster = rng.below(size / shape.cluster);
            if shape.cluster <= 1 << 20 && taken.insert(cluster) {
                commands.push(format!("write -q -c {from} {} {}", cluster * shape.cluster, shape.cluster));
            }
        }
    }
    for _ in 0..60 {
        let longest = if rng.one_in(3) { 1 << 20 } else { shape.cluster * 3 };
        let mut offset = 512 * rng.below(size / 512);
        if rng.one_in(3) {
            offset -= offset % shape.cluster;
        }
        let mut len = 512 * (1 + rng.below((longest / 512).min((size - offset) / 512)));
        if rng.one_in(3) {
            len = len.next_multiple_of(shape.cluster).min(size - offset);
        }
        commands.push(match rng.below(8) {
            0 => format!("write -q -z {offset} {len}"),
            1 => format!("write -q -z -u {offset} {len}"),
            2 => format!("discard -q {offset} {len}"),
            3 => "flush".into(),
            _ => format!("write -q {from} {offset} {len}"),
        });
    }
    qemu::io(image, &commands);
    fs::remove_file(&pattern).unwrap();
}
