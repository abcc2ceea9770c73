//! The cache of L2 tables, in slices, read by all queues without a lock.
//!
//! A slice is a part of an L2 table of at most [`SLICE_BYTES`]. The cache is a set-associative array: a slice can lie in any of
//! the [`WAYS`] ways of one set. A way's tag names the slice that it holds and counts how often it was filled; a reader takes the
//! tag, the entry and the tag again, and believes the entry only when both tags are the same. So readers neither block nor are
//! blocked, and a way can be given to another slice at any time.
//!
//! Everything that changes a way (filling, storing an entry) is done by a caller who holds the image's metadata lock. Which slices
//! are dirty, and must not be given away, is the caller's to know. An extended entry is two words, which must be seen together: while
//! they change, the tag names nothing.

use cowhand_qcow2::SubclusterBitmap;

use super::entry::Stored;
use crate::mutation::Mutation;
use crate::sync::{AtomicBool, AtomicU64, OnceLock, Ordering};

/// The most bytes of an L2 table in one slice.
pub(super) const SLICE_BYTES: u64 = 4096;

/// Ways in a set: their tags fill one cache line.
const WAYS: usize = 8;

/// The number of an L2 slice in guest order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Slice(pub(super) u64);

#[derive(Default)]
#[repr(align(64))]
struct Tags([AtomicU64; WAYS]);

#[derive(Default)]
struct Way {
    entries: OnceLock<Box<[AtomicU64]>>,
    /// Read since the hand last came by.
    referenced: AtomicBool,
}

#[derive(Default)]
struct Set {
    tags: Tags,
    ways: [Way; WAYS],
}

/// The cache.
pub(super) struct SliceCache {
    sets: Box<[Set]>,
    entries: usize,
    /// Words of an entry: 2 with extended L2 entries, else 1.
    words: usize,
    fills: AtomicU64,
}

const FILL_BITS: u32 = 32;

fn tag_of(slice: Slice, fill: u64) -> u64 {
    ((slice.0 + 1) << FILL_BITS) | (fill & ((1 << FILL_BITS) - 1))
}

fn holds(tag: u64, slice: Slice) -> bool {
    tag >> FILL_BITS == slice.0 + 1
}

impl SliceCache {
    /// A cache of slices of `entries` entries (extended ones or not), for an image that has `slices` of them, using at most `budget`
    /// bytes (but enough to work).
    pub(super) fn new(entries: usize, extended: bool, slices: u64, budget: u64) -> Self {
        let words = if extended { 2 } else { 1 };
        let set_bytes = (entries * words * 8 * WAYS) as u64;
        let sets = slices.div_ceil(WAYS as u64).min(budget / set_bytes).max(1);
        Self { sets: (0..sets).map(|_| Set::default()).collect(), entries, words, fills: AtomicU64::new(0) }
    }

    fn set(&self, slice: Slice) -> &Set {
        &self.sets[(slice.0 % self.sets.len() as u64) as usize]
    }

    /// The entry `index` of a slice, if the slice is there.
    pub(super) fn get(&self, slice: Slice, index: usize) -> Option<Stored> {
        let set = self.set(slice);
        for (tag, way) in set.tags.0.iter().zip(&set.ways) {
            let before = tag.load(Ordering::Acquire);
            if !holds(before, slice) {
                continue;
            }
            // Acquire: what a later fill stores in the entry, and with it that fill's cleared tag, is seen together.
            let stored = self.stored(way.entries.get()?, index)?;
            if tag.load(Ordering::Acquire) != before && !Mutation::TagLookedAtOnce.is_on() {
                return None;
            }
            if !way.referenced.load(Ordering::Relaxed) {
                way.referenced.store(true, Ordering::Relaxed);
            }
            return Some(stored);
        }
        None
    }

    fn stored(&self, words: &[AtomicU64], index: usize) -> Option<Stored> {
        let entry = words.get(index * self.words)?.load(Ordering::Acquire);
        let bitmap = if self.words == 1 { 0 } else { words.get(index * 2 + 1)?.load(Ordering::Acquire) };
        Some(Stored { entry, bitmap: SubclusterBitmap::from_raw(bitmap) })
    }

    /// Whether the slice is there.
    pub(super) fn contains(&self, slice: Slice) -> bool {
        self.set(slice).tags.0.iter().any(|tag| holds(tag.load(Ordering::Acquire), slice))
    }

    /// All entries of a slice, if it is there. The caller holds the metadata lock.
    pub(super) fn entries(&self, slice: Slice) -> Option<impl Iterator<Item = Stored>> {
        let (set, at) = self.find(slice)?;
        let words = set.ways[at].entries.get()?;
        Some((0..self.entries).filter_map(|index| self.stored(words, index)))
    }

    fn find(&self, slice: Slice) -> Option<(&Set, usize)> {
        let set = self.set(slice);
        let at = set.tags.0.iter().position(|tag| holds(tag.load(Ordering::Acquire), slice))?;
        Some((set, at))
    }

    /// Stores an entry of a slice that is there; false if it is not. The caller holds the metadata lock.
    pub(super) fn store(&self, slice: Slice, index: usize, stored: Stored) -> bool {
        let Some((set, at)) = self.find(slice) else { return false };
        let Some(words) = set.ways[at].entries.get() else { return false };
        match words.get(index * self.words..(index + 1) * self.words) {
            Some([entry]) => entry.store(stored.entry, Ordering::Release),
            Some([entry, bitmap]) => {
                if !Mutation::PairChangedInTheOpen.is_on() {
                    set.tags.0[at].store(0, Ordering::SeqCst);
                }
                entry.store(stored.entry, Ordering::Release);
                bitmap.store(stored.bitmap.raw(), Ordering::Release);
                set.tags.0[at].store(self.new_tag(slice), Ordering::Release);
            }
            _ => return false,
        }
        true
    }

    fn new_tag(&self, slice: Slice) -> u64 {
        tag_of(slice, self.fills.fetch_add(1, Ordering::Relaxed))
    }

    /// Gives a way to `slice` and fills it; false if every way of its set holds a slice that must stay. The caller holds the
    /// metadata lock.
    pub(super) fn fill(
        &self,
        slice: Slice,
        stored: impl Fn(usize) -> Stored,
        must_stay: impl Fn(Slice) -> bool,
    ) -> bool {
        if self.contains(slice) {
            return true;
        }
        let Some(at) = self.victim(slice, must_stay) else { return false };
        let set = self.set(slice);
        set.tags.0[at].store(0, Ordering::SeqCst);
        let len = self.entries * self.words;
        let words = set.ways[at].entries.get_or_init(|| (0..len).map(|_| AtomicU64::new(0)).collect());
        for (i, words) in words.chunks_exact(self.words).enumerate() {
            let Stored { entry, bitmap } = stored(i);
            words[0].store(entry, Ordering::Release);
            if let Some(word) = words.get(1) {
                word.store(bitmap.raw(), Ordering::Release);
            }
        }
        set.tags.0[at].store(self.new_tag(slice), Ordering::Release);
        true
    }

    /// The way to give away: an empty one, or one not read since the last look (the clock algorithm, by set).
    fn victim(&self, slice: Slice, must_stay: impl Fn(Slice) -> bool) -> Option<usize> {
        let set = self.set(slice);
        if let Some(empty) = set.tags.0.iter().position(|tag| tag.load(Ordering::Relaxed) == 0) {
            return Some(empty);
        }
        let start = self.fills.load(Ordering::Relaxed) as usize;
        for second_chance in [true, false] {
            for at in (0..WAYS).map(|i| (start + i) % WAYS) {
                let holder = Slice((set.tags.0[at].load(Ordering::Relaxed) >> FILL_BITS) - 1);
                if must_stay(holder) {
                    continue;
                }
                if second_chance && set.ways[at].referenced.swap(false, Ordering::Relaxed) {
                    continue;
                }
                return Some(at);
            }
        }
        None
    }
}

#[cfg(test)]
#[path = "slices_test.rs"]
mod tests;

#[cfg(all(test, feature = "shuttle"))]
#[path = "slices_model.rs"]
mod model;
