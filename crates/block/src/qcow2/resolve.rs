//! What lies below: for the topmost image of a chain, each slice that comes into the cache is completed with the places of what the
//! layers below have, so that a read through a deep chain costs what a read of one image costs.
//!
//! Layers below an open image do not change. Their own slices are not kept for this: their tables are read once, slice by slice.
//! What is not in one piece in a lower layer (compressed; smaller clusters in several places; partly past the layer's end) is left for that layer to
//! be asked, each time.

use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::{GuestOffset, HostOffset, L2Kind, Subcluster};

use super::Image;
use super::entry::{Below, LAYERS_MAX, Stored};
use super::load::stored_entries;
use super::slices::Slice;
use crate::error::Result;
use crate::io::Role;
use crate::node::Node;
use crate::queue::Queue;

/// The most entries of a layer that are looked at for one slice above: a layer whose clusters are so much smaller is asked each time.
const LAYER_ENTRIES_MAX: u64 = 16 << 10;

/// What one layer has of a cluster of the topmost one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Nothing; the layers below it may.
    Absent,
    /// Zeros.
    Zero,
    /// All of it, from this place of the file on.
    At(u64),
    /// Something that has to be asked for.
    Ask,
}

impl Part {
    /// What two stretches are together, the second `distance` bytes after the first.
    fn and(self, next: Self, distance: u64) -> Self {
        match (self, next) {
            (Self::At(a), Self::At(b)) if a + distance == b => self,
            (Self::Absent, Self::Absent) | (Self::Zero, Self::Zero) => self,
            _ => Self::Ask,
        }
    }
}

impl Image {
    /// The layer below with that number (1 is the backing file).
    pub(crate) fn layer(&self, number: u16) -> Option<&Node> {
        self.below.get(usize::from(number).checked_sub(1)?).map(|node| &**node)
    }

    /// Completes a slice's entries with what the layers below have.
    pub(super) async fn resolve(&self, queue: &Rc<Queue>, slice: Slice, entries: &mut [Stored]) -> Result<()> {
        let cluster = self.cluster_size();
        let start = slice.0 * entries.len() as u64 * cluster;
        let mut unknown: Vec<usize> = (0..entries.len()).filter(|&i| entries[i].is_unknown()).collect();
        for (node, number) in self.below.iter().take(LAYERS_MAX).zip(1u16..) {
            let (Some(first), Some(last)) = (unknown.first(), unknown.last()) else { return Ok(()) };
            let range = start + *first as u64 * cluster..start + (*last as u64 + 1) * cluster;
            let layer = LayerTables::read(queue, node, range).await?;
            unknown.retain(|&i| {
                let at = start + i as u64 * cluster;
                let below = match layer.part(at, cluster) {
                    Part::Absent => return true,
                    Part::Zero => Below::Nothing,
                    Part::At(place) => Below::At { layer: number, place },
                    Part::Ask => Below::Ask { layer: number },
                };
                entries[i] = Stored::below(below);
                false
            });
        }
        // Without layers there is nothing to know; with more than can be named, the rest is found on the way.
        if !self.below.is_empty() && self.below.len() <= LAYERS_MAX {
            unknown.into_iter().for_each(|i| entries[i] = Stored::below(Below::Nothing));
        }
        Ok(())
    }

    /// The entries of the clusters in the range, read from the file.
    async fn entries_from_file(&self, queue: &Rc<Queue>, clusters: Range<u64>) -> Result<Vec<Stored>> {
        let mut entries = vec![Stored::default(); (clusters.end - clusters.start) as usize];
        let per_table = self.geometry.l2_entries();
        let mut at = clusters.start;
        while at < clusters.end {
            let end = clusters.end.min((at / per_table + 1) * per_table);
            let l1 = self.l1_entry((at / per_table) as usize);
            let table = l1.offset(&self.geometry).map_err(|e| self.format_error(&e))?;
            if let Some(table) = table {
                let size = self.geometry.l2_entry_size();
                let place = table.get() + at % per_table * size;
                let read = queue.read_buffer(&self.file.of(Role::L2Tables), place, ((end - at) * size) as usize).await;
                let bytes = read.map_err(|e| self.io_error("cannot read an L2 table", place, e))?;
                let into = (at - clusters.start) as usize..(end - clusters.start) as usize;
                stored_entries(&bytes, &self.geometry, &mut entries[into]);
            }
            at = end;
        }
        Ok(entries)
    }

    /// What this layer has of `len` bytes at `offset`, all in the cluster whose entry is `stored`.
    fn part_in_cluster(&self, stored: Stored, offset: u64, len: u64) -> Part {
        let within = self.geometry.cluster_bits.offset_in(offset);
        // What breaks a rule is reported when it is asked for.
        let Ok((kind, Below::Unknown)) = stored.decode(&self.geometry) else { return Part::Ask };
        let at = |host: HostOffset| if self.is_plain() { Part::At(host.get() + within) } else { Part::Ask };
        if !self.geometry.extended_l2 {
            return match kind {
                L2Kind::Unallocated => Part::Absent,
                L2Kind::Zero { .. } => Part::Zero,
                L2Kind::Data { host, .. } => at(host),
                L2Kind::Compressed(_) => Part::Ask,
            };
        }
        let first = self.geometry.subcluster_index(GuestOffset::new(offset));
        let last = self.geometry.subcluster_index(GuestOffset::new(offset + len - 1));
        match (stored.bitmap.run(first as u32), kind) {
            (_, L2Kind::Compressed(_)) => Part::Ask,
            (Some((_, count)), _) if first + u64::from(count) <= last => Part::Ask,
            (Some((Subcluster::Unallocated, _)), _) => Part::Absent,
            (Some((Subcluster::Zero, _)), _) => Part::Zero,
            (Some((Subcluster::Allocated, _)), L2Kind::Data { host, .. }) => at(host),
            _ => Part::Ask,
        }
    }
}

/// The part of a layer's tables that covers a range of guest data.
enum LayerTables<'a> {
    Raw {
        size: u64,
    },
    Qcow2 {
        image: &'a Image,
        first: u64,
        entries: Vec<Stored>,
    },
    /// Too many entries.
    Unread {
        size: u64,
    },
}

impl<'a> LayerTables<'a> {
    async fn read(queue: &Rc<Queue>, node: &'a Node, range: Range<u64>) -> Result<Self> {
        let size = node.size();
        let Node::Qcow2(image) = node else { return Ok(Self::Raw { size }) };
        let end = range.end.min(size);
        if range.start >= end {
            return Ok(Self::Qcow2 { image, first: 0, entries: Vec::new() });
        }
        let clusters = image.clusters(range.start, end - range.start);
        if clusters.end - clusters.start > LAYER_ENTRIES_MAX {
            return Ok(Self::Unread { size });
        }
        let first = clusters.start;
        Ok(Self::Qcow2 { image, first, entries: image.entries_from_file(queue, clusters).await? })
    }

    /// What the layer has of the `len` bytes at `offset`.
    fn part(&self, offset: u64, len: u64) -> Part {
        let size = match self {
            Self::Raw { size } | Self::Unread { size } => *size,
            Self::Qcow2 { image, .. } => image.size(),
        };
        // Past its end a layer reads as zeros, whatever lies below it. (Sharp edge 20.)
        if offset >= size {
            return Part::Zero;
        }
        if offset + len > size {
            return Part::Ask;
        }
        match self {
            Self::Raw { .. } => Part::At(offset),
            Self::Unread { .. } => Part::Ask,
            Self::Qcow2 { image, first, entries } => {
                let clusters = image.clusters(offset, len);
                let parts = clusters.map(|cluster| {
                    let start = (cluster << image.geometry.cluster_bits.bits()).max(offset);
                    let end = ((cluster + 1) << image.geometry.cluster_bits.bits()).min(offset + len);
                    let stored = entries.get((cluster - first) as usize).copied();
                    (start, stored.map_or(Part::Ask, |stored| image.part_in_cluster(stored, start, end - start)))
                });
                let all = parts.reduce(|(start, part), (next_start, next)| (start, part.and(next, next_start - start)));
                all.map_or(Part::Ask, |(_, part)| part)
            }
        }
    }
}
