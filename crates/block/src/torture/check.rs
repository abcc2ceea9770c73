//! Whether an image is sound, and what its snapshots hold, told from its bytes alone: written against the specification, sharing nothing
//! with the engine but the format's types.

use std::collections::BTreeMap;
use std::io::Read;

use cowhand_qcow2::{
    CompressedRange, Compression, Geometry, GuestOffset, Header, HostOffset, L1Entry, L2Entry, L2Kind, RefTableEntry,
    Snapshot, Subcluster, SubclusterBitmap, refcount,
};

/// The errors that lose data. Leaked clusters are none.
pub(super) fn check(image: &[u8]) -> Result<(), String> {
    check_shared(image, &[]).map(drop)
}

/// The same for an image some of whose clusters have a reference more, from elsewhere. How many compressed clusters it has.
pub(super) fn check_shared(image: &[u8], shared: &[u64]) -> Result<u64, String> {
    Look::new(image)?.check(shared)
}

/// How many clusters of a sound image are counted more often than they are referred to.
pub(super) fn leaks(image: &[u8]) -> Result<u64, String> {
    let look = Look::new(image)?;
    look.check(&[])?;
    let (references, blocks) = look.references(&[])?;
    let clusters = look.geometry.cluster_bits.clusters_for(image.len() as u64);
    let per_block = look.geometry.refcount_block_entries();
    let end = blocks.keys().next_back().map_or(0, |index| (index + 1) * per_block).min(clusters);
    let mut leaks = 0;
    for cluster in 0..end {
        let used = references.counts.get(&cluster).copied().unwrap_or(0);
        leaks += u64::from(look.counted(&blocks, cluster)? > used);
    }
    Ok(leaks)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// An image's bytes.
pub(super) struct Look<'a> {
    image: &'a [u8],
    pub(super) header: Header,
    geometry: Geometry,
}

/// What refers to which host cluster, and how often.
#[derive(Default)]
struct References {
    counts: BTreeMap<u64, u64>,
    /// Those that say that they are the only one.
    exclusive: Vec<(u64, String)>,
    /// The disk's compressed clusters.
    compressed: u64,
}

impl References {
    fn add(&mut self, geometry: &Geometry, host: u64, len: u64) {
        let bits = geometry.cluster_bits;
        if len > 0 {
            for index in bits.index_of(host)..=bits.index_of(host + len - 1) {
                *self.counts.entry(index).or_default() += 1;
            }
        }
    }
}

impl<'a> Look<'a> {
    pub(super) fn new(image: &'a [u8]) -> Result<Self, String> {
        let header = Header::parse(image, image.len() as u64).map_err(text)?;
        let geometry = header.geometry();
        Ok(Self { image, header, geometry })
    }

    fn number(&self, at: u64) -> u64 {
        let at = at as usize;
        let found = self.image.get(at..at + 8).unwrap_or(&[0; 8]);
        found.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    pub(super) fn snapshots(&self) -> Result<Vec<Snapshot>, String> {
        self.snapshot_table().map(|(snapshots, _)| snapshots)
    }

    fn snapshot_table(&self) -> Result<(Vec<Snapshot>, u64), String> {
        let bytes = self.image.get(self.header.snapshots_offset.get() as usize..).unwrap_or_default();
        let parsed = Snapshot::parse_table(bytes, self.header.snapshot_count, &self.geometry);
        parsed.map(|(snapshots, len)| (snapshots, len as u64)).map_err(text)
    }

    /// How many compressed clusters a sound image has.
    fn check(&self, shared: &[u64]) -> Result<u64, String> {
        let (references, blocks) = self.references(shared)?;
        for (&index, &used) in &references.counts {
            let counted = self.counted(&blocks, index)?;
            if counted < used {
                return Err(format!("cluster {index:#x} has refcount {counted}, but {used} references"));
            }
        }
        for (index, what) in references.exclusive {
            let used = references.counts[&index];
            if used != 1 {
                return Err(format!("cluster {index:#x} ({what}) is marked COPIED with {used} references"));
            }
        }
        Ok(references.compressed)
    }

    /// What refers to which cluster, and where the refcount blocks are.
    fn references(&self, shared: &[u64]) -> Result<(References, BTreeMap<u64, u64>), String> {
        let (header, bits) = (&self.header, self.geometry.cluster_bits);
        let mut references = References::default();
        references.add(&self.geometry, 0, 1);
        shared.iter().for_each(|&cluster| references.add(&self.geometry, cluster << bits.bits(), 1));
        let table = header.refcount_table_offset.get();
        let table_len = u64::from(header.refcount_table_clusters) * bits.size();
        references.add(&self.geometry, table, table_len);
        let mut blocks = BTreeMap::new();
        for index in 0..table_len / 8 {
            let entry = RefTableEntry::from_raw(self.number(table + index * 8)).offset(&self.geometry).map_err(text)?;
            if let Some(block) = entry {
                references.add(&self.geometry, block.get(), bits.size());
                blocks.insert(index, block.get());
            }
        }
        self.count_tree("the disk", header.l1_table_offset, header.l1_size, &mut references, true)?;
        let (snapshots, len) = self.snapshot_table()?;
        references.add(&self.geometry, header.snapshots_offset.get(), len);
        for snapshot in snapshots {
            let what = format!("snapshot {}", String::from_utf8_lossy(&snapshot.id));
            self.count_tree(&what, snapshot.l1_table_offset, snapshot.l1_size, &mut references, false)?;
        }
        for (offset, len) in super::bitmaps::places(self.image, header)? {
            references.add(&self.geometry, offset, len);
        }
        Ok((references, blocks))
    }

    fn counted(&self, blocks: &BTreeMap<u64, u64>, index: u64) -> Result<u64, String> {
        let per_block = self.geometry.refcount_block_entries();
        let Some(&block) = blocks.get(&(index / per_block)) else { return Ok(0) };
        let (block, len) = (block as usize, self.geometry.cluster_bits.size() as usize);
        let bytes = self.image.get(block..block + len).ok_or("a refcount block past the end of the file")?;
        refcount::get(self.geometry.refcount_order, bytes, (index % per_block) as usize).map_err(text)
    }

    fn l2_table(&self, l1_table: HostOffset, index: u64) -> Result<(L1Entry, Option<HostOffset>), String> {
        let entry = L1Entry::from_raw(self.number(l1_table.get() + index * 8));
        let table = entry.offset(&self.geometry).map_err(|e| format!("L1 entry {index}: {e}"))?;
        Ok((entry, table))
    }

    fn count_tree(
        &self,
        whose: &str,
        l1_table: HostOffset,
        l1_size: u32,
        references: &mut References,
        active: bool,
    ) -> Result<(), String> {
        let bits = self.geometry.cluster_bits;
        references.add(&self.geometry, l1_table.get(), u64::from(l1_size) * 8);
        for l1 in 0..u64::from(l1_size) {
            let (entry, Some(l2)) = self.l2_table(l1_table, l1)? else { continue };
            references.add(&self.geometry, l2.get(), bits.size());
            if entry.copied() && active {
                references.exclusive.push((bits.index_of(l2.get()), format!("L2 table of L1 entry {l1}")));
            }
            for index in 0..self.geometry.l2_entries() {
                let at = l2.get() + index * self.geometry.l2_entry_size();
                let error = |e| format!("{whose}: L2 entry {l1}/{index}: {e}");
                let kind = L2Entry::from_raw(self.number(at)).decode(&self.geometry).map_err(error)?;
                if self.geometry.extended_l2 {
                    SubclusterBitmap::from_raw(self.number(at + 8)).validate(&kind).map_err(error)?;
                }
                match kind {
                    // What lies in a file of its own has no counts.
                    _ if self.geometry.has_data_file => {}
                    L2Kind::Data { host, copied } | L2Kind::Zero { host: Some(host), copied } => {
                        references.add(&self.geometry, host.get(), bits.size());
                        if copied && active {
                            references.exclusive.push((bits.index_of(host.get()), format!("L2 entry {l1}/{index}")));
                        }
                    }
                    L2Kind::Compressed(range) => {
                        if L2Entry::from_raw(self.number(at)).copied() {
                            return Err(format!("{whose}: L2 entry {l1}/{index} is compressed and COPIED"));
                        }
                        if active {
                            // What it refers to is counted below; what it holds must be there.
                            self.decoded(range).map_err(|e| format!("L2 entry {l1}/{index}: {e}"))?;
                            references.compressed += 1;
                        }
                        references.add(&self.geometry, range.host.get(), range.len);
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// A compressed cluster, by readers that the engine does not use.
    fn decoded(&self, range: CompressedRange) -> Result<Vec<u8>, String> {
        let start =
            self.image.get(range.host.get() as usize..).ok_or("a compressed cluster past the end of the file")?;
        let bytes = &start[..start.len().min(range.len as usize)];
        let mut cluster = vec![0; self.geometry.cluster_bits.size() as usize];
        match self.header.compression {
            Compression::Zlib => flate2::read::DeflateDecoder::new(bytes).read_exact(&mut cluster).map_err(text)?,
            Compression::Zstd => {
                zstd::stream::read::Decoder::new(bytes).map_err(text)?.read_exact(&mut cluster).map_err(text)?;
            }
        }
        Ok(cluster)
    }

    /// A sector of a snapshot; None where the layer below shows through.
    pub(super) fn sector(&self, snapshot: &Snapshot, sector: u64) -> Result<Option<[u8; 512]>, String> {
        let offset = sector * 512;
        let (bits, coverage) = (self.geometry.cluster_bits, self.geometry.l2_coverage());
        if offset / coverage >= u64::from(snapshot.l1_size) {
            return Ok(None);
        }
        let (_, Some(l2)) = self.l2_table(snapshot.l1_table_offset, offset / coverage)? else { return Ok(None) };
        let index = bits.index_of(offset % coverage);
        let at = l2.get() + index * self.geometry.l2_entry_size();
        let kind = L2Entry::from_raw(self.number(at)).decode(&self.geometry).map_err(text)?;
        if self.geometry.extended_l2 && !matches!(kind, L2Kind::Compressed(_)) {
            let bitmap = SubclusterBitmap::from_raw(self.number(at + 8));
            let subcluster = self.geometry.subcluster_index(GuestOffset::new(offset)) as u32;
            match bitmap.run(subcluster).map(|run| run.0) {
                Some(Subcluster::Allocated) => {}
                Some(Subcluster::Zero) => return Ok(Some([0; 512])),
                Some(Subcluster::Unallocated) => return Ok(None),
                None => return Err("a subcluster that is allocated and zero".into()),
            }
        }
        Ok(match kind {
            L2Kind::Unallocated => None,
            L2Kind::Zero { .. } => Some([0; 512]),
            L2Kind::Data { host, .. } => {
                let at = (host.get() + bits.offset_in(offset)) as usize;
                let mut bytes = [0; 512];
                let there = self.image.get(at..).unwrap_or_default();
                let len = there.len().min(512);
                bytes[..len].copy_from_slice(&there[..len]);
                Some(bytes)
            }
            L2Kind::Compressed(range) => {
                let cluster = self.decoded(range)?;
                let at = bits.offset_in(offset) as usize;
                Some(cluster[at..at + 512].try_into().map_err(text)?)
            }
        })
    }
}
