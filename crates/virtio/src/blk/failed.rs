//! What stands in for an engine queue that could not be opened, or whose driver has failed: every request fails, so the
//! guest gets I/O errors and not a disk that hangs.

use std::io;
use std::os::fd::RawFd;

use cowhand_block::{Error, ErrorKind, Event, Request, RequestQueue, Wait};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// A queue that fails all requests.
pub(super) struct FailedQueue {
    epoll: Epoll,
    done: Vec<Event>,
}

impl FailedQueue {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, done: Vec::new() })
    }
}

impl RequestQueue for FailedQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        let data = match request {
            Request::Read { data, .. } | Request::Write { data, .. } | Request::WriteCompressed { data, .. } => data,
            _ => Vec::new(),
        };
        let result = Err(Error::new(ErrorKind::Io, "the disk's queue has failed"));
        self.done.push(Event::Done { tag, result, data });
    }

    fn watch(&mut self, fd: RawFd, tag: u64) -> io::Result<()> {
        // Edge-triggered: each write to an eventfd is an edge, so its counter need not be read.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, tag);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    fn wait(&mut self, mode: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let block = mode == Wait::Block && self.done.is_empty();
        let mut ready = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(if block { -1 } else { 0 }, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        events.extend(ready[..count].iter().map(|event| Event::Ready { tag: event.data() }));
        events.append(&mut self.done);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}
