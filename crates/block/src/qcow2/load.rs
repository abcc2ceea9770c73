//! Bringing slices of L2 tables into the cache, and refusing those that would lead a guest into the metadata.

use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use cowhand_qcow2::{Geometry, GuestOffset, L2Kind, SubclusterBitmap};

use super::Image;
use super::entry::Stored;
use super::mapping::be64;
use super::slices::Slice;
use crate::error::{Error, ErrorKind, Result};
use crate::mutation::Mutation;
use crate::queue::Queue;
use crate::sync::enlist;

impl Image {
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
                enlist(waiting, cx.waker());
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
                let entries_len = self.slice_entries * self.geometry.l2_entry_size() as usize;
                let read = queue.read_buffer(&self.file, place, entries_len).await;
                Some(read.map_err(|e| self.io_error("cannot read an L2 table", place, e))?)
            }
        };
        let mut entries = vec![Stored::default(); self.slice_entries];
        if let (Some(bytes), Some(table)) = (&bytes, table) {
            stored_entries(bytes, &self.geometry, &mut entries);
            self.check_slice(slice, &entries, table.get() + at)?;
        }
        self.resolve(queue, slice, &mut entries).await?;
        loop {
            let filled = {
                let meta = self.meta.lock();
                let entry = |i: usize| entries.get(i).copied().unwrap_or_default();
                let stays = |holder| meta.dirty_slices.contains_key(&holder) && !Mutation::DirtySliceEvicted.is_on();
                self.slices.fill(slice, entry, stays)
            };
            if filled {
                return Ok(());
            }
            // Every way that it could take holds changes that are not in the file.
            self.commit(queue, super::commit::Until::Mapping).await?;
        }
    }

    /// Refuses a slice that names metadata as guest data: the guest would write over it. (Sharp edge 43.) And one with reserved bits
    /// set, which the cache uses for itself. The slice lies at `place`.
    fn check_slice(&self, slice: Slice, entries: &[Stored], place: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        // Guest data mostly lies in long runs: one look for each.
        let mut run = 0..0;
        for (i, entry) in entries.iter().enumerate() {
            if entry.collides() {
                let message = "the image is damaged: an L2 entry has reserved bits set; look at it with a check";
                let at = place + i as u64 * self.geometry.l2_entry_size();
                return Err(Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(at));
            }
            // An entry that breaks another rule is reported when it is used.
            let Ok((L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. }, _)) =
                entry.decode(&self.geometry)
            else {
                continue;
            };
            if self.external.is_some() {
                let guest = (slice.0 * entries.len() as u64 + i as u64) << bits.bits();
                let guest = GuestOffset::new(guest);
                self.geometry.check_data_file_mapping(guest, host).map_err(|e| self.format_error(&e))?;
                continue;
            }
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

    pub(super) fn check_run(&self, clusters: &Range<u64>) -> Result<()> {
        let Some(cluster) = self.layout.first_in(clusters) else { return Ok(()) };
        let message = "the image is damaged: guest data lies in a cluster of metadata; look at it with a check";
        let offset = cluster << self.geometry.cluster_bits.bits();
        Err(Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(offset))
    }
}

/// Reads the entries of a table, or of a part of one, into `entries`.
pub(super) fn stored_entries(bytes: &[u8], geometry: &Geometry, entries: &mut [Stored]) {
    for (bytes, stored) in bytes.chunks_exact(geometry.l2_entry_size() as usize).zip(entries) {
        let (entry, bitmap) = bytes.split_at(8);
        *stored = Stored { entry: be64(entry), bitmap: SubclusterBitmap::from_raw(be64(bitmap)) };
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
