//! The image's own refcounts, held against the references found, and brought in line with them.

use cowhand_qcow2::{FormatError, refcount};

use super::refs::{Bits, CHUNK_CLUSTERS};
use super::report::FindingKind;
use super::walk::{Stored, Walked};
use super::{Checker, Dirty};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;

/// What is done about refcounts that are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// They are told.
    Report,
    /// Those that are too low are raised; a cluster without a refcount block asks for a rebuild.
    Raise,
    /// Those that are too high are lowered.
    Lower,
    /// As [`Pass::Raise`], of what the repair itself takes: that is not told.
    Take,
    /// As [`Pass::Lower`], of what it gives back.
    Give,
}

/// What came out of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// The highest cluster that is referred to or counted.
    pub(super) highest: Option<u64>,
    /// A cluster is referred to that no refcount block counts.
    pub(super) uncovered: bool,
    /// A cluster is referred to that counts as free.
    pub(super) missed: bool,
    /// Refcounts that were changed.
    pub(super) changed: u64,
}

/// So many clusters are passed over at once where nothing is in use, or each is referred to and counted once at most.
const STEP: u64 = CHUNK_CLUSTERS;

impl Checker {
    pub(super) async fn refcounts(&mut self, w: &mut Walked, pass: Pass) -> Result<Counts> {
        let per_block = self.geometry.refcount_block_entries();
        let mut counts = Counts::default();
        let mut from = 0;
        self.block = None;
        w.refs.know_stored();
        while let Some(index) = self.next_block(w, &w.stored, from) {
            from = index + 1;
            match w.stored.block(index) {
                Some(place) => self.counted(w, pass, index, place, &mut counts).await?,
                None => self.uncounted(w, index * per_block, &mut counts),
            }
        }
        Ok(counts)
    }

    /// The next block, from number `from` on, that is there or should be.
    pub(super) fn next_block(&self, w: &Walked, stored: &Stored, from: u64) -> Option<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let there = stored.next(from);
        let needed = w.refs.next_used(from.checked_mul(per_block)?).map(|cluster| cluster / per_block);
        let next = match (there, needed) {
            (Some(there), Some(needed)) => there.min(needed),
            (there, needed) => there.or(needed)?,
        };
        // What lies past the end of the file is nobody's.
        next.checked_mul(per_block).is_some_and(|first| first < self.end).then_some(next)
    }

    pub(super) fn counted_error(&self, place: u64, error: &FormatError) -> Error {
        Error::new(ErrorKind::Corrupt, error.to_string()).at_path(&self.path).at_offset(place)
    }

    /// Clusters that a block counts.
    async fn counted(&mut self, w: &mut Walked, pass: Pass, index: u64, place: u64, out: &mut Counts) -> Result<()> {
        let order = self.geometry.refcount_order;
        let per_block = self.geometry.refcount_block_entries();
        let first = index * per_block;
        let end = first.saturating_add(per_block).min(self.end);
        let mut block = self.read("a refcount block", place, self.cluster_size()).await?;
        let mut dirty = Dirty::clean();
        let mut at = first;
        while at < end {
            let step_end = (at + STEP).min(end);
            if is_idle(order, &block, at - first..step_end - first) && w.refs.is_free(at..step_end) {
                at = step_end;
                continue;
            }
            if step_end - at == STEP
                && let Some(ones) = w.refs.ones(at)
                && are_bits(order, &block, (at - first) as usize, &ones)
            {
                // What the references remember of these clusters is that already.
                if let Some(word) = ones.iter().rposition(|&word| word != 0) {
                    let bits = ones.get(word).map_or(0, |bits| bits.ilog2());
                    out.highest = Some(at + word as u64 * 64 + u64::from(bits));
                }
                at = step_end;
                continue;
            }
            for cluster in at..step_end {
                let entry = (cluster - first) as usize;
                let stored = refcount::get(order, &block, entry).map_err(|e| self.counted_error(place, &e))?;
                let found = w.refs.count(cluster);
                if stored > 0 || found > 0 {
                    out.highest = Some(cluster);
                }
                out.missed |= stored == 0 && found > 0;
                let target = self.target(pass, cluster, stored, found);
                if target != stored {
                    refcount::set(order, &mut block, entry, target).map_err(|e| self.counted_error(place, &e))?;
                    dirty.touch((entry << order) / 8);
                    out.changed += 1;
                }
                if found > 0 {
                    w.refs.set_stored_one(cluster, target == 1);
                }
            }
            at = step_end;
        }
        if let Some(range) = dirty.range(block.len()) {
            let start = range.start;
            self.write("a refcount block", place + start as u64, block.get(range).unwrap_or_default()).await?;
        }
        Ok(())
    }

    /// What a count should become; tells what is wrong with it.
    fn target(&mut self, pass: Pass, cluster: u64, stored: u64, found: u64) -> u64 {
        let max = refcount::max(self.geometry.refcount_order);
        match pass {
            Pass::Take => stored.max(found.min(max)),
            Pass::Give => stored.min(found),
            Pass::Raise | Pass::Lower => {
                let target = if pass == Pass::Raise { stored.max(found.min(max)) } else { stored.min(found) };
                if target != stored {
                    self.out.repairing(counts_text(cluster, stored, found));
                }
                target
            }
            Pass::Report => {
                let kind = if stored > found { FindingKind::Leak } else { FindingKind::Refcount };
                if stored != found {
                    self.found_as(kind, self.offset_of(cluster), || counts_text(cluster, stored, found));
                }
                stored
            }
        }
    }

    /// Clusters that no block counts.
    fn uncounted(&mut self, w: &mut Walked, first: u64, out: &mut Counts) {
        let end = first.saturating_add(self.geometry.refcount_block_entries()).min(self.end);
        let mut from = first;
        while let Some(cluster) = w.refs.next_used(from).filter(|&cluster| cluster < end) {
            w.refs.set_stored_one(cluster, false);
            from = cluster + 1;
            (out.highest, out.uncovered) = (Some(cluster), true);
            let found = w.refs.count(cluster);
            self.found_as(FindingKind::Refcount, self.offset_of(cluster), || counts_text(cluster, 0, found));
        }
    }

    /// The image's own count of one cluster; 0 where no block counts it.
    pub(super) async fn stored_count(&mut self, stored: &Stored, cluster: u64) -> Result<u64> {
        let per_block = self.geometry.refcount_block_entries();
        let index = cluster / per_block;
        if self.block.as_ref().is_none_or(|(number, _)| *number != index) {
            self.block = self.stored_block(stored, index).await?.map(|block| (index, block));
        }
        let Some((_, block)) = &self.block else { return Ok(0) };
        let entry = (cluster % per_block) as usize;
        refcount::get(self.geometry.refcount_order, block, entry).map_err(|e| self.counted_error(0, &e))
    }

    /// The image's own refcounts, without the blocks that are none: what lies in one place with something else is counts only if it
    /// agrees with most of what was found.
    pub(super) async fn believed(&self, w: &Walked) -> Result<Stored> {
        let mut stored = w.stored.clone();
        for (place, index) in stored.blocks.iter_mut().zip(0..) {
            let cluster = self.geometry.cluster_bits.index_of(*place);
            if *place != 0 && w.refs.overlap(cluster).is_some() && !self.agrees(w, index).await? {
                *place = 0;
            }
        }
        Ok(stored)
    }

    /// Whether a block says of more than half of the clusters that are referred to what was found.
    async fn agrees(&self, w: &Walked, index: u64) -> Result<bool> {
        let order = self.geometry.refcount_order;
        let Some(block) = self.stored_block(&w.stored, index).await? else { return Ok(false) };
        let first = index * self.geometry.refcount_block_entries();
        let end = first.saturating_add(self.geometry.refcount_block_entries()).min(self.end);
        let (mut from, mut used, mut same) = (first, 0u64, 0u64);
        while let Some(cluster) = w.refs.next_used(from).filter(|&cluster| cluster < end) {
            from = cluster + 1;
            let counted = refcount::get(order, &block, (cluster - first) as usize).ok();
            (used, same) = (used + 1, same + u64::from(counted == Some(w.refs.count(cluster))));
        }
        Ok(same > used / 2)
    }

    /// The refcounts in a block of the image's own, by number; none where there is no such block.
    pub(super) async fn stored_block(&self, stored: &Stored, index: u64) -> Result<Option<Buffer>> {
        match stored.block(index) {
            Some(place) => self.read("a refcount block", place, self.cluster_size()).await.map(Some),
            None => Ok(None),
        }
    }
}

pub(super) fn counts_text(cluster: u64, stored: u64, found: u64) -> String {
    format!("cluster {cluster} refcount={stored} reference={found}")
}

/// Whether these refcounts are all 0.
fn is_idle(order: u32, block: &[u8], entries: std::ops::Range<u64>) -> bool {
    let byte = |entry: u64| ((entry << order) / 8) as usize;
    let bytes = block.get(byte(entries.start)..byte(entries.end + 7).min(block.len()));
    bytes.is_some_and(|bytes| bytes.iter().all(|&byte| byte == 0))
}

/// Whether the refcounts from `first` on are these bits: one where a bit is set, nought elsewhere. The widths of which whole bytes make
/// one refcount are found out; of narrower ones it is not said.
fn are_bits(order: u32, block: &[u8], first: usize, bits: &Bits) -> bool {
    let Some(shift) = order.checked_sub(3) else { return false };
    let Some(counts) = block.get(first << shift..) else { return false };
    match shift {
        0 => are_bits_of::<1>(counts, bits),
        1 => are_bits_of::<2>(counts, bits),
        2 => are_bits_of::<4>(counts, bits),
        _ => are_bits_of::<8>(counts, bits),
    }
}

/// The same for refcounts of so many bytes.
fn are_bits_of<const BYTES: usize>(counts: &[u8], bits: &Bits) -> bool {
    let (counts, _) = counts.as_chunks::<BYTES>();
    let mut one = [0; BYTES];
    one[BYTES - 1] = 1;
    counts.len() >= bits.len() * 64
        && counts.chunks_exact(64).zip(bits).all(|(counts, &bits)| match bits {
            // Most words are full or empty, and what is compared with the same value is compared fast.
            u64::MAX => counts.iter().fold(true, |same, count| same & (*count == one)),
            _ => counts.iter().enumerate().all(|(at, count)| {
                let expected = if bits >> at & 1 != 0 { one } else { [0; BYTES] };
                *count == expected
            }),
        })
}
