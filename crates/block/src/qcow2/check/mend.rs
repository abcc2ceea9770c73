//! Structures that cannot share a cluster are taken apart, entries that can be put right without a guess are.
//!
//! What is guest data or an L2 table gets a copy of the cluster as it is: the guest reads what it read before. First a plan says which
//! clusters the copies take, so that they can be counted before anything names them.

use std::collections::{BTreeMap, VecDeque};

use cowhand_qcow2::{
    Autoclear, BitmapTableEntry, CompressedRange, CryptMethod, FormatError, HostOffset, L1Entry, L2Entry, L2Kind,
    SubclusterBitmap, refcount,
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
    /// For each entry that must let go of its cluster, in the order of the walk, the first cluster of its copy; none if there is no
    /// room.
    places: VecDeque<Option<u64>>,
    /// New places of L2 tables.
    tables: BTreeMap<u64, u64>,
}

impl Plan {
    /// The clusters that copies take: they lie in this range.
    pub(super) fn taken(&self) -> std::ops::Range<u64> {
        self.end..self.next.max(self.end)
    }

    /// Whether anything moves.
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty() && self.tables.is_empty()
    }
}

/// What becomes of an L2 entry.
enum Verdict {
    Keep,
    Write(L2Entry),
    /// Its cluster, or compressed data, needs another place.
    Move {
        from: HostOffset,
        len: u64,
        compressed: bool,
    },
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
    fn take_room(&mut self, w: &Walked, next: &mut u64, count: u64) -> Option<u64> {
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
            if w.refs.overlap(table).is_some_and(|o| o.has(Class::Fixed))
                && let Some(place) = self.take_room(w, &mut plan.next, 1)
            {
                plan.tables.insert(table, place);
                w.refs.add(place, times, Class::L2);
            }
            let bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            for entry in bytes.chunks_exact(step) {
                let (raw, bitmap) = (L2Entry::from_raw(number(entry, 0)), number(entry, 8));
                let Verdict::Move { len, .. } = self.verdict(w, raw, bitmap, times) else { continue };
                // As many copies as the image has clusters double it: more is no accident.
                let clusters = bits.clusters_for(len);
                let room = (plan.places.len() as u64) < plan.end;
                let place = if room { self.take_room(w, &mut plan.next, clusters) } else { None };
                if let Some(place) = place {
                    (place..place + clusters).for_each(|cluster| w.refs.add(cluster, times, Class::Data));
                }
                plan.places.push_back(place);
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
        let shared = w.refs.overlap(cluster).is_some_and(|o| o.has(Class::L2) || o.has(Class::Fixed));
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
                    return Verdict::Move { from: range.host, len: range.len, compressed: true };
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
                        true => Verdict::Move { from: host, len: self.cluster_size(), compressed: false },
                        false => let_go(),
                    };
                }
                match copied && !self.is_alone(w, cluster) {
                    true => Verdict::Write(entry.with_copied(false)),
                    false => Verdict::Keep,
                }
            }
            // A cluster that was only kept for later writes is no loss.
            Err(FormatError::Misaligned { .. }) => {
                let is_zero = !geometry.extended_l2 && geometry.version >= 3 && entry.raw() & 1 != 0;
                let is_empty = geometry.extended_l2 && SubclusterBitmap::from_raw(bitmap).allocated() == 0;
                if is_zero || is_empty { let_go() } else { Verdict::Keep }
            }
            _ => Verdict::Keep,
        }
    }

    /// Whether the refcount of a cluster is, or will be, one.
    fn is_alone(&self, w: &Walked, cluster: u64) -> bool {
        w.refs.count(cluster) == 1 && (w.hides_nothing() || w.refs.is_stored_one(cluster))
    }

    /// Copies, and then changes the entries. All clusters that the copies take have been counted, durably.
    pub(super) async fn carry_out(&mut self, w: &Walked, plan: &Plan) -> Result<()> {
        if !plan.is_empty() {
            // Guest data may be taken from an L2 table's cluster. That is not written to before it has been copied, nor (but for
            // entries that themselves move) before the copy is what the guest reads.
            self.copy_clusters(w, plan).await?;
            self.barrier(Barrier::BeforeMapping).await?;
            self.switch_to_copies(w, plan).await?;
            self.barrier(Barrier::BeforeMapping).await?;
        }
        let changed = self.change_l2s(w, plan).await?;
        let tables = w.l1s.clone();
        for table in tables {
            self.change_l1(w, plan, table).await?;
        }
        let bitmaps = self.change_bitmaps(w).await?;
        self.out.repaired_some(plan.places.iter().flatten().count() as u64, "clusters given a place of their own");
        self.out.repaired_some(plan.tables.len() as u64, "L2 tables given a place of their own");
        self.out.repaired_some(changed, "L2 entries put right");
        self.out.repaired_some(bitmaps, "parts of bitmaps that are all set now, as their bits are lost");
        Ok(())
    }

    async fn copy_clusters(&mut self, w: &Walked, plan: &Plan) -> Result<()> {
        if plan.places.is_empty() {
            return Ok(());
        }
        let step = self.geometry.l2_entry_size() as usize;
        let mut places = plan.places.iter();
        let mut from = 0;
        while let Some(table) = w.refs.next_l2(from).filter(|&table| table < plan.end) {
            from = table + 1;
            let times = w.refs.l2_count(table);
            let bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            for entry in bytes.chunks_exact(step) {
                let (raw, bitmap) = (L2Entry::from_raw(number(entry, 0)), number(entry, 8));
                let Verdict::Move { from: old, len, .. } = self.verdict(w, raw, bitmap, times) else { continue };
                let Some(Some(place)) = places.next() else { continue };
                let whole = self.geometry.cluster_bits.clusters_for(len) << self.geometry.cluster_bits.bits();
                let mut copy = Buffer::zeroed(whole as usize);
                let data = self.read("a cluster", old.get(), len).await?;
                copy.iter_mut().zip(data.iter()).for_each(|(to, from)| *to = *from);
                self.write("a cluster", self.offset_of(*place), &copy).await?;
            }
        }
        Ok(())
    }

    /// Lets the entries of what was copied name the copies.
    async fn switch_to_copies(&mut self, w: &Walked, plan: &Plan) -> Result<()> {
        let step = self.geometry.l2_entry_size() as usize;
        let mut places = plan.places.iter();
        let mut from = 0;
        while let Some(table) = w.refs.next_l2(from).filter(|&table| table < plan.end) {
            from = table + 1;
            let times = w.refs.l2_count(table);
            let mut bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            let mut dirty = Dirty::clean();
            for at in (0..bytes.len()).step_by(step) {
                let (raw, bitmap) = (L2Entry::from_raw(number(&bytes, at)), number(&bytes, at + 8));
                let Verdict::Move { len, compressed, .. } = self.verdict(w, raw, bitmap, times) else { continue };
                let Some(Some(place)) = places.next() else { continue };
                let host = HostOffset::new(self.offset_of(*place));
                let entry = match compressed {
                    true => L2Entry::compressed(CompressedRange { host, len }, &self.geometry),
                    false => L2Entry::data(host, false),
                };
                if let Ok(entry) = entry {
                    set_number(&mut bytes, at, entry.raw());
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
        let mut from = 0;
        let mut changed = 0;
        while let Some(table) = w.refs.next_l2(from).filter(|&table| table < plan.end) {
            from = table + 1;
            let times = w.refs.l2_count(table);
            let table = plan.tables.get(&table).copied().unwrap_or(table);
            let mut bytes = self.read("an L2 table", self.offset_of(table), self.cluster_size()).await?;
            let mut dirty = Dirty::clean();
            for at in (0..bytes.len()).step_by(step) {
                let (raw, bitmap) = (L2Entry::from_raw(number(&bytes, at)), number(&bytes, at + 8));
                if let Verdict::Write(entry) = self.verdict(w, raw, bitmap, times) {
                    set_number(&mut bytes, at, entry.raw());
                    dirty.touch(at);
                    changed += 1;
                }
            }
            self.write_l2(table, &bytes, &dirty).await?;
        }
        Ok(changed)
    }

    async fn write_l2(&self, table: u64, bytes: &[u8], dirty: &Dirty) -> Result<()> {
        let Some(range) = dirty.range(bytes.len()) else { return Ok(()) };
        let offset = self.offset_of(table) + range.start as u64;
        self.write("an L2 table", offset, bytes.get(range).unwrap_or_default()).await
    }

    async fn change_l1(&mut self, w: &Walked, plan: &Plan, table: Table) -> Result<()> {
        let len = table.entries * 8;
        let mut at = 0;
        while at < len {
            let mut part = self.read("an L1 table", table.offset + at, PART.min(len - at)).await?;
            let mut dirty = Dirty::clean();
            for entry_at in (0..part.len()).step_by(8) {
                let entry = L1Entry::from_raw(number(&part, entry_at));
                let new = self.new_l1_entry(w, plan, entry);
                if new != entry {
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

    /// Bits that are lost become ones: too much is copied by the next backup, not too little. If not even the tables can be
    /// read, the bitmaps are given up.
    async fn change_bitmaps(&mut self, w: &Walked) -> Result<u64> {
        if w.bitmaps_lost {
            self.header.autoclear.remove(Autoclear::BITMAPS);
            self.write_header().await?;
            self.out.repaired("the bitmaps cannot be read and are given up");
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
