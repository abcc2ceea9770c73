//! A guest: threads with a queue each, that keep several requests in flight.

use std::ops::Range;
use std::sync::atomic::AtomicU32;

use super::model::{Kind, Model};
use crate::chain::OpenPolicy;
use crate::disk::{Disk, DiskQueue};
use crate::error::{Error, ErrorKind};
use crate::io::host::{Engine, Host};
use crate::io::sim::Rng;
use crate::io::{Buffer, IoSeg};
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::sync::{Arc, Mutex, Ordering};

/// The policy of a program on this host, with this sort of I/O queue.
pub(super) fn policy(engine: Engine) -> OpenPolicy {
    OpenPolicy { storage: Arc::new(Host::new(engine)), ..OpenPolicy::host() }
}

/// What happens to a request, for whoever keeps a journal.
#[derive(Clone, Copy, Debug)]
pub(super) enum Moment {
    /// It is about to be submitted.
    Begins { op: u32, kind: Kind, first: u64, count: u64 },
    /// It has been answered.
    Ended { op: u32, ok: bool },
}

/// What the guest does.
pub(super) struct Guest<'a> {
    pub(super) disk: &'a Arc<Disk>,
    pub(super) model: &'a Mutex<Model>,
    /// The last request's number.
    pub(super) ops: &'a AtomicU32,
    /// Requests that each queue sends.
    pub(super) requests: u64,
    pub(super) queues: usize,
    /// In flight in each queue, at most.
    pub(super) depth: usize,
    /// In sectors.
    pub(super) cluster: u64,
    /// Whether it writes compressed clusters too.
    pub(super) compresses: bool,
    /// Called in the order in which things happen, all queues together.
    pub(super) journal: &'a (dyn Fn(Moment) + Sync),
}

/// A guest's journal that nobody reads.
pub(super) fn no_journal(_: Moment) {}

struct Flying {
    op: u32,
    kind: Kind,
    buffer: Buffer,
}

impl Guest<'_> {
    /// Plays until every queue has sent its requests and heard the answers.
    pub(super) fn play(&self, rng: &mut Rng) {
        std::thread::scope(|scope| {
            for _ in 0..self.queues {
                let dice = Rng::new(rng.next_u64());
                scope.spawn(move || self.serve(dice));
            }
        });
    }

    fn serve(&self, mut rng: Rng) {
        // The buffers outlive the queue, which waits for what is in flight.
        let mut flying: Vec<Flying> = Vec::new();
        let mut queue = self.disk.queue().unwrap();
        let mut left = self.requests;
        while left > 0 || !flying.is_empty() {
            while left > 0 && flying.len() < self.depth && !rng.one_in(4) {
                left -= 1;
                flying.extend(self.submit(&mut queue, &mut rng));
            }
            let wait = if flying.is_empty() || rng.one_in(3) { Wait::Poll } else { Wait::Block };
            let mut events = Vec::new();
            queue.wait(wait, &mut events).unwrap();
            for event in events {
                let Event::Done { tag, result, .. } = event else { continue };
                let at = flying.iter().position(|f| u64::from(f.op) == tag).expect("each request is answered once");
                let done = flying.swap_remove(at);
                self.end(&done, result);
            }
        }
    }

    fn submit(&self, queue: &mut DiskQueue, rng: &mut Rng) -> Option<Flying> {
        let kind = match kind(rng) {
            Kind::Compress if !self.compresses => Kind::Write,
            kind => kind,
        };
        let mut model = self.model.lock();
        let range = match (kind, self.range(rng, model.sectors())) {
            (Kind::Flush, _) => 0..0,
            (Kind::Compress, range) => self.whole_clusters(&range, model.sectors()),
            (_, range) => range,
        };
        if model.is_busy(&range) {
            return None;
        }
        let op = self.ops.fetch_add(1, Ordering::SeqCst) + 1;
        (self.journal)(Moment::Begins { op, kind, first: range.start, count: range.end - range.start });
        let bytes = model.begin(op, kind, range.clone());
        drop(model);
        let (offset, len) = (range.start * 512, (range.end - range.start) * 512);
        let buffer = match kind {
            Kind::Read => Buffer::from_bytes(&vec![0xee; len as usize]),
            _ => Buffer::from_bytes(&bytes),
        };
        let request = match kind {
            Kind::Read => Request::Read { offset, data: pieces(&buffer, rng) },
            Kind::Compress => Request::WriteCompressed { offset, data: pieces(&buffer, rng) },
            Kind::Write | Kind::WriteOfZeros => Request::Write { offset, data: pieces(&buffer, rng) },
            Kind::Zero | Kind::ZeroUnmap => Request::WriteZeroes { offset, len, unmap: kind == Kind::ZeroUnmap },
            Kind::Discard => Request::Discard { offset, len },
            Kind::Flush => Request::Flush,
        };
        queue.submit(u64::from(op), request);
        Some(Flying { op, kind, buffer })
    }

    fn end(&self, done: &Flying, result: crate::error::Result<()>) {
        let mut model = self.model.lock();
        (self.journal)(Moment::Ended { op: done.op, ok: result.is_ok() });
        let read: &[u8] = if done.kind == Kind::Read { &done.buffer } else { &[] };
        let checked = model.end(done.op, result.is_ok(), read);
        drop(model);
        let refused = |e: &Error| matches!(e.kind(), ErrorKind::Invalid | ErrorKind::Unsupported);
        if !(done.kind == Kind::Compress && result.as_ref().is_err_and(refused)) {
            result.unwrap();
        }
        checked.unwrap();
    }

    /// The clusters that a range touches.
    fn whole_clusters(&self, range: &Range<u64>, sectors: u64) -> Range<u64> {
        range.start - range.start % self.cluster..range.end.next_multiple_of(self.cluster).min(sectors)
    }

    /// Mostly parts of clusters; often several of them; now and then much.
    fn range(&self, rng: &mut Rng, sectors: u64) -> Range<u64> {
        let longest = match rng.below(16) {
            0 => 2048,
            1..=6 => self.cluster * 3,
            _ => 24,
        };
        let mut first = rng.below(sectors);
        if rng.one_in(3) {
            first -= first % self.cluster;
        }
        let mut count = 1 + rng.below(longest.min(8192).min(sectors - first));
        if rng.one_in(4) {
            count = count.next_multiple_of(self.cluster).min(sectors - first);
        }
        first..first + count
    }
}

fn kind(rng: &mut Rng) -> Kind {
    match rng.below(20) {
        0..=6 => Kind::Write,
        7..=8 => Kind::Compress,
        9..=12 => Kind::Read,
        13..=14 => Kind::Discard,
        15 => Kind::Zero,
        16 => Kind::ZeroUnmap,
        17 => Kind::WriteOfZeros,
        _ => Kind::Flush,
    }
}

/// A buffer as a guest gives it: in pieces, mostly of whole sectors, sometimes of any length.
fn pieces(buffer: &Buffer, rng: &mut Rng) -> Vec<IoSeg> {
    let mut segs = Vec::new();
    let mut at = 0;
    while at < buffer.len() {
        let left = buffer.len() - at;
        let len = match rng.below(4) {
            0 => left.min(512 * (1 + rng.below(32) as usize)),
            1 if segs.len() < 20 => 1 + rng.below(left as u64) as usize,
            _ => left,
        };
        segs.push(buffer.seg(at, len));
        at += len;
    }
    segs
}

/// Reads the whole disk by several queues, in requests of any size and order.
pub(super) fn read_all(disk: &Arc<Disk>, queues: usize, rng: &mut Rng) -> Vec<u8> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < disk.size() {
        let longest = if rng.one_in(8) { 4096 } else { 1 + rng.below(200) };
        let len = (512 * (1 + rng.below(longest))).min(disk.size() - at);
        ranges.push((at, len));
        at += len;
    }
    for i in (1..ranges.len()).rev() {
        ranges.swap(i, rng.below(i as u64 + 1) as usize);
    }
    let whole = Mutex::new(vec![0xee; disk.size() as usize]);
    std::thread::scope(|scope| {
        for part in ranges.chunks(ranges.len().div_ceil(queues)) {
            let mut dice = Rng::new(rng.next_u64());
            let whole = &whole;
            scope.spawn(move || read_part(disk, part, whole, &mut dice));
        }
    });
    std::mem::take(&mut *whole.lock())
}

fn read_part(disk: &Arc<Disk>, ranges: &[(u64, u64)], whole: &Mutex<Vec<u8>>, rng: &mut Rng) {
    let buffers: Vec<Buffer> = ranges.iter().map(|&(_, len)| Buffer::from_bytes(&vec![0xee; len as usize])).collect();
    let mut queue = disk.queue().unwrap();
    let mut events = Vec::new();
    let (mut sent, mut done) = (0, 0);
    while done < ranges.len() {
        while sent < ranges.len() && queue.in_flight() < 12 {
            queue.submit(sent as u64, Request::Read { offset: ranges[sent].0, data: pieces(&buffers[sent], rng) });
            sent += 1;
        }
        queue.wait(Wait::Block, &mut events).unwrap();
        for event in events.drain(..) {
            let Event::Done { tag, result, .. } = event else { continue };
            result.unwrap();
            let (offset, len) = ranges[tag as usize];
            whole.lock()[offset as usize..][..len as usize].copy_from_slice(&buffers[tag as usize]);
            done += 1;
        }
    }
}

/// Sends one request and waits for its answer.
pub(super) fn ask(queue: &mut DiskQueue, request: Request) -> crate::error::Result<()> {
    queue.submit(0, request);
    let mut events = Vec::new();
    while events.is_empty() {
        queue.wait(Wait::Block, &mut events).unwrap();
    }
    match events.pop() {
        Some(Event::Done { result, .. }) => result,
        other => panic!("no answer but {other:?}"),
    }
}
