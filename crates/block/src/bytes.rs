//! Requests of any offset and length to a disk, down to a byte, with memory that they own: for programs that look at disks and copy
//! them. Guests are served by [`crate::DiskQueue`].
//!
//! Where the topmost layer takes whole sectors only, the sectors at the edges of a write are read and written back around it. Writers
//! of bytes lock the sectors that they touch against each other, on all queues of a disk; whoever writes the same
//! sectors through a [`crate::DiskQueue`] meanwhile may lose what he wrote.
//!
//! Lock order: the sectors ([`Disk::byte_writers`]) before all that a request to the disk locks.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::rc::Rc;

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffer, IoSeg, fill_zero, is_zero, segs_len};
use crate::node::Node;
use crate::queue::Queue;
use crate::request::Request;
use crate::status::Content;
use crate::sync::Arc;

/// Memory that a request reads into or writes from: parts of a buffer, in their order.
#[derive(Debug)]
pub struct Memory {
    buffer: Buffer,
    parts: Vec<Range<usize>>,
}

impl Memory {
    /// All of a buffer.
    #[must_use]
    pub fn new(buffer: Buffer) -> Self {
        let parts = std::iter::once(0..buffer.len()).collect();
        Self { buffer, parts }
    }

    /// Parts of a buffer. None if one lies outside of it, ends before it starts, or overlaps another.
    #[must_use]
    pub fn of_parts(buffer: Buffer, parts: Vec<Range<usize>>) -> Option<Self> {
        let mut sorted: Vec<_> = parts.iter().filter(|part| part.start != part.end).collect();
        sorted.sort_by_key(|part| part.start);
        let inside = parts.iter().all(|part| part.start <= part.end && part.end <= buffer.len());
        let apart = sorted.windows(2).all(|pair| pair[0].end <= pair[1].start);
        (inside && apart).then_some(Self { buffer, parts })
    }

    /// How many bytes take part.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }

    /// Whether no byte takes part.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The buffer.
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }

    fn segs(&self) -> Vec<IoSeg> {
        let parts = self.parts.iter().filter(|part| part.start < part.end);
        parts.map(|part| self.buffer.seg(part.start, part.len())).collect()
    }
}

/// One request. Offsets and lengths are bytes of the virtual disk.
#[derive(Debug)]
pub enum ByteRequest {
    /// Reads from `offset` into `memory`.
    Read {
        /// Where on the virtual disk.
        offset: u64,
        /// Where the bytes go.
        memory: Memory,
    },
    /// Writes `memory` at `offset`.
    Write {
        /// Where on the virtual disk.
        offset: u64,
        /// Where the bytes come from.
        memory: Memory,
        /// Whether it is durable when it is over.
        durable: bool,
    },
    /// As [`Request::WriteCompressed`]: whole clusters.
    WriteCompressed {
        /// Where on the virtual disk.
        offset: u64,
        /// Where the bytes come from.
        memory: Memory,
    },
    /// Makes the range read as zeros. The topmost image says so itself, where it can: an overlay or an image that gets another backing
    /// file later keeps them.
    WriteZeroes {
        /// Where on the virtual disk.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether the host space may be given back.
        unmap: bool,
        /// Whether it fails where zeros would have to be written.
        fast_only: bool,
        /// Whether it is durable when it is over.
        durable: bool,
    },
    /// As [`Request::Discard`]: of sectors that are named in part nothing is discarded.
    Discard {
        /// Where on the virtual disk.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// As [`Request::Flush`].
    Flush,
    /// Reads the VM state, which a VM host keeps beside the disk, from `offset` into `memory`: multiples of 512. What there is none of reads
    /// as zeros.
    ReadVmState {
        /// Where in the VM state.
        offset: u64,
        /// Where the bytes go.
        memory: Memory,
    },
    /// Writes `memory` into the VM state at `offset`, durably. All other requests wait meanwhile.
    WriteVmState {
        /// Where in the VM state.
        offset: u64,
        /// Where the bytes come from.
        memory: Memory,
    },
}

impl ByteRequest {
    fn range(&self) -> Option<(u64, u64)> {
        match self {
            Self::Read { offset, memory }
            | Self::Write { offset, memory, .. }
            | Self::WriteCompressed { offset, memory } => Some((*offset, memory.len())),
            Self::WriteZeroes { offset, len, .. } | Self::Discard { offset, len } => Some((*offset, *len)),
            Self::Flush | Self::ReadVmState { .. } | Self::WriteVmState { .. } => None,
        }
    }

    fn into_memory(self) -> Option<Memory> {
        match self {
            Self::Read { memory, .. }
            | Self::Write { memory, .. }
            | Self::WriteCompressed { memory, .. }
            | Self::ReadVmState { memory, .. }
            | Self::WriteVmState { memory, .. } => Some(memory),
            Self::WriteZeroes { .. } | Self::Discard { .. } | Self::Flush => None,
        }
    }
}

/// A request that is over.
#[derive(Debug)]
pub struct ByteDone {
    /// The tag that it was submitted with.
    pub tag: u64,
    /// How it ended. After a failed write the range holds old bytes, new bytes, or a mix.
    pub result: Result<()>,
    /// The request's memory, given back.
    pub memory: Option<Memory>,
}

/// A queue of such requests, owned by the thread that makes them.
pub struct ByteQueue {
    inner: Inner,
    finished: Rc<RefCell<Vec<ByteDone>>>,
    in_flight: Rc<Cell<usize>>,
}

/// What the requests of a queue have in common.
#[derive(Clone)]
struct Inner {
    disk: Arc<Disk>,
    queue: Rc<Queue>,
    number: usize,
    copy_on_read: bool,
}

impl Disk {
    /// A queue of requests of any offset and length, to be used by the calling thread alone.
    ///
    /// # Errors
    /// When the host has no room for one.
    pub fn byte_queue(self: &Arc<Self>) -> Result<ByteQueue> {
        let driver = self.storage().driver();
        let driver = driver.map_err(|e| Error::io("cannot set up an I/O queue", e).at_path(&self.spec().path))?;
        let inner = Inner {
            disk: self.clone(),
            queue: Queue::new(driver),
            number: self.next_queue_number(),
            copy_on_read: false,
        };
        Ok(ByteQueue { inner, finished: Rc::default(), in_flight: Rc::default() })
    }
}

impl ByteQueue {
    /// The disk that it serves.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.inner.disk
    }

    /// From now on what is read from below the topmost layer is written into that, whole clusters at a time.
    pub fn copy_on_read(&mut self, on: bool) {
        self.inner.copy_on_read = on;
    }

    /// Takes a request. It is begun with the next [`wait`](Self::wait) or [`run`](Self::run).
    pub fn submit(&mut self, tag: u64, request: ByteRequest) {
        self.in_flight.set(self.in_flight.get() + 1);
        let (inner, finished, in_flight) = (self.inner.clone(), self.finished.clone(), self.in_flight.clone());
        self.inner.queue.spawn(async move {
            let result = inner.serve(&request).await;
            in_flight.set(in_flight.get() - 1);
            finished.borrow_mut().push(ByteDone { tag, result, memory: request.into_memory() });
        });
    }

    /// The number of requests submitted and not yet over.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// The requests that are over and have not been told yet, in the order in which they ended.
    pub fn finished(&mut self) -> Vec<ByteDone> {
        self.finished.take()
    }

    /// Goes on with all requests until one is over; at once if none is under way.
    ///
    /// # Errors
    /// Only when the I/O queue itself fails: it cannot be used any more then.
    pub fn wait(&mut self) -> Result<()> {
        let before = self.in_flight.get();
        let mut outcomes = Vec::new();
        while before > 0 && self.in_flight.get() == before {
            let turned = self.inner.queue.turn(true, &mut outcomes);
            turned.map_err(|e| Error::io("the I/O queue failed", e))?;
        }
        Ok(())
    }

    /// Serves one request to its end; others that are under way go on meanwhile. Its memory comes back too.
    ///
    /// # Errors
    /// See [`ByteDone::result`].
    pub fn run(&mut self, request: ByteRequest) -> (Result<()>, Option<Memory>) {
        let slot: Rc<RefCell<Option<_>>> = Rc::default();
        let (inner, ended) = (self.inner.clone(), slot.clone());
        self.inner.queue.spawn(async move {
            let result = inner.serve(&request).await;
            *ended.borrow_mut() = Some((result, request.into_memory()));
        });
        let mut outcomes = Vec::new();
        loop {
            if let Some(ended) = slot.take() {
                return ended;
            }
            if let Err(e) = self.inner.queue.turn(true, &mut outcomes) {
                return (Err(Error::io("the I/O queue failed", e)), None);
            }
        }
    }
}

impl Drop for ByteQueue {
    fn drop(&mut self) {
        // Waits for what is in flight, and only then lets the requests' memory go.
        self.inner.queue.shut_down();
    }
}

/// What lies around a write (or a read) in its first and its last sector, and how far those reach.
struct Edges {
    start: u64,
    end: u64,
    head: Option<Buffer>,
    tail: Option<Buffer>,
}

impl Edges {
    fn new(unit: u64, offset: u64, len: u64) -> Self {
        let (start, end) = (offset - offset % unit, (offset + len).next_multiple_of(unit));
        let sector = || Buffer::zeroed(unit as usize);
        let head = (start < offset).then(sector);
        // If there is only one sector, the head is all of it.
        let tail = (end > offset + len && (head.is_none() || end - unit > start)).then(sector);
        Self { start, end, head, tail }
    }

    /// The first sector that is named in part, and the memory for it; then the last one.
    fn sectors(&self, unit: u64) -> impl Iterator<Item = (u64, &Buffer)> {
        let head = self.head.iter().map(|head| (self.start, head));
        head.chain(self.tail.iter().map(move |tail| (self.end - unit, tail)))
    }

    /// `data`, which are `len` bytes for `offset`, with what lies around them.
    fn around(&self, offset: u64, data: &[IoSeg]) -> Vec<IoSeg> {
        let mut whole = Vec::with_capacity(data.len() + 2);
        whole.extend(self.head.as_ref().map(|head| head.seg(0, (offset - self.start) as usize)));
        whole.extend_from_slice(data);
        let after = (self.end - offset - segs_len(data)) as usize;
        let tail = self.tail.as_ref().or(self.head.as_ref()).filter(|_| after > 0);
        whole.extend(tail.map(|tail| tail.seg(tail.len() - after, after)));
        whole
    }
}

impl Inner {
    async fn serve(&self, request: &ByteRequest) -> Result<()> {
        if let Some((offset, len)) = request.range() {
            self.check(offset, len)?;
            if len == 0 {
                return Ok(());
            }
        }
        match request {
            ByteRequest::Read { offset, memory } => self.read(*offset, memory).await,
            ByteRequest::Write { offset, memory, durable } => {
                self.write(*offset, &memory.segs()).await?;
                self.flush_if(*durable).await
            }
            ByteRequest::WriteCompressed { offset, memory } => {
                let _writing = self.lock(*offset, memory.len()).await;
                self.write_compressed(*offset, memory.segs()).await
            }
            ByteRequest::WriteZeroes { offset, len, unmap, fast_only, durable } => {
                self.write_zeroes(*offset, *len, *unmap, *fast_only).await?;
                self.flush_if(*durable).await
            }
            ByteRequest::Discard { offset, len } => self.discard(*offset, *len).await,
            ByteRequest::Flush => self.request(Request::Flush).await,
            ByteRequest::ReadVmState { offset, memory } => {
                self.disk.read_vm_state_on(&self.queue, *offset, &memory.segs()).await
            }
            ByteRequest::WriteVmState { offset, memory } => {
                self.disk.write_vm_state_on(&self.queue, *offset, &memory.segs()).await
            }
        }
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.disk.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            let what = format!("{len} bytes at {offset} do not lie on the disk, which has {size}");
            return Err(Error::io(what, io::Error::from_raw_os_error(libc::EIO)).at_path(&self.disk.spec().path));
        }
        Ok(())
    }

    fn unit(&self) -> u64 {
        self.disk.node().unit()
    }

    /// Locks the sectors of a range against other writers of bytes.
    async fn lock(&self, offset: u64, len: u64) -> impl Sized + '_ {
        self.disk.byte_writers().lock(offset & !511..(offset + len).next_multiple_of(512)).await
    }

    async fn request(&self, request: Request) -> Result<()> {
        self.disk.request(&self.queue, self.number, &request).await?;
        if self.disk.spec().cache.is_write_through() && request.written().is_some() {
            return self.disk.request(&self.queue, self.number, &Request::Flush).await;
        }
        Ok(())
    }

    async fn flush_if(&self, durable: bool) -> Result<()> {
        if durable { self.request(Request::Flush).await } else { Ok(()) }
    }

    async fn read(&self, offset: u64, memory: &Memory) -> Result<()> {
        if self.copy_on_read {
            self.copy(offset, memory.len()).await?;
        }
        self.read_uncopied(offset, memory).await
    }

    async fn read_uncopied(&self, offset: u64, memory: &Memory) -> Result<()> {
        let edges = Edges::new(self.unit(), offset, memory.len());
        let data = edges.around(offset, &memory.segs());
        self.request(Request::Read { offset: edges.start, data }).await
    }

    async fn write(&self, offset: u64, data: &[IoSeg]) -> Result<()> {
        let len = segs_len(data);
        if self.disk.spec().compress {
            return self.write_clusters(offset, data).await;
        }
        let _writing = self.lock(offset, len).await;
        let edges = Edges::new(self.unit(), offset, len);
        self.read_edges(&edges).await?;
        self.request(Request::Write { offset: edges.start, data: edges.around(offset, data) }).await
    }

    /// Writes data compressed, with what there is of its clusters around it.
    async fn write_clusters(&self, offset: u64, data: &[IoSeg]) -> Result<()> {
        let (cluster, end) = (u64::from(self.disk.node().granularity()), offset + segs_len(data));
        let whole = offset - offset % cluster..end.next_multiple_of(cluster).min(self.disk.size());
        let _writing = self.lock(whole.start, whole.end - whole.start).await;
        // They stay until the write is over.
        let around = [whole.start..offset, end..whole.end];
        let around = around.map(|range| (range.start, Memory::new(Buffer::zeroed((range.end - range.start) as usize))));
        for (at, memory) in around.iter().filter(|(_, memory)| !memory.is_empty()) {
            self.read_uncopied(*at, memory).await?;
        }
        let [(_, head), (_, tail)] = &around;
        let segs = [head.segs(), data.to_vec(), tail.segs()].concat();
        self.write_compressed(whole.start, segs.into_iter().filter(|seg| !seg.is_empty()).collect()).await
    }

    /// Writes whole clusters compressed. The caller has locked them.
    async fn write_compressed(&self, offset: u64, data: Vec<IoSeg>) -> Result<()> {
        let len = segs_len(&data);
        let written = self.request(Request::WriteCompressed { offset, data }).await;
        let cluster = u64::from(self.disk.node().granularity());
        let whole = offset.is_multiple_of(cluster) && (len.is_multiple_of(cluster) || offset + len == self.disk.size());
        written.map_err(|e| match e.kind() {
            // Not the request's shape, but what is there already: to QEMU's tools an error of the image's I/O.
            ErrorKind::Invalid if whole => {
                let path = self.disk.spec().path.clone();
                Error::io(e.reason(), io::Error::from_raw_os_error(libc::EIO)).at_path(path)
            }
            _ => e,
        })
    }

    async fn read_edges(&self, edges: &Edges) -> Result<()> {
        for (offset, sector) in edges.sectors(self.unit()) {
            self.request(Request::Read { offset, data: vec![sector.seg(0, sector.len())] }).await?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, fast_only: bool) -> Result<()> {
        let _writing = self.lock(offset, len).await;
        let (unit, end) = (self.unit(), offset + len);
        let edges = Edges::new(unit, offset, len);
        self.read_edges(&edges).await?;
        let (mut start, mut stop) = (edges.start, edges.end);
        // A sector that is named in part is zeroed as a whole if the rest of it is zero, and otherwise written.
        let mut writes = Vec::new();
        for (at, sector) in edges.sectors(unit) {
            let named = (offset.max(at) - at) as usize..(end.min(at + unit) - at) as usize;
            let rest = [sector.seg(0, named.start), sector.seg(named.end, sector.len() - named.end)];
            if is_zero(&rest) {
                continue;
            }
            fill_zero(&[sector.seg(named.start, named.len())]);
            writes.push(Request::Write { offset: at, data: vec![sector.seg(0, sector.len())] });
            if at == edges.start {
                start = at + unit;
            } else {
                stop = at;
            }
        }
        let whole = start..stop.max(start);
        if fast_only && !(writes.is_empty() && self.zeroes_without_writing(&whole).await?) {
            let message = "zeros would have to be written here";
            return Err(Error::new(ErrorKind::Unsupported, message).at_path(&self.disk.spec().path));
        }
        for write in writes {
            self.request(write).await?;
        }
        if whole.is_empty() {
            return Ok(());
        }
        self.disk.say_zeroes(&self.queue, self.number, whole, unmap).await?;
        self.flush_if(self.disk.spec().cache.is_write_through()).await
    }

    async fn zeroes_without_writing(&self, range: &Range<u64>) -> Result<bool> {
        let (_entered, node) = self.disk.enter_to_look(self.number).await?;
        node.zeroes_without_writing(&self.queue, range.start, range.end - range.start).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let _writing = self.lock(offset, len).await;
        let unit = self.unit();
        let (start, end) = (offset.next_multiple_of(unit), offset + len - (offset + len) % unit);
        if start >= end {
            return Ok(());
        }
        self.request(Request::Discard { offset: start, len: end - start }).await
    }

    /// Writes what the topmost layer lacks of a range into it, whole clusters at a time.
    async fn copy(&self, offset: u64, len: u64) -> Result<()> {
        let cluster = u64::from(self.disk.node().granularity());
        let start = offset - offset % cluster;
        let end = (offset + len).next_multiple_of(cluster).min(self.disk.size());
        let _writing = self.lock(start, end - start).await;
        let mut at = start;
        while at < end {
            let extent = {
                let (_entered, node) = self.disk.enter_to_look(self.number).await?;
                if matches!(*node, Node::Raw(_)) {
                    return Ok(());
                }
                node.extent(&self.queue, at, end - at).await?
            };
            let stop = extent.range.end.next_multiple_of(cluster).min(end);
            if extent.depth == 0 || extent.content == Content::Nothing {
                at = extent.range.end;
                continue;
            }
            at -= at % cluster;
            while at < stop {
                let n = (stop - at).min(cluster.max(1 << 20));
                let buffer = Buffer::zeroed(n as usize);
                let data = || vec![buffer.seg(0, buffer.len())];
                self.request(Request::Read { offset: at, data: data() }).await?;
                let write = if is_zero(&data()) {
                    Request::WriteZeroes { offset: at, len: n, unmap: true }
                } else {
                    Request::Write { offset: at, data: data() }
                };
                self.request(write).await?;
                at += n;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "bytes_test.rs"]
mod tests;
