//! The snapshot table: read as far as that goes, and written anew where its entries lack what their version asks for.
//!
//! A table beyond the format's bounds (too many entries, too long, too much extra data) keeps everybody from opening the image. Only who
//! asks for all repairs has it cut, as in QEMU, and is told what goes: entries past the bounds with the snapshots that they stand for,
//! and extra data of which nobody knows the meaning. Nothing else of the table is guessed at.
//!
//! The cut is one write of the header, before the walk: so the walk finds what only those snapshots referred to as leaks. The new
//! table comes last, when the refcounts can be trusted: counted, written behind the image, durable, and then named by the header.

use cowhand_qcow2::{HostOffset, Snapshot, limits};

use super::compare::Pass;
use super::refs::Class;
use super::report::{FindingKind, Message};
use super::tables::Window;
use super::walk::{Table, Walked};
use super::{Checker, Stage};
use crate::error::Result;
use crate::io::{Barrier, Buffer};

/// More than an entry's ID and name take.
const STRINGS_MAX: u64 = 128 << 10;

/// An entry of the table.
struct Entry {
    snapshot: Snapshot,
    /// Where it is in the file.
    at: u64,
    /// Bytes of extra data, if they are more than there may be: what is kept of them is the first part.
    excess: Option<u32>,
}

/// The table, as far as it can be read.
#[derive(Default)]
struct Scan {
    entries: Vec<Entry>,
    /// One past the last of these entries.
    end: u64,
    /// Entries behind the most that there may be.
    too_many: u32,
    /// Entries behind the greatest length.
    too_long: u32,
    /// Where the entry is that cannot be read, and why.
    problem: Option<(u64, String)>,
}

impl Checker {
    /// The entry at `at`, and where the next one begins.
    async fn snapshot_at(
        &self,
        window: &mut Option<Window>,
        at: u64,
        end: u64,
    ) -> Result<std::result::Result<(Entry, u64), String>> {
        let what = "the snapshot table";
        let bytes = self.window(window, what, at, end).await?;
        let max = limits::SNAPSHOT_EXTRA_DATA_MAX;
        let Some(len) = Snapshot::extra_len(bytes).filter(|&len| len > max) else {
            let parsed = Snapshot::parse(bytes, &self.geometry).map_err(|problem| problem.to_string());
            return Ok(parsed.map(|(snapshot, len)| (Entry { snapshot, at, excess: None }, at + len as u64)));
        };
        // As if the extra data ended where it may.
        let kept = (limits::SNAPSHOT_FIXED_LEN + u64::from(max)) as usize;
        // What is past the end of the file is zeros.
        let mut entry: Vec<u8> = bytes.iter().copied().take(kept).collect();
        entry.resize(kept, 0);
        Snapshot::set_extra_len(&mut entry, max);
        let strings_at = at + limits::SNAPSHOT_FIXED_LEN + u64::from(len);
        entry.extend_from_slice(self.window(window, what, strings_at, end.max(strings_at)).await?);
        if end < strings_at + STRINGS_MAX {
            entry.resize(kept + STRINGS_MAX as usize, 0);
        }
        let parsed = Snapshot::parse(&entry, &self.geometry).map_err(|problem| problem.to_string());
        Ok(parsed.map(|(snapshot, _)| {
            let strings = (snapshot.id.len() + snapshot.name.len()) as u64;
            let next = at + (strings_at - at + strings).next_multiple_of(8);
            (Entry { snapshot, at, excess: Some(len) }, next)
        }))
    }

    async fn scan_snapshots(&self) -> Result<Scan> {
        let start = self.header.snapshots_offset.get();
        let count = self.header.snapshot_count;
        let mut scan = Scan { end: start, too_many: count.saturating_sub(limits::SNAPSHOTS_MAX), ..Scan::default() };
        let (mut window, mut table_len) = (None, 0);
        for index in 0..count.min(limits::SNAPSHOTS_MAX) {
            match self.snapshot_at(&mut window, scan.end, self.file_len.max(scan.end)).await? {
                Ok((entry, next)) => {
                    let extra = u64::from(entry.excess.map_or(0, |len| len - limits::SNAPSHOT_EXTRA_DATA_MAX));
                    table_len += next - scan.end - extra;
                    if table_len > limits::SNAPSHOT_TABLE_BYTES_MAX {
                        scan.too_long = count.min(limits::SNAPSHOTS_MAX) - index;
                        break;
                    }
                    scan.end = next;
                    scan.entries.push(entry);
                }
                Err(problem) => {
                    scan.problem = Some((scan.end, format!("snapshot {index} cannot be read: {problem}")));
                    break;
                }
            }
        }
        Ok(scan)
    }

    /// What keeps the snapshot table from being read by anybody, in QEMU's words.
    pub(super) async fn snapshots_beyond(&self) -> Result<Option<String>> {
        if self.header.snapshot_count == 0 {
            return Ok(None);
        }
        let scan = self.scan_snapshots().await?;
        let discard =
            |count| format!("You can force-remove all {count} overhanging snapshots with qemu-img check -r all");
        if scan.too_many > 0 {
            return Ok(Some(format!("snapshot table too large\n{}", discard(scan.too_many))));
        }
        let failed = "failed to read the snapshot table";
        if let Some(index) = scan.entries.iter().position(|entry| entry.excess.is_some()) {
            return Ok(Some(format!(
                "{failed}: Too much extra metadata in snapshot table entry {index}\nYou can force-remove this extra metadata \
                 with qemu-img check -r all"
            )));
        }
        let too_long = format!("{failed}: Snapshot table is too big\n{}", discard(scan.too_long));
        Ok((scan.too_long > 0).then_some(too_long))
    }

    /// Cuts the table off at the format's bounds: how many snapshots are gone. Tells of extra data that will go.
    pub(super) async fn cut_snapshots(&mut self) -> Result<u64> {
        if self.header.snapshot_count == 0 {
            return Ok(0);
        }
        let scan = self.scan_snapshots().await?;
        if scan.problem.is_some() {
            return Ok(0);
        }
        if scan.too_many > 0 {
            let text = format!("{} overhanging snapshots", scan.too_many);
            (self.out.sink)(Message::Discarding(text));
        }
        let max = limits::SNAPSHOT_EXTRA_DATA_MAX;
        for (entry, index) in scan.entries.iter().zip(0..) {
            let Some(len) = entry.excess else { continue };
            let text = format!("too much extra metadata in snapshot table entry {index} ({len} > {max})");
            (self.out.sink)(Message::Discarding(text));
        }
        if scan.too_long > 0 {
            let text = format!("{} overhanging snapshots (snapshot table is too big)", scan.too_long);
            (self.out.sink)(Message::Discarding(text));
        }
        let gone = u64::from(scan.too_many) + u64::from(scan.too_long);
        if gone > 0 {
            // Not more than there were.
            self.header.snapshot_count = scan.entries.len() as u32;
            self.write_header().await?;
        }
        Ok(gone)
    }

    /// The snapshot table, and each snapshot's L1 table.
    pub(super) async fn snapshots(&mut self, w: &mut Walked) -> Result<()> {
        if self.header.snapshot_count == 0 {
            return Ok(());
        }
        let start = self.header.snapshots_offset.get();
        let scan = self.scan_snapshots().await?;
        let mut tables = Vec::new();
        for (entry, index) in scan.entries.iter().zip(0..) {
            let table = Table { offset: entry.snapshot.l1_table_offset.get(), entries: entry.snapshot.l1_size.into() };
            if !entry.snapshot.is_complete(&self.geometry) {
                let text = || format!("snapshot table entry {index} is incomplete");
                self.found_mendable(FindingKind::Snapshot, entry.at, text);
            }
            if entry.excess.is_some() && self.is_mending() {
                // That has been told.
                self.out.corruptions += 1;
            } else if entry.excess.is_some() {
                let text = || format!("snapshot {index} has too much extra data");
                self.found(FindingKind::Snapshot, entry.at, text);
            }
            tables.push((table, entry.at));
        }
        if let Some((at, text)) = scan.problem {
            // Where the next one would start is not known either.
            w.unreadable += 1;
            self.found(FindingKind::Snapshot, at, || text);
        } else if scan.too_many + scan.too_long > 0 {
            w.unreadable += 1;
            self.found(FindingKind::Snapshot, 60, || "the snapshot table is too large".to_string());
        }
        self.claim(w, "the snapshot table", start, scan.end - start, 64);
        for (table, named_at) in tables {
            if !self.is_inside(table.offset, table.entries * 8) {
                w.cuts_off(self.end.max(self.geometry.cluster_bits.index_of(table.offset)));
            }
            if self.claim(w, "a snapshot's L1 table", table.offset, table.entries * 8, named_at) {
                w.l1s.push(table);
            }
        }
        Ok(())
    }

    /// Writes the table anew if entries lack something, or have too much. Refcounts have been put right. `may_free` is whether the
    /// clusters of the old one can be given back.
    pub(super) async fn complete_snapshots(&mut self, may_free: bool) -> Result<()> {
        if !self.mends || self.header.snapshot_count == 0 {
            return Ok(());
        }
        let scan = self.scan_snapshots().await?;
        let is_good = |entry: &Entry| entry.excess.is_none() && entry.snapshot.is_complete(&self.geometry);
        if scan.problem.is_some() || scan.entries.iter().all(is_good) {
            return Ok(());
        }
        let mut snapshots: Vec<_> = scan.entries.into_iter().map(|entry| entry.snapshot).collect();
        snapshots.iter_mut().for_each(|snapshot| snapshot.complete(self.header.size));
        let Ok(bytes) = Snapshot::encode_table(&snapshots, &self.geometry) else {
            self.out.not_repaired("the snapshot table cannot be completed: it would be too large");
            return Ok(());
        };
        let mut w = self.walk(true).await?;
        let clusters = self.geometry.cluster_bits.clusters_for(bytes.len() as u64);
        let (per_block, mut next) = (self.geometry.refcount_block_entries(), self.end);
        let place = self.take_room(&w, &mut next, clusters).filter(|_| w.stored.sound);
        let Some(place) = place else {
            self.out.not_repaired("there is no room for another snapshot table behind the image");
            return Ok(());
        };
        (place..place + clusters).for_each(|cluster| w.refs.add(cluster, 1, Class::Fixed));
        let mut table = Buffer::zeroed((clusters << self.geometry.cluster_bits.bits()) as usize);
        table.iter_mut().zip(&bytes).for_each(|(to, from)| *to = *from);
        self.write("the snapshot table", self.offset_of(place), &table).await?;
        let mut blocks = place / per_block..=(place + clusters - 1) / per_block;
        if blocks.all(|index| w.stored.block(index).is_some()) {
            self.refcounts(&mut w, Pass::Take).await?;
        } else if !self.rebuild_for(&w, place..place + clusters).await? {
            self.out.not_repaired("there is no room for another snapshot table behind the image");
            return Ok(());
        }
        self.barrier(Barrier::BeforeHeader).await?;
        self.header.snapshots_offset = HostOffset::new(self.offset_of(place));
        self.write_header().await?;
        if may_free {
            let mut w = self.walk(true).await?;
            if w.hides_nothing() && w.stored.sound {
                self.refcounts(&mut w, Pass::Give).await?;
                self.barrier(Barrier::BeforeMapping).await?;
            }
        }
        self.out.start(Stage::Silent);
        Ok(())
    }

    /// Refcounts anew, with these clusters among what is in use.
    async fn rebuild_for(&mut self, w: &Walked, taken: std::ops::Range<u64>) -> Result<bool> {
        let old = w.stored.clone();
        let mut anew = self.walk(false).await?;
        taken.clone().for_each(|cluster| anew.refs.add(cluster, 1, Class::Fixed));
        self.end = self.end.max(taken.end);
        self.rebuild(&mut anew, &old, taken.end).await
    }
}
