//! Whether an image is sound, told from its bytes alone: written against the specification, sharing nothing with the engine but
//! the format's types.

use std::collections::BTreeMap;

use cowhand_qcow2::{Header, L1Entry, L2Entry, L2Kind, RefTableEntry, SubclusterBitmap, refcount};

/// The errors that lose data. Leaked clusters are none.
pub(super) fn check(image: &[u8]) -> Result<(), String> {
    check_shared(image, &[])
}

/// The same for an image some of whose clusters have a reference more, from elsewhere.
pub(super) fn check_shared(image: &[u8], shared: &[u64]) -> Result<(), String> {
    let text = |e: cowhand_qcow2::FormatError| e.to_string();
    let header = Header::parse(image, image.len() as u64).map_err(text)?;
    let geometry = header.geometry();
    let bits = geometry.cluster_bits;
    let cluster = bits.size() as usize;
    let number = |at: u64| -> u64 {
        let at = at as usize;
        let mut bytes = [0; 8];
        if let Some(found) = image.get(at..at + 8) {
            bytes.copy_from_slice(found);
        }
        u64::from_be_bytes(bytes)
    };
    let mut references: BTreeMap<u64, u64> = BTreeMap::new();
    let mut exclusive: Vec<(u64, String)> = Vec::new();
    let mut refer = |host: u64, len: u64| {
        for index in bits.index_of(host)..=bits.index_of(host + len.max(1) - 1) {
            *references.entry(index).or_default() += 1;
        }
    };
    refer(0, 1);
    shared.iter().for_each(|&cluster| refer(cluster << bits.bits(), 1));
    refer(header.l1_table_offset.get(), u64::from(header.l1_size) * 8);
    let table = header.refcount_table_offset.get();
    let table_len = u64::from(header.refcount_table_clusters) * bits.size();
    refer(table, table_len);
    let mut blocks = BTreeMap::new();
    for index in 0..table_len / 8 {
        let entry = RefTableEntry::from_raw(number(table + index * 8)).offset(&geometry).map_err(text)?;
        if let Some(block) = entry {
            refer(block.get(), bits.size());
            blocks.insert(index, block.get());
        }
    }
    for l1 in 0..u64::from(header.l1_size) {
        let entry = L1Entry::from_raw(number(header.l1_table_offset.get() + l1 * 8));
        let Some(l2) = entry.offset(&geometry).map_err(|e| format!("L1 entry {l1}: {e}"))? else { continue };
        refer(l2.get(), bits.size());
        if entry.copied() {
            exclusive.push((bits.index_of(l2.get()), format!("L2 table of L1 entry {l1}")));
        }
        for index in 0..geometry.l2_entries() {
            let at = l2.get() + index * geometry.l2_entry_size();
            let kind = L2Entry::from_raw(number(at)).decode(&geometry);
            let kind = kind.map_err(|e| format!("L2 entry {l1}/{index}: {e}"))?;
            if geometry.extended_l2 {
                let bitmap = SubclusterBitmap::from_raw(number(at + 8));
                bitmap.validate(&kind).map_err(|e| format!("L2 entry {l1}/{index}: {e}"))?;
            }
            match kind {
                L2Kind::Data { host, copied } | L2Kind::Zero { host: Some(host), copied } => {
                    refer(host.get(), bits.size());
                    if copied {
                        exclusive.push((bits.index_of(host.get()), format!("L2 entry {l1}/{index}")));
                    }
                }
                L2Kind::Compressed(range) => refer(range.host.get(), range.len),
                _ => {}
            }
        }
    }
    let count = |index: u64| -> Result<u64, String> {
        let per_block = geometry.refcount_block_entries();
        let Some(&block) = blocks.get(&(index / per_block)) else { return Ok(0) };
        let bytes =
            image.get(block as usize..block as usize + cluster).ok_or("a refcount block past the end of the file")?;
        refcount::get(geometry.refcount_order, bytes, (index % per_block) as usize).map_err(text)
    };
    for (&index, &used) in &references {
        let counted = count(index)?;
        if counted < used {
            return Err(format!("cluster {index:#x} has refcount {counted}, but {used} references"));
        }
    }
    for (index, what) in exclusive {
        if references[&index] != 1 {
            return Err(format!("cluster {index:#x} ({what}) is marked COPIED with {} references", references[&index]));
        }
    }
    Ok(())
}
