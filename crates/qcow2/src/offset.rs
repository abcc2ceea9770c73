//! Offsets as types, so that a guest's is never taken for a host's, and the cluster size with its arithmetic.

use std::fmt;

use crate::error::{Field, FormatError};
use crate::limits;

/// A byte offset into the virtual disk, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(u64);

/// A byte offset into the image file (or, for data clusters of such images, into the external data file).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(u64);

impl GuestOffset {
    /// The offset `bytes` into the virtual disk.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The offset in bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// `self + bytes`, or `None` on overflow.
    #[must_use]
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl HostOffset {
    /// The offset `bytes` into the file.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The offset in bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// `self + bytes`, or `None` on overflow.
    #[must_use]
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The size of a cluster as a power of two, 2^9 to 2^21 bytes (specification, "Header", `cluster_bits`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterBits(u32);

impl ClusterBits {
    /// What new images get unless asked otherwise: 64 KiB.
    pub const DEFAULT: Self = Self(16);

    /// A cluster of 2^`bits` bytes.
    ///
    /// # Errors
    /// `bits` is outside of 9 to 21.
    pub fn new(bits: u32) -> Result<Self, FormatError> {
        if !(limits::CLUSTER_BITS_MIN..=limits::CLUSTER_BITS_MAX).contains(&bits) {
            return Err(FormatError::OutOfRange {
                field: Field::at("cluster_bits", 20),
                value: bits.into(),
                min: limits::CLUSTER_BITS_MIN.into(),
                max: limits::CLUSTER_BITS_MAX.into(),
            });
        }
        Ok(Self(bits))
    }

    /// The power of two, 9 to 21.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The cluster size in bytes, 512 to 2 MiB.
    #[must_use]
    pub const fn size(self) -> u64 {
        1 << self.0
    }

    /// How far `offset` lies into its cluster, in bytes.
    #[must_use]
    pub const fn offset_in(self, offset: u64) -> u64 {
        offset & (self.size() - 1)
    }

    /// Whether `offset` is the start of a cluster.
    #[must_use]
    pub const fn is_aligned(self, offset: u64) -> bool {
        self.offset_in(offset) == 0
    }

    /// The start of the cluster that `offset` lies in.
    #[must_use]
    pub const fn align_down(self, offset: u64) -> u64 {
        offset & !(self.size() - 1)
    }

    /// `offset` rounded up to a multiple of the cluster size, or `None` if that is past 2^64.
    #[must_use]
    pub const fn align_up(self, offset: u64) -> Option<u64> {
        match offset.checked_add(self.size() - 1) {
            Some(sum) => Some(self.align_down(sum)),
            None => None,
        }
    }

    /// The number of the cluster that `offset` lies in.
    #[must_use]
    pub const fn index_of(self, offset: u64) -> u64 {
        offset >> self.0
    }

    /// How many clusters `bytes` take, the last one begun counted whole.
    #[must_use]
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.size())
    }
}
