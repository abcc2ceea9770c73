//! The sorts of images that QEMU makes and that are both read and written: each list stands for one of the format's features.

use super::dice;
use super::image::{Base, Made, Shape, make};
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::spec::{DiskSpec, Format};

/// Makes an image of each shape and tests it. Its disk has, as the dice fall, the usual metadata cache or the least there is, so that
/// every slice comes and goes; the engines take turns.
pub(super) fn each(name: &str, shapes: &[Shape], test: impl Fn(&Made, &Shape, &DiskSpec, Engine, &mut Rng)) {
    let mut rng = dice(name);
    let mut engines = [Engine::Auto, Engine::Threads].into_iter().cycle().skip(rng.below(2) as usize);
    for shape in shapes {
        let dir = tempfile::tempdir().unwrap();
        let made = make(dir.path(), shape, &mut rng);
        let metadata_cache = rng.one_in(2).then_some(1);
        let spec = DiskSpec { metadata_cache, ..DiskSpec::new(&made.path, Format::Qcow2) };
        let engine = engines.next().unwrap();
        println!("{shape:?} {engine:?} cache {metadata_cache:?}");
        test(&made, shape, &spec, engine, &mut rng);
    }
}

/// Version 2 does without feature bits and zero clusters.
pub(super) fn version_2() -> Vec<Shape> {
    let shape = |cluster, base| Shape { version: 2, base, ..Shape::new(cluster) };
    vec![
        shape(512, Base::None),
        shape(4096, Base::Raw(100)),
        shape(65536, Base::Qcow2(60)),
        shape(512, Base::Qcow2(110)),
        shape(2 << 20, Base::None),
        Shape { compressed: true, ..shape(65536, Base::None) },
        Shape { snapshot: true, ..shape(4096, Base::None) },
    ]
}

/// All there are.
pub(super) fn refcount_widths() -> Vec<Shape> {
    [1, 2, 4, 8, 16, 32, 64].map(|bits| Shape { refcount_bits: bits, ..Shape::new(4096) }).into()
}

/// From the least to the largest.
pub(super) fn cluster_sizes() -> Vec<Shape> {
    [512, 1024, 2048, 8192, 16384, 65536, 262_144, 1 << 20, 2 << 20].map(Shape::new).into()
}

/// Backing files shorter and longer than the overlay.
pub(super) fn backing_files() -> Vec<Shape> {
    let shapes = [
        (512, Base::Raw(55)),
        (65536, Base::Raw(130)),
        (4096, Base::Qcow2(35)),
        (65536, Base::Qcow2(150)),
        (2 << 20, Base::Raw(70)),
        (16384, Base::Chain(3)),
    ];
    shapes.map(|(cluster, base)| Shape { base, ..Shape::new(cluster) }).into()
}

/// Clusters that have a place before they have data.
pub(super) fn preallocated() -> Vec<Shape> {
    let options: [&[&str]; 3] = [&["preallocation=metadata"], &["preallocation=falloc"], &["preallocation=full"]];
    let mut shapes: Vec<_> = options.map(|options| Shape { options, ..Shape::new(65536) }).into();
    let small = Shape { options: options[0], ..Shape::new(512) };
    shapes.extend([small.clone(), Shape { empty: true, ..small }]);
    shapes
}

/// Compressed clusters, as version 3 has had them from the beginning.
pub(super) fn zlib() -> Vec<Shape> {
    let shape = |cluster, base| Shape { compressed: true, base, ..Shape::new(cluster) };
    vec![
        shape(512, Base::None),
        shape(4096, Base::Raw(90)),
        shape(65536, Base::None),
        shape(65536, Base::Chain(2)),
        shape(2 << 20, Base::None),
        Shape { refcount_bits: 1, ..shape(65536, Base::None) },
    ]
}

/// Compressed clusters of the other type.
pub(super) fn zstd() -> Vec<Shape> {
    let shapes = [
        (512, Base::None),
        (4096, Base::None),
        (65536, Base::Raw(120)),
        (65536, Base::Chain(2)),
        (65536, Base::None),
        (2 << 20, Base::None),
    ];
    let options = &["compression_type=zstd"];
    shapes.map(|(cluster, base)| Shape { compressed: true, base, options, ..Shape::new(cluster) }).into()
}

/// An internal snapshot that shares clusters and tables with the disk.
pub(super) fn snapshots() -> Vec<Shape> {
    let shape = |cluster, base| Shape { snapshot: true, base, ..Shape::new(cluster) };
    vec![
        shape(512, Base::None),
        shape(4096, Base::None),
        shape(65536, Base::Qcow2(90)),
        Shape { compressed: true, ..shape(65536, Base::None) },
        Shape { refcount_bits: 2, ..shape(512, Base::None) },
        Shape { refcount_bits: 2, ..shape(4096, Base::None) },
        Shape { version: 2, ..shape(16384, Base::None) },
    ]
}

/// Layers of relative names.
pub(super) fn chains() -> Vec<Shape> {
    let shapes = [(4096, 3), (65536, 6), (512, 2)];
    shapes.map(|(cluster, depth)| Shape { base: Base::Chain(depth), ..Shape::new(cluster) }).into()
}

/// Refcounts that need not be right after a crash.
pub(super) fn lazy_refcounts() -> Vec<Shape> {
    vec![Shape { options: &["lazy_refcounts=on"], ..Shape::new(65536) }]
}

/// Entries with subclusters.
pub(super) fn extended_l2() -> Vec<Shape> {
    let options: &[&str] = &["extended_l2=on"];
    let shape = |cluster, base| Shape { options, base, ..Shape::new(cluster) };
    vec![
        shape(16384, Base::None),
        shape(65536, Base::None),
        shape(2 << 20, Base::None),
        shape(16384, Base::Raw(60)),
        shape(65536, Base::Qcow2(130)),
        shape(2 << 20, Base::Qcow2(100)),
        shape(131_072, Base::Chain(3)),
        Shape { compressed: true, ..shape(65536, Base::None) },
        Shape { compressed: true, ..shape(16384, Base::Qcow2(100)) },
        Shape { snapshot: true, ..shape(16384, Base::None) },
        Shape { snapshot: true, ..shape(65536, Base::Raw(100)) },
        Shape { options: &["extended_l2=on", "preallocation=metadata"], ..shape(65536, Base::None) },
    ]
}

/// Data in a file of its own.
pub(super) fn data_files() -> Vec<Shape> {
    let shape = |cluster, base| Shape { data_file: true, base, ..Shape::new(cluster) };
    let with = |options, shape| Shape { options, ..shape };
    vec![
        shape(512, Base::None),
        shape(65536, Base::Raw(80)),
        with(&["extended_l2=on"], shape(16384, Base::None)),
        with(&["extended_l2=on"], shape(65536, Base::Qcow2(110))),
        with(&["data_file_raw=on"], shape(65536, Base::None)),
        with(&["data_file_raw=on"], shape(4096, Base::None)),
    ]
}

/// Every sort: each is read in `read_test`, and written in `write_test`.
pub(super) fn all_sorts() -> Vec<Shape> {
    [
        version_2(),
        refcount_widths(),
        cluster_sizes(),
        backing_files(),
        chains(),
        preallocated(),
        lazy_refcounts(),
        zlib(),
        zstd(),
        snapshots(),
        extended_l2(),
        data_files(),
    ]
    .concat()
}
