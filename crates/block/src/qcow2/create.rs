//! Making a new, empty image.

use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::{CreateParams, FormatError, HostOffset, RefTableEntry, refcount};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, Buffer, File};
use crate::queue::Queue;

/// Writes an empty image into the empty file `file`: the header last, when all it names is durable.
pub(crate) async fn create(
    queue: &Rc<Queue>,
    file: &File,
    path: &Path,
    params: &CreateParams,
    no_flush: bool,
) -> Result<()> {
    let format_error = |e: FormatError| Error::new(ErrorKind::Invalid, e.to_string()).at_path(path);
    let io_error = |e: std::io::Error| Error::io("cannot write", e).at_path(path);
    let mut header = params.header().map_err(format_error)?;
    let bits = header.cluster_bits;
    let per_block = header.refcount_block_entries();
    let l1_clusters = bits.clusters_for(u64::from(header.l1_size) * 8).max(1);

    // Header, refcount table, refcount blocks, L1 table, in this order; the counts depend on each other a little.
    let (mut tables, mut blocks) = (1, 1);
    loop {
        let total = 1 + tables + blocks + l1_clusters;
        let (need_blocks, need_tables) = (total.div_ceil(per_block), bits.clusters_for(blocks * 8));
        if need_blocks <= blocks && need_tables <= tables {
            break;
        }
        (tables, blocks) = (need_tables.max(tables), need_blocks.max(blocks));
    }
    let total = 1 + tables + blocks + l1_clusters;
    let place = |cluster: u64| HostOffset::new(cluster << bits.bits());
    header.refcount_table_offset = place(1);
    header.refcount_table_clusters = tables as u32;
    header.l1_table_offset = place(1 + tables + blocks);

    let cluster = bits.size() as usize;
    let mut table = Buffer::zeroed(tables as usize * cluster);
    for (block, entry) in (0..blocks).zip(table.chunks_exact_mut(8)) {
        let named = RefTableEntry::new(place(1 + tables + block)).map_err(format_error)?;
        entry.copy_from_slice(&named.raw().to_be_bytes());
        let mut counts = Buffer::zeroed(cluster);
        let first = block * per_block;
        for index in 0..total.saturating_sub(first).min(per_block) {
            refcount::set(params.refcount_order, &mut counts, index as usize, 1).map_err(format_error)?;
        }
        queue.write_buffer(file, place(1 + tables + block).get(), counts).await.map_err(io_error)?;
    }
    queue.write_buffer(file, place(1).get(), table).await.map_err(io_error)?;
    queue.set_length(file, place(total).get()).await.map_err(io_error)?;
    if !no_flush {
        queue.flush(file, Barrier::Create).await.map_err(io_error)?;
    }
    let encoded = header.encode().map_err(format_error)?;
    queue.write_buffer(file, 0, Buffer::from_bytes(&encoded)).await.map_err(io_error)?;
    if !no_flush {
        queue.flush(file, Barrier::Header).await.map_err(io_error)?;
    }
    Ok(())
}
