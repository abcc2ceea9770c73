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

impl Disk {
    /// Lets a disk that was opened as [`unfinished`](crate::DiskSpec::unfinished) look whole, with all that was written. No request is in
    /// flight. Blocks the calling thread, which must not be one that serves a queue of this disk with requests in flight.
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
