//! The walk through the active tables in the guest's order: the COPIED flags, and how the disk's clusters lie.

use cowhand_qcow2::{FormatError, GuestOffset, HostOffset, L1Entry, L2Entry, L2Kind};

use super::report::FindingKind;
use super::walk::{PART, Table, Walked};
use super::{Checker, Dirty, number, set_number};
use crate::error::Result;

/// What is done about flags that are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fix {
    /// They are told.
    Report,
    /// Flags that are missing are set.
    Set,
    /// They are put right.
    All,
}

/// What the active mapping looks like.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stats {
    pub(super) allocated: u64,
    pub(super) compressed: u64,
    pub(super) fragmented: u64,
    /// Flags that were changed.
    pub(super) changed: u64,
}

impl Checker {
    pub(super) async fn copied(&mut self, w: &mut Walked, fix: Fix) -> Result<Stats> {
        let mut stats = Stats::default();
        let Some(table) = self.active_l1(w) else { return Ok(stats) };
        let l1_offset = table.offset;
        let len = table.entries * 8;
        let mut at = 0;
        while at < len {
            let mut part = self.read("the L1 table", l1_offset + at, PART.min(len - at)).await?;
            let mut dirty = Dirty::clean();
            for entry_at in (0..part.len()).step_by(8) {
                let entry = L1Entry::from_raw(number(&part, entry_at));
                let Some(l2) = self.l2_table(entry) else { continue };
                let index = (at + entry_at as u64) / 8;
                let wanted = w.refs.is_stored_one(self.cluster_of(l2));
                if wanted != entry.copied() {
                    let refcount = self.stored_count(&w.stored, self.cluster_of(l2)).await?;
                    let what = format!("L2 cluster: l1_index={index} l1_entry={:x} refcount={refcount}", entry.raw());
                    if self.may_flag(fix, wanted, l1_offset + at + entry_at as u64, &what) {
                        set_number(&mut part, entry_at, entry.with_copied(wanted).raw());
                        dirty.touch(entry_at);
                        stats.changed += 1;
                    }
                }
                // Named twice it is looked at once.
                if w.refs.visit(self.cluster_of(l2)) {
                    self.copied_l2(w, fix, l2, index, &mut stats).await?;
                }
            }
            if let Some(range) = dirty.range(part.len()) {
                let offset = l1_offset + at + range.start as u64;
                self.write("the L1 table", offset, part.get(range).unwrap_or_default()).await?;
            }
            at += part.len() as u64;
        }
        Ok(stats)
    }

    /// The active L1 table; none if it shares its place with another table, and has not been walked.
    pub(super) fn active_l1(&self, w: &Walked) -> Option<Table> {
        w.l1s.first().copied().filter(|table| table.offset == self.header.l1_table_offset.get())
    }

    /// The L2 table that an L1 entry names, if it lies in the file.
    pub(super) fn l2_table(&self, entry: L1Entry) -> Option<HostOffset> {
        let offset = entry.without_reserved().offset(&self.geometry).ok().flatten()?;
        (self.cluster_of(offset) < self.end).then_some(offset)
    }

    async fn copied_l2(
        &mut self,
        w: &Walked,
        fix: Fix,
        l2: HostOffset,
        l1_index: u64,
        stats: &mut Stats,
    ) -> Result<()> {
        let step = self.geometry.l2_entry_size();
        let mut bytes = self.read("an L2 table", l2.get(), self.cluster_size()).await?;
        let mut dirty = Dirty::clean();
        let mut contiguous = None;
        let (mut next, mut one_by_one) = (0, 0);
        while next < self.geometry.l2_entries() {
            let index = next;
            let at = (index * step) as usize;
            if index >= one_by_one
                && let Some(clusters) = self.data_run(&bytes, at)
            {
                let len = clusters.end - clusters.start;
                let start = self.offset_of(clusters.start);
                let all_copied = L2Entry::from_raw(number(&bytes, at)).copied();
                if all_copied && w.refs.are_stored_one(clusters.clone()) {
                    stats.allocated += len;
                    stats.fragmented += u64::from(contiguous.is_some_and(|next| next != start));
                    contiguous = Some(self.offset_of(clusters.end));
                    next += len;
                    continue;
                }
                one_by_one = index + len;
            }
            next += 1;
            let entry = L2Entry::from_raw(number(&bytes, at));
            let kind = entry.without_reserved(&self.geometry).decode(&self.geometry);
            let host = match kind {
                Ok(L2Kind::Compressed(_)) => {
                    stats.allocated += 1;
                    stats.compressed += 1;
                    stats.fragmented += 1;
                    continue;
                }
                Ok(L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. }) => host,
                // Told of by the walk; allocated nonetheless.
                Err(FormatError::Misaligned { .. }) => {
                    let offset = entry.offset_bits();
                    stats.allocated += 1;
                    stats.fragmented += u64::from(contiguous.is_some_and(|next| next != offset));
                    contiguous = offset.checked_add(self.cluster_size());
                    continue;
                }
                _ => continue,
            };
            stats.allocated += 1;
            stats.fragmented += u64::from(contiguous.is_some_and(|next| next != host.get()));
            contiguous = host.get().checked_add(self.cluster_size());
            let named_at = l2.get() + at as u64;
            let wanted = if self.geometry.has_data_file {
                self.data_file_place(l1_index, index, host, named_at);
                true
            } else if self.cluster_of(host) < self.end {
                w.refs.is_stored_one(self.cluster_of(host))
            } else {
                // Past the end of the file: that is not put right here.
                let refcount = self.stored_count(&w.stored, self.cluster_of(host)).await?;
                if fix == Fix::Report && (refcount == 1) != entry.copied() {
                    let what = format!("OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}", entry.raw());
                    self.found_as(FindingKind::Copied, named_at, || what);
                }
                continue;
            };
            if wanted != entry.copied() {
                let refcount = match self.geometry.has_data_file {
                    true => 1,
                    false => self.stored_count(&w.stored, self.cluster_of(host)).await?,
                };
                let what = format!("data cluster: l2_entry={:x} refcount={refcount}", entry.raw());
                if self.may_flag(fix, wanted, named_at, &what) {
                    set_number(&mut bytes, at, entry.with_copied(wanted).raw());
                    dirty.touch(at);
                    stats.changed += 1;
                }
            }
        }
        // What shares its place with something else must not be written.
        let range = dirty.range(bytes.len()).filter(|_| w.refs.overlap(self.cluster_of(l2)).is_none());
        if let Some(range) = range {
            let offset = l2.get() + range.start as u64;
            self.write("an L2 table", offset, bytes.get(range).unwrap_or_default()).await?;
        }
        Ok(())
    }

    /// Whether a flag that is wrong may be put right; tells of it either way.
    fn may_flag(&mut self, fix: Fix, wanted: bool, named_at: u64, what: &str) -> bool {
        let text = format!("OFLAG_COPIED {what}");
        let may = fix == Fix::All || (fix == Fix::Set && wanted);
        if may {
            self.out.flags_fixed += 1;
            self.out.repairing(text);
        } else {
            self.found_as(FindingKind::Copied, named_at, || text);
        }
        may
    }

    fn data_file_place(&mut self, l1_index: u64, l2_index: u64, host: HostOffset, named_at: u64) {
        let cluster = l1_index.checked_mul(self.geometry.l2_entries()).and_then(|c| c.checked_add(l2_index));
        let guest = cluster.and_then(|c| c.checked_mul(self.cluster_size())).map(GuestOffset::new);
        let placed = guest.map(|guest| self.geometry.check_data_file_mapping(guest, host));
        if let Some(Err(problem)) = placed {
            self.found(FindingKind::Entry, named_at, || problem.to_string());
        }
    }
}
