//! All refcounts anew, where the image's own structures are gone, damaged, or share their place with something else.
//!
//! New blocks and a new table are laid behind everything that is in use, flushed, and named by one write of the header. Until then the image
//! is what it was.

use cowhand_qcow2::{HostOffset, RefTableEntry, limits, refcount};

use super::Checker;
use super::refs::Class;
use super::walk::{Stored, Walked};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer};

/// Where the new structures lie.
struct Layout {
    /// The blocks' numbers, ascending.
    blocks: Vec<u64>,
    /// The cluster of the first block; the others follow it, then the table.
    first: u64,
    table_clusters: u64,
    /// All clusters taken.
    total: u64,
}

impl Checker {
    /// Writes refcounts for what is referred to, and the header that names them. No count becomes less than it is in `old`.
    /// `next` is where the search for room starts. Whether there was room.
    pub(super) async fn rebuild(&mut self, w: &mut Walked, old: &Stored, next: u64) -> Result<bool> {
        let Some(layout) = self.lay_out(w, old, next) else { return Ok(false) };
        self.out.rebuilding();
        self.end = self.end.max(layout.first + layout.total);
        w.adopt_beyond(self.end);
        (layout.first..layout.first + layout.total).for_each(|cluster| w.refs.add(cluster, 1, Class::Refcounts));
        let mut table = Buffer::zeroed((layout.table_clusters << self.geometry.cluster_bits.bits()) as usize);
        for (place, &index) in (layout.first..).zip(&layout.blocks) {
            let block = self.new_block(w, old, index).await?;
            self.write("a refcount block", self.offset_of(place), &block).await?;
            let entry = RefTableEntry::new(HostOffset::new(self.offset_of(place)));
            let entry = entry.map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()).at_path(&self.path))?;
            super::set_number(&mut table, index as usize * 8, entry.raw());
        }
        let table_at = layout.first + layout.total - layout.table_clusters;
        self.write("the refcount table", self.offset_of(table_at), &table).await?;
        self.barrier(Barrier::NewRefTable).await?;
        self.header.refcount_table_offset = HostOffset::new(self.offset_of(table_at));
        self.header.refcount_table_clusters = layout.table_clusters as u32;
        self.write_header().await?;
        let (blocks, offset) = (layout.blocks.len(), self.offset_of(table_at));
        self.out.repaired(format!("refcounts written anew: {blocks} blocks, the table at offset {offset:#x}"));
        Ok(true)
    }

    /// The clusters of the image's own refcounts, ascending.
    pub(super) fn refcount_clusters(&self, stored: &Stored) -> Vec<u64> {
        let bits = self.geometry.cluster_bits;
        let table = bits.index_of(self.header.refcount_table_offset.get());
        let table = (table..self.end).take(self.header.refcount_table_clusters as usize);
        let blocks = stored.blocks.iter().filter(|&&place| place != 0).map(|&place| bits.index_of(place));
        let mut clusters: Vec<_> = table.chain(blocks).collect();
        clusters.sort_unstable();
        clusters.dedup();
        clusters
    }

    /// Finds a place for all blocks that are needed, those that count themselves included; none if there is no room.
    fn lay_out(&self, w: &Walked, old: &Stored, next: u64) -> Option<Layout> {
        let per_block = self.geometry.refcount_block_entries();
        let bits = self.geometry.cluster_bits;
        let mut base = Vec::new();
        while let Some(index) = self.next_block(w, old, base.last().map_or(0, |last| last + 1)) {
            base.push(index);
        }
        let (mut count, mut table_clusters) = (base.len() as u64, 1);
        loop {
            let total = count + table_clusters;
            let first = self.find_room(w, next, total)?;
            let own = first / per_block..(first + total - 1) / per_block + 1;
            let mut blocks = base.clone();
            blocks.extend(own.clone());
            blocks.sort_unstable();
            blocks.dedup();
            let entries = blocks.last().map_or(1, |last| last + 1);
            let needed = bits.clusters_for(entries.saturating_mul(8));
            if needed << bits.bits() > limits::REFCOUNT_TABLE_BYTES_MAX {
                return None;
            }
            if blocks.len() as u64 <= count && needed <= table_clusters {
                return Some(Layout { blocks, first, table_clusters, total });
            }
            count = count.max(blocks.len() as u64);
            table_clusters = table_clusters.max(needed);
        }
    }

    async fn new_block(&self, w: &Walked, old: &Stored, index: u64) -> Result<Buffer> {
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcount_block_entries();
        let corrupt = |e: cowhand_qcow2::FormatError| Error::new(ErrorKind::Corrupt, e.to_string()).at_path(&self.path);
        let mut block = match self.stored_block(old, index).await? {
            Some(block) => block,
            None => Buffer::zeroed(self.cluster_size() as usize),
        };
        let first = index * per_block;
        let end = first.saturating_add(per_block).min(self.end);
        let mut from = first;
        while let Some(cluster) = w.refs.next_used(from).filter(|&cluster| cluster < end) {
            from = cluster + 1;
            let entry = (cluster - first) as usize;
            let stored = refcount::get(order, &block, entry).map_err(corrupt)?;
            let count = w.refs.count(cluster).min(refcount::max(order));
            refcount::set(order, &mut block, entry, count.max(stored)).map_err(corrupt)?;
        }
        Ok(block)
    }
}
