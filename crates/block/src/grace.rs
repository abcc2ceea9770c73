//! When nobody can any more be using a cluster that was taken out of the mapping; and the gate behind which a disk changes as a
//! whole.
//!
//! A request looks a cluster's place up and then reads or writes there without a lock. Once the mapping has dropped a
//! cluster, new requests cannot find it, but those that began before may still be writing to it: it must not be used again
//! before they have ended. Each request therefore [enters](Grace::enter) and leaves; a cluster dropped at epoch `e` is free of
//! users when the epoch has reached `e + 2`.
//!
//! Some changes (a snapshot, another size) are made while no request is in flight at all: [`Grace::close`] turns new requests away,
//! which wait for the [opening](Grace::opened), and waits until those that are in have left. On the way of a request that
//! costs nothing: the gate is a bit of the epoch, which is looked at anyway.
//!
//! Counters are by queue, so that queues do not share a cache line. Locks: the lists of who waits, held only to enlist and to take.

use std::future::poll_fn;
use std::task::{Poll, Waker};

use crate::mutation::Mutation;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering};

/// Queues beyond this many share counters.
const LANES: usize = 32;

/// The bit of the state that says that the gate is closed; the epoch is counted above it.
const CLOSED: u64 = 1;
const EPOCH: u64 = 2;

/// The counter of the flushes in a lane: they use no place of guest data, and would only wait for themselves.
const FLUSHES: usize = 2;

/// One queue's requests in flight, by the parity of the epoch they began in, and its flushes.
#[derive(Default)]
#[repr(align(64))]
struct Lane([AtomicU64; 3]);

/// The requests in flight, by epoch.
#[derive(Default)]
pub(crate) struct Grace {
    state: AtomicU64,
    lanes: [Lane; LANES],
    /// A change was cut short: what is in memory does not fit the file any more, and the gate never opens again.
    broken: AtomicBool,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Who closes the gate, until all have left.
    idle: Vec<Waker>,
    /// Who wants to enter.
    open: Vec<Waker>,
}

/// What a request holds from before it looks a place up until it is over.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Ticket {
    lane: usize,
    counter: usize,
}

/// A closed gate with nobody inside. It opens when this is dropped, unless a change has [begun](Closed::begin) that is not
/// [finished](Closed::finish).
pub(crate) struct Closed<'a> {
    grace: &'a Grace,
    changing: bool,
}

impl Closed<'_> {
    /// From now on what is in memory may not fit the file.
    pub(crate) fn begin(&mut self) {
        self.changing = true;
    }

    /// It fits again.
    pub(crate) fn finish(mut self) {
        self.changing = false;
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        if self.changing {
            self.grace.broken.store(true, Ordering::SeqCst);
        } else if !self.grace.is_broken() {
            self.grace.state.fetch_and(!CLOSED, Ordering::SeqCst);
        }
        let waiting = std::mem::take(&mut self.grace.waiting.lock().open);
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Grace {
    /// A request of queue number `queue` begins; a flush says so. None while the gate is closed.
    pub(crate) fn enter(&self, queue: usize, flush: bool) -> Option<Ticket> {
        let lane = queue % LANES;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            if state & CLOSED != 0 {
                return None;
            }
            let counter = if flush { FLUSHES } else { parity(state / EPOCH) };
            let ticket = Ticket { lane, counter };
            self.lanes[lane].0[counter].fetch_add(1, Ordering::SeqCst);
            // Counted under an epoch that has meanwhile passed, or behind a gate that has closed, we might have been
            // overlooked: count again.
            if self.state.load(Ordering::SeqCst) == state || Mutation::EnterLooksOnce.is_on() {
                return Some(ticket);
            }
            self.leave(ticket);
        }
    }

    /// The request is over.
    pub(crate) fn leave(&self, ticket: Ticket) {
        self.lanes[ticket.lane].0[ticket.counter].fetch_sub(1, Ordering::SeqCst);
        // Either we see that the gate is closed, or who closes it sees that we have left.
        if self.state.load(Ordering::SeqCst) & CLOSED != 0 && !Mutation::LeaveTellsNobody.is_on() {
            let waiting = std::mem::take(&mut self.waiting.lock().idle);
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    /// The epoch to note beside something that was just taken out of the mapping.
    pub(crate) fn stamp(&self) -> u64 {
        self.state.load(Ordering::SeqCst) / EPOCH
    }

    /// Moves the epoch on as far as the requests in flight allow, and says whether what was stamped `stamp` has no users left.
    /// One caller at a time (the commit's lock).
    pub(crate) fn passed(&self, stamp: u64) -> bool {
        loop {
            let epoch = self.stamp();
            if epoch >= stamp + if Mutation::OneEpochIsEnough.is_on() { 1 } else { 2 } {
                return true;
            }
            let other = parity(epoch + 1);
            if self.lanes.iter().any(|lane| lane.0[other].load(Ordering::SeqCst) != 0) {
                return false;
            }
            // Not a store: the gate may close or open meanwhile.
            self.state.fetch_add(EPOCH, Ordering::SeqCst);
        }
    }

    /// Closes the gate, and waits until all requests and flushes that are in have left. One caller at a time.
    pub(crate) async fn close(&self) -> Closed<'_> {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        let closed = Closed { grace: self, changing: false };
        poll_fn(|cx| {
            self.waiting.lock().idle.push(cx.waker().clone());
            let inside = |lane: &Lane| lane.0.iter().any(|counter| counter.load(Ordering::SeqCst) != 0);
            if self.lanes.iter().any(inside) { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        closed
    }

    /// Waits until the gate is open; false if it never will be again.
    pub(crate) async fn opened(&self) -> bool {
        let look = || {
            let closed = self.state.load(Ordering::SeqCst) & CLOSED != 0;
            if self.is_broken() { Some(false) } else { (!closed).then_some(true) }
        };
        poll_fn(|cx| {
            if let Some(open) = look() {
                return Poll::Ready(open);
            }
            self.waiting.lock().open.push(cx.waker().clone());
            // Looked at again after enlisting: whoever opens it later finds us.
            look().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Whether a change was cut short, so that what is in memory does not fit the file.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }
}

fn parity(epoch: u64) -> usize {
    (epoch & 1) as usize
}

#[cfg(test)]
#[path = "grace_test.rs"]
mod tests;

#[cfg(all(test, feature = "shuttle"))]
#[path = "grace_model.rs"]
mod model;
