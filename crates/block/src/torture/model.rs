//! What each sector of the disk may hold: the simulator's judge.
//!
//! A sector's history lists what was written to it since the last flush that covers it. Before an end it holds what came last;
//! after an end, any of its history. Requests that overlap in a sector are never in flight together (what such a guest gets is
//! undefined), but neighbours within one cluster are.

use std::collections::BTreeMap;
use std::ops::Range;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Discard,
    Zero,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// 0: zeros.
    tag: u32,
    /// When the request ended; 0 for what was there at the start.
    ended: Option<u64>,
    /// Whether the sector is sure to hold this after the request: a discard, or a failed write, leaves it open.
    sure: bool,
}

struct Begun {
    range: Range<u64>,
    /// For a flush: what had ended when it began.
    covers: u64,
}

/// The judge.
pub(super) struct Model {
    sectors: Vec<Vec<Entry>>,
    busy: Vec<bool>,
    begun: BTreeMap<u64, Begun>,
    tags: u32,
    clock: u64,
}

/// A sector's content for a tag: the tag and the sector's number, over and over.
pub(super) fn sector_bytes(sector: u64, tag: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    if tag != 0 {
        for chunk in bytes.chunks_exact_mut(8) {
            chunk[..4].copy_from_slice(&tag.to_le_bytes());
            chunk[4..].copy_from_slice(&(sector as u32).to_le_bytes());
        }
    }
    bytes
}

impl Model {
    pub(super) fn new(sectors: u64) -> Self {
        let entry = Entry { tag: 0, ended: Some(0), sure: true };
        Self {
            sectors: vec![vec![entry]; sectors as usize],
            busy: vec![false; sectors as usize],
            begun: BTreeMap::new(),
            tags: 0,
            clock: 1,
        }
    }

    pub(super) fn next_tag(&mut self) -> u32 {
        self.tags += 1;
        self.tags
    }

    /// What the backing file holds, where it is as long as the disk.
    pub(super) fn set_initial(&mut self, sector: u64, tag: u32) {
        if let Some(history) = self.sectors.get_mut(sector as usize) {
            history[0].tag = tag;
        }
    }

    pub(super) fn is_busy(&self, range: &Range<u64>) -> bool {
        self.busy[range.start as usize..range.end as usize].contains(&true)
    }

    /// A request begins; its bytes (for a write what it writes, for a read room).
    pub(super) fn begin(&mut self, op: u64, kind: Kind, range: Range<u64>) -> Vec<u8> {
        let covers = self.clock;
        if kind == Kind::Flush {
            self.begun.insert(op, Begun { range: 0..0, covers });
            return Vec::new();
        }
        self.busy[range.start as usize..range.end as usize].fill(true);
        let mut bytes = Vec::new();
        if kind != Kind::Read {
            let tag = if kind == Kind::Write { self.next_tag() } else { 0 };
            for sector in range.clone() {
                bytes.extend(sector_bytes(sector, tag));
                self.sectors[sector as usize].push(Entry { tag, ended: None, sure: kind != Kind::Discard });
            }
        } else {
            bytes = vec![0xee; ((range.end - range.start) * 512) as usize];
        }
        self.begun.insert(op, Begun { range, covers });
        bytes
    }

    /// A request ends.
    pub(super) fn end(&mut self, op: u64, kind: Kind, ok: bool, bytes: &[u8]) -> Result<(), String> {
        let begun = self.begun.remove(&op).ok_or("a request ended that never began")?;
        self.clock += 1;
        if kind == Kind::Flush {
            if ok {
                self.flushed(begun.covers);
            }
            return Ok(());
        }
        for (i, sector) in begun.range.enumerate() {
            self.busy[sector as usize] = false;
            if kind == Kind::Read {
                if ok {
                    self.check_read(op, sector, &bytes[i * 512..(i + 1) * 512])?;
                }
                continue;
            }
            if let Some(entry) = self.sectors[sector as usize].last_mut() {
                entry.ended = Some(self.clock);
                entry.sure &= ok;
            }
        }
        Ok(())
    }

    fn check_read(&self, op: u64, sector: u64, bytes: &[u8]) -> Result<(), String> {
        let history = &self.sectors[sector as usize];
        let last_sure = history.iter().rposition(|e| e.sure).unwrap_or(0);
        let legal = &history[last_sure..];
        if legal.iter().any(|e| sector_bytes(sector, e.tag) == bytes) {
            return Ok(());
        }
        Err(format!("op {op} read sector {sector}: {}, legal {:?}", shown(bytes), tags(legal)))
    }

    /// A flush that began at `covers` succeeded: what had ended by then cannot be lost any more.
    pub(super) fn flushed(&mut self, covers: u64) {
        for history in &mut self.sectors {
            let covered = history.iter().rposition(|e| e.sure && e.ended.is_some_and(|at| at <= covers));
            history.drain(..covered.unwrap_or(0));
        }
    }

    /// After an end: every sector holds something legal, and that is what it holds from now on; durably, if the power was cut.
    /// (After a mere death of the process it may lie in the page cache alone, and a later power cut may bring back what came before.)
    pub(super) fn survive(&mut self, bytes: &[u8], durable: bool) -> Result<(), String> {
        self.clock += 1;
        self.begun.clear();
        self.busy.fill(false);
        for (sector, history) in self.sectors.iter_mut().enumerate() {
            let found = &bytes[sector * 512..(sector + 1) * 512];
            let Some(entry) = history.iter().find(|e| sector_bytes(sector as u64, e.tag) == found) else {
                return Err(format!("after the end sector {sector} holds {}, legal {:?}", shown(found), tags(history)));
            };
            let entry = Entry { tag: entry.tag, ended: Some(self.clock), sure: true };
            if durable {
                history.clear();
            }
            history.push(entry);
        }
        Ok(())
    }
}

fn tags(history: &[Entry]) -> Vec<u32> {
    history.iter().map(|e| e.tag).collect()
}

fn shown(bytes: &[u8]) -> String {
    let word = |at: usize| bytes[at..at + 4].iter().rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
    let uniform = bytes.chunks_exact(8).all(|c| c == &bytes[..8]);
    format!("tag {} of sector {}{}", word(0), word(4), if uniform { "" } else { " (mixed)" })
}
