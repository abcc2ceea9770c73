//! Memory that takes part in I/O: guest memory, named by address, and the engine's own buffers.
//!
//! This room owns the `unsafe` of touching memory by address, so that the rest of the engine can split, join and
//! fill buffers without any. It does not know where the bytes go.

use std::fmt;
use std::sync::OnceLock;

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

/// The number of bytes in a segment list.
#[must_use]
pub fn segs_len(segs: &[IoSeg]) -> u64 {
    segs.iter().map(|s| s.len() as u64).sum()
}

/// The part `start..start + len` of a segment list. What lies past its end is left out.
#[must_use]
pub fn split_segs(segs: &[IoSeg], start: u64, len: u64) -> Vec<IoSeg> {
    let mut out = Vec::with_capacity(segs.len());
    let mut skip = start;
    let mut left = len;
    for seg in segs {
        if left == 0 {
            break;
        }
        let seg_len = seg.len() as u64;
        if skip >= seg_len {
            skip -= seg_len;
            continue;
        }
        let take = (seg_len - skip).min(left);
        // SAFETY: skip + take <= seg.len(), so the part lies inside the segment, whose maker's promise covers it.
        out.push(unsafe { IoSeg::new(seg.base().wrapping_add(skip as usize), take as usize) });
        skip = 0;
        left -= take;
    }
    out
}

/// Writes zeros to all bytes of a segment list.
pub fn fill_zero(segs: &[IoSeg]) {
    for seg in segs {
        // SAFETY: the promise of `IoSeg::new`: base..base + len is mapped and writable, and no reference to it is live.
        unsafe { std::ptr::write_bytes(seg.base(), 0, seg.len()) };
    }
}

/// Memory of the engine's own, zeroed, aligned to [`Buffer::ALIGN`] so that direct I/O can use it.
pub struct Buffer {
    base: *mut u8,
    len: usize,
}

// SAFETY: a Buffer owns its allocation alone, as a Vec does.
unsafe impl Send for Buffer {}
// SAFETY: shared references give only shared references to its bytes.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// The alignment of every buffer: no storage asks for more.
    pub const ALIGN: usize = 4096;

    /// A zeroed buffer of `len` bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let Some(layout) = Self::layout(len) else {
            return Self { base: std::ptr::null_mut(), len: 0 };
        };
        // SAFETY: the layout has a size above 0.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        if base.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Self { base, len }
    }

    /// A buffer that holds a copy of `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// The layout of the allocation behind `len` bytes; none for 0 bytes (and for what no allocator can give).
    fn layout(len: usize) -> Option<std::alloc::Layout> {
        if len == 0 { None } else { std::alloc::Layout::from_size_align(len, Self::ALIGN).ok() }
    }

    /// Names `start..start + len` of this buffer for I/O.
    ///
    /// The operation must own the buffer until it has completed: [`crate::queue::Queue`] sees to that.
    pub(crate) fn seg(&self, start: usize, len: usize) -> IoSeg {
        assert!(start <= self.len && len <= self.len - start, "segment inside the buffer");
        // SAFETY: the range was just checked; the callers (see above) keep the buffer, unreferenced, until completion.
        unsafe { IoSeg::new(self.base.wrapping_add(start), len) }
    }

    /// Copies `start..` of this buffer to the segments, as far as both reach.
    pub fn scatter(&self, start: usize, segs: &[IoSeg]) {
        let mut rest = self.get(start..).unwrap_or_default();
        for seg in segs {
            let n = seg.len().min(rest.len());
            // SAFETY: n <= seg.len(), which is writable by the promise of `IoSeg::new`; `rest` has n bytes; the engine's
            // buffers and guest memory are distinct allocations.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), seg.base(), n) };
            rest = &rest[n..];
        }
    }

    /// Copies the segments into this buffer from `start` on, as far as both reach.
    pub fn gather(&mut self, start: usize, segs: &[IoSeg]) {
        let mut rest = self.get_mut(start..).unwrap_or_default();
        for seg in segs {
            let n = seg.len().min(rest.len());
            // SAFETY: n <= seg.len(), which is readable by the promise of `IoSeg::new`; `rest` has n bytes; the engine's
            // buffers and guest memory are distinct allocations.
            unsafe { std::ptr::copy_nonoverlapping(seg.base(), rest.as_mut_ptr(), n) };
            rest = &mut rest[n..];
        }
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: base is an initialised allocation of len bytes that lives as long as self.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: base is an initialised allocation of len bytes that lives as long as self, and self is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: `zeroed` allocated base with this very layout.
            unsafe { std::alloc::dealloc(self.base, layout) };
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

/// The bytes of zeros that [`zero_segs`] repeats.
const ZEROS: usize = 64 * 1024;

/// A segment list of `len` bytes of zeros, to be written from (never read into). It costs no memory of its own but the list.
#[must_use]
pub fn zero_segs(len: u64) -> Vec<IoSeg> {
    static ZERO: OnceLock<Buffer> = OnceLock::new();
    let zero = ZERO.get_or_init(|| Buffer::zeroed(ZEROS));
    let mut out = Vec::with_capacity(len.div_ceil(ZEROS as u64) as usize);
    let mut left = len;
    while left > 0 {
        let n = left.min(ZEROS as u64);
        out.push(zero.seg(0, n as usize));
        left -= n;
    }
    out
}

/// Whether all bytes of a segment list are zero.
#[must_use]
pub fn is_zero(segs: &[IoSeg]) -> bool {
    const CHUNK: usize = 4096;
    let mut copy = Buffer::zeroed(CHUNK);
    let total = segs_len(segs);
    let mut done = 0;
    while done < total {
        // Copied first: a guest may change its memory while we look, and no reference to it may exist.
        let part = split_segs(segs, done, CHUNK as u64);
        let n = segs_len(&part) as usize;
        copy.gather(0, &part);
        if copy[..n].iter().any(|&byte| byte != 0) {
            return false;
        }
        done += n as u64;
    }
    true
}

/// Whether an operation on these segments at `offset` meets a storage's alignment.
#[must_use]
pub fn is_aligned(align: u32, offset: u64, segs: &[IoSeg]) -> bool {
    let mask = u64::from(align) - 1;
    align <= 1 || (offset & mask == 0 && segs.iter().all(|s| (s.base() as u64 | s.len() as u64) & mask == 0))
}
