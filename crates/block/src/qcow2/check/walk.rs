//! The walk through all metadata, counting references.

use std::collections::BTreeMap;
use std::ops::Range;

use cowhand_qcow2::{FormatError, HostOffset, L1Entry, L2Entry, L2Kind, RefTableEntry, SubclusterBitmap, limits};

use super::refs::{Class, References};
use super::report::{FindingKind, Message};
use super::{Checker, number};
use crate::error::{Error, Result};

/// Bytes of a table that are read at a time. A multiple of every entry's size.
pub(super) const PART: u64 = 256 << 10;

/// So many clusters past the end of the file are remembered as referred to, so that a repair puts nothing there. It puts
/// nothing further away either.
pub(super) const BEYOND: u64 = 1 << 20;

/// A table of 8-byte entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Where it starts, in bytes.
    pub(super) offset: u64,
    pub(super) entries: u64,
}

/// The image's own refcounts.
#[derive(Clone, Debug, Default)]
pub(super) struct Stored {
    /// Where each refcount block is, 0 where there is none that can be used.
    pub(super) blocks: Vec<u64>,
    /// Whether every block that the table names can be used and written.
    pub(super) sound: bool,
}

impl Stored {
    pub(super) fn block(&self, index: u64) -> Option<u64> {
        let at = usize::try_from(index).ok()?;
        self.blocks.get(at).copied().filter(|&offset| offset != 0)
    }

    /// The first block from `index` on.
    pub(super) fn next(&self, index: u64) -> Option<u64> {
        let from = usize::try_from(index).ok()?;
        let at = self.blocks.get(from..)?.iter().position(|&offset| offset != 0)?;
        Some(index + at as u64)
    }
}

/// What a walk found.
#[derive(Debug, Default)]
pub(super) struct Walked {
    pub(super) refs: References,
    /// References to places past the end of the file.
    pub(super) beyond: References,
    /// The first cluster past the end of the file that should hold a table, if there is one. The file must not grow over it: zeros would
    /// be taken for the table.
    pub(super) cut_off: Option<u64>,
    /// Entries and tables of which it is not known what they refer to.
    pub(super) unreadable: u64,
    /// Those of them that are about bitmaps: a repair gives up what they refer to.
    in_bitmaps: u64,
    pub(super) stored: Stored,
    /// The L1 tables that were walked; the active one is the first.
    pub(super) l1s: Vec<Table>,
    pub(super) bitmap_tables: Vec<Table>,
    /// Bytes of the bitmap directory that must be zero and are not: where, and how many.
    pub(super) bitmap_padding: Vec<(u64, usize)>,
    /// The bitmaps cannot be read, and must be given up.
    pub(super) bitmaps_lost: bool,
    /// Where [`Class::Fixed`] structures lie: ranges of clusters by their start.
    claimed: BTreeMap<u64, u64>,
}

impl Walked {
    /// Whether everything that refers to guest data is understood.
    pub(super) const fn hides_nothing(&self) -> bool {
        self.unreadable == self.in_bitmaps
    }

    /// The file is to end at cluster `end`: what lies past its end now, but before that, counts.
    pub(super) fn adopt_beyond(&mut self, end: u64) {
        let mut from = 0;
        while let Some(cluster) = self.beyond.next_used(from).filter(|&cluster| cluster < end) {
            from = cluster + 1;
            self.refs.add(cluster, self.beyond.count(cluster), Class::Data);
        }
    }

    /// A table should be in this cluster, past the end of the file.
    pub(super) fn cuts_off(&mut self, cluster: u64) {
        self.cut_off = Some(self.cut_off.map_or(cluster, |first| first.min(cluster)));
    }
}

impl Checker {
    /// Walks everything. Without `with_refcounts` the refcount structures count as not there: as a rebuild leaves them.
    pub(super) async fn walk(&mut self, with_refcounts: bool) -> Result<Walked> {
        self.file_len =
            self.file.length().map_err(|e| Error::io("cannot tell the file's length", e).at_path(&self.path))?;
        self.end = self.geometry.cluster_bits.clusters_for(self.file_len);
        let mut walked = Walked::default();
        let w = &mut walked;
        self.claim(w, "the header", 0, 1, 0);
        let l1 = Table { offset: self.header.l1_table_offset.get(), entries: self.header.l1_size.into() };
        if self.claim(w, "the active L1 table", l1.offset, l1.entries * 8, 40) {
            w.l1s.push(l1);
        }
        if let Ok(Some(luks)) = self.header.luks_extension() {
            self.claim(w, "the encryption header", luks.offset.get(), luks.len, 0);
        }
        self.snapshots(w).await?;
        let before = w.unreadable;
        self.bitmaps(w).await?;
        w.in_bitmaps = w.unreadable - before;
        if with_refcounts {
            self.refcount_structures(w).await?;
        }
        for table in w.l1s.clone() {
            self.walk_l1(w, table).await?;
        }
        self.walk_l2s(w).await?;
        let overlaps: Vec<_> = w.refs.overlaps().collect();
        for (cluster, overlap) in overlaps {
            w.stored.sound &= !overlap.has(Class::Refcounts);
            let text = || format!("{} lie in one cluster", overlap.names());
            self.found(FindingKind::Overlap, self.offset_of(cluster), text);
        }
        // A compressed cluster may end in a cluster of which nothing is in the file.
        if w.refs.count(self.end) > 0 {
            self.end += 1;
        }
        Ok(walked)
    }

    /// A structure that has one place, which nothing else may share. False if it does not have it to itself: then it cannot be
    /// trusted, and is not read. `named_at` is where the file says where it lies.
    pub(super) fn claim(&mut self, w: &mut Walked, what: &str, offset: u64, len: u64, named_at: u64) -> bool {
        if len == 0 {
            return true;
        }
        if !self.is_inside(offset, len) {
            w.unreadable += 1;
            let text = || format!("{what} ({len} bytes at {offset:#x}) lies past the end of the file");
            self.found(FindingKind::Outside, named_at, text);
            return false;
        }
        let bits = self.geometry.cluster_bits;
        let clusters = bits.index_of(offset)..bits.index_of(offset + len - 1) + 1;
        let before = w.claimed.range(..clusters.end).next_back();
        if before.is_some_and(|(_, &end)| end > clusters.start) {
            w.unreadable += 1;
            let text = || format!("{what} ({len} bytes at {offset:#x}) lies where another table lies");
            self.found(FindingKind::Overlap, named_at, text);
            return false;
        }
        w.claimed.insert(clusters.start, clusters.end);
        w.refs.add_range(clusters, Class::Fixed);
        true
    }

    /// Counts `times` references to the clusters that a byte range touches. `named_at` is where the entry is that names it. Whether
    /// it lies in the file.
    pub(super) fn refer(&mut self, w: &mut Walked, class: Class, place: (u64, u64), times: u64, named_at: u64) -> bool {
        let (offset, len) = place;
        let bits = self.geometry.cluster_bits;
        let inside = self.is_inside(offset, len);
        let clusters = bits.index_of(offset)..=bits.index_of(offset.saturating_add(len.max(1) - 1));
        if inside {
            clusters.for_each(|cluster| w.refs.add(cluster, times, class));
        } else {
            let near = self.end..self.end.saturating_add(BEYOND);
            for cluster in clusters.filter(|cluster| near.contains(cluster)) {
                w.beyond.add(cluster, times, class);
                if class == Class::L2 {
                    w.cuts_off(cluster);
                }
            }
            self.found_as(FindingKind::Outside, named_at, || {
                format!(
                    "counting reference for region exceeding the end of the file by one cluster or more: offset \
                     {offset:#x} size {len:#x}"
                )
            });
        }
        inside
    }

    /// The refcount table and its blocks.
    async fn refcount_structures(&mut self, w: &mut Walked) -> Result<()> {
        if let Some(problem) = self.header.refcount_table_problem(self.file_len) {
            self.found(FindingKind::RefcountStructure, 48, || problem.to_string());
            return Ok(());
        }
        w.stored.sound = true;
        let start = self.header.refcount_table_offset.get();
        let len = u64::from(self.header.refcount_table_clusters) << self.geometry.cluster_bits.bits();
        self.refer(w, Class::Refcounts, (start, len), 1, 48);
        w.stored.blocks.reserve_exact((len / 8) as usize);
        let mut at = 0;
        while at < len {
            let part = self.read("the refcount table", start + at, PART.min(len - at)).await?;
            for (entry, named_at) in entries(&part, start + at) {
                let block = self.refcount_block(w, entry, named_at);
                w.stored.blocks.push(block.unwrap_or(0));
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Where the refcount block of this entry is, if there is one that can be used. A table with a wrong entry is not to be written to.
    fn refcount_block(&mut self, w: &mut Walked, raw: u64, named_at: u64) -> Option<u64> {
        let entry = RefTableEntry::from_raw(raw);
        let index = w.stored.blocks.len();
        if entry.without_reserved().raw() != raw {
            w.stored.sound = false;
            let text = || format!("refcount table entry {index} has reserved bits set");
            self.found_as(FindingKind::RefcountStructure, named_at, text);
        }
        let block = entry.without_reserved().offset(&self.geometry).or_else(|_| {
            w.stored.sound = false;
            let text = || format!("refcount block {index} is not cluster aligned; refcount table entry corrupted");
            self.found_as(FindingKind::RefcountStructure, named_at, text);
            Ok::<_, FormatError>(None)
        });
        let block = block.ok().flatten()?;
        if !self.is_inside(block.get(), self.cluster_size()) {
            w.stored.sound = false;
            let text = || format!("refcount block {index} is outside image");
            self.found_as(FindingKind::RefcountStructure, named_at, text);
            return None;
        }
        self.refer(w, Class::Refcounts, (block.get(), self.cluster_size()), 1, named_at);
        // A block that two entries name counts for the first.
        if w.refs.visit(self.cluster_of(block)) {
            return Some(block.get());
        }
        w.stored.sound = false;
        None
    }

    async fn walk_l1(&mut self, w: &mut Walked, table: Table) -> Result<()> {
        let (start, len) = (table.offset, table.entries * 8);
        let mut at = 0;
        while at < len {
            let part = self.read("an L1 table", start + at, PART.min(len - at)).await?;
            for (raw, named_at) in entries(&part, start + at) {
                self.l1_entry(w, L1Entry::from_raw(raw), named_at);
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn l1_entry(&mut self, w: &mut Walked, entry: L1Entry, named_at: u64) {
        let offset = entry.offset(&self.geometry).or_else(|problem| {
            let (raw, offset) = (entry.raw(), entry.offset_bits());
            self.entry_problem(&problem, named_at, || match problem {
                FormatError::ReservedBits { .. } => format!("found L1 entry with reserved bits set: {raw:x}"),
                _ => format!("l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"),
            });
            entry.without_reserved().offset(&self.geometry)
        });
        match offset {
            Ok(None) if entry.copied() => {
                let text = || "OFLAG_COPIED is set in an L1 entry that names no L2 table".to_string();
                self.found(FindingKind::Copied, named_at, text);
            }
            Ok(None) => {}
            Ok(Some(table)) => {
                // What a table named that was cut off nobody knows.
                let inside = self.refer(w, Class::L2, (table.get(), self.cluster_size()), 1, named_at);
                w.unreadable += u64::from(!inside);
            }
            Err(_) => {
                // Which table was meant is not known, but it lies there or near.
                w.unreadable += 1;
                self.refer(w, Class::Data, (entry.offset_bits(), self.cluster_size()), 1, named_at);
            }
        }
    }

    /// An entry that breaks the rules: in QEMU's words where QEMU knows the rule.
    fn entry_problem(&mut self, problem: &FormatError, named_at: u64, words: impl FnOnce() -> String) {
        match problem {
            FormatError::ReservedBits { .. } | FormatError::Misaligned { .. } => {
                self.found_as(FindingKind::Entry, named_at, words);
            }
            _ => self.found(FindingKind::Entry, named_at, || problem.to_string()),
        }
    }

    /// Each L2 table that some L1 table names, once, in the order of the file.
    async fn walk_l2s(&mut self, w: &mut Walked) -> Result<()> {
        let (end, size) = (self.end, self.cluster_size());
        let (mut from, mut seen) = (0, 0u64);
        while let Some(table) = w.refs.next_l2(from).filter(|&table| table < end) {
            if seen % 64 == 0 {
                (self.out.sink)(Message::Progress { done: table, total: end });
            }
            (from, seen) = (table + 1, seen + 1);
            let offset = self.offset_of(table);
            let bytes = self.read("an L2 table", offset, size).await?;
            let times = w.refs.l2_count(table);
            let step = self.geometry.l2_entry_size() as usize;
            let mut at = 0;
            while let Some(entry) = bytes.get(at..at + step) {
                let (raw, bitmap) = (number(entry, 0), number(entry, 8));
                let run = if times == 1 { self.data_run(&bytes, at) } else { None };
                match run {
                    Some(clusters) => {
                        at += (clusters.end - clusters.start) as usize * step;
                        w.refs.add_data(clusters);
                        continue;
                    }
                    None if raw != 0 || bitmap != 0 => {
                        self.l2_entry(w, L2Entry::from_raw(raw), bitmap, times, offset + at as u64);
                    }
                    None => {}
                }
                at += step;
            }
        }
        Ok(())
    }

    /// The clusters in the file that the entry at `at` and those behind it name, if there are several, one after the other, and
    /// nothing is wrong with any of them: most of an image is such runs.
    pub(super) fn data_run(&self, table: &[u8], at: usize) -> Option<Range<u64>> {
        if self.geometry.extended_l2 || self.geometry.has_data_file {
            return None;
        }
        let size = self.cluster_size();
        let (entries, _) = table.get(at..)?.as_chunks::<8>();
        let first = u64::from_be_bytes(*entries.first()?);
        let Ok(L2Kind::Data { host, .. }) = L2Entry::from_raw(first).decode(&self.geometry) else { return None };
        // So many are inside, whose offsets do not run over into other bits.
        let most = self.file_len.min(limits::HOST_OFFSET_END).checked_sub(host.get())? / size;
        let behind = entries.iter().zip(0..most).take_while(|(entry, index)| {
            let expected = first.wrapping_add(index.wrapping_mul(size));
            expected == u64::from_be_bytes(**entry)
        });
        let len = behind.count() as u64;
        let start = self.cluster_of(host);
        (len > 1).then(|| start..start + len)
    }

    fn l2_entry(&mut self, w: &mut Walked, entry: L2Entry, bitmap: u64, times: u64, named_at: u64) {
        let kind = entry.decode(&self.geometry).or_else(|problem| {
            let (raw, offset) = (entry.raw(), entry.offset_bits());
            let is_empty = match self.geometry.extended_l2 {
                true => SubclusterBitmap::from_raw(bitmap).allocated() == 0,
                false => raw & 1 != 0,
            };
            let what = if is_empty { "Preallocated" } else { "Data" };
            let text = || match problem {
                FormatError::ReservedBits { .. } => format!("found l2 entry with reserved bits set: {raw:x}"),
                _ => format!("offset={offset:x}: {what} cluster is not properly aligned; L2 entry corrupted."),
            };
            match self.is_needless(&problem, entry, bitmap) {
                true => self.found_mendable(FindingKind::Entry, named_at, text),
                false => self.entry_problem(&problem, named_at, text),
            }
            entry.without_reserved(&self.geometry).decode(&self.geometry)
        });
        let kind = match kind {
            Ok(kind) => kind,
            Err(problem) if self.is_mending() && self.is_needless(&problem, entry, bitmap) => return,
            Err(FormatError::Misaligned { .. }) if !self.geometry.has_data_file => {
                self.refer(w, Class::Data, (entry.offset_bits(), self.cluster_size()), times, named_at);
                return;
            }
            Err(_) => {
                w.unreadable += u64::from(!self.geometry.has_data_file);
                return;
            }
        };
        if self.geometry.extended_l2 {
            self.subclusters(&kind, SubclusterBitmap::from_raw(bitmap), named_at);
        }
        match kind {
            L2Kind::Compressed(range) => {
                if entry.copied() {
                    let offset = entry.offset_bits();
                    let text = || format!("coffset={offset:#x}: copied flag must never be set for compressed clusters");
                    self.found_mendable(FindingKind::Copied, named_at, text);
                }
                self.refer_data(w, (range.host.get(), range.len), times, named_at);
            }
            L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. } if !self.geometry.has_data_file => {
                self.refer_data(w, (host.get(), self.cluster_size()), times, named_at);
            }
            _ => {}
        }
    }

    /// Whether an entry that breaks the rules names a place only for later writes: there it can be let go, and no data is lost.
    pub(super) fn is_needless(&self, problem: &FormatError, entry: L2Entry, bitmap: u64) -> bool {
        let geometry = &self.geometry;
        let is_zero = !geometry.extended_l2 && geometry.version >= 3 && entry.raw() & 1 != 0;
        let is_empty = geometry.extended_l2 && SubclusterBitmap::from_raw(bitmap).allocated() == 0;
        !geometry.has_data_file && matches!(problem, FormatError::Misaligned { .. }) && (is_zero || is_empty)
    }

    fn refer_data(&mut self, w: &mut Walked, place: (u64, u64), times: u64, named_at: u64) {
        // Where a place past the end is a mistake, the cluster that was meant looks like a leak.
        let inside = self.refer(w, Class::Data, place, times, named_at);
        w.unreadable += u64::from(!inside);
    }

    fn subclusters(&mut self, kind: &L2Kind, bitmap: SubclusterBitmap, named_at: u64) {
        if let Err(problem) = bitmap.validate(kind) {
            self.found(FindingKind::Entry, named_at, || problem.to_string());
        } else if matches!(kind, L2Kind::Compressed(_)) && bitmap.raw() != 0 {
            let text = || format!("a compressed cluster's entry has a subcluster bitmap ({:#x})", bitmap.raw());
            self.found(FindingKind::Entry, named_at, text);
        }
    }

    /// The clusters that a place touches.
    pub(super) fn touched(&self, host: HostOffset, len: u64) -> std::ops::RangeInclusive<u64> {
        let bits = self.geometry.cluster_bits;
        bits.index_of(host.get())..=bits.index_of(host.get().saturating_add(len.max(1) - 1))
    }
}

/// The 8-byte entries of a part of a table, each with its place in the file.
pub(super) fn entries(part: &[u8], offset: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    part.chunks_exact(8).enumerate().map(move |(index, entry)| (number(entry, 0), offset + index as u64 * 8))
}
