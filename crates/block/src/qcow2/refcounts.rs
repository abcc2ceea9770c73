//! Refcounts in memory, and the allocator on them.
//!
//! It works on the blocks that are there and says which one it [needs](Need) otherwise; it does no I/O and knows no locks (the
//! image's metadata lock holds it). What it changed is collected, in disk order, by the commit ([`super::commit`]).
//!
//! A cluster whose count falls to zero is *quarantined*: it is given out again only once [`release`](Refcounts::release) says that
//! its punch is done. (Sharp edge 31.)

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;

use cowhand_qcow2::{FormatError, Geometry, HostOffset, RefTableEntry, refcount};

use super::layout::Layout;
use crate::sync::Arc;

/// Why an allocation or a count cannot be done yet.
#[derive(Debug)]
pub(super) enum Need {
    /// This refcount block has to be loaded from here.
    Block(u64, HostOffset),
    /// The refcount table has to grow to have an entry of this index.
    Table(u64),
    /// The file would have to grow, and cannot.
    Space,
    /// The reference that is to be taken off this cluster is not counted.
    Underflow(u64),
    /// The image breaks a rule.
    Format(FormatError),
}

impl From<FormatError> for Need {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}

struct Block {
    bytes: Box<[u8]>,
    /// The bytes changed since they were last written, and when last.
    dirty: Option<(Range<usize>, u64)>,
    /// A clock for eviction.
    used: u64,
}

/// Clusters given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// The first one.
    pub(super) host: HostOffset,
    /// How many.
    pub(super) clusters: u64,
    /// Whether the host file holds nothing but zeros there.
    pub(super) zeroed: bool,
}

impl Extent {
    /// What is left of it behind its first `clusters` (at most all).
    pub(super) fn without_first(self, geometry: &Geometry, clusters: u64) -> Self {
        let skipped = clusters.min(self.clusters);
        let host = HostOffset::new(self.host.get() + (skipped << geometry.cluster_bits.bits()));
        Self { host, clusters: self.clusters - skipped, ..self }
    }
}

/// What the commit writes of the refcounts.
#[derive(Debug, Default)]
pub(super) struct RefcountWrites {
    /// Bytes of refcount blocks, by place in the file; with the block's index and the moment of the change.
    pub(super) blocks: Vec<(HostOffset, Vec<u8>, u64, u64)>,
    /// Refcount table entries that name new blocks.
    pub(super) table: BTreeMap<u64, HostOffset>,
}

/// The refcounts.
pub(super) struct Refcounts {
    geometry: Geometry,
    table_offset: HostOffset,
    table: Vec<RefTableEntry>,
    blocks: BTreeMap<u64, Block>,
    /// Blocks that the table on disk does not name yet.
    unnamed: BTreeSet<u64>,
    quarantine: HashSet<u64>,
    /// No cluster below is free.
    hint: u64,
    /// Every cluster from here on is zero in the file: past its end, and never given out.
    fresh: u64,
    /// Clusters that are never given out whatever their count says.
    reserved: Arc<Layout>,
    /// The places of refcount blocks, never given out either.
    block_places: HashSet<u64>,
    /// Clusters that are not to be given out for now.
    held: Range<u64>,
    /// What a journal names, in ascending order: in use, whatever the counts say.
    named: Vec<Range<u64>>,
    /// The file cannot grow past this many clusters.
    limit: u64,
    max_blocks: usize,
    clock: u64,
    /// Where the last compressed cluster ended, within a host cluster: the next one may follow.
    packed_end: Option<HostOffset>,
}

/// The first cluster index that no entry can name.
const CLUSTER_END: u64 = 1 << 56;

impl Refcounts {
    /// Refcounts described by `table` (at `table_offset`), of a file that ends at cluster `file_clusters` and (a block device)
    /// cannot grow past `limit` bytes; what is `reserved` is never given out. About `budget` bytes of blocks are held.
    pub(super) fn new(
        geometry: Geometry,
        table_offset: HostOffset,
        table: Vec<RefTableEntry>,
        file_clusters: u64,
        limit: Option<u64>,
        reserved: Arc<Layout>,
        budget: u64,
    ) -> Self {
        let bits = geometry.cluster_bits;
        let block_places = table.iter().filter(|e| e.raw() != 0).map(|e| bits.index_of(e.raw())).collect();
        Self {
            geometry,
            table_offset,
            table,
            blocks: BTreeMap::new(),
            unnamed: BTreeSet::new(),
            quarantine: HashSet::new(),
            hint: 1,
            fresh: file_clusters,
            reserved,
            block_places,
            held: 0..0,
            named: Vec::new(),
            limit: limit.map_or(CLUSTER_END >> bits.bits(), |bytes| bytes >> bits.bits()),
            max_blocks: usize::try_from(budget >> bits.bits()).unwrap_or(usize::MAX).max(4),
            clock: 0,
            packed_end: None,
        }
    }

    pub(super) fn table(&self) -> (HostOffset, &[RefTableEntry]) {
        (self.table_offset, &self.table)
    }

    fn split(&self, cluster: u64) -> (u64, usize) {
        let entries = self.geometry.refcount_block_entries();
        (cluster / entries, (cluster % entries) as usize)
    }

    /// Whether a block is in memory.
    pub(super) fn is_loaded(&self, index: u64) -> bool {
        self.blocks.contains_key(&index)
    }

    /// Takes a block that was read. Clean blocks make room for it when there are too many.
    pub(super) fn loaded(&mut self, index: u64, bytes: &[u8]) {
        while self.blocks.len() >= self.max_blocks {
            let oldest = self.blocks.iter().filter(|(_, b)| b.dirty.is_none()).min_by_key(|(_, b)| b.used);
            let Some((&oldest, _)) = oldest else { break };
            self.blocks.remove(&oldest);
        }
        self.clock += 1;
        let used = self.clock;
        self.blocks.entry(index).or_insert_with(|| Block { bytes: bytes.into(), dirty: None, used });
    }

    /// Whether so many blocks are dirty that a commit is due.
    pub(super) fn crowded(&self) -> bool {
        self.blocks.len() >= self.max_blocks && self.blocks.values().all(|b| b.dirty.is_some())
    }

    /// The block with this index, if its place is known and it is loaded; None where there is none, so that all its counts are zero.
    fn block(&mut self, index: u64) -> Result<Option<&mut Block>, Need> {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i)).copied().unwrap_or_default();
        let Some(offset) = entry.offset(&self.geometry)? else { return Ok(None) };
        self.clock += 1;
        match self.blocks.get_mut(&index) {
            Some(block) => {
                block.used = self.clock;
                Ok(Some(block))
            }
            None => Err(Need::Block(index, offset)),
        }
    }

    /// The count of a cluster.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64, Need> {
        let order = self.geometry.refcount_order;
        let (index, entry) = self.split(cluster);
        match self.block(index)? {
            None => Ok(0),
            Some(block) => Ok(refcount::get(order, &block.bytes, entry)?),
        }
    }

    fn put(&mut self, cluster: u64, count: u64, now: u64) -> Result<(), Need> {
        let order = self.geometry.refcount_order;
        let (index, entry) = self.split(cluster);
        let Some(block) = self.block(index)? else { return Err(Need::Table(index)) };
        refcount::set(order, &mut block.bytes, entry, count)?;
        let at = (entry << order) / 8;
        // Written in sectors, so that a torn write cannot mix old and new within one count.
        let changed = at / 512 * 512..(at / 512 + 1) * 512;
        block.dirty = Some(match block.dirty.take() {
            None => (changed, now),
            Some((old, _)) => (old.start.min(changed.start)..old.end.max(changed.end), now),
        });
        Ok(())
    }

    /// Whether a cluster may be given out.
    pub(super) fn is_free(&mut self, cluster: u64) -> Result<bool, Need> {
        let kept = self.quarantine.contains(&cluster)
            || self.block_places.contains(&cluster)
            || self.held.contains(&cluster)
            || self.reserved.contains(cluster)
            || self.is_named(cluster);
        if kept {
            return Ok(false);
        }
        Ok(self.get(cluster)? == 0)
    }

    /// Gives out up to `wanted` clusters that lie together, each with a count of one from now on.
    pub(super) fn allocate(&mut self, wanted: u64, now: u64) -> Result<Extent, Need> {
        // The hint moves with the search, so that one that stops to load a block goes on from there: with few blocks in memory,
        // starting again would need the first ones again, for ever.
        while !self.is_free(self.hint)? {
            self.hint += 1;
        }
        let first = self.hint;
        self.check_countable(first)?;
        let mut clusters = 0;
        let mut uncounted = None;
        while clusters < wanted && first + clusters < self.limit {
            let cluster = first + clusters;
            let (index, _) = self.split(cluster);
            // Beyond the first cluster, whatever would need I/O or a second new block ends the extent.
            let countable =
                uncounted.is_none_or(|uncounted| uncounted == index) && self.check_countable(cluster).is_ok();
            if !countable || !matches!(self.is_free(cluster), Ok(true)) {
                break;
            }
            if !self.has_block(index) {
                uncounted = Some(index);
            }
            clusters += 1;
        }
        if clusters == 0 {
            return Err(Need::Space);
        }
        let zeroed = first >= self.fresh;
        if let Some(index) = uncounted {
            // The block lies behind the extent, which so stays in one piece; or else it takes the extent's last cluster.
            let behind = first + clusters;
            let has_room =
                self.split(behind).0 == index && behind < self.limit && matches!(self.is_free(behind), Ok(true));
            clusters -= u64::from(!has_room);
            self.make_block(index, first + clusters, now)?;
        }
        self.hint = first + clusters;
        if clusters == 0 {
            return self.allocate(wanted, now);
        }
        (first..first + clusters).try_for_each(|cluster| self.put(cluster, 1, now))?;
        self.fresh = self.fresh.max(first + clusters);
        Ok(Extent { host: HostOffset::new(first << self.geometry.cluster_bits.bits()), clusters, zeroed })
    }

    /// Gives out `len` bytes (1 to a cluster) for a compressed cluster, with a reference more to each cluster that they touch: behind
    /// the last ones as long as that cluster's count has room for a reference more, else in new clusters. (Sharp edges 23 and 26.)
    pub(super) fn allocate_bytes(&mut self, len: u64, now: u64) -> Result<HostOffset, Need> {
        let bits = self.geometry.cluster_bits;
        let host = match self.follow_packed(len, now)? {
            Some(host) => host,
            None => self.allocate(1, now)?.host,
        };
        let end = host.get() + len;
        self.packed_end = (bits.offset_in(end) != 0).then_some(HostOffset::new(end));
        Ok(host)
    }

    /// Whether what was packed last ends within a cluster.
    pub(super) fn ends_packed(&self) -> bool {
        self.packed_end.is_some()
    }

    /// The place behind what was packed last, if there is room for `len` bytes more.
    fn follow_packed(&mut self, len: u64, now: u64) -> Result<Option<HostOffset>, Need> {
        let Some(end) = self.packed_end else { return Ok(None) };
        let bits = self.geometry.cluster_bits;
        let cluster = bits.index_of(end.get());
        if self.get(cluster)? >= refcount::max(self.geometry.refcount_order) {
            return Ok(None);
        }
        if bits.offset_in(end.get()) + len > bits.size() {
            let next = cluster + 1;
            let countable = next < self.limit && self.has_block(self.split(next).0);
            if !countable || !self.is_free(next)? {
                return Ok(None);
            }
            self.put(next, 1, now)?;
            self.fresh = self.fresh.max(next + 1);
        }
        self.reference(cluster, now)?;
        Ok(Some(end))
    }

    /// The first cluster that may be free.
    pub(super) fn hint(&self) -> u64 {
        self.hint
    }

    /// The first cluster that the file cannot grow to.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// These clusters, which are free, are not given out until others (or none) are held; they may be written to.
    pub(super) fn hold(&mut self, clusters: Range<u64>) {
        self.fresh = self.fresh.max(clusters.end);
        self.held = clusters;
    }

    /// These clusters, ranges in ascending order that do not overlap, are never given out from now on.
    pub(super) fn name(&mut self, clusters: Vec<Range<u64>>) {
        self.named = clusters;
    }

    fn is_named(&self, cluster: u64) -> bool {
        let at = self.named.partition_point(|range| range.end <= cluster);
        self.named.get(at).is_some_and(|range| range.start <= cluster)
    }

    /// Sees to it that a cluster has so many references at least. There is a block that counts it.
    pub(super) fn raise(&mut self, cluster: u64, references: u64, now: u64) -> Result<(), Need> {
        if self.get(cluster)? == 0 && references > 0 {
            self.put(cluster, 1, now)?;
        }
        while self.get(cluster)? < references {
            self.reference(cluster, now)?;
        }
        Ok(())
    }

    /// A held cluster has one reference from now on.
    pub(super) fn take(&mut self, cluster: u64, now: u64) -> Result<(), Need> {
        self.put(cluster, 1, now)
    }

    /// Whether the table names a block of this index, in memory at least.
    pub(super) fn has_block(&self, index: u64) -> bool {
        usize::try_from(index).ok().and_then(|i| self.table.get(i)).is_some_and(|e| e.raw() != 0)
    }

    /// Makes the block of this index (which the table has room for), in a cluster that was given out.
    pub(super) fn add_block(&mut self, index: u64, place: HostOffset, now: u64) -> Result<(), FormatError> {
        let entry = RefTableEntry::new(place)?;
        if let Some(slot) = usize::try_from(index).ok().and_then(|i| self.table.get_mut(i)) {
            *slot = entry;
            self.block_places.insert(self.geometry.cluster_bits.index_of(place.get()));
            self.unnamed.insert(index);
            self.add_new_block(index, now);
        }
        Ok(())
    }

    /// Whether there is a block that counts `cluster`, or can be.
    fn check_countable(&self, cluster: u64) -> Result<(), Need> {
        let (index, _) = self.split(cluster);
        let in_table = usize::try_from(index).is_ok_and(|slot| slot < self.table.len());
        match cluster < self.limit {
            true if !in_table => Err(Need::Table(index)),
            false if !self.has_block(index) => Err(Need::Space),
            _ => Ok(()),
        }
    }

    /// Makes a block in a cluster that it counts itself: a free one, which nothing that it counts is before that.
    fn make_block(&mut self, index: u64, place: u64, now: u64) -> Result<(), Need> {
        let offset = HostOffset::new(place << self.geometry.cluster_bits.bits());
        self.add_block(index, offset, now)?;
        self.put(place, 1, now)?;
        self.fresh = self.fresh.max(place + 1);
        Ok(())
    }

    /// A block of zeros that is written whole.
    fn add_new_block(&mut self, index: u64, now: u64) {
        let len = self.geometry.cluster_bits.size() as usize;
        self.clock += 1;
        let block = Block { bytes: vec![0; len].into(), dirty: Some((0..len, now)), used: self.clock };
        self.blocks.insert(index, block);
    }

    /// The cluster of a block that counts nothing, but perhaps itself; None if there is no such block, if it does count something, or
    /// if its cluster belongs to others too.
    pub(super) fn unused_block(&mut self, index: u64) -> Result<Option<u64>, Need> {
        let order = self.geometry.refcount_order;
        let Some(entry) = usize::try_from(index).ok().and_then(|slot| self.table.get(slot)) else { return Ok(None) };
        let Some(offset) = entry.offset(&self.geometry)? else { return Ok(None) };
        let place = self.geometry.cluster_bits.index_of(offset.get());
        let (counted_by, own) = self.split(place);
        let Some(block) = self.block(index)? else { return Ok(None) };
        if block.dirty.is_some() {
            return Ok(None);
        }
        let mut rest = block.bytes.clone();
        if counted_by == index {
            refcount::set(order, &mut rest, own, 0)?;
        }
        let unused = rest.iter().all(|&byte| byte == 0) && self.get(place)? == 1;
        Ok(unused.then_some(place))
    }

    /// The table in the file names this block, of which [`unused_block`](Self::unused_block) has told, no more, durably. The
    /// index of the block that counts its cluster; None if it did so itself: then the cluster is quarantined.
    pub(super) fn forget_block(&mut self, index: u64, place: u64) -> Option<u64> {
        if let Some(entry) = usize::try_from(index).ok().and_then(|slot| self.table.get_mut(slot)) {
            *entry = RefTableEntry::default();
        }
        self.blocks.remove(&index);
        self.block_places.remove(&place);
        let (counted_by, _) = self.split(place);
        if counted_by == index {
            self.quarantine.insert(place);
        }
        (counted_by != index).then_some(counted_by)
    }

    /// Adds a reference to a cluster that is in use.
    pub(super) fn reference(&mut self, cluster: u64, now: u64) -> Result<(), Need> {
        let count = self.get(cluster)?;
        if count == 0 {
            return Err(Need::Underflow(cluster));
        }
        let order = self.geometry.refcount_order;
        let full = FormatError::RefcountOverflow {
            value: count,
            bits: self.geometry.refcount_bits(),
            max: refcount::max(order),
        };
        let more = count.checked_add(1).filter(|more| *more <= refcount::max(order)).ok_or(full)?;
        self.put(cluster, more, now)
    }

    /// Takes one reference off a cluster. Whether that was the last one: then the cluster is quarantined.
    pub(super) fn unref(&mut self, cluster: u64, now: u64) -> Result<bool, Need> {
        let count = self.get(cluster)?;
        let less = count.checked_sub(1).ok_or(Need::Underflow(cluster))?;
        self.put(cluster, less, now)?;
        if less == 0 {
            self.quarantine.insert(cluster);
            // What it is used for next has nothing to do with what was packed there.
            self.packed_end.take_if(|end| self.geometry.cluster_bits.index_of(end.get()) == cluster);
        }
        Ok(less == 0)
    }

    /// The quarantined cluster can be given out again.
    pub(super) fn release(&mut self, cluster: u64) {
        if self.quarantine.remove(&cluster) {
            self.hint = self.hint.min(cluster);
        }
    }

    /// Whether anything waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.unnamed.is_empty() || self.blocks.values().any(|b| b.dirty.is_some())
    }

    /// Whether there are blocks that the table in the file does not name yet.
    pub(super) fn has_unnamed(&self) -> bool {
        !self.unnamed.is_empty()
    }

    /// Copies what is to be written. Nothing is clean until [`written`](Self::written) says so.
    pub(super) fn collect(&self) -> RefcountWrites {
        let mut writes = RefcountWrites::default();
        for (&index, block) in &self.blocks {
            let Some((range, when)) = &block.dirty else { continue };
            let place = self.table.get(index as usize).map_or(0, |e| e.raw());
            // A block not yet named is written whole, so that no old bytes are exposed.
            let range = if self.unnamed.contains(&index) { 0..block.bytes.len() } else { range.clone() };
            let at = HostOffset::new(place + range.start as u64);
            writes.blocks.push((at, block.bytes[range].to_vec(), index, *when));
        }
        for &index in &self.unnamed {
            writes.table.insert(index, HostOffset::new(self.table.get(index as usize).map_or(0, |e| e.raw())));
        }
        writes
    }

    /// What was collected has been written.
    pub(super) fn written(&mut self, writes: &RefcountWrites) {
        for (_, _, index, when) in &writes.blocks {
            if let Some(block) = self.blocks.get_mut(index)
                && block.dirty.as_ref().is_some_and(|(_, at)| at == when)
            {
                block.dirty = None;
            }
        }
    }

    /// The refcount table on disk names these blocks now.
    pub(super) fn named(&mut self, writes: &RefcountWrites) {
        for index in writes.table.keys() {
            self.unnamed.remove(index);
        }
    }

    /// Plans a larger refcount table that has an entry `index`: where it goes, together with the new blocks that count it.
    /// Nothing is changed yet, but the place is taken: should the growth fail, the file holds part of it there, or even a header
    /// that names it, and neither another growth nor guest data that counts on zeros may go there.
    pub(super) fn plan_growth(&mut self, index: u64) -> Result<Growth, Need> {
        let bits = self.geometry.cluster_bits;
        let per_block = self.geometry.refcount_block_entries();
        // The first cluster that no block can count yet: nothing is in use there.
        let first = (self.table.len() as u64).checked_mul(per_block).ok_or(Need::Space)?.max(self.fresh);
        let wanted = (index + 1).max(self.table.len() as u64 * 3 / 2);
        let mut table_clusters = bits.clusters_for(wanted.max(first / per_block + 1) * 8);
        loop {
            // The blocks count themselves too.
            let blocks_for = |blocks: u64| (first + blocks + table_clusters - 1) / per_block + 1 - first / per_block;
            let mut blocks = 1;
            while blocks < blocks_for(blocks) {
                blocks = blocks_for(blocks);
            }
            let total = blocks + table_clusters;
            let first_block = first / per_block;
            let entries = bits.size() / 8 * table_clusters;
            if first_block + blocks > entries {
                table_clusters += 1;
                continue;
            }
            if bits.size() * table_clusters > cowhand_qcow2::limits::REFCOUNT_TABLE_BYTES_MAX
                || first + total > self.limit
            {
                return Err(Need::Space);
            }
            self.fresh = self.fresh.max(first + total);
            return Ok(Growth { first, table_clusters, blocks: first_block..first_block + blocks });
        }
    }

    /// The new table's content, and the blocks that count it and themselves, ready to be written.
    pub(super) fn build_growth(&self, growth: &Growth) -> Result<Grown, Need> {
        let bits = self.geometry.cluster_bits;
        let per_block = self.geometry.refcount_block_entries();
        let order = self.geometry.refcount_order;
        let mut table = self.table.clone();
        table.resize((bits.size() / 8 * growth.table_clusters) as usize, RefTableEntry::default());
        let count = growth.blocks.end - growth.blocks.start;
        let used = growth.first..growth.first + count + growth.table_clusters;
        let mut blocks = Vec::new();
        for (i, index) in growth.blocks.clone().enumerate() {
            let place = growth.first + i as u64;
            if table[index as usize].raw() != 0 {
                return Err(Need::Space);
            }
            table[index as usize] = RefTableEntry::new(HostOffset::new(place << bits.bits()))?;
            let mut bytes = vec![0; bits.size() as usize];
            for cluster in used.clone().filter(|c| c / per_block == index) {
                refcount::set(order, &mut bytes, (cluster % per_block) as usize, 1)?;
            }
            blocks.push((index, place, bytes));
        }
        let offset = HostOffset::new((growth.first + count) << bits.bits());
        Ok(Grown { table, blocks, offset })
    }

    /// The header names the new table: it holds from now on. Returns the clusters of the old one, whose references are to be taken off.
    pub(super) fn grown(&mut self, grown: Grown) -> Range<u64> {
        let bits = self.geometry.cluster_bits;
        let old_first = bits.index_of(self.table_offset.get());
        let old = old_first..old_first + bits.clusters_for(self.table.len() as u64 * 8);
        for (index, place, bytes) in &grown.blocks {
            self.block_places.insert(*place);
            self.loaded(*index, bytes);
        }
        self.table = grown.table;
        self.table_offset = grown.offset;
        old
    }
}

/// Where a larger refcount table goes.
#[derive(Debug)]
pub(super) struct Growth {
    first: u64,
    table_clusters: u64,
    blocks: Range<u64>,
}

/// A larger refcount table.
pub(super) struct Grown {
    /// Its entries.
    pub(super) table: Vec<RefTableEntry>,
    /// Index, cluster and content of the new blocks.
    pub(super) blocks: Vec<(u64, u64, Vec<u8>)>,
    /// Where it goes.
    pub(super) offset: HostOffset,
}

#[cfg(test)]
#[path = "refcounts_test.rs"]
mod tests;
