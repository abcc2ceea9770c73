//! Which chains of a queue have been taken and not been given back, in memory that outlives the process: the records that
//! whoever serves the queue after us goes on from (QEMU's docs/interop/vhost-user.rst, "Inflight I/O tracking", split virtqueues).
//!
//! The records are written before what they speak of, and cleared after it. A killed process leaves what it had written in the order
//! in which it wrote; so all that is needed between these stores, and between them and the used ring's index, is that the compiler
//! keeps them in order: each is a release store. A record and the header's fields share one word each, which changes as a
//! whole. The layout is that of a little-endian host, as are all that this runs on.
//!
//! What is read is untrusted: the front-end holds the memory. It is read once, by [`InflightQueue::recover`].
//!
//! Not here: where the memory comes from, and how it goes to the front-end and back (the transport).

use std::sync::atomic::{AtomicU64, Ordering};

use crate::SharedWords;

/// The version of the layout; 0 in memory that was never used.
const VERSION: u16 = 1;
/// Words before the descriptors' records.
const HEADER_WORDS: usize = 2;
/// Words of a descriptor's record: flag and link, counter.
const RECORD_WORDS: usize = 2;
/// An area is a multiple of 64 bytes, so that the next queue's starts on a cache line of its own.
const ALIGN_WORDS: usize = 8;

/// Why records cannot be gone on from.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// The memory ends before the records do.
    #[error("the in-flight records of a queue of {queue_size} need words {at} to {end} of a memory of {len} words")]
    TooSmall {
        /// Entries of the queue.
        queue_size: u16,
        /// Their first word.
        at: usize,
        /// The word behind them.
        end: usize,
        /// Words of the memory.
        len: usize,
    },
    /// They have flags that nobody has defined yet.
    #[error("the in-flight records have unknown features {0:#x}")]
    Features(u64),
    /// They have another layout.
    #[error("the in-flight records have version {0}, not {VERSION}")]
    Version(u16),
    /// They are of another queue.
    #[error("the in-flight records are of a queue of {recorded}, not {queue_size}")]
    QueueSize {
        /// What the records say.
        recorded: u16,
        /// Entries of the queue.
        queue_size: u16,
    },
    /// They are of another time, or another queue.
    #[error(
        "the in-flight records end at used index {recorded}, too far from the ring's {ring} for a queue of {queue_size}"
    )]
    UsedIndex {
        /// What the records say.
        recorded: u16,
        /// What the used ring says.
        ring: u16,
        /// Entries of the queue.
        queue_size: u16,
    },
    /// The list of the last batch leaves the queue.
    #[error("the in-flight records name descriptor {head} of a queue of {queue_size}")]
    Head {
        /// The descriptor.
        head: u16,
        /// Entries of the queue.
        queue_size: u16,
    },
}

/// What a worker needs to keep records, and to go on from those of a process that is dead.
pub struct Inflight {
    /// The queue's records, [recovered](InflightQueue::recover).
    pub records: InflightQueue,
    /// Heads of the chains to start again, in this order, before new ones: what recovering gave. The queue's next available
    /// entry lies as many behind the used index.
    pub resubmit: Vec<u16>,
}

/// One split queue's records.
pub struct InflightQueue {
    words: SharedWords,
    at: usize,
    size: u16,
    /// The memory was never used.
    fresh: bool,
    /// Our copy of the header, for nobody else writes it; what has become of the shared one is not looked at.
    last_batch_head: u16,
    used_idx: u16,
    counter: u64,
    /// Chains that are being given back, and the head that each links to.
    batch: Vec<(u16, u16)>,
}

impl InflightQueue {
    /// How many words a queue's records take: a multiple of 8, so that queue after queue is aligned to 64 bytes.
    #[must_use]
    pub fn words_for(queue_size: u16) -> usize {
        (HEADER_WORDS + RECORD_WORDS * usize::from(queue_size)).next_multiple_of(ALIGN_WORDS)
    }

    /// The records at word `at` of `words`. `queue_size` is that of the area, which the transport negotiated; the ring in use may have
    /// fewer entries, never more. [`recover`](Self::recover) comes next, once, also for memory that was never used.
    ///
    /// # Errors
    /// When the memory is too small, or holds records of another layout or size.
    pub fn new(words: SharedWords, at: usize, queue_size: u16) -> Result<Self, InflightError> {
        let area = (*words).as_ref();
        let end = at.saturating_add(Self::words_for(queue_size));
        if end > area.len() {
            return Err(InflightError::TooSmall { queue_size, at, end, len: area.len() });
        }
        let features = area[at].load(Ordering::Acquire);
        let [version, recorded, last_batch_head, used_idx] = quarters(area[at + 1].load(Ordering::Acquire));
        let fresh = version == 0;
        if !fresh {
            if features != 0 {
                return Err(InflightError::Features(features));
            }
            if version != VERSION {
                return Err(InflightError::Version(version));
            }
            if recorded != queue_size {
                return Err(InflightError::QueueSize { recorded, queue_size });
            }
        }
        let batch = Vec::with_capacity(queue_size.into());
        Ok(Self { words, at, size: queue_size, fresh, last_batch_head, used_idx, counter: 0, batch })
    }

    /// Brings the records in line with the used ring, whose index in guest memory is `used_idx`, and gives the heads of the chains that
    /// were taken and not given back, in the order in which they were taken. The next available entry is as many behind `used_idx`.
    ///
    /// # Errors
    /// When the records cannot be of this ring at this time, or make no sense.
    pub fn recover(&mut self, used_idx: u16) -> Result<Vec<u16>, InflightError> {
        if std::mem::take(&mut self.fresh) {
            let (last, _) = self.area().split_at(Self::words_for(self.size));
            last.iter().for_each(|word| word.store(0, Ordering::Release));
            self.last_batch_head = 0;
            self.set_used_idx(used_idx);
            return Ok(Vec::new());
        }
        // What the last batch gave back may still be marked as in flight.
        let batch = used_idx.wrapping_sub(self.used_idx);
        if batch > self.size {
            let recorded = self.used_idx;
            return Err(InflightError::UsedIndex { recorded, ring: used_idx, queue_size: self.size });
        }
        let mut head = self.last_batch_head;
        for _ in 0..batch {
            if head >= self.size {
                return Err(InflightError::Head { head, queue_size: self.size });
            }
            let [_, _, _, next] = quarters(self.record(head).load(Ordering::Acquire));
            self.record(head).store(link(next), Ordering::Release);
            head = next;
        }
        self.set_used_idx(used_idx);

        let mut taken: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.record(head).load(Ordering::Acquire) & 0xff != 0)
            .map(|head| (self.counter_of(head).load(Ordering::Acquire), head))
            .collect();
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(taken.into_iter().map(|(_, head)| head).collect())
    }

    /// A chain has been taken from the available ring; nothing has been done for it yet. A head beyond the queue is not recorded.
    pub fn taken(&mut self, head: u16) {
        if head < self.size {
            self.counter_of(head).store(self.counter, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
            self.record(head).store(IN_FLIGHT, Ordering::Release);
        }
    }

    /// A chain is about to be given back: before the used ring's index says so. Several of them make a batch.
    pub fn used(&mut self, head: u16) {
        if head < self.size && self.batch.len() < self.size.into() {
            let next = self.last_batch_head;
            self.record(head).store(link(next) | IN_FLIGHT, Ordering::Release);
            self.batch.push((head, next));
            self.last_batch_head = head;
            self.set_used_idx(self.used_idx);
        }
    }

    /// The batch has been given back: the used ring's index is `used_idx`.
    pub fn published(&mut self, used_idx: u16) {
        for &(head, next) in &self.batch {
            self.record(head).store(link(next), Ordering::Release);
        }
        self.batch.clear();
        self.set_used_idx(used_idx);
    }

    /// Stores the header's second word.
    fn set_used_idx(&mut self, used_idx: u16) {
        self.used_idx = used_idx;
        let word = [VERSION, self.size, self.last_batch_head, used_idx];
        let word = word.iter().rev().fold(0, |word, &quarter| word << 16 | u64::from(quarter));
        self.area()[1].store(word, Ordering::Release);
    }

    /// The words from the area's first on. [`new`](Self::new) has seen that they are all there, and a mapping does not shrink.
    fn area(&self) -> &[AtomicU64] {
        &(*self.words).as_ref()[self.at..]
    }

    /// The flag and the link of a descriptor below the queue's size.
    fn record(&self, head: u16) -> &AtomicU64 {
        &self.area()[HEADER_WORDS + RECORD_WORDS * usize::from(head)]
    }

    /// The counter of a descriptor below the queue's size.
    fn counter_of(&self, head: u16) -> &AtomicU64 {
        &self.area()[HEADER_WORDS + RECORD_WORDS * usize::from(head) + 1]
    }
}

/// The flag in a record: its first byte is 1.
const IN_FLIGHT: u64 = 1;

/// The link in a record: its last two bytes.
fn link(next: u16) -> u64 {
    u64::from(next) << 48
}

/// The four 16-bit fields of a word, the first in memory first.
fn quarters(word: u64) -> [u16; 4] {
    [word as u16, (word >> 16) as u16, (word >> 32) as u16, (word >> 48) as u16]
}

#[cfg(test)]
#[path = "inflight_test.rs"]
mod tests;
