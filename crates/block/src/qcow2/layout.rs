//! Where an image's metadata lies, as the image says when it is opened for writing: nothing else may lie there. (Sharp edge 43.)
//!
//! A damaged or hostile image may count a table's cluster as free, or name it as guest data. The allocator gives no such cluster
//! out, and no L2 slice that names one is believed. Metadata that is made later lies in clusters that were free.
//!
//! L2 tables are told from the rest: they come and go with what guests write, and a snapshot may name one that the disk no longer does.

use std::ops::Range;

/// The clusters that hold metadata: ranges in ascending order, none of which overlaps another.
#[derive(Debug, Default)]
pub(super) struct Layout {
    all: Vec<Range<u64>>,
    /// Those that no L2 table may take.
    fixed: Vec<Range<u64>>,
}

/// A structure, and the clusters that it takes.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) what: &'static str,
    pub(super) clusters: Range<u64>,
    /// Whether it is an L2 table.
    pub(super) l2: bool,
    /// Whether it may be named twice: an L2 table that is copied before it changes.
    pub(super) shared: bool,
}

/// Two structures claim this cluster.
#[derive(Debug)]
pub(super) struct Overlap {
    pub(super) cluster: u64,
    pub(super) structures: [&'static str; 2],
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
        let fixed = joined(parts.iter().filter(|part| !part.l2));
        Ok(Self { all: joined(parts.iter()), fixed })
    }

    /// Whether a cluster holds metadata other than L2 tables.
    pub(super) fn is_fixed(&self, cluster: u64) -> bool {
        first_in(&self.fixed, &(cluster..cluster + 1)).is_some()
    }

    /// The first cluster of a range that holds metadata.
    pub(super) fn first_in(&self, clusters: &Range<u64>) -> Option<u64> {
        first_in(&self.all, clusters)
    }

    /// Whether a cluster holds metadata.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.first_in(&(cluster..cluster + 1)).is_some()
    }
}

/// The ranges of parts that are in ascending order.
fn joined<'a>(parts: impl Iterator<Item = &'a Part>) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match ranges.last_mut() {
            Some(last) if last.end >= part.clusters.start => last.end = last.end.max(part.clusters.end),
            _ => ranges.push(part.clusters.clone()),
        }
    }
    ranges
}

fn first_in(ranges: &[Range<u64>], clusters: &Range<u64>) -> Option<u64> {
    let at = ranges.partition_point(|range| range.end <= clusters.start);
    ranges.get(at).filter(|range| range.start < clusters.end).map(|range| range.start.max(clusters.start))
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
