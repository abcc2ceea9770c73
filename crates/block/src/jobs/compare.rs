//! Holds two disks against each other.
//!
//! What both say is zero is not read. Several workers read and compare side by side; of what they find, the first on the disk counts.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use super::copy::CopyEvent;
use super::copy::Listener;
use super::sparse::is_zero;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::io::Buffer;
use crate::queue::Queue;
use crate::request::Request;
use crate::status::{Content, Extent};
use crate::sync::{Arc, AsyncMutex};

/// The most bytes that one worker reads of each disk at once.
const BUFFER: u64 = 1 << 20;

/// How many parts are compared at once.
const WORKERS: usize = 4;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The same, where both are; what only the larger one has is zeros.
    Same,
    /// They differ in the sector at this offset, or the larger one has data there.
    Content(u64),
    /// Their sizes differ, which counts when strict.
    Size,
    /// From this offset on the one is data where the other is not, or is so in another way, which counts when strict.
    Allocation(u64),
}

/// Why two disks could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// What a disk is made of cannot be told.
    #[error("{error}")]
    Status {
        /// Whether it is the second disk's.
        second: bool,
        /// Why.
        #[source]
        error: Error,
    },
    /// A disk cannot be read.
    #[error("{error}")]
    Read {
        /// Whether it is the second disk.
        second: bool,
        /// Where on the disk, at the start of what was to be read.
        offset: u64,
        /// Why.
        #[source]
        error: Error,
    },
    /// Something else failed.
    #[error(transparent)]
    Other(#[from] Error),
}

type Outcome = std::result::Result<Verdict, CompareError>;

/// Compares two disks. With `strict` they must also have the same size and be allocated in the same way.
///
/// # Errors
/// One of them cannot be read.
pub fn compare(first: &Arc<Disk>, second: &Arc<Disk>, strict: bool, listener: Option<Listener>) -> Outcome {
    let disks = [first.clone(), second.clone()];
    let sizes = [first.size(), second.size()];
    if strict && sizes[0] != sizes[1] {
        return Ok(Verdict::Size);
    }
    let driver = first.storage().driver().map_err(|e| Error::io("cannot set up an I/O queue", e))?;
    let queue = Queue::for_copying(driver);
    let total = sizes[0].max(sizes[1]);
    let comparison = Rc::new(Comparison {
        numbers: [first.next_queue_number(), second.next_queue_number()],
        disks,
        sizes,
        strict,
        queue: queue.clone(),
        planning: AsyncMutex::default(),
        at: Cell::new(0),
        runs: RefCell::default(),
        done: Cell::new(0),
        total,
        found: RefCell::new(None),
        listener,
    });
    for _ in 0..WORKERS {
        let comparison = comparison.clone();
        queue.spawn(async move { comparison.work().await });
    }
    let mut outcomes = Vec::new();
    while queue.live_tasks() > 0 {
        if let Err(e) = queue.turn(true, &mut outcomes) {
            queue.shut_down();
            return Err(Error::io("the I/O queue failed", e).into());
        }
    }
    let found = comparison.found.borrow_mut().take();
    found.map_or(Ok(Verdict::Same), |(_, outcome)| outcome)
}

/// A part of both disks, and which of them has to be read there.
struct Part {
    range: Range<u64>,
    read: [bool; 2],
}

struct Comparison {
    disks: [Arc<Disk>; 2],
    numbers: [usize; 2],
    sizes: [u64; 2],
    strict: bool,
    queue: Rc<Queue>,
    planning: AsyncMutex,
    /// Up to where the parts have been given out.
    at: Cell<u64>,
    /// What is known of either disk from there on.
    runs: RefCell<[Option<Extent>; 2]>,
    done: Cell<u64>,
    total: u64,
    /// What was found first on the disk so far.
    found: RefCell<Option<(u64, Outcome)>>,
    listener: Option<Listener>,
}

impl Comparison {
    async fn work(&self) {
        let buffers = [0, 1].map(|_| Arc::new(Buffer::zeroed(BUFFER as usize)));
        while self.found.borrow().is_none() {
            let part = match self.next().await {
                Ok(Some(part)) => part,
                Ok(None) => return,
                Err((offset, outcome)) => return self.find(offset, outcome),
            };
            if let Err((offset, outcome)) = self.one(&part, &buffers).await {
                return self.find(offset, outcome);
            }
            self.done.set(self.done.get() + (part.range.end - part.range.start));
            if let Some(listener) = &self.listener {
                listener(CopyEvent::Progress { done: self.done.get(), total: self.total });
            }
        }
    }

    /// Parts that were taken before this one are still being compared, and may have something before it.
    fn find(&self, offset: u64, outcome: Outcome) {
        let mut found = self.found.borrow_mut();
        if found.as_ref().is_none_or(|(first, _)| offset < *first) {
            *found = Some((offset, outcome));
        }
    }

    async fn next(&self) -> std::result::Result<Option<Part>, (u64, Outcome)> {
        let _planning = self.planning.lock().await;
        let at = self.at.get();
        if at >= self.total {
            return Ok(None);
        }
        let mut end = self.total;
        let mut contents = [None, None];
        for which in [0, 1] {
            if at >= self.sizes[which] {
                continue;
            }
            let extent = self.extent(which, at).await;
            let extent = extent.map_err(|error| (at, Err(CompareError::Status { second: which == 1, error })))?;
            end = end.min(extent.range.end);
            contents[which] = Some((extent.content, extent.place.is_some()));
        }
        if let (true, [Some(first), Some(second)]) = (self.strict, contents)
            && first != second
        {
            return Err((at, Ok(Verdict::Allocation(at))));
        }
        let read = contents.map(|content| matches!(content, Some((Content::Data | Content::Compressed, _))));
        if read != [false, false] {
            end = end.min(at + BUFFER);
        }
        self.at.set(end);
        Ok(Some(Part { range: at..end, read }))
    }

    /// What a disk has at an offset. What was found before holds on.
    async fn extent(&self, which: usize, at: u64) -> Result<Extent> {
        let known = self.runs.borrow_mut()[which].take();
        let extent = match known.filter(|extent| extent.range.end > at) {
            Some(extent) => extent,
            None => self.look(which, at).await?,
        };
        self.runs.borrow_mut()[which] = Some(extent.clone());
        Ok(extent)
    }

    async fn look(&self, which: usize, at: u64) -> Result<Extent> {
        let (_entered, node) = self.disks[which].enter_to_look(self.numbers[which]).await?;
        let size = self.sizes[which];
        let mut found = node.extent(&self.queue, at, size - at).await?;
        // As much as is read at once, so that small pieces in a file make no small reads.
        while found.range.end < size && found.range.end - at < BUFFER {
            let next = node.extent(&self.queue, found.range.end, size - found.range.end).await?;
            if (next.content, next.place.is_some()) != (found.content, found.place.is_some()) {
                break;
            }
            found.range.end = next.range.end;
        }
        Ok(found)
    }

    async fn one(&self, part: &Part, buffers: &[Arc<Buffer>; 2]) -> std::result::Result<(), (u64, Outcome)> {
        let (offset, len) = (part.range.start, (part.range.end - part.range.start) as usize);
        for which in [0, 1] {
            if !part.read[which] {
                continue;
            }
            let data = vec![buffers[which].seg(0, len)];
            let read =
                self.disks[which].request(&self.queue, self.numbers[which], &Request::Read { offset, data }).await;
            read.map_err(|error| (offset, Err(CompareError::Read { second: which == 1, offset, error })))?;
        }
        let [first, second] = buffers;
        let differs = match part.read {
            [true, true] if first[..len] == second[..len] => None,
            [true, true] => first[..len].chunks(512).zip(second[..len].chunks(512)).position(|(a, b)| a != b),
            [true, false] => first_data(&first[..len]),
            [false, true] => first_data(&second[..len]),
            [false, false] => None,
        };
        match differs {
            None => Ok(()),
            Some(sector) => {
                let offset = offset + sector as u64 * 512;
                Err((offset, Ok(Verdict::Content(offset))))
            }
        }
    }
}

/// The first sector that is not all zeros.
fn first_data(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.chunks(512).position(|sector| !is_zero(sector)) }
}

#[cfg(test)]
#[path = "compare_test.rs"]
mod tests;
