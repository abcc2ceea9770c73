//! Clusters that are zero by a flag become what version 2 knows: nothing, where nothing would show through; else data that is zeros.
//!
//! New clusters are written, counted and durable before the L2 entries change, in place, of the disk's tables and of its snapshots'; what
//! the entries named before is freed when they are durable. Whatever a power cut leaves of it, each entry reads as zeros.
//!
//! Alone with the image, on the file, which is then read again; see [`super::snapshot`].

use std::collections::BTreeSet;
use std::rc::Rc;

use cowhand_qcow2::{HostOffset, L2Entry, L2Kind};

use super::Image;
use super::data::Spot;
use super::layout::Structure;
use crate::error::Result;
use crate::io::{Barrier, zero_segs};
use crate::queue::Queue;

/// How many L2 tables wait to be written together.
const TABLES_AT_ONCE: usize = 32;

/// An L2 table that is to change.
struct Expanded {
    place: HostOffset,
    old: Vec<u8>,
    new: Vec<u8>,
    /// What its entries name no more, and how many times the table is named itself.
    dropped: Vec<HostOffset>,
    mentions: u64,
}

impl Image {
    /// Does so with all of them. `progress` is told how many L2 tables are done, and of how many.
    pub(crate) async fn expand_zeroes(&self, queue: &Rc<Queue>, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        self.check_writable()?;
        let active = self.active_l2_tables(queue).await?;
        let tables = self.all_l2_tables(queue).await?;
        let all = tables.len() as u64;
        let mut waiting = Vec::new();
        for (done, place) in (0..).zip(tables) {
            progress(done, all);
            let expanded = self.expand_table(queue, place, active.contains(&place)).await?;
            if expanded.new != expanded.old {
                waiting.push(expanded);
            }
            if waiting.len() >= TABLES_AT_ONCE {
                self.write_expanded(queue, std::mem::take(&mut waiting)).await?;
            }
        }
        self.write_expanded(queue, waiting).await
    }

    /// The places of the L2 tables of the disk and of its snapshots, each once.
    pub(super) async fn all_l2_tables(&self, queue: &Rc<Queue>) -> Result<BTreeSet<HostOffset>> {
        let mut tables = self.active_l2_tables(queue).await?;
        for snapshot in self.snapshots(queue).await?.entries {
            tables.extend(self.l2_tables_of(queue, snapshot.l1_table_offset, snapshot.l1_size).await?);
        }
        Ok(tables)
    }

    async fn active_l2_tables(&self, queue: &Rc<Queue>) -> Result<BTreeSet<HostOffset>> {
        let (place, entries) = {
            let state = self.header.lock();
            (state.header.l1_table_offset, state.header.l1_size)
        };
        self.l2_tables_of(queue, place, entries).await
    }

    async fn l2_tables_of(&self, queue: &Rc<Queue>, place: HostOffset, entries: u32) -> Result<BTreeSet<HostOffset>> {
        let l1 = self.read_l1(queue, place, entries).await?;
        let places = l1.iter().map(|entry| entry.offset(&self.geometry).map_err(|e| self.format_error(&e)));
        places.filter_map(Result::transpose).collect()
    }

    async fn expand_table(&self, queue: &Rc<Queue>, place: HostOffset, active: bool) -> Result<Expanded> {
        let bits = self.geometry.cluster_bits;
        let old = self.read_l2(queue, place).await?.to_vec();
        let mentions = self.count(queue, bits.index_of(place.get())).await?;
        let mut new = old.clone();
        let mut dropped = Vec::new();
        let entries: Vec<_> = self.l2_entries(&old).collect();
        for (slot, entry) in new.chunks_exact_mut(self.geometry.l2_entry_size() as usize).zip(entries) {
            let kind = entry.decode(&self.geometry).map_err(|e| self.format_error(&e))?;
            let L2Kind::Zero { host, .. } = kind else { continue };
            dropped.extend(host);
            let raw = if self.backing.is_some() {
                let place = self.zero_cluster(queue, mentions).await?;
                let entry = L2Entry::data(place, active && mentions == 1).map_err(|e| self.format_error(&e))?;
                entry.raw()
            } else {
                0
            };
            slot[..8].copy_from_slice(&raw.to_be_bytes());
        }
        Ok(Expanded { place, old, new, dropped, mentions })
    }

    /// A new cluster of zeros, with so many references.
    async fn zero_cluster(&self, queue: &Rc<Queue>, references: u64) -> Result<HostOffset> {
        let extent = self.allocate(queue, 1).await?;
        // Even where the file's end makes it zero already: a check takes an entry that points past the end for damage.
        let spot = Spot { guest: 0, host: extent.host.get() };
        self.write_data(queue, spot, zero_segs(self.cluster_size()), Vec::new()).await?;
        for _ in 1..references {
            self.add_reference(queue, self.geometry.cluster_bits.index_of(extent.host.get())).await?;
        }
        Ok(extent.host)
    }

    async fn write_expanded(&self, queue: &Rc<Queue>, tables: Vec<Expanded>) -> Result<()> {
        if tables.is_empty() {
            return Ok(());
        }
        self.settle(queue).await?;
        for table in &tables {
            let sectors = table.old.chunks(512).zip(table.new.chunks(512));
            for (at, (old, new)) in (table.place.get()..).step_by(512).zip(sectors) {
                if old != new {
                    self.write_as(queue, Structure::L2Table, HostOffset::new(at), new).await?;
                }
            }
        }
        self.barrier(queue, Barrier::Mapping).await?;
        for table in &tables {
            for &host in &table.dropped {
                for _ in 0..table.mentions {
                    self.drop_structure(queue, host, 1).await?;
                }
            }
        }
        Ok(())
    }
}
