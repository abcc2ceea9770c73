//! An image that changes its place in a chain: the topmost one comes to lie below an overlay, and the overlay above it.

use std::rc::Rc;

use super::Image;
use super::mapping::Kind;
use super::open::ImageOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::grace::Grace;
use crate::node::Node;
use crate::queue::Queue;
use crate::sync::Arc;

impl Image {
    /// The image as a layer below another one: read anew, not to be written, with `metadata_cache` bytes for its tables. Nobody uses
    /// this one any more, and nothing of it is unwritten.
    pub(crate) async fn lowered(&self, queue: &Rc<Queue>, metadata_cache: u64) -> Result<Self> {
        let opening = self.read_header(queue).await?;
        let size = opening.parsed().size;
        let links = (self.backing.clone(), self.external.clone());
        let metadata_cache = Some(metadata_cache);
        let options = ImageOptions { writable: false, resolve: false, metadata_cache, ..self.options };
        let mut image = opening.finish_as(queue, links, self.cipher.clone(), options, size).await?;
        image.flushes = self.flushes.clone();
        Ok(image)
    }

    /// Puts the image, which was opened without a backing file, over `below`, in a disk whose requests are counted by `grace`.
    pub(crate) fn put_over(&mut self, below: Arc<Node>, grace: Arc<Grace>) {
        self.below = std::iter::successors(Some(below.clone()), |node| node.backing().cloned()).collect();
        self.backing = Some(below);
        self.grace = grace;
    }

    /// Refuses an image that would not show what lies below it everywhere.
    pub(crate) async fn check_empty(&self, queue: &Rc<Queue>) -> Result<()> {
        let mut at = 0;
        while at < self.size {
            let run = self.run(queue, at, self.size - at).await?;
            if !matches!(run.kind, Kind::Unallocated(_) | Kind::Reserved { .. }) {
                let message = "it has content of its own, which would take the place of the disk's";
                return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path));
            }
            at += run.len;
        }
        Ok(())
    }

    /// Whether guest data is encrypted in it.
    pub(crate) fn is_encrypted(&self) -> bool {
        !self.is_plain()
    }
}
