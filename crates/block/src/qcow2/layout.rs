//! Where an image's metadata lies, as the image says when it is opened for writing: nothing else may lie there. (Sharp edge 43.)
//!
//! A damaged or hostile image may count a table's cluster as free, or name it as guest data. The allocator gives no such cluster
//! out, and no L2 slice that names one is believed. Metadata that is made later lies in clusters that were free.
//!
//! L2 tables are told from the rest: they come and go with what guests write, and a snapshot may name one that the disk no longer does.

use std::fmt;
use std::ops::Range;

/// The clusters that hold metadata: ranges in ascending order, none of which overlaps another.
#[derive(Debug, Default)]
pub(super) struct Layout {
    owned: Vec<(Range<u64>, Structure)>,
    /// L2 tables that only snapshots name, as far as they are known, in ascending order. Guest data that lies there harms the
    /// snapshot alone, and is served.
    inactive: Vec<u64>,
}

/// A sort of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Structure {
    Header,
    L1Table,
    L2Table,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    SnapshotL1Table,
    EncryptionHeader,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::L1Table => "L1 table",
            Self::L2Table => "L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::SnapshotL1Table => "snapshot's L1 table",
            Self::EncryptionHeader => "encryption header",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap's data",
        })
    }
}

/// A structure, and the clusters that it takes.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) what: Structure,
    pub(super) clusters: Range<u64>,
    /// Whether it may be named twice: an L2 table that is copied before it changes.
    pub(super) shared: bool,
}

/// Two structures claim this cluster.
#[derive(Debug)]
pub(super) struct Overlap {
    pub(super) cluster: u64,
    pub(super) structures: [Structure; 2],
}

impl Layout {
    /// The layout of these structures.
    ///
    /// # Errors
    /// Two of them overlap: the image is corrupt, and to write to it would destroy one of them.
    pub(super) fn new(mut parts: Vec<Part>) -> Result<Self, Overlap> {
        parts.retain(|part| !part.clusters.is_empty());
        parts.sort_unstable_by_key(|part| part.clusters.start);
        for (part, next) in parts.iter().zip(parts.iter().skip(1)) {
            let same = part.shared && next.shared && part.clusters == next.clusters;
            if part.clusters.end > next.clusters.start && !same {
                return Err(Overlap { cluster: next.clusters.start, structures: [part.what, next.what] });
            }
        }
        Ok(Self { owned: joined(&parts), inactive: Vec::new() })
    }

    /// The same, with the L2 tables (clusters in ascending order) that snapshots name. What lies on other metadata is none.
    pub(super) fn with_inactive(mut self, mut tables: Vec<u64>) -> Self {
        tables.retain(|&cluster| self.owner(cluster).is_none());
        self.inactive = tables;
        self
    }

    /// What lies in a cluster.
    pub(super) fn owner(&self, cluster: u64) -> Option<Structure> {
        let at = self.owned.partition_point(|(range, _)| range.end <= cluster);
        let owned = self.owned.get(at).filter(|(range, _)| range.start <= cluster);
        let inactive = || self.inactive.binary_search(&cluster).ok().map(|_| Structure::L2Table);
        owned.map(|(_, structure)| *structure).or_else(inactive)
    }

    /// Whether a cluster holds metadata other than L2 tables.
    pub(super) fn is_fixed(&self, cluster: u64) -> bool {
        self.owner(cluster).is_some_and(|structure| structure != Structure::L2Table)
    }

    /// The first cluster of a range that holds metadata which the disk needs.
    pub(super) fn first_in(&self, clusters: &Range<u64>) -> Option<u64> {
        let at = self.owned.partition_point(|(range, _)| range.end <= clusters.start);
        let found = self.owned.get(at).filter(|(range, _)| range.start < clusters.end);
        found.map(|(range, _)| range.start.max(clusters.start))
    }

    /// Whether a cluster holds metadata.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.owner(cluster).is_some()
    }
}

/// The clusters of parts that are in ascending order.
fn joined(parts: &[Part]) -> Vec<(Range<u64>, Structure)> {
    let mut ranges: Vec<(Range<u64>, Structure)> = Vec::new();
    for part in parts {
        match ranges.last_mut() {
            Some((last, what)) if *what == part.what && last.end >= part.clusters.start => {
                last.end = last.end.max(part.clusters.end);
            }
            _ => ranges.push((part.clusters.clone(), part.what)),
        }
    }
    ranges
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
