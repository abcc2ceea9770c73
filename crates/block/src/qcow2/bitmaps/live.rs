//! The bitmaps that are kept up to date: those that are enabled, of an image that is written to.
//!
//! While it is, they are marked in use in the file, before anything is written that they would miss. Their bits are in memory,
//! and are set before a write is sent: it costs a look at a list that is empty for most disks, and for each bitmap one at a
//! word. They are written back at the end. Whoever dies meanwhile leaves bitmaps in use, which are inconsistent, and never one
//! that claims that nothing has changed where something has.

use std::rc::Rc;

use cowhand_qcow2::{Autoclear, BitmapFlags, DirectoryEntry, limits};

use super::bits::Bits;
use super::directory::TABLES_MAX;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::Image;
use crate::queue::Queue;
use crate::sync::Arc;

/// The most bytes of memory that the bitmaps of an image can take: as much as two of the largest. They take it as bits are set.
pub(super) const MEMORY_MAX: u64 = 2 * limits::BITMAP_BYTES_MAX;

/// A bitmap that is kept up to date.
#[derive(Debug)]
pub(crate) struct Tracked {
    pub(super) name: Vec<u8>,
    pub(super) bits: Bits,
}

/// All that are.
pub(in crate::qcow2) type Live = Vec<Arc<Tracked>>;

/// Bitmaps that are not kept up to date, taken out of the file while the disk's size changes.
struct Held(Vec<Tracked>);

/// What is said of a bitmap that is enabled and not in use: nobody else keeps it up to date.
fn is_tracked(entry: &DirectoryEntry) -> bool {
    entry.is_usable() && entry.flags.contains(BitmapFlags::AUTO)
}

impl Image {
    /// The range is about to change: sets its bits in all bitmaps that are enabled.
    pub(crate) fn mark_dirty(&self, offset: u64, len: u64) {
        for tracked in &self.live {
            tracked.bits.mark(offset, len);
        }
    }

    pub(super) fn live(&self, name: &[u8]) -> Option<&Arc<Tracked>> {
        self.live.iter().find(|tracked| tracked.name == name)
    }

    /// The enabled bitmaps of an image just opened for writing, from the file.
    pub(in crate::qcow2) async fn load_live(&self, queue: &Rc<Queue>) -> Result<Live> {
        if !self.writable {
            return Ok(Live::new());
        }
        let directory = self.directory(queue).await?;
        let enabled = |entry: &&DirectoryEntry| is_tracked(entry) && !entry.flags.contains(BitmapFlags::IN_USE);
        let enabled: Vec<_> = directory.entries.iter().filter(enabled).collect();
        self.check_memory(enabled.iter().map(|entry| entry.data_len(self.size)).sum())?;
        let mut live = Live::new();
        for entry in enabled {
            live.push(Arc::new(Tracked { name: entry.name.clone(), bits: self.load_bits(queue, entry).await? }));
        }
        Ok(live)
    }

    /// The enabled bitmaps of `next`, which takes this image's place: those of this one, and those that have been enabled, as far as the
    /// file has them.
    pub(in crate::qcow2) async fn live_for(&self, queue: &Rc<Queue>, next: &Self) -> Result<Live> {
        let joining = self.joining.lock().clone();
        let mut live = Live::new();
        if self.live.is_empty() && joining.is_empty() {
            return Ok(live);
        }
        for entry in next.directory(queue).await?.entries.iter().filter(|entry| is_tracked(entry)) {
            let found = joining.iter().chain(&self.live).find(|tracked| tracked.name == entry.name);
            let Some(tracked) = found else { continue };
            live.push(if tracked.bits.size() == next.size {
                tracked.clone()
            } else {
                Arc::new(Tracked { name: tracked.name.clone(), bits: tracked.bits.resized(next.size) })
            });
        }
        Ok(live)
    }

    /// What memory bitmaps of so many bytes of bits would take, beside those that are there.
    pub(super) fn check_memory(&self, more: u64) -> Result<()> {
        let taken: u64 = self.live.iter().map(|tracked| tracked.bits.memory()).sum();
        let max = MEMORY_MAX;
        if taken.saturating_add(more) <= max {
            return Ok(());
        }
        let message = format!("its enabled bitmaps would take more than {} MiB of memory", max >> 20);
        Err(Error::new(ErrorKind::Unsupported, message).at_path(&self.path))
    }

    /// Marks all enabled bitmaps as in use, durably: before the first write. Those that are not tracked, as their extra data is not
    /// known, would miss every write too.
    pub(in crate::qcow2) async fn begin_tracking(&self, queue: &Rc<Queue>) -> Result<()> {
        if !self.header.lock().header.autoclear.contains(Autoclear::BITMAPS) {
            return Ok(());
        }
        let mut directory = self.directory(queue).await?;
        let flags = |entry: &DirectoryEntry| match entry.flags.contains(BitmapFlags::AUTO) {
            true => entry.flags | BitmapFlags::IN_USE,
            false => entry.flags,
        };
        self.write_flags(queue, &mut directory, flags).await
    }

    /// Writes the tracked bitmaps to the file, where they are in use no more. No request is in flight, and none comes.
    pub(crate) async fn save_bitmaps(&self, queue: &Rc<Queue>) -> Result<()> {
        if self.live.is_empty() || !self.writable {
            return Ok(());
        }
        let mut directory = self.directory(queue).await?;
        let mut entries = directory.entries.clone();
        let mut changed = false;
        for entry in &mut entries {
            let Some(tracked) = self.live(&entry.name) else { continue };
            if tracked.bits.is_changed() {
                *entry = self.store_bits(queue, &tracked.bits, entry).await?;
                changed = true;
            }
            entry.flags.remove(BitmapFlags::IN_USE);
        }
        if changed {
            self.switch_directory(queue, &directory, entries, true).await?;
        } else {
            // The file has them all.
            let flags = |entry: &DirectoryEntry| match self.live(&entry.name) {
                Some(_) => entry.flags.difference(BitmapFlags::IN_USE),
                None => entry.flags,
            };
            self.write_flags(queue, &mut directory, flags).await?;
        }
        self.finish(queue).await
    }

    /// Everything may have changed: sets all bits of all enabled bitmaps.
    pub(in crate::qcow2) fn mark_all_dirty(&self) {
        self.live.iter().for_each(|tracked| tracked.bits.set_all());
    }

    /// Makes a change of the disk to `size` bytes, over which bitmaps that are not enabled are kept too.
    pub(in crate::qcow2) async fn with_bitmaps_held(
        &self,
        queue: &Rc<Queue>,
        size: u64,
        work: impl AsyncFnOnce() -> Result<()>,
    ) -> Result<()> {
        if size == self.header.lock().header.size {
            return work().await;
        }
        let held = self.hold_bitmaps(queue, size).await?;
        let worked = work().await;
        if let Err(e) = self.put_back(queue, &held).await {
            tracing::warn!("{}: bitmaps are inconsistent from now on: {e}", self.path.display());
        }
        worked
    }

    /// Takes the bitmaps that are not enabled out of the file, before the disk gets `size` bytes: their tables will not fit it any more.
    /// Until they are [put back](Self::put_back) they are in use, so that nobody takes them for good.
    async fn hold_bitmaps(&self, queue: &Rc<Queue>, size: u64) -> Result<Held> {
        let mut directory = self.directory(queue).await?;
        let too_large = |entry: &&DirectoryEntry| entry.data_len(size) > limits::BITMAP_BYTES_MAX;
        let good = |entry: &DirectoryEntry| !entry.flags.intersects(BitmapFlags::IN_USE | BitmapFlags::AUTO);
        let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, message).at_path(&self.path));
        let live: Vec<_> = directory.entries.iter().filter(|e| good(e) || self.live(&e.name).is_some()).collect();
        if let Some(entry) = live.iter().copied().find(too_large) {
            let name = String::from_utf8_lossy(&entry.name);
            return refuse(format!("the bitmap '{name}' would be too large; remove it first"));
        }
        let grown: u64 = live.iter().filter(|e| !good(e)).map(|entry| entry.data_len(size)).sum();
        if grown > MEMORY_MAX {
            return refuse("its enabled bitmaps would take too much memory; remove some first".into());
        }
        let tables: u64 = directory.entries.iter().map(|entry| self.bitmap_table_len(entry, size)).sum();
        if tables.max(directory.tables_len()) > TABLES_MAX {
            return refuse("the tables of its bitmaps would be too large; remove some first".into());
        }
        let mut held = Vec::new();
        for entry in directory.entries.iter().filter(|entry| good(entry)) {
            if !entry.is_usable() {
                let name = String::from_utf8_lossy(&entry.name);
                return refuse(format!(
                    "the bitmap '{name}' has extra data that is not known, so it cannot be resized"
                ));
            }
            held.push(Tracked { name: entry.name.clone(), bits: self.load_bits(queue, entry).await? });
        }
        let names = |entry: &DirectoryEntry| held.iter().any(|tracked| tracked.name == entry.name);
        let flags = |entry: &DirectoryEntry| match names(entry) {
            true => entry.flags | BitmapFlags::IN_USE,
            false => entry.flags,
        };
        self.write_flags(queue, &mut directory, flags).await?;
        Ok(Held(held))
    }

    /// Puts back into the file what was held while the disk's size changed, or did not.
    async fn put_back(&self, queue: &Rc<Queue>, held: &Held) -> Result<()> {
        if held.0.is_empty() {
            return Ok(());
        }
        self.finish(queue).await?;
        let image = self.reload(queue).await?;
        let directory = image.directory(queue).await?;
        let mut entries = directory.entries.clone();
        for entry in &mut entries {
            let Some(tracked) = held.0.iter().find(|tracked| tracked.name == entry.name) else { continue };
            *entry = image.store_bits(queue, &tracked.bits.resized(image.size), entry).await?;
            entry.flags.remove(BitmapFlags::IN_USE);
        }
        image.switch_directory(queue, &directory, entries, true).await?;
        image.finish(queue).await
    }
}
