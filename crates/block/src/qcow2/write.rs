//! Writing guest data: in place where it may be, otherwise into new clusters that take the mapping's place when they are whole.

use std::rc::Rc;

use cowhand_qcow2::{HostOffset, L2Entry};

use super::Image;
use super::mapping::{Kind, Run};
use super::refcounts::Extent;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffer, IoSeg, segs_len, split_segs, zero_segs};
use crate::queue::Queue;
use crate::sync::Arc;

/// The most bytes of clusters that one step of a write takes into the mapping.
const STEP_BYTES: u64 = 4 << 20;

impl Image {
    /// Writes `data` at `offset` (inside the virtual size).
    pub(crate) async fn write(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        self.check_writable()?;
        let len = segs_len(data);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let run = self.run(queue, at, len - done).await?;
            done += match run.kind {
                Kind::Data { host, copied: true } => {
                    let written =
                        queue.write(&self.file, host.get(), split_segs(data, done, run.len), Vec::new()).await;
                    written.map_err(|e| self.io_error("cannot write", host.get(), e))?;
                    run.len
                }
                _ => self.write_new(queue, at, &split_segs(data, done, len - done)).await?,
            };
        }
        Ok(())
    }

    pub(super) fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only").at_path(&self.path))
    }

    /// Writes the first part of `data` into new clusters; how many bytes that was (0: the mapping changed meanwhile; look again).
    async fn write_new(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let within = bits.offset_in(offset);
        let len = segs_len(data).min(STEP_BYTES.max(bits.size()) - within);
        // Never past the end of one L2 table: its clusters come into the mapping together.
        let len = len.min(self.geometry.l2_coverage() - offset % self.geometry.l2_coverage());
        let clusters = self.clusters(offset, len);
        let _writers = self.ranges.lock(clusters.clone()).await;
        let run = self.run(queue, offset, len).await?;
        if let Kind::Data { copied: true, .. } = run.kind {
            return Ok(0);
        }
        let run = Run { kind: run.kind, len: run.len.min(len) };
        self.own_table(queue, offset).await?;
        let (extent, reused) = match run.kind {
            // Its own clusters, held ready: used again, but they may hold anything. (Sharp edge 17.)
            Kind::Zero { host: Some(host), copied: true } => {
                let clusters = self.clusters(offset, run.len);
                let host = HostOffset::new(bits.align_down(host.get()));
                (Extent { host, clusters: clusters.end - clusters.start, zeroed: false }, true)
            }
            _ => {
                let clusters = self.clusters(offset, run.len);
                (self.allocate(queue, clusters.end - clusters.start).await?, false)
            }
        };
        let len = run.len.min((extent.clusters << bits.bits()) - within);
        let written = self.fill_clusters(queue, offset, &split_segs(data, 0, len), run.kind, extent).await;
        let published = match written {
            Ok(()) => self.publish_data(queue, offset - within, extent).await,
            Err(e) => Err((0, e)),
        };
        published.map(|()| len).map_err(|(mapped, error)| {
            if !reused {
                // Only what is not in the mapping: the rest holds guest data now.
                self.give_back(extent.without_first(&self.geometry, mapped));
            }
            error
        })
    }

    /// On failure says how many clusters came into the mapping nevertheless.
    async fn publish_data(
        &self,
        queue: &Rc<Queue>,
        offset: u64,
        extent: Extent,
    ) -> std::result::Result<(), (u64, Error)> {
        let place = |i: u64| HostOffset::new(extent.host.get() + i * self.cluster_size());
        let entries: std::result::Result<Vec<_>, _> =
            (0..extent.clusters).map(|i| L2Entry::data(place(i), true)).collect();
        let entries = entries.map_err(|e| (0, self.format_error(&e)))?;
        self.publish(queue, offset, &entries).await.map_err(|e| (e.done as u64, e.into()))
    }

    /// Writes `data` into the extent's clusters, around it what the clusters held before (`old`, from `offset` on).
    async fn fill_clusters(
        &self,
        queue: &Rc<Queue>,
        offset: u64,
        data: &[IoSeg],
        old: Kind,
        extent: Extent,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let head = bits.offset_in(offset);
        let end = offset + segs_len(data);
        let tail = bits.offset_in(end.wrapping_neg());
        let mut keep = Vec::new();
        let reads_zero = matches!(old, Kind::Zero { .. }) || (old == Kind::Unallocated && self.backing.is_none());
        let mut list = Vec::new();
        let mut place = extent.host.get();
        if reads_zero && extent.zeroed {
            // The clusters are zero already: only the data is to be written.
            place += head;
            list.extend_from_slice(data);
        } else {
            list.extend(self.around(queue, offset - head, head, reads_zero, &mut keep).await?);
            list.extend_from_slice(data);
            list.extend(self.around(queue, end, tail, reads_zero, &mut keep).await?);
        }
        let written = queue.write(&self.file, place, list, keep).await;
        written.map_err(|e| self.io_error("cannot write", place, e))
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
