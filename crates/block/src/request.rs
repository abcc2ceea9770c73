//! What a device model asks of a disk, and what it hears back.
//!
//! This is the engine's front: [`Request`] in, [`Event`] out, through a [`RequestQueue`] that one thread owns. It
//! says nothing of formats, files or guests.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use crate::error::Error;
use crate::io::{IoSeg, segs_len};

/// One request to a disk. Offsets and lengths are bytes of the virtual disk, multiples of 512.
#[derive(Debug)]
pub enum Request {
    /// Reads from `offset` into `data`, as many bytes as `data` holds.
    Read {
        /// Where on the virtual disk.
        offset: u64,
        /// Where the bytes go.
        data: Vec<IoSeg>,
    },
    /// Writes `data` at `offset`.
    Write {
        /// Where on the virtual disk.
        offset: u64,
        /// Where the bytes come from.
        data: Vec<IoSeg>,
    },
    /// Writes `data` at `offset` compressed, if the image's format can and that makes it smaller. For who fills an image: whole clusters
    /// (the disk's last one may be a part) that have no data yet, and else it fails.
    WriteCompressed {
        /// Where on the virtual disk: the start of a cluster.
        offset: u64,
        /// Where the bytes come from.
        data: Vec<IoSeg>,
    },
    /// Makes every write that completed before this request was submitted durable.
    Flush,
    /// Says that the range's content is no longer needed: a hint, after which it reads as zeros or as it was.
    Discard {
        /// Where on the virtual disk.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Makes the range read as zeros.
    WriteZeroes {
        /// Where on the virtual disk.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether the host space may be given back.
        unmap: bool,
    },
}

impl Request {
    /// The bytes whose content it may change.
    pub(crate) fn written(&self) -> Option<Range<u64>> {
        let (offset, len) = match self {
            Self::Read { .. } | Self::Flush => return None,
            Self::Write { offset, data } | Self::WriteCompressed { offset, data } => (*offset, segs_len(data)),
            Self::Discard { offset, len } | Self::WriteZeroes { offset, len, .. } => (*offset, *len),
        };
        Some(offset..offset.saturating_add(len))
    }

    /// The segment list, to be given back; empty for a request without one.
    pub(crate) fn into_data(self) -> Vec<IoSeg> {
        match self {
            Self::Read { data, .. } | Self::Write { data, .. } | Self::WriteCompressed { data, .. } => data,
            Self::Flush | Self::Discard { .. } | Self::WriteZeroes { .. } => Vec::new(),
        }
    }
}

/// What a queue has to tell the thread that serves it.
#[derive(Debug)]
pub enum Event {
    /// A request has completed.
    Done {
        /// The tag that the request was submitted with.
        tag: u64,
        /// How it ended. After a failed write the range holds old bytes, new bytes, or a mix.
        result: Result<(), Error>,
        /// The request's segment list, given back so that its allocation can be used again.
        data: Vec<IoSeg>,
    },
    /// A watched descriptor became readable; its eventfd counter has been read (and so reset).
    Ready {
        /// The tag that the descriptor was watched with.
        tag: u64,
    },
}

/// Whether [`RequestQueue::wait`] may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Sleep until there is at least one event.
    Block,
    /// Submit what is pending, take what is there, and return at once.
    Poll,
}

/// A queue of requests to one disk, owned by the one thread that serves it.
pub trait RequestQueue {
    /// Takes a request. It is sent with the next [`wait`](Self::wait), together with all others submitted before it;
    /// its [`Event::Done`] carries `tag` back. Out-of-range requests complete with an error.
    fn submit(&mut self, tag: u64, request: Request);

    /// Reports [`Event::Ready`] with `tag` each time the eventfd `fd` is signalled, until the queue is dropped. The
    /// descriptor must stay open as long.
    ///
    /// # Errors
    /// When the driver cannot watch the descriptor.
    fn watch(&mut self, fd: RawFd, tag: u64) -> io::Result<()>;

    /// Submits what is pending and appends what has happened to `events`.
    ///
    /// # Errors
    /// Only when the driver itself or a watched descriptor fails: the queue cannot be used any more then.
    fn wait(&mut self, mode: Wait, events: &mut Vec<Event>) -> io::Result<()>;

    /// Whether [`wait`](Self::wait) would have something to tell at once, as far as that shows without a system call: for
    /// threads that look for work for a while before they sleep. It may overlook something, which a sleep does not.
    fn has_news(&mut self) -> bool {
        false
    }

    /// The number of requests submitted and not yet reported done.
    fn in_flight(&self) -> usize;
}

/// What a disk's user has to know of its geometry. Bytes throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The logical block size that the guest is told: 512 unless asked otherwise.
    pub block_size: u32,
    /// The physical block size (topology); a power of two, at least `block_size`.
    pub physical_block_size: u32,
    /// The smallest discard that frees space, and its alignment: the cluster size for qcow2.
    pub discard_granularity: u32,
    /// The most bytes that one discard or write-zeroes segment may name.
    pub max_discard: u64,
}
