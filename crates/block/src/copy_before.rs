//! Copy-before-write: a disk as it was at one moment, for a copy that is made while guests go on.
//!
//! The moment is when [`Disk::copy_before_write`] closes the gate: every write that came before is in, none that comes later
//! is. From then on a write (or a discard, or zeros) to a part that has not been copied waits until it has been; what guests wait for
//! is copied first. Whoever copies asks for the [next](CopyBeforeWrite::next) range, reads it with a queue of the disk, as guests
//! do, and says that it is [copied](CopyBeforeWrite::copied). A change of the disk's content as a whole waits for all that it
//! would overwrite. When the copy is given up nobody waits for it any more.
//!
//! A write waits before it enters ([`crate::grace`]): the gate can close while it does, and the copy's own reads, which have to
//! pass the gate, go on as soon as that opens.
//!
//! Locks: what is to be copied stands behind one lock, held only to look and to enlist; writes to what has been copied look at atomic
//! bits alone.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::Weak;
use std::task::{Poll, Waker};

use crate::disk::Disk;
use crate::error::Result;
use crate::granules::Granules;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};

/// What writers and the copy share.
pub(crate) struct Copying {
    /// What has been copied.
    copied: Granules,
    /// It is over, wherever it is: nobody waits any more.
    ended: AtomicBool,
    todo: Mutex<Todo>,
}

struct Todo {
    /// What has been given out to be copied, or has been copied.
    given: Granules,
    /// What somebody waits for, in granules; some of it may have been given out meanwhile.
    wanted: VecDeque<Range<u64>>,
    /// Before this granule everything has been given out.
    from: u64,
    waiting: Vec<Waker>,
}

impl Copying {
    fn new(size: u64, granularity: u64) -> Result<Self> {
        let given = Granules::new(size, granularity)?;
        let todo = Todo { given, wanted: VecDeque::new(), from: 0, waiting: Vec::new() };
        Ok(Self { copied: Granules::new(size, granularity)?, ended: AtomicBool::new(false), todo: Mutex::new(todo) })
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Whether nobody has to wait before writing these bytes.
    pub(crate) fn lets_write(&self, bytes: &Range<u64>) -> bool {
        self.has_ended() || self.copied.has_all(&self.copied.of(bytes))
    }

    /// Waits until these bytes may be written, and sees to it that they come first.
    pub(crate) async fn until_copied(&self, bytes: &Range<u64>) {
        let mut enlisted = false;
        poll_fn(|cx| {
            let mut todo = self.todo.lock();
            if self.lets_write(bytes) {
                return Poll::Ready(());
            }
            if !std::mem::replace(&mut enlisted, true) {
                todo.wanted.push_back(self.copied.of(bytes));
            }
            todo.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn end(&self) {
        let waiting = {
            let mut todo = self.todo.lock();
            self.ended.store(true, Ordering::SeqCst);
            std::mem::take(&mut todo.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Todo {
    /// At most `max` granules that have not been given out, those first that somebody waits for.
    fn next_granules(&mut self, max: u64) -> Option<Range<u64>> {
        while let Some(wanted) = self.wanted.front_mut() {
            if let Some(run) = self.given.run(wanted, false, max) {
                wanted.start = run.end;
                return Some(run);
            }
            self.wanted.pop_front();
        }
        let run = self.given.run(&(self.from..self.given.count()), false, max)?;
        self.from = run.end;
        Some(run)
    }
}

/// A copy in the making of a disk as it was at one moment. Dropped, it is given up: nobody waits for it any more.
pub struct CopyBeforeWrite {
    shared: Arc<Copying>,
    granularity: u64,
    disk: Weak<Disk>,
}

impl CopyBeforeWrite {
    pub(crate) fn new(disk: &Arc<Disk>, granularity: u64) -> Result<(Self, Arc<Copying>)> {
        let shared = Arc::new(Copying::new(disk.size(), granularity)?);
        Ok((Self { shared: shared.clone(), granularity, disk: Arc::downgrade(disk) }, shared))
    }

    /// The size in bytes of what is copied: the disk's at that moment.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shared.copied.size()
    }

    /// In which units it is copied, in bytes.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// The next range, in bytes, to be read and copied: at most `max` (but one unit at least), what guests wait for first. None if all
    /// has been given out. It has to be answered by [`copied`](Self::copied) or [`failed`](Self::failed).
    #[must_use]
    pub fn next(&self, max: u64) -> Option<Range<u64>> {
        let mut todo = self.shared.todo.lock();
        let granules = todo.next_granules((max / self.granularity).max(1))?;
        todo.given.set_granules(&granules);
        Some(self.shared.copied.bytes(&granules))
    }

    /// Whether somebody waits for what has not been given out yet.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        let todo = self.shared.todo.lock();
        todo.wanted.iter().any(|wanted| todo.given.run(wanted, false, 1).is_some())
    }

    /// A range that was given out has been read and is safe: it may be overwritten.
    pub fn copied(&self, bytes: &Range<u64>) {
        self.shared.copied.set(bytes);
        let waiting = std::mem::take(&mut self.shared.todo.lock().waiting);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// A range that was given out could not be copied: it will be given out again.
    pub fn failed(&self, bytes: &Range<u64>) {
        let mut todo = self.shared.todo.lock();
        let granules = self.shared.copied.of(bytes);
        todo.given.clear_granules(&granules);
        todo.from = todo.from.min(granules.start);
        // Somebody may be waiting for it.
        if !todo.waiting.is_empty() {
            todo.wanted.push_back(granules);
        }
    }

    /// How many units have been copied, of how many.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.shared.copied.set_count(), self.shared.copied.count())
    }

    /// Whether all has been copied.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.shared.copied.has_all(&(0..self.shared.copied.count()))
    }

    /// Ends the copy, complete or not, and takes it off the disk, which blocks as [`Disk::copy_before_write`] does. (Dropped
    /// alone, it costs each write of the disk a little until the next change of its followers.)
    ///
    /// # Errors
    /// When the host has no room for a queue.
    pub fn finish(self) -> Result<()> {
        self.shared.end();
        self.disk.upgrade().map_or(Ok(()), |disk| disk.forget_ended_hooks())
    }
}

impl Drop for CopyBeforeWrite {
    fn drop(&mut self) {
        self.shared.end();
    }
}

#[cfg(test)]
#[path = "copy_before_test.rs"]
mod tests;
