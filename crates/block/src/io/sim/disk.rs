//! One simulated file: what it holds, what of that is durable, and what a power cut leaves of the rest.

use std::io;

use super::Rng;
use crate::io::{Buffer, Op, segs_len};

/// The unit in which a write can be torn.
const SECTOR: usize = 512;

/// A change that is not durable yet.
struct Change {
    offset: usize,
    /// The bytes written (zeros for a punch); empty for a change of length.
    bytes: Vec<u8>,
    /// The length of the file after the change, if the change moved it.
    length: Option<usize>,
    /// Whether the change was still in flight at the end.
    in_flight: bool,
    /// Whether a failed flush dropped it: no later flush makes it durable, though the page cache still shows it.
    dropped: bool,
}

/// A file's content, now and on the medium.
pub(super) struct SimDisk {
    current: Vec<u8>,
    durable: Vec<u8>,
    log: Vec<Change>,
    /// How many changes were made durable and dropped from the log.
    dropped: u64,
    /// The file cannot get longer than this.
    limit: u64,
}

/// No simulated file grows past this, or less: a larger offset is an engine's mistake, and gets an error as from a full disk.
pub(super) const MAX_LEN: u64 = 1 << 30;

impl SimDisk {
    pub(super) fn new(content: Vec<u8>, limit: u64) -> Self {
        Self { durable: content.clone(), current: content, log: Vec::new(), dropped: 0, limit }
    }

    pub(super) fn content(&self) -> &[u8] {
        &self.current
    }

    /// The number of changes made so far.
    pub(super) fn changes(&self) -> u64 {
        self.dropped + self.log.len() as u64
    }

    /// Carries the operation out; a flush covers the first `covers` changes.
    pub(super) fn carry_out(&mut self, op: &Op, covers: u64) -> io::Result<usize> {
        match op {
            Op::Read { offset, data } => {
                let start = (*offset).min(self.current.len() as u64) as usize;
                let n = (self.current.len() - start).min(segs_len(data) as usize);
                Buffer::from_bytes(&self.current[start..start + n]).scatter(0, data);
                Ok(n)
            }
            Op::Write { offset, data } => {
                let n = segs_len(data) as usize;
                if offset.saturating_add(n as u64) > self.limit {
                    return Err(io::Error::from_raw_os_error(libc::EFBIG));
                }
                let mut bytes = Buffer::zeroed(n);
                bytes.gather(0, data);
                self.change(*offset, bytes.to_vec(), true)?;
                Ok(n)
            }
            Op::WriteZeroes { offset, len } => self.change(*offset, self.zeros(*len)?, true),
            Op::Punch { offset, len } => {
                let end = (self.current.len() as u64).min(offset.saturating_add(*len));
                self.change((*offset).min(end), self.zeros(end.saturating_sub(*offset))?, false)
            }
            Op::Allocate { offset, len } => {
                let end = offset.saturating_add(*len);
                if end > self.current.len() as u64 { self.set_length(end) } else { Ok(0) }
            }
            Op::SetLength { len } => self.set_length(*len),
            Op::Flush { .. } => {
                self.make_durable(covers);
                Ok(0)
            }
        }
    }

    fn zeros(&self, len: u64) -> io::Result<Vec<u8>> {
        if len > self.limit { Err(io::Error::from_raw_os_error(libc::EFBIG)) } else { Ok(vec![0; len as usize]) }
    }

    fn set_length(&mut self, len: u64) -> io::Result<usize> {
        if len > self.limit {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let change =
            Change { offset: 0, bytes: Vec::new(), length: Some(len as usize), in_flight: false, dropped: false };
        apply(&mut self.current, &change, |_| true);
        self.log.push(change);
        Ok(0)
    }

    fn change(&mut self, offset: u64, bytes: Vec<u8>, extend: bool) -> io::Result<usize> {
        let end = offset.saturating_add(bytes.len() as u64);
        if end > self.limit {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let length = (extend && end > self.current.len() as u64).then_some(end as usize);
        let change = Change { offset: offset as usize, bytes, length, in_flight: false, dropped: false };
        apply(&mut self.current, &change, |_| true);
        self.log.push(change);
        Ok(0)
    }

    fn make_durable(&mut self, covers: u64) {
        let n = covers.saturating_sub(self.dropped).min(self.log.len() as u64) as usize;
        for change in self.log.drain(..n) {
            apply(&mut self.durable, &change, |_| !change.dropped);
        }
        self.dropped += n as u64;
    }

    /// A flush fails: the kernel marks the pages clean all the same, so what was to be made durable may be lost for good.
    pub(super) fn fail_flush(&mut self, rng: &mut Rng) {
        for change in &mut self.log {
            change.dropped |= rng.one_in(2);
        }
    }

    /// The last change was still in flight when the end came.
    pub(super) fn may_tear(&mut self) {
        if let Some(change) = self.log.last_mut() {
            change.in_flight = true;
        }
    }

    /// The process died: what was in flight is there in part, and all else stays in the kernel's cache.
    pub(super) fn tear_last(&mut self, rng: &mut Rng) {
        let mut log = Vec::new();
        for change in std::mem::take(&mut self.log) {
            if change.in_flight { log.extend(torn(&change, rng)) } else { log.push(change) }
        }
        self.log = log;
        self.current.clone_from(&self.durable);
        for change in &self.log {
            apply(&mut self.current, change, |_| true);
        }
    }

    /// The power failed: each change is kept, lost, or torn. `tell` hears where it lies, how long it is, and what became of it.
    pub(super) fn cut_power(&mut self, rng: &mut Rng, mut tell: impl FnMut(usize, usize, &'static str)) {
        for change in std::mem::take(&mut self.log) {
            let fate = match rng.below(3) {
                _ if change.dropped => "lost by a failed flush",
                0 => "lost",
                1 => {
                    apply(&mut self.durable, &change, |_| true);
                    "kept"
                }
                _ => {
                    apply(&mut self.durable, &change, |_| rng.one_in(2));
                    "torn"
                }
            };
            tell(change.offset, change.bytes.len(), fate);
            self.dropped += 1;
        }
        self.current.clone_from(&self.durable);
    }
}

/// The sectors of a change that reached the file before the end.
fn torn(change: &Change, rng: &mut Rng) -> Vec<Change> {
    let part = |at: usize, n: usize| Change {
        offset: change.offset + at,
        bytes: change.bytes[at..at + n].to_vec(),
        length: change.length.map(|_| change.offset + at + n),
        in_flight: false,
        dropped: change.dropped,
    };
    let mut parts = Vec::new();
    let mut at = 0;
    while at < change.bytes.len() {
        let n = (SECTOR - (change.offset + at) % SECTOR).min(change.bytes.len() - at);
        if rng.one_in(2) {
            parts.push(part(at, n));
        }
        at += n;
    }
    parts
}

/// Applies the sectors of `change` that `keep` says yes to (asked once a sector, and once for the length).
fn apply(content: &mut Vec<u8>, change: &Change, mut keep: impl FnMut(usize) -> bool) {
    let is_data = !change.bytes.is_empty();
    if let Some(length) = change.length
        && (is_data || keep(0))
        && (!is_data || length > content.len())
    {
        content.resize(length, 0);
    }
    let mut at = 0;
    while at < change.bytes.len() {
        let start = change.offset + at;
        let end = ((start / SECTOR + 1) * SECTOR).min(change.offset + change.bytes.len());
        let n = end - start;
        if keep(start) && start < content.len() {
            let n = n.min(content.len() - start);
            content[start..start + n].copy_from_slice(&change.bytes[at..at + n]);
        }
        at += n;
    }
}
