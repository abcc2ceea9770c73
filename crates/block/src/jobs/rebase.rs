//! An overlay is put over another image, and shows the same as before.
//!
//! First what the two images differ in, and the overlay has not itself, is copied from the old one into the overlay, which changes
//! nothing of what it shows; when that is durable, one switch of the header names the new image. So whatever ends the work half-way,
//! the overlay is sound and shows the disk as it was, over the old image or over the new one.

use std::ops::Range;
use std::rc::Rc;

use super::Progress;
use super::pieces::{AT_ONCE, BATCH, PIECE, Side};
use crate::disk::{Disk, block_on};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::join::join_some;
use crate::node::Node;
use crate::queue::Queue;
use crate::status::{Content, Extent};
use crate::sync::Arc;

/// The image that an overlay is put over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewBacking {
    /// Its name, as the header will have it; none for an image that stands alone.
    pub name: Option<Vec<u8>>,
    /// Its format, as the header will have it.
    pub format: Option<String>,
}

/// Puts the disk's topmost image over another one, on the calling thread: over `new`, open for reading, or over none. What differs is
/// written compressed if `compress` says so, where it is whole clusters.
///
/// # Errors
/// The disk is raw; there is no room in its header; a file cannot be read or written. The disk then shows the same as before, over what it
/// was over.
pub fn rebase(
    disk: &Arc<Disk>,
    new: Option<&Arc<Disk>>,
    backing: &NewBacking,
    compress: bool,
    progress: Progress,
) -> Result<()> {
    let driver = disk.storage().driver().map_err(|e| Error::io("cannot set up an I/O queue", e))?;
    let queue = Queue::new(driver);
    let task = {
        let (queue, disk, new, backing) = (queue.clone(), disk.clone(), new.cloned(), backing.clone());
        async move { rebase_on(&queue, &disk, new.as_ref(), &backing, compress, progress).await }
    };
    block_on(&queue, task)
}

/// Names another backing file in the header of the disk's topmost image and looks at nothing else: if the new one has another
/// content where the overlay has none, so has the disk.
///
/// # Errors
/// The disk is raw; there is no room in its header; the host's.
pub fn rebase_unsafe(disk: &Arc<Disk>, backing: &NewBacking) -> Result<()> {
    let backing = backing.clone();
    disk.alone(async move |disk, queue| disk.set_backing_on(queue, &backing).await)
}

/// The same with the operations of `queue`.
pub(crate) async fn rebase_on(
    queue: &Rc<Queue>,
    disk: &Arc<Disk>,
    new: Option<&Arc<Disk>>,
    backing: &NewBacking,
    compress: bool,
    mut progress: Progress,
) -> Result<()> {
    let node = disk.node();
    let Node::Qcow2(image) = &*node else {
        return Err(Error::new(ErrorKind::Unsupported, "Operation not supported").at_path(node.path()));
    };
    // Before anything is written.
    image.check_backing(queue, backing.name.as_deref(), backing.format.as_deref()).await?;
    let new_node = new.map(|new| new.node());
    if let Some(layer) = layers(new_node.as_deref()).find(|layer| is_same_file(layer, &node)) {
        let message = format!("{} has the image itself below it", layer.path().display());
        return Err(Error::new(ErrorKind::Invalid, message).at_path(node.path()));
    }
    let work = Work {
        queue,
        overlay: Side::new(disk),
        new: new.map(Side::new),
        cluster: image.cluster_size(),
        unit: image.granule(),
        compress,
    };
    let size = node.size();
    let mut at = 0;
    progress(0, size);
    while at < size {
        let mut batch = Vec::new();
        while at < size && batch.len() < BATCH {
            let (same, len) = work.look(at, size - at).await?;
            if same {
                at += len;
                continue;
            }
            let start = at - at % work.cluster;
            let end = size.min(start + PIECE.max(work.cluster));
            batch.push(start..end);
            at = end;
        }
        join_some(batch.iter().map(|range| work.bring(range)), AT_ONCE).await?;
        progress(at, size);
    }
    node.flush(queue).await?;
    disk.set_backing_on(queue, backing).await
}

fn layers(top: Option<&Node>) -> impl Iterator<Item = &Node> {
    std::iter::successors(top, |node| node.backing().map(|node| &**node))
}

fn is_same_file(one: &Node, other: &Node) -> bool {
    // Of one file two disks may be different parts.
    let is_plain = one.file().layer().is_none() && other.file().layer().is_none();
    is_plain && one.file().traits().identity == other.file().traits().identity && one.format() == other.format()
}

/// Whether it reads as zeros.
fn is_nothing(extent: &Extent) -> bool {
    matches!(extent.content, Content::Nothing | Content::Zero)
}

/// How a part of the disk is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Zero,
    Compressed,
    Plain,
}

/// Both sides of a rebase.
struct Work<'a> {
    queue: &'a Rc<Queue>,
    /// Over the old image: what the disk shows.
    overlay: Side<'a>,
    new: Option<Side<'a>>,
    cluster: u64,
    /// In what units they are compared.
    unit: u64,
    compress: bool,
}

impl Work<'_> {
    /// Whether the first bytes at `offset` need nothing, as far as metadata tells, and how many (of at most `len`).
    async fn look(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let node = self.overlay.disk.node();
        let old = node.extent(self.queue, offset, len).await?;
        let len = old.range.end - offset;
        if old.depth == 0 && old.content != Content::Nothing {
            return Ok((true, len));
        }
        let new = self.new.as_ref().map(|new| new.disk.node()).filter(|new| new.size() > offset);
        let Some(new_node) = new else { return Ok((is_nothing(&old), len)) };
        let new = new_node.extent(self.queue, offset, len.min(new_node.size() - offset)).await?;
        let len = new.range.end - offset;
        if is_nothing(&old) && is_nothing(&new) {
            return Ok((true, len));
        }
        let source = (layers(Some(&node)).nth(old.depth), layers(Some(&new_node)).nth(new.depth));
        let same = matches!(source, (Some(one), Some(other)) if is_same_file(one, other));
        Ok((same && !is_nothing(&old) && !is_nothing(&new), len))
    }

    /// Copies into the overlay what it has not itself, of a range of whole clusters, where the new image differs.
    async fn bring(&self, range: &Range<u64>) -> Result<()> {
        let mut at = range.start;
        let mut differing: Vec<Range<u64>> = Vec::new();
        while at < range.end {
            let (same, len) = self.look(at, range.end - at).await?;
            if !same {
                self.compare(at..at + len, &mut differing).await?;
            }
            at += len;
        }
        for part in differing {
            self.write_clusters(&part).await?;
        }
        Ok(())
    }

    /// Writes the units of a range in which the images differ; or, if they are to be compressed, adds their clusters to `differing`.
    async fn compare(&self, range: Range<u64>, differing: &mut Vec<Range<u64>>) -> Result<()> {
        let old = self.overlay.read(self.queue, &range).await?;
        let new = match &self.new {
            Some(new) => new.read(self.queue, &range).await?,
            None => Arc::new(Buffer::zeroed((range.end - range.start) as usize)),
        };
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / self.unit + 1) * self.unit);
            let bytes = (at - range.start) as usize..(end - range.start) as usize;
            if old.get(bytes.clone()) != new.get(bytes) {
                // Compressed, a cluster is written whole.
                let (start, end) = match self.compress {
                    true => (at - at % self.cluster, (at / self.cluster + 1) * self.cluster),
                    false => (at, end),
                };
                let end = end.min(self.overlay.disk.size());
                match differing.last_mut() {
                    Some(last) if last.end >= start => last.end = last.end.max(end),
                    _ => differing.push(start..end),
                }
            }
            at = end;
        }
        if self.compress {
            return Ok(());
        }
        for part in differing.drain(..) {
            self.write(&old, range.start, &part).await?;
        }
        Ok(())
    }

    /// Reads whole clusters, and writes them.
    async fn write_clusters(&self, range: &Range<u64>) -> Result<()> {
        let data = self.overlay.read(self.queue, range).await?;
        self.write(&data, range.start, range).await
    }

    /// Writes a part of `data`, which is the disk's content at `start`, into the overlay itself. What it shows already from below would
    /// not be written by a request that makes zeros.
    async fn write(&self, data: &Arc<Buffer>, start: u64, range: &Range<u64>) -> Result<()> {
        let node = self.overlay.disk.node();
        let mut at = range.start;
        while at < range.end {
            let (how, end) = self.how(data, start, at..range.end).await?;
            let bytes = (at - start) as usize..(end - start) as usize;
            let segs = [data.seg(bytes.start, bytes.len())];
            match (&*node, how) {
                (Node::Qcow2(image), How::Zero) => image.zero_explicitly(self.queue, at, end).await?,
                (node, How::Compressed) => node.write_compressed(self.queue, at, &segs).await?,
                (node, _) => node.write(self.queue, at, &segs).await?,
            }
            at = end;
        }
        Ok(())
    }

    /// How the first bytes of a range are to be written, and up to where.
    async fn how(&self, data: &Arc<Buffer>, start: u64, range: Range<u64>) -> Result<(How, u64)> {
        let size = self.overlay.disk.size();
        let mut first = None;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / self.cluster + 1) * self.cluster);
            let whole = at.is_multiple_of(self.cluster) && (end.is_multiple_of(self.cluster) || end == size);
            // Of what the overlay has a part of already, the rest is written.
            let how = if whole && self.is_absent(&(at..end)).await? {
                let bytes = (at - start) as usize..(end - start) as usize;
                let zero = data.get(bytes).is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0));
                if zero { How::Zero } else { self.compress_or_not() }
            } else {
                How::Plain
            };
            match first {
                None => first = Some(how),
                Some(first) if first != how => return Ok((first, at)),
                Some(_) => {}
            }
            at = end;
            if how == How::Compressed {
                break;
            }
        }
        Ok((first.unwrap_or(How::Plain), at))
    }

    fn compress_or_not(&self) -> How {
        if self.compress { How::Compressed } else { How::Plain }
    }

    /// Whether the overlay has nothing of a range itself.
    async fn is_absent(&self, range: &Range<u64>) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let extent = self.overlay.disk.node().extent(self.queue, at, range.end - at).await?;
            if extent.depth == 0 && extent.content != Content::Nothing {
                return Ok(false);
            }
            at = extent.range.end;
        }
        Ok(true)
    }
}
