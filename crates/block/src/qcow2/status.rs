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
            Kind::Unallocated(_) | Kind::Reserved { .. } => (None, None),
            Kind::Zero { host, .. } => (Some(Content::Zero), host),
            Kind::Data { host, .. } => (Some(Content::Data), Some(host)),
            Kind::Compressed(_) => (Some(Content::Compressed), None),
        };
        let place = host.filter(|_| self.is_plain()).map(|host| host.get());
        Ok(Part { content, place, len: run.len })
    }
}
