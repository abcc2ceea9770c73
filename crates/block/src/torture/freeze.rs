//! Makes an image as an internal snapshot leaves it: every table and cluster shared with a copy of the L1 table, no COPIED flags.
//! What the copy leads to must never change again. (Sharp edge 38.)

use cowhand_qcow2::{Header, HostOffset, L1Entry, L2Entry, L2Kind, RefTableEntry, refcount};

/// What the snapshot holds.
#[derive(Default)]
pub(super) struct Frozen {
    /// Bytes by their place in the file.
    bytes: Vec<(usize, Vec<u8>)>,
    /// Clusters by index, each a reference.
    pub(super) clusters: Vec<u64>,
}

impl Frozen {
    /// Whether all is as it was.
    pub(super) fn check(&self, image: &[u8]) -> Result<(), String> {
        match self.bytes.iter().find(|(at, bytes)| image.get(*at..*at + bytes.len()) != Some(bytes)) {
            None => Ok(()),
            Some((at, _)) => Err(format!("the snapshot's cluster at {at:#x} has changed")),
        }
    }
}

fn number(image: &[u8], at: usize) -> u64 {
    image[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Shares everything in `image`. None, and the image as it was, where there is no count for the copy of the L1 table.
pub(super) fn freeze(image: &mut Vec<u8>) -> Option<Frozen> {
    let header = Header::parse(image, image.len() as u64).unwrap();
    let geometry = header.geometry();
    let (bits, size) = (geometry.cluster_bits, geometry.cluster_bits.size() as usize);
    let l1 = header.l1_table_offset.get() as usize;
    let l1_len = header.l1_size as usize * 8;
    let first = bits.clusters_for(image.len() as u64);
    let per_block = geometry.refcount_block_entries();
    let block = |image: &[u8], cluster: u64| {
        let entry = header.refcount_table_offset.get() + cluster / per_block * 8;
        RefTableEntry::from_raw(number(image, entry as usize)).offset(&geometry).unwrap().map(HostOffset::get)
    };
    let copy = first..first + bits.clusters_for(l1_len as u64);
    let in_table = copy.end <= u64::from(header.refcount_table_clusters) * bits.size() / 8 * per_block;
    if !in_table || copy.clone().any(|cluster| block(image, cluster).is_none()) {
        return None;
    }
    let mut frozen = Frozen { clusters: copy.clone().collect(), ..Frozen::default() };
    for entry in (l1..l1 + l1_len).step_by(8) {
        let shared = L1Entry::from_raw(number(image, entry)).with_copied(false);
        let Some(table) = shared.offset(&geometry).unwrap() else { continue };
        image[entry..entry + 8].copy_from_slice(&shared.raw().to_be_bytes());
        frozen.clusters.push(bits.index_of(table.get()));
        let table = table.get() as usize;
        for entry in (table..table + size).step_by(geometry.l2_entry_size() as usize) {
            let raw = L2Entry::from_raw(number(image, entry));
            if let L2Kind::Data { host, .. } | L2Kind::Zero { host: Some(host), .. } = raw.decode(&geometry).unwrap() {
                image[entry..entry + 8].copy_from_slice(&(raw.raw() & !(1 << 63)).to_be_bytes());
                frozen.clusters.push(bits.index_of(host.get()));
            }
        }
    }
    image.resize(copy.end as usize * size, 0);
    image.copy_within(l1..l1 + l1_len, copy.start as usize * size);
    for &cluster in &frozen.clusters {
        let at = block(image, cluster).unwrap() as usize;
        let counts = &mut image[at..at + size];
        let index = (cluster % per_block) as usize;
        let count = refcount::get(geometry.refcount_order, counts, index).unwrap();
        refcount::set(geometry.refcount_order, counts, index, count + 1).unwrap();
    }
    let bytes_of = |&cluster: &u64| (cluster as usize * size, image[cluster as usize * size..][..size].to_vec());
    frozen.bytes = frozen.clusters.iter().map(bytes_of).collect();
    Some(frozen)
}
