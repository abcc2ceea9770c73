//! The requests of virtio-blk (virtio 1.2, sect. 5.2.6) on a ring, with a buffer for each.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::guest::Guest;
use crate::message::blk;
use crate::ring::{DESCRIPTOR, Descriptor, INDIRECT, Ring, WRITE};
use crate::wire::invalid;

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(30);
const PAGE: u64 = 4096;

/// What is asked of the disk. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// So many bytes from there on.
    Read(u64, u32),
    /// These bytes to there.
    Write(u64, Vec<u8>),
    /// What was written is to survive.
    Flush,
    /// It is not needed any more.
    Discard(u64, u64),
    /// It is to be zeros; whether clusters may be given up.
    WriteZeroes(u64, u64, bool),
    /// The disk's name.
    GetId,
    /// Any type with any sector, so many bytes to be written by the device, and these to be read by it.
    Other(u32, u64, u32, Vec<u8>),
}

/// A request that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Which one.
    pub slot: usize,
    /// What it says.
    pub status: u8,
    /// What the used ring says was written.
    pub len: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// A ring with buffers. A slot has a page with the request's header and its indirect table, its data, and a page with its status.
#[derive(Debug)]
pub struct Queue {
    /// The ring.
    pub ring: Ring,
    /// Whether chains lie in tables of their own.
    pub indirect: bool,
    /// Into how many descriptors data is parted.
    pub pieces: u32,
    guest: Arc<Guest>,
    slots: u64,
    data: u64,
    free: Vec<usize>,
    /// Slot, and bytes that are read, by the chain's head.
    under_way: HashMap<u16, (usize, u32)>,
}

impl Queue {
    /// Bytes of guest memory: the ring, and `slots` slots for `data` bytes each.
    #[must_use]
    pub fn bytes(size: u16, slots: usize, data: u64) -> u64 {
        Ring::bytes(size) + slots as u64 * (data.next_multiple_of(PAGE) + 2 * PAGE)
    }

    /// A queue at `at`, a page.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn new(guest: &Arc<Guest>, index: u16, size: u16, at: u64, (slots, data): (usize, u64)) -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new(guest, index, size, at)?,
            indirect: false,
            pieces: 1,
            guest: guest.clone(),
            slots: at + Ring::bytes(size),
            data: data.next_multiple_of(PAGE),
            free: (0..slots).rev().collect(),
            under_way: HashMap::new(),
        })
    }

    /// Slots that are free.
    #[must_use]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Where a slot's header is.
    #[must_use]
    pub fn header_at(&self, slot: usize) -> u64 {
        self.slots + slot as u64 * (self.data + 2 * PAGE)
    }

    /// Where a slot's data is.
    #[must_use]
    pub fn data_at(&self, slot: usize) -> u64 {
        self.header_at(slot) + PAGE
    }

    /// Where a slot's status is.
    #[must_use]
    pub fn status_at(&self, slot: usize) -> u64 {
        self.data_at(slot) + self.data
    }

    /// Lays out a request's chain in a free slot, and offers it. Gives the slot; the device's bell is not rung.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn submit(&mut self, ask: &Ask) -> io::Result<usize> {
        let slot = self.free.pop().ok_or_else(|| invalid("no free slot"))?;
        let (kind, sector, written, read) = encode(ask);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.guest.put(self.header_at(slot), &header)?;
        self.guest.put(self.data_at(slot), &read)?;
        self.guest.put(self.status_at(slot), &[blk::S_UNWRITTEN])?;
        if written as usize + read.len() > self.data as usize {
            return Err(invalid("more data than a slot has room for"));
        }
        let mut chain = vec![Descriptor::read(self.header_at(slot), 16)];
        self.pieces_of(self.data_at(slot), read.len() as u32, 0, &mut chain);
        self.pieces_of(self.data_at(slot) + read.len() as u64, written, WRITE, &mut chain);
        chain.push(Descriptor::written(self.status_at(slot), 1));
        if self.indirect {
            chain = vec![self.table(slot, &chain)?];
        }
        let head = self.ring.lay_out(&chain)?;
        self.under_way.insert(head, (slot, written));
        self.ring.offer(head)?;
        Ok(slot)
    }

    fn pieces_of(&self, at: u64, len: u32, flags: u16, chain: &mut Vec<Descriptor>) {
        let piece = len.div_ceil(self.pieces).max(1);
        let mut done = 0;
        while done < len {
            let part = piece.min(len - done);
            chain.push(Descriptor { at: at + u64::from(done), len: part, flags });
            done += part;
        }
    }

    fn table(&self, slot: usize, chain: &[Descriptor]) -> io::Result<Descriptor> {
        let at = self.header_at(slot) + 1024;
        for (descriptor, n) in chain.iter().zip(0u16..) {
            let more = usize::from(n) + 1 < chain.len();
            let raw = descriptor.encode(descriptor.flags | u16::from(more), n + 1);
            self.guest.put(at + DESCRIPTOR * u64::from(n), &raw)?;
        }
        Ok(Descriptor { at, len: chain.len() as u32 * DESCRIPTOR as u32, flags: INDIRECT })
    }

    fn finish(&mut self, (head, len): (u16, u32)) -> io::Result<Done> {
        let (slot, read) = self.under_way.remove(&head).ok_or_else(|| invalid("a chain that is no request"))?;
        let status = self.guest.bytes(self.status_at(slot), 1)?[0];
        let data = self.guest.bytes(self.data_at(slot), read as usize)?;
        self.free.push(slot);
        Ok(Done { slot, status, len, data })
    }

    /// A request that has come back, if one has.
    ///
    /// # Errors
    /// As [`Ring::take`].
    pub fn take(&mut self) -> io::Result<Option<Done>> {
        self.ring.take()?.map(|taken| self.finish(taken)).transpose()
    }

    /// Waits for a request to come back.
    ///
    /// # Errors
    /// As [`Ring::wait`].
    pub fn wait(&mut self, patience: Duration) -> io::Result<Done> {
        let taken = self.ring.wait(patience)?;
        self.finish(taken)
    }

    /// Asks, and waits for the answer. Nothing else is under way.
    ///
    /// # Errors
    /// As [`submit`](Self::submit) and [`wait`](Self::wait).
    pub fn run(&mut self, ask: &Ask) -> io::Result<Done> {
        self.submit(ask)?;
        self.ring.notify()?;
        self.wait(PATIENCE)
    }
}

/// Type, sector, bytes that the device writes, and those that it reads.
fn encode(ask: &Ask) -> (u32, u64, u32, Vec<u8>) {
    let sector = |offset: u64| offset / blk::SECTOR;
    let segment = |offset: u64, len: u64, unmap: bool| {
        let mut bytes = sector(offset).to_le_bytes().to_vec();
        bytes.extend([sector(len) as u32, u32::from(unmap)].map(u32::to_le_bytes).concat());
        bytes
    };
    match ask {
        Ask::Read(offset, len) => (blk::IN, sector(*offset), *len, Vec::new()),
        Ask::Write(offset, bytes) => (blk::OUT, sector(*offset), 0, bytes.clone()),
        Ask::Flush => (blk::FLUSH, 0, 0, Vec::new()),
        Ask::Discard(offset, len) => (blk::DISCARD, 0, 0, segment(*offset, *len, false)),
        Ask::WriteZeroes(offset, len, unmap) => (blk::WRITE_ZEROES, 0, 0, segment(*offset, *len, *unmap)),
        Ask::GetId => (blk::GET_ID, 0, 20, Vec::new()),
        Ask::Other(kind, sector, written, read) => (*kind, *sector, *written, read.clone()),
    }
}
