//! An image that was changed as a whole is read again: its L1 table, caches and refcounts are made anew from the file, as at an
//! opening. So a change has to get right what is in the file, and nothing else.
//!
//! What belongs to the open file goes over: the file and its locks, its cipher, what its flushes have come to, the requests in
//! flight, the bits of enabled bitmaps.

use std::rc::Rc;

use super::Image;
use super::open::Opening;
use crate::error::Result;
use crate::queue::Queue;
use crate::sync::Ordering;

impl Image {
    /// The image as it is in the file now. Nobody uses this one any more, and nothing of it is unwritten.
    pub(crate) async fn reload(&self, queue: &Rc<Queue>) -> Result<Self> {
        self.reload_as(queue, None).await
    }

    /// The same, as an image of `size` bytes where that is not yet what the header says.
    pub(super) async fn reload_as(&self, queue: &Rc<Queue>, size: Option<u64>) -> Result<Self> {
        let opening = Opening::header(queue, self.file.clone(), &self.path).await?;
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
}
