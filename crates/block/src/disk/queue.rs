//! A queue of requests to a disk: what one operation in place can serve goes straight to the driver, everything else becomes a task. What a
//! request meets on its way in, and how the disk serves it: [`super`].
//!
//! Locks: none of its own; it belongs to one thread.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;

use super::{Disk, Entered, Top, Unit};
use crate::error::Error;
use crate::grace::Ticket;
use crate::io::{Driver, File, Op, is_aligned, segs_len};
use crate::queue::{Outcome, Queue};
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::DetectZeroes;
use crate::sync::{Arc, Ordering};

/// A direct operation in flight.
struct Direct {
    tag: u64,
    ticket: Ticket,
    write: bool,
    offset: u64,
}

/// A queue of requests to one [`Disk`], owned by the thread that serves it.
pub struct DiskQueue {
    disk: Arc<Disk>,
    /// What requests to the disk meet, and its generation.
    top: Top,
    generation: u64,
    queue: Rc<Queue>,
    number: usize,
    direct: Vec<Option<Direct>>,
    free: Vec<usize>,
    finished: Rc<RefCell<Vec<Event>>>,
    outcomes: Vec<Outcome>,
    in_flight: Rc<Cell<usize>>,
}

impl DiskQueue {
    pub(super) fn new(disk: Arc<Disk>, driver: Box<dyn Driver>) -> Self {
        // In this order: a layer that comes in between is taken anew at the first request.
        let generation = disk.generation.load(Ordering::SeqCst);
        let top = disk.top.lock().clone();
        Self {
            top,
            generation,
            queue: Queue::new(driver),
            number: disk.next_queue_number(),
            disk,
            direct: Vec::new(),
            free: Vec::new(),
            finished: Rc::default(),
            outcomes: Vec::new(),
            in_flight: Rc::default(),
        }
    }

    /// Takes the disk's topmost layer and its followers anew if they have been replaced. Who has entered before keeps it as long as he is in.
    fn follow(&mut self) {
        let generation = self.disk.generation.load(Ordering::SeqCst);
        if generation != self.generation {
            self.top = self.disk.top.lock().clone();
            self.generation = generation;
        }
    }

    /// Sends a read or write that one operation in place can serve. Otherwise gives the request back.
    fn try_direct(&mut self, tag: u64, request: Request, ticket: Ticket) -> std::result::Result<(), Request> {
        let (offset, data, write) = match request {
            Request::Read { offset, data } => (offset, data, false),
            Request::Write { offset, data }
                if self.disk.spec.detect_zeroes == DetectZeroes::Off && !self.disk.spec.cache.is_write_through() =>
            {
                (offset, data, true)
            }
            other => return Err(other),
        };
        let node = &self.top.node;
        let fits = |(file, place): &(&File, u64)| {
            let align = file.traits().align;
            is_aligned(align, *place, &data) && !(write && align > 512)
        };
        let Some((file, place)) = node.mapped(offset, segs_len(&data), write).filter(fits) else {
            return Err(if write { Request::Write { offset, data } } else { Request::Read { offset, data } });
        };
        if write {
            node.mark_dirty(offset, segs_len(&data));
        }
        let direct = Direct { tag, ticket, write, offset: place };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.direct[slot] = Some(direct);
                slot
            }
            None => {
                self.direct.push(Some(direct));
                self.direct.len() - 1
            }
        };
        let op = if write { Op::Write { offset: place, data } } else { Op::Read { offset: place, data } };
        self.queue.direct(slot as u64, file, op);
        Ok(())
    }

    /// Serves a request in a task. Without a ticket it waits until the disk has changed, and then enters.
    fn spawn(&self, tag: u64, request: Request, ticket: Option<Ticket>) {
        let grace = &self.disk.grace;
        let entered =
            ticket.map(|ticket| (Entered { grace: grace.clone(), ticket, marks: None }, self.top.node.clone()));
        let (disk, queue, number) = (self.disk.clone(), self.queue.clone(), self.number);
        let (finished, in_flight) = (self.finished.clone(), self.in_flight.clone());
        self.queue.spawn(async move {
            let entered = match entered {
                Some(entered) => Ok(entered),
                None => disk.enter_when_open(number, &request, Unit::Sectors).await,
            };
            let result = match entered {
                Ok((entered, node)) => {
                    let mut result = disk.serve(&node, &queue, &request).await;
                    if result.is_ok() && disk.spec.cache.is_write_through() && request.written().is_some() {
                        result = node.flush(&queue).await;
                    }
                    drop(entered);
                    result
                }
                Err(error) => Err(error),
            };
            in_flight.set(in_flight.get() - 1);
            finished.borrow_mut().push(Event::Done { tag, result, data: request.into_data() });
        });
    }

    fn take_outcome(&mut self, outcome: Outcome) -> Option<Event> {
        match outcome {
            Outcome::Watch { tag } => Some(Event::Ready { tag }),
            Outcome::Direct { tag: slot, result, data } => {
                let direct = self.direct.get_mut(slot as usize)?.take()?;
                self.free.push(slot as usize);
                self.disk.grace.leave(direct.ticket);
                self.in_flight.set(self.in_flight.get() - 1);
                let what = if direct.write { "cannot write" } else { "cannot read" };
                let path = self.top.node.path();
                let result = result.map_err(|e| Error::io(what, e).at_path(path).at_offset(direct.offset));
                Some(Event::Done { tag: direct.tag, result, data })
            }
        }
    }
}

impl RequestQueue for DiskQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        self.in_flight.set(self.in_flight.get() + 1);
        // Before anything is looked up: what is found then cannot be used for anything else until we leave.
        let Some(ticket) = self.disk.grace.enter(self.number, matches!(request, Request::Flush)) else {
            return self.spawn(tag, request, None);
        };
        self.follow();
        if let Err(error) = self.disk.check(&self.top.node, &request, Unit::Sectors) {
            self.disk.grace.leave(ticket);
            self.in_flight.set(self.in_flight.get() - 1);
            self.finished.borrow_mut().push(Event::Done { tag, result: Err(error), data: request.into_data() });
            return;
        }
        if self.top.hooks.is_some() && request.written().is_some() {
            // It may have to wait for a copy, which it must not do inside.
            self.disk.grace.leave(ticket);
            return self.spawn(tag, request, None);
        }
        if let Err(request) = self.try_direct(tag, request, ticket) {
            self.spawn(tag, request, Some(ticket));
        }
    }

    fn watch(&mut self, fd: RawFd, tag: u64) -> io::Result<()> {
        self.queue.watch(fd, tag)
    }

    fn wait(&mut self, mode: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let before = events.len();
        // A queue without requests does not keep a layer, and its caches, that the disk has replaced.
        self.follow();
        loop {
            events.append(&mut self.finished.borrow_mut());
            let block = mode == Wait::Block && events.len() == before;
            let mut outcomes = std::mem::take(&mut self.outcomes);
            let turned = self.queue.turn(block, &mut outcomes);
            for outcome in outcomes.drain(..) {
                events.extend(self.take_outcome(outcome));
            }
            self.outcomes = outcomes;
            turned?;
            events.append(&mut self.finished.borrow_mut());
            if mode == Wait::Poll || events.len() > before {
                return Ok(());
            }
        }
    }

    fn has_news(&mut self) -> bool {
        !self.finished.borrow().is_empty() || self.queue.has_news()
    }

    fn in_flight(&self) -> usize {
        self.in_flight.get()
    }
}

impl Drop for DiskQueue {
    fn drop(&mut self) {
        // First of all: until nothing is in flight no ticket may be given back, and the disk (its files) must stay open.
        self.queue.shut_down();
        let tickets = self.direct.drain(..).flatten().map(|d| d.ticket);
        tickets.for_each(|ticket| self.disk.grace.leave(ticket));
    }
}
