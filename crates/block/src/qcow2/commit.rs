//! Writing metadata in the order that survives a power cut.
//!
//! A commit copies what is dirty at one moment and then writes, with a barrier wherever an order is needed:
//!
//! 1. refcount blocks and new L2 tables, which nothing names yet;
//! 2. — barrier, only if there are new refcount blocks — the refcount table entries that name them;
//! 3. — barrier: guest data, refcounts and new tables are durable —
//! 4. L2 slices and L1 entries, which expose them;
//! 5. — barrier: what they no longer name is free.
//!
//! The copy is taken before the first write, so that an entry that is stored meanwhile, whose data the barrier in 3 may not cover,
//! waits for the next commit. What fails half-way stays dirty and is written again by the next commit; at worst
//! clusters leak.
//!
//! A commit is made for each guest flush, when a cache is full of changes, and at the end.

use std::collections::BTreeMap;
use std::rc::Rc;

use cowhand_qcow2::{Header, HostOffset};

use super::entry::TableBytes;
use super::filling::marked;
use super::layout::Structure;
use super::refcounts::RefcountWrites;
use super::slices::Slice;
use super::{HeaderState, Image, Meta};
use crate::error::Result;
use crate::io::{Barrier, Buffer};
use crate::journal::Ring;
use crate::mutation::Mutation;
use crate::queue::Queue;
use crate::sync::Ordering;

/// How far a commit goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// A guest's flush: everything that completed before is durable.
    Durable,
    /// Room in the caches: dirty metadata is written in order; without any, nothing is done.
    Mapping,
}

/// What was dirty at one moment.
struct Snapshot {
    refcounts: RefcountWrites,
    /// L2 slices in place: where they go, their bytes, which they are, when they changed.
    slices: Vec<(HostOffset, TableBytes, Slice, u64)>,
    /// New L2 tables: L1 index, where they go, what they are a copy of, and their dirty slices (place in the table, bytes).
    tables: Vec<NewTableWrite>,
    /// L1 entries, in sectors: offset in the table and bytes.
    l1: Vec<(u64, Vec<u8>)>,
    /// L1 entries by index and time of change.
    l1_changes: Vec<(usize, u64)>,
    dropped: Vec<std::ops::Range<u64>>,
    /// The moment, and where in the journal it is.
    clock: u64,
    mark: Option<u32>,
}

struct NewTableWrite {
    index: usize,
    place: HostOffset,
    source: Option<HostOffset>,
    parts: Vec<(u64, TableBytes, Slice, u64)>,
}

impl Snapshot {
    fn changes_mapping(&self) -> bool {
        !self.slices.is_empty() || !self.l1.is_empty()
    }
}

impl Meta {
    /// What was noted up to this moment is in the file.
    fn forget_noted(&mut self, snapshot: &Snapshot) {
        if let (Some(ring), Some(mark)) = (&mut self.journal, snapshot.mark) {
            ring.forget(mark);
        }
    }
}

impl Image {
    /// Makes everything durable that completed before the call.
    pub(crate) async fn flush(&self, queue: &Rc<Queue>) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.commit(queue, Until::Durable).await
    }

    /// Writes the dirty metadata.
    pub(super) async fn commit(&self, queue: &Rc<Queue>, until: Until) -> Result<()> {
        let seen = self.commits.load(Ordering::SeqCst);
        let _commit = self.commit_lock.lock().await;
        // A commit that began after our call (so not the one that was perhaps running then) has done our work.
        let enough = if Mutation::FlushJoinsRunningCommit.is_on() { 1 } else { 2 };
        if self.commits.load(Ordering::SeqCst) >= seen + enough {
            return self.flushes.check(&self.path);
        }
        self.flushes.check(&self.path)?;
        let snapshot = self.snapshot()?;
        if Mutation::TailAdvancedEarly.is_on() {
            self.meta.lock().forget_noted(&snapshot);
        }
        let durable = self.write_snapshot(queue, &snapshot, until).await?;
        {
            let mut meta = self.meta.lock();
            // Before anything can be used again that the records say is not.
            if !Mutation::TailAdvancedEarly.is_on() {
                meta.forget_noted(&snapshot);
            }
            self.saved.store(snapshot.clock, Ordering::SeqCst);
            if !snapshot.dropped.is_empty() {
                let stamp = self.grace.stamp();
                let written = snapshot.dropped.len();
                let gone = if Mutation::FreedBeforeDurable.is_on() { meta.dropped.len() } else { written };
                let dropped = meta.dropped.drain(..gone).collect();
                meta.retired.push((stamp, dropped));
            }
        }
        if !durable {
            return Ok(());
        }
        self.commits.fetch_add(1, Ordering::SeqCst);
        if let Err(e) = self.reclaim(queue).await {
            // What was asked for is done; what cannot be freed leaks.
            tracing::warn!("cannot free clusters: {e}");
        }
        Ok(())
    }

    /// Writes everything, for the last time: no request is in flight any more.
    pub(crate) async fn finish(&self, queue: &Rc<Queue>) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.commit(queue, Until::Durable).await?;
        // The first commit freed what the mapping had dropped; those counts are worth a second one.
        while self.meta.lock().refcounts.is_dirty() {
            self.commit(queue, Until::Durable).await?;
        }
        self.round_file_end(queue).await;
        Ok(())
    }

    /// Copies what is dirty now.
    fn snapshot(&self) -> Result<Snapshot> {
        let meta = self.meta.lock();
        let mut tables = Vec::new();
        for (&index, new) in &meta.new_tables {
            let place = self.l1_entry(index).offset(&self.geometry).map_err(|e| self.format_error(&e))?;
            let Some(place) = place else { continue };
            tables.push(NewTableWrite { index, place, source: new.source, parts: Vec::new() });
        }
        let mut slices = Vec::new();
        for (&slice, &when) in &meta.dirty_slices {
            let Some(entries) = self.slices.entries(slice) else { continue };
            let bytes = TableBytes::new(&self.geometry, entries);
            let (index, at) = self.slice_place(slice);
            // In ascending order, as they come out of the map.
            if let Ok(table) = tables.binary_search_by_key(&index, |t: &NewTableWrite| t.index) {
                tables[table].parts.push((at, bytes, slice, when));
                continue;
            }
            let table = self.l1_entry(index).offset(&self.geometry).map_err(|e| self.format_error(&e))?;
            let Some(table) = table else { continue };
            slices.push((HostOffset::new(table.get() + at), bytes, slice, when));
        }
        let l1_changes: Vec<_> = meta.dirty_l1.iter().map(|(&i, &when)| (i, when)).collect();
        Ok(Snapshot {
            refcounts: meta.refcounts.collect(),
            slices,
            tables,
            l1: self.l1_sectors(&l1_changes),
            l1_changes,
            dropped: meta.dropped.clone(),
            clock: meta.clock,
            mark: meta.journal.as_ref().map(Ring::mark),
        })
    }

    /// The sectors of the L1 table that hold these entries.
    fn l1_sectors(&self, changes: &[(usize, u64)]) -> Vec<(u64, Vec<u8>)> {
        let mut sectors: Vec<usize> = changes.iter().map(|(index, _)| index / 64).collect();
        sectors.dedup();
        let sector = |s: usize| {
            let end = self.l1.len().min((s + 1) * 64);
            let bytes = self.l1[s * 64..end].iter().flat_map(|e| e.load(Ordering::Acquire).to_be_bytes()).collect();
            (s as u64 * 512, bytes)
        };
        sectors.into_iter().map(sector).collect()
    }

    /// Whether everything that completed before is durable now.
    async fn write_snapshot(&self, queue: &Rc<Queue>, snapshot: &Snapshot, until: Until) -> Result<bool> {
        if !Mutation::MappingBeforeRefcounts.is_on() {
            self.write_refblocks(queue, snapshot).await?;
        }
        if !Mutation::L1BeforeNewTables.is_on() {
            self.write_new_tables(queue, snapshot).await?;
        }
        if !snapshot.refcounts.table.is_empty() {
            self.barrier(queue, Barrier::NewRefblocks).await?;
            let table = self.meta.lock().refcounts.table().0;
            for (index, place) in &snapshot.refcounts.table {
                let at = HostOffset::new(table.get() + index * 8);
                self.write_as(queue, Structure::RefcountTable, at, &place.get().to_be_bytes()).await?;
            }
            self.meta.lock().refcounts.named(&snapshot.refcounts);
        }
        self.meta.lock().refcounts.written(&snapshot.refcounts);
        if snapshot.changes_mapping() {
            self.barrier(queue, Barrier::BeforeMapping).await?;
            // The new tables are in the file as they were copied. From now on they change in place, after a barrier, like all
            // others: the L1 entries that are about to be written may become durable at any moment.
            self.tables_written(snapshot);
            self.write_mapping(queue, snapshot).await?;
            if Mutation::L1BeforeNewTables.is_on() {
                self.write_new_tables(queue, snapshot).await?;
            }
            self.barrier(queue, Barrier::Mapping).await?;
            if Mutation::MappingBeforeRefcounts.is_on() {
                self.write_refblocks(queue, snapshot).await?;
            }
            self.mapping_written(snapshot);
        } else if until == Until::Durable || !snapshot.dropped.is_empty() {
            self.barrier(queue, Barrier::Data).await?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    async fn write_refblocks(&self, queue: &Rc<Queue>, snapshot: &Snapshot) -> Result<()> {
        for (place, bytes, _, _) in &snapshot.refcounts.blocks {
            self.write_as(queue, Structure::RefcountBlock, *place, bytes).await?;
        }
        Ok(())
    }

    async fn write_new_tables(&self, queue: &Rc<Queue>, snapshot: &Snapshot) -> Result<()> {
        for table in &snapshot.tables {
            self.write_new_table(queue, table).await?;
        }
        Ok(())
    }

    async fn write_mapping(&self, queue: &Rc<Queue>, snapshot: &Snapshot) -> Result<()> {
        for (place, part, slice, _) in &snapshot.slices {
            let late = Mutation::SlicesReadLate.is_on().then(|| self.slices.entries(*slice)).flatten();
            let late = late.map(|entries| TableBytes::new(&self.geometry, entries));
            let part = late.as_ref().unwrap_or(part);
            let mut bytes = Buffer::zeroed(part.len());
            if part.keeps_some() {
                let read = queue.read_buffer(&self.file, place.get(), part.len()).await;
                bytes = read.map_err(|e| self.io_error("cannot read an L2 table", place.get(), e))?;
            }
            part.put_into(&mut bytes);
            self.write_as(queue, Structure::L2Table, *place, &bytes).await?;
        }
        let l1_table = self.header.lock().header.l1_table_offset;
        for (at, bytes) in &snapshot.l1 {
            let place = HostOffset::new(l1_table.get() + at);
            self.write_as(queue, Structure::L1Table, place, bytes).await?;
        }
        Ok(())
    }

    /// Writes a whole L2 table that nothing in the file names yet.
    async fn write_new_table(&self, queue: &Rc<Queue>, table: &NewTableWrite) -> Result<()> {
        let len = self.cluster_size() as usize;
        let mut bytes = match table.source {
            None => Buffer::zeroed(len),
            Some(source) => {
                let read = queue.read_buffer(&self.file, source.get(), len).await;
                read.map_err(|e| self.io_error("cannot read an L2 table", source.get(), e))?
            }
        };
        for (at, part, _, _) in &table.parts {
            let at = *at as usize;
            part.put_into(&mut bytes[at..at + part.len()]);
        }
        self.claim(Structure::L2Table, table.place, len)?;
        let written = queue.write_buffer(&self.file, table.place.get(), bytes).await;
        written.map_err(|e| self.io_error("cannot write an L2 table", table.place.get(), e))
    }

    /// The snapshot's new tables are in the file; their slices are clean, unless they have changed since.
    fn tables_written(&self, snapshot: &Snapshot) {
        let mut meta = self.meta.lock();
        for table in &snapshot.tables {
            meta.new_tables.remove(&table.index);
            for (_, _, slice, when) in &table.parts {
                clean(&mut meta.dirty_slices, slice, *when);
            }
        }
    }

    /// The snapshot's slices and L1 entries are in the file: clean, unless they have changed since.
    fn mapping_written(&self, snapshot: &Snapshot) {
        let mut meta = self.meta.lock();
        for (_, _, slice, when) in &snapshot.slices {
            clean(&mut meta.dirty_slices, slice, *when);
        }
        for (index, when) in &snapshot.l1_changes {
            clean(&mut meta.dirty_l1, index, *when);
        }
    }

    /// Writes a piece of metadata, whoever's it is; see [`write_as`](Self::write_as).
    pub(super) async fn write_metadata(&self, queue: &Rc<Queue>, place: HostOffset, bytes: &[u8]) -> Result<()> {
        let written = queue.write_buffer(&self.file, place.get(), Buffer::from_bytes(bytes)).await;
        written.map_err(|e| self.io_error("cannot write metadata", place.get(), e))
    }

    /// Makes what was written durable.
    pub(crate) async fn barrier(&self, queue: &Rc<Queue>, barrier: Barrier) -> Result<()> {
        if let Some(external) = &self.external
            && matches!(barrier, Barrier::Data | Barrier::BeforeMapping)
        {
            self.flushes.flush(queue, &external.file, &external.path, barrier).await?;
        }
        self.flushes.flush(queue, &self.file, &self.path, barrier).await
    }

    /// Changes the header by one write of its first sector; when that is to be durable is the caller's to say. The caller holds the
    /// commit lock, or is alone.
    pub(super) async fn update_header(&self, queue: &Rc<Queue>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let (sector, header) = {
            let state = self.header.lock();
            let mut header = state.header.clone();
            change(&mut header);
            (header.encode_fixed(&state.sector).map_err(|e| self.format_error(&e))?, header)
        };
        let shown = if self.filling.load(Ordering::SeqCst) { marked(&sector) } else { sector.clone() };
        self.write_as(queue, Structure::Header, HostOffset::new(0), &shown).await?;
        *self.header.lock() = HeaderState { header, sector };
        Ok(())
    }
}

/// Takes `key` out of the dirty ones if it has not changed since `when`.
fn clean<K: Ord>(dirty: &mut BTreeMap<K, u64>, key: &K, when: u64) {
    if dirty.get(key) == Some(&when) || Mutation::ChangedCountsAsWritten.is_on() {
        dirty.remove(key);
    }
}
