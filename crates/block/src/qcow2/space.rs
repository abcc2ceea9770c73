//! Host clusters: given out, and taken back when nobody can use them any more.

use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::{FormatError, Header, HostOffset};

use super::layout::Structure;
use super::refcounts::{Extent, Need, Refcounts};
use super::{CLUSTERS_AT_ONCE, Image};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Barrier;
use crate::mutation::Mutation;
use crate::queue::Queue;

/// About how many bytes of clusters may wait for a commit.
const DROPPED_BYTES: u64 = 256 << 20;

impl Image {
    /// Gives out up to `wanted` clusters that lie together, each with one reference, not yet durable.
    pub(super) async fn allocate(&self, queue: &Rc<Queue>, wanted: u64) -> Result<Extent> {
        let extent = self.allocate_with(queue, |refcounts, now| refcounts.allocate(wanted, now)).await?;
        Ok(Extent { zeroed: extent.zeroed || Mutation::UsedTakenForZero.is_on(), ..extent })
    }

    /// Gives out what `allocate` takes from the refcounts at some moment, once they have what it needs.
    pub(super) async fn allocate_with<T>(
        &self,
        queue: &Rc<Queue>,
        allocate: impl Fn(&mut Refcounts, u64) -> std::result::Result<T, Need>,
    ) -> Result<T> {
        loop {
            let need = {
                let mut meta = self.meta.lock();
                let now = meta.tick();
                if meta.refcounts.crowded() || meta.dropped.len() > self.dropped_max() {
                    None
                } else {
                    match allocate(&mut meta.refcounts, now) {
                        Ok(given) => return Ok(given),
                        Err(need) => Some(need),
                    }
                }
            };
            match need {
                None => self.commit(queue, super::commit::Until::Mapping).await?,
                Some(need) => self.satisfy(queue, need).await?,
            }
        }
    }

    /// How many clusters may wait for the commit that lets them be used again. A guest that writes and discards and never flushes
    /// would make the file grow without end otherwise.
    fn dropped_max(&self) -> usize {
        (DROPPED_BYTES >> self.geometry.cluster_bits.bits()).clamp(64, 8192) as usize
    }

    /// Clusters that were given out but never came into the mapping are free again.
    pub(super) fn give_back(&self, extent: Extent) {
        let first = self.geometry.cluster_bits.index_of(extent.host.get());
        self.meta.lock().dropped.push(first..first + extent.clusters);
    }

    /// Does the I/O that an operation on the refcounts asked for.
    pub(super) async fn satisfy(&self, queue: &Rc<Queue>, need: Need) -> Result<()> {
        match need {
            Need::Block(index, place) => self.load_refblock(queue, index, place).await,
            Need::Table(index) => self.grow_refcount_table(queue, index).await,
            need => Err(self.need_error(&need)),
        }
    }

    async fn load_refblock(&self, queue: &Rc<Queue>, index: u64, place: HostOffset) -> Result<()> {
        let _loads = self.refblock_loads.lock().await;
        if self.meta.lock().refcounts.is_loaded(index) {
            return Ok(());
        }
        let read = queue.read_buffer(&self.file, place.get(), self.cluster_size() as usize).await;
        let bytes = read.map_err(|e| self.io_error("cannot read a refcount block", place.get(), e))?;
        self.meta.lock().refcounts.loaded(index, &bytes);
        Ok(())
    }

    /// A need that no I/O can meet.
    fn need_error(&self, need: &Need) -> Error {
        match need {
            Need::Block(..) | Need::Table(_) | Need::Space => {
                let message = "no space left: the file, or QCOW2's refcount table, cannot grow further";
                Error::new(ErrorKind::NoSpace, message).at_path(&self.path)
            }
            Need::Underflow(cluster) => {
                let offset = cluster << self.geometry.cluster_bits.bits();
                let message = "the image is damaged: a cluster in use has a refcount of 0; look at it with a check";
                Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(offset)
            }
            Need::Format(FormatError::RefcountOverflow { bits, max, .. }) => {
                let message = format!(
                    "a cluster has {max} references already, which is all that {bits}-bit refcounts can count; delete \
                     a snapshot, or convert the image with wider refcounts"
                );
                Error::new(ErrorKind::Invalid, message).at_path(&self.path)
            }
            Need::Format(error) => self.format_error(error),
        }
    }

    /// Builds a larger refcount table where it counts itself, and switches to it by one write of the header. (Sharp edge 29.)
    async fn grow_refcount_table(&self, queue: &Rc<Queue>, index: u64) -> Result<()> {
        // The new table copies the old one's entries, so all blocks that it names must be in the file.
        self.commit(queue, super::commit::Until::Mapping).await?;
        let _commit = self.commit_lock.lock().await;
        let grown = {
            let mut meta = self.meta.lock();
            if (meta.refcounts.table().1.len() as u64) > index {
                return Ok(());
            }
            if meta.refcounts.has_unnamed() {
                // Another queue made a block meanwhile: start again.
                return Ok(());
            }
            meta.refcounts.plan_growth(index).and_then(|growth| meta.refcounts.build_growth(&growth))
        };
        let grown = grown.map_err(|need| self.need_error(&need))?;
        let bits = self.geometry.cluster_bits;
        let table: Vec<u8> = grown.table.iter().flat_map(|e| e.raw().to_be_bytes()).collect();
        let clusters = bits.clusters_for(table.len() as u64);
        let name = |header: &mut Header| {
            header.refcount_table_offset = grown.offset;
            header.refcount_table_clusters = clusters as u32;
        };
        if Mutation::HeaderBeforeRefTable.is_on() {
            self.update_header(queue, name).await?;
        }
        for (_, place, bytes) in &grown.blocks {
            let place = HostOffset::new(place << bits.bits());
            self.write_as(queue, Structure::RefcountBlock, place, bytes).await?;
        }
        self.write_as(queue, Structure::RefcountTable, grown.offset, &table).await?;
        self.barrier(queue, Barrier::NewRefTable).await?;
        self.update_header(queue, name).await?;
        let old = self.meta.lock().refcounts.grown(grown);
        if Mutation::OldRefTableFreedEarly.is_on() {
            return self.free_references(queue, vec![old]).await;
        }
        // Not durable yet, but the next commit's first barrier makes it so: before any mapping shows a cluster that only the new table
        // counts, and before the old table's clusters are freed (which commits do after their barriers).
        let stamp = self.grace.stamp();
        self.meta.lock().retired.push((stamp, vec![old]));
        Ok(())
    }

    /// Takes off the references that the durable mapping has dropped and that no request in flight can still use; punches what
    /// has none left, and only then lets it be used again. The caller holds the commit lock.
    pub(super) async fn reclaim(&self, queue: &Rc<Queue>) -> Result<()> {
        let ready = {
            let mut meta = self.meta.lock();
            let over = |stamp| self.grace.passed(stamp) || Mutation::FreedUnderRequests.is_on();
            let (ready, waiting) = std::mem::take(&mut meta.retired).into_iter().partition(|r| over(r.0));
            meta.retired = waiting;
            let ready: Vec<(u64, Vec<Range<u64>>)> = ready;
            ready
        };
        self.free_references(queue, ready.into_iter().flat_map(|(_, ranges)| ranges)).await
    }

    /// Takes these references off; punches what has none left, and only then lets it be used again.
    async fn free_references(&self, queue: &Rc<Queue>, ranges: impl IntoIterator<Item = Range<u64>>) -> Result<()> {
        let (mut free, mut taken) = (Vec::new(), 0u64);
        for range in ranges {
            for cluster in range {
                if self.take_reference(queue, cluster).await? || Mutation::SharedPunched.is_on() {
                    free.push(cluster);
                }
                taken += 1;
                if taken % CLUSTERS_AT_ONCE == 0 {
                    queue.give_way().await;
                }
            }
        }
        self.free(queue, free).await;
        Ok(())
    }

    /// Punches clusters that have no reference left, and lets them be used again.
    pub(super) async fn free(&self, queue: &Rc<Queue>, mut free: Vec<u64>) {
        free.sort_unstable();
        for clusters in free.chunk_by(|a, b| a + 1 == *b) {
            let [first, ..] = clusters else { continue };
            let bits = self.geometry.cluster_bits;
            let (offset, len) = (first << bits.bits(), (clusters.len() as u64) << bits.bits());
            if Mutation::ReusedBeforePunch.is_on() {
                self.release(clusters);
            }
            if let Err(e) = queue.punch(&self.file, offset, len).await {
                // Space that is not given back is no loss of data; the clusters can be used again all the same.
                tracing::debug!("{}: cannot punch {offset:#x}+{len:#x}: {e}", self.path.display());
            }
            for part in clusters.chunks(CLUSTERS_AT_ONCE as usize) {
                self.release(part);
                if part.len() < clusters.len() {
                    queue.give_way().await;
                }
            }
        }
    }

    fn release(&self, clusters: &[u64]) {
        let mut meta = self.meta.lock();
        for &cluster in clusters {
            meta.owners.release(cluster);
            meta.refcounts.release(cluster);
        }
    }

    async fn take_reference(&self, queue: &Rc<Queue>, cluster: u64) -> Result<bool> {
        loop {
            let need = {
                let mut meta = self.meta.lock();
                let now = meta.tick();
                match meta.refcounts.unref(cluster, now) {
                    Ok(last) => return Ok(last),
                    Err(need) => need,
                }
            };
            // A reference that is there has a block: taking it off never makes one.
            match need {
                Need::Block(index, place) => self.load_refblock(queue, index, place).await?,
                need => return Err(self.need_error(&need)),
            }
        }
    }
}
