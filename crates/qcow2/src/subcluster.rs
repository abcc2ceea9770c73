//! The second half of an extended L2 entry: which of a cluster's 32 subclusters are allocated and which read as zeros.
//! (Specification, "Extended L2 Entries".)

use crate::entry::L2Kind;
use crate::error::{Field, FormatError};

const BITMAP: Field = Field::new("subcluster bitmap");

/// What the bitmap says of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// Reads come from the backing file, or are zeros without one.
    Unallocated,
    /// Reads are zeros.
    Zero,
    /// The data is in the host cluster.
    Allocated,
}

/// The bitmap: bit x says that subcluster x is allocated, bit 32 + x that it reads as zeros; never both.
/// It means nothing for a compressed cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubclusterBitmap(u64);

impl SubclusterBitmap {
    /// Nothing allocated, nothing zero.
    pub const NONE: Self = Self(0);
    /// Every subcluster is allocated.
    pub const ALL_ALLOCATED: Self = Self(0xffff_ffff);
    /// Every subcluster reads as zeros.
    pub const ALL_ZERO: Self = Self(0xffff_ffff << 32);

    /// The bitmap with the value `raw` (in host byte order).
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The bitmap's value (in host byte order).
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The allocated subclusters, bit x for subcluster x.
    #[must_use]
    pub const fn allocated(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    /// The subclusters that read as zeros, bit x for subcluster x.
    #[must_use]
    pub const fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Holds the bitmap against its entry.
    ///
    /// # Errors
    /// A subcluster is both allocated and zero, or one is allocated while the entry has no host cluster. A compressed
    /// cluster's bitmap is not looked at.
    pub fn validate(self, kind: &L2Kind) -> Result<(), FormatError> {
        if matches!(kind, L2Kind::Compressed(_)) {
            return Ok(());
        }
        if self.allocated() & self.zero() != 0 {
            return Err(FormatError::Inconsistent {
                field: BITMAP,
                problem: "a subcluster is both allocated and zero",
            });
        }
        let has_host = matches!(kind, L2Kind::Data { .. } | L2Kind::Zero { host: Some(_), .. });
        if self.allocated() != 0 && !has_host {
            let problem = "a subcluster is allocated, but the entry has no host cluster";
            return Err(FormatError::Inconsistent { field: BITMAP, problem });
        }
        Ok(())
    }

    /// What the bitmap says of subcluster `index`; `None` if `index` is not below 32. Of a bitmap that does not
    /// validate, the zero bit counts.
    #[must_use]
    pub const fn get(self, index: u32) -> Option<Subcluster> {
        if index >= 32 {
            return None;
        }
        Some(if self.zero() >> index & 1 != 0 {
            Subcluster::Zero
        } else if self.allocated() >> index & 1 != 0 {
            Subcluster::Allocated
        } else {
            Subcluster::Unallocated
        })
    }

    /// What the bitmap says of subcluster `index`, and how many in a row from there (1 to 32) it says the same of;
    /// `None` if `index` is not below 32.
    #[must_use]
    pub fn run(self, index: u32) -> Option<(Subcluster, u32)> {
        let kind = self.get(index)?;
        let same = match kind {
            Subcluster::Zero => self.zero(),
            Subcluster::Allocated => self.allocated() & !self.zero(),
            Subcluster::Unallocated => !(self.zero() | self.allocated()),
        };
        Some((kind, (same >> index).trailing_ones()))
    }

    /// The bitmap with subclusters `first..first + count` set to `kind`. What lies past 32 is left out.
    #[must_use]
    pub const fn with_range(self, first: u32, count: u32, kind: Subcluster) -> Self {
        let mask = below(first.saturating_add(count)) & !below(first);
        let allocated = self.allocated() & !mask;
        let zero = self.zero() & !mask;
        let (allocated, zero) = match kind {
            Subcluster::Unallocated => (allocated, zero),
            Subcluster::Zero => (allocated, zero | mask),
            Subcluster::Allocated => (allocated | mask, zero),
        };
        Self((zero as u64) << 32 | allocated as u64)
    }
}

/// The bits below bit `n`.
const fn below(n: u32) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

#[cfg(test)]
#[path = "subcluster_test.rs"]
mod tests;
