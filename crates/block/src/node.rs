//! One layer of a disk: an image of some format. The place where a format is chosen.

use std::path::Path;
use std::rc::Rc;

use crate::error::Result;
use crate::grace::Grace;
use crate::io::{File, IoSeg};
use crate::journal::Ring;
use crate::qcow2::{Image, Zeros};
use crate::queue::Queue;
use crate::raw::RawImage;
use crate::spec::Format;
use crate::sync::Arc;

/// A layer.
pub(crate) enum Node {
    Raw(RawImage),
    Qcow2(Box<Image>),
}

impl Node {
    /// The virtual size in bytes, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size,
            Self::Qcow2(image) => image.size(),
        }
    }

    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Raw(raw) => &raw.path,
            Self::Qcow2(image) => image.path(),
        }
    }

    pub(crate) fn file(&self) -> &File {
        match self {
            Self::Raw(raw) => &raw.file,
            Self::Qcow2(image) => image.file(),
        }
    }

    /// The file that holds guest data.
    pub(crate) fn data_file(&self) -> &File {
        match self {
            Self::Raw(raw) => &raw.file,
            Self::Qcow2(image) => image.data_file(),
        }
    }

    /// That file's name.
    pub(crate) fn data_path(&self) -> &Path {
        match self {
            Self::Raw(raw) => &raw.path,
            Self::Qcow2(image) => image.data_path(),
        }
    }

    pub(crate) fn backing(&self) -> Option<&Arc<Node>> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => image.backing(),
        }
    }

    /// Whether guest data is encrypted in it.
    pub(crate) fn is_encrypted(&self) -> bool {
        match self {
            Self::Raw(_) => false,
            Self::Qcow2(image) => image.is_encrypted(),
        }
    }

    /// What offsets and lengths of requests must be multiples of.
    pub(crate) fn unit(&self) -> u64 {
        match self {
            Self::Raw(_) => 1,
            Self::Qcow2(_) => 512,
        }
    }

    /// Whether it is a raw disk, whose bytes lie in its file as they are.
    pub(crate) fn is_plain_file(&self) -> bool {
        matches!(self, Self::Raw(_))
    }

    /// The unit in which space is given back.
    pub(crate) fn granularity(&self) -> u32 {
        match self {
            Self::Raw(_) => RawImage::GRANULARITY,
            Self::Qcow2(image) => image.cluster_size() as u32,
        }
    }

    /// Who must have ended before freed space is used again.
    pub(crate) fn grace(&self) -> Option<&Arc<Grace>> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => Some(image.grace()),
        }
    }

    /// In which file and where the range lies, if one operation in place is all that the request needs.
    pub(crate) fn mapped(&self, offset: u64, len: u64, write: bool) -> Option<(&File, u64)> {
        match self {
            Self::Raw(raw) => raw.mapped(offset, write).map(|place| (&raw.file, place)),
            Self::Qcow2(image) => image.mapped(offset, len, write),
        }
    }

    /// The range is about to be written where it lies.
    pub(crate) fn mark_dirty(&self, offset: u64, len: u64) {
        if let Self::Qcow2(image) = self {
            image.mark_dirty(offset, len);
        }
    }

    pub(crate) async fn read(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.read(queue, offset, data).await,
            Self::Qcow2(image) => image.read(queue, offset, data).await,
        }
    }

    pub(crate) async fn write(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.write(queue, offset, data).await,
            Self::Qcow2(image) => image.watched(queue, image.write(queue, offset, data)).await,
        }
    }

    pub(crate) async fn write_compressed(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        match self {
            Self::Raw(raw) => Err(raw.cannot_compress()),
            Self::Qcow2(image) => image.watched(queue, image.write_compressed(queue, offset, data)).await,
        }
    }

    pub(crate) async fn flush(&self, queue: &Rc<Queue>) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.flush(queue).await,
            Self::Qcow2(image) => image.watched(queue, image.flush(queue)).await,
        }
    }

    pub(crate) async fn discard(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.discard(queue, offset, len).await,
            Self::Qcow2(image) => image.watched(queue, image.discard(queue, offset, len)).await,
        }
    }

    pub(crate) async fn write_zeroes(&self, queue: &Rc<Queue>, offset: u64, len: u64, zeros: Zeros) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.write_zeroes(queue, offset, len, zeros.unmap).await,
            Self::Qcow2(image) => image.watched(queue, image.write_zeroes(queue, offset, len, zeros)).await,
        }
    }

    /// Whether the range can be made to read as zeros without writing zeros.
    pub(crate) async fn zeroes_without_writing(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<bool> {
        match self {
            Self::Raw(raw) => Ok(raw.may_zero()),
            Self::Qcow2(image) => image.zeroes_without_writing(queue, offset, len).await,
        }
    }

    /// Prepares the topmost layer of a disk for its first write.
    pub(crate) async fn begin_writing(&self, queue: &Rc<Queue>) -> Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.begin_writing(queue).await,
        }
    }

    /// The layer as it is below another one, with so many bytes for its metadata. Nobody uses this one any more, and nothing of it
    /// is unwritten.
    pub(crate) async fn lowered(&self, queue: &Rc<Queue>, metadata_cache: u64) -> Result<Self> {
        Ok(match self {
            Self::Raw(raw) => Self::Raw(raw.lowered()),
            Self::Qcow2(image) => Self::Qcow2(Box::new(image.lowered(queue, metadata_cache).await?)),
        })
    }

    /// Waits until the mapping is in the file that a request has changed, or found, if such requests are to wait.
    pub(crate) async fn settle_changes(&self, queue: &Rc<Queue>) -> Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.watched(queue, image.settle_changes(queue)).await,
        }
    }

    /// Notes changes of the mapping there from now on, if there is one.
    pub(crate) fn attach(&self, ring: Ring) {
        if let Self::Qcow2(image) = self {
            image.attach(ring);
        }
    }

    /// Notes no changes of the mapping any more.
    pub(crate) fn detach(&self) {
        if let Self::Qcow2(image) = self {
            image.detach();
        }
    }

    /// Writes everything, for the last time.
    pub(crate) async fn finish(&self, queue: &Rc<Queue>) -> Result<()> {
        self.settle(queue).await?;
        self.save_bitmaps(queue).await
    }

    /// Writes everything but dirty bitmaps, which stay in use.
    pub(crate) async fn settle(&self, queue: &Rc<Queue>) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.flush(queue).await,
            Self::Qcow2(image) => image.watched(queue, image.finish(queue)).await,
        }
    }

    /// Writes the dirty bitmaps, which are in use no more. No request is in flight, and none comes.
    pub(crate) async fn save_bitmaps(&self, queue: &Rc<Queue>) -> Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.watched(queue, image.save_bitmaps(queue)).await,
        }
    }
}
