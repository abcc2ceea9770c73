//! What of an image is in use, and freeing what is not: for who takes over from a process that died.

use std::collections::BTreeSet;

use cowhand_qcow2::{L2Kind, refcount};

use super::compare::Pass;
use super::report::Repair;
use super::walk::{BEYOND, Walked};
use super::{Checker, Dirty, Stage, number};
use crate::error::Result;

/// What refers to which cluster.
pub(in crate::qcow2) struct Survey {
    walked: Walked,
    /// One past the last cluster of the file.
    pub(in crate::qcow2) end: u64,
    /// Something is damaged, so that not all that is in use may be known.
    pub(in crate::qcow2) hides: bool,
    /// A cluster has more references than are counted.
    pub(in crate::qcow2) miscounted: bool,
}

impl Survey {
    /// How often a cluster is referred to, by whatever.
    pub(in crate::qcow2) fn references(&self, cluster: u64) -> u64 {
        self.walked.refs.count(cluster)
    }

    /// Whether nothing refers to any of these clusters.
    pub(in crate::qcow2) fn is_free(&self, clusters: std::ops::Range<u64>) -> bool {
        self.walked.refs.is_free(clusters)
    }
}

impl Checker {
    /// Counts all references, and holds them against the image's own counts. Nothing is written.
    pub(in crate::qcow2) async fn survey(&mut self) -> Result<Survey> {
        self.out.start(Stage::Silent);
        let mut walked = self.walk(true).await?;
        let before = self.out.corruptions;
        let counts = self.refcounts(&mut walked, Pass::Report).await?;
        let miscounted = self.out.corruptions > before || counts.uncovered || counts.missed;
        let hides = !walked.hides_nothing() || !walked.stored.sound;
        Ok(Survey { walked, end: self.end, hides, miscounted })
    }

    /// One of the `wanted` clusters that something else than compressed data refers to, if there is one.
    pub(in crate::qcow2) async fn not_packed(
        &mut self,
        survey: &Survey,
        wanted: &BTreeSet<u64>,
    ) -> Result<Option<u64>> {
        let refs = &survey.walked.refs;
        if let Some(&other) = wanted.iter().find(|&&cluster| refs.overlap(cluster).is_some() || !refs.is_data(cluster))
        {
            return Ok(Some(other));
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        let mut from = 0;
        while let Some(table) = refs.next_l2(from).filter(|&table| table < survey.end) {
            from = table + 1;
            let bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            for entry in bytes.chunks_exact(self.geometry.l2_entry_size() as usize) {
                let kind = cowhand_qcow2::L2Entry::from_raw(number(entry, 0)).decode(&self.geometry);
                if let Ok(L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. }) = kind
                    && wanted.contains(&self.cluster_of(host))
                {
                    return Ok(Some(self.cluster_of(host)));
                }
            }
        }
        Ok(None)
    }

    /// Frees what is counted and nothing refers to, and sets the flags that say so, as far as nothing damaged stands in the way.
    pub(in crate::qcow2) async fn free_leaks(&mut self) -> Result<()> {
        let (report, walked, counts) = self.look(Stage::Silent).await?;
        if report.leaks > 0 {
            tracing::info!("{}: {} clusters have leaked, and are freed", self.path.display(), report.leaks);
        }
        if walked.hides_nothing() && walked.stored.sound {
            self.free_beyond(&walked).await?;
        }
        if report.leaks > 0 || report.corruptions > 0 {
            self.repair(Repair::Leaks, walked, counts).await?;
        }
        Ok(())
    }

    /// Takes off the counts of clusters past the end of the file that nothing refers to: they were given out and never written. Once the
    /// file has grown over them they would be leaks.
    async fn free_beyond(&mut self, walked: &Walked) -> Result<()> {
        let (order, per_block) = (self.geometry.refcount_order, self.geometry.refcount_block_entries());
        let mut next = self.end / per_block;
        while let Some(index) = walked.stored.next(next) {
            next = index + 1;
            let Some(place) = walked.stored.block(index) else { continue };
            let first = index.saturating_mul(per_block);
            let mut block = self.read("a refcount block", place, self.cluster_size()).await?;
            let mut dirty = Dirty::clean();
            for entry in self.end.saturating_sub(first)..per_block {
                let cluster = first.saturating_add(entry);
                let counted = refcount::get(order, &block, entry as usize).is_ok_and(|count| count > 0);
                // What is farther away is not remembered.
                if counted && cluster < self.end.saturating_add(BEYOND) && walked.beyond.count(cluster) == 0 {
                    refcount::set(order, &mut block, entry as usize, 0).map_err(|e| self.counted_error(place, &e))?;
                    dirty.touch(((entry << order) / 8) as usize);
                }
            }
            if let Some(range) = dirty.range(block.len()) {
                let start = range.start as u64;
                self.write("a refcount block", place + start, block.get(range).unwrap_or_default()).await?;
            }
        }
        Ok(())
    }
}
