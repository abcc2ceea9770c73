//! Pieces of a disk's content, read and written through whole requests of bounded size, several at once.
//!
//! Not here: what is to be copied.

use std::ops::Range;
use std::rc::Rc;

use crate::disk::Disk;
use crate::error::Result;
use crate::io::Buffer;
use crate::qcow2::Zeros;
use crate::queue::Queue;
use crate::sync::Arc;

/// The most bytes of one piece.
pub(super) const PIECE: u64 = 1 << 20;

/// How many pieces are under way at once: their memory is the bound.
pub(super) const AT_ONCE: usize = 8;

/// The most pieces that are gathered before they are copied.
pub(super) const BATCH: usize = 64;

/// The most bytes of zeros that one request writes.
const ZEROS: u64 = 1 << 30;

/// A disk to be read and written by a job, with the number by which its requests are counted.
pub(super) struct Side<'a> {
    pub(super) disk: &'a Arc<Disk>,
    number: usize,
}

impl<'a> Side<'a> {
    pub(super) fn new(disk: &'a Arc<Disk>) -> Self {
        Self { disk, number: disk.next_queue_number() }
    }

    /// Reads a range; what lies past the disk's end is zero.
    pub(super) async fn read(&self, queue: &Rc<Queue>, range: &Range<u64>) -> Result<Arc<Buffer>> {
        let buffer = Arc::new(Buffer::zeroed((range.end - range.start) as usize));
        let (_entered, node) = self.disk.enter_to_look(self.number).await?;
        let end = range.end.min(node.size());
        if range.start < end {
            node.read(queue, range.start, &[buffer.seg(0, (end - range.start) as usize)]).await?;
        }
        Ok(buffer)
    }

    /// Writes a part of `buffer`, whose first byte is the disk's at `start`.
    pub(super) async fn write(
        &self,
        queue: &Rc<Queue>,
        (buffer, start): (&Arc<Buffer>, u64),
        range: &Range<u64>,
    ) -> Result<()> {
        let (_entered, node) = self.disk.enter_to_look(self.number).await?;
        let data = [buffer.seg((range.start - start) as usize, (range.end - range.start) as usize)];
        node.write(queue, range.start, &data).await
    }

    /// Makes a range read as zeros.
    pub(super) async fn zero(&self, queue: &Rc<Queue>, range: &Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS);
            let (_entered, node) = self.disk.enter_to_look(self.number).await?;
            node.write_zeroes(queue, at, len, Zeros { unmap: true, said: false }).await?;
            at += len;
        }
        Ok(())
    }
}
