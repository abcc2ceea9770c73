//! A new disk that is being filled does not look whole before it is.
//!
//! An image's header says a version that there is not, so that whoever opens it, QEMU too, refuses; a raw file is shorter than the disk
//! (what fills it writes its end last). Whatever ends the program meanwhile leaves that behind. A block
//! device, and a raw file whose space was taken before, cannot say so.
//!
//! Lock order: as [`crate::change`].

use std::rc::Rc;

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::queue::Queue;
use crate::raw::RawImage;
use crate::sync::Arc;

const SECTOR: u64 = 512;

/// Both block the calling thread, which must not be one that serves a queue of this disk with requests in flight.
impl Disk {
    /// Lets the disk, which was just made and holds nothing, not look whole until [`finish_filling`](Self::finish_filling). As a whole it
    /// must not change in between.
    ///
    /// # Errors
    /// The host's.
    pub fn begin_filling(self: &Arc<Self>) -> Result<()> {
        self.alone(async |disk, queue| match &*disk.node() {
            Node::Raw(raw) => raw.begin_filling(queue).await,
            Node::Qcow2(image) => image.begin_filling(queue).await,
        })
    }

    /// Lets the disk look whole again, with all that was written. No request is in flight.
    ///
    /// # Errors
    /// Something could not be written: then it does not look whole.
    pub fn finish_filling(self: &Arc<Self>) -> Result<()> {
        self.alone(async |disk, queue| {
            let node = disk.node();
            node.settle(queue).await?;
            match &*node {
                Node::Raw(raw) => raw.finish_filling(queue).await,
                Node::Qcow2(image) => image.finish_filling(queue).await,
            }
        })
    }
}

impl RawImage {
    async fn begin_filling(&self, queue: &Rc<Queue>) -> Result<()> {
        let io_error = |e| Error::io("cannot change the file's length", e).at_path(&self.path);
        if self.file.traits().block_device || self.file.allocated().map_err(io_error)? > 0 {
            return Ok(());
        }
        // A sector stays, if the disk has more: ext4 takes who empties a file for one who replaces it, and begins to write all of it to the
        // disk when it is closed, which would take longer than the copy.
        let least = if self.size > SECTOR { SECTOR } else { 0 };
        queue.set_length(&self.file, least).await.map_err(io_error)
    }

    async fn finish_filling(&self, queue: &Rc<Queue>) -> Result<()> {
        if self.file.traits().block_device {
            return Ok(());
        }
        let resized = queue.set_length(&self.file, self.size).await;
        resized.map_err(|e| Error::io("cannot change the file's length", e).at_path(&self.path))?;
        self.flush(queue).await
    }
}

#[cfg(test)]
#[path = "filling_test.rs"]
mod tests;
