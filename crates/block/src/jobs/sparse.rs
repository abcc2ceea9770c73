//! Where a buffer's zeros are worth leaving out.

use std::ops::Range;

/// What zeros are compared with: a page, which stays in the processor's first cache beside the data.
static ZEROS: [u8; 4096] = [0; 4096];

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // The C library's comparison uses the widest loads that the processor has, and ends at the first byte that differs.
    bytes.chunks(ZEROS.len()).all(|block| block == &ZEROS[..block.len()])
}

/// A part of a buffer that is data, or zeros that need not be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) range: Range<usize>,
    pub(super) zero: bool,
}

/// Splits `bytes`, which lie at `offset` of the disk, into data and zeros. Zeros are told apart in blocks of `unit` bytes of the disk (a
/// power of two); fewer than `least` of them between data are written along. What is zero as a whole is one part, however short.
pub(super) fn parts(bytes: &[u8], offset: u64, unit: usize, least: usize) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        // Bounded by `unit`.
        let within = (offset.wrapping_add(at as u64) & (unit as u64 - 1)) as usize;
        let end = (at + unit - within).min(bytes.len());
        let zero = is_zero(&bytes[at..end]);
        match parts.last_mut() {
            Some(last) if last.zero == zero => last.range.end = end,
            _ => parts.push(Part { range: at..end, zero }),
        }
        at = end;
    }
    merge_short(parts, least)
}

/// Makes data of zeros that are too short for a hole, where there is data beside them.
fn merge_short(parts: Vec<Part>, least: usize) -> Vec<Part> {
    let alone = parts.len() == 1;
    let last = parts.len().saturating_sub(1);
    let mut merged: Vec<Part> = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        // At the buffer's ends zeros may go on outside.
        let inside = !alone && index != 0 && index != last;
        let zero = part.zero && !(inside && part.range.len() < least);
        match merged.last_mut() {
            Some(last) if last.zero == zero => last.range.end = part.range.end,
            _ => merged.push(Part { zero, ..part }),
        }
    }
    merged
}

#[cfg(test)]
#[path = "sparse_test.rs"]
mod tests;
