//! How often each host cluster is referred to, and by what: found by walking the metadata, kept in little memory.
//!
//! Counts stand in chunks of 4096 clusters. A chunk with few counts keeps them in a list, so that references that a hostile
//! image strews over a huge sparse file cost some 45 bytes each, a few times what they take in the file. Most clusters of an
//! ordinary image hold guest data and are referred to once: they cost one bit each, and whole runs of them are counted at once. A
//! chunk in which much is shared costs two bytes to a cluster.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

const CHUNK_BITS: u32 = 12;
const CHUNK: usize = 1 << CHUNK_BITS;
/// With more counts than this a chunk has a bit for each cluster that is referred to once.
const FEW_MAX: usize = 128;
/// With more counts than this beside the bits a chunk is kept as an array.
const OTHERS_MAX: usize = 512;
/// Clusters to a word of bits.
const WORD: usize = u64::BITS as usize;

/// A bit for each cluster of a chunk.
pub(super) type Bits = [u64; CHUNK / WORD];

/// Clusters of a chunk.
pub(super) const CHUNK_CLUSTERS: u64 = CHUNK as u64;

/// What refers to a cluster. Of several in one cluster the last of this order is remembered: L2 tables are found again by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Guest data, compressed or not: may be shared with guest data.
    Data = 1,
    /// A bitmap's bits.
    Bitmap = 2,
    /// The refcount table, or a refcount block.
    Refcounts = 3,
    /// Tables that have one place: header, L1 tables, snapshot table, bitmap directory and tables, encryption header.
    Fixed = 4,
    /// An L2 table: may be shared among L1 entries.
    L2 = 5,
}

impl Class {
    const ALL: [Self; 5] = [Self::Data, Self::Bitmap, Self::Refcounts, Self::Fixed, Self::L2];

    const fn bit(self) -> u8 {
        1 << self as u8
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Data => "guest data",
            Self::Bitmap => "a bitmap's data",
            Self::Refcounts => "refcounts",
            Self::Fixed => "the header or a table of it",
            Self::L2 => "an L2 table",
        }
    }
}

/// A cluster that several structures claim, which cannot share it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Overlap {
    classes: u8,
    /// How many L1 entries name it as an L2 table.
    l2: u64,
}

impl Overlap {
    pub(super) const fn has(self, class: Class) -> bool {
        self.classes & class.bit() != 0
    }

    /// The claimants, in words.
    pub(super) fn names(self) -> String {
        let names: Vec<_> = Class::ALL.into_iter().filter(|&c| self.has(c)).map(Class::name).collect();
        match names.as_slice() {
            [only] => format!("{only}, more than once"),
            _ => names.join(" and "),
        }
    }
}

/// What is known of one cluster, packed: class (3 bits), two marks, and the count (11 bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot(u16);

impl Slot {
    const COUNT: u16 = 0x7ff;
    /// The count stands in [`References::large`].
    const LARGE: u16 = Self::COUNT;
    /// The image's own count is one though the count found is not, or the other way round.
    const ODD: u16 = 1 << 11;
    const VISITED: u16 = 1 << 12;
    const CLASS_SHIFT: u32 = 13;
    /// Guest data, referred to once, and nothing odd about it.
    const PLAIN: Self = Self((Class::Data as u16) << Self::CLASS_SHIFT | 1);

    const fn class(self) -> u16 {
        self.0 >> Self::CLASS_SHIFT
    }

    const fn count(self) -> u16 {
        self.0 & Self::COUNT
    }
}

/// Clusters of a chunk that are [`Slot::PLAIN`], and the others that are referred to.
#[derive(Debug)]
struct Plain {
    bits: Bits,
    /// By ascending index; of none of them is the bit set.
    others: Vec<(u16, Slot)>,
}

impl Plain {
    fn new(slots: &[(u16, Slot)]) -> Self {
        let mut plain = Self { bits: [0; CHUNK / WORD], others: Vec::new() };
        for &(at, slot) in slots {
            plain.set(at, slot);
        }
        plain
    }

    fn has(&self, index: u16) -> bool {
        self.bits.get(usize::from(index) / WORD).is_some_and(|word| word >> (usize::from(index) % WORD) & 1 != 0)
    }

    fn get(&self, index: u16) -> Slot {
        if self.has(index) { Slot::PLAIN } else { find(&self.others, index) }
    }

    fn set(&mut self, index: u16, slot: Slot) {
        let bit = 1 << (usize::from(index) % WORD);
        if let Some(word) = self.bits.get_mut(usize::from(index) / WORD) {
            *word = if slot == Slot::PLAIN { *word | bit } else { *word & !bit };
        }
        match self.others.binary_search_by_key(&index, |(at, _)| *at) {
            Ok(at) if slot == Slot::PLAIN => drop(self.others.remove(at)),
            Ok(at) => {
                if let Some(entry) = self.others.get_mut(at) {
                    entry.1 = slot;
                }
            }
            Err(_) if slot == Slot::PLAIN => {}
            Err(at) => self.others.insert(at, (index, slot)),
        }
    }

    /// The words that `range` touches, each with the bits of the range that lie in it.
    fn masks(range: &Range<usize>) -> impl Iterator<Item = (usize, u64)> + use<> {
        let Range { start, end } = *range;
        (start / WORD..end.div_ceil(WORD)).map(move |word| {
            let first = start.saturating_sub(word * WORD);
            let last = (end - word * WORD).min(WORD);
            let mask = (u64::MAX >> (WORD - (last - first))) << first;
            (word, mask)
        })
    }

    fn has_all(&self, range: &Range<usize>) -> bool {
        Self::masks(range).all(|(word, mask)| self.bits.get(word).is_some_and(|bits| bits & mask == mask))
    }

    /// Makes all of `range` plain, if nothing is known of any of it yet.
    fn add_all(&mut self, range: &Range<usize>) -> bool {
        let next = self.others.partition_point(|(at, _)| usize::from(*at) < range.start);
        let other = self.others.get(next).is_some_and(|(at, _)| usize::from(*at) < range.end);
        if other || !Self::masks(range).all(|(word, mask)| self.bits.get(word).is_some_and(|bits| bits & mask == 0)) {
            return false;
        }
        for (word, mask) in Self::masks(range) {
            if let Some(bits) = self.bits.get_mut(word) {
                *bits |= mask;
            }
        }
        true
    }

    fn next(&self, from: u16, wanted: impl Fn(Slot) -> bool) -> Option<u16> {
        let start = self.others.partition_point(|(at, _)| *at < from);
        let other = self.others.get(start..)?.iter().find(|(_, slot)| wanted(*slot)).map(|(at, _)| *at);
        if !wanted(Slot::PLAIN) {
            return other;
        }
        let mut words = Self::masks(&(usize::from(from)..CHUNK));
        let plain = words.find_map(|(word, mask)| {
            let bits = self.bits.get(word)? & mask;
            (bits != 0).then(|| word * WORD + bits.trailing_zeros() as usize)
        });
        let plain = plain.and_then(|at| u16::try_from(at).ok());
        plain.into_iter().chain(other).min()
    }

    fn to_array(&self) -> Box<[Slot; CHUNK]> {
        let mut slots = Box::new([Slot::default(); CHUNK]);
        for (place, at) in slots.iter_mut().zip(0u16..) {
            *place = self.get(at);
        }
        slots
    }
}

fn find(list: &[(u16, Slot)], index: u16) -> Slot {
    let at = list.binary_search_by_key(&index, |(at, _)| *at).ok();
    at.and_then(|at| list.get(at)).map_or(Slot::default(), |(_, slot)| *slot)
}

#[derive(Debug)]
enum Chunk {
    /// All the same.
    Uniform(Slot),
    One(u16, Slot),
    /// By ascending index.
    Few(Vec<(u16, Slot)>),
    Plain(Box<Plain>),
    Many(Box<[Slot; CHUNK]>),
}

impl Chunk {
    fn get(&self, index: u16) -> Slot {
        match self {
            Self::Uniform(slot) => *slot,
            Self::One(at, slot) if *at == index => *slot,
            Self::One(..) => Slot::default(),
            Self::Few(list) => find(list, index),
            Self::Plain(plain) => plain.get(index),
            Self::Many(slots) => slots.get(usize::from(index)).copied().unwrap_or_default(),
        }
    }

    fn set(&mut self, index: u16, slot: Slot) {
        match self {
            Self::Uniform(same) if *same == slot => {}
            Self::Uniform(Slot::PLAIN) => {
                let mut plain = Plain { bits: [u64::MAX; CHUNK / WORD], others: Vec::new() };
                plain.set(index, slot);
                *self = Self::Plain(Box::new(plain));
            }
            Self::Uniform(same) => {
                let mut slots = Box::new([*same; CHUNK]);
                if let Some(place) = slots.get_mut(usize::from(index)) {
                    *place = slot;
                }
                *self = Self::Many(slots);
            }
            Self::One(at, old) if *at == index => *old = slot,
            Self::One(at, old) => {
                let mut list = vec![(*at, *old), (index, slot)];
                list.sort_unstable_by_key(|(at, _)| *at);
                *self = Self::Few(list);
            }
            Self::Few(list) => match list.binary_search_by_key(&index, |(at, _)| *at) {
                Ok(at) => {
                    if let Some(entry) = list.get_mut(at) {
                        entry.1 = slot;
                    }
                }
                Err(at) if list.len() < FEW_MAX => list.insert(at, (index, slot)),
                Err(_) => {
                    let mut plain = Plain::new(list);
                    plain.set(index, slot);
                    *self = Self::Plain(Box::new(plain));
                }
            },
            Self::Plain(plain) => {
                plain.set(index, slot);
                if plain.others.len() > OTHERS_MAX {
                    *self = Self::Many(plain.to_array());
                }
            }
            Self::Many(slots) => {
                if let Some(place) = slots.get_mut(usize::from(index)) {
                    *place = slot;
                }
            }
        }
    }

    /// Makes all of `range` plain, if nothing is known of any of it yet and that is easily seen.
    fn add_plain(&mut self, range: &Range<usize>) -> bool {
        match self {
            Self::Plain(plain) => plain.add_all(range),
            Self::One(..) | Self::Few(_) if range.len() > FEW_MAX / 2 => {
                let mut plain = match self {
                    Self::One(at, slot) => Plain::new(&[(*at, *slot)]),
                    Self::Few(list) => Plain::new(list),
                    _ => return false,
                };
                let added = plain.add_all(range);
                *self = Self::Plain(Box::new(plain));
                added
            }
            _ => false,
        }
    }

    /// The first index from `from` on whose slot is `wanted`.
    fn next(&self, from: u16, wanted: impl Fn(Slot) -> bool) -> Option<u16> {
        match self {
            Self::Uniform(slot) => wanted(*slot).then_some(from),
            Self::One(at, slot) => (*at >= from && wanted(*slot)).then_some(*at),
            Self::Few(list) => {
                let start = list.partition_point(|(at, _)| *at < from);
                list.get(start..)?.iter().find(|(_, slot)| wanted(*slot)).map(|(at, _)| *at)
            }
            Self::Plain(plain) => plain.next(from, wanted),
            Self::Many(slots) => {
                let at = slots.get(usize::from(from)..)?.iter().position(|slot| wanted(*slot))?;
                u16::try_from(usize::from(from) + at).ok()
            }
        }
    }

    /// Those clusters that are referred to once; none if one of them is referred to more often.
    fn ones(&self) -> Option<Bits> {
        let mut bits = [0; CHUNK / WORD];
        let list: &[(u16, Slot)] = match self {
            Self::Uniform(slot) => return (slot.count() == 1).then_some([u64::MAX; CHUNK / WORD]),
            Self::One(at, slot) => &[(*at, *slot)],
            Self::Few(list) => list,
            Self::Plain(plain) => {
                bits = plain.bits;
                &plain.others
            }
            Self::Many(_) => return None,
        };
        for (at, slot) in list {
            if slot.count() > 1 {
                return None;
            }
            if let Some(word) = bits.get_mut(usize::from(*at) / WORD) {
                *word |= u64::from(slot.count()) << (usize::from(*at) % WORD);
            }
        }
        Some(bits)
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        match self {
            Self::One(..) | Self::Uniform(_) => 0,
            Self::Few(list) => list.capacity() * size_of::<(u16, Slot)>(),
            Self::Plain(plain) => size_of::<Plain>() + plain.others.capacity() * size_of::<(u16, Slot)>(),
            Self::Many(_) => size_of::<[Slot; CHUNK]>(),
        }
    }
}

/// The references found.
#[derive(Debug, Default)]
pub(super) struct References {
    chunks: BTreeMap<u64, Chunk>,
    /// Counts that do not fit a slot.
    large: HashMap<u64, u64>,
    overlaps: BTreeMap<u64, Overlap>,
    highest: u64,
    /// The image's own counts have been looked at.
    stored_known: bool,
}

const fn split(cluster: u64) -> (u64, u16) {
    (cluster >> CHUNK_BITS, (cluster & (CHUNK as u64 - 1)) as u16)
}

/// The chunks that `clusters` lie in, each with the indices in it.
fn parts(clusters: &Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> + use<> {
    let Range { start, end } = *clusters;
    let chunks = if start < end { (start >> CHUNK_BITS)..((end - 1) >> CHUNK_BITS) + 1 } else { 0..0 };
    chunks.map(move |number| {
        let first = number << CHUNK_BITS;
        (number, (start.saturating_sub(first)) as usize..(end - first).min(CHUNK as u64) as usize)
    })
}

impl References {
    fn slot(&self, cluster: u64) -> Slot {
        let (chunk, index) = split(cluster);
        self.chunks.get(&chunk).map_or(Slot::default(), |chunk| chunk.get(index))
    }

    fn set_slot(&mut self, cluster: u64, slot: Slot) {
        let (chunk, index) = split(cluster);
        self.chunks.entry(chunk).or_insert(Chunk::One(index, slot)).set(index, slot);
    }

    /// Counts `times` more references to a cluster.
    pub(super) fn add(&mut self, cluster: u64, times: u64, class: Class) {
        if times == 0 {
            return;
        }
        let slot = self.slot(cluster);
        let before = self.count_of(cluster, slot);
        let old = Class::ALL.into_iter().find(|c| *c as u16 == slot.class());
        if let Some(old) = old {
            let shared = old == class && matches!(class, Class::Data | Class::L2);
            let known = self.overlaps.contains_key(&cluster);
            if known || !shared {
                let overlap = self
                    .overlaps
                    .entry(cluster)
                    .or_insert_with(|| Overlap { classes: old.bit(), l2: if old == Class::L2 { before } else { 0 } });
                overlap.classes |= class.bit();
                if class == Class::L2 {
                    overlap.l2 = overlap.l2.saturating_add(times);
                }
            }
        }
        let count = before.saturating_add(times);
        self.highest = self.highest.max(count);
        let small = u16::try_from(count).unwrap_or(Slot::LARGE).min(Slot::LARGE);
        if small == Slot::LARGE {
            self.large.insert(cluster, count);
        }
        let class = slot.class().max(class as u16);
        let odd = self.stored_known && self.has_stored_one(slot) != (small == 1);
        let marks = (slot.0 & Slot::VISITED) | if odd { Slot::ODD } else { 0 };
        self.set_slot(cluster, Slot(class << Slot::CLASS_SHIFT | marks | small));
    }

    /// Counts one reference from guest data to each of `clusters`.
    pub(super) fn add_data(&mut self, clusters: Range<u64>) {
        for (number, range) in parts(&clusters) {
            let whole = range.len() == CHUNK;
            let added = !self.stored_known
                && match self.chunks.entry(number) {
                    Entry::Vacant(place) if whole => {
                        place.insert(Chunk::Uniform(Slot::PLAIN));
                        true
                    }
                    Entry::Vacant(place) if range.len() > FEW_MAX / 2 => {
                        let mut plain = Box::new(Plain::new(&[]));
                        let added = plain.add_all(&range);
                        place.insert(Chunk::Plain(plain));
                        added
                    }
                    Entry::Vacant(_) => false,
                    Entry::Occupied(mut chunk) => chunk.get_mut().add_plain(&range),
                };
            if added {
                self.highest = self.highest.max(1);
            } else {
                let first = number << CHUNK_BITS;
                (range.start..range.end).for_each(|index| self.add(first + index as u64, 1, Class::Data));
            }
        }
    }

    /// Of the chunk that starts with the cluster `first`: those clusters that are referred to once; none if one of them is referred to
    /// more often.
    pub(super) fn ones(&self, first: u64) -> Option<Bits> {
        let (number, index) = split(first);
        if index != 0 {
            return None;
        }
        self.chunks.get(&number).map_or(Some([0; CHUNK / WORD]), Chunk::ones)
    }

    /// Counts one more reference to each of `clusters`: whole chunks of which nothing was known cost next to nothing.
    pub(super) fn add_range(&mut self, clusters: Range<u64>, class: Class) {
        let mut at = clusters.start;
        while at < clusters.end {
            let (chunk, index) = split(at);
            if index == 0 && clusters.end - at >= CHUNK as u64 && !self.chunks.contains_key(&chunk) {
                self.chunks.insert(chunk, Chunk::Uniform(Slot((class as u16) << Slot::CLASS_SHIFT | 1)));
                self.highest = self.highest.max(1);
                at += CHUNK as u64;
            } else {
                self.add(at, 1, class);
                at += 1;
            }
        }
    }

    fn count_of(&self, cluster: u64, slot: Slot) -> u64 {
        match slot.count() {
            Slot::LARGE => self.large.get(&cluster).copied().unwrap_or(u64::from(Slot::LARGE)),
            small => small.into(),
        }
    }

    /// The highest count of all.
    pub(super) const fn highest(&self) -> u64 {
        self.highest
    }

    /// How often a cluster is referred to.
    pub(super) fn count(&self, cluster: u64) -> u64 {
        self.count_of(cluster, self.slot(cluster))
    }

    /// How many L1 entries name the cluster as an L2 table.
    pub(super) fn l2_count(&self, cluster: u64) -> u64 {
        match self.overlaps.get(&cluster) {
            Some(overlap) => overlap.l2,
            None => self.count(cluster),
        }
    }

    /// The first cluster from `from` on that is referred to.
    pub(super) fn next_used(&self, from: u64) -> Option<u64> {
        self.next(from, |slot| slot.count() > 0)
    }

    /// The first L2 table from `from` on.
    pub(super) fn next_l2(&self, from: u64) -> Option<u64> {
        self.next(from, |slot| slot.class() == Class::L2 as u16)
    }

    fn next(&self, from: u64, wanted: impl Fn(Slot) -> bool) -> Option<u64> {
        let (first, index) = split(from);
        self.chunks.range(first..).find_map(|(&number, chunk)| {
            let from = if number == first { index } else { 0 };
            chunk.next(from, &wanted).map(|index| number << CHUNK_BITS | u64::from(index))
        })
    }

    /// Whether nothing in `clusters` is referred to.
    pub(super) fn is_free(&self, clusters: Range<u64>) -> bool {
        self.next_used(clusters.start).is_none_or(|used| used >= clusters.end)
    }

    /// Marks a cluster as seen; whether it had not been.
    pub(super) fn visit(&mut self, cluster: u64) -> bool {
        let slot = self.slot(cluster);
        if slot.0 & Slot::VISITED == 0 {
            self.set_slot(cluster, Slot(slot.0 | Slot::VISITED));
        }
        slot.0 & Slot::VISITED == 0
    }

    /// From now on the image's own counts are remembered: one where a cluster is referred to once, until something else is said.
    pub(super) fn know_stored(&mut self) {
        self.stored_known = true;
    }

    /// Remembers whether the image's own count of a cluster is exactly one.
    pub(super) fn set_stored_one(&mut self, cluster: u64, one: bool) {
        let slot = self.slot(cluster);
        let odd = one != (slot.count() == 1);
        let with = if odd { slot.0 | Slot::ODD } else { slot.0 & !Slot::ODD };
        if with != slot.0 {
            self.set_slot(cluster, Slot(with));
        }
    }

    const fn has_stored_one(&self, slot: Slot) -> bool {
        self.stored_known && (slot.count() == 1) != (slot.0 & Slot::ODD != 0)
    }

    /// Whether the image's own count of a cluster is known to be exactly one.
    pub(super) fn is_stored_one(&self, cluster: u64) -> bool {
        self.has_stored_one(self.slot(cluster))
    }

    /// The same of each of `clusters`.
    pub(super) fn are_stored_one(&self, clusters: Range<u64>) -> bool {
        parts(&clusters).all(|(number, range)| match self.chunks.get(&number) {
            Some(Chunk::Plain(plain)) if plain.has_all(&range) => self.stored_known,
            Some(Chunk::Uniform(slot)) => self.has_stored_one(*slot),
            Some(_) => range.into_iter().all(|index| self.is_stored_one(number << CHUNK_BITS | index as u64)),
            None => false,
        })
    }

    /// Whether guest data refers to the cluster, and nothing else.
    pub(super) fn is_data(&self, cluster: u64) -> bool {
        self.slot(cluster).class() == Class::Data as u16
    }

    /// What claims a cluster that cannot be shared, if several do.
    pub(super) fn overlap(&self, cluster: u64) -> Option<Overlap> {
        self.overlaps.get(&cluster).copied()
    }

    /// All clusters that several structures claim.
    pub(super) fn overlaps(&self) -> impl Iterator<Item = (u64, Overlap)> {
        self.overlaps.iter().map(|(&cluster, &overlap)| (cluster, overlap))
    }

    /// About how much memory this takes.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let chunks: usize = self.chunks.values().map(Chunk::bytes).sum();
        // A B-tree's nodes are two thirds full or so, a hash table half.
        chunks + self.chunks.len() * 48 + self.large.len() * 36 + self.overlaps.len() * 40
    }
}

#[cfg(test)]
#[path = "refs_test.rs"]
mod tests;
