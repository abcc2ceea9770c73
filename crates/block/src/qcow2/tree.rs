//! The clusters that an L1 table leads to: all of them counted once more, or once less; and the COPIED flags that follow from the
//! counts.
//!
//! Each mention counts: an L2 table that two L1 tables name has two references, and so has each cluster that it names, once for
//! each way there. For who is alone with the image, whose caches hold nothing that is not in the file.

use std::ops::Range;
use std::rc::Rc;

use cowhand_qcow2::{HostOffset, L1Entry, L2Entry, L2Kind};

use super::Image;
use super::layout::Structure;
use super::mapping::be64;
use super::refcounts::Need;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::queue::Queue;

/// In which way references change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    More,
    Less,
}

impl Image {
    /// Adds a reference to each cluster that the L1 table leads to. When that fails, those that were added are taken off again.
    pub(super) async fn share_tree(&self, queue: &Rc<Queue>, l1: &[L1Entry]) -> Result<()> {
        let mut changed = 0;
        let shared = self.change_tree(queue, l1, Change::More, u64::MAX, &mut changed).await;
        if shared.is_err() {
            let undone = self.change_tree(queue, l1, Change::Less, changed, &mut 0).await;
            self.warn_of_leak(undone);
        }
        shared
    }

    /// Takes a reference off each cluster that the L1 table leads to; what has none left is free. Nothing in the file names that
    /// table any more, durably.
    pub(super) async fn drop_tree(&self, queue: &Rc<Queue>, l1: &[L1Entry]) -> Result<()> {
        self.change_tree(queue, l1, Change::Less, u64::MAX, &mut 0).await
    }

    /// Takes a reference off each cluster of a structure of so many bytes that nothing in the file names any more, durably.
    pub(super) async fn drop_structure(&self, queue: &Rc<Queue>, place: HostOffset, bytes: u64) -> Result<()> {
        let first = self.geometry.cluster_bits.index_of(place.get());
        let clusters = first..first + self.geometry.cluster_bits.clusters_for(bytes);
        self.drop_clusters(queue, clusters).await
    }

    /// The same of a run of clusters.
    pub(super) async fn drop_clusters(&self, queue: &Rc<Queue>, clusters: Range<u64>) -> Result<()> {
        let mut free = Vec::new();
        let dropped = self.change_run(queue, clusters, Change::Less, u64::MAX, &mut 0, &mut free).await;
        self.free(queue, free).await;
        dropped
    }

    /// Adds a reference to a cluster.
    pub(super) async fn add_reference(&self, queue: &Rc<Queue>, cluster: u64) -> Result<()> {
        self.change_run(queue, cluster..cluster + 1, Change::More, u64::MAX, &mut 0, &mut Vec::new()).await
    }

    /// What could not be freed is lost space, and no more.
    pub(crate) fn warn_of_leak(&self, freed: Result<()>) {
        if let Err(e) = freed {
            tracing::warn!("{}: clusters leak: {e}", self.path.display());
        }
    }

    /// Changes the first `limit` references of a tree, and counts them. (The same order both ways, so that one undoes the other.)
    async fn change_tree(
        &self,
        queue: &Rc<Queue>,
        l1: &[L1Entry],
        change: Change,
        limit: u64,
        changed: &mut u64,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        for entry in l1 {
            if *changed >= limit {
                break;
            }
            let Some(table) = entry.offset(&self.geometry).map_err(|e| self.format_error(&e))? else { continue };
            let first = bits.index_of(table.get());
            // What is metadata of another sort would be freed with the tree. (Sharp edge 43.)
            if self.layout.is_fixed(first) {
                let message =
                    "the image is damaged: an L2 table lies in a cluster of other metadata; look at it with a check";
                return Err(Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(table.get()));
            }
            let bytes = self.read_l2(queue, table).await?;
            let mut free = Vec::new();
            let mut result = self.change_run(queue, first..first + 1, change, limit, changed, &mut free).await;
            for run in self.mentions(&bytes) {
                if result.is_err() {
                    break;
                }
                result = match run {
                    Ok(run) => self.change_run(queue, run, change, limit, changed, &mut free).await,
                    Err(e) => Err(e),
                };
            }
            self.free(queue, free).await;
            result?;
        }
        Ok(())
    }

    async fn change_run(
        &self,
        queue: &Rc<Queue>,
        clusters: Range<u64>,
        change: Change,
        limit: u64,
        changed: &mut u64,
        free: &mut Vec<u64>,
    ) -> Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            let need = {
                let mut meta = self.meta.lock();
                let now = meta.tick();
                loop {
                    if at == clusters.end || *changed >= limit {
                        return Ok(());
                    }
                    let done = match change {
                        Change::More => meta.refcounts.reference(at, now),
                        Change::Less => meta.refcounts.unref(at, now).map(|last| free.extend(last.then_some(at))),
                    };
                    match done {
                        Ok(()) => (at, *changed) = (at + 1, *changed + 1),
                        Err(need) => break need,
                    }
                }
            };
            self.satisfy_alone(queue, need).await?;
        }
        Ok(())
    }

    /// The host clusters that an L2 table names, run by run, as often as it does. Those of metadata are refused. (Sharp edge 43.)
    fn mentions<'a>(&'a self, table: &'a [u8]) -> impl Iterator<Item = Result<Range<u64>>> + 'a {
        let bits = self.geometry.cluster_bits;
        let mut entries = self.l2_entries(table).peekable();
        std::iter::from_fn(move || {
            let mut run: Option<Range<u64>> = None;
            while let Some(&entry) = entries.peek() {
                let next = match entry.decode(&self.geometry) {
                    // What lies in an external data file has no refcounts.
                    Ok(_) if self.geometry.has_data_file => None,
                    Ok(L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. }) => {
                        let cluster = bits.index_of(host.get());
                        Some(cluster..cluster + 1)
                    }
                    Ok(L2Kind::Compressed(range)) => {
                        let (host, count) = range.clusters(bits);
                        let cluster = bits.index_of(host.get());
                        Some(cluster..cluster + count)
                    }
                    Ok(L2Kind::Unallocated | L2Kind::Zero { host: None, .. }) => None,
                    Err(e) => {
                        // What is behind it is not looked at.
                        entries.by_ref().for_each(drop);
                        return Some(Err(self.format_error(&e)));
                    }
                };
                run = match (run, next) {
                    (run, None) => run,
                    (None, next) => next,
                    (Some(run), Some(next)) if run.end == next.start => Some(run.start..next.end),
                    (Some(run), _) => return Some(self.check_run(&run).map(|()| run)),
                };
                entries.next();
            }
            run.map(|run| self.check_run(&run).map(|()| run))
        })
    }

    /// The (first words of the) entries of an L2 table.
    pub(super) fn l2_entries<'a>(&self, table: &'a [u8]) -> impl Iterator<Item = L2Entry> + 'a {
        table.chunks_exact(self.geometry.l2_entry_size() as usize).map(|b| L2Entry::from_raw(be64(&b[..8])))
    }

    pub(super) async fn read_l2(&self, queue: &Rc<Queue>, table: HostOffset) -> Result<Buffer> {
        let read = queue.read_buffer(&self.file, table.get(), self.cluster_size() as usize).await;
        read.map_err(|e| self.io_error("cannot read an L2 table", table.get(), e))
    }

    /// An L1 table as it is in the file.
    ///
    /// # Errors
    /// It, or an L2 table that it names, does not lie in the file, or lies on other metadata; the host's.
    pub(super) async fn read_l1(&self, queue: &Rc<Queue>, place: HostOffset, entries: u32) -> Result<Vec<L1Entry>> {
        let end = self.file.length().map_err(|e| self.io_error("cannot tell the file's length", 0, e))?;
        let missing = |offset: u64| {
            let message = "the image is damaged: a table lies past the end of the file; look at it with a check";
            Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(offset)
        };
        let len = u64::from(entries) * 8;
        if place.get().checked_add(len).is_none_or(|table_end| table_end > end) {
            return Err(missing(place.get()));
        }
        let read = queue.read_buffer(&self.file, place.get(), len as usize).await;
        let bytes = read.map_err(|e| self.io_error("cannot read an L1 table", place.get(), e))?;
        let l1: Vec<_> = bytes.chunks_exact(8).map(|b| L1Entry::from_raw(be64(b))).collect();
        for entry in &l1 {
            let Some(table) = entry.offset(&self.geometry).map_err(|e| self.format_error(&e))? else { continue };
            if table.get().saturating_add(self.cluster_size()) > end {
                return Err(missing(table.get()));
            }
        }
        Ok(l1)
    }

    /// Writes an L1 table to a new place: where that is. Nothing names it yet.
    pub(super) async fn write_new_l1(&self, queue: &Rc<Queue>, l1: &[L1Entry]) -> Result<HostOffset> {
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.raw().to_be_bytes()).collect();
        self.write_structure(queue, Structure::L1Table, &bytes).await
    }

    /// Writes a structure to a new place: where that is (0 if it is empty). Nothing names it yet.
    pub(super) async fn write_structure(&self, queue: &Rc<Queue>, what: Structure, bytes: &[u8]) -> Result<HostOffset> {
        let clusters = self.geometry.cluster_bits.clusters_for(bytes.len() as u64);
        if clusters == 0 {
            return Ok(HostOffset::new(0));
        }
        let place = self.allocate_run(queue, clusters).await?;
        // Not given back where it belongs to somebody else.
        self.claim_new(what, place)?;
        // To the cluster's end, so that what is read there later was written, and lies inside the file.
        let mut padded = Buffer::zeroed((clusters << self.geometry.cluster_bits.bits()) as usize);
        padded[..bytes.len()].copy_from_slice(bytes);
        if let Err(e) = queue.write_buffer(&self.file, place.host.get(), padded).await {
            self.give_back(place);
            return Err(self.io_error("cannot write metadata", place.host.get(), e));
        }
        Ok(place.host)
    }

    /// Sets the COPIED flags of everything that the L1 table leads to as the counts say: of the L2 tables' entries in the file, of
    /// its own in `l1`. The table is the active one, or is about to be. (Sharp edge 14.)
    pub(super) async fn set_copied_flags(&self, queue: &Rc<Queue>, l1: &mut [L1Entry]) -> Result<()> {
        for entry in l1 {
            let table = entry.offset(&self.geometry).map_err(|e| self.format_error(&e))?;
            let Some(table) = table else {
                *entry = entry.with_copied(false);
                continue;
            };
            self.set_copied_in(queue, table).await?;
            let exclusive = self.count(queue, self.geometry.cluster_bits.index_of(table.get())).await? == 1;
            *entry = entry.with_copied(exclusive);
        }
        Ok(())
    }

    /// Sets the flags of the active tree, its L1 table included.
    pub(super) async fn set_active_copied_flags(&self, queue: &Rc<Queue>) -> Result<()> {
        let (place, entries) = {
            let state = self.header.lock();
            (state.header.l1_table_offset, state.header.l1_size)
        };
        let old = self.read_l1(queue, place, entries).await?;
        let mut new = old.clone();
        self.set_copied_flags(queue, &mut new).await?;
        for (i, (old, new)) in old.chunks(64).zip(new.chunks(64)).enumerate() {
            if old != new {
                let sector: Vec<u8> = new.iter().flat_map(|entry| entry.raw().to_be_bytes()).collect();
                let place = HostOffset::new(place.get() + i as u64 * 512);
                self.write_as(queue, Structure::L1Table, place, &sector).await?;
            }
        }
        Ok(())
    }

    async fn set_copied_in(&self, queue: &Rc<Queue>, table: HostOffset) -> Result<()> {
        let bytes = self.read_l2(queue, table).await?;
        let mut new = bytes.to_vec();
        let step = self.geometry.l2_entry_size() as usize;
        for (entry, slot) in self.l2_entries(&bytes).zip(new.chunks_exact_mut(step)) {
            let kind = entry.decode(&self.geometry).map_err(|e| self.format_error(&e))?;
            let (L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. }) = kind else { continue };
            let exclusive = self.count(queue, self.geometry.cluster_bits.index_of(host.get())).await? == 1;
            slot[..8].copy_from_slice(&entry.with_copied(exclusive).raw().to_be_bytes());
        }
        // In sectors: a torn write mixes old and new flags, and either is right.
        let changed = |sector: &usize| bytes[sector * 512..][..512] != new[sector * 512..][..512];
        let sectors = 0..new.len() / 512;
        let (Some(first), Some(last)) = (sectors.clone().find(changed), sectors.rev().find(changed)) else {
            return Ok(());
        };
        let place = HostOffset::new(table.get() + first as u64 * 512);
        self.write_as(queue, Structure::L2Table, place, &new[first * 512..(last + 1) * 512]).await
    }

    /// A cluster's count.
    pub(super) async fn count(&self, queue: &Rc<Queue>, cluster: u64) -> Result<u64> {
        loop {
            let need: Need = match self.meta.lock().refcounts.get(cluster) {
                Ok(count) => return Ok(count),
                Err(need) => need,
            };
            self.satisfy_alone(queue, need).await?;
        }
    }
}
