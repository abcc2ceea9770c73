//! Internal snapshots: taken, gone back to, deleted.
//!
//! Each of them is one switch of the header's first sector: before it, everything that the new header names is written, counted
//! and durable, and nothing that the old one names has changed in meaning; after it, once it is durable too, what only the old
//! one named is freed. So a power cut leaves the state before or the one after, and at worst clusters that leak.
//!
//! - Taking one shares the active tree: its clusters are counted once more, a copy of the L1 table is written, and the
//!   COPIED flags of the active tables go, so that whatever is written from then on is copied first. (Sharp edges 14, 37, 38.)
//! - Going back shares the snapshot's tree, and makes a copy of its L1 table the active one, with its size; then the tree that
//!   was active is dropped.
//! - Deleting takes the snapshot out of the table; then its tree is dropped, and COPIED flags come back where the counts allow.
//!
//! The snapshot table is never changed in place: another is written beside it. What is not known of its entries is kept.
//!
//! All of this is done alone with the image, on the file; afterwards the image is read again ([`super::reload`]). A failure before the
//! switch is undone, as far as the host lets us; whether a switch that failed has happened, the file tells.

use std::rc::Rc;
use std::time::Duration;

use cowhand_qcow2::{Header, HostOffset, L1Entry, Snapshot, limits};

use super::Image;
use super::commit::Until;
use super::layout::Structure;
use super::snapshot_table::SnapshotTable;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Barrier;
use crate::mutation::Mutation;
use crate::queue::Queue;

/// The longest name, in bytes: what QEMU's tools can handle.
const NAME_MAX: usize = 255;

impl Image {
    /// The snapshot table as it is in the file.
    pub(crate) async fn snapshots(&self, queue: &Rc<Queue>) -> Result<SnapshotTable> {
        let header = self.header.lock().header.clone();
        SnapshotTable::read(queue, &self.file, &self.path, &header).await
    }

    /// The snapshot that has this ID or, if none has, the first that has this name.
    pub(crate) fn find_snapshot(&self, table: &SnapshotTable, which: &str) -> Result<Snapshot> {
        let by_id = table.entries.iter().find(|s| s.id == which.as_bytes());
        by_id.or_else(|| table.entries.iter().find(|s| s.name == which.as_bytes())).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no snapshot '{which}'")).at_path(&self.path)
        })
    }

    /// A snapshot of the disk as it is, not taken yet, or why there cannot be one.
    pub(crate) fn new_snapshot(&self, table: &SnapshotTable, name: &str, date: Duration) -> Result<Snapshot> {
        self.check_snapshots_writable()?;
        let refuse = |message: String| Err(Error::new(ErrorKind::Invalid, message).at_path(&self.path));
        if name.is_empty() || name.len() > NAME_MAX {
            return refuse(format!("a snapshot's name has 1 to {NAME_MAX} bytes, not {}", name.len()));
        }
        if table.entries.len() >= limits::SNAPSHOTS_MAX as usize {
            return refuse(format!("there are {} snapshots already, which is the most", table.entries.len()));
        }
        let number = |s: &Snapshot| std::str::from_utf8(&s.id).ok().and_then(|id| id.parse::<u64>().ok());
        let last = table.entries.iter().filter_map(number).max().unwrap_or(0);
        let Some(id) = last.checked_add(1) else { return refuse("there is no snapshot ID left".into()) };
        Ok(Snapshot {
            id: id.to_string().into_bytes(),
            name: name.as_bytes().to_vec(),
            // Until 2106, as the format has it.
            date_sec: u32::try_from(date.as_secs()).unwrap_or(u32::MAX),
            date_nsec: date.subsec_nanos(),
            disk_size: Some(self.header.lock().header.size),
            // As qemu-img has it: nothing ran.
            icount: Some(0),
            ..Snapshot::default()
        })
    }

    pub(crate) fn check_snapshots_writable(&self) -> Result<()> {
        self.check_writable()?;
        if self.geometry.has_data_file {
            let message = "an image with an external data file cannot have internal snapshots";
            return Err(Error::new(ErrorKind::Unsupported, message).at_path(&self.path));
        }
        Ok(())
    }

    /// Takes a snapshot. `table` is the table as it is in the file.
    pub(crate) async fn create_snapshot(&self, queue: &Rc<Queue>, table: &SnapshotTable, new: Snapshot) -> Result<()> {
        let mut snapshots = table.entries.clone();
        let header = self.header.lock().header.clone();
        // All of it: the entries past the disk may lead to a VM state. (Sharp edge 36.)
        let l1 = self.read_l1(queue, header.l1_table_offset, header.l1_size).await?;
        self.share_tree(queue, &l1).await?;
        let result = async {
            // The flags mean nothing there.
            let copy: Vec<_> = l1.iter().map(|entry| entry.with_copied(false)).collect();
            let place = self.write_new_l1(queue, &copy).await?;
            snapshots.push(Snapshot { l1_table_offset: place, l1_size: header.l1_size, ..new });
            let new_table = self.write_snapshot_table(queue, &header, &mut snapshots).await;
            let new_table = new_table.inspect_err(|_| self.give_back_structure(place, l1.len() as u64 * 8))?;
            if !Mutation::SnapshotKeepsCopied.is_on() {
                self.set_active_copied_flags(queue).await?;
            }
            self.settle(queue).await?;
            Ok(new_table)
        };
        let result: Result<HostOffset> = result.await;
        let new_table = match result {
            Ok(place) => place,
            Err(e) => {
                let undone = self.unshare_active(queue, &l1).await;
                self.warn_of_leak(undone);
                return Err(e);
            }
        };
        self.switch_snapshots(queue, table, &snapshots, new_table).await
    }

    async fn unshare_active(&self, queue: &Rc<Queue>, l1: &[L1Entry]) -> Result<()> {
        self.drop_tree(queue, l1).await?;
        self.set_active_copied_flags(queue).await
    }

    /// Makes the disk what it was when the snapshot was taken. For bitmaps everything changes with that.
    pub(crate) async fn apply_snapshot(&self, queue: &Rc<Queue>, snapshot: &Snapshot) -> Result<()> {
        self.mark_all_dirty();
        let size = snapshot.disk_size.unwrap_or(self.header.lock().header.size);
        self.with_bitmaps_held(queue, size, async || self.go_back_to(queue, snapshot).await).await
    }

    async fn go_back_to(&self, queue: &Rc<Queue>, snapshot: &Snapshot) -> Result<()> {
        let header = self.header.lock().header.clone();
        let size = snapshot.disk_size.unwrap_or(header.size);
        let old = self.read_l1(queue, header.l1_table_offset, header.l1_size).await?;
        let mut l1 = self.read_l1(queue, snapshot.l1_table_offset, snapshot.l1_size).await?;
        let shared = l1.len();
        let entries = self.geometry.l1_entries_for(size).max(u64::from(snapshot.l1_size));
        if entries > limits::L1_TABLE_BYTES_MAX / 8 {
            let message = "the image is damaged: a snapshot's size is more than an L1 table can map";
            return Err(Error::new(ErrorKind::Corrupt, message).at_path(&self.path));
        }
        self.share_tree(queue, &l1).await?;
        l1.resize(entries as usize, L1Entry::UNALLOCATED);
        let result = async {
            // Before they become active: in a snapshot's tables the flags may say anything. (Sharp edge 14.)
            self.set_copied_flags(queue, &mut l1).await?;
            let place = self.write_new_l1(queue, &l1).await?;
            self.settle(queue).await?;
            Ok(place)
        };
        let place: Result<HostOffset> = result.await;
        let place = match place {
            Ok(place) => place,
            Err(e) => {
                let undone = self.drop_tree(queue, &l1[..shared]).await;
                self.warn_of_leak(undone);
                return Err(e);
            }
        };
        self.switch_header(queue, |header| {
            header.size = size;
            header.l1_table_offset = place;
            header.l1_size = entries as u32;
        })
        .await?;
        // All that is left to do is to free.
        let dropped = self.drop_tree(queue, &old).await;
        self.warn_of_leak(dropped);
        let dropped = self.drop_structure(queue, header.l1_table_offset, u64::from(header.l1_size) * 8).await;
        self.warn_of_leak(dropped);
        Ok(())
    }

    /// Deletes a snapshot. `table` is the table as it is in the file.
    pub(crate) async fn delete_snapshot(
        &self,
        queue: &Rc<Queue>,
        table: &SnapshotTable,
        gone: &Snapshot,
    ) -> Result<()> {
        let mut snapshots = table.entries.clone();
        let header = self.header.lock().header.clone();
        // What it leads to must be understood before it is forgotten.
        let l1 = self.read_l1(queue, gone.l1_table_offset, gone.l1_size).await?;
        snapshots.retain(|snapshot| snapshot != gone);
        let new_table = self.write_snapshot_table(queue, &header, &mut snapshots).await?;
        if Mutation::SnapshotDroppedFirst.is_on() {
            self.drop_tree(queue, &l1).await?;
        }
        self.settle(queue).await?;
        self.switch_snapshots(queue, table, &snapshots, new_table).await?;
        let freed = async {
            if !Mutation::SnapshotDroppedFirst.is_on() {
                self.drop_tree(queue, &l1).await?;
            }
            self.drop_structure(queue, gone.l1_table_offset, l1.len() as u64 * 8).await?;
            self.set_active_copied_flags(queue).await
        };
        let freed: Result<()> = freed.await;
        self.warn_of_leak(freed);
        Ok(())
    }

    /// Writes a snapshot table to a new place.
    async fn write_snapshot_table(
        &self,
        queue: &Rc<Queue>,
        header: &Header,
        snapshots: &mut [Snapshot],
    ) -> Result<HostOffset> {
        // Version 3 needs the disk's size, and a file may lack it: then it is what it is now, as QEMU takes it.
        snapshots.iter_mut().for_each(|snapshot| snapshot.complete(header.size));
        let bytes = Snapshot::encode_table(snapshots, &self.geometry).map_err(|e| {
            Error::new(ErrorKind::Invalid, format!("the snapshot table cannot be written: {e}")).at_path(&self.path)
        })?;
        self.write_structure(queue, Structure::SnapshotTable, &bytes).await
    }

    /// Names another snapshot table in the header, and frees the old one.
    async fn switch_snapshots(
        &self,
        queue: &Rc<Queue>,
        old: &SnapshotTable,
        snapshots: &[Snapshot],
        table: HostOffset,
    ) -> Result<()> {
        let old_place = self.header.lock().header.snapshots_offset;
        self.switch_header(queue, |header| {
            // Bounded when the table was encoded.
            header.snapshot_count = snapshots.len() as u32;
            header.snapshots_offset = table;
        })
        .await?;
        let freed = self.drop_structure(queue, old_place, old.len).await;
        self.warn_of_leak(freed);
        Ok(())
    }

    /// Makes everything durable that the next header names: what was written to new places, and the counts.
    pub(super) async fn settle(&self, queue: &Rc<Queue>) -> Result<()> {
        if Mutation::HeaderBeforeTables.is_on() {
            return Ok(());
        }
        self.commit(queue, Until::Mapping).await?;
        self.barrier(queue, Barrier::BeforeHeader).await
    }

    /// Changes the header, durably. When this fails only the file can tell whether the header has changed.
    pub(super) async fn switch_header(&self, queue: &Rc<Queue>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _commit = self.commit_lock.lock().await;
        self.update_header(queue, change).await?;
        self.barrier(queue, Barrier::Header).await
    }

    /// A structure that was written and never named is free again.
    pub(super) fn give_back_structure(&self, place: HostOffset, bytes: u64) {
        let bits = self.geometry.cluster_bits;
        let first = bits.index_of(place.get());
        self.meta.lock().dropped.push(first..first + bits.clusters_for(bytes));
    }
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod tests;
