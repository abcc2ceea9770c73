//! Where an image's metadata lies, as the image says when it is opened for writing: nothing else may lie there. (Sharp edge 43.)
//!
//! A damaged or hostile image may count a table's cluster as free, or name it as guest data. The allocator gives no such cluster
//! out, and no L2 slice that names one is believed. Metadata that is made later lies in clusters that were free.

use std::ops::Range;

/// The clusters that hold metadata: ranges in ascending order, none of which overlaps another.
#[derive(Debug, Default)]
pub(super) struct Layout(Vec<Range<u64>>);

/// A structure, and the clusters that it takes.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) what: &'static str,
    pub(super) clusters: Range<u64>,
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
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for part in parts {
            match ranges.last_mut() {
                Some(last) if last.end >= part.clusters.start => last.end = last.end.max(part.clusters.end),
                _ => ranges.push(part.clusters),
            }
        }
        Ok(Self(ranges))
    }

    /// The first cluster of a range that holds metadata.
    pub(super) fn first_in(&self, clusters: &Range<u64>) -> Option<u64> {
        let at = self.0.partition_point(|range| range.end <= clusters.start);
        self.0.get(at).filter(|range| range.start < clusters.end).map(|range| range.start.max(clusters.start))
    }

    /// Whether a cluster holds metadata.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.first_in(&(cluster..cluster + 1)).is_some()
    }
}

#[cfg(test)]
#[path = "layout_test.rs"]
mod tests;
