//! Space for the new part of a disk that grows, taken at once.
//!
//! Every whole cluster of the new part gets its place, as data that is zeros, so that later writes there change no metadata. What is data
//! already (zeros written over a longer backing file, where there is no zero flag) keeps its place. All of that is done while the
//! header still has the old size: a power cut leaves entries past the end of the disk, which the next growth drops.

use std::rc::Rc;

use cowhand_qcow2::HostOffset;

use super::Image;
use super::create::Preallocation;
use super::data::Spot;
use super::entry::Stored;
use super::mapping::Kind;
use super::refcounts::Extent;
use crate::error::{Error, Result};
use crate::io::zero_segs;
use crate::queue::Queue;

/// How many zeros are written at once.
const FILL_BYTES: u64 = 4 << 20;

impl Image {
    /// Takes the space of an image that has grown from `old` bytes, and reads as zeros from there on. Alone with the image.
    pub(super) async fn preallocate(&self, queue: &Rc<Queue>, old: u64, mode: Preallocation) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        // Both are bounded far below an overflow.
        let (start, end) = (bits.align_up(old).unwrap_or(old), bits.align_up(self.size).unwrap_or(self.size));
        if mode == Preallocation::Off || start >= end {
            return Ok(());
        }
        if self.external.is_some() {
            return self.preallocate_in_data_file(queue, start, end, mode).await;
        }
        let coverage = self.geometry.l2_coverage();
        let mut at = start;
        while at < end {
            let stop = end.min((at / coverage + 1) * coverage);
            let _writers = self.ranges.lock(self.clusters(at, stop - at)).await;
            let run = self.run_of_clusters(queue, at, stop - at).await?;
            let len = bits.align_up(run.len).unwrap_or(run.len);
            if matches!(run.kind, Kind::Unallocated(_) | Kind::Zero { host: None, .. }) {
                self.own_table(queue, at).await?;
                at += self.give_place(queue, at, len, mode).await?;
            } else {
                at += len;
            }
        }
        Ok(())
    }

    /// Gives a place to as many of the clusters in a range as can lie together: how many bytes that is.
    async fn give_place(&self, queue: &Rc<Queue>, offset: u64, len: u64, mode: Preallocation) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let extent = self.allocate_data(queue, offset, bits.clusters_for(len)).await?;
        let taken = self.take_space(queue, offset, extent, mode).await;
        taken.inspect_err(|_| self.give_back_data(extent))?;
        let place = |i: u64| HostOffset::new(extent.host.get() + (i << bits.bits()));
        let published = self.publish(queue, offset, extent.clusters, |i, _| Stored::data(place(i))).await;
        published.map_err(|e| {
            self.give_back_data(extent.without_first(&self.geometry, e.done));
            Error::from(e)
        })?;
        Ok(extent.clusters << bits.bits())
    }

    /// Sees to it that new clusters, at `offset` of the disk, are zeros and take space as asked for.
    async fn take_space(&self, queue: &Rc<Queue>, offset: u64, extent: Extent, mode: Preallocation) -> Result<()> {
        let (host, len) = (extent.host.get(), extent.clusters << self.geometry.cluster_bits.bits());
        let failed = |e| self.io_error("cannot take space", host, e);
        if !extent.zeroed || mode == Preallocation::Full {
            return self.fill_with_zeros(queue, Spot { guest: offset, host }, len).await;
        }
        if mode == Preallocation::Falloc {
            return queue.allocate(&self.file, host, len).await.map_err(failed);
        }
        // A check takes an entry that points past the end of the file for damage.
        if self.file.length().map_err(failed)? < host + len {
            queue.set_length(&self.file, host + len).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn fill_with_zeros(&self, queue: &Rc<Queue>, spot: Spot, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let n = (len - done).min(FILL_BYTES);
            let part = Spot { guest: spot.guest + done, host: spot.host + done };
            self.write_data(queue, part, zero_segs(n), Vec::new()).await?;
            done += n;
        }
        Ok(())
    }

    /// The same where data lies in a file of its own, each cluster where the disk has it. Behind the old end that file holds nothing
    /// of the disk's.
    async fn preallocate_in_data_file(
        &self,
        queue: &Rc<Queue>,
        start: u64,
        end: u64,
        mode: Preallocation,
    ) -> Result<()> {
        let (file, size) = (self.data_file(), self.size);
        if !self.has_raw_data_file() {
            self.set_data_length(queue, file, start).await?;
            self.set_data_length(queue, file, size).await?;
        }
        match mode {
            _ if start >= size => {}
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => {
                let taken = queue.allocate(file, start, size - start).await;
                taken.map_err(|e| self.io_error("cannot take space in the data file", start, e))?;
            }
            Preallocation::Full => {
                self.fill_with_zeros(queue, Spot { guest: start, host: start }, size - start).await?;
            }
        }
        self.map_to_data_file(queue, start, end).await
    }
}
