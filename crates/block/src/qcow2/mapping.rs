//! Where guest data lies: L1 and L2 lookups, slices read on demand, and L2 tables made or copied before they change.

use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use cowhand_qcow2::{CompressedRange, GuestOffset, HostOffset, L1Entry, L2Entry, L2Kind};

use super::slices::Slice;
use super::{Image, NewTable};
use crate::error::{Error, ErrorKind, Result};
use crate::queue::Queue;
use crate::sync::Ordering;

/// How a run of guest data is kept. Runs of `Data` and `Zero` lie together in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Not in this layer.
    Unallocated,
    /// Reads as zeros; the clusters may have a place (`host`), writable in place if `copied`.
    Zero { host: Option<HostOffset>, copied: bool },
    /// At this place, writable in place if `copied`.
    Data { host: HostOffset, copied: bool },
    /// One compressed cluster.
    Compressed(CompressedRange),
}

/// Guest data of one kind, from some offset on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) kind: Kind,
    /// In bytes; at least 1.
    pub(crate) len: u64,
}

/// What the caches know of an offset without I/O.
enum Peek {
    Known(Kind),
    Missing(Slice),
}

impl Image {
    pub(super) fn slice_of(&self, offset: u64) -> (Slice, usize) {
        let cluster = self.geometry.cluster_bits.index_of(offset);
        let entries = self.slice_entries as u64;
        (Slice(cluster / entries), (cluster % entries) as usize)
    }

    /// The L1 index of a slice, and the slice's place in its table in bytes.
    pub(super) fn slice_place(&self, slice: Slice) -> (usize, u64) {
        let per_table = self.geometry.l2_entries() / self.slice_entries as u64;
        ((slice.0 / per_table) as usize, slice.0 % per_table * self.slice_entries as u64 * 8)
    }

    /// What the caches say of the cluster at `offset`; a place is that of the very byte.
    fn peek(&self, offset: u64) -> Result<Peek> {
        let l1 = self.l1_entry(self.geometry.l1_index(GuestOffset::new(offset)) as usize);
        if l1.raw() == 0 {
            return Ok(Peek::Known(Kind::Unallocated));
        }
        let (slice, index) = self.slice_of(offset);
        let Some(entry) = self.slices.get(slice, index) else { return Ok(Peek::Missing(slice)) };
        let kind = entry.decode(&self.geometry).map_err(|e| self.format_error(&e))?;
        let within = self.geometry.cluster_bits.offset_in(offset);
        let at = |host: HostOffset| HostOffset::new(host.get() + within);
        Ok(Peek::Known(match kind {
            L2Kind::Unallocated => Kind::Unallocated,
            L2Kind::Zero { host, copied } => Kind::Zero { host: host.map(at), copied },
            L2Kind::Data { host, copied } => Kind::Data { host: at(host), copied },
            L2Kind::Compressed(range) => Kind::Compressed(range),
        }))
    }

    /// How far from `offset` the data is of one kind and in one place, at most `len` bytes, looking only where the caches know.
    fn extend(&self, offset: u64, len: u64, kind: Kind) -> Result<Run> {
        let cluster = self.cluster_size();
        let mut end = self.geometry.cluster_bits.align_down(offset) + cluster;
        if !matches!(kind, Kind::Compressed(_)) {
            while end < offset + len {
                let Peek::Known(next) = self.peek(end)? else { break };
                if !follows(kind, next, end - offset) {
                    break;
                }
                end += cluster;
            }
        }
        Ok(Run { kind, len: (end - offset).min(len) })
    }

    /// Where the `len` bytes at `offset` lie, if all lie together in the file, can be used in place, and the caches know: the path
    /// of nearly every request, without a lock or an allocation.
    pub(crate) fn mapped(&self, offset: u64, len: u64, write: bool) -> Option<u64> {
        match self.peek(offset) {
            Ok(Peek::Known(kind @ Kind::Data { host, copied })) if copied || !write => {
                let run = self.extend(offset, len, kind).ok()?;
                (run.len == len).then(|| host.get())
            }
            _ => None,
        }
    }

    /// The run that begins at `offset`, at most `len` bytes of it (`len` is not 0).
    pub(crate) async fn run(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<Run> {
        loop {
            match self.peek(offset)? {
                Peek::Known(kind) => return self.extend(offset, len, kind),
                Peek::Missing(slice) => self.load(queue, slice).await?,
            }
        }
    }

    /// Brings a slice into the cache. Whoever comes while it is being read waits for that read.
    pub(super) async fn load(&self, queue: &Rc<Queue>, slice: Slice) -> Result<()> {
        if !self.begin_load(slice).await {
            return Ok(());
        }
        let loading = Loading { image: self, slice };
        let result = self.read_slice(queue, slice).await;
        drop(loading);
        result
    }

    /// Enlists as the one who reads the slice, or waits for the one who does. False if it was (or may now be) there.
    async fn begin_load(&self, slice: Slice) -> bool {
        let mut waited = false;
        poll_fn(|cx| {
            let mut meta = self.meta.lock();
            if self.slices.contains(slice) {
                return Poll::Ready(false);
            }
            if let Some(waiting) = meta.loading.get_mut(&slice) {
                waiting.push(cx.waker().clone());
                waited = true;
                return Poll::Pending;
            }
            // Whoever was waited for may have failed, or the slice is gone again: the caller looks anew.
            if waited {
                return Poll::Ready(false);
            }
            meta.loading.insert(slice, Vec::new());
            Poll::Ready(true)
        })
        .await
    }

    async fn read_slice(&self, queue: &Rc<Queue>, slice: Slice) -> Result<()> {
        let (index, at) = self.slice_place(slice);
        let table = {
            let meta = self.meta.lock();
            match meta.new_tables.get(&index) {
                // Not in the file yet: what it is a copy of is.
                Some(new) => new.source,
                None => self.l1_entry(index).offset(&self.geometry).map_err(|e| self.format_error(&e))?,
            }
        };
        let bytes = match table {
            None => None,
            Some(table) => {
                let place = table.get() + at;
                let read = queue.read_buffer(&self.file, place, self.slice_entries * 8).await;
                Some(read.map_err(|e| self.io_error("cannot read an L2 table", place, e))?)
            }
        };
        if let Some(bytes) = &bytes {
            self.check_slice(bytes)?;
        }
        let raw = |i: usize| match &bytes {
            None => 0,
            Some(bytes) => bytes.chunks_exact(8).nth(i).map_or(0, be64),
        };
        loop {
            let filled = {
                let meta = self.meta.lock();
                self.slices.fill(slice, raw, |holder| meta.dirty_slices.contains_key(&holder))
            };
            if filled {
                return Ok(());
            }
            // Every way that it could take holds changes that are not in the file.
            self.commit(queue, super::commit::Until::Mapping).await?;
        }
    }

    /// Refuses a slice that names metadata as guest data: the guest would write over it. (Sharp edge 43.)
    fn check_slice(&self, bytes: &[u8]) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        // Guest data mostly lies in long runs: one look for each.
        let mut run = 0..0;
        for raw in bytes.chunks_exact(8).map(be64) {
            // An entry that breaks a rule is reported when it is used.
            let Ok(L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. }) =
                L2Entry::from_raw(raw).decode(&self.geometry)
            else {
                continue;
            };
            let cluster = bits.index_of(host.get());
            if cluster == run.end {
                run.end += 1;
                continue;
            }
            self.check_run(&run)?;
            run = cluster..cluster + 1;
        }
        self.check_run(&run)
    }

    fn check_run(&self, clusters: &Range<u64>) -> Result<()> {
        let Some(cluster) = self.layout.first_in(clusters) else { return Ok(()) };
        let message = "the image is damaged: guest data lies in a cluster of metadata; look at it with a check";
        let offset = cluster << self.geometry.cluster_bits.bits();
        Err(Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(offset))
    }

    /// Sees to it that the L2 table for `offset` exists and may be changed: made, or copied from one that a snapshot shares.
    pub(super) async fn own_table(&self, queue: &Rc<Queue>, offset: u64) -> Result<()> {
        let index = self.geometry.l1_index(GuestOffset::new(offset)) as usize;
        if self.l1_entry(index).copied() {
            return Ok(());
        }
        let _tables = self.tables.lock().await;
        let entry = self.l1_entry(index);
        if entry.copied() {
            return Ok(());
        }
        let source = entry.offset(&self.geometry).map_err(|e| self.format_error(&e))?;
        let place = self.allocate(queue, 1).await?;
        let new = L1Entry::new(place.host, true).map_err(|e| self.format_error(&e))?;
        let mut meta = self.meta.lock();
        let now = meta.tick();
        // Known as new before the L1 entry shows: a reader that follows the entry must not read the file there.
        meta.new_tables.insert(index, NewTable { source });
        meta.dirty_l1.insert(index, now);
        if let Some(source) = source {
            meta.drop_reference(&self.geometry, source, self.cluster_size());
        }
        self.l1[index].store(new.raw(), Ordering::Release);
        Ok(())
    }

    /// Stores entries for the clusters from `offset` on, in memory, and drops the references of what they replace. The caller holds
    /// the clusters' range lock and owns the table ([`own_table`](Self::own_table)).
    ///
    /// When bringing a slice in fails (reading it, or the commit that makes room for it), the entries before it are in the mapping
    /// all the same: the error says how many.
    pub(super) async fn publish(
        &self,
        queue: &Rc<Queue>,
        offset: u64,
        entries: &[L2Entry],
    ) -> std::result::Result<(), Unpublished> {
        let mut done = 0;
        while done < entries.len() {
            let at = offset + done as u64 * self.cluster_size();
            let (slice, _) = self.slice_of(at);
            if !self.slices.contains(slice) {
                self.load(queue, slice).await.map_err(|error| Unpublished { done, error })?;
            }
            let published = self.publish_in_slice(at, &entries[done..]);
            done += published.map_err(|error| Unpublished { done, error })?;
        }
        Ok(())
    }

    /// The part of [`publish`](Self::publish) that lies in one slice, all of it or (with an error) nothing; how many entries that
    /// were (0: the slice is gone again).
    fn publish_in_slice(&self, offset: u64, entries: &[L2Entry]) -> Result<usize> {
        let (slice, index) = self.slice_of(offset);
        let mut meta = self.meta.lock();
        let Some(cached) = self.slices.entries(slice) else { return Ok(0) };
        let count = entries.len().min(cached.len() - index);
        let now = meta.tick();
        let decode = |entry: L2Entry| entry.decode(&self.geometry).map_err(|e| self.format_error(&e));
        let old_at = |i: usize| decode(L2Entry::from_raw(cached[index + i].load(Ordering::Acquire)));
        for (i, entry) in entries[..count].iter().enumerate() {
            old_at(i)?;
            decode(*entry)?;
        }
        for (i, entry) in entries[..count].iter().enumerate() {
            let (old, new) = (old_at(i)?, decode(*entry)?);
            self.slices.store(slice, index + i, *entry);
            match old {
                L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. } if host_of(new) != Some(host) => {
                    meta.drop_reference(&self.geometry, host, self.cluster_size());
                }
                L2Kind::Compressed(range) => meta.drop_reference(&self.geometry, range.host, range.len),
                _ => {}
            }
        }
        meta.dirty_slices.insert(slice, now);
        Ok(count)
    }
}

/// Why only `done` of the entries to be published are in the mapping.
pub(super) struct Unpublished {
    pub(super) done: usize,
    error: Error,
}

impl From<Unpublished> for Error {
    fn from(unpublished: Unpublished) -> Self {
        unpublished.error
    }
}

/// Ends a load, whatever became of it, and wakes those who wait.
struct Loading<'a> {
    image: &'a Image,
    slice: Slice,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let waiting = self.image.meta.lock().loading.remove(&self.slice);
        waiting.into_iter().flatten().for_each(std::task::Waker::wake);
    }
}

fn host_of(kind: L2Kind) -> Option<HostOffset> {
    match kind {
        L2Kind::Data { host, .. } => Some(host),
        L2Kind::Zero { host, .. } => host,
        _ => None,
    }
}

/// Whether `next`, found `distance` bytes after a run's first byte, goes on with the run.
fn follows(kind: Kind, next: Kind, distance: u64) -> bool {
    let joins = |a: HostOffset, b: HostOffset| a.get() + distance == b.get();
    match (kind, next) {
        (Kind::Unallocated, Kind::Unallocated) => true,
        (Kind::Zero { host: None, .. }, Kind::Zero { host: None, .. }) => true,
        (Kind::Zero { host: Some(a), copied }, Kind::Zero { host: Some(b), copied: c })
        | (Kind::Data { host: a, copied }, Kind::Data { host: b, copied: c }) => copied == c && joins(a, b),
        _ => false,
    }
}

/// A big-endian number of eight bytes.
pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
