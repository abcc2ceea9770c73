//! Fills a disk from others: reads what they have, finds the zeros, and writes the rest, with many reads and writes under way at once.
//!
//! Several workers, each a task with a buffer of its own, take the parts of the copy in order ([`super::plan`]). Reads overlap with each
//! other and with writes. Writes are made in the order of their offsets, so that what lies together on the disk lies together in the
//! target's file, unless the order is given up for speed. What is compressed is compressed by the pool that computes, many clusters at
//! once.
//!
//! Not here: making the target, and whether it looks whole before it is ([`crate::filling`]).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::plan::{Chunk, Plan, Rules, Source, What, total};
use super::sparse::{self, Part};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffer, zero_segs};
use crate::join::join_some;
use crate::queue::Queue;
use crate::request::Request;
use crate::sync::{Arc, AsyncMutex};

/// The most bytes that one worker reads at once, and holds.
const BUFFER: u64 = 1 << 20;

/// The most bytes of zeros that one request writes.
const ZEROS: u64 = 1 << 30;

/// How many parts of one buffer are written at once.
const PARTS_AT_ONCE: usize = 16;

/// The most workers.
pub const WORKERS_MAX: usize = 16;

/// How a copy is made.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// How many reads and writes are under way at once: 1 to [`WORKERS_MAX`].
    pub workers: usize,
    /// Writes need not begin in the order of their offsets.
    pub out_of_order: bool,
    /// Data is written compressed.
    pub compressed: bool,
    /// So many bytes of zeros are left out, or written as zeros, where they are between data. 0: everything is written as data.
    pub sparse: u64,
    /// The target reads as zeros where nothing is written.
    pub target_is_zero: bool,
    /// The target has a backing file with the content of the source's: only what the sources' topmost layers have is copied.
    pub over_backing: bool,
    /// What cannot be read is told, and left as zeros.
    pub salvage: bool,
    /// The most bytes a second.
    pub rate: Option<u64>,
    /// Has the host copy from file to file, where source and target are raw and the host can; such data is not searched for zeros.
    pub offload: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            workers: 8,
            out_of_order: false,
            compressed: false,
            sparse: 4096,
            target_is_zero: false,
            over_backing: false,
            salvage: false,
            rate: None,
            offload: false,
        }
    }
}

/// What a copy has to tell while it goes on.
#[derive(Debug)]
pub enum CopyEvent<'a> {
    /// So many bytes of so many are done.
    Progress {
        /// Bytes of data that were read and written.
        done: u64,
        /// All that there are.
        total: u64,
    },
    /// Something could not be read, and is zeros in the target.
    Unreadable {
        /// Where in its source.
        offset: u64,
        /// Why.
        error: &'a Error,
    },
}

/// Hears of a copy's events.
pub type Listener = Rc<dyn Fn(CopyEvent<'_>)>;

/// What a copy was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Looking at the source's metadata.
    Looking,
    /// Reading the source.
    Reading,
    /// Writing the target.
    Writing,
    /// Everything else.
    Working,
}

/// Why a copy ended early.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct CopyError {
    /// What it was doing.
    pub doing: Doing,
    /// Where: an offset of the source for [`Doing::Looking`], else of the copy.
    pub offset: u64,
    /// What happened.
    #[source]
    pub error: Error,
}

impl CopyError {
    fn working(error: Error) -> Self {
        Self { doing: Doing::Working, offset: 0, error }
    }
}

/// Copies `sources`, one behind another, to the beginning of `target`. What `target` has behind them stays. Nothing is flushed.
///
/// # Errors
/// The target is smaller than the sources; compressed clusters that it cannot have; the host's. What was written stays.
pub fn copy(
    sources: &[Arc<Disk>],
    target: &Arc<Disk>,
    options: &CopyOptions,
    listener: Option<Listener>,
) -> std::result::Result<(), CopyError> {
    let sources = Rc::new(Source::chain(sources));
    let size = sources.last().map_or(0, |source| source.range.end);
    let refuse =
        |message| Err(CopyError::working(Error::new(ErrorKind::Invalid, message).at_path(&target.spec().path)));
    if size > target.size() {
        return refuse("the disk is smaller than what is to be copied to it");
    }
    let unit = if options.compressed { u64::from(target.limits().discard_granularity) } else { 1 };
    let rules = Rules {
        most: BUFFER.max(unit),
        unit,
        backing: if options.over_backing {
            Some(target.node().backing().map_or(0, |below| below.size()))
        } else {
            None
        },
        salvage: options.salvage,
    };
    let driver =
        target.storage().driver().map_err(|e| CopyError::working(Error::io("cannot set up an I/O queue", e)))?;
    let queue = Queue::for_copying(driver);
    let copy = Rc::new(Copy {
        plan: RefCell::new(Some(Plan::new(sources.clone(), rules))),
        planning: AsyncMutex::default(),
        rules,
        target: target.clone(),
        number: target.next_queue_number(),
        begun: target.storage().now(),
        sources,
        options: options.clone(),
        listener,
        begun_parts: Counter::default(),
        ended_parts: Counter::default(),
        taken: Cell::new(0),
        done: Cell::new(0),
        total: Cell::new(0),
        failed: RefCell::new(None),
        offload: Cell::new(options.offload),
        queue: queue.clone(),
    });
    for worker in 0..options.workers.clamp(1, WORKERS_MAX) {
        let copy = copy.clone();
        queue.spawn(async move { copy.work(worker == 0).await });
    }
    let mut outcomes = Vec::new();
    while queue.live_tasks() > 0 {
        if let Err(e) = queue.turn(true, &mut outcomes) {
            queue.shut_down();
            return Err(CopyError::working(Error::io("the I/O queue failed", e)));
        }
    }
    let failed = copy.failed.borrow_mut().take();
    failed.map_or(Ok(()), Err)
}

/// A copy that is being made.
struct Copy {
    sources: Rc<Vec<Source>>,
    target: Arc<Disk>,
    /// By which its requests to the target are counted.
    number: usize,
    options: CopyOptions,
    rules: Rules,
    /// Taken out by who plans, who holds `planning`.
    plan: RefCell<Option<Plan>>,
    planning: AsyncMutex,
    /// How many parts have been given out.
    taken: Cell<u64>,
    /// How many parts have begun to be written, or failed.
    begun_parts: Counter,
    /// How many parts are over.
    ended_parts: Counter,
    done: Cell<u64>,
    total: Cell<u64>,
    begun: Duration,
    failed: RefCell<Option<CopyError>>,
    /// The host still can.
    offload: Cell<bool>,
    listener: Option<Listener>,
    queue: Rc<Queue>,
}

/// A number that grows, and that some wait for.
#[derive(Default)]
struct Counter {
    reached: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Counter {
    async fn until(&self, number: u64) {
        poll_fn(|cx| {
            if self.reached.get() >= number {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn reach(&self, number: u64) {
        self.reached.set(self.reached.get().max(number));
        self.waiting.take().into_iter().for_each(Waker::wake);
    }
}

impl Copy {
    async fn work(&self, first: bool) {
        // With compression a buffer holds whole clusters, which may be larger.
        let buffer = Arc::new(Buffer::zeroed(self.rules.most as usize));
        if first && self.listener.is_some() {
            let _planning = self.planning.lock().await;
            let zeros = self.options.sparse == 0;
            let total = total(&self.queue, &self.sources, self.rules, zeros).await;
            self.total.set(total.unwrap_or(0));
            self.tell_progress();
        }
        while self.failed.borrow().is_none() {
            let (number, chunk) = match self.next().await {
                Ok(Some(next)) => next,
                Ok(None) => return,
                Err(error) => return self.fail(error),
            };
            let worked = self.one(number, &chunk, &buffer).await;
            if let Err(error) = worked {
                self.fail(error);
            }
            // Whoever waits must not wait for ever.
            self.begun_parts.reach(number + 1);
            self.ended_parts.reach(self.ended_parts.reached.get() + 1);
            self.pace();
        }
    }

    fn fail(&self, error: CopyError) {
        self.failed.borrow_mut().get_or_insert(error);
    }

    /// The next part that needs something done, and its number.
    async fn next(&self) -> std::result::Result<Option<(u64, Chunk)>, CopyError> {
        let _planning = self.planning.lock().await;
        let Some(mut plan) = self.plan.borrow_mut().take() else { return Ok(None) };
        let found = loop {
            match plan.next(&self.queue).await {
                Ok(None) => break Ok(None),
                Ok(Some(chunk)) if !self.is_there(chunk.what) => {
                    let number = self.taken.get();
                    self.taken.set(number + 1);
                    break Ok(Some((number, chunk)));
                }
                Ok(Some(_)) => {}
                Err((offset, error)) => break Err(CopyError { doing: Doing::Looking, offset, error }),
            }
        };
        if matches!(found, Ok(Some(_))) {
            *self.plan.borrow_mut() = Some(plan);
        }
        found
    }

    /// Whether the target has it without our doing.
    fn is_there(&self, what: What) -> bool {
        match what {
            What::Data => false,
            What::Below => true,
            What::Zero => self.options.sparse > 0 && self.options.target_is_zero,
        }
    }

    async fn one(&self, number: u64, chunk: &Chunk, buffer: &Arc<Buffer>) -> std::result::Result<(), CopyError> {
        let range = chunk.range.clone();
        if chunk.what == What::Zero {
            if !self.in_turn(number, &range).await {
                return Ok(());
            }
            let written = self.write_zeros(range.clone()).await;
            written.map_err(|error| CopyError { doing: Doing::Writing, offset: range.start, error })?;
            if self.options.sparse == 0 {
                self.advance(range);
            }
            return Ok(());
        }
        if self.offload.get() {
            if !self.in_turn(number, &range).await {
                return Ok(());
            }
            if self.offloaded(&range) {
                self.advance(range);
                return Ok(());
            }
        }
        self.read(&range, buffer).await.map_err(|error| CopyError {
            doing: Doing::Reading,
            offset: range.start,
            error,
        })?;
        if !self.in_turn(number, &range).await {
            return Ok(());
        }
        let written = self.write(&range, buffer).await;
        written.map_err(|error| CopyError { doing: Doing::Writing, offset: range.start, error })?;
        self.advance(range);
        Ok(())
    }

    /// Waits until this part may be written. The last one comes after all others are over, so that a raw file that grows with what is
    /// written has its length only when it has everything. False if the copy has failed meanwhile.
    async fn in_turn(&self, number: u64, range: &Range<u64>) -> bool {
        if self.is_last(range) || self.one_by_one() {
            self.ended_parts.until(number).await;
        }
        if !self.options.out_of_order {
            self.begun_parts.until(number).await;
            self.begun_parts.reach(number + 1);
        }
        self.failed.borrow().is_none()
    }

    /// Whether each write waits for the one before it. In an image the order in which writes end is that in which clusters are given out;
    /// compressed ones would wait for the processors then, and in a raw file everything has its place.
    fn one_by_one(&self) -> bool {
        !self.options.out_of_order && !self.options.compressed && !self.target.node().is_plain_file()
    }

    fn is_last(&self, range: &Range<u64>) -> bool {
        self.sources.last().is_some_and(|source| source.range.end == range.end)
    }

    /// Reads a range of the copy into the buffer's beginning.
    async fn read(&self, range: &Range<u64>, buffer: &Arc<Buffer>) -> Result<()> {
        for source in self.sources.iter() {
            let (start, end) = (range.start.max(source.range.start), range.end.min(source.range.end));
            if start >= end {
                continue;
            }
            let (at, len) = ((start - range.start) as usize, (end - start) as usize);
            let offset = start - source.range.start;
            match self.read_from(source, offset, buffer, at..at + len).await {
                Err(_) if self.options.salvage => self.salvage(source, offset, buffer, at..at + len).await?,
                read => read?,
            }
        }
        Ok(())
    }

    async fn read_from(&self, source: &Source, offset: u64, buffer: &Arc<Buffer>, into: Range<usize>) -> Result<()> {
        let data = vec![buffer.seg(into.start, into.len())];
        source.disk.request(&self.queue, source.number, &Request::Read { offset, data }).await
    }

    /// Reads sector by sector what cannot be read at once; what cannot be read at all is zeros.
    async fn salvage(&self, source: &Source, offset: u64, buffer: &Arc<Buffer>, into: Range<usize>) -> Result<()> {
        for at in into.clone().step_by(512) {
            let sector = at..into.end.min(at + 512);
            let offset = offset + (at - into.start) as u64;
            if let Err(error) = self.read_from(source, offset, buffer, sector.clone()).await {
                crate::io::fill_zero(&[buffer.seg(sector.start, sector.len())]);
                self.tell(CopyEvent::Unreadable { offset, error: &error });
            }
        }
        Ok(())
    }

    /// Writes what of the buffer has to be written.
    async fn write(&self, range: &Range<u64>, buffer: &Arc<Buffer>) -> Result<()> {
        let len = (range.end - range.start) as usize;
        let parts = match self.options.sparse {
            0 => vec![Part { range: 0..len, zero: false }],
            _ if self.options.compressed => {
                let unit = self.rules.unit as usize;
                sparse::parts(&buffer[..len], range.start, unit, unit)
            }
            least => {
                // The largest power of two in it; what no buffer has does no more than its size does.
                let least = least.min(self.rules.most) as usize;
                let unit = 1 << least.ilog2();
                sparse::parts(&buffer[..len], range.start, unit, least)
            }
        };
        let one = |part: Part| async move {
            let offset = range.start + part.range.start as u64;
            if part.zero {
                return match self.is_there(What::Zero) {
                    true => Ok(()),
                    false => self.write_zeros(offset..offset + part.range.len() as u64).await,
                };
            }
            let data = vec![buffer.seg(part.range.start, part.range.len())];
            self.write_to_target(offset, data).await
        };
        let at_once = if self.is_last(range) || self.one_by_one() { 1 } else { PARTS_AT_ONCE };
        join_some(parts.into_iter().map(one), at_once).await
    }

    async fn write_to_target(&self, offset: u64, data: Vec<crate::io::IoSeg>) -> Result<()> {
        let request = match self.options.compressed {
            true => Request::WriteCompressed { offset, data },
            false => Request::Write { offset, data },
        };
        self.target.request(&self.queue, self.number, &request).await
    }

    /// Makes a range of the target zeros; as data, if that was asked for.
    async fn write_zeros(&self, range: Range<u64>) -> Result<()> {
        let most = if self.options.sparse == 0 { self.rules.most } else { ZEROS };
        let mut offset = range.start;
        while offset < range.end {
            let len = (range.end - offset).min(most);
            if self.options.sparse == 0 {
                self.write_to_target(offset, zero_segs(len)).await?;
            } else {
                // The target was there before: as QEMU does, it is to say so itself, whatever it is put over later.
                self.target.say_zeroes(&self.queue, self.number, offset..offset + len, true).await?;
            }
            offset += len;
        }
        Ok(())
    }

    /// Has the host copy a range. False if it cannot, or did only a part: then it is to be done the other way.
    fn offloaded(&self, range: &Range<u64>) -> bool {
        let Some(source) = self.sources.iter().find(|source| source.range.contains(&range.start)) else { return false };
        let (from, into) = (source.disk.node(), self.target.node());
        let offset = range.start - source.range.start;
        let copied = match (from.mapped(offset, 512, false), into.mapped(range.start, 512, true)) {
            (Some((from_file, from_place)), Some((into_file, into_place)))
                if from.is_plain_file() && into.is_plain_file() && range.end <= source.range.end =>
            {
                let len = range.end - range.start;
                let copied = into_file.copy_from((&**from_file, from_place), into_place, len);
                // The last sector of a raw disk may lie behind its file's end: that part is read and written.
                copied.is_ok_and(|copied| copied == len)
            }
            _ => false,
        };
        // It would hardly be better with the next.
        self.offload.set(copied);
        copied
    }

    fn advance(&self, range: Range<u64>) {
        self.done.set(self.done.get() + (range.end - range.start));
        self.tell_progress();
    }

    fn tell_progress(&self) {
        self.tell(CopyEvent::Progress { done: self.done.get(), total: self.total.get() });
    }

    fn tell(&self, event: CopyEvent<'_>) {
        if let Some(listener) = &self.listener {
            listener(event);
        }
    }

    /// Sleeps as long as the copy is ahead of the rate that was asked for. What is under way goes on meanwhile.
    fn pace(&self) {
        let Some(rate) = self.options.rate.filter(|&rate| rate > 0) else { return };
        let due = Duration::from_secs_f64(self.done.get() as f64 / rate as f64);
        let spent = self.target.storage().now().saturating_sub(self.begun);
        if let Some(ahead) = due.checked_sub(spent) {
            self.target.storage().sleep(ahead);
        }
    }
}

#[cfg(test)]
#[path = "copy_test.rs"]
mod tests;
