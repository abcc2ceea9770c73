//! Bringing slices of L2 tables into the cache, and taking out of them what would lead a guest into the metadata.

use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;

use cowhand_qcow2::{Geometry, GuestOffset, HostOffset, L2Kind, SubclusterBitmap};

use super::Image;
use super::entry::Stored;
use super::mapping::be64;
use super::slices::Slice;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Role;
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
                let read = queue.read_buffer(&self.file.of(Role::L2Tables), place, entries_len).await;
                Some(read.map_err(|e| self.io_error("cannot read an L2 table", place, e))?)
            }
        };
        let mut entries = vec![Stored::default(); self.slice_entries];
        if let Some(bytes) = &bytes {
            stored_entries(bytes, &self.geometry, &mut entries);
            self.check_slice(slice, &mut entries)?;
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

    /// Takes out of a slice the entries that must not be followed: those that name metadata as guest data, over which the guest would
    /// write (sharp edge 43), and those with reserved bits set, which the cache uses for itself. Their clusters are errors to read and to
    /// write; their neighbours are served.
    fn check_slice(&self, slice: Slice, entries: &mut [Stored]) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let first = slice.0 * entries.len() as u64;
        // Guest data mostly lies in long runs: one look for each.
        let mut run = 0..0;
        let mut misled = false;
        let meta = self.meta.lock();
        for (i, entry) in entries.iter_mut().enumerate() {
            if entry.collides() {
                *entry = Stored::reserved();
            }
            let Some(host) = self.place_of(*entry) else { continue };
            if self.external.is_some() {
                let guest = GuestOffset::new((first + i as u64) << bits.bits());
                self.geometry.check_data_file_mapping(guest, host).map_err(|e| self.format_error(&e))?;
                continue;
            }
            let cluster = bits.index_of(host.get());
            if cluster == run.end {
                run.end += 1;
                continue;
            }
            misled |= meta.owners.metadata_in(&run).is_some();
            run = cluster..cluster + 1;
        }
        if misled || meta.owners.metadata_in(&run).is_some() {
            for entry in entries {
                let cluster = self.place_of(*entry).map(|host| bits.index_of(host.get()));
                if cluster.is_some_and(|cluster| meta.owners.metadata_in(&(cluster..cluster + 1)).is_some()) {
                    *entry = Stored::misled();
                }
            }
        }
        Ok(())
    }

    /// Where the cluster of an entry lies that can be used in place. An entry that breaks a rule is reported when it is used.
    fn place_of(&self, entry: Stored) -> Option<HostOffset> {
        match entry.decode(&self.geometry) {
            Ok((L2Kind::Data { host, .. }, _)) => Some(host),
            Ok((L2Kind::Zero { host, .. }, _)) => host,
            _ => None,
        }
    }

    pub(super) fn check_run(&self, clusters: &Range<u64>) -> Result<()> {
        let metadata = self.meta.lock().owners.metadata_in(clusters);
        match metadata {
            None => Ok(()),
            Some(cluster) => Err(self.misled_error().at_offset(cluster << self.geometry.cluster_bits.bits())),
        }
    }

    /// Guest data lies where metadata lies.
    pub(super) fn misled_error(&self) -> Error {
        let message = "the image is corrupt: guest data lies in a cluster of metadata; close the disk and repair it \
                       ('qemu-img check -r all')";
        Error::new(ErrorKind::Corrupt, message).at_path(&self.path)
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
