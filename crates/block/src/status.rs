//! What a disk is made of: which layer has a range, and whether it is data or zeros. For those who copy, compare or show disks.
//!
//! The layers are asked one after the other, from the topmost down. Nothing of the guest's data is read.
//!
//! Not here: where a request's data lies ([`crate::qcow2`]'s resolved mapping, which does not tell zeros of different layers apart).

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;

use crate::disk::{Disk, block_on, blocking_driver};
use crate::error::{Error, Result};
use crate::node::Node;
use crate::queue::Queue;
use crate::raw::RawImage;
use crate::sync::Arc;

/// What a range's content is, as far as the layers' metadata say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// No layer has it: it reads as zeros.
    Nothing,
    /// A layer says that it reads as zeros.
    Zero,
    /// Data, which may be zeros too.
    Data,
    /// Data, compressed.
    Compressed,
}

/// A range of a disk that is alike. Offsets and lengths are bytes of the virtual disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it is. Not empty.
    pub range: Range<u64>,
    /// What it is.
    pub content: Content,
    /// The layer that says so: 0 is the topmost. For [`Content::Nothing`] the last that was asked.
    pub depth: usize,
    /// Where it begins in the layer's file (an external data file, if there is one), if it lies there together as it is: neither
    /// compressed nor encrypted. Zeros, and what no layer has, may have a place too.
    pub place: Option<u64>,
    /// Data that is a hole in the layer's file, so that it reads as zeros. Only looked for where an image's file has many holes.
    pub hole: bool,
}

impl Extent {
    /// Whether it is known to read as zeros.
    pub(crate) fn reads_zero(&self) -> bool {
        self.hole || matches!(self.content, Content::Nothing | Content::Zero)
    }

    /// Whether `next` goes on with this one.
    fn continues_in(&self, next: &Self) -> bool {
        let len = self.range.end - self.range.start;
        self.range.end == next.range.start
            && (self.content, self.depth, self.hole) == (next.content, next.depth, next.hole)
            && match (self.place, next.place) {
                (None, None) => true,
                (Some(place), Some(next)) => place.checked_add(len) == Some(next),
                _ => false,
            }
    }
}

/// Part of an extent that a layer knows about: what it is, its place, and how many bytes.
pub(crate) struct Part {
    /// None: to be asked of the layer below.
    pub(crate) content: Option<Content>,
    pub(crate) place: Option<u64>,
    pub(crate) hole: bool,
    pub(crate) len: u64,
}

impl RawImage {
    /// What the `len` bytes at `offset` begin with. A host that cannot tell holes from data says that all is data.
    fn part(&self, offset: u64, len: u64) -> Result<Part> {
        let data = self.file.data_after(offset);
        let data =
            data.map_err(|e| Error::io("cannot tell holes from data", e).at_path(&self.path).at_offset(offset))?;
        let (content, end) = match data {
            Some(data) if data.start <= offset => (Content::Data, data.end),
            Some(data) => (Content::Zero, data.start),
            None => (Content::Zero, u64::MAX),
        };
        Ok(Part {
            content: Some(content),
            place: Some(offset),
            hole: false,
            len: end.saturating_sub(offset).clamp(1, len),
        })
    }
}

impl Node {
    /// What the chain from this layer down has at `offset`, of at most `len` bytes (not 0, and inside the virtual size).
    pub(crate) async fn extent(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<Extent> {
        let (mut node, mut depth, mut len) = (self, 0, len);
        loop {
            let part = match node {
                Self::Raw(raw) => match raw.file.layer().and_then(|layer| layer.disk()) {
                    Some(disk) => return inside(disk, queue, offset..offset + len, depth).await,
                    None => raw.part(offset, len)?,
                },
                Self::Qcow2(image) => image.part(queue, offset, len).await?,
            };
            len = part.len;
            let found = |content, len| {
                Ok(Extent { range: offset..offset + len, content, depth, place: part.place, hole: part.hole })
            };
            if let Some(content) = part.content {
                return found(content, len);
            }
            // A backing file that is shorter reads as zeros past its end. (Sharp edge 20.)
            let Some(below) = node.backing().filter(|below| below.size() > offset) else {
                return found(Content::Nothing, len);
            };
            len = len.min(below.size() - offset);
            (node, depth) = (below, depth + 1);
        }
    }
}

/// What the disk has that shows through a raw disk at `depth`: its layers are taken for that disk's.
async fn inside(disk: &Arc<Disk>, queue: &Rc<Queue>, range: Range<u64>, depth: usize) -> Result<Extent> {
    let (_entered, node) = disk.enter_to_look(disk.next_queue_number()).await?;
    let end = range.end.min(node.size()).max(range.start + 1);
    // In a disk a disk may lie, and so on.
    let look: Pin<Box<dyn Future<Output = Result<Extent>>>> =
        Box::pin(node.extent(queue, range.start, end - range.start));
    let found = look.await?;
    let range = range.start..found.range.end.min(range.end);
    Ok(Extent { range, depth: depth + found.depth, ..found })
}

/// The extents of a range of a disk, one after the other. What is alike and follows on is one.
pub struct Extents {
    disk: Arc<Disk>,
    queue: Rc<Queue>,
    number: usize,
    rest: Range<u64>,
    /// Found while the one before was looked for.
    next: Option<Extent>,
}

impl Disk {
    /// What `range` is made of. While the disk is written or changed the extents are those of different moments.
    ///
    /// # Errors
    /// The host has no room for an I/O queue.
    pub fn extents(self: &Arc<Self>, range: Range<u64>) -> Result<Extents> {
        let queue = Queue::new(blocking_driver(self.storage())?);
        Ok(Extents { disk: self.clone(), queue, number: self.next_queue_number(), rest: range, next: None })
    }
}

impl Extents {
    fn look(&mut self) -> Result<Option<Extent>> {
        let (disk, queue, number) = (self.disk.clone(), self.queue.clone(), self.number);
        let range = self.rest.clone();
        block_on(&self.queue, async move {
            let (_entered, node) = disk.enter_to_look(number).await?;
            let end = range.end.min(node.size());
            if range.start >= end {
                return Ok(None);
            }
            node.extent(&queue, range.start, end - range.start).await.map(Some)
        })
    }
}

impl Iterator for Extents {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Result<Extent>> {
        let mut extent = self.next.take();
        loop {
            let found = match self.look() {
                Ok(Some(found)) => found,
                Ok(None) => return extent.map(Ok),
                Err(error) => {
                    // What was found before it comes first; the error comes back when it is looked for again.
                    if let Some(extent) = extent {
                        return Some(Ok(extent));
                    }
                    self.rest.start = self.rest.end;
                    return Some(Err(error));
                }
            };
            self.rest.start = found.range.end;
            match &mut extent {
                None => extent = Some(found),
                Some(extent) if extent.continues_in(&found) => extent.range.end = found.range.end,
                Some(_) => {
                    self.next = Some(found);
                    return extent.map(Ok);
                }
            }
        }
    }
}
