//! What one image says of a range, without its backing file.

use std::rc::Rc;

use super::Image;
use super::mapping::Kind;
use crate::error::Result;
use crate::queue::Queue;
use crate::status::{Content, Part};

impl Image {
    /// What the `len` bytes at `offset` begin with (not 0, and inside the virtual size).
    pub(crate) async fn part(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<Part> {
        let run = self.run_to_write(queue, offset, len).await?;
        let (content, host) = match run.kind {
            Kind::Unallocated(_) => (None, None),
            Kind::Reserved { host, .. } => (None, Some(host)),
            Kind::Zero { host, .. } => (Some(Content::Zero), host),
            Kind::Data { host, .. } => (Some(Content::Data), Some(host)),
            Kind::Compressed(_) => (Some(Content::Compressed), None),
        };
        let place = host.filter(|_| self.is_plain()).map(|host| host.get());
        let (hole, len) = match (content, place) {
            (Some(Content::Data), Some(place)) if self.has_holes() => self.hole(place, run.len)?,
            _ => (false, run.len),
        };
        Ok(Part { content, place, hole, len })
    }

    /// Whether the file takes clearly less of the host's space than it is long, as one does whose clusters were given places before they
    /// were written. A file for data alone is not looked at, as by QEMU.
    fn has_holes(&self) -> bool {
        *self.sparse.get_or_init(|| {
            let clusters = |bytes| self.geometry.cluster_bits.clusters_for(bytes);
            match (self.file.length(), self.file.allocated()) {
                (Ok(length), Ok(taken)) if self.external.is_none() => clusters(length) * 9 / 10 > clusters(taken),
                _ => false,
            }
        })
    }

    /// Whether the `len` bytes at `place` of the file begin with a hole, and how many bytes are like that.
    fn hole(&self, place: u64, len: u64) -> Result<(bool, u64)> {
        let data = self.file.data_after(place);
        let data = data.map_err(|e| self.io_error("cannot tell holes from data", place, e))?;
        let (hole, end) = match data {
            Some(data) if data.start <= place => (false, data.end),
            Some(data) => (true, data.start),
            None => (true, u64::MAX),
        };
        // In whole sectors, whatever the host's file system has; but not of more than was asked for.
        let alike = end.saturating_sub(place).clamp(1, len);
        match alike.is_multiple_of(512) || hole {
            true if alike >= 512 => Ok((hole, alike - alike % 512)),
            _ => Ok((false, alike.next_multiple_of(512).min(len))),
        }
    }
}
