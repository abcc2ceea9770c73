//! How large the file of a new image would be.
//!
//! The numbers are QEMU's: the metadata are those of an image whose clusters are all allocated, however few it will have, so that what is
//! made room for always suffices.

use cowhand_qcow2::CreateParams;

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::Preallocation;
use crate::status::Content;
use crate::sync::Arc;

/// The sizes of a file to come, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// What it takes at first.
    pub required: u64,
    /// What it takes when all of the disk has been written.
    pub fully_allocated: u64,
    /// What the source's bitmaps take besides, where they can be taken along.
    pub bitmaps: Option<u64>,
}

/// What a raw file takes for a disk of `size` bytes.
#[must_use]
pub fn measure_raw(size: u64) -> Measured {
    let size = size.checked_next_multiple_of(512).unwrap_or(size);
    Measured { required: size, fully_allocated: size, bitmaps: None }
}

/// What a qcow2 image takes that is made by `params`, of which the size counts only if there is no `source`. `luks` is the length of
/// its encryption header, 0 if it has none.
///
/// # Errors
/// The image would be too large; the source's metadata or bitmap directory cannot be read.
pub fn measure_qcow2(
    params: &CreateParams,
    preallocation: Preallocation,
    luks: u64,
    source: Option<&Arc<Disk>>,
) -> Result<Measured> {
    let too_large = || {
        let message = "The image size is too large (try using a larger cluster size)";
        Error::new(ErrorKind::Invalid, message)
    };
    let cluster = params.cluster_bits.size();
    let size = source.map_or(params.size, |disk| disk.size());
    let size = size.checked_next_multiple_of(cluster).ok_or_else(too_large)?;
    let all = prealloc_size(params, size).ok_or_else(too_large)?;
    let luks = luks.next_multiple_of(cluster);
    let full = matches!(preallocation, Preallocation::Falloc | Preallocation::Full);
    let data = match source {
        _ if full => size,
        None => 0,
        // How much of it the new image would share with its backing file is not known.
        Some(_) if params.backing.is_some() => size,
        Some(disk) => clusters_of_data(disk, cluster)?,
    };
    let fully_allocated = all + luks;
    let bitmaps = match source {
        Some(disk) if params.version >= 3 => bitmaps(disk, cluster)?,
        _ => None,
    };
    Ok(Measured { required: fully_allocated - size + data, fully_allocated, bitmaps })
}

/// The bytes of the clusters that are data.
fn clusters_of_data(disk: &Arc<Disk>, cluster: u64) -> Result<u64> {
    let (mut data, mut counted) = (0, 0);
    for extent in disk.extents(0..disk.size())? {
        let extent = extent?;
        if extent.hole || !matches!(extent.content, Content::Data | Content::Compressed) {
            continue;
        }
        let start = (extent.range.start - extent.range.start % cluster).max(counted);
        let end = extent.range.end.next_multiple_of(cluster);
        data += end.saturating_sub(start);
        counted = end.max(counted);
    }
    Ok(data)
}

/// An image with all clusters of `size` bytes allocated; none if it cannot be that large.
fn prealloc_size(params: &CreateParams, size: u64) -> Option<u64> {
    let cluster = params.cluster_bits.size();
    let entry = if params.extended_l2 { 16 } else { 8 };
    let l2_tables = (size / cluster).div_ceil(cluster / entry);
    if l2_tables > cowhand_qcow2::limits::L1_TABLE_BYTES_MAX / 8 {
        return None;
    }
    let l1 = (l2_tables * 8).div_ceil(cluster);
    let clusters = 1 + l2_tables + l1 + size / cluster;
    let per_block = (cluster * 8) >> params.refcount_order;
    let (mut blocks, mut table) = (0, 0);
    loop {
        let more = (clusters + table + blocks).div_ceil(per_block);
        let tables = (more * 8).div_ceil(cluster);
        if (more, tables) == (blocks, table) {
            break;
        }
        (blocks, table) = (more, tables);
    }
    (clusters + blocks + table).checked_mul(cluster)
}

/// What the bitmaps of a disk would take in an image with clusters of so many bytes; none if the disk cannot have any.
fn bitmaps(disk: &Arc<Disk>, cluster: u64) -> Result<Option<u64>> {
    if !disk.can_have_bitmaps() {
        return Ok(None);
    }
    let (mut bytes, mut directory) = (0, 0u64);
    for bitmap in disk.bitmaps()? {
        if bitmap.state == crate::bitmap::BitmapState::Inconsistent {
            continue;
        }
        let bits = bitmap.bytes.div_ceil(cluster);
        bytes += bits * cluster + (bits * 8).next_multiple_of(cluster);
        // A directory entry is 24 bytes and the name, in whole 8 bytes.
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Ok(Some(bytes + directory.next_multiple_of(cluster)))
}

#[cfg(test)]
#[path = "measure_test.rs"]
mod tests;
