//! The configuration space of a block device (sect. 5.2.4): where each field lies and what it says.

use super::request::MAX_RANGES;
use super::{BlockBackend, SECTOR};
use crate::chain::MAX_SPANS;

/// Bytes up to and with `write_zeroes_may_unmap` and its padding.
pub(super) const CONFIG_LEN: usize = 60;
/// The one field that a driver may write.
pub(super) const WRITEBACK: u64 = 32;

/// The configuration as it reads now. `queue_size` is that of the queues; all but the header and the status of a
/// request may be data segments.
pub(super) fn image(backend: &dyn BlockBackend, queues: u16, queue_size: u16, writeback: bool) -> [u8; CONFIG_LEN] {
    let limits = backend.limits();
    let sectors = backend.size() / SECTOR;
    let block = limits.block_size.max(SECTOR as u32);
    let physical_exponent = (limits.physical_block_size.max(block) / block).ilog2() as u8;
    let granularity = (u64::from(limits.discard_granularity) / SECTOR).max(1);
    // Linux splits discards on multiples of the granularity only when the limit is one.
    let max_discard = (limits.max_discard / SECTOR).min(u64::from(u32::MAX));
    let max_discard = if max_discard > granularity { max_discard / granularity * granularity } else { max_discard };
    let segments = u32::from(queue_size.saturating_sub(2)).clamp(1, MAX_SPANS as u32 - 2);

    let mut image = [0; CONFIG_LEN];
    let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &segments.to_le_bytes());
    // Cylinders, heads, sectors.
    put(16, &((sectors / (16 * 63)).min(u64::from(u16::MAX)) as u16).to_le_bytes());
    put(18, &[16, 63]);
    put(20, &block.to_le_bytes());
    put(24, &[physical_exponent, 0]);
    // The least and the best I/O, in logical blocks.
    put(26, &(1u16 << physical_exponent.min(15)).to_le_bytes());
    put(28, &0u32.to_le_bytes());
    put(WRITEBACK as usize, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    put(36, &(max_discard as u32).to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &(granularity as u32).to_le_bytes());
    put(48, &(max_discard as u32).to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    image
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
