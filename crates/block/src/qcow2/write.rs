//! Writing guest data: in place where it may be, otherwise into new clusters that take the mapping's place when they are whole.

use std::rc::Rc;

use cowhand_qcow2::{HostOffset, Subcluster};

use super::Image;
use super::data::Spot;
use super::entry::Stored;
use super::mapping::{Kind, Run};
use super::refcounts::Extent;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffer, IoSeg, segs_len, split_segs, zero_segs};
use crate::mutation::Mutation;
use crate::queue::Queue;
use crate::sync::Arc;

/// The most bytes of clusters that one step of a write takes into the mapping.
const STEP_BYTES: u64 = 4 << 20;

impl Image {
    /// Writes `data` at `offset` (inside the virtual size).
    pub(crate) async fn write(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        self.check_writable()?;
        let len = segs_len(data);
        self.mark_dirty(offset, len);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let run = self.run(queue, at, len - done).await?;
            done += match run.kind {
                Kind::Data { host, copied: true } => {
                    let spot = Spot { guest: at, host: host.get() };
                    self.write_data(queue, spot, split_segs(data, done, run.len), Vec::new()).await?;
                    run.len
                }
                _ => self.write_new(queue, at, &split_segs(data, done, len - done)).await?,
            };
        }
        Ok(())
    }

    pub(super) fn check_writable(&self) -> Result<()> {
        if self.is_corrupt() {
            return Err(self.corrupt_error());
        }
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only").at_path(&self.path))
    }

    /// Writes the first part of `data` where there is no data yet; how many bytes that was (0: the mapping changed meanwhile; look
    /// again).
    async fn write_new(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let within = bits.offset_in(offset);
        let len = segs_len(data).min(STEP_BYTES.max(bits.size()) - within);
        // Never past the end of one L2 table: its clusters come into the mapping together.
        let len = len.min(self.geometry.l2_coverage() - offset % self.geometry.l2_coverage());
        let _writers = match Mutation::WritersUnlocked.is_on() {
            false => Some(self.ranges.lock(self.clusters(offset, len)).await),
            true => None,
        };
        let run = self.run_to_write(queue, offset, len).await?;
        if let Kind::Data { copied: true, .. } = run.kind {
            return Ok(0);
        }
        let run = Run { kind: run.kind, len: run.len.min(len) };
        self.own_table(queue, offset).await?;
        let clusters = self.clusters(offset, run.len);
        let clusters = clusters.end - clusters.start;
        let (extent, reused) = match run.kind {
            // Its own clusters, held ready: used again, but they may hold anything. (Sharp edge 17.)
            Kind::Zero { host: Some(host), copied: true } | Kind::Reserved { host, copied: true } => {
                let host = HostOffset::new(bits.align_down(host.get()));
                (Extent { host, clusters, zeroed: false }, true)
            }
            // Some of the cluster's subclusters may be in use: it is copied first, and then looked at again.
            Kind::Data { .. } | Kind::Zero { host: Some(_), .. } | Kind::Reserved { .. }
                if self.geometry.extended_l2 =>
            {
                return self.unshare(queue, offset - within).await.map(|()| 0);
            }
            _ => (self.allocate_data(queue, offset - within, clusters).await?, false),
        };
        let len = run.len.min((extent.clusters << bits.bits()) - within);
        let target = Target::new(self, offset, len, run.kind);
        if Mutation::MappingBeforeData.is_on() {
            self.publish_data(queue, offset - within, &target, extent).await.map_err(|e| e.1)?;
        }
        let written = self.fill_clusters(queue, &target, &split_segs(data, 0, len), extent).await;
        let published = match written {
            Ok(()) => self.publish_data(queue, offset - within, &target, extent).await,
            Err(e) => Err((0, e)),
        };
        published.map(|()| len).map_err(|(mapped, error)| {
            if !reused {
                // Only what is not in the mapping: the rest holds guest data now.
                self.give_back_data(extent.without_first(&self.geometry, mapped));
            }
            error
        })
    }

    /// On failure says how many clusters came into the mapping nevertheless.
    async fn publish_data(
        &self,
        queue: &Rc<Queue>,
        offset: u64,
        target: &Target,
        extent: Extent,
    ) -> std::result::Result<(), (u64, Error)> {
        let cluster = self.cluster_size();
        let change = |i: u64, old: Stored| {
            let new = Stored::data(HostOffset::new(extent.host.get() + i * cluster))?;
            if !self.geometry.extended_l2 || target.whole_clusters {
                return Ok(new);
            }
            let start = offset + i * cluster;
            let sub = self.geometry.subcluster_size();
            let first = target.start.saturating_sub(start) / sub;
            let last = (target.end.min(start + cluster) - start).div_ceil(sub);
            let bitmap = old.bitmap.with_range(first as u32, (last - first) as u32, Subcluster::Allocated);
            Ok(Stored { bitmap, ..new })
        };
        self.publish(queue, offset, extent.clusters, change).await.map_err(|e| (e.done, e.into()))
    }

    /// Writes `data` into the extent's clusters, and around it, up to whole units, what was there before.
    async fn fill_clusters(&self, queue: &Rc<Queue>, target: &Target, data: &[IoSeg], extent: Extent) -> Result<()> {
        let (head, tail) = (target.offset - target.start, target.end - target.data_end);
        let host = extent.host.get() + self.geometry.cluster_bits.offset_in(target.offset);
        let zero_head = self.reads_zero(queue, target.start, head).await?;
        let zero_tail =
            self.reads_zero(queue, target.data_end, tail.min(self.size.saturating_sub(target.data_end))).await?;
        let mut keep = Vec::new();
        let (spot, list) = if zero_head && zero_tail && extent.zeroed {
            // The clusters are zero already: only the data is to be written.
            (Spot { guest: target.offset, host }, data.to_vec())
        } else {
            let zero_head = zero_head || Mutation::HeadNotCopied.is_on();
            let zero_tail = zero_tail || Mutation::TailNotCopied.is_on();
            let mut list = self.around(queue, target.start, head, zero_head, &mut keep).await?;
            list.extend_from_slice(data);
            list.extend(self.around(queue, target.data_end, tail, zero_tail, &mut keep).await?);
            (Spot { guest: target.start, host: host - head }, list)
        };
        self.write_data(queue, spot, list, keep).await
    }

    /// Gives the cluster at `offset`, whose place others refer to as well, a place of its own, with those of its subclusters that hold
    /// data. The caller holds its range lock and owns its table.
    async fn unshare(&self, queue: &Rc<Queue>, offset: u64) -> Result<()> {
        let extent = self.allocate_data(queue, offset, 1).await?;
        let copied = self.copy_subclusters(queue, offset, extent.host).await;
        let published = match copied {
            Ok(()) => {
                let change = |_, old: Stored| Ok(Stored { bitmap: old.bitmap, ..Stored::data(extent.host)? });
                self.publish(queue, offset, 1, change).await.map_err(Error::from)
            }
            Err(e) => Err(e),
        };
        published.inspect_err(|_| self.give_back_data(extent))
    }

    async fn copy_subclusters(&self, queue: &Rc<Queue>, offset: u64, into: HostOffset) -> Result<()> {
        let mut at = offset;
        let end = offset + self.cluster_size();
        while at < end {
            let run = self.run_to_write(queue, at, end - at).await?;
            if let Kind::Data { host, .. } = run.kind {
                let buffer = Arc::new(Buffer::zeroed(run.len as usize));
                let segs = || vec![buffer.seg(0, buffer.len())];
                self.read_data(queue, Spot { guest: at, host: host.get() }, segs()).await?;
                let spot = Spot { guest: at, host: into.get() + (at - offset) };
                self.write_data(queue, spot, segs(), vec![buffer.clone()]).await?;
            }
            at += run.len;
        }
        Ok(())
    }

    /// What lies beside the data in its first or last cluster, to be written along.
    async fn around(
        &self,
        queue: &Rc<Queue>,
        offset: u64,
        len: u64,
        zero: bool,
        keep: &mut Vec<Arc<Buffer>>,
    ) -> Result<Vec<IoSeg>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        if zero {
            return Ok(zero_segs(len));
        }
        let buffer = Arc::new(Buffer::zeroed(len as usize));
        let segs = vec![buffer.seg(0, len as usize)];
        // A cluster's end may lie past the end of the disk, where there is nothing to read.
        let there = self.size.saturating_sub(offset).min(len);
        if there > 0 {
            Box::pin(self.read(queue, offset, &split_segs(&segs, 0, there))).await?;
        }
        keep.push(buffer);
        Ok(segs)
    }
}

/// What a write into new clusters covers. All offsets are the guest's.
struct Target {
    offset: u64,
    data_end: u64,
    /// The whole units (subclusters, or clusters) around the data.
    start: u64,
    end: u64,
    /// The unit is the cluster: afterwards all of it is data.
    whole_clusters: bool,
}

impl Target {
    fn new(image: &Image, offset: u64, len: u64, old: Kind) -> Self {
        // A compressed cluster has no subclusters: it becomes data as a whole.
        let whole_clusters = !image.geometry.extended_l2 || matches!(old, Kind::Compressed(_));
        let unit = if whole_clusters { image.cluster_size() } else { image.geometry.subcluster_size() };
        let data_end = offset + len;
        Self { offset, data_end, start: offset & !(unit - 1), end: data_end.next_multiple_of(unit), whole_clusters }
    }
}
