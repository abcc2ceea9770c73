//! The memory that outlives this process (section "Inflight I/O tracking"): made here, kept by the front-end, which gives it to
//! whichever process serves the disk next.
//!
//! ```text
//! records   one queue after the other: which chains were taken and not given back (cowhand_virtio::blk::InflightQueue)
//! header    whether it is ours, and what the guest has set by the configuration space
//! journal   changes of the mapping that are not in the image file yet (cowhand_block::Survival::Journal)
//! ```
//!
//! Only the records are the specification's: a back-end may have more room than it needs, and nobody else reads it. The front-end can
//! change all of it: who reads it again after a restart takes nothing on trust.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cowhand_block::SharedWords;
use cowhand_virtio::blk::InflightQueue;
use vhost::vhost_user::message::VhostUserInflight;

use crate::shared::SharedMemory;
use crate::wake::Wake;

/// "cowhand" and the version of this layout.
const MAGIC: u64 = u64::from_be_bytes(*b"cowhand\x01");
/// Words of the header: the magic number, what the writeback field was set to, which disk this is of, and room.
const HEADER_WORDS: usize = 8;
/// The journal begins on a page of its own whatever the page size: it is touched only when there is something to write.
const JOURNAL_ALIGN: usize = (64 << 10) / size_of::<u64>();

/// How the memory is laid out for so many queues of such a size. Places are in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    queues: u16,
    queue_size: u16,
    header: usize,
    journal: usize,
    end: usize,
}

impl Layout {
    fn new(queues: u16, queue_size: u16) -> Self {
        let header = InflightQueue::words_for(queue_size) * usize::from(queues);
        let journal = (header + HEADER_WORDS).next_multiple_of(JOURNAL_ALIGN);
        Self { queues, queue_size, header, journal, end: journal + cowhand_block::JOURNAL_WORDS }
    }

    fn bytes(&self) -> u64 {
        (self.end * size_of::<u64>()) as u64
    }
}

/// A part of shared words.
struct Part {
    whole: Arc<SharedMemory>,
    range: std::ops::Range<usize>,
}

impl AsRef<[AtomicU64]> for Part {
    fn as_ref(&self) -> &[AtomicU64] {
        // The layout was held against the mapping's size.
        (*self.whole).as_ref().get(self.range.clone()).unwrap_or_default()
    }
}

/// The memory, mapped.
pub(crate) struct Inflight {
    layout: Layout,
    memory: Arc<SharedMemory>,
}

impl Inflight {
    /// Makes memory for as many queues of such a size as the front-end says: to be given to it.
    ///
    /// # Errors
    /// The system has no room.
    pub(crate) fn create(asked: &VhostUserInflight) -> io::Result<(VhostUserInflight, File)> {
        let layout = Layout::new(asked.num_queues, asked.queue_size);
        let file = SharedMemory::create(c"cowhand-inflight", layout.bytes())?;
        Ok((VhostUserInflight::new(layout.bytes(), 0, asked.num_queues, asked.queue_size), file))
    }

    /// Takes memory that the front-end kept.
    ///
    /// # Errors
    /// It is none that [`create`](Self::create) made, as far as can be seen.
    pub(crate) fn adopt(given: &VhostUserInflight, file: &File, lost: &Wake) -> io::Result<Self> {
        let wrong = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let layout = Layout::new(given.num_queues, given.queue_size);
        if given.mmap_size != layout.bytes() {
            return wrong("the memory of in-flight records has another size than this version makes it");
        }
        if !SharedMemory::cannot_shrink(file) {
            return wrong("the memory of in-flight records is not the back-end's: it could be shortened");
        }
        let memory = Arc::new(SharedMemory::map(file, given.mmap_offset, given.mmap_size, lost)?);
        let this = Self { layout, memory };
        match this.header(0).compare_exchange(0, MAGIC, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) | Err(MAGIC) => Ok(this),
            Err(_) => wrong("the memory of in-flight records was made by another program, or another version"),
        }
    }

    fn header(&self, word: usize) -> &AtomicU64 {
        // The layout was held against the mapping's size.
        &(*self.memory).as_ref()[self.layout.header + word]
    }

    /// The size that the queues were said to have.
    pub(crate) fn queue_size(&self) -> u16 {
        self.layout.queue_size
    }

    /// The words in which a queue's records lie, and where; none for a queue that the front-end did not speak of.
    pub(crate) fn records(&self, queue: u16) -> Option<(SharedWords, usize)> {
        let at = InflightQueue::words_for(self.layout.queue_size) * usize::from(queue);
        (queue < self.layout.queues).then(|| (self.memory.clone() as SharedWords, at))
    }

    /// Forgets a queue's records: it is drained, and may begin again elsewhere, at any index.
    pub(crate) fn forget(&self, queue: u16) {
        let Some((_, at)) = self.records(queue) else { return };
        let words = (*self.memory).as_ref().iter().skip(at).take(InflightQueue::words_for(self.layout.queue_size));
        words.for_each(|word| word.store(0, Ordering::Release));
    }

    /// The engine's part.
    pub(crate) fn journal(&self) -> SharedWords {
        Arc::new(Part { whole: self.memory.clone(), range: self.layout.journal..self.layout.end })
    }

    /// Whether the disk that the memory was used with first is this one: 0 is one that any process can open, others exist once.
    pub(crate) fn is_of(&self, instance: u64) -> bool {
        // 0 is memory that was not used yet.
        let first = self.header(2).compare_exchange(0, instance.wrapping_add(1), Ordering::AcqRel, Ordering::Acquire);
        first.is_ok() || first == Err(instance.wrapping_add(1))
    }

    /// What the guest has last set the writeback field to, in this or an earlier process.
    pub(crate) fn writeback(&self) -> Option<bool> {
        match self.header(1).load(Ordering::Acquire) {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    /// Keeps what the guest has set the writeback field to; none when the device was reset.
    pub(crate) fn keep_writeback(&self, writeback: Option<bool>) {
        let word = writeback.map_or(0, |writeback| 1 + u64::from(writeback));
        self.header(1).store(word, Ordering::Release);
    }
}
