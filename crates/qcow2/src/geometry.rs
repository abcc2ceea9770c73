//! What decoding a table entry has to know of the header, and the arithmetic of the two-level tables.
//! (Specification, "Cluster mapping" and "Host cluster management".)

use crate::error::{Field, FormatError};
use crate::limits;
use crate::offset::{ClusterBits, GuestOffset, HostOffset};

/// The few properties of an image that give its table entries their meaning; copied out of the header once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// The format's version, 2 or 3.
    pub version: u32,
    /// L2 entries are 16 bytes, with a bitmap of subclusters.
    pub extended_l2: bool,
    /// Guest data lies in an external data file, where offset 0 is a cluster like any other.
    pub has_data_file: bool,
    /// Refcounts are 2^`refcount_order` bits wide (0 to 6).
    pub refcount_order: u32,
}

impl Geometry {
    /// Subclusters in a cluster with extended L2 entries.
    pub const SUBCLUSTERS: u64 = 32;

    /// Bytes of one L2 entry: 8, or 16 with extended L2.
    #[must_use]
    pub const fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in one L2 table as a power of two. Index arithmetic is on every request's way: shifts, no divisions.
    const fn l2_bits(&self) -> u32 {
        self.cluster_bits.bits() - if self.extended_l2 { 4 } else { 3 }
    }

    /// Entries in one L2 table (which is one cluster).
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Bytes of virtual disk that one L2 table (one L1 entry) covers: at most 2^39.
    #[must_use]
    pub const fn l2_coverage(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits.bits())
    }

    /// Which L1 entry covers `offset`.
    #[must_use]
    pub const fn l1_index(&self, offset: GuestOffset) -> u64 {
        offset.get() >> (self.l2_bits() + self.cluster_bits.bits())
    }

    /// Which entry of its L2 table maps `offset`.
    #[must_use]
    pub const fn l2_index(&self, offset: GuestOffset) -> u64 {
        self.cluster_bits.index_of(offset.get()) & (self.l2_entries() - 1)
    }

    /// L1 entries that a virtual disk of `size` bytes needs.
    #[must_use]
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Where the VM state of a snapshot of a disk of `size` bytes begins: at the first L1 entry that maps none of the
    /// disk (specification, "Snapshots"). `None` past 2^64.
    #[must_use]
    pub fn vm_state_offset(&self, size: u64) -> Option<GuestOffset> {
        self.l1_entries_for(size).checked_mul(self.l2_coverage()).map(GuestOffset::new)
    }

    /// Holds a data cluster's place against the rule of external data files: guest and host offset are the same
    /// (specification, "Header", incompatible bit 2). Always fine without one.
    ///
    /// # Errors
    /// They differ, so the L2 table is corrupt.
    pub fn check_data_file_mapping(&self, guest: GuestOffset, host: HostOffset) -> Result<(), FormatError> {
        if self.has_data_file && self.cluster_bits.align_down(guest.get()) != host.get() {
            return Err(FormatError::Inconsistent {
                field: Field::new("L2 entry"),
                problem: "a cluster of an external data file must lie at its guest offset",
            });
        }
        Ok(())
    }

    /// Bytes of one subcluster: a 32nd of the cluster with extended L2, else the cluster.
    #[must_use]
    pub const fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_bits.size() / Self::SUBCLUSTERS } else { self.cluster_bits.size() }
    }

    /// Which subcluster of its cluster `offset` lies in: 0 to 31, always 0 without extended L2.
    #[must_use]
    pub const fn subcluster_index(&self, offset: GuestOffset) -> u64 {
        self.cluster_bits.offset_in(offset.get()) / self.subcluster_size()
    }

    /// Width of a refcount in bits, 1 to 64.
    #[must_use]
    pub const fn refcount_bits(&self) -> u32 {
        // The order is bounded where it is parsed; the minimum here keeps a hand-made geometry from overflowing.
        let order = if self.refcount_order > limits::REFCOUNT_ORDER_MAX {
            limits::REFCOUNT_ORDER_MAX
        } else {
            self.refcount_order
        };
        1 << order
    }

    /// Refcounts in one refcount block (which is one cluster).
    #[must_use]
    pub const fn refcount_block_entries(&self) -> u64 {
        self.cluster_bits.size() * 8 / self.refcount_bits() as u64
    }

    /// Bytes of host file that one refcount block covers: at most 2^45.
    #[must_use]
    pub const fn refcount_block_coverage(&self) -> u64 {
        self.refcount_block_entries() << self.cluster_bits.bits()
    }

    /// Which entry of the refcount table points to the block with the refcount of the cluster at `offset`.
    #[must_use]
    pub const fn refcount_table_index(&self, offset: HostOffset) -> u64 {
        self.cluster_bits.index_of(offset.get()) / self.refcount_block_entries()
    }

    /// Which refcount of its block belongs to the cluster at `offset`.
    #[must_use]
    pub const fn refcount_block_index(&self, offset: HostOffset) -> u64 {
        self.cluster_bits.index_of(offset.get()) % self.refcount_block_entries()
    }

    /// One past the greatest byte offset that a compressed cluster's entry can hold: 2^(70 − cluster_bits), at most
    /// 2^56 (specification, "Compressed Clusters Descriptor").
    #[must_use]
    pub const fn compressed_offset_end(&self) -> u64 {
        let bits = compressed_offset_bits(self.cluster_bits);
        if bits > limits::HOST_OFFSET_BITS { limits::HOST_OFFSET_END } else { 1 << bits }
    }
}

/// x of the specification: the width of a compressed descriptor's offset field, 49 to 61 bits.
pub(crate) const fn compressed_offset_bits(cluster_bits: ClusterBits) -> u32 {
    62 - (cluster_bits.bits() - 8)
}
