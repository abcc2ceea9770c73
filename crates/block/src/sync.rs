//! Locks and waiting: the shim through which all of the engine's threads meet.
//!
//! The plain types come from one place, so that the same code can run under a model checker (shuttle, in tests with the feature of that
//! name; their files are called `*_model.rs`). [`AsyncMutex`] and [`RangeLocks`]
//! are for tasks: waiting for them parks the task, never the thread.
//!
//! Lock order: both hold their inner lock only to look and to enlist, and wake others after giving it back.

use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

pub(crate) use std::sync::{Arc, OnceLock};

#[cfg(all(test, feature = "shuttle"))]
use shuttle::sync as plain;
#[cfg(not(all(test, feature = "shuttle")))]
use std::sync as plain;

pub(crate) use plain::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::mutation::Mutation;

/// A mutex whose poison is ignored: the engine's invariants are restored by its callers' error paths, not by panics.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(plain::Mutex<T>);

pub(crate) use plain::MutexGuard;

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(plain::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Adds a task to those that wait, once: one that awaits several futures would be woken for each, enlist for each again, and so
/// be woken ever more often.
pub(crate) fn enlist(waiting: &mut Vec<Waker>, waker: &Waker) {
    if !waiting.iter().any(|other| other.will_wake(waker)) {
        waiting.push(waker.clone());
    }
}

#[derive(Default)]
struct Gate {
    held: bool,
    waiting: Vec<Waker>,
}

/// A lock that tasks hold across I/O.
#[derive(Default)]
pub(crate) struct AsyncMutex(Mutex<Gate>);

/// Holds an [`AsyncMutex`].
pub(crate) struct AsyncGuard<'a>(&'a AsyncMutex);

impl AsyncMutex {
    pub(crate) async fn lock(&self) -> AsyncGuard<'_> {
        poll_fn(|cx| {
            let mut gate = self.0.lock();
            if gate.held {
                enlist(&mut gate.waiting, cx.waker());
                return Poll::Pending;
            }
            gate.held = true;
            Poll::Ready(AsyncGuard(self))
        })
        .await
    }
}

impl Drop for AsyncGuard<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut gate = self.0.0.lock();
            gate.held = false;
            // All of them: one that was dropped meanwhile must not swallow the only wake-up.
            if Mutation::OneWaiterWoken.is_on() {
                gate.waiting.truncate(1);
            }
            std::mem::take(&mut gate.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// Locks on ranges of guest clusters: one writer at a time to clusters whose mapping changes, nothing else waits.
#[derive(Default)]
pub(crate) struct RangeLocks(Mutex<Ranges>);

#[derive(Default)]
struct Ranges {
    held: Vec<Range<u64>>,
    waiting: Vec<Waker>,
}

/// Holds a range of a [`RangeLocks`].
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: Range<u64>,
}

impl RangeLocks {
    /// Waits until no part of `range` is held, and takes all of it at once: holders of one range never wait for
    /// another while half of theirs is taken, so there is no deadlock among writers.
    pub(crate) async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        poll_fn(|cx| {
            let mut ranges = self.0.lock();
            let overlaps = |held: &Range<u64>| match Mutation::RangesComparedByStart.is_on() {
                false => held.start < range.end && range.start < held.end,
                true => held.start == range.start,
            };
            if ranges.held.iter().any(overlaps) {
                enlist(&mut ranges.waiting, cx.waker());
                return Poll::Pending;
            }
            ranges.held.push(range.clone());
            Poll::Ready(())
        })
        .await;
        RangeGuard { locks: self, range }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut ranges = self.locks.0.lock();
            if let Some(at) = ranges.held.iter().position(|held| *held == self.range) {
                ranges.held.swap_remove(at);
            }
            std::mem::take(&mut ranges.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// So many permits for tasks, which hold them across I/O.
pub(crate) struct Permits {
    count: usize,
    state: Mutex<PermitState>,
}

#[derive(Default)]
struct PermitState {
    taken: usize,
    waiting: Vec<Waker>,
}

/// Holds one of [`Permits`].
pub(crate) struct Permit<'a>(&'a Permits);

impl Permits {
    pub(crate) fn new(count: usize) -> Self {
        Self { count, state: Mutex::default() }
    }

    pub(crate) async fn take(&self) -> Permit<'_> {
        poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.taken >= self.count {
                enlist(&mut state.waiting, cx.waker());
                return Poll::Pending;
            }
            state.taken += 1;
            Poll::Ready(Permit(self))
        })
        .await
    }

    /// How many are held.
    pub(crate) fn taken(&self) -> usize {
        self.state.lock().taken
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.state.lock();
            state.taken -= 1;
            // All of them: one that was dropped meanwhile must not swallow the only wake-up.
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}
#[cfg(all(test, feature = "shuttle"))]
#[path = "sync_model.rs"]
mod model;
#[cfg(all(test, feature = "shuttle"))]
pub(crate) use model::model_of;
