//! What each sector of the disk may hold: the simulator's judge.
//!
//! A sector's history lists what was written to it since the last flush that covers it. Before an end it holds what came last;
//! after an end, any of its history. Where requests overlap in a sector while they are in flight, any of them may be the last, and
//! what was there before may come back: nothing is sure before a later request; but what neither of them wrote never shows.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::io::sim::Rng;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// A compressed write.
    Compress,
    Discard,
    Zero,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// The request that wrote it; 0 for what was there at the start.
    op: u64,
    /// 0: zeros.
    tag: u32,
    /// When the request ended; 0 for what was there at the start.
    ended: Option<u64>,
    /// Whether the sector is sure to hold this after the request: a discard, or a failed write, leaves it open.
    sure: bool,
}

struct Begun {
    range: Range<u64>,
    /// The disk's content was changed as a whole meanwhile: what it reads may be what was before or what came after.
    overtaken: bool,
    /// For a flush: what had ended when it began.
    covers: u64,
}

/// A change of the whole disk, as far as the judge is concerned.
#[derive(Clone, Debug)]
pub(super) enum Whole {
    /// A snapshot is taken.
    Take,
    /// All becomes what a snapshot holds (a tag to each sector).
    Apply(Vec<u32>),
    /// A copy of the disk as it is begins.
    Copy,
    /// The disk goes on in an overlay.
    Overlay,
    /// A snapshot is deleted.
    Delete,
    /// The disk gets so many sectors.
    Resize(u64),
}

/// The judge.
pub(super) struct Model {
    /// The disk's size in sectors.
    size: u64,
    /// Sizes that it may have after a power cut, besides.
    other_sizes: Vec<u64>,
    /// What each sector may hold in the snapshot that is being taken.
    taken: Option<Vec<Vec<u32>>>,
    /// The content of the disk is being changed as a whole.
    applying: bool,
    /// When the last change of the whole disk began.
    whole_began: u64,
    /// By sector, also of those past the end, which read as zeros when they come back.
    sectors: Vec<Vec<Entry>>,
    /// By sector, how many requests in flight touch it.
    busy: Vec<u32>,
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

const ZEROS: Entry = Entry { op: 0, tag: 0, ended: Some(0), sure: true };

/// The tag of a sector with these bytes, if they are all of one write to it.
pub(super) fn tag_of(sector: u64, bytes: &[u8; 512]) -> Option<u32> {
    let tag = bytes[..4].iter().rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
    (sector_bytes(sector, tag) == *bytes).then_some(tag)
}

impl Model {
    pub(super) fn new(sectors: u64) -> Self {
        Self {
            size: sectors,
            other_sizes: Vec::new(),
            taken: None,
            applying: false,
            whole_began: 0,
            sectors: vec![vec![ZEROS]; sectors as usize],
            busy: vec![0; sectors as usize],
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

    /// Where a request in flight reads or writes, inside the disk.
    pub(super) fn in_flight(&self, rng: &mut Rng) -> Option<Range<u64>> {
        let ranges: Vec<_> = self.begun.values().map(|begun| &begun.range).filter(|range| !range.is_empty()).collect();
        let range = ranges.get(rng.below(ranges.len().max(1) as u64) as usize)?;
        (range.end <= self.size).then(|| (*range).clone())
    }

    pub(super) fn is_busy(&self, range: &Range<u64>) -> bool {
        self.busy[range.start as usize..range.end as usize].iter().any(|&count| count > 0)
    }

    /// A request begins; its bytes (for a write what it writes, for a read room).
    pub(super) fn begin(&mut self, op: u64, kind: Kind, range: Range<u64>) -> Vec<u8> {
        let covers = self.clock;
        if kind == Kind::Flush {
            self.begun.insert(op, Begun { range: 0..0, covers, overtaken: false });
            return Vec::new();
        }
        let touched = range.start as usize..range.end as usize;
        for (history, busy) in self.sectors[touched.clone()].iter_mut().zip(&mut self.busy[touched]) {
            *busy += 1;
            if *busy > 1 {
                history.iter_mut().filter(|entry| entry.ended.is_none()).for_each(|entry| entry.sure = false);
            }
        }
        let mut bytes = Vec::new();
        if kind != Kind::Read {
            let tag = if matches!(kind, Kind::Write | Kind::Compress) { self.next_tag() } else { 0 };
            for sector in range.clone() {
                bytes.extend(sector_bytes(sector, tag));
                // Whether it comes before or after a change of everything is open.
                let overlapping = self.busy[sector as usize] > 1;
                let sure = kind != Kind::Discard && !self.applying && !overlapping;
                self.sectors[sector as usize].push(Entry { op, tag, ended: None, sure });
                if let Some(taken) = self.taken.as_mut().and_then(|taken| taken.get_mut(sector as usize)) {
                    taken.push(tag);
                }
            }
        } else {
            bytes = vec![0xee; ((range.end - range.start) * 512) as usize];
        }
        self.begun.insert(op, Begun { range, covers, overtaken: self.applying });
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
            self.busy[sector as usize] = self.busy[sector as usize].saturating_sub(1);
            if kind == Kind::Read {
                if ok && !begun.overtaken {
                    self.check_read(op, sector, &bytes[i * 512..(i + 1) * 512])?;
                }
                continue;
            }
            if let Some(entry) = self.sectors[sector as usize].iter_mut().find(|entry| entry.op == op) {
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

    /// The disk's size in sectors.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    fn set_size(&mut self, size: u64) {
        self.size = size;
        self.make_room(size);
        // What lies past the end is zero when it comes back.
        for history in &mut self.sectors[size as usize..] {
            history.push(ZEROS);
            let last = history.len() - 1;
            supersede(history, last, self.whole_began);
        }
    }

    fn make_room(&mut self, size: u64) {
        let len = self.sectors.len().max(size as usize);
        self.sectors.resize(len, vec![ZEROS]);
        self.busy.resize(len, 0);
    }

    /// A change of the whole disk begins.
    pub(super) fn begin_whole(&mut self, op: u64, whole: &Whole) {
        self.clock += 1;
        self.whole_began = self.clock;
        match whole {
            Whole::Take | Whole::Copy => {
                let legal = |history: &Vec<Entry>| {
                    let last_sure = history.iter().rposition(|e| e.sure && e.ended.is_some()).unwrap_or(0);
                    tags(&history[last_sure..])
                };
                self.taken = Some(self.sectors[..self.size as usize].iter().map(legal).collect());
            }
            Whole::Apply(content) => {
                self.applying = true;
                self.begun.values_mut().for_each(|begun| begun.overtaken = true);
                self.make_room(content.len() as u64);
                for (history, &tag) in self.sectors.iter_mut().zip(content) {
                    history.push(Entry { op, tag, ended: None, sure: false });
                }
                self.other_sizes.push(content.len() as u64);
            }
            Whole::Delete | Whole::Overlay => {}
            Whole::Resize(size) => {
                self.make_room(*size);
                for history in &mut self.sectors[self.size as usize..] {
                    history.push(Entry { op, ended: None, sure: false, ..ZEROS });
                }
                self.other_sizes.push(*size);
            }
        }
    }

    /// It ends; if it failed, with a disk of `size` sectors.
    pub(super) fn end_whole(&mut self, op: u64, whole: &Whole, ok: bool, size: u64) -> Result<(), String> {
        self.clock += 1;
        self.applying = false;
        let wanted = match whole {
            Whole::Take | Whole::Delete | Whole::Copy | Whole::Overlay => self.size,
            Whole::Apply(content) => content.len() as u64,
            Whole::Resize(size) => *size,
        };
        if size != wanted && (ok || size != self.size) {
            return Err(format!("the disk has {size} sectors, not {wanted}"));
        }
        if !ok {
            // It may have happened nevertheless, and a power cut may undo it.
            self.other_sizes.push(self.size);
            self.size = size;
            return Ok(());
        }
        for history in &mut self.sectors {
            if let Some(at) = history.iter().position(|entry| entry.op == op) {
                history[at].ended = Some(self.clock);
                history[at].sure = true;
                supersede(history, at, self.whole_began);
            }
        }
        if size != self.size {
            self.set_size(size);
        }
        self.other_sizes.clear();
        Ok(())
    }

    /// What each sector may hold in the snapshot that was being taken when this is asked.
    pub(super) fn take_taken(&mut self) -> Option<Vec<Vec<u32>>> {
        self.taken.take()
    }

    /// Whether every sector holds what the last request left there that was acknowledged, or one that came later.
    pub(super) fn check_acknowledged(&self, bytes: &[u8]) -> Result<(), String> {
        for (sector, found) in bytes.chunks_exact(512).enumerate() {
            let Some(history) = self.sectors.get(sector) else { continue };
            let last = history.iter().rposition(|e| e.sure && e.ended.is_some()).unwrap_or(0);
            if !history[last..].iter().any(|e| sector_bytes(sector as u64, e.tag) == found) {
                let legal = tags(&history[last..]);
                return Err(format!("sector {sector} holds {}, acknowledged {legal:?}", shown(found)));
            }
        }
        Ok(())
    }

    /// After an end: every sector holds something legal, and that is what it holds from now on; durably, if the power was cut.
    /// (After a mere death of the process it may lie in the page cache alone, and a later power cut may bring back what came before.)
    pub(super) fn survive(&mut self, bytes: &[u8], durable: bool) -> Result<(), String> {
        let size = bytes.len() as u64 / 512;
        if size != self.size && !self.other_sizes.contains(&size) {
            return Err(format!("after the end the disk has {size} sectors, not {} {:?}", self.size, self.other_sizes));
        }
        self.set_size(size);
        self.other_sizes.clear();
        self.taken = None;
        self.applying = false;
        self.clock += 1;
        self.begun.clear();
        self.busy.fill(0);
        for (sector, history) in self.sectors.iter_mut().enumerate().take(size as usize) {
            let found = &bytes[sector * 512..(sector + 1) * 512];
            let Some(entry) = history.iter().find(|e| sector_bytes(sector as u64, e.tag) == found) else {
                return Err(format!("after the end sector {sector} holds {}, legal {:?}", shown(found), tags(history)));
            };
            let entry = Entry { op: 0, tag: entry.tag, ended: Some(self.clock), sure: true };
            if durable {
                history.clear();
            }
            history.push(entry);
        }
        Ok(())
    }
}

/// What came before the entry `at` is gone; but what of it had not ended when the change began may have waited, and come after.
fn supersede(history: &mut Vec<Entry>, at: usize, began: u64) {
    let waiting = history[..at].iter().filter(|entry| entry.ended.is_none_or(|ended| ended > began));
    let waiting: Vec<Entry> = waiting.map(|entry| Entry { sure: false, ..*entry }).collect();
    history.drain(..at);
    history.splice(1..1, waiting);
}

fn tags(history: &[Entry]) -> Vec<u32> {
    history.iter().map(|e| e.tag).collect()
}

fn shown(bytes: &[u8]) -> String {
    let word = |at: usize| bytes[at..at + 4].iter().rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
    let uniform = bytes.chunks_exact(8).all(|c| c == &bytes[..8]);
    format!("tag {} of sector {}{}", word(0), word(4), if uniform { "" } else { " (mixed)" })
}
