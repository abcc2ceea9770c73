//! Copies of the disk while the guest goes on: one of the disk as it was at one moment, and one that converges on it.

use std::collections::VecDeque;
use std::ops::Range;

use super::model::tag_of;
use super::{Buffer, Disk, DiskQueue, Event, Play, Request, RequestQueue, Wait, text};
use crate::sync::Arc;
use crate::{CopyBeforeWrite, DirtyTracker};

/// The most bytes of one read.
const READ_MAX: u64 = 64 << 10;

/// Reads in flight.
struct Reads {
    queue: DiskQueue,
    flying: VecDeque<(u64, Range<u64>, Buffer)>,
    next: u64,
    /// Since one succeeded.
    failures: u32,
}

/// So many failures in a row, and a copy is given up: the disk may serve nothing more.
const FAILURES_MAX: u32 = 40;

/// A range that was read, with the tag of each sector (none if it is of two writes), or that could not be.
type Read = (Range<u64>, Option<Vec<Option<u32>>>);

impl Reads {
    fn new(disk: &Arc<Disk>) -> Result<Self, String> {
        Ok(Self { queue: disk.queue().map_err(text)?, flying: VecDeque::new(), next: 0, failures: 0 })
    }

    fn submit(&mut self, range: Range<u64>) {
        let buffer = Buffer::zeroed((range.end - range.start) as usize);
        self.next += 1;
        self.queue.submit(self.next, Request::Read { offset: range.start, data: vec![buffer.seg(0, buffer.len())] });
        self.flying.push_back((self.next, range, buffer));
    }

    fn take(&mut self) -> Result<Vec<Read>, String> {
        let mut events = Vec::new();
        self.queue.wait(Wait::Poll, &mut events).map_err(text)?;
        let mut reads = Vec::new();
        for event in events {
            let Event::Done { tag, result, .. } = event else { continue };
            let at = self.flying.iter().position(|read| read.0 == tag).ok_or("a read was answered twice")?;
            let Some((_, range, buffer)) = self.flying.remove(at) else { continue };
            let sectors = range.start / 512..range.end / 512;
            let tags = sectors.zip(buffer.chunks_exact(512));
            // A chunk has the sector's length.
            let tags = tags.map(|(sector, bytes)| tag_of(sector, bytes.try_into().unwrap())).collect();
            self.failures = if result.is_ok() { 0 } else { self.failures + 1 };
            reads.push((range, result.is_ok().then_some(tags)));
        }
        Ok(reads)
    }
}

/// A copy of the disk as it was at one moment.
pub(super) struct Copier {
    copy: CopyBeforeWrite,
    reads: Reads,
    /// What each sector may have held then.
    legal: Vec<Vec<u32>>,
}

impl Copier {
    pub(super) fn new(copy: CopyBeforeWrite, disk: &Arc<Disk>, legal: Vec<Vec<u32>>) -> Result<Self, String> {
        Ok(Self { copy, reads: Reads::new(disk)?, legal })
    }

    /// Goes on a little; whether something is left to do.
    fn go_on(&mut self) -> Result<bool, String> {
        if self.reads.flying.len() < 2
            && let Some(range) = self.copy.next(READ_MAX)
        {
            self.reads.submit(range);
        }
        for (range, tags) in self.reads.take()? {
            let Some(tags) = tags else {
                self.copy.failed(&range);
                continue;
            };
            for (sector, tag) in (range.start / 512..).zip(tags) {
                let legal = self.legal.get(sector as usize).map(Vec::as_slice).unwrap_or_default();
                if !tag.is_some_and(|tag| legal.contains(&tag)) {
                    return Err(format!("the copy has {tag:?} in sector {sector}, legal {legal:?}"));
                }
            }
            self.copy.copied(&range);
        }
        Ok(!self.copy.is_complete())
    }
}

/// A copy that converges on the disk.
pub(super) struct Mirror {
    tracker: DirtyTracker,
    reads: Reads,
    content: Vec<Option<u32>>,
}

impl Mirror {
    pub(super) fn new(disk: &Arc<Disk>, granularity: u64) -> Result<Self, String> {
        let tracker = disk.track_writes(Some(granularity), true).map_err(text)?;
        Ok(Self { tracker, reads: Reads::new(disk)?, content: Vec::new() })
    }

    fn go_on(&mut self) -> Result<bool, String> {
        // One at a time: two reads of one range could be taken in the wrong order.
        if self.reads.flying.is_empty()
            && let Some(range) = self.tracker.next(READ_MAX)
        {
            self.reads.submit(range);
        }
        for (range, tags) in self.reads.take()? {
            let Some(tags) = tags else {
                self.tracker.give_back(&range);
                continue;
            };
            let (first, end) = (range.start as usize / 512, range.end as usize / 512);
            let len = self.content.len().max(end);
            self.content.resize(len, None);
            self.content[first..end].copy_from_slice(&tags);
        }
        Ok(self.tracker.dirty() > 0 || !self.reads.flying.is_empty())
    }
}

impl Play {
    /// The copies go on, if there are any.
    pub(super) fn follow(&mut self) -> Result<(), String> {
        if let Some(copier) = &mut self.copier
            && !copier.go_on()?
        {
            self.world.note(|| "the copy is complete".into());
            self.copier = None;
            self.copies.0 += 1;
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.go_on()?;
        }
        self.copier = self.copier.take().filter(|copier| copier.reads.failures < FAILURES_MAX);
        self.mirror = self.mirror.take().filter(|mirror| mirror.reads.failures < FAILURES_MAX);
        Ok(())
    }

    /// The guest has ended: the copies do too, and the mirror has what the disk has.
    pub(super) fn end_copies(&mut self) -> Result<(), String> {
        while self.copier.is_some() {
            self.world.step();
            self.follow()?;
        }
        while let Some(mirror) = &mut self.mirror {
            if !mirror.go_on()? {
                self.mirrored = self.mirror.take().map(|mirror| mirror.content);
                break;
            }
            self.world.step();
            self.follow()?;
        }
        Ok(())
    }

    /// What the mirror had at the end is what the disk holds.
    pub(super) fn check_mirror(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Some(mirrored) = self.mirrored.take() else { return Ok(()) };
        self.copies.1 += 1;
        for (sector, bytes) in bytes.chunks_exact(512).enumerate() {
            let (has, is) = (mirrored.get(sector).copied().flatten(), tag_of(sector as u64, bytes.try_into().unwrap()));
            if is.is_none() || has != is {
                return Err(format!("the mirror has {has:?} in sector {sector}, the disk {is:?}"));
            }
        }
        Ok(())
    }
}
