//! Refcount blocks of every width, and refcount table entries. (Specification, "Host cluster management".)
//!
//! Widths under 8 bits pack from a byte's least significant bit; wider ones are big-endian.
//!
//! The caller's `order` is the header's `refcount_order`; a refcount is 2^`order` bits wide.

use crate::entry::encodable;
use crate::error::{Field, FormatError};
use crate::geometry::Geometry;
use crate::limits;
use crate::offset::HostOffset;

const REFCOUNT_ORDER: Field = Field::at("refcount_order", 96);
const TABLE_ENTRY: Field = Field::new("refcount table entry");
const BLOCK: Field = Field::new("refcount block");

/// The largest refcount of width 2^`order` bits (of 64 bits for any `order` over 6).
#[must_use]
pub const fn max(order: u32) -> u64 {
    if order >= limits::REFCOUNT_ORDER_MAX { u64::MAX } else { (1 << (1u32 << order)) - 1 }
}

/// Refcount number `index` of the block `bytes`.
///
/// # Errors
/// `order` is over 6, or the block ends before `index`.
pub fn get(order: u32, bytes: &[u8], index: usize) -> Result<u64, FormatError> {
    let too_short = || too_short(order, bytes.len(), index);
    match order {
        0..=2 => {
            let (at, shift) = packed(order, index);
            let byte = bytes.get(at).ok_or_else(too_short)?;
            Ok(u64::from(*byte >> shift) & max(order))
        }
        3..=6 => {
            let width = 1usize << (order - 3);
            let field = index.checked_mul(width).and_then(|at| bytes.get(at..)?.get(..width)).ok_or_else(too_short)?;
            Ok(field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
        }
        _ => Err(order_out_of_range(order)),
    }
}

/// Stores `value` as refcount number `index` of the block `bytes`.
///
/// # Errors
/// `value` does not fit the width (the block is left as it was), `order` is over 6, or the block ends before `index`.
pub fn set(order: u32, bytes: &mut [u8], index: usize, value: u64) -> Result<(), FormatError> {
    if order > limits::REFCOUNT_ORDER_MAX {
        return Err(order_out_of_range(order));
    }
    if value > max(order) {
        return Err(FormatError::RefcountOverflow { value, bits: 1 << order, max: max(order) });
    }
    let available = bytes.len();
    let too_short = || too_short(order, available, index);
    if order < 3 {
        let (at, shift) = packed(order, index);
        let byte = bytes.get_mut(at).ok_or_else(too_short)?;
        // Both fit a byte: the width is at most 4 bits.
        let [.., mask] = max(order).to_be_bytes();
        let [.., value] = value.to_be_bytes();
        *byte = *byte & !(mask << shift) | value << shift;
    } else {
        let width = 1usize << (order - 3);
        let field =
            index.checked_mul(width).and_then(|at| bytes.get_mut(at..)?.get_mut(..width)).ok_or_else(too_short)?;
        for (to, from) in field.iter_mut().rev().zip(value.to_be_bytes().iter().rev()) {
            *to = *from;
        }
    }
    Ok(())
}

/// The byte that holds a refcount of under 8 bits, and how far it is shifted there.
const fn packed(order: u32, index: usize) -> (usize, u32) {
    let per_byte_bits = 3 - order;
    let in_byte = (index & ((1 << per_byte_bits) - 1)) as u32;
    (index >> per_byte_bits, in_byte << order)
}

fn order_out_of_range(order: u32) -> FormatError {
    let max = limits::REFCOUNT_ORDER_MAX.into();
    FormatError::OutOfRange { field: REFCOUNT_ORDER, value: order.into(), min: 0, max }
}

fn too_short(order: u32, available: usize, index: usize) -> FormatError {
    let needed =
        (index as u64).saturating_add(1).saturating_mul(1 << order.min(limits::REFCOUNT_ORDER_MAX)).div_ceil(8);
    FormatError::TooShort { field: BLOCK, needed, available: available as u64 }
}

/// An entry of the refcount table: where a refcount block is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefTableEntry(u64);

impl RefTableEntry {
    /// No refcount block: every cluster it would cover is free.
    pub const UNALLOCATED: Self = Self(0);

    const RESERVED: u64 = 0x1ff;

    /// The entry with the value `raw` (in host byte order).
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The entry's value (in host byte order).
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// An entry that points to the block at `block`.
    ///
    /// # Errors
    /// `block` is 0, not a multiple of 512, or not below 2^56.
    pub fn new(block: HostOffset) -> Result<Self, FormatError> {
        match encodable(TABLE_ENTRY, block)? {
            0 => Err(FormatError::InsideHeader { field: TABLE_ENTRY, offset: 0 }),
            offset => Ok(Self(offset)),
        }
    }

    /// The same entry without the reserved bits: what a check takes for meant.
    #[must_use]
    pub const fn without_reserved(self) -> Self {
        Self(self.0 & !Self::RESERVED)
    }

    /// Where the refcount block is; `None` if there is none.
    ///
    /// # Errors
    /// The offset is not the start of a cluster or not below 2^56, or a reserved bit is set: the table is corrupt.
    pub fn offset(self, geometry: &Geometry) -> Result<Option<HostOffset>, FormatError> {
        let value = self.0;
        if value & Self::RESERVED != 0 {
            return Err(FormatError::ReservedBits { field: TABLE_ENTRY, value, reserved: value & Self::RESERVED });
        }
        if !geometry.cluster_bits.is_aligned(value) {
            let alignment = geometry.cluster_bits.size();
            return Err(FormatError::Misaligned { field: TABLE_ENTRY, value, alignment });
        }
        if value >= limits::HOST_OFFSET_END {
            return Err(FormatError::OutOfRange {
                field: TABLE_ENTRY,
                value,
                min: 0,
                max: limits::HOST_OFFSET_END - 1,
            });
        }
        Ok((value != 0).then(|| HostOffset::new(value)))
    }
}

#[cfg(test)]
#[path = "refcount_test.rs"]
mod tests;
