//! Refcounts of another width.
//!
//! New blocks and a new table are laid where nothing is in use, in a run of clusters that the old ones count; they have the old counts, and
//! their own. When they are durable one switch of the header names them and says their width, and then the old ones are freed. So a
//! power cut leaves the one or the other, and at worst clusters that leak.
//!
//! Alone with the image, on the file, which is then read again; see [`super::snapshot`].

use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::{HostOffset, RefTableEntry, limits, refcount};

use super::Image;
use super::layout::Structure;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer};
use crate::queue::Queue;

/// How often room for the new structures is looked for: to count what it takes may take more.
const TRIES: usize = 8;

/// What the counts that are there come to at another width.
struct Needed {
    /// The new blocks, by index.
    blocks: BTreeSet<u64>,
    table_clusters: u64,
}

impl Needed {
    fn total(&self) -> u64 {
        self.blocks.len() as u64 + self.table_clusters
    }
}

impl Image {
    /// Makes refcounts 2^`order` bits wide. `progress` is told how many blocks are done, and of how many.
    ///
    /// # Errors
    /// A count does not fit; the new structures would be too large; no space; the host's.
    pub(crate) async fn set_refcount_order(
        &self,
        queue: &Rc<Queue>,
        order: u32,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        self.check_writable()?;
        if order == self.geometry.refcount_order {
            return Ok(());
        }
        let (run, needed) = self.room_for_counts(queue, order).await?;
        let (old_table, old_blocks) = {
            let meta = self.meta.lock();
            let (place, table) = meta.refcounts.table();
            (place, table.to_vec())
        };
        // What is not needed of the run is free by the new counts.
        let used = run.start..run.start + needed.total();
        let bits = self.geometry.cluster_bits;
        let mut table = Buffer::zeroed((needed.table_clusters << bits.bits()) as usize);
        let per_block = (bits.size() * 8) >> order;
        for (done, (place, &index)) in (run.start..).zip(&needed.blocks).enumerate() {
            progress(done as u64, needed.blocks.len() as u64);
            let mut block = Buffer::zeroed(bits.size() as usize);
            let first = index * per_block;
            let mut at = first;
            while at < first + per_block {
                // As much as one old block counts.
                let counts = self.stored_counts(queue, at, first + per_block).await?;
                for (cluster, count) in (at..).zip(&counts) {
                    let spare = run.contains(&cluster) && !used.contains(&cluster);
                    let set =
                        refcount::set(order, &mut block, (cluster - first) as usize, if spare { 0 } else { *count });
                    set.map_err(|e| self.format_error(&e))?;
                }
                at += counts.len() as u64;
            }
            let place = HostOffset::new(place << bits.bits());
            self.write_as(queue, Structure::RefcountBlock, place, &block).await?;
            let entry = RefTableEntry::new(place).map_err(|e| self.format_error(&e))?;
            if let Some(slot) = table.get_mut(index as usize * 8..index as usize * 8 + 8) {
                slot.copy_from_slice(&entry.raw().to_be_bytes());
            }
        }
        let table_place = HostOffset::new((used.end - needed.table_clusters) << bits.bits());
        self.write_as(queue, Structure::RefcountTable, table_place, &table).await?;
        self.barrier(queue, Barrier::NewRefTable).await?;
        self.replace_header(queue, |header| {
            header.refcount_order = order;
            header.refcount_table_offset = table_place;
            // At most 8 MiB.
            header.refcount_table_clusters = needed.table_clusters as u32;
        })
        .await?;
        let freed = async {
            let image = self.reload(queue).await?;
            for entry in &old_blocks {
                if let Some(block) = entry.offset(&self.geometry).map_err(|e| self.format_error(&e))? {
                    image.drop_structure(queue, block, 1).await?;
                }
            }
            image.drop_structure(queue, old_table, old_blocks.len() as u64 * 8).await?;
            image.finish(queue).await
        };
        let freed: Result<()> = freed.await;
        self.warn_of_leak(freed);
        Ok(())
    }

    /// Why refcounts cannot be so wide.
    pub(crate) async fn check_refcount_order(&self, queue: &Rc<Queue>, order: u32) -> Result<()> {
        self.check_writable()?;
        self.needed_at(queue, order).await.map(drop)
    }

    /// A run of clusters for the new structures, counted by the old ones, and what belongs into it. All counts are in the file.
    async fn room_for_counts(&self, queue: &Rc<Queue>, order: u32) -> Result<(Range<u64>, Needed)> {
        let bits = self.geometry.cluster_bits;
        let mut needed = self.needed_at(queue, order).await?;
        for _ in 0..TRIES {
            let per_block = (bits.size() * 8) >> order;
            // The run and what counts it may each touch blocks that were not needed yet.
            let wanted = needed.total() + needed.total() / per_block + 8;
            let extent = self.allocate_run(queue, wanted).await?;
            // All that is dirty now is the counts; nothing may be left to be written over what is freed later.
            self.finish(queue).await?;
            needed = self.needed_at(queue, order).await?;
            if needed.total() <= wanted {
                let first = bits.index_of(extent.host.get());
                return Ok((first..first + wanted, needed));
            }
            self.drop_structure(queue, extent.host, wanted << bits.bits()).await?;
            self.finish(queue).await?;
        }
        let message = "no room was found for refcounts of another width";
        Err(Error::new(ErrorKind::NoSpace, message).at_path(&self.path))
    }

    /// What the counts in the file come to at another width.
    async fn needed_at(&self, queue: &Rc<Queue>, order: u32) -> Result<Needed> {
        let bits = self.geometry.cluster_bits;
        let per_block = (bits.size() * 8) >> order;
        let per_old = self.geometry.refcount_block_entries();
        let entries = self.meta.lock().refcounts.table().1.len() as u64;
        let mut blocks = BTreeSet::new();
        for index in 0..entries {
            let first = index * per_old;
            if !self.counts_any(index) {
                continue;
            }
            for (cluster, count) in (first..).zip(self.stored_counts(queue, first, first + per_old).await?) {
                if count > refcount::max(order) {
                    let message = format!(
                        "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of {count}",
                        1 << order,
                        cluster << bits.bits()
                    );
                    return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path));
                }
                if count > 0 {
                    blocks.insert(cluster / per_block);
                }
            }
        }
        let len = blocks.last().map_or(1, |last| last + 1).saturating_mul(8);
        if len > limits::REFCOUNT_TABLE_BYTES_MAX {
            let message = "the refcounts of so large an image would not fit; take narrower ones";
            return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path));
        }
        Ok(Needed { blocks, table_clusters: bits.clusters_for(len) })
    }

    /// Whether there is a block of that index.
    fn counts_any(&self, index: u64) -> bool {
        self.meta.lock().refcounts.has_block(index)
    }

    /// The counts in the file from cluster `from` on, before `end`, as far as one block has them.
    async fn stored_counts(&self, queue: &Rc<Queue>, from: u64, end: u64) -> Result<Vec<u64>> {
        let per_block = self.geometry.refcount_block_entries();
        let index = from / per_block;
        let end = end.min((index + 1) * per_block);
        let entry = usize::try_from(index).ok().and_then(|i| self.meta.lock().refcounts.table().1.get(i).copied());
        let place = entry.unwrap_or_default().offset(&self.geometry).map_err(|e| self.format_error(&e))?;
        let Some(place) = place else { return Ok(vec![0; (end - from) as usize]) };
        let read = queue.read_buffer(&self.file, place.get(), self.cluster_size() as usize).await;
        let bytes = read.map_err(|e| self.io_error("cannot read a refcount block", place.get(), e))?;
        let order = self.geometry.refcount_order;
        let counts = (from..end).map(|cluster| refcount::get(order, &bytes, (cluster % per_block) as usize));
        counts.collect::<std::result::Result<_, _>>().map_err(|e| self.format_error(&e))
    }
}
