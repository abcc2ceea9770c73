//! A dirty tracker: which parts of a disk were written since somebody last looked, for copies that converge on a disk which guests go
//! on to write (a mirror).
//!
//! A write marks what it touched when it is over and before its answer is seen, however it ended. So whoever
//! [takes](DirtyTracker::next) a range and reads it afterwards has either what the write left, or a mark that will make him read
//! it again; and when no write is in flight and nothing is marked, what he has is the disk.
//!
//! Locks: writers mark atomic bits alone. The lock of the current bits is the copier's, and that of a change of the disk's size, which is
//! made while no write is in flight.

use std::ops::Range;
use std::sync::Weak;

use crate::disk::Disk;
use crate::error::Result;
use crate::granules::Granules;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};

/// What writers and the one who looks share.
pub(crate) struct Tracking {
    current: Mutex<Arc<Granules>>,
    ended: AtomicBool,
}

impl Tracking {
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// The bits as they are now.
    pub(crate) fn current(&self) -> Arc<Granules> {
        self.current.lock().clone()
    }

    /// The disk has `size` bytes from now on, which was [checked](Granules::check_size). No write is in flight.
    pub(crate) fn resize(&self, size: u64) {
        let mut current = self.current.lock();
        *current = Arc::new(current.resized(size));
    }
}

/// Follows the writes to a disk. Dropped, it follows no more.
pub struct DirtyTracker {
    shared: Arc<Tracking>,
    granularity: u64,
    /// Where the last range that was taken ended, in granules.
    from: Mutex<u64>,
    disk: Weak<Disk>,
}

impl DirtyTracker {
    pub(crate) fn new(disk: &Arc<Disk>, granularity: u64, all: bool) -> Result<(Self, Arc<Tracking>)> {
        let granules = Granules::new(disk.size(), granularity)?;
        if all {
            granules.set(&(0..disk.size()));
        }
        let shared = Tracking { current: Mutex::new(Arc::new(granules)), ended: AtomicBool::new(false) };
        let shared = Arc::new(shared);
        Ok((Self { shared: shared.clone(), granularity, from: Mutex::new(0), disk: Arc::downgrade(disk) }, shared))
    }

    /// The unit in which writes are followed, in bytes.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Takes the next range, in bytes, that was written: at most `max` (but one unit at least), going round the disk. It is marked no
    /// more, unless it is written again; one that cannot be copied has to be [given back](Self::give_back). The disk may have
    /// shrunk by the time that it is read.
    #[must_use]
    pub fn next(&self, max: u64) -> Option<Range<u64>> {
        let mut from = self.from.lock();
        // Held, so that a change of the size does not copy bits that are about to be cleared, or lose them.
        let current = self.shared.current.lock();
        let max = (max / self.granularity).max(1);
        let run = current.run(&(*from..current.count()), true, max).or_else(|| current.run(&(0..*from), true, max))?;
        current.clear_granules(&run);
        *from = run.end;
        Some(current.bytes(&run))
    }

    /// Marks a range, in bytes.
    pub fn give_back(&self, bytes: &Range<u64>) {
        self.shared.current.lock().set(bytes);
    }

    /// How many bytes are marked, in whole units.
    #[must_use]
    pub fn dirty(&self) -> u64 {
        self.shared.current.lock().set_count() * self.granularity
    }

    /// Follows no more, which blocks as [`Disk::track_writes`] does. (Dropped alone, it costs each write of the disk a little until the
    /// next change of its followers.)
    ///
    /// # Errors
    /// When the host has no room for a queue.
    pub fn finish(self) -> Result<()> {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.disk.upgrade().map_or(Ok(()), |disk| disk.forget_ended_hooks())
    }
}

impl Drop for DirtyTracker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[path = "tracker_test.rs"]
mod tests;
