//! Serves one queue of a block device: takes chains, asks the engine, and puts what has completed into the used ring.
//!
//! A worker runs on a thread of its own, which is the only one that touches the queue and the engine's queue. It needs no
//! lock and, once warm, no allocation. Guest memory that the engine works on stays mapped because the worker holds it
//! (`guard`) until nothing is in flight or the engine's queue is gone.
//!
//! Where the guest outlives the process, what is in flight is noted before it is started (`inflight`), and what is written in guest
//! memory before the driver hears of it ([`DirtyMarks`]).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cowhand_block::io::IoSeg;
use cowhand_block::{Event, Request, RequestQueue, Wait};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::BlockBackend;
use super::failed::FailedQueue;
use super::inflight::{Inflight, InflightQueue};
use super::patience::Patience;
use super::request::{Context, Failure, Parsed};
use super::settings::BlockSettings;
use crate::chain::{Chain, Span, part};
use crate::device::{ActiveQueue, Interrupt, Memory};
use crate::dirty::DirtyMarks;
use crate::ring::{self, RingError};

const TAG_KICK: u64 = 0;
const TAG_STOP: u64 = 1;
const STATUS_OK: u8 = VIRTIO_BLK_S_OK as u8;
const STATUS_IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;

/// The most chains that are taken before their requests are sent, and the driver hears of those that have completed: it works
/// on them while we work on the next.
const BATCH: u16 = 16;

/// How often the ring is looked at between two looks at the clock: for some 2 µs.
const LOOKS: u32 = 64;

/// What a worker is made of.
pub struct WorkerParts {
    /// The queue that it serves.
    pub queue: ActiveQueue,
    /// Signalled (non-blocking eventfd) when the worker shall drain and return.
    pub stop: EventFd,
    /// Guest memory.
    pub memory: Memory,
    /// How to interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The disk.
    pub backend: Arc<dyn BlockBackend>,
    /// What the device says while the worker runs.
    pub settings: Arc<BlockSettings>,
    /// Records of what is in flight, if the driver outlives the process, and what is in flight already.
    pub inflight: Option<Inflight>,
    /// Where writes to guest memory are noted, while somebody wants to know of them.
    pub dirty: Option<DirtyMarks>,
    /// How long the worker may look for work before it sleeps; zero: never. [`LONGEST_PATIENCE`](super::LONGEST_PATIENCE) is good.
    pub patience: Duration,
}

/// A chain whose engine requests are in flight.
struct Flight {
    head: u16,
    status: GuestAddress,
    /// Bytes to report as written, status included, when all goes well.
    len: u32,
    /// Bytes to report otherwise: those that certainly were written, from the first on.
    len_failed: u32,
    /// Engine requests that have not completed.
    left: u32,
    failed: bool,
    /// A flush has to follow before the chain is complete.
    flush: bool,
    /// Guest memory that the engine writes; none without a log of such writes.
    written: Vec<Span>,
}

/// Serves one queue.
pub struct BlockWorker {
    index: u16,
    queue: Queue,
    kick: EventFd,
    stop: EventFd,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    backend: Arc<dyn BlockBackend>,
    read_only: bool,
    max_discard: u64,
    settings: Arc<BlockSettings>,
    guard: Arc<GuestMemoryMmap>,
    /// What is in flight, by the tag that its engine requests carry.
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
    chain: Chain,
    requests: Vec<Request>,
    pool: Vec<Vec<IoSeg>>,
    /// Empty lists of spans.
    spans: Vec<Vec<Span>>,
    records: Option<InflightQueue>,
    /// Heads of chains that were in flight when the process before this one died, and have not been started again.
    resubmit: std::vec::IntoIter<u16>,
    dirty: Option<DirtyMarks>,
    patience: Patience,
    /// Requests submitted to the engine that it has not been told to send.
    fresh: bool,
    /// Chains put into the used ring since the driver was last told.
    used: bool,
    broken: bool,
    failure_reported: bool,
}

impl BlockWorker {
    /// A worker that serves nothing yet; call it from any thread.
    #[must_use]
    pub fn new(parts: WorkerParts) -> Self {
        let size = usize::from(parts.queue.queue.size());
        let (records, resubmit) = parts.inflight.map_or_else(Default::default, |it| (Some(it.records), it.resubmit));
        Self {
            index: parts.queue.index,
            queue: parts.queue.queue,
            kick: parts.queue.kick,
            stop: parts.stop,
            guard: parts.memory.memory().into_inner(),
            memory: parts.memory,
            interrupt: parts.interrupt,
            read_only: parts.backend.read_only(),
            max_discard: parts.backend.limits().max_discard,
            backend: parts.backend,
            settings: parts.settings,
            slots: (0..size).map(|_| None).collect(),
            free: (0..size).rev().collect(),
            chain: Chain::new(),
            requests: Vec::new(),
            pool: Vec::new(),
            spans: Vec::new(),
            records,
            resubmit: resubmit.into_iter(),
            dirty: parts.dirty,
            patience: Patience::new(parts.patience),
            fresh: false,
            used: false,
            broken: false,
            failure_reported: false,
        }
    }

    /// Serves the queue on this thread until told to stop; all that was taken from the queue is completed then. Gives the
    /// queue back as it stands.
    pub fn run(mut self) -> ActiveQueue {
        self.mark_ring(0, used_ring_len(&self.queue));
        if self.records.is_some() {
            // Whoever served the queue before us may have died before it told the driver of its last completions.
            self.interrupt.signal_queue(self.index);
        }
        match self.open() {
            Ok(engine) => self.serve(engine),
            Err(error) => {
                self.report(&error);
                self.interrupt.signal_needs_reset();
                self.serve_failing();
            }
        }
        ActiveQueue { index: self.index, queue: self.queue, kick: self.kick }
    }

    fn open(&self) -> Result<Box<dyn RequestQueue>, cowhand_block::Error> {
        let mut engine = self.backend.open_queue()?;
        self.watch(&mut *engine).map_err(|error| cowhand_block::Error::io("cannot watch a queue's eventfd", error))?;
        Ok(engine)
    }

    fn watch(&self, engine: &mut dyn RequestQueue) -> io::Result<()> {
        engine.watch(self.kick.as_raw_fd(), TAG_KICK)?;
        engine.watch(self.stop.as_raw_fd(), TAG_STOP)
    }

    /// Serves until told to stop; when the engine's driver fails, goes on failing all requests.
    fn serve(&mut self, mut engine: Box<dyn RequestQueue>) {
        if let Err(error) = self.run_on(&mut *engine) {
            // Only without its queue does the engine certainly leave guest memory alone.
            drop(engine);
            self.report(&error);
            self.fail_all();
            self.interrupt.signal_needs_reset();
            self.serve_failing();
        }
    }

    /// Fails all requests until told to stop.
    fn serve_failing(&mut self) {
        let served = FailedQueue::new().and_then(|mut queue| {
            self.watch(&mut queue)?;
            self.run_on(&mut queue)
        });
        if let Err(error) = served {
            tracing::error!(%error, queue = self.index, "a disk's queue is not served any more");
            self.fail_all();
        }
    }

    /// Takes, waits and completes until told to stop and drained.
    fn run_on(&mut self, engine: &mut dyn RequestQueue) -> io::Result<()> {
        let mut events = Vec::with_capacity(self.slots.len() + 2);
        let mut stopping = false;
        loop {
            let more = self.take(engine, !stopping);
            self.notify();
            if stopping && self.idle() && (self.broken || self.resubmit.as_slice().is_empty()) {
                return Ok(());
            }
            if more {
                self.fresh = false;
                engine.wait(Wait::Poll, &mut events)?;
            } else if stopping {
                // What the driver goes on to offer is not taken any more, and must not keep us awake.
                engine.wait(Wait::Block, &mut events)?;
            } else {
                self.wait(engine, &mut events)?;
            }
            for event in events.drain(..) {
                match event {
                    Event::Ready { tag: TAG_STOP } => stopping = true,
                    Event::Ready { .. } => {}
                    Event::Done { tag, result, data } => {
                        if let Err(error) = &result {
                            self.report(error);
                        }
                        self.recycle(data);
                        self.done(engine, tag, result.is_ok());
                    }
                }
            }
            self.notify();
        }
    }

    /// Waits until there is something to do: first awake, if that has been worth while lately, and then asleep.
    fn wait(&mut self, engine: &mut dyn RequestQueue, events: &mut Vec<Event>) -> io::Result<()> {
        let fresh = std::mem::take(&mut self.fresh);
        if self.patience.window() > Duration::ZERO {
            if fresh {
                return engine.wait(Wait::Poll, events);
            }
            let began = Instant::now();
            if self.look(engine, began) {
                return engine.wait(Wait::Poll, events);
            }
            self.sleep(engine, began, events)
        } else if fresh {
            // What was just sent is mostly done at once: that is not a gap to learn from.
            if self.may_sleep() { engine.wait(Wait::Block, events) } else { engine.wait(Wait::Poll, events) }
        } else {
            self.sleep(engine, Instant::now(), events)
        }
    }

    fn sleep(&mut self, engine: &mut dyn RequestQueue, began: Instant, events: &mut Vec<Event>) -> io::Result<()> {
        if self.may_sleep() {
            engine.wait(Wait::Block, events)?;
        }
        self.patience.learn(began.elapsed());
        Ok(())
    }

    /// Looks for work without sleeping, from `began` on for as long as patience lasts; says whether there is any.
    fn look(&mut self, engine: &mut dyn RequestQueue, began: Instant) -> bool {
        let memory = self.guard.clone();
        loop {
            for _ in 0..LOOKS {
                if self.has_chains(&memory) || engine.has_news() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if began.elapsed() >= self.patience.window() {
                return false;
            }
        }
    }

    /// Whether there is a chain that could be taken, or a ring that is broken: taking finds that.
    fn has_chains(&self, memory: &GuestMemoryMmap) -> bool {
        !self.broken
            && !self.free.is_empty()
            && self.queue.avail_idx(memory, Ordering::Acquire).map_or(true, |index| index.0 != self.queue.next_avail())
    }

    /// Asks the driver to wake us; false if it has made something available meanwhile, for which it will not.
    fn may_sleep(&mut self) -> bool {
        // A completion makes room, and brings us back.
        if self.broken || self.free.is_empty() {
            return true;
        }
        let memory = self.guard.clone();
        let enabled = self.queue.enable_notification(&*memory);
        self.mark_notification();
        match enabled {
            Ok(more) => !more,
            Err(error) => {
                self.break_down(&error.into());
                true
            }
        }
    }

    /// Whether nothing is in flight.
    fn idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Takes chains while there are any and room for them; only `new` ones from the ring. Says whether more may be there.
    fn take(&mut self, engine: &mut dyn RequestQueue, new: bool) -> bool {
        if self.broken {
            return false;
        }
        if self.idle() {
            self.guard = self.memory.memory().into_inner();
        }
        let memory = self.guard.clone();
        self.take_from(engine, &memory, new).unwrap_or_else(|error| {
            self.break_down(&error);
            false
        })
    }

    fn take_from(
        &mut self,
        engine: &mut dyn RequestQueue,
        memory: &GuestMemoryMmap,
        new: bool,
    ) -> Result<bool, RingError> {
        if new {
            self.queue.disable_notification(memory)?;
            if !self.queue.event_idx_enabled() {
                self.mark_notification();
            }
        }
        // Bounded, also so that a driver which feeds us faster than we fail its chains cannot keep us from stopping.
        for _ in 0..BATCH {
            let Some(slot) = self.free.last().copied() else { return Ok(false) };
            let head = if let Some(head) = self.resubmit.next() {
                head
            } else {
                let chain = if new { self.queue.iter(memory)?.next() } else { None };
                let Some(head) = chain.map(|chain| chain.head_index()) else { return Ok(false) };
                if let Some(records) = &mut self.records {
                    records.taken(head);
                }
                head
            };
            self.chain.fill(memory, &self.queue, head);
            self.start(engine, memory, head, slot)?;
        }
        Ok(true)
    }

    /// Asks the engine for what the chain in `self.chain` wants, or completes it at once.
    fn start(
        &mut self,
        engine: &mut dyn RequestQueue,
        memory: &GuestMemoryMmap,
        head: u16,
        slot: usize,
    ) -> Result<(), RingError> {
        let Some(status) = self.chain.last_writable_byte() else {
            tracing::debug!(queue = self.index, head, "a chain has no status byte");
            return self.add_used(memory, head, 0);
        };
        let context = Context {
            memory,
            size: self.backend.size(),
            read_only: self.read_only,
            max_discard: self.max_discard,
            settings: &self.settings,
        };
        // SAFETY: `memory` is `self.guard`, which is replaced or dropped only while nothing is in flight, or after the
        // engine's queue has been dropped.
        let parsed = unsafe { context.parse(&self.chain, &mut self.requests, &mut self.pool) };
        let data_len = self.chain.writable_len() - 1;
        let len_failed = u32::from(data_len == 0);
        match parsed {
            Ok(Parsed::Submit { writes }) => {
                let flush = writes && !self.settings.writeback();
                let left = self.requests.len() as u32;
                let len = u32::try_from(data_len + 1).unwrap_or(u32::MAX);
                let mut written = Vec::new();
                if self.dirty.is_some() && matches!(self.requests.first(), Some(Request::Read { .. })) {
                    written = self.spans.pop().unwrap_or_default();
                    written.extend(part(self.chain.writable(), 0, data_len));
                }
                self.free.pop();
                self.slots[slot] = Some(Flight { head, status, len, len_failed, left, failed: false, flush, written });
                for request in self.requests.drain(..) {
                    engine.submit(slot as u64, request);
                }
                self.fresh = true;
                Ok(())
            }
            // The status is written behind what may be a gap, which the length must not cover.
            Ok(Parsed::Done { len }) => {
                if let Some(dirty) = &self.dirty {
                    dirty.spans(part(self.chain.writable(), 0, len.into()));
                }
                let len = if u64::from(len) == data_len { len + 1 } else { len };
                self.complete(memory, head, status, STATUS_OK, len)
            }
            Err(Failure(code)) => self.complete(memory, head, status, code, len_failed),
        }
    }

    /// One engine request of the chain in slot `tag` has completed.
    fn done(&mut self, engine: &mut dyn RequestQueue, tag: u64, ok: bool) {
        let slot = tag as usize;
        let Some(flight) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            tracing::error!(queue = self.index, tag, "the engine completed a request that is not in flight");
            return;
        };
        flight.failed |= !ok;
        flight.left -= 1;
        if flight.left > 0 {
            return;
        }
        if flight.flush && !flight.failed {
            flight.flush = false;
            flight.left = 1;
            engine.submit(tag, Request::Flush);
            self.fresh = true;
            return;
        }
        self.finish(slot);
    }

    /// Completes the chain in a slot, and frees the slot.
    fn finish(&mut self, slot: usize) {
        let Some(mut flight) = self.slots.get_mut(slot).and_then(Option::take) else { return };
        self.free.push(slot);
        if let Some(dirty) = &self.dirty {
            // All of it, also of a read that failed: nobody says how much of that was written.
            dirty.spans(flight.written.drain(..));
            if flight.written.capacity() > 0 {
                self.spans.push(flight.written);
            }
        }
        let memory = self.guard.clone();
        let (status, len) = if flight.failed { (STATUS_IOERR, flight.len_failed) } else { (STATUS_OK, flight.len) };
        if let Err(error) = self.complete(&memory, flight.head, flight.status, status, len) {
            self.break_down(&error);
        }
    }

    /// Fails whatever is in flight. The engine's queue has been dropped.
    fn fail_all(&mut self) {
        for slot in 0..self.slots.len() {
            if let Some(flight) = &mut self.slots[slot] {
                flight.failed = true;
                self.finish(slot);
            }
        }
        self.notify();
    }

    fn complete(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        at: GuestAddress,
        status: u8,
        len: u32,
    ) -> Result<(), RingError> {
        // A status byte outside memory is the driver's loss; its chain comes back all the same.
        if memory.write_obj(status, at).is_err() {
            return self.add_used(memory, head, 0);
        }
        if let Some(dirty) = &self.dirty {
            dirty.spans([Span { addr: at, len: 1 }]);
        }
        self.add_used(memory, head, len)
    }

    fn add_used(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), RingError> {
        if let Some(records) = &mut self.records {
            records.used(head);
        }
        let entry = u64::from(self.queue.next_used() % self.queue.size());
        let added = ring::add_used(&mut self.queue, memory, head, len)?;
        if let Some(records) = &mut self.records {
            records.published(self.queue.next_used());
        }
        if added {
            self.used = true;
            self.mark_ring(4 + entry * 8, 8);
            self.mark_ring(2, 2);
        }
        Ok(())
    }

    /// `len` bytes at `offset` of the used ring have been written.
    fn mark_ring(&self, offset: u64, len: u64) {
        if let Some(dirty) = &self.dirty {
            dirty.ring(offset, len);
        }
    }

    /// What tells the driver whether to wake us has been written: the used ring's flags, or the event index behind its entries.
    fn mark_notification(&self) {
        let event = used_ring_len(&self.queue) - 2;
        self.mark_ring(if self.queue.event_idx_enabled() { event } else { 0 }, 2);
    }

    /// Tells the driver of what has been added to the used ring, if it wants to know.
    fn notify(&mut self) {
        if !std::mem::take(&mut self.used) || self.broken {
            return;
        }
        let memory = self.guard.clone();
        match ring::wants_interrupt(&mut self.queue, &memory) {
            Ok(true) => self.interrupt.signal_queue(self.index),
            Ok(false) => {}
            Err(error) => self.break_down(&error),
        }
    }

    /// The ring cannot be used any more until the driver has reset the device.
    fn break_down(&mut self, error: &RingError) {
        if !self.broken {
            tracing::warn!(%error, queue = self.index, "a disk's queue needs a reset");
            self.broken = true;
            self.interrupt.signal_needs_reset();
        }
    }

    fn recycle(&mut self, mut data: Vec<IoSeg>) {
        if data.capacity() > 0 && self.pool.len() < self.slots.len() {
            data.clear();
            self.pool.push(data);
        }
    }

    /// The first failure is told loudly; a guest can repeat it as often as it likes.
    fn report(&mut self, error: &dyn std::fmt::Display) {
        if std::mem::replace(&mut self.failure_reported, true) {
            tracing::debug!(%error, queue = self.index, "a disk request failed");
        } else {
            tracing::warn!(%error, queue = self.index, "a disk request failed");
        }
    }
}

/// Bytes of a used ring: flags, index, entries, event index (sect. 2.7.8).
fn used_ring_len(queue: &Queue) -> u64 {
    4 + 8 * u64::from(queue.size()) + 2
}

#[cfg(test)]
#[path = "worker_test.rs"]
mod tests;

#[cfg(test)]
#[path = "worker_dirty_test.rs"]
mod dirty_tests;

#[cfg(test)]
#[path = "worker_inflight_test.rs"]
mod inflight_tests;
