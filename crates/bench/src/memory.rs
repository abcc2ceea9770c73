//! The client's memory, shared with the server: one buffer for each request in flight, filled with bytes that do not compress
//! to nothing and are not zeros.

use std::fs::File;
use std::io;

use rustix::fs::MemfdFlags;
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, FileOffset, MmapRegion};

/// Buffers in one shared mapping.
pub struct Arena {
    region: MmapRegion,
    file: File,
    buffer: usize,
}

impl Arena {
    /// `count` buffers of `buffer` bytes each, a multiple of 512.
    ///
    /// # Errors
    /// When memory is short, or the sizes cannot be.
    pub fn new(count: usize, buffer: usize) -> io::Result<Self> {
        let size = count.checked_mul(buffer).filter(|&size| size > 0).ok_or(io::ErrorKind::InvalidInput)?;
        // Whole pages: mappings of a part of a page are refused by some servers.
        let size = size.next_multiple_of(4096);
        let file = File::from(rustix::fs::memfd_create("bench-buffers", MemfdFlags::CLOEXEC)?);
        file.set_len(size as u64)?;
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), size).map_err(io::Error::other)?;
        let arena = Self { region, file, buffer };
        arena.fill()?;
        Ok(arena)
    }

    fn fill(&self) -> io::Result<()> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for at in (0..self.region.size()).step_by(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            self.region.as_volatile_slice().write(&state.to_ne_bytes(), at).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// The address of buffer `index`, [`buffer_len`](Self::buffer_len) bytes of which are mapped as long as this lives.
    ///
    /// # Panics
    /// When there is no such buffer.
    #[must_use]
    pub fn address(&self, index: usize) -> *mut u8 {
        assert!(index < self.region.size() / self.buffer, "a buffer inside the arena");
        self.region.as_ptr().wrapping_add(index * self.buffer)
    }

    /// Bytes of each buffer.
    #[must_use]
    pub fn buffer_len(&self) -> usize {
        self.buffer
    }

    /// The whole mapping's address and length, and the file behind it.
    #[must_use]
    pub fn mapping(&self) -> (usize, usize, &File) {
        (self.region.as_ptr().addr(), self.region.size(), &self.file)
    }

    /// A copy of buffer `index`, while no request uses it.
    #[cfg(test)]
    pub fn read(&self, index: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.buffer];
        self.region.as_volatile_slice().read_slice(&mut bytes, index * self.buffer).unwrap();
        bytes
    }
}
