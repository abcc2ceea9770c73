//! What each sector of the disk may hold, on top of any initial content.
//!
//! A sector's history lists what was written to it since the last flush that covers it. While all goes well it holds what came last;
//! after a kill, any of its history. Requests that overlap in a sector are never in flight together (what such a guest gets is
//! undefined), but neighbours within one cluster are.

use std::collections::BTreeMap;
use std::ops::Range;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// A write whose bytes are all zero.
    WriteOfZeros,
    /// Write-zeroes that keeps the space.
    Zero,
    /// Write-zeroes that may give the space back.
    ZeroUnmap,
    Discard,
    Flush,
    /// A compressed write.
    Compress,
}

impl Kind {
    pub(super) const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::WriteOfZeros,
        Self::Zero,
        Self::ZeroUnmap,
        Self::Discard,
        Self::Flush,
        Self::Compress,
    ];
}

/// A sector's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// What the disk held at the start.
    Initial,
    Zeros,
    /// What the write of this number wrote.
    Written(u32),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    content: Content,
    /// When the request ended.
    ended: Option<u64>,
    /// Whether the sector is sure to hold this after the request.
    sure: bool,
}

struct Begun {
    kind: Kind,
    range: Range<u64>,
    /// For a flush: what had ended when it began.
    covers: u64,
}

/// The judge.
pub(super) struct Model {
    initial: Vec<u8>,
    sectors: Vec<Vec<Entry>>,
    busy: Vec<bool>,
    begun: BTreeMap<u32, Begun>,
    clock: u64,
    /// Sectors in a cluster whose discard is known to leave zeros, if it is.
    discards_zero: Option<u64>,
    /// Whether it is known what the disk holds.
    known: bool,
}

/// A sector of a write's bytes: its eight-byte words name the write, the sector and their own place, so nothing can be mistaken.
fn written(op: u32, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (word, at) in bytes.chunks_exact_mut(8).zip(0u32..) {
        word[..4].copy_from_slice(&op.to_le_bytes());
        word[4..].copy_from_slice(&((sector as u32) << 6 | at).to_le_bytes());
    }
    bytes
}

impl Model {
    /// A disk that holds `initial`, a whole number of sectors.
    pub(super) fn new(initial: Vec<u8>) -> Self {
        let sectors = initial.len() / 512;
        let entry = Entry { content: Content::Initial, ended: Some(0), sure: true };
        Self {
            initial,
            sectors: vec![vec![entry]; sectors],
            busy: vec![false; sectors],
            begun: BTreeMap::new(),
            clock: 1,
            discards_zero: None,
            known: true,
        }
    }

    /// A disk of so many bytes that holds nobody knows what: only tells which sectors are busy.
    pub(super) fn of_unknown(size: u64) -> Self {
        Self { known: false, ..Self::new(vec![0; size as usize]) }
    }

    /// From now on discards of whole clusters of this many bytes must leave zeros.
    pub(super) fn discards_leave_zeros(mut self, cluster: u64) -> Self {
        self.discards_zero = Some(cluster / 512);
        self
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    pub(super) fn is_busy(&self, range: &Range<u64>) -> bool {
        self.busy[range.start as usize..range.end as usize].contains(&true)
    }

    /// A request begins; the bytes that it writes.
    pub(super) fn begin(&mut self, op: u32, kind: Kind, range: Range<u64>) -> Vec<u8> {
        self.begun.insert(op, Begun { kind, range: range.clone(), covers: self.clock });
        if kind == Kind::Flush {
            return Vec::new();
        }
        self.busy[range.start as usize..range.end as usize].fill(true);
        let content = match kind {
            Kind::Read | Kind::Flush => return Vec::new(),
            Kind::Write | Kind::Compress => Content::Written(op),
            _ => Content::Zeros,
        };
        let mut bytes = Vec::new();
        for sector in range.clone() {
            let sure = kind != Kind::Discard || self.discarded_whole(&range, sector);
            self.sectors[sector as usize].push(Entry { content, ended: None, sure });
            match kind {
                Kind::Write | Kind::Compress => bytes.extend(written(op, sector)),
                Kind::WriteOfZeros => bytes.extend([0; 512]),
                _ => {}
            }
        }
        bytes
    }

    /// Whether the sector's cluster lies in the range as a whole, and that is known to mean zeros.
    fn discarded_whole(&self, range: &Range<u64>, sector: u64) -> bool {
        let Some(cluster) = self.discards_zero else { return false };
        let start = sector / cluster * cluster;
        range.start <= start && range.end >= (start + cluster).min(self.sectors())
    }

    /// A request ends; for a read, with what it read.
    pub(super) fn end(&mut self, op: u32, ok: bool, bytes: &[u8]) -> Result<(), String> {
        let Begun { kind, range, covers } = self.begun.remove(&op).ok_or("a request ended that never began")?;
        self.clock += 1;
        if kind == Kind::Flush {
            if ok {
                self.flushed(covers);
            }
            return Ok(());
        }
        for (i, sector) in range.enumerate() {
            self.busy[sector as usize] = false;
            if kind != Kind::Read {
                if let Some(entry) = self.sectors[sector as usize].last_mut() {
                    entry.ended = Some(self.clock);
                    entry.sure &= ok;
                }
            } else if ok && self.known && !bytes.is_empty() {
                self.check(sector, &bytes[i * 512..(i + 1) * 512], false).map_err(|e| format!("read {op}: {e}"))?;
            }
        }
        Ok(())
    }

    fn bytes_of(&self, content: Content, sector: u64) -> [u8; 512] {
        match content {
            Content::Zeros => [0; 512],
            Content::Written(op) => written(op, sector),
            Content::Initial => self.initial[sector as usize * 512..][..512].try_into().unwrap(),
        }
    }

    /// Which content a sector's bytes are: of those it may hold now, or (`killed`) after a kill.
    fn check(&self, sector: u64, found: &[u8], killed: bool) -> Result<Content, String> {
        let history = &self.sectors[sector as usize];
        let first = if killed { 0 } else { history.iter().rposition(|e| e.sure).unwrap_or(0) };
        let legal = &history[first..];
        let entry = legal.iter().find(|e| self.bytes_of(e.content, sector) == found);
        entry.map(|e| e.content).ok_or_else(|| format!("sector {sector} holds {}, legal is {legal:?}", shown(found)))
    }

    /// A flush that began at `covers` succeeded: what had ended by then cannot be lost any more.
    fn flushed(&mut self, covers: u64) {
        for history in &mut self.sectors {
            let covered = history.iter().rposition(|e| e.sure && e.ended.is_some_and(|at| at <= covers));
            history.drain(..covered.unwrap_or(0));
        }
    }

    /// Whether the whole disk holds what it must, nothing being in flight.
    pub(super) fn check_all(&self, bytes: &[u8]) -> Result<(), String> {
        self.check_len(bytes)?;
        (0..self.sectors()).try_for_each(|s| self.check(s, &bytes[s as usize * 512..][..512], false).map(drop))
    }

    /// After a kill: every sector holds something legal, and that is what it holds from now on.
    pub(super) fn survive(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.check_len(bytes)?;
        self.clock += 1;
        self.begun.clear();
        self.busy.fill(false);
        for sector in 0..self.sectors() {
            let content = self.check(sector, &bytes[sector as usize * 512..][..512], true)?;
            self.sectors[sector as usize] = vec![Entry { content, ended: Some(self.clock), sure: true }];
        }
        Ok(())
    }

    fn check_len(&self, bytes: &[u8]) -> Result<(), String> {
        let (found, wanted) = (bytes.len(), self.initial.len());
        if found == wanted { Ok(()) } else { Err(format!("the disk has {found} bytes, not {wanted}")) }
    }
}

fn shown(bytes: &[u8]) -> String {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (op, sector) = (word(0), u64::from(word(4) >> 6));
    match bytes {
        [0, ..] if bytes.iter().all(|&b| b == 0) => "zeros".into(),
        _ if bytes == written(op, sector) => format!("what write {op} wrote to sector {sector}"),
        _ => format!("{:02x?}...", &bytes[..16]),
    }
}
