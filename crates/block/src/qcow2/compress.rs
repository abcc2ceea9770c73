//! Writing compressed clusters: whole ones, into a mapping that has nothing there yet, packed one behind another in the file.
//!
//! The pool that computes does the compressing, several clusters at once. What comes of it is written where it belongs, and only then
//! comes into the mapping, as all new data does. What does not get smaller is written as it is.
//!
//! QEMU's rules: nothing that has a place already is replaced; images with an external data file have no compressed clusters; those of
//! an encrypted image are not encrypted.

use std::rc::Rc;

use cowhand_qcow2::{CompressedRange, HostOffset};

use super::entry::Stored;
use super::mapping::Kind;
use super::{Image, codec};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffer, IoSeg, segs_len, split_segs};
use crate::join::join_some;
use crate::queue::Queue;
use crate::sync::Arc;

/// How many clusters of one request are under way at once.
const AT_ONCE: usize = 16;

impl Image {
    /// Writes `data` compressed at `offset`: whole clusters, the disk's last one as far as it reaches.
    pub(crate) async fn write_compressed(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        self.check_writable()?;
        let refuse = |kind, message| Err(Error::new(kind, message).at_path(&self.path));
        if self.external.is_some() {
            let message = "an image with an external data file has no compressed clusters";
            return refuse(ErrorKind::Unsupported, message);
        }
        let (bits, cluster, len) = (self.geometry.cluster_bits, self.cluster_size(), segs_len(data));
        if !bits.is_aligned(offset) || !(bits.is_aligned(len) || offset + len == self.size) {
            return refuse(ErrorKind::Invalid, "only whole clusters can be written compressed");
        }
        self.mark_dirty(offset, len);
        let one = |done: u64| {
            let part = split_segs(data, done, cluster);
            async move { self.write_compressed_cluster(queue, offset + done, part).await }
        };
        join_some((0..len).step_by(cluster as usize).map(one), AT_ONCE).await
    }

    /// Writes a cluster, or what of it is on the disk.
    async fn write_compressed_cluster(&self, queue: &Rc<Queue>, offset: u64, data: Vec<IoSeg>) -> Result<()> {
        let size = self.cluster_size() as usize;
        let compression = self.header.lock().header.compression;
        let encoded = {
            let _permit = queue.permit().await;
            // A copy: a guest may change its memory meanwhile. What lies past the end of the disk is zeros.
            let mut cluster = Buffer::zeroed(size);
            cluster.gather(0, &data);
            let work = move || codec::encode(compression, &cluster);
            let encoded = queue.compute(work).await;
            encoded.map_err(|e| Error::io("cannot compress", e).at_path(&self.path).at_offset(offset))?
        };
        // Without the permit: what follows waits for locks, whose holders may wait for permits.
        match encoded {
            Some((bytes, len)) => self.write_packed(queue, offset, Arc::new(bytes), len as u64, &data).await,
            None => self.write(queue, offset, &data).await,
        }
    }

    /// Gives a cluster its place, writes its `len` compressed bytes there, and takes it into the mapping.
    async fn write_packed(
        &self,
        queue: &Rc<Queue>,
        offset: u64,
        bytes: Arc<Buffer>,
        len: u64,
        data: &[IoSeg],
    ) -> Result<()> {
        let writers = self.ranges.lock(self.clusters(offset, 1)).await;
        let there = self.run_of_clusters(queue, offset, 1).await?.kind;
        if !matches!(there, Kind::Unallocated(_) | Kind::Zero { host: None, .. }) {
            let message = "a compressed write replaces nothing: there is something at this offset of the disk already";
            return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path).at_offset(offset));
        }
        self.own_table(queue, offset).await?;
        let host = self.allocate_packed(queue, len).await?;
        let range = CompressedRange { host, len };
        let Ok(stored) = Stored::compressed(&self.geometry, range) else {
            // Farther back in the file than such an entry can say. (Sharp edge 49.)
            self.give_back_packed(range);
            drop(writers);
            return self.write(queue, offset, data).await;
        };
        let written = queue.write(&self.file, host.get(), vec![bytes.seg(0, len as usize)], vec![bytes.clone()]).await;
        let written = written.map_err(|e| self.io_error("cannot write a compressed cluster", host.get(), e));
        let published = match written {
            Ok(()) => self.publish(queue, offset, 1, |_, _| Ok(stored)).await.map_err(Error::from),
            Err(e) => Err(e),
        };
        published.inspect_err(|_| self.give_back_packed(range))
    }

    /// Gives out `len` bytes, at most a cluster, with a reference to each cluster that they touch; not yet durable.
    async fn allocate_packed(&self, queue: &Rc<Queue>, len: u64) -> Result<HostOffset> {
        let host = self.allocate_with(queue, |refcounts, now| refcounts.allocate_bytes(len, now)).await?;
        self.decoded.forget(host);
        Ok(host)
    }

    /// What did not come into the mapping is free again.
    fn give_back_packed(&self, range: CompressedRange) {
        self.meta.lock().drop_reference(&self.geometry, range.host, range.len);
    }

    /// Lets the file end with a whole sector, as those who read it by sectors like it: the last compressed cluster may not. (QEMU does
    /// so when it has filled an image.)
    pub(super) async fn round_file_end(&self, queue: &Rc<Queue>) {
        if !self.meta.lock().refcounts.ends_packed() {
            return;
        }
        let Ok(length) = self.file.length() else { return };
        if length.is_multiple_of(512) || self.file.traits().block_device {
            return;
        }
        if let Err(e) = queue.set_length(&self.file, length.next_multiple_of(512)).await {
            // Nothing depends on it.
            tracing::debug!("{}: cannot round the file's length: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
#[path = "compress_test.rs"]
mod tests;
