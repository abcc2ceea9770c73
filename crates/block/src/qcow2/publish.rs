//! Changing the mapping in memory: L2 tables made or copied before they change, and entries stored in cached slices.

use std::rc::Rc;

use cowhand_qcow2::{FormatError, GuestOffset, HostOffset, L1Entry, L2Kind};

use super::commit::Until;
use super::entry::Stored;
use super::layout::Structure;
use super::record::records;
use super::{Image, NewTable};
use crate::error::{Error, Result};
use crate::queue::Queue;
use crate::sync::Ordering;

impl Image {
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
        // Not given back where it belongs to somebody else.
        self.claim_new(Structure::L2Table, place)?;
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

    /// Replaces the entries of the `count` clusters from `offset` on, in memory, and drops the references of what they replace.
    /// `change` is given a cluster's number among them and its old entry (without what lies below). The caller holds the clusters'
    /// range lock and owns the table ([`own_table`](Self::own_table)).
    ///
    /// When bringing a slice in fails (reading it, or the commit that makes room for it), the entries before it are in the mapping
    /// all the same: the error says how many.
    pub(super) async fn publish(
        &self,
        queue: &Rc<Queue>,
        offset: u64,
        count: u64,
        change: impl Fn(u64, Stored) -> std::result::Result<Stored, FormatError>,
    ) -> std::result::Result<(), Unpublished> {
        let mut done = 0;
        while done < count {
            let at = offset + done * self.cluster_size();
            let (slice, _) = self.slice_of(at);
            if !self.slices.contains(slice) {
                self.load(queue, slice).await.map_err(|error| Unpublished { done, error })?;
            }
            let published = self.publish_in_slice(at, count - done, |i, old| change(done + i, old));
            match published.map_err(|error| Unpublished { done, error })? {
                Some(published) => done += published,
                // What is in the journal comes into the file, and makes room.
                None => self.commit(queue, Until::Mapping).await.map_err(|error| Unpublished { done, error })?,
            }
        }
        Ok(())
    }

    /// The part of [`publish`](Self::publish) that lies in one slice, or of that what the journal has room for; how many entries that were
    /// (0: the slice is gone again; with an error nothing is changed). None if the journal is full.
    fn publish_in_slice(
        &self,
        offset: u64,
        count: u64,
        change: impl Fn(u64, Stored) -> std::result::Result<Stored, FormatError>,
    ) -> Result<Option<u64>> {
        let (slice, index) = self.slice_of(offset);
        let mut meta = self.meta.lock();
        let Some(cached) = self.slices.entries(slice) else { return Ok(Some(0)) };
        let changes = cached.skip(index).zip(0..count).map(|(old, i)| {
            let old = old.on_disk();
            let new = change(i, old)?;
            Ok((old.decode(&self.geometry)?.0, new.decode(&self.geometry)?.0, new))
        });
        let changes: std::result::Result<Vec<_>, FormatError> = changes.collect();
        let mut changes = changes.map_err(|e| self.format_error(&e))?;
        if let Some(ring) = &mut meta.journal {
            let first = self.geometry.cluster_bits.index_of(offset);
            let entries = changes.iter().map(|&(_, new, stored)| (stored, new));
            let (records, noted) = records(&self.geometry, first, entries, ring.room());
            if noted == 0 {
                return Ok(None);
            }
            // Before anybody can see the entries, and so before anybody can be told.
            ring.append(&records);
            changes.truncate(noted);
        }
        let now = meta.tick();
        self.changed.store(now, Ordering::SeqCst);
        for (i, &(old, new, stored)) in changes.iter().enumerate() {
            self.slices.store(slice, index + i, stored);
            match old {
                // What lies in an external data file has no refcounts.
                _ if self.external.is_some() => {}
                L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. } if host_of(new) != Some(host) => {
                    meta.drop_reference(&self.geometry, host, self.cluster_size());
                }
                L2Kind::Compressed(range) => meta.drop_reference(&self.geometry, range.host, range.len),
                _ => {}
            }
        }
        meta.dirty_slices.insert(slice, now);
        Ok(Some(changes.len() as u64))
    }
}

/// Why only `done` of the entries to be published are in the mapping.
pub(super) struct Unpublished {
    pub(super) done: u64,
    error: Error,
}

impl From<Unpublished> for Error {
    fn from(unpublished: Unpublished) -> Self {
        unpublished.error
    }
}

pub(super) fn host_of(kind: L2Kind) -> Option<HostOffset> {
    match kind {
        L2Kind::Data { host, .. } => Some(host),
        L2Kind::Zero { host, .. } => host,
        _ => None,
    }
}
