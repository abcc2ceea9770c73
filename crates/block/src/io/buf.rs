//! Memory that takes part in I/O: guest memory, named by address, and the engine's own buffers.
//!
//! This room owns the `unsafe` of touching memory by address, so that the rest of the engine can split, join and
//! fill buffers without any. It does not know where the bytes go.

use std::fmt;

/// One contiguous piece of memory that a request reads into or writes from; laid out as the kernel's `iovec`.
///
/// Whoever makes one promises that the memory stays mapped until the request that carries it has completed (see
/// [`IoSeg::new`]). The bytes may be changed by others (a guest) at any time; the engine never forms a Rust
/// reference to them.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoSeg(libc::iovec);

// SAFETY: an address and a length are plain values; the promise given in `IoSeg::new` holds on every thread.
unsafe impl Send for IoSeg {}

impl IoSeg {
    /// Names `len` bytes of memory at `base`.
    ///
    /// # Safety
    /// `base..base + len` must be mapped, readable and writable, until the request that this segment is given to has
    /// completed or its queue has been dropped, and no Rust reference to it may be live meanwhile.
    #[must_use]
    pub const unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// The address of the first byte.
    #[must_use]
    pub const fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether the segment has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

impl fmt::Debug for IoSeg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoSeg({:p}+{})", self.0.iov_base, self.0.iov_len)
    }
}
