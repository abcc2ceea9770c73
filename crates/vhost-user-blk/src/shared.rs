//! Memory that is shared with the front-end, as words that anybody may change at any time.
//!
//! The only room of this crate that maps memory (but for the guest's, which `vm-memory` maps).

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::param::page_size;

use crate::sigbus::Guarded;
use crate::wake::Wake;

const WORD: u64 = size_of::<u64>() as u64;

/// A part of a file, mapped shared and writable until it is dropped.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    /// The start of the mapping: a page.
    address: NonNull<c_void>,
    /// Bytes of the mapping.
    len: usize,
    /// Words from the start of the mapping to the first of ours, and how many those are.
    first: usize,
    words: usize,
    /// None when the memory is not mapped any more.
    guarded: Option<Guarded>,
}

// SAFETY: the mapping belongs to this value alone until it is dropped, and is only ever reached as atomic words.
unsafe impl Send for SharedMemory {}
// SAFETY: as above: shared references give shared references to atomics.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `len` bytes at `offset` of `file`, which must be there already; `offset` is a multiple of 8, and what of `len` does
    /// not fill a word counts as one. `lost` is rung if the file is shortened later.
    ///
    /// # Errors
    /// The file is shorter, the numbers cannot be, or the system refuses.
    pub(crate) fn map(file: impl AsFd, offset: u64, len: u64, lost: &Wake) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let size = u64::try_from(fstat(&file)?.st_size).unwrap_or(0);
        let end = offset.checked_add(len).ok_or_else(|| wrong("it ends past the end of all addresses"))?;
        if len == 0 || end > size {
            return Err(wrong(&format!("it is to have {len} bytes at {offset}, and its file has {size}")));
        }
        if !offset.is_multiple_of(WORD) {
            return Err(wrong("it does not begin at a multiple of 8"));
        }
        let page = page_size() as u64;
        let start = offset / page * page;
        // Rounded up to a word it still ends within the page in which the file's part ends.
        let words = usize::try_from(len.div_ceil(WORD)).map_err(|_| wrong("it is too large"))?;
        let bytes = usize::try_from((end - start).next_multiple_of(WORD)).map_err(|_| wrong("it is too large"))?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice: nothing that is mapped already is touched.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file, start)? };
        let address = NonNull::new(address).ok_or_else(|| wrong("it was mapped at address 0"))?;
        // Unmapped by its drop from here on, whatever fails.
        let mut this = Self { address, len: bytes, first: ((offset - start) / WORD) as usize, words, guarded: None };
        this.guarded = Some(Guarded::new(address.as_ptr(), bytes, lost)?);
        Ok(this)
    }

    /// Makes `len` bytes of memory (zeros, not touched yet) that others can map but nobody can shorten.
    ///
    /// # Errors
    /// The system has no room.
    pub(crate) fn create(name: &std::ffi::CStr, len: u64) -> io::Result<File> {
        let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, len)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file.into())
    }

    /// Whether nobody can shorten `file`, so that no access to its mapping can fail.
    pub(crate) fn cannot_shrink(file: impl AsFd) -> bool {
        fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    }
}

impl AsRef<[AtomicU64]> for SharedMemory {
    fn as_ref(&self) -> &[AtomicU64] {
        // SAFETY: `first` words lie inside the mapping, whose length is that of the file's part from its page on.
        let first = unsafe { self.address.cast::<AtomicU64>().add(self.first) };
        // SAFETY: `words` words from there on are mapped as long as `self` lives, and a page's start plus whole words is
        // aligned. All bit patterns are valid, and whoever else has the memory cannot break an atomic's rules.
        unsafe { std::slice::from_raw_parts(first.as_ptr(), self.words) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.guarded = None;
        // SAFETY: the mapping is ours, of just this length, and no reference into it outlives `self`.
        if let Err(error) = unsafe { munmap(self.address.as_ptr(), self.len) } {
            tracing::error!("cannot unmap shared memory: {error}");
        }
    }
}
