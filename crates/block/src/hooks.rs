//! Who follows the writes to a disk while queues run: copies that have to see what is about to be overwritten
//! ([`crate::copy_before`]), and trackers of what has been written ([`crate::tracker`]).
//!
//! They belong to the disk, whatever its topmost layer is, and change only while its gate is closed. So each request has those of the
//! time when it entered, and a queue of a disk that nobody follows does nothing for them: it has none at hand, as it has its
//! layer at hand. With followers, what writes becomes a task: it waits for copies before it enters, and marks what it
//! touched when it leaves.

use std::ops::Range;

use crate::copy_before::{CopyBeforeWrite, Copying};
use crate::disk::Disk;
use crate::error::Result;
use crate::granules::Granules;
use crate::sync::Arc;
use crate::tracker::{DirtyTracker, Tracking};

/// The followers of a disk at one time.
#[derive(Clone, Default)]
pub(crate) struct Hooks {
    copies: Vec<Arc<Copying>>,
    trackers: Vec<(Arc<Tracking>, Arc<Granules>)>,
}

impl Hooks {
    /// A copy that has to be waited for before these bytes are written.
    pub(crate) fn obstacle(&self, bytes: &Range<u64>) -> Option<Arc<Copying>> {
        self.copies.iter().find(|copy| !copy.lets_write(bytes)).cloned()
    }

    /// These bytes were written, or may have been.
    pub(crate) fn mark(&self, bytes: &Range<u64>) {
        self.trackers.iter().for_each(|(_, granules)| granules.set(bytes));
    }

    /// Those that have not ended, and none at all if there are none.
    fn living(&self) -> Option<Arc<Self>> {
        let copies: Vec<_> = self.copies.iter().filter(|copy| !copy.has_ended()).cloned().collect();
        let living = self.trackers.iter().filter(|(tracker, _)| !tracker.has_ended());
        let trackers: Vec<_> = living.map(|(tracker, _)| (tracker.clone(), tracker.current())).collect();
        (!copies.is_empty() || !trackers.is_empty()).then(|| Arc::new(Self { copies, trackers }))
    }

    /// The same for a disk that has `size` bytes from now on. No write is in flight.
    pub(crate) fn resized(&self, size: u64) -> Option<Arc<Self>> {
        self.trackers.iter().for_each(|(tracker, _)| tracker.resize(size));
        self.living()
    }
}

impl Disk {
    /// Begins a copy of the disk as it is at one moment between the call and its end, made while guests go on, in units of
    /// `granularity` bytes (its clusters' size if not given). Several can go on at once.
    ///
    /// Blocks the calling thread, which must not be one that serves a queue of this disk with requests in flight.
    ///
    /// # Errors
    /// A granularity that is not a power of two of at least 512, or too small for the disk; a disk whose change was cut short.
    pub fn copy_before_write(self: &Arc<Self>, granularity: Option<u64>) -> Result<CopyBeforeWrite> {
        let disk = self.clone();
        self.alone(async move |_, _| disk.copy_before_write_on(granularity).await)
    }

    /// Follows all writes that are answered from now on, in units of `granularity` bytes (its clusters' size if not given). With
    /// `all` everything is taken for written.
    ///
    /// Blocks the calling thread, which must not be one that serves a queue of this disk with requests in flight.
    ///
    /// # Errors
    /// As [`copy_before_write`](Self::copy_before_write).
    pub fn track_writes(self: &Arc<Self>, granularity: Option<u64>, all: bool) -> Result<DirtyTracker> {
        let disk = self.clone();
        self.alone(async move |_, _| disk.track_writes_on(granularity, all).await)
    }

    pub(crate) async fn copy_before_write_on(self: &Arc<Self>, granularity: Option<u64>) -> Result<CopyBeforeWrite> {
        let _changes = self.changes().lock().await;
        let (copy, shared) = CopyBeforeWrite::new(self, self.granularity(granularity))?;
        self.change_hooks(|hooks| hooks.copies.push(shared)).await?;
        Ok(copy)
    }

    pub(crate) async fn track_writes_on(self: &Arc<Self>, granularity: Option<u64>, all: bool) -> Result<DirtyTracker> {
        let _changes = self.changes().lock().await;
        let (tracker, shared) = DirtyTracker::new(self, self.granularity(granularity), all)?;
        let granules = shared.current();
        self.change_hooks(|hooks| hooks.trackers.push((shared, granules))).await?;
        Ok(tracker)
    }

    fn granularity(&self, given: Option<u64>) -> u64 {
        given.unwrap_or_else(|| self.node().granularity().into())
    }

    /// Takes those off the disk that have ended.
    pub(crate) fn forget_ended_hooks(self: &Arc<Self>) -> Result<()> {
        self.alone(async |disk, _| {
            let _changes = disk.changes().lock().await;
            disk.change_hooks(|_| {}).await
        })
    }

    /// Changes who follows the disk while no request is in flight. The caller holds [`Disk::changes`].
    async fn change_hooks(&self, change: impl FnOnce(&mut Hooks)) -> Result<()> {
        let closed = self.grace().close().await;
        self.check_whole()?;
        let mut hooks = self.hooks().map(|hooks| (*hooks).clone()).unwrap_or_default();
        change(&mut hooks);
        self.replace_hooks(hooks.living());
        drop(closed);
        Ok(())
    }

    /// Waits until all copies in the making have what lies in these bytes, which are to change otherwise than by a request. The caller
    /// holds [`Disk::changes`], so no copy can begin afterwards.
    pub(crate) async fn until_copied(&self, bytes: Range<u64>) {
        let Some(hooks) = self.hooks() else { return };
        while let Some(copy) = hooks.obstacle(&bytes) {
            copy.until_copied(&bytes).await;
        }
    }

    /// Refuses a size that those who follow the disk cannot follow.
    pub(crate) fn check_followed(&self, size: u64) -> Result<()> {
        let Some(hooks) = self.hooks() else { return Ok(()) };
        let fits =
            |(_, granules): &(_, Arc<Granules>)| granules.check_size(size).map_err(|e| e.at_path(self.node().path()));
        hooks.trackers.iter().try_for_each(fits)
    }

    /// All of the disk's content changes. The gate is closed.
    pub(crate) fn mark_all(&self) {
        if let Some(hooks) = self.hooks() {
            hooks.mark(&(0..u64::MAX));
        }
    }
}
