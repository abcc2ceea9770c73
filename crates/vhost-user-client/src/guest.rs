//! A guest's memory, in memory files that go to the back-end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::wire::invalid;

/// What lies between a guest's address and the front-end's of the same byte, differently for each region.
const USER: u64 = 0x5000_0000_0000;

/// A piece of a guest's memory, as a back-end is told of it.
#[derive(Debug)]
pub struct Region {
    /// The guest's address.
    pub guest: u64,
    /// The front-end's address.
    pub user: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the file it begins.
    pub offset: u64,
    /// The file.
    pub file: File,
}

impl Region {
    /// A region in a new file of just its length.
    ///
    /// # Errors
    /// The system's.
    pub fn new(guest: u64, user: u64, len: u64) -> io::Result<Self> {
        Self::at(guest, user, len, 0)
    }

    /// A region at `offset` of a new file.
    ///
    /// # Errors
    /// The system's.
    pub fn at(guest: u64, user: u64, len: u64, offset: u64) -> io::Result<Self> {
        Ok(Self { guest, user, len, offset, file: memory_file(offset + len)? })
    }

    /// The region as messages describe it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [self.guest, self.len, self.user, self.offset].map(u64::to_le_bytes).concat()
    }

    /// Its file, to be sent.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A file in memory, of zeros.
///
/// # Errors
/// The system's.
pub fn memory_file(len: u64) -> io::Result<File> {
    let file = memfd_create(c"guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, len)?;
    Ok(file.into())
}

/// A guest's memory. Addresses are the guest's; what is done outside of it is an error.
#[derive(Debug)]
pub struct Guest {
    /// Its pieces, in the order of their addresses.
    pub regions: Vec<Region>,
    memory: GuestMemoryMmap,
}

impl Guest {
    /// Memory of pieces of which each is an address and a length, both multiples of 4096. Each has a file of its own, in which it begins
    /// a little behind the start.
    ///
    /// # Errors
    /// They overlap; the system's.
    pub fn new(pieces: &[(u64, u64)]) -> io::Result<Self> {
        let regions = pieces.iter().zip(0..);
        let regions = regions.map(|(&(at, len), n)| Region::at(at, USER + (n << 40) + at, len, n * 8192));
        Self::of(regions.collect::<io::Result<_>>()?)
    }

    /// Memory of these regions.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(regions: Vec<Region>) -> io::Result<Self> {
        let mut ranges = Vec::new();
        for region in &regions {
            let file = FileOffset::new(region.file.try_clone()?, region.offset);
            let len = usize::try_from(region.len).map_err(|_| invalid("a region that is too long"))?;
            ranges.push((GuestAddress(region.guest), len, Some(file)));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(io::Error::other)?;
        Ok(Self { regions, memory })
    }

    /// The front-end's address of a guest's.
    ///
    /// # Errors
    /// It is not in the memory.
    pub fn user(&self, at: u64) -> io::Result<u64> {
        let region = self.regions.iter().find(|region| (region.guest..region.guest + region.len).contains(&at));
        region.map(|region| region.user + (at - region.guest)).ok_or_else(|| invalid("an address outside"))
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// They are not all in the memory.
    pub fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(io::Error::other)
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// They are not all in the memory.
    pub fn bytes(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).map_err(io::Error::other)?;
        Ok(bytes)
    }

    /// Stores a number of a ring, after everything before it.
    ///
    /// # Errors
    /// It is not in the memory.
    pub fn store_u16(&self, at: u64, value: u16) -> io::Result<()> {
        self.memory.store(value.to_le(), GuestAddress(at), Ordering::SeqCst).map_err(io::Error::other)
    }

    /// Loads a number of a ring, before everything after it.
    ///
    /// # Errors
    /// It is not in the memory.
    pub fn load_u16(&self, at: u64) -> io::Result<u16> {
        self.memory.load(GuestAddress(at), Ordering::SeqCst).map(u16::from_le).map_err(io::Error::other)
    }
}
