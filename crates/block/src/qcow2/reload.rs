//! An image that was changed as a whole is read again: its L1 table, caches and refcounts are made anew from the file, as at an
//! opening. So a change has to get right what is in the file, and nothing else.
//!
//! What belongs to the open file goes over: the file and its locks, its cipher, what its flushes have come to, the requests in
//! flight, the bits of enabled bitmaps.

use std::rc::Rc;

use cowhand_qcow2::{Snapshot, limits};

use super::Image;
use super::open::{ImageOptions, Opening};
use crate::error::{Error, ErrorKind, Result};
use crate::queue::Queue;
use crate::sync::Ordering;

impl Image {
    /// The image as it is in the file now. Nobody uses this one any more, and nothing of it is unwritten.
    pub(crate) async fn reload(&self, queue: &Rc<Queue>) -> Result<Self> {
        self.reload_as(queue, None).await
    }

    /// The same, as an image of `size` bytes where that is not yet what the header says.
    pub(super) async fn reload_as(&self, queue: &Rc<Queue>, size: Option<u64>) -> Result<Self> {
        let opening = self.read_header(queue).await?;
        let size = size.unwrap_or(opening.parsed().size);
        let links = (self.backing.clone(), self.external.clone());
        let mut image = opening.finish_as(queue, links, self.cipher.clone(), self.options, size).await?;
        image.flushes = self.flushes.clone();
        image.grace = self.grace.clone();
        // Version 2 cannot say it in the file.
        image.corrupt.fetch_or(self.is_corrupt(), Ordering::AcqRel);
        image.live = self.live_for(queue, &image).await?;
        Ok(image)
    }

    /// The header as it is in the file now.
    pub(super) async fn read_header(&self, queue: &Rc<Queue>) -> Result<Opening> {
        if self.filling.load(Ordering::SeqCst) {
            return Opening::unfinished(queue, self.file.clone(), &self.path).await;
        }
        Opening::header(queue, self.file.clone(), &self.path).await
    }

    /// The image as it was when the snapshot was taken, for reading. Nobody uses this one any more.
    pub(crate) async fn as_of_snapshot(&self, queue: &Rc<Queue>, snapshot: &Snapshot) -> Result<Self> {
        let mut opening = self.read_header(queue).await?;
        let size = snapshot.disk_size.unwrap_or(opening.parsed().size);
        let entries = self.geometry.l1_entries_for(size).max(u64::from(snapshot.l1_size));
        if entries > limits::L1_TABLE_BYTES_MAX / 8 || size.checked_next_multiple_of(512).is_none() {
            let message = "the image is damaged: a snapshot's size is more than an L1 table can map";
            return Err(Error::new(ErrorKind::Corrupt, message).at_path(&self.path));
        }
        opening.show_tree(snapshot.l1_table_offset, snapshot.l1_size);
        let links = (self.backing.clone(), self.external.clone());
        let options = ImageOptions { writable: false, ..self.options };
        let mut image = opening.finish_as(queue, links, self.cipher.clone(), options, size).await?;
        image.flushes = self.flushes.clone();
        image.grace = self.grace.clone();
        Ok(image)
    }
}
