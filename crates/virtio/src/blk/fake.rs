//! Test support: a disk in memory, whose engine queue can fail, and hold requests back.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::{io, slice};

use cowhand_block::io::IoSeg;
use cowhand_block::{Error, ErrorKind, Event, Limits, Request, RequestQueue, Wait};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::BlockBackend;
use crate::testing::allocations;

pub struct FakeDisk {
    pub data: Mutex<Vec<u8>>,
    pub read_only: bool,
    pub limits: Limits,
    /// What was asked for, in order.
    pub log: Mutex<Vec<String>>,
    /// Requests fail.
    pub fail: AtomicBool,
    /// The driver fails at its next wait.
    pub driver_fails: AtomicBool,
    pub open_fails: AtomicBool,
    /// Requests stay in flight.
    pub hold: AtomicBool,
    /// What came last completes first.
    pub backwards: AtomicBool,
    pub in_flight: AtomicU64,
    pub dropped: AtomicU64,
    /// Nothing is logged.
    pub quiet: AtomicBool,
    /// What a queue says to one that looks for news without sleeping.
    pub news: AtomicBool,
    /// Allocations of the serving thread when it last waited.
    pub allocations: AtomicU64,
    /// Signalled to let a queue look at `hold` and `driver_fails` again.
    pub poke: EventFd,
}

impl FakeDisk {
    pub fn new(len: usize) -> Self {
        let limits =
            Limits { block_size: 512, physical_block_size: 4096, discard_granularity: 65536, max_discard: 1 << 30 };
        Self {
            data: Mutex::new((0..len).map(|at| (at / 512) as u8).collect()),
            read_only: false,
            limits,
            log: Mutex::default(),
            fail: AtomicBool::new(false),
            driver_fails: AtomicBool::new(false),
            open_fails: AtomicBool::new(false),
            hold: AtomicBool::new(false),
            backwards: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            quiet: AtomicBool::new(false),
            news: AtomicBool::new(false),
            allocations: AtomicU64::new(0),
            poke: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

/// The disk as a backend; the tests keep the other reference.
pub struct Backend(pub Arc<FakeDisk>);

impl BlockBackend for Backend {
    fn size(&self) -> u64 {
        self.0.data.lock().unwrap().len() as u64
    }

    fn read_only(&self) -> bool {
        self.0.read_only
    }

    fn limits(&self) -> Limits {
        self.0.limits
    }

    fn open_queue(&self) -> cowhand_block::Result<Box<dyn RequestQueue>> {
        if self.0.open_fails.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Io, "no ring"));
        }
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, u64::MAX);
        epoll.ctl(ControlOperation::Add, std::os::fd::AsRawFd::as_raw_fd(&self.0.poke), event).unwrap();
        Ok(Box::new(FakeQueue { disk: self.0.clone(), epoll, queued: VecDeque::new() }))
    }
}

struct FakeQueue {
    disk: Arc<FakeDisk>,
    epoll: Epoll,
    queued: VecDeque<(u64, Request)>,
}

impl Drop for FakeQueue {
    fn drop(&mut self) {
        self.disk.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

impl FakeQueue {
    fn next(&mut self) -> Option<(u64, Request)> {
        if self.disk.backwards.load(Ordering::SeqCst) { self.queued.pop_back() } else { self.queued.pop_front() }
    }

    fn carry_out(&self, request: Request) -> (Result<(), Error>, Vec<IoSeg>) {
        let mut disk = self.disk.data.lock().unwrap();
        if self.disk.fail.load(Ordering::SeqCst) {
            let data = match request {
                Request::Read { data, .. } | Request::Write { data, .. } | Request::WriteCompressed { data, .. } => {
                    data
                }
                _ => Vec::new(),
            };
            return (Err(Error::new(ErrorKind::Io, "injected")), data);
        }
        let data = match request {
            Request::Read { offset, data } => {
                let mut at = offset as usize;
                for seg in &data {
                    // SAFETY: the worker promises mapped memory; these tests access it from one thread at a time.
                    let to = unsafe { slice::from_raw_parts_mut(seg.base(), seg.len()) };
                    to.copy_from_slice(&disk[at..at + seg.len()]);
                    at += seg.len();
                }
                data
            }
            Request::Write { offset, data } | Request::WriteCompressed { offset, data } => {
                let mut at = offset as usize;
                for seg in &data {
                    // SAFETY: as above.
                    let from = unsafe { slice::from_raw_parts(seg.base(), seg.len()) };
                    disk[at..at + seg.len()].copy_from_slice(from);
                    at += seg.len();
                }
                data
            }
            Request::WriteZeroes { offset, len, .. } => {
                disk[offset as usize..(offset + len) as usize].fill(0);
                Vec::new()
            }
            Request::Flush | Request::Discard { .. } => Vec::new(),
        };
        (Ok(()), data)
    }
}

impl RequestQueue for FakeQueue {
    fn submit(&mut self, tag: u64, request: Request) {
        if !self.disk.quiet.load(Ordering::SeqCst) {
            self.disk.log.lock().unwrap().push(describe(&request));
        }
        self.disk.in_flight.fetch_add(1, Ordering::SeqCst);
        self.queued.push_back((tag, request));
    }

    fn watch(&mut self, fd: RawFd, tag: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, tag))
    }

    fn wait(&mut self, mode: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let before = events.len();
        self.disk.allocations.store(allocations(), Ordering::SeqCst);
        loop {
            if self.disk.driver_fails.load(Ordering::SeqCst) {
                return Err(io::Error::other("the ring is gone"));
            }
            while !self.disk.hold.load(Ordering::SeqCst)
                && let Some((tag, request)) = self.next()
            {
                let (result, data) = self.carry_out(request);
                self.disk.in_flight.fetch_sub(1, Ordering::SeqCst);
                events.push(Event::Done { tag, result, data });
            }
            let block = mode == Wait::Block && events.len() == before;
            let mut ready = [EpollEvent::default(); 4];
            let count = self.epoll.wait(if block { -1 } else { 0 }, &mut ready).unwrap_or(0);
            let watched = ready[..count].iter().filter(|event| event.data() != u64::MAX);
            events.extend(watched.map(|event| Event::Ready { tag: event.data() }));
            if mode == Wait::Poll || events.len() > before {
                return Ok(());
            }
        }
    }

    fn has_news(&mut self) -> bool {
        self.disk.news.load(Ordering::SeqCst)
    }

    fn in_flight(&self) -> usize {
        self.queued.len()
    }
}

fn describe(request: &Request) -> String {
    match request {
        Request::Read { offset, data } => {
            format!("read {offset}+{}", data.iter().map(IoSeg::len).sum::<usize>())
        }
        Request::Write { offset, data } | Request::WriteCompressed { offset, data } => {
            format!("write {offset}+{}", data.iter().map(IoSeg::len).sum::<usize>())
        }
        Request::Flush => "flush".into(),
        Request::Discard { offset, len } => format!("discard {offset}+{len}"),
        Request::WriteZeroes { offset, len, unmap } => format!("zero {offset}+{len} unmap={unmap}"),
    }
}
