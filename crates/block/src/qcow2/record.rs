//! What the journal notes of a change of the mapping: runs of clusters whose L2 entries follow from the first one's.
//!
//! A record is four words: the first guest cluster, how many, its entry as it belongs into the file, and its subclusters. What is read from
//! one is taken as hostile: [`Entries::parse`] bounds it.

use cowhand_qcow2::{Geometry, GuestOffset, L2Kind, SubclusterBitmap};

use super::entry::Stored;
use crate::journal::Record;

/// Where the entries' host offsets end.
const HOST_END: u64 = 1 << 56;

/// The entries of clusters that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entries {
    /// The first guest cluster.
    pub(super) first: u64,
    /// How many; all are of one slice of an L2 table.
    pub(super) count: u64,
    stored: Stored,
    /// By how much an entry is more than the one before it.
    step: u64,
}

impl Entries {
    fn new(geometry: &Geometry, first: u64, stored: Stored, kind: &L2Kind) -> Self {
        let has_place = matches!(kind, L2Kind::Data { .. } | L2Kind::Zero { host: Some(_), .. });
        // Without subclusters the bitmap means nothing, and is none in the caches.
        let bitmap = if geometry.extended_l2 { stored.bitmap } else { SubclusterBitmap::NONE };
        let step = if has_place { geometry.cluster_bits.size() } else { 0 };
        Self { first, count: 1, stored: Stored { bitmap, ..stored.on_disk() }, step }
    }

    /// The entry of the cluster `number` among them.
    pub(super) fn entry(&self, number: u64) -> Stored {
        Stored { entry: self.stored.entry.wrapping_add(number.wrapping_mul(self.step)), bitmap: self.stored.bitmap }
    }

    /// Those from the cluster `number` among them on, so many.
    pub(super) fn part(&self, number: u64, count: u64) -> Self {
        Self { first: self.first + number, count, stored: self.entry(number), step: self.step }
    }

    /// Whether the next cluster's entry goes on with them; then it is one of them.
    fn take(&mut self, next: &Self, kind: &L2Kind) -> bool {
        let goes_on = !matches!(kind, L2Kind::Compressed(_)) && self.entry(self.count) == next.stored;
        self.count += u64::from(goes_on);
        goes_on
    }

    fn record(&self) -> Record {
        [self.first, self.count, self.stored.entry, self.stored.bitmap.raw()]
    }

    /// What a record says of a disk of `size` bytes whose slices have so many entries.
    ///
    /// # Errors
    /// Why it says nothing that could be.
    pub(super) fn parse(
        [first, count, entry, bitmap]: Record,
        geometry: &Geometry,
        size: u64,
        slice_entries: u64,
    ) -> Result<Self, &'static str> {
        let clusters = geometry.cluster_bits.clusters_for(size);
        if count == 0 || first.checked_add(count).is_none_or(|end| end > clusters) {
            return Err("a record lies past the end of the disk");
        }
        if first / slice_entries != (first + count - 1) / slice_entries {
            return Err("a record spans tables");
        }
        let stored = Stored { entry, bitmap: SubclusterBitmap::from_raw(bitmap) };
        if stored.collides() {
            return Err("an entry has reserved bits set");
        }
        let Ok((kind, _)) = stored.decode(geometry) else { return Err("an entry breaks the format's rules") };
        let entries = Self { count, ..Self::new(geometry, first, stored, &kind) };
        match kind {
            L2Kind::Compressed(_) if count != 1 || entries.stored.bitmap != SubclusterBitmap::NONE => {
                Err("an entry of a compressed cluster breaks the format's rules")
            }
            L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. } => {
                let guest = GuestOffset::new(first << geometry.cluster_bits.bits());
                let bytes = count << geometry.cluster_bits.bits();
                if host.get().checked_add(bytes).is_none_or(|end| end > HOST_END) {
                    return Err("an entry breaks the format's rules");
                }
                let placed = geometry.check_data_file_mapping(guest, host);
                placed.map(|()| entries).map_err(|_| "a cluster of the data file has another cluster's place")
            }
            _ => Ok(entries),
        }
    }
}

/// The records of entries that follow each other from the guest cluster `first` on, at most `room`; and of how many entries those are.
pub(super) fn records(
    geometry: &Geometry,
    first: u64,
    entries: impl Iterator<Item = (Stored, L2Kind)>,
    room: usize,
) -> (Vec<Record>, usize) {
    let mut records = Vec::new();
    let mut run: Option<Entries> = None;
    let mut noted = 0;
    for (at, (stored, kind)) in (first..).zip(entries) {
        let next = Entries::new(geometry, at, stored, &kind);
        if !run.as_mut().is_some_and(|run| run.take(&next, &kind)) {
            if records.len() + usize::from(run.is_some()) >= room {
                break;
            }
            records.extend(run.replace(next).map(|run| run.record()));
        }
        noted += 1;
    }
    records.extend(run.map(|run| run.record()));
    (records, noted)
}

#[cfg(test)]
#[path = "record_test.rs"]
mod tests;
