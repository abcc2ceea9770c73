//! A descriptor chain as a device sees it: what the driver lets it read, then what it lets it write.
//!
//! The walk over the descriptors is judged (did it end where the driver ended it, is the order right) and kept as spans of
//! guest memory, without an allocation once a [`Chain`] has been used for a while. No span has been checked against guest memory; each
//! access does that. The walk is not virtio-queue's, which walks only from an entry of the available ring: a chain that was in
//! flight when its process died has to be walked again from its head, where that entry may be another's by now.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions};

/// Bytes of guest memory, as one descriptor names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub addr: GuestAddress,
    /// Bytes, more than none.
    pub len: u32,
}

/// What is wrong with a chain as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// It does not end: it loops, leaves its table, names a table outside memory, or exceeds 4 GiB. What its last
    /// descriptor would have been is not known.
    Endless,
    /// A readable descriptor follows a writable one (sect. 2.7.4.2 forbids it).
    Order,
    /// It has more descriptors than the device takes.
    TooLong,
}

/// The most descriptors that are kept of one chain.
pub const MAX_SPANS: usize = 1024;

/// A chain's spans, to be filled again and again.
#[derive(Debug, Default)]
pub struct Chain {
    readable: Vec<Span>,
    writable: Vec<Span>,
    readable_len: u64,
    writable_len: u64,
    last_writable: Option<Span>,
    fault: Option<ChainFault>,
}

impl Chain {
    /// An empty chain.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in another chain: the one that starts at descriptor `head` of the queue's table, whatever that is. Bounded by the
    /// length of the descriptor tables (65535 entries at most).
    pub fn fill(&mut self, memory: &GuestMemoryMmap, queue: &Queue, head: u16) {
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
        self.last_writable = None;
        self.fault = None;
        // The walk ends without a word also where it cannot go on; a last descriptor that has a next tells.
        let mut ended = false;
        let mut fault = None;
        for descriptor in Descriptors::of(memory, queue, head) {
            ended = !descriptor.has_next();
            let span = Span { addr: descriptor.addr(), len: descriptor.len() };
            if span.len == 0 {
                continue;
            }
            let (spans, len) = if descriptor.is_write_only() {
                self.last_writable = Some(span);
                (&mut self.writable, &mut self.writable_len)
            } else {
                if self.last_writable.is_some() {
                    fault = Some(ChainFault::Order);
                }
                (&mut self.readable, &mut self.readable_len)
            };
            *len += u64::from(span.len);
            if spans.len() == MAX_SPANS {
                fault = fault.or(Some(ChainFault::TooLong));
            } else {
                spans.push(span);
            }
        }
        self.fault = if ended { fault } else { Some(ChainFault::Endless) };
    }

    /// What is wrong with the chain, if anything.
    #[must_use]
    pub fn fault(&self) -> Option<ChainFault> {
        self.fault
    }

    /// What the device may read.
    #[must_use]
    pub fn readable(&self) -> &[Span] {
        &self.readable
    }

    /// What the device may write.
    #[must_use]
    pub fn writable(&self) -> &[Span] {
        &self.writable
    }

    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// The address of the last byte that the device may write; none for an endless chain.
    #[must_use]
    pub fn last_writable_byte(&self) -> Option<GuestAddress> {
        if self.fault == Some(ChainFault::Endless) {
            return None;
        }
        self.last_writable.and_then(|span| span.addr.checked_add(u64::from(span.len - 1)))
    }

    /// Copies `to.len()` bytes out of the readable part, from byte `offset` on. Says whether there were as many, all in memory.
    ///
    /// # Errors
    /// When a span is not in guest memory.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: u64, to: &mut [u8]) -> Result<bool, GuestMemoryError> {
        let mut done = 0;
        for part in part(&self.readable, offset, to.len() as u64) {
            let len = part.len as usize;
            memory.read_slice(&mut to[done..done + len], part.addr)?;
            done += len;
        }
        Ok(done == to.len())
    }

    /// Copies `from` into the writable part, from byte `offset` on, as far as it goes. Gives the number of bytes.
    ///
    /// # Errors
    /// When a span is not in guest memory; nothing has been written then.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: u64, from: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for part in part(&self.writable, offset, from.len() as u64) {
            if !memory.check_range(part.addr, part.len as usize, Permissions::Write) {
                return Err(GuestMemoryError::InvalidGuestAddress(part.addr));
            }
        }
        for part in part(&self.writable, offset, from.len() as u64) {
            let len = part.len as usize;
            memory.write_slice(&from[done..done + len], part.addr)?;
            done += len;
        }
        Ok(done)
    }
}

/// The descriptors of a chain, in its order. Ends where the chain does, and where it cannot be followed.
struct Descriptors<'a> {
    memory: &'a GuestMemoryMmap,
    /// The table that the walk is in, and its number of entries.
    table: GuestAddress,
    entries: u16,
    index: u16,
    /// How many more the table can have without one that comes again.
    left: u16,
    indirect: bool,
    bytes: u32,
}

impl<'a> Descriptors<'a> {
    fn of(memory: &'a GuestMemoryMmap, queue: &Queue, head: u16) -> Self {
        let (table, entries) = (GuestAddress(queue.desc_table()), queue.size());
        Self { memory, table, entries, index: head, left: entries, indirect: false, bytes: 0 }
    }

    /// Goes on at the start of the table that a descriptor names. A table in a table there is not (sect. 2.7.5.3.1).
    fn enter(&mut self, descriptor: Descriptor) -> Option<()> {
        const ENTRY: u32 = size_of::<Descriptor>() as u32;
        if self.indirect || !descriptor.len().is_multiple_of(ENTRY) {
            return None;
        }
        self.entries = u16::try_from(descriptor.len() / ENTRY).ok()?;
        (self.table, self.index, self.left, self.indirect) = (descriptor.addr(), 0, self.entries, true);
        Some(())
    }

    fn read(&self) -> Option<Descriptor> {
        if self.left == 0 || self.index >= self.entries {
            return None;
        }
        let at = self.table.checked_add(u64::from(self.index) * size_of::<Descriptor>() as u64)?;
        self.memory.read_obj(at).ok()
    }
}

impl Iterator for Descriptors<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(descriptor)?;
            descriptor = self.read()?;
            if descriptor.refers_to_indirect_table() {
                return None;
            }
        }
        // No chain is longer than 4 GiB (sect. 2.7.5.2).
        self.bytes = self.bytes.checked_add(descriptor.len())?;
        if descriptor.has_next() {
            self.index = descriptor.next();
            self.left -= 1;
        } else {
            self.left = 0;
        }
        Some(descriptor)
    }
}

/// The parts of `spans` that make up bytes `offset..offset + len` of them all; less where they end earlier.
pub fn part(spans: &[Span], offset: u64, len: u64) -> impl Iterator<Item = Span> {
    let (mut skip, mut left) = (offset, len);
    spans.iter().filter_map(move |span| {
        let size = u64::from(span.len);
        if skip >= size {
            skip -= size;
            return None;
        }
        let take = (size - skip).min(left);
        // A span that wraps around the address space is cut off; the access after it fails as being outside memory.
        let addr = span.addr.checked_add(skip).unwrap_or(GuestAddress(u64::MAX));
        (skip, left) = (0, left - take);
        (take > 0).then_some(Span { addr, len: take as u32 })
    })
}

#[cfg(test)]
#[path = "chain_test.rs"]
mod tests;
