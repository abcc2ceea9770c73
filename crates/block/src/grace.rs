//! When nobody can any more be using a cluster that was taken out of the mapping.
//!
//! A request looks a cluster's place up and then reads or writes there without a lock. Once the mapping has dropped a
//! cluster, new requests cannot find it, but those that began before may still be writing to it: it must not be used again
//! before they have ended. Each request therefore [enters](Grace::enter) and leaves; a cluster dropped at epoch `e` is free of
//! users when the epoch has reached `e + 2`.
//!
//! Counters are by queue, so that queues do not share a cache line. No locks.

use crate::sync::{AtomicU64, Ordering};

/// Queues beyond this many share counters.
const LANES: usize = 32;

/// One queue's requests in flight, by the parity of the epoch they began in.
#[derive(Default)]
#[repr(align(64))]
struct Lane([AtomicU64; 2]);

/// The requests in flight, by epoch.
#[derive(Default)]
pub(crate) struct Grace {
    epoch: AtomicU64,
    lanes: [Lane; LANES],
}

/// What a request holds from before it looks a place up until it is over.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Ticket {
    lane: usize,
    parity: usize,
}

impl Grace {
    /// A request of queue number `queue` begins.
    pub(crate) fn enter(&self, queue: usize) -> Ticket {
        let lane = queue % LANES;
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let parity = (epoch & 1) as usize;
            self.lanes[lane].0[parity].fetch_add(1, Ordering::SeqCst);
            // Counted under an epoch that has meanwhile passed, we might have been overlooked: count again.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Ticket { lane, parity };
            }
            self.lanes[lane].0[parity].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The request is over.
    pub(crate) fn leave(&self, ticket: Ticket) {
        self.lanes[ticket.lane].0[ticket.parity].fetch_sub(1, Ordering::SeqCst);
    }

    /// The epoch to note beside something that was just taken out of the mapping.
    pub(crate) fn stamp(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Moves the epoch on as far as the requests in flight allow, and says whether what was stamped `stamp` has no users left.
    /// One caller at a time (the commit's lock).
    pub(crate) fn passed(&self, stamp: u64) -> bool {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch >= stamp + 2 {
                return true;
            }
            let other = ((epoch + 1) & 1) as usize;
            if self.lanes.iter().any(|lane| lane.0[other].load(Ordering::SeqCst) != 0) {
                return false;
            }
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
#[path = "grace_test.rs"]
mod tests;
