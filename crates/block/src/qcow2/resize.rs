//! An image of another size.
//!
//! *Growing*: an L1 table that is long enough takes the place of the old one; what the disk is to have in its new part, which is
//! zeros, is made sure of; then the header says the new size. The new part is not zero by itself where a longer backing file would
//! show through, where the old end lies within a cluster, and where tables hold entries past the old end. (Sharp edge 20.)
//!
//! *Shrinking*: the header says the new size, and that the L1 table is shorter; only then is freed what lies past the end. So a
//! power cut leaves the disk as it was, or smaller, and never with its old size and half of its data. Refcount blocks that counted
//! nothing else go with it ([`super::unused_blocks`]).
//!
//! Snapshots keep the size and the tables that they have. What the active L1 table holds past the disk (a VM state that came with
//! a snapshot) does not survive a change of the size: it would become part of the disk. (Sharp edge 36.)
//!
//! Alone with the image, on the file, which is then read again; see [`super::snapshot`].

use std::rc::Rc;

use cowhand_qcow2::{Header, HostOffset, L1Entry, limits};

use super::Image;
use super::create::Preallocation;
use super::entry::Stored;
use super::mapping::Kind;
use super::zero::Zeros;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, File};
use crate::mutation::Mutation;
use crate::queue::Queue;

impl Image {
    /// Why the image cannot be made `size` bytes large, as far as that can be told before.
    pub(crate) fn check_resize(&self, size: u64) -> Result<()> {
        self.check_resize_as(size, self.geometry.version)
    }

    /// The same for an image that will be of that version.
    pub(crate) fn check_resize_as(&self, size: u64, version: u32) -> Result<()> {
        self.check_writable()?;
        let refuse = |kind, message: String| Err(Error::new(kind, message).at_path(&self.path));
        if !size.is_multiple_of(512) {
            return refuse(ErrorKind::Invalid, "The new size must be a multiple of 512".to_string());
        }
        let most = limits::L1_TABLE_BYTES_MAX / 8;
        if self.geometry.l1_entries_for(size) > most {
            let max = self.geometry.l2_coverage().saturating_mul(most);
            let message = format!("with its cluster size the image can have {max} bytes at most");
            let brief = Some("Failed to grow the L1 table: File too large");
            return Err(Error::new(ErrorKind::Invalid, message).briefly(brief).at_path(&self.path));
        }
        // Its snapshots need not say how large the disk was. (Sharp edge 39.)
        if version < 3 && self.header.lock().header.snapshot_count > 0 {
            let message = "a version 2 image that has snapshots cannot change its size; convert it to version 3 \
                           ('qemu-img amend -o compat=1.1'), or delete the snapshots";
            let brief = Some("Can't resize a v2 image which has snapshots");
            return Err(Error::new(ErrorKind::Unsupported, message).briefly(brief).at_path(&self.path));
        }
        Ok(())
    }

    /// Makes the image `size` bytes large ([`check_resize`](Self::check_resize) has agreed).
    pub(crate) async fn resize(&self, queue: &Rc<Queue>, size: u64, preallocation: Preallocation) -> Result<()> {
        let work = async || {
            if size > self.size() {
                self.grow(queue, size, preallocation).await
            } else {
                self.shrink(queue, size).await
            }
        };
        self.with_bitmaps_held(queue, size, work).await
    }

    async fn grow(&self, queue: &Rc<Queue>, size: u64, preallocation: Preallocation) -> Result<()> {
        let header = self.header.lock().header.clone();
        let old_entries = header.l1_entries_needed() as usize;
        let entries = self.geometry.l1_entries_for(size) as usize;
        let mut l1 = self.read_l1(queue, header.l1_table_offset, header.l1_size).await?;
        // Bounded by the parsed header.
        let past = l1.split_off(old_entries.min(l1.len()));
        if entries > old_entries + past.len() || past.iter().any(|entry| entry.raw() != 0) {
            l1.resize(entries, L1Entry::UNALLOCATED);
            self.replace_l1(queue, &header, &l1).await?;
            let freed = self.drop_tree(queue, &past).await;
            self.warn_of_leak(freed);
            self.finish(queue).await?;
        }
        let grown = self.reload_as(queue, Some(size)).await?;
        grown.zero_new_part(queue, self.size()).await?;
        if preallocation == Preallocation::Falloc {
            // The host gives a place to what was written: so it lies with what is reserved next.
            grown.barrier(queue, Barrier::Data).await?;
        }
        grown.preallocate(queue, self.size(), preallocation).await?;
        grown.finish(queue).await?;
        grown.switch_header(queue, |header| header.size = size).await
    }

    /// Makes `l1` the active L1 table, at a place of its own, and frees the one that `header`, the present header, names. Its length is
    /// bounded.
    pub(super) async fn replace_l1(&self, queue: &Rc<Queue>, header: &Header, l1: &[L1Entry]) -> Result<()> {
        let place = self.write_new_l1(queue, l1).await?;
        self.settle(queue).await?;
        self.switch_header(queue, |header| {
            header.l1_table_offset = place;
            header.l1_size = l1.len() as u32;
        })
        .await?;
        let freed = self.drop_structure(queue, header.l1_table_offset, u64::from(header.l1_size) * 8).await;
        self.warn_of_leak(freed);
        Ok(())
    }

    /// Sees to it that an image that has grown from `old` bytes reads as zeros from there on.
    async fn zero_new_part(&self, queue: &Rc<Queue>, old: u64) -> Result<()> {
        if self.has_raw_data_file() {
            return self.map_new_part(queue, old).await;
        }
        let bits = self.geometry.cluster_bits;
        let backing_end = self.backing.as_ref().map_or(0, |backing| backing.size());
        // Both are bounded far below an overflow.
        let end = bits.align_up(old.max(backing_end)).unwrap_or(old);
        let zero_end = end.min(self.size);
        if zero_end > old {
            self.write_zeroes(queue, old, zero_end - old, Zeros { unmap: true, said: false }).await?;
        }
        self.unmap_from(queue, bits.align_up(zero_end).unwrap_or(zero_end)).await
    }

    /// The same where the data file is to read as the disk by itself: its new part is zeros, and every cluster is mapped to its place.
    /// (Sharp edge 41.)
    async fn map_new_part(&self, queue: &Rc<Queue>, old: u64) -> Result<()> {
        let file = self.data_file();
        // Cut at the old end first: there may be more in it.
        self.set_data_length(queue, file, old).await?;
        self.set_data_length(queue, file, self.size).await?;
        self.map_to_data_file(queue, self.geometry.cluster_bits.align_down(old), self.size).await
    }

    /// Maps the clusters of a range, as far as they are not, to their places in the data file.
    pub(super) async fn map_to_data_file(&self, queue: &Rc<Queue>, start: u64, stop: u64) -> Result<()> {
        let coverage = self.geometry.l2_coverage();
        let mut at = start;
        while at < stop {
            let end = stop.min((at / coverage + 1) * coverage);
            let clusters = self.clusters(at, end - at);
            let _writers = self.ranges.lock(clusters.clone()).await;
            self.own_table(queue, at).await?;
            let place = |i: u64| HostOffset::new(at + i * self.cluster_size());
            let change = |i, old: Stored| if old == Stored::default() { Stored::data(place(i)) } else { Ok(old) };
            self.publish(queue, at, clusters.end - clusters.start, change).await?;
            at = end;
        }
        Ok(())
    }

    pub(super) async fn set_data_length(&self, queue: &Rc<Queue>, file: &File, len: u64) -> Result<()> {
        let set = queue.set_length(file, len).await;
        set.map_err(|e| self.io_error("cannot change the data file's length", len, e))
    }

    async fn shrink(&self, queue: &Rc<Queue>, size: u64) -> Result<()> {
        let header = self.header.lock().header.clone();
        let entries = self.geometry.l1_entries_for(size);
        let mut l1 = self.read_l1(queue, header.l1_table_offset, header.l1_size).await?;
        let past = l1.split_off((entries as usize).min(l1.len()));
        if Mutation::ShrunkBeforeHeader.is_on() {
            self.drop_tree(queue, &past).await?;
        }
        self.switch_header(queue, |header| {
            header.size = size;
            header.l1_size = entries as u32;
            if entries == 0 {
                header.l1_table_offset = HostOffset::new(0);
            }
        })
        .await?;
        let freed = async {
            if !Mutation::ShrunkBeforeHeader.is_on() {
                self.drop_tree(queue, &past).await?;
            }
            let bits = self.geometry.cluster_bits;
            let first = bits.index_of(header.l1_table_offset.get());
            let (kept, all) = (bits.clusters_for(entries * 8), bits.clusters_for(u64::from(header.l1_size) * 8));
            self.drop_clusters(queue, first + kept..first + all).await?;
            self.finish(queue).await?;
            let shrunk = self.reload(queue).await?;
            shrunk.unmap_from(queue, bits.align_up(size).unwrap_or(size)).await?;
            shrunk.finish(queue).await?;
            shrunk.drop_unused_blocks(queue).await?;
            match &self.external {
                Some(external) if external.raw => self.set_data_length(queue, &external.file, size).await,
                _ => Ok(()),
            }
        };
        let freed: Result<()> = freed.await;
        self.warn_of_leak(freed);
        Ok(())
    }

    /// Takes out of the mapping what the L2 table that covers `from`, the start of a cluster, maps from there on.
    async fn unmap_from(&self, queue: &Rc<Queue>, from: u64) -> Result<()> {
        let coverage = self.geometry.l2_coverage();
        // At the start of a table there is nothing that an earlier part of the disk shares it with.
        if from.is_multiple_of(coverage) || self.l1_entry((from / coverage) as usize).raw() == 0 {
            return Ok(());
        }
        let end = (from / coverage + 1) * coverage;
        let _writers = self.ranges.lock(self.clusters(from, end - from)).await;
        let mut at = from;
        while at < end {
            let run = self.run_of_clusters(queue, at, end - at).await?;
            let count = run.len.div_ceil(self.cluster_size());
            if !matches!(run.kind, Kind::Unallocated(_)) {
                self.own_table(queue, at).await?;
                self.publish(queue, at, count, |_, _| Ok(Stored::default())).await?;
            }
            at += count * self.cluster_size();
        }
        Ok(())
    }
}
