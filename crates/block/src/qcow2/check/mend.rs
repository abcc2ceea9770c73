//! Structures that cannot share a cluster are taken apart, entries that can be put right without a guess are.
//!
//! An L2 table that shares its cluster moves: what the guest may read there as its data is never written again. Guest data gets a copy of
//! its cluster where a table lies that cannot move. Either way the guest reads what it read before. First a plan says which clusters
//! the copies take, so that they can be counted before anything names them.
//!
//! To move the guest's data from under an L2 table instead would not do: the table may have entries that themselves move, and
//! be written before the copy of the data is what the guest reads; where two tables name each other as data there is no order at all in
//! which a power cut would do no harm.

use std::collections::{BTreeMap, BTreeSet};

use cowhand_qcow2::{
    Autoclear, BitmapTableEntry, CompressedRange, CryptMethod, HostOffset, L1Entry, L2Entry, L2Kind, SubclusterBitmap,
    refcount,
};

use super::refs::Class;
use super::walk::{BEYOND, PART, Table, Walked};
use super::{Checker, Dirty, number, set_number};
use crate::error::Result;
use crate::io::{Barrier, Buffer};

/// Where copies go.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// One past the last cluster of the image as it is.
    pub(super) end: u64,
    /// Where the search for room goes on.
    pub(super) next: u64,
    /// The entries that get a copy of what they name, in the order of their tables.
    moves: Vec<Move>,
    /// New places of L2 tables.
    tables: BTreeMap<u64, u64>,
}

/// An L2 entry that gets a copy of what it names.
#[derive(Clone, Copy, Debug)]
struct Move {
    /// The table's cluster.
    table: u64,
    /// The entry's place in the table, in bytes.
    at: u32,
    /// The first cluster of the copy.
    place: u64,
}

impl Plan {
    /// The clusters that copies take: they lie in this range.
    pub(super) fn taken(&self) -> std::ops::Range<u64> {
        self.end..self.next.max(self.end)
    }

    /// Whether anything moves.
    pub(super) fn is_empty(&self) -> bool {
        self.moves.is_empty() && self.tables.is_empty()
    }

    /// The entries of a table that get copies.
    fn moves_in(&self, table: u64) -> &[Move] {
        let start = self.moves.partition_point(|m| m.table < table);
        let end = self.moves.partition_point(|m| m.table <= table);
        self.moves.get(start..end).unwrap_or_default()
    }

    /// The tables of which anything changes, each once.
    fn tables(&self) -> BTreeSet<u64> {
        self.moves.iter().map(|m| m.table).chain(self.tables.keys().copied()).collect()
    }
}

/// What becomes of an L2 entry.
enum Verdict {
    Keep,
    Write(L2Entry),
    /// Its cluster, or compressed data of so many bytes, needs another place.
    Move(u64),
}

impl Checker {
    /// The first of `count` clusters in a row that nothing is in, from `next` on; none where there is no room.
    pub(super) fn find_room(&self, w: &Walked, next: u64, count: u64) -> Option<u64> {
        let mut first = next;
        while let Some(used) = w.beyond.next_used(first).filter(|&used| used < first.saturating_add(count)) {
            first = used + 1;
        }
        let end = first.checked_add(count)?;
        (end <= self.growth_limit(w)).then_some(first)
    }

    /// One past the last cluster that the file may grow to.
    pub(super) fn growth_limit(&self, w: &Walked) -> u64 {
        if self.file.traits().block_device {
            return self.geometry.cluster_bits.index_of(self.file_len);
        }
        let far = self.geometry.cluster_bits.clusters_for(self.file_len).saturating_add(BEYOND);
        w.cut_off.map_or(far, |cut_off| far.min(cut_off))
    }

    /// Takes such clusters; the search goes on behind them.
    pub(super) fn take_room(&mut self, w: &Walked, next: &mut u64, count: u64) -> Option<u64> {
        let first = self.find_room(w, *next, count)?;
        *next = first + count;
        self.end = self.end.max(*next);
        Some(first)
    }

    /// Plans what moves where, and counts the references from there.
    pub(super) async fn plan(&mut self, w: &mut Walked, first_free: u64) -> Result<Plan> {
        let mut plan = Plan { end: self.end, next: first_free, ..Plan::default() };
        let max = refcount::max(self.geometry.refcount_order);
        if w.refs.highest() <= max && w.refs.overlaps().next().is_none() {
            return Ok(plan);
        }
        let (step, bits) = (self.geometry.l2_entry_size() as usize, self.geometry.cluster_bits);
        let mut from = 0;
        while let Some(table) = w.refs.next_l2(from).filter(|&table| table < plan.end) {
            from = table + 1;
            let times = w.refs.l2_count(table);
            if w.refs.overlap(table).is_some_and(|o| o.has(Class::Fixed) || o.has(Class::Data)) {
                // Without room it stays, and is not written to.
                let Some(place) = self.take_room(w, &mut plan.next, 1) else { continue };
                plan.tables.insert(table, place);
                w.refs.add(place, times, Class::L2);
            }
            let bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            for (entry, at) in bytes.chunks_exact(step).zip((0u32..).step_by(step)) {
                let (raw, bitmap) = (L2Entry::from_raw(number(entry, 0)), number(entry, 8));
                let Verdict::Move(len) = self.verdict(w, raw, bitmap, times) else { continue };
                // As many copies as the image has clusters double it: more is no accident.
                if plan.moves.len() as u64 >= plan.end {
                    continue;
                }
                let clusters = bits.clusters_for(len);
                let Some(place) = self.take_room(w, &mut plan.next, clusters) else { continue };
                (place..place + clusters).for_each(|cluster| w.refs.add(cluster, times, Class::Data));
                plan.moves.push(Move { table, at, place });
            }
        }
        Ok(plan)
    }

    /// Whether a cluster of guest data must be let go, and can be.
    fn is_crowded(&self, w: &Walked, cluster: u64, times: u64) -> bool {
        if self.header.crypt_method == CryptMethod::Luks {
            // Its place in the file is part of how it is encrypted: a copy elsewhere could not be read. (Sharp edge 42.)
            return false;
        }
        let max = refcount::max(self.geometry.refcount_order);
        // From under an L2 table nothing has to move: the table does.
        let shared = w.refs.overlap(cluster).is_some_and(|o| o.has(Class::Fixed));
        shared || (w.refs.count(cluster) > max && times <= max)
    }

    fn verdict(&self, w: &Walked, entry: L2Entry, bitmap: u64, times: u64) -> Verdict {
        let geometry = &self.geometry;
        if geometry.has_data_file {
            return Verdict::Keep;
        }
        let no_place = if geometry.extended_l2 { Ok(L2Entry::UNALLOCATED) } else { L2Entry::zero(None, false) };
        let let_go = || no_place.clone().map_or(Verdict::Keep, Verdict::Write);
        let has_data = |kind: &L2Kind| match kind {
            L2Kind::Zero { .. } => false,
            L2Kind::Data { .. } => !geometry.extended_l2 || SubclusterBitmap::from_raw(bitmap).allocated() != 0,
            _ => true,
        };
        match entry.decode(geometry) {
            Ok(L2Kind::Compressed(range)) => {
                let inside = self.is_inside(range.host.get(), range.len);
                if inside && self.touched(range.host, range.len).any(|cluster| self.is_crowded(w, cluster, times)) {
                    return Verdict::Move(range.len);
                }
                if entry.copied() { Verdict::Write(entry.with_copied(false)) } else { Verdict::Keep }
            }
            Ok(kind @ (L2Kind::Data { host, copied } | L2Kind::Zero { host: Some(host), copied })) => {
                let cluster = self.cluster_of(host);
                if !self.is_inside(host.get(), self.cluster_size()) {
                    return Verdict::Keep;
                }
                if self.is_crowded(w, cluster, times) {
                    return match has_data(&kind) {
                        true => Verdict::Move(self.cluster_size()),
                        false => let_go(),
                    };
                }
                match copied && !self.is_alone(w, cluster) {
                    true => Verdict::Write(entry.with_copied(false)),
                    false => Verdict::Keep,
                }
            }
            Err(problem) if self.is_needless(&problem, entry, bitmap) => let_go(),
            _ => Verdict::Keep,
        }
    }

    /// Whether the refcount of a cluster is, or will be, one: that is also the most that one bit can count.
    fn is_alone(&self, w: &Walked, cluster: u64) -> bool {
        self.counted_as(w, cluster) == 1 && (w.hides_nothing() || w.refs.is_stored_one(cluster))
    }

    /// Copies, and then changes the entries. All clusters that the copies take have been counted, durably.
    pub(super) async fn carry_out(&mut self, w: &Walked, plan: &Plan) -> Result<()> {
        if !plan.is_empty() {
            // Guest data may be taken from an L1 table's cluster. That is not written to before the copy is what the guest reads.
            self.copy_clusters(plan).await?;
            self.barrier(Barrier::BeforeMapping).await?;
            self.switch_to_copies(plan).await?;
            self.barrier(Barrier::BeforeMapping).await?;
        }
        let changed = self.change_l2s(w, plan).await?;
        let tables = w.l1s.clone();
        for table in tables {
            self.change_l1(w, plan, table).await?;
        }
        let bitmaps = self.change_bitmaps(w).await?;
        self.out.repaired_some(plan.moves.len() as u64, "clusters given a place of their own");
        self.out.repaired_some(plan.tables.len() as u64, "L2 tables given a place of their own");
        self.out.repaired_some(changed, "L2 entries put right");
        self.out.repaired_some(bitmaps, "parts of bitmaps that are all set now, as their bits are lost");
        Ok(())
    }

    /// Copies what entries are to get copies of. None of the tables that name it has been changed.
    async fn copy_clusters(&self, plan: &Plan) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        for moves in plan.moves.chunk_by(|a, b| a.table == b.table) {
            let [first, ..] = moves else { continue };
            let bytes = self.read("an L2 table", self.offset_of(first.table), self.cluster_size()).await?;
            for Move { at, place, .. } in moves {
                let entry = L2Entry::from_raw(number(&bytes, *at as usize));
                let Some(old) = self.data_of(entry) else { continue };
                let mut copy = Buffer::zeroed((bits.clusters_for(old.len) << bits.bits()) as usize);
                let data = self.read("a cluster", old.host.get(), old.len).await?;
                copy.iter_mut().zip(data.iter()).for_each(|(to, from)| *to = *from);
                self.write("a cluster", self.offset_of(*place), &copy).await?;
            }
        }
        Ok(())
    }

    /// Where the data lies that an entry names.
    fn data_of(&self, entry: L2Entry) -> Option<CompressedRange> {
        match entry.decode(&self.geometry) {
            Ok(L2Kind::Compressed(range)) => Some(range),
            Ok(L2Kind::Data { host, .. }) => Some(CompressedRange { host, len: self.cluster_size() }),
            _ => None,
        }
    }

    /// Lets the entries of what was copied name the copies, in their tables, or in the tables' copies.
    async fn switch_to_copies(&self, plan: &Plan) -> Result<()> {
        for table in plan.tables() {
            let mut bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            let mut dirty = Dirty::clean();
            for Move { at, place, .. } in plan.moves_in(table) {
                let at = *at as usize;
                let entry = L2Entry::from_raw(number(&bytes, at));
                let host = HostOffset::new(self.offset_of(*place));
                let new = match entry.decode(&self.geometry) {
                    Ok(L2Kind::Compressed(old)) => {
                        L2Entry::compressed(CompressedRange { host, len: old.len }, &self.geometry)
                    }
                    _ => L2Entry::data(host, false),
                };
                if let Ok(new) = new {
                    set_number(&mut bytes, at, new.raw());
                    dirty.touch(at);
                }
            }
            if let Some(&place) = plan.tables.get(&table) {
                self.write("an L2 table", self.offset_of(place), &bytes).await?;
            } else {
                self.write_l2(table, &bytes, &dirty).await?;
            }
        }
        Ok(())
    }

    /// Changes entries in place: flags that must go, clusters that were only kept.
    async fn change_l2s(&mut self, w: &Walked, plan: &Plan) -> Result<u64> {
        let step = self.geometry.l2_entry_size() as usize;
        let active = self.active_l2s(w).await?;
        let mut from = 0;
        let mut changed = 0;
        while let Some(table) = w.refs.next_l2(from).filter(|&table| table < plan.end) {
            from = table + 1;
            let times = w.refs.l2_count(table);
            let is_active = active.binary_search(&table).is_ok();
            let table = match plan.tables.get(&table) {
                Some(&place) => place,
                None if w.refs.overlap(table).is_none() => table,
                // What shares its place with something else must not be written.
                None => continue,
            };
            let mut bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            let mut dirty = Dirty::clean();
            for at in (0..bytes.len()).step_by(step) {
                let (raw, bitmap) = (L2Entry::from_raw(number(&bytes, at)), number(&bytes, at + 8));
                if let Verdict::Write(entry) = self.verdict(w, raw, bitmap, times) {
                    if is_active && entry == raw.with_copied(false) {
                        self.tell_flag(w, raw);
                    }
                    set_number(&mut bytes, at, entry.raw());
                    dirty.touch(at);
                    changed += 1;
                }
            }
            self.write_l2(table, &bytes, &dirty).await?;
        }
        Ok(changed)
    }

    /// The L2 tables of the active tree, ascending.
    async fn active_l2s(&self, w: &Walked) -> Result<Vec<u64>> {
        let mut tables = Vec::new();
        let Some(table) = self.active_l1(w) else { return Ok(tables) };
        let len = table.entries * 8;
        let mut at = 0;
        while at < len {
            let part = self.read("the L1 table", table.offset + at, PART.min(len - at)).await?;
            let named = part.chunks_exact(8).filter_map(|entry| self.l2_table(L1Entry::from_raw(number(entry, 0))));
            tables.extend(named.map(|l2| self.cluster_of(l2)));
            at += part.len() as u64;
        }
        tables.sort_unstable();
        tables.dedup();
        Ok(tables)
    }

    /// Tells that an entry's flag goes.
    fn tell_flag(&mut self, w: &Walked, entry: L2Entry) {
        let Ok(L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. }) = entry.decode(&self.geometry) else {
            return;
        };
        let count = self.counted_as(w, self.cluster_of(host));
        self.out.flags_fixed += 1;
        self.out.repairing(format!("OFLAG_COPIED data cluster: l2_entry={:x} refcount={count}", entry.raw()));
    }

    /// What the refcount of a cluster is, when all that refers to it is counted.
    fn counted_as(&self, w: &Walked, cluster: u64) -> u64 {
        w.refs.count(cluster).min(refcount::max(self.geometry.refcount_order))
    }

    async fn write_l2(&self, table: u64, bytes: &[u8], dirty: &Dirty) -> Result<()> {
        let Some(range) = dirty.range(bytes.len()) else { return Ok(()) };
        let offset = self.offset_of(table) + range.start as u64;
        self.write("an L2 table", offset, bytes.get(range).unwrap_or_default()).await
    }

    async fn change_l1(&mut self, w: &Walked, plan: &Plan, table: Table) -> Result<()> {
        let len = table.entries * 8;
        let is_active = self.active_l1(w).is_some_and(|active| active.offset == table.offset);
        let mut at = 0;
        while at < len {
            let mut part = self.read("an L1 table", table.offset + at, PART.min(len - at)).await?;
            let mut dirty = Dirty::clean();
            for entry_at in (0..part.len()).step_by(8) {
                let entry = L1Entry::from_raw(number(&part, entry_at));
                let new = self.new_l1_entry(w, plan, entry);
                if new != entry {
                    if let Some(l2) = self.l2_table(entry).filter(|_| is_active && new == entry.with_copied(false)) {
                        let index = (at + entry_at as u64) / 8;
                        let count = self.counted_as(w, self.cluster_of(l2));
                        let raw = entry.raw();
                        self.out.flags_fixed += 1;
                        self.out.repairing(format!(
                            "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} refcount={count}"
                        ));
                    }
                    set_number(&mut part, entry_at, new.raw());
                    dirty.touch(entry_at);
                }
            }
            if let Some(range) = dirty.range(part.len()) {
                let offset = table.offset + at + range.start as u64;
                self.write("an L1 table", offset, part.get(range).unwrap_or_default()).await?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn new_l1_entry(&self, w: &Walked, plan: &Plan, entry: L1Entry) -> L1Entry {
        let Some(l2) = self.l2_table(entry) else {
            let is_empty = entry.with_copied(false).raw() == 0;
            return if is_empty { L1Entry::UNALLOCATED } else { entry };
        };
        let cluster = self.cluster_of(l2);
        match plan.tables.get(&cluster).map(|&place| HostOffset::new(self.offset_of(place))) {
            Some(place) => L1Entry::new(place, false).unwrap_or(entry),
            None => entry.with_copied(entry.copied() && self.is_alone(w, cluster)),
        }
    }

    /// Bitmaps whose tables cannot be read are given up. First of all: where the tables should lie, past the end of the file, there may
    /// soon be something else.
    pub(super) async fn give_up_bitmaps(&mut self, w: &Walked) -> Result<()> {
        if w.bitmaps_lost {
            self.header.autoclear.remove(Autoclear::BITMAPS);
            self.write_header().await?;
            self.out.repaired("the bitmaps cannot be read and are given up");
        }
        Ok(())
    }

    /// Bits that are lost become ones: too much is copied by the next backup, not too little.
    async fn change_bitmaps(&mut self, w: &Walked) -> Result<u64> {
        if w.bitmaps_lost {
            return Ok(0);
        }
        for &(offset, len) in &w.bitmap_padding {
            self.write("the bitmap directory", offset, &vec![0; len]).await?;
        }
        let all_ones = BitmapTableEntry::AllOnes.encode().unwrap_or(1);
        let mut changed = 0;
        for table in &w.bitmap_tables {
            let len = table.entries * 8;
            let mut at = 0;
            while at < len {
                let mut part = self.read("a bitmap's table", table.offset + at, PART.min(len - at)).await?;
                let mut dirty = Dirty::clean();
                for entry_at in (0..part.len()).step_by(8) {
                    if !self.is_bitmap_entry_good(w, number(&part, entry_at)) {
                        set_number(&mut part, entry_at, all_ones);
                        dirty.touch(entry_at);
                        changed += 1;
                    }
                }
                if let Some(range) = dirty.range(part.len()) {
                    let offset = table.offset + at + range.start as u64;
                    self.write("a bitmap's table", offset, part.get(range).unwrap_or_default()).await?;
                }
                at += part.len() as u64;
            }
        }
        Ok(changed)
    }

    fn is_bitmap_entry_good(&self, w: &Walked, raw: u64) -> bool {
        match BitmapTableEntry::decode(raw, &self.geometry) {
            Ok(BitmapTableEntry::Cluster(host)) => {
                self.is_inside(host.get(), self.cluster_size()) && w.refs.overlap(self.cluster_of(host)).is_none()
            }
            Ok(_) => true,
            Err(_) => false,
        }
    }
}
