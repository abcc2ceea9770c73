//! Which pages of guest memory a device has written: what a live migration copies again (QEMU's docs/interop/vhost-user.rst,
//! "Migration").
//!
//! A device marks after it has written, and before it lets go of what it has written: data and status before the used ring's
//! index names the chain. What the driver sees is then marked already, whenever the device dies; the ring itself a device marks as a whole when
//! it starts. No lock: the log's words are atomic, and the front-end takes bits out of them while they are set.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;

use crate::SharedWords;
use crate::chain::Span;

/// Bytes that a bit of the log stands for, as a power of two.
const PAGE_BITS: u32 = 12;

/// Where writes to guest memory are noted.
pub trait DirtyLog: Send + Sync {
    /// `len` bytes from `address` on have been written.
    fn mark(&self, address: GuestAddress, len: u64);
}

/// What of a queue is noted, and where.
pub struct DirtyMarks {
    /// Takes the marks.
    pub log: Arc<dyn DirtyLog>,
    /// Where the log has the used ring, if writes to that are noted too: the front-end's choice, not always the ring's own address.
    pub used_ring: Option<GuestAddress>,
}

impl DirtyMarks {
    /// All these bytes have been written.
    pub(crate) fn spans(&self, spans: impl IntoIterator<Item = Span>) {
        for span in spans {
            self.log.mark(span.addr, span.len.into());
        }
    }

    /// `len` bytes at `offset` of the used ring have been written.
    pub(crate) fn ring(&self, offset: u64, len: u64) {
        // A ring that the front-end puts where it would wrap around lies outside every log.
        if let Some(at) = self.used_ring.and_then(|ring| ring.0.checked_add(offset)) {
            self.log.mark(GuestAddress(at), len);
        }
    }
}

/// A log in shared memory: the bit of page n is bit n % 8 of byte n / 8. On a little-endian host, as are all that this runs
/// on, that is bit n % 64 of word n / 64.
pub struct PageLog {
    words: SharedWords,
    pages: u64,
}

impl PageLog {
    /// A log in the first `bytes` bytes of `words`, or in all of them if they are fewer. Pages beyond it are not noted.
    #[must_use]
    pub fn new(words: SharedWords, bytes: u64) -> Self {
        let all = (*words).as_ref().len() as u64 * 64;
        Self { words, pages: bytes.saturating_mul(8).min(all) }
    }
}

impl DirtyLog for PageLog {
    fn mark(&self, address: GuestAddress, len: u64) {
        if len == 0 || self.pages == 0 {
            return;
        }
        let first = address.0 >> PAGE_BITS;
        let last = (address.0.saturating_add(len - 1) >> PAGE_BITS).min(self.pages - 1);
        if first > last {
            return;
        }
        let (low, high) = (first / 64, last / 64);
        // Both indices are below the number of words that there were when the log was made: a mapping does not shrink.
        for (word, at) in (*self.words).as_ref()[low as usize..=high as usize].iter().zip(low..) {
            let from = if at == low { u64::MAX << (first % 64) } else { u64::MAX };
            let to = if at == high { u64::MAX >> (63 - last % 64) } else { u64::MAX };
            // Also where the bits are set already: the front-end may have taken them, and read the page, between our write of the
            // page and a look at the bits.
            word.fetch_or(from & to, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
#[path = "dirty_test.rs"]
mod tests;
