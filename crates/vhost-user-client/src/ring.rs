//! The driver's side of a split virtqueue (virtio 1.2, sect. 2.7).

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bell::Bell;
use crate::guest::Guest;
use crate::wire::invalid;

/// The chain goes on.
pub const NEXT: u16 = 1;
/// The device writes it.
pub const WRITE: u16 = 2;
/// It is a table of descriptors.
pub const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub const DESCRIPTOR: u64 = 16;

/// A descriptor, without its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The guest's address.
    pub at: u64,
    /// Bytes.
    pub len: u32,
    /// [`WRITE`], [`INDIRECT`], or nothing.
    pub flags: u16,
}

impl Descriptor {
    /// What the device reads.
    #[must_use]
    pub fn read(at: u64, len: u32) -> Self {
        Self { at, len, flags: 0 }
    }

    /// What the device writes.
    #[must_use]
    pub fn written(at: u64, len: u32) -> Self {
        Self { at, len, flags: WRITE }
    }

    /// As it lies in memory.
    #[must_use]
    pub fn encode(&self, flags: u16, next: u16) -> [u8; DESCRIPTOR as usize] {
        let mut raw = [0; DESCRIPTOR as usize];
        raw[..8].copy_from_slice(&self.at.to_le_bytes());
        raw[8..12].copy_from_slice(&self.len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        raw
    }
}

/// Where the parts of a ring lie in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// The descriptor table, at a multiple of 16.
    pub descriptors: u64,
    /// The available ring, at a multiple of 2.
    pub available: u64,
    /// The used ring, at a multiple of 4.
    pub used: u64,
}

/// A ring in a guest's memory, and the eventfds that go with it.
#[derive(Debug)]
pub struct Ring {
    /// Its number.
    pub index: u16,
    /// Its entries.
    pub size: u16,
    /// Its places.
    pub at: Places,
    /// Whether notifications are asked for by index; else all of them come.
    pub event_idx: bool,
    /// Rung when there is something to do.
    pub kick: Bell,
    /// Rung by the device when something is done.
    pub call: Bell,
    /// Rung by the device when the ring makes no sense.
    pub err: Bell,
    guest: Arc<Guest>,
    free: Vec<u16>,
    /// The descriptors of the chains that the device has, by their heads.
    chains: HashMap<u16, Vec<u16>>,
    available: u16,
    kicked: u16,
    seen: u16,
}

impl Ring {
    /// Bytes of guest memory that a ring of `size` entries takes: whole pages, the used ring in pages of its own.
    #[must_use]
    pub fn bytes(size: u16) -> u64 {
        let size = u64::from(size);
        (DESCRIPTOR * size + 6 + 2 * size).next_multiple_of(4096) + (6 + 8 * size).next_multiple_of(4096)
    }

    /// A ring of `size` entries at `at`, a page.
    ///
    /// # Errors
    /// The system has no eventfds, or it does not lie in the memory.
    pub fn new(guest: &Arc<Guest>, index: u16, size: u16, at: u64) -> io::Result<Self> {
        let entries = u64::from(size);
        let available = at + DESCRIPTOR * entries;
        let used = at + (DESCRIPTOR * entries + 6 + 2 * entries).next_multiple_of(4096);
        guest.put(at, &vec![0; Self::bytes(size) as usize])?;
        Ok(Self {
            index,
            size,
            at: Places { descriptors: at, available, used },
            event_idx: false,
            kick: Bell::new()?,
            call: Bell::new()?,
            err: Bell::new()?,
            guest: guest.clone(),
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            available: 0,
            kicked: 0,
            seen: 0,
        })
    }

    /// Begins at another index than 0. Nothing was offered yet.
    ///
    /// # Errors
    /// The ring does not lie in the memory.
    pub fn begin_at(&mut self, index: u16) -> io::Result<()> {
        (self.available, self.kicked, self.seen) = (index, index, index);
        self.guest.store_u16(self.at.available + 2, index)?;
        self.guest.store_u16(self.at.used + 2, index)
    }

    /// Descriptors that are free.
    #[must_use]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Chains that the device has.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.chains.len()
    }

    /// Where a descriptor of the table lies.
    #[must_use]
    pub fn descriptor(&self, index: u16) -> u64 {
        self.at.descriptors + DESCRIPTOR * u64::from(index)
    }

    /// Lays out a chain; gives its head. The device is not told yet.
    ///
    /// # Errors
    /// There is no room.
    pub fn lay_out(&mut self, chain: &[Descriptor]) -> io::Result<u16> {
        if chain.is_empty() || chain.len() > self.free.len() {
            return Err(invalid("a chain for which the ring has no room"));
        }
        let places = self.free.split_off(self.free.len() - chain.len());
        for (n, descriptor) in chain.iter().enumerate() {
            let next = places.get(n + 1).copied();
            let flags = descriptor.flags | if next.is_some() { NEXT } else { 0 };
            self.guest.put(self.descriptor(places[n]), &descriptor.encode(flags, next.unwrap_or(0)))?;
        }
        let head = places[0];
        self.chains.insert(head, places);
        Ok(head)
    }

    /// Makes a head available.
    ///
    /// # Errors
    /// The ring does not lie in the memory.
    pub fn offer(&mut self, head: u16) -> io::Result<()> {
        let slot = self.at.available + 4 + 2 * u64::from(self.available % self.size);
        self.guest.store_u16(slot, head)?;
        self.set_available(self.available.wrapping_add(1))
    }

    /// Says how many heads were made available.
    ///
    /// # Errors
    /// The ring does not lie in the memory.
    pub fn set_available(&mut self, index: u16) -> io::Result<()> {
        self.available = index;
        self.guest.store_u16(self.at.available + 2, index)
    }

    /// Rings the device's bell, if it wants that for what was offered since the last time.
    ///
    /// # Errors
    /// The system's.
    pub fn notify(&mut self) -> io::Result<bool> {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let (old, new) = (std::mem::replace(&mut self.kicked, self.available), self.available);
        let wanted = if self.event_idx {
            let event = self.guest.load_u16(self.at.used + 4 + 8 * u64::from(self.size))?;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.guest.load_u16(self.at.used)? & 1 == 0
        };
        if wanted {
            self.kick.ring()?;
        }
        Ok(wanted)
    }

    /// The used ring's index.
    ///
    /// # Errors
    /// The ring does not lie in the memory.
    pub fn used_index(&self) -> io::Result<u16> {
        self.guest.load_u16(self.at.used + 2)
    }

    /// The next chain that came back: its head, and how many bytes were written.
    ///
    /// # Errors
    /// It is none that the device has.
    pub fn take(&mut self) -> io::Result<Option<(u16, u32)>> {
        if self.used_index()? == self.seen {
            return Ok(None);
        }
        let entry = self.guest.bytes(self.at.used + 4 + 8 * u64::from(self.seen % self.size), 8)?;
        self.seen = self.seen.wrapping_add(1);
        let number = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let (head, len) = (number(0), number(4));
        let head = u16::try_from(head).map_err(|_| invalid(&format!("head {head} came back")))?;
        let Some(places) = self.chains.remove(&head) else {
            return Err(invalid(&format!("head {head} came back and was not under way")));
        };
        self.free.extend(places.into_iter().rev());
        Ok(Some((head, len)))
    }

    /// Waits for a chain to come back, asleep until the device signals.
    ///
    /// # Errors
    /// None comes within `patience` (`TimedOut`); or as [`take`](Self::take).
    pub fn wait(&mut self, patience: Duration) -> io::Result<(u16, u32)> {
        let until = Instant::now() + patience;
        loop {
            if self.event_idx {
                self.guest.store_u16(self.at.available + 4 + 2 * u64::from(self.size), self.seen)?;
            }
            // After asking for a signal: what came before it brings none.
            if let Some(taken) = self.take()? {
                return Ok(taken);
            }
            if !self.call.wait(until.saturating_duration_since(Instant::now()))? {
                let left = self.take()?;
                return left.ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "nothing comes back"));
            }
            let _ = self.call.heard();
        }
    }
}
