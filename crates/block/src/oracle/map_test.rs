//! What the engine says a disk is made of, beside `qemu-img map`.

use std::path::Path;

use serde_json::Value;

use super::guest::policy;
use super::{matrix, qemu};
use crate::disk::Disk;
use crate::io::host::Engine;
use crate::spec::DiskSpec;
use crate::status::{Content, Extent};

/// A row of the map: start, length, depth, and whether it is present, zero, data, compressed; the place, where a layer has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    range: (u64, u64),
    depth: u64,
    flags: [bool; 4],
    place: Option<u64>,
}

impl Row {
    fn push(self, rows: &mut Vec<Self>) {
        if let Some(last) = rows.last_mut()
            && (last.depth, last.flags) == (self.depth, self.flags)
            && last.place.map(|place| place + last.range.1) == self.place
        {
            last.range.1 += self.range.1;
            return;
        }
        rows.push(self);
    }
}

fn qemus_map(path: &Path) -> Vec<Row> {
    let said = qemu::img(&["map", "-f", "qcow2", "--output=json", qemu::text(path)]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let mut rows = Vec::new();
    for entry in said.as_array().unwrap() {
        let number = |key: &str| entry[key].as_u64().unwrap();
        let mut flags = ["present", "zero", "data", "compressed"].map(|key| entry[key].as_bool().unwrap());
        // Where QEMU takes an image for preallocated it looks for holes of the host's in the data too.
        flags[1] &= !flags[2];
        // QEMU names places that belong to clusters of which this layer has nothing too.
        let place = entry.get("offset").filter(|_| flags[0]).map(|place| place.as_u64().unwrap());
        Row { range: (number("start"), number("length")), depth: number("depth"), flags, place }.push(&mut rows);
    }
    rows
}

fn row(extent: &Extent) -> Row {
    let content = extent.content;
    let zero = matches!(content, Content::Nothing | Content::Zero);
    Row {
        range: (extent.range.start, extent.range.end - extent.range.start),
        depth: extent.depth as u64,
        flags: [content != Content::Nothing, zero, !zero, content == Content::Compressed],
        place: extent.place.filter(|_| content != Content::Nothing),
    }
}

fn our_map(spec: &DiskSpec, engine: Engine) -> Vec<Row> {
    let disk = Disk::open(&DiskSpec { readonly: true, ..spec.clone() }, &policy(engine)).unwrap();
    let mut rows = Vec::new();
    disk.extents(0..disk.size()).unwrap().for_each(|extent| row(&extent.unwrap()).push(&mut rows));
    rows
}

#[test]
fn extents_are_what_qemu_img_map_says() {
    let shapes: Vec<_> = [
        matrix::version_2(),
        matrix::cluster_sizes(),
        matrix::backing_files(),
        matrix::zlib(),
        matrix::zstd(),
        matrix::snapshots(),
    ]
    .concat();
    matrix::each("map", &shapes, |made, _, spec, engine, _| {
        assert_eq!(our_map(spec, engine), qemus_map(&made.path), "left: ours, right: QEMU's");
    });
}

#[test]
fn extents_begin_and_end_where_they_were_asked_for() {
    let shapes = [super::image::Shape::new(65536)];
    matrix::each("part of a map", &shapes, |_, _, spec, engine, rng| {
        let disk = Disk::open(&DiskSpec { readonly: true, ..spec.clone() }, &policy(engine)).unwrap();
        for _ in 0..20 {
            let start = rng.below(disk.size() / 512) * 512;
            let end = start + 512 + rng.below(2 * disk.size() / 512) * 512;
            let extents: Vec<_> = disk.extents(start..end).unwrap().map(Result::unwrap).collect();
            assert_eq!(extents[0].range.start, start);
            assert!(extents.windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
            assert_eq!(extents.last().unwrap().range.end, end.min(disk.size()));
        }
        assert!(disk.extents(disk.size()..u64::MAX).unwrap().next().is_none());
    });
}
