//! Room for structures that take several clusters and must lie together: L1 tables and snapshot tables.
//!
//! Guest data takes whatever lies together ([`Image::allocate`]); a table needs all of it in one run. So a run of free clusters is
//! looked for first, and held: then the refcount blocks that it lacks are made elsewhere, and then it is counted. Only who is
//! alone with the image asks for a run.

use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::HostOffset;

use super::Image;
use super::commit::Until;
use super::refcounts::{Extent, Need};
use crate::error::Result;
use crate::queue::Queue;

/// Gives up a run's hold, whatever became of it.
struct Held<'a>(&'a Image);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.meta.lock().refcounts.hold(0..0);
    }
}

impl Image {
    /// Gives out `clusters` (at least 1) that lie together, each with one reference, not yet durable.
    pub(super) async fn allocate_run(&self, queue: &Rc<Queue>, clusters: u64) -> Result<Extent> {
        let run = self.find_run(queue, clusters).await?;
        let _held = Held(self);
        self.make_blocks(queue, &run).await?;
        let mut counted = run.start..run.start;
        let result = self.count_run(queue, &run, &mut counted.end).await;
        if let Err(e) = result {
            self.meta.lock().dropped.push(counted);
            return Err(e);
        }
        let host = HostOffset::new(run.start << self.geometry.cluster_bits.bits());
        Ok(Extent { host, clusters, zeroed: false })
    }

    /// Finds a run of free clusters, and holds it.
    async fn find_run(&self, queue: &Rc<Queue>, clusters: u64) -> Result<Range<u64>> {
        let first = self.meta.lock().refcounts.hint();
        let mut run = first..first;
        loop {
            let need = {
                let mut meta = self.meta.lock();
                loop {
                    if run.end - run.start >= clusters {
                        meta.refcounts.hold(run.clone());
                        return Ok(run);
                    }
                    match meta.refcounts.is_free(run.end) {
                        Ok(true) if run.end < meta.refcounts.limit() => run.end += 1,
                        Ok(true) => break Need::Space,
                        Ok(false) => run = run.end + 1..run.end + 1,
                        Err(need) => break need,
                    }
                }
            };
            self.satisfy_alone(queue, need).await?;
        }
    }

    /// Sees to it that there is a refcount block for each cluster of the run.
    pub(super) async fn make_blocks(&self, queue: &Rc<Queue>, run: &Range<u64>) -> Result<()> {
        let per_block = self.geometry.refcount_block_entries();
        for index in run.start / per_block..=(run.end - 1) / per_block {
            while !self.meta.lock().refcounts.has_block(index) {
                let table_len = self.meta.lock().refcounts.table().1.len() as u64;
                if index >= table_len {
                    self.satisfy_alone(queue, Need::Table(index)).await?;
                    continue;
                }
                let place = self.allocate(queue, 1).await?;
                let mut meta = self.meta.lock();
                let now = meta.tick();
                // To count that very place a block may just have been made.
                if meta.refcounts.has_block(index) {
                    drop(meta);
                    self.give_back(place);
                } else {
                    meta.refcounts.add_block(index, place.host, now).map_err(|e| self.format_error(&e))?;
                }
            }
        }
        Ok(())
    }

    async fn count_run(&self, queue: &Rc<Queue>, run: &Range<u64>, counted: &mut u64) -> Result<()> {
        while *counted < run.end {
            let need = {
                let mut meta = self.meta.lock();
                let now = meta.tick();
                loop {
                    if *counted == run.end {
                        return Ok(());
                    }
                    match meta.refcounts.take(*counted, now) {
                        Ok(()) => *counted += 1,
                        Err(need) => break need,
                    }
                }
            };
            self.satisfy_alone(queue, need).await?;
        }
        Ok(())
    }

    /// Does the I/O that an operation on the refcounts asked for, and writes changed blocks when there are too many.
    pub(super) async fn satisfy_alone(&self, queue: &Rc<Queue>, need: Need) -> Result<()> {
        let crowded = self.meta.lock().refcounts.crowded();
        if crowded {
            self.commit(queue, Until::Mapping).await?;
        }
        self.satisfy(queue, need).await
    }
}

#[cfg(test)]
#[path = "run_test.rs"]
mod tests;
