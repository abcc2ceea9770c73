//! Guest memory: a named, shared memfd, mapped once, correct around the architecture's holes.
//!
//! Not here: who uses it. KVM gets it in [`crate::kvm`], devices get a [`GuestMemory`].

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::layout;

/// Guest memory as devices hold it: cheap to clone, and exchangeable under them.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is outside what the machine can hold.
    #[error("the guest's memory must be between {} and {} MiB, not {} bytes; change --memory", min >> 20, max >> 20, size)]
    Size {
        /// Bytes asked for.
        size: u64,
        /// Least, bytes.
        min: u64,
        /// Most, bytes.
        max: u64,
    },
    /// The host gives no such memory.
    #[error("no guest memory of {} MiB: {source}; give less --memory", size >> 20)]
    Host {
        /// Bytes asked for.
        size: u64,
        /// The system's reason.
        source: io::Error,
    },
}

/// Creates guest memory of `size` bytes (rounded up to whole pages). Nothing is allocated until it is touched.
///
/// # Errors
/// When the size is out of bounds or the host refuses it.
pub fn create(size: u64) -> Result<GuestMemoryMmap<()>, MemoryError> {
    let bounds = (layout::MIN_MEMORY, layout::MAX_MEMORY);
    if !(bounds.0..=bounds.1).contains(&size) {
        return Err(MemoryError::Size { size, min: bounds.0, max: bounds.1 });
    }
    let size = size.next_multiple_of(4096);
    let host = |source: io::Error| MemoryError::Host { size, source };
    let fd = memfd_create("cowhand-guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|e| host(e.into()))?;
    ftruncate(&fd, size).map_err(|e| host(e.into()))?;
    // Whoever is given the descriptor later can thus not make our own mapping fault by shrinking it.
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(|e| host(e.into()))?;
    let file = File::from(fd);
    let mut ranges = Vec::new();
    let mut offset = 0;
    for (base, len) in layout::ram_ranges(size) {
        let file = file.try_clone().map_err(host)?;
        let bytes = usize::try_from(len).map_err(|e| host(io::Error::other(e)))?;
        ranges.push((GuestAddress(base), bytes, Some(FileOffset::new(file, offset))));
        offset += len;
    }
    GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|e| host(io::Error::other(e)))
}

/// What one splice moves at most: a pipe that large holds it whole.
const SPLICE_BYTES: usize = 1 << 20;

/// Fills `len` bytes of guest memory at `at` from `file`, from `offset` on.
///
/// The bytes go from page cache to page cache inside the kernel. Reading them into the mapping would take a fault for each
/// page, which costs more than the copy and is most of what starting a machine takes.
///
/// # Errors
/// When the range does not lie in one range of guest memory, the file ends before it, or the system refuses.
pub fn fill(memory: &GuestMemoryMmap<()>, at: GuestAddress, file: &File, offset: u64, len: u64) -> io::Result<()> {
    let outside = || io::Error::new(io::ErrorKind::InvalidInput, "outside guest memory");
    let region = memory.find_region(at).ok_or_else(outside)?;
    let within = at.0 - region.start_addr().0;
    if within.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(outside());
    }
    let backing = region.file_offset().ok_or_else(outside)?;
    let (from, into) = pipe_with(PipeFlags::CLOEXEC)?;
    // A smaller pipe (a user's limit) only makes more turns.
    let _ = fcntl_setpipe_size(&into, SPLICE_BYTES);
    let mut source = offset;
    let mut target = backing.start() + within;
    let end = target + len;
    while target < end {
        let wanted = usize::try_from(end - target).map_or(SPLICE_BYTES, |left| left.min(SPLICE_BYTES));
        let mut held = splice(file, Some(&mut source), &into, None, wanted, SpliceFlags::empty())?;
        if held == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends too early"));
        }
        while held > 0 {
            held -= splice(&from, None, backing.file(), Some(&mut target), held, SpliceFlags::empty())?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;
