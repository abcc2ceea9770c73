//! How often each host cluster is referred to, and by what: found by walking the metadata, kept in little memory.
//!
//! Counts stand in chunks of 4096 clusters. A chunk with few counts keeps them in a list, so that references that a hostile
//! image strews over a huge sparse file cost some 45 bytes each, a few times what they take in the file; a chunk in ordinary
//! use costs two bytes to a cluster.

use std::collections::{BTreeMap, HashMap};

const CHUNK_BITS: u32 = 12;
const CHUNK: usize = 1 << CHUNK_BITS;
/// With more counts than this a chunk is kept as an array.
const FEW_MAX: usize = 512;

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
    const STORED_ONE: u16 = 1 << 11;
    const VISITED: u16 = 1 << 12;
    const CLASS_SHIFT: u32 = 13;

    const fn class(self) -> u16 {
        self.0 >> Self::CLASS_SHIFT
    }

    const fn count(self) -> u16 {
        self.0 & Self::COUNT
    }
}

#[derive(Debug)]
enum Chunk {
    /// All the same.
    Uniform(Slot),
    One(u16, Slot),
    /// By ascending index.
    Few(Vec<(u16, Slot)>),
    Many(Box<[Slot; CHUNK]>),
}

impl Chunk {
    fn get(&self, index: u16) -> Slot {
        match self {
            Self::Uniform(slot) => *slot,
            Self::One(at, slot) if *at == index => *slot,
            Self::One(..) => Slot::default(),
            Self::Few(list) => match list.binary_search_by_key(&index, |(at, _)| *at) {
                Ok(at) => list.get(at).map_or(Slot::default(), |(_, slot)| *slot),
                Err(_) => Slot::default(),
            },
            Self::Many(slots) => slots.get(usize::from(index)).copied().unwrap_or_default(),
        }
    }

    fn set(&mut self, index: u16, slot: Slot) {
        match self {
            Self::Uniform(same) if *same == slot => {}
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
                    let mut slots = Box::new([Slot::default(); CHUNK]);
                    for (at, slot) in list.iter().copied().chain([(index, slot)]) {
                        if let Some(place) = slots.get_mut(usize::from(at)) {
                            *place = slot;
                        }
                    }
                    *self = Self::Many(slots);
                }
            },
            Self::Many(slots) => {
                if let Some(place) = slots.get_mut(usize::from(index)) {
                    *place = slot;
                }
            }
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
            Self::Many(slots) => {
                let at = slots.get(usize::from(from)..)?.iter().position(|slot| wanted(*slot))?;
                u16::try_from(usize::from(from) + at).ok()
            }
        }
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        match self {
            Self::One(..) | Self::Uniform(_) => 0,
            Self::Few(list) => list.capacity() * size_of::<(u16, Slot)>(),
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
}

const fn split(cluster: u64) -> (u64, u16) {
    (cluster >> CHUNK_BITS, (cluster & (CHUNK as u64 - 1)) as u16)
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
        let marks = slot.0 & (Slot::STORED_ONE | Slot::VISITED);
        self.set_slot(cluster, Slot(class << Slot::CLASS_SHIFT | marks | small));
    }

    /// Counts one more reference to each of `clusters`: whole chunks of which nothing was known cost next to nothing.
    pub(super) fn add_range(&mut self, clusters: std::ops::Range<u64>, class: Class) {
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
    pub(super) fn is_free(&self, clusters: std::ops::Range<u64>) -> bool {
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

    /// Remembers whether the image's own count of a cluster is exactly one.
    pub(super) fn set_stored_one(&mut self, cluster: u64, one: bool) {
        let slot = self.slot(cluster);
        let with = if one { slot.0 | Slot::STORED_ONE } else { slot.0 & !Slot::STORED_ONE };
        if with != slot.0 {
            self.set_slot(cluster, Slot(with));
        }
    }

    /// Whether the image's own count of a cluster is exactly one.
    pub(super) fn is_stored_one(&self, cluster: u64) -> bool {
        self.slot(cluster).0 & Slot::STORED_ONE != 0
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
