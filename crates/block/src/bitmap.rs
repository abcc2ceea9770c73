//! Dirty bitmaps of a disk while queues serve it: listed, made, removed, enabled, disabled, cleared, merged, and read.
//!
//! A bitmap says which parts of the disk were written since it was made or cleared; a backup that copies those alone is an
//! incremental one. Bitmaps are the topmost layer's, and live in its file ([`crate::qcow2`], `bitmaps`).
//!
//! What needs the file changes alone with the disk, as snapshots do ([`crate::change`]). An enabled bitmap is cleared and merged into
//! in memory: the gate closes for that moment only.
//!
//! Lock order: as [`crate::change`].

use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::{BitmapFlags, DirectoryEntry};

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use crate::qcow2::Image;
use crate::queue::Queue;
use crate::sync::Arc;

/// Whether a bitmap can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapState {
    /// It can.
    Consistent,
    /// A program that wrote to the image did not save it: it can only be removed.
    Inconsistent,
    /// It has extra data that is not known, and says that it must not be used without: it is kept as it is.
    UnknownExtraData,
}

/// A persistent dirty bitmap, as it is shown to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name, unique in the image.
    pub name: String,
    /// Bytes of disk that one bit stands for: a power of two, 512 to 2 GiB.
    pub granularity: u64,
    /// Whether writes set its bits.
    pub enabled: bool,
    /// Whether it can be relied on.
    pub state: BitmapState,
    /// Bytes of its bits, at most 512 MiB.
    pub bytes: u64,
}

impl BitmapInfo {
    /// What the directory of an image with a disk of `size` bytes says.
    pub(crate) fn new(entry: &DirectoryEntry, size: u64) -> Self {
        Self {
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            granularity: 1 << entry.granularity_bits,
            enabled: entry.flags.contains(BitmapFlags::AUTO),
            state: if entry.flags.contains(BitmapFlags::IN_USE) {
                BitmapState::Inconsistent
            } else if entry.is_usable() {
                BitmapState::Consistent
            } else {
                BitmapState::UnknownExtraData
            },
            bytes: entry.data_len(size),
        }
    }
}

/// All of these block the calling thread, which must not be one that serves a queue of this disk with requests in flight: they
/// would be waited for. A bitmap that is inconsistent, or has unknown extra data, is refused by all but the first two.
impl Disk {
    /// The bitmaps of the topmost layer, in the order of its directory.
    ///
    /// # Errors
    /// The directory is damaged, or cannot be read. A raw disk has no bitmaps, which is no error.
    pub fn bitmaps(self: &Arc<Self>) -> Result<Vec<BitmapInfo>> {
        self.alone(async |disk, queue| disk.bitmaps_on(queue).await)
    }

    /// Whether its format has bitmaps.
    #[must_use]
    pub fn can_have_bitmaps(&self) -> bool {
        match &*self.node() {
            Node::Raw(_) => false,
            Node::Qcow2(image) => image.version() >= 3,
        }
    }

    /// Removes a bitmap, an inconsistent one too.
    ///
    /// # Errors
    /// There is none of that name; it has unknown extra data; the host's.
    pub fn remove_bitmap(self: &Arc<Self>, name: &str) -> Result<()> {
        self.change_bitmaps(BitmapChange::Remove(name.into()))
    }

    /// Adds a bitmap with no bit set. Its granularity in bytes is a power of two from 512 to 2 GiB; if none is given, the cluster
    /// size between 4 and 64 KiB.
    ///
    /// # Errors
    /// A name that is empty, over 1023 bytes, or taken; a granularity that is none, or with which the bitmap would take more than
    /// 512 MiB; a disk that cannot have bitmaps (raw, read-only, version 2); no room in the header; the host's.
    pub fn create_bitmap(self: &Arc<Self>, name: &str, granularity: Option<u64>, enabled: bool) -> Result<()> {
        self.change_bitmaps(BitmapChange::Create { name: name.into(), granularity, enabled })
    }

    /// Has writes set the bitmap's bits from now on.
    ///
    /// # Errors
    /// There is no such bitmap; all that are enabled would take more than 512 MiB; the host's.
    pub fn enable_bitmap(self: &Arc<Self>, name: &str) -> Result<()> {
        self.change_bitmaps(BitmapChange::Enable(name.into()))
    }

    /// Leaves the bitmap as it is from now on.
    ///
    /// # Errors
    /// There is no such bitmap; the host's.
    pub fn disable_bitmap(self: &Arc<Self>, name: &str) -> Result<()> {
        self.change_bitmaps(BitmapChange::Disable(name.into()))
    }

    /// Clears all bits of a bitmap, at one moment between the call and its end.
    ///
    /// # Errors
    /// As [`disable_bitmap`](Self::disable_bitmap).
    pub fn clear_bitmap(self: &Arc<Self>, name: &str) -> Result<()> {
        self.change_bitmaps(BitmapChange::Clear(name.into()))
    }

    /// Sets in the bitmap `into` all that `from` has set. Their granularities may differ.
    ///
    /// # Errors
    /// As [`disable_bitmap`](Self::disable_bitmap).
    pub fn merge_bitmap(self: &Arc<Self>, into: &str, from: &str) -> Result<()> {
        self.change_bitmaps(BitmapChange::Merge { into: into.into(), from: from.into() })
    }

    /// Sets the bits of a bitmap for ranges of bytes of the disk, beside those that are set. What lies outside of the disk is left out.
    ///
    /// # Errors
    /// As [`disable_bitmap`](Self::disable_bitmap).
    pub fn set_in_bitmap(self: &Arc<Self>, name: &str, ranges: &[Range<u64>]) -> Result<()> {
        self.change_bitmaps(BitmapChange::Set { name: name.into(), ranges: ranges.to_vec() })
    }

    /// The same with a bitmap of another disk of the same size.
    ///
    /// # Errors
    /// As [`disable_bitmap`](Self::disable_bitmap); the disks are of different sizes.
    pub fn merge_bitmap_of(self: &Arc<Self>, into: &str, source: &Arc<Self>, from: &str) -> Result<()> {
        let ranges = source.bitmap_ranges(from)?;
        let (ours, theirs) = (self.size(), source.size());
        if ours != theirs {
            let message = format!(
                "Bitmaps are of different sizes (destination size is {ours}, source size is {theirs}) and can't be merged"
            );
            return Err(Error::new(ErrorKind::Invalid, message).at_path(&self.spec().path));
        }
        self.change_bitmaps(BitmapChange::Set { name: into.into(), ranges })
    }

    /// What the bitmap says has changed: ranges of bytes of the disk, in ascending order, none of which touches another. A write that
    /// ends after the call may be in it or not.
    ///
    /// # Errors
    /// There is no such bitmap; it cannot be read.
    pub fn bitmap_ranges(self: &Arc<Self>, name: &str) -> Result<Vec<Range<u64>>> {
        let name = name.to_string();
        self.alone(async move |disk, queue| disk.bitmap_ranges_on(queue, &name).await)
    }

    fn change_bitmaps(self: &Arc<Self>, change: BitmapChange) -> Result<()> {
        self.alone(async move |disk, queue| disk.change_bitmaps_on(queue, &change).await)
    }

    pub(crate) async fn bitmaps_on(&self, queue: &Rc<Queue>) -> Result<Vec<BitmapInfo>> {
        let _changes = self.changes().lock().await;
        match &*self.node() {
            Node::Raw(_) => Ok(Vec::new()),
            Node::Qcow2(image) => image.bitmaps(queue).await,
        }
    }

    pub(crate) async fn bitmap_ranges_on(&self, queue: &Rc<Queue>, name: &str) -> Result<Vec<Range<u64>>> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        with_bitmaps(&node)?.bitmap_ranges(queue, name).await
    }

    pub(crate) async fn change_bitmaps_on(&self, queue: &Rc<Queue>, change: &BitmapChange) -> Result<()> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        let image = with_bitmaps(&node)?;
        image.check_bitmaps_writable()?;
        // Before anyone has to wait.
        change.check(queue, image).await?;
        if change.in_memory(image) {
            let _closed = self.grace().close().await;
            if self.grace().is_broken() {
                return Err(self.broken());
            }
            return change.make(queue, image).await;
        }
        self.change(queue, async |image| change.make(queue, image).await).await
    }
}

fn with_bitmaps(node: &Node) -> Result<&Image> {
    match node {
        Node::Raw(raw) => Err(Error::new(ErrorKind::Unsupported, "a raw disk has no bitmaps").at_path(&raw.path)),
        Node::Qcow2(image) => Ok(image),
    }
}

/// What is to become of a bitmap.
#[derive(Clone, Debug)]
pub(crate) enum BitmapChange {
    Create { name: String, granularity: Option<u64>, enabled: bool },
    Remove(String),
    Enable(String),
    Disable(String),
    Clear(String),
    Merge { into: String, from: String },
    Set { name: String, ranges: Vec<Range<u64>> },
}

impl BitmapChange {
    /// Whether nothing in the file changes.
    fn in_memory(&self, image: &Image) -> bool {
        match self {
            Self::Clear(name) | Self::Merge { into: name, .. } | Self::Set { name, .. } => image.is_tracked(name),
            Self::Create { .. } | Self::Remove(_) | Self::Enable(_) | Self::Disable(_) => false,
        }
    }

    /// Why it cannot be made, as far as that can be told before.
    async fn check(&self, queue: &Rc<Queue>, image: &Image) -> Result<()> {
        match self {
            Self::Create { name, granularity, .. } => image.check_new_bitmap(queue, name, *granularity).await,
            Self::Remove(name) => image.check_bitmap_removable(queue, name).await,
            Self::Enable(name) | Self::Disable(name) | Self::Clear(name) | Self::Set { name, .. } => {
                image.check_bitmap(queue, name).await
            }
            Self::Merge { into, from } => {
                image.check_bitmap(queue, into).await?;
                image.check_bitmap(queue, from).await
            }
        }
    }

    async fn make(&self, queue: &Rc<Queue>, image: &Image) -> Result<()> {
        match self {
            Self::Create { name, granularity, enabled } => {
                image.create_bitmap(queue, name, *granularity, *enabled).await
            }
            Self::Remove(name) => image.remove_bitmap(queue, name).await,
            Self::Enable(name) => image.enable_bitmap(queue, name).await,
            Self::Disable(name) => image.disable_bitmap(queue, name).await,
            Self::Clear(name) => image.clear_bitmap(queue, name).await,
            Self::Merge { into, from } => image.merge_bitmap(queue, into, from).await,
            Self::Set { name, ranges } => image.set_in_bitmap(queue, name, ranges).await,
        }
    }
}
