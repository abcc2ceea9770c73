//! L1 and L2 table entries: decode with every check, encode with none of the wrong ones possible.
//! (Specification, "Cluster mapping".)
//!
//! Not here: the bitmap half of an extended L2 entry ([`crate::subcluster`]).

use crate::error::{Field, FormatError};
use crate::geometry::{Geometry, compressed_offset_bits};
use crate::limits;
use crate::offset::{ClusterBits, HostOffset};

/// Bit 63: the refcount is exactly one, so the cluster may be written in place. Accurate in active tables only.
const COPIED: u64 = 1 << 63;
/// Bit 62: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard descriptor: reads as zeros.
const ZERO: u64 = 1;
/// Bits 9 to 55.
const OFFSET_MASK: u64 = (limits::HOST_OFFSET_END - 1) & !0x1ff;

const L1_ENTRY: Field = Field::new("L1 entry");
const L2_ENTRY: Field = Field::new("L2 entry");
const COMPRESSED_ENTRY: Field = Field::new("compressed cluster's L2 entry");
const COMPRESSED_LEN: Field = Field::new("compressed cluster's length");

/// Checks an offset that goes into an entry: cluster start by the entry's own granularity, inside 2^56.
pub(crate) fn encodable(field: Field, host: HostOffset) -> Result<u64, FormatError> {
    let value = host.get();
    if value & 0x1ff != 0 {
        return Err(FormatError::Misaligned { field, value, alignment: 512 });
    }
    if value >= limits::HOST_OFFSET_END {
        return Err(FormatError::OutOfRange { field, value, min: 0, max: OFFSET_MASK });
    }
    Ok(value)
}

/// Checks an offset that came out of an entry: the start of a cluster, and not the header's.
fn decoded(field: Field, value: u64, bits: ClusterBits) -> Result<HostOffset, FormatError> {
    if !bits.is_aligned(value) {
        return Err(FormatError::Misaligned { field, value, alignment: bits.size() });
    }
    Ok(HostOffset::new(value))
}

/// An entry of an L1 table: where an L2 table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(u64);

impl L1Entry {
    /// No L2 table: everything it would cover is unallocated.
    pub const UNALLOCATED: Self = Self(0);

    const RESERVED: u64 = !(OFFSET_MASK | COPIED);

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

    /// An entry that points to the L2 table at `table`; `copied` says that its refcount is exactly one.
    ///
    /// # Errors
    /// `table` is 0, not a multiple of 512, or not below 2^56.
    pub fn new(table: HostOffset, copied: bool) -> Result<Self, FormatError> {
        let offset = encodable(L1_ENTRY, table)?;
        if offset == 0 {
            return Err(FormatError::InsideHeader { field: L1_ENTRY, offset });
        }
        Ok(Self(offset | if copied { COPIED } else { 0 }))
    }

    /// Where the L2 table is; `None` if there is none.
    ///
    /// # Errors
    /// The offset is not the start of a cluster, or a reserved bit is set: the L1 table is corrupt.
    pub fn offset(self, geometry: &Geometry) -> Result<Option<HostOffset>, FormatError> {
        if self.0 & Self::RESERVED != 0 {
            return Err(FormatError::ReservedBits {
                field: L1_ENTRY,
                value: self.0,
                reserved: self.0 & Self::RESERVED,
            });
        }
        match self.0 & OFFSET_MASK {
            0 => Ok(None),
            offset => decoded(L1_ENTRY, offset, geometry.cluster_bits).map(Some),
        }
    }

    /// The offset's bits (9 to 55) as they are, whatever the rest says: for a check of an entry that means nothing.
    #[must_use]
    pub const fn offset_bits(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// The same entry without the reserved bits: what a check takes for meant.
    #[must_use]
    pub const fn without_reserved(self) -> Self {
        Self(self.0 & !Self::RESERVED)
    }

    /// Whether the entry says that the L2 table's refcount is exactly one. Means something in the active table only.
    #[must_use]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with the COPIED flag as given; an entry without a table stays without the flag.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        if copied && self.0 & OFFSET_MASK != 0 { Self(self.0 | COPIED) } else { Self(self.0 & !COPIED) }
    }
}

/// Where a compressed cluster's data lies: byte-granular, and possibly running on into the next host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedRange {
    /// Where the data starts, to the byte.
    pub host: HostOffset,
    /// An upper bound of the data's length in bytes: to the end of the last 512-byte sector used. Decompression stops
    /// when a cluster has come out, and the last sector may lie past the end of the file.
    pub len: u64,
}

impl CompressedRange {
    /// The first byte after the range. Both fields are bounded by decoding, so this cannot overflow for decoded ranges;
    /// for others it saturates.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.host.get().saturating_add(self.len)
    }

    /// The host clusters that the range touches, each of which carries a reference of it: the first one's start, and
    /// how many (one or two for what QEMU writes).
    #[must_use]
    pub const fn clusters(&self, bits: ClusterBits) -> (HostOffset, u64) {
        let first = bits.index_of(self.host.get());
        let last = if self.len == 0 { first } else { bits.index_of(self.end() - 1) };
        (HostOffset::new(bits.align_down(self.host.get())), last - first + 1)
    }

    fn decode(raw: u64, geometry: &Geometry) -> Result<Self, FormatError> {
        let x = compressed_offset_bits(geometry.cluster_bits);
        let host = raw & ((1 << x) - 1);
        if host >= limits::HOST_OFFSET_END {
            let reserved = host & !(limits::HOST_OFFSET_END - 1);
            return Err(FormatError::ReservedBits { field: COMPRESSED_ENTRY, value: raw, reserved });
        }
        if host < geometry.cluster_bits.size() {
            return Err(FormatError::InsideHeader { field: COMPRESSED_ENTRY, offset: host });
        }
        let additional_sectors = (raw & (COMPRESSED - 1)) >> x;
        Ok(Self { host: HostOffset::new(host), len: (additional_sectors + 1) * 512 - (host & 511) })
    }

    fn encode(self, geometry: &Geometry) -> Result<u64, FormatError> {
        let host = self.host.get();
        let end = geometry.compressed_offset_end();
        if host >= end {
            return Err(FormatError::OutOfRange { field: COMPRESSED_ENTRY, value: host, min: 0, max: end - 1 });
        }
        if host < geometry.cluster_bits.size() {
            return Err(FormatError::InsideHeader { field: COMPRESSED_ENTRY, offset: host });
        }
        let x = compressed_offset_bits(geometry.cluster_bits);
        let sectors_max = 1u64 << (geometry.cluster_bits.bits() - 8);
        let len_max = sectors_max * 512 - (host & 511);
        if self.len == 0 || self.len > len_max {
            return Err(FormatError::OutOfRange { field: COMPRESSED_LEN, value: self.len, min: 1, max: len_max });
        }
        let sectors = ((host & 511) + self.len).div_ceil(512);
        Ok(COMPRESSED | ((sectors - 1) << x) | host)
    }
}

/// What an L2 entry says about its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Kind {
    /// Reads come from the backing file, or are zeros without one.
    Unallocated,
    /// Reads are zeros, whatever the backing file or the host cluster holds. Never with extended L2 entries.
    Zero {
        /// A host cluster that is kept for later writes (preallocated).
        host: Option<HostOffset>,
        /// That cluster's refcount is exactly one.
        copied: bool,
    },
    /// A host cluster with the data. With extended L2 entries the bitmap says which of its subclusters count: it may be
    /// none of them.
    Data {
        /// Where the cluster starts.
        host: HostOffset,
        /// Its refcount is exactly one.
        copied: bool,
    },
    /// Compressed data; a write must allocate anew.
    Compressed(CompressedRange),
}

/// An entry of an L2 table (the first eight bytes of an extended one): how a guest cluster is mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Entry(u64);

impl L2Entry {
    /// An entry that maps nothing.
    pub const UNALLOCATED: Self = Self(0);

    const RESERVED: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ZERO);

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

    /// An entry for a data cluster at `host`; `copied` says that its refcount is exactly one.
    ///
    /// # Errors
    /// `host` is not a multiple of 512 or not below 2^56, or it is 0 and not `copied` (which would read as unallocated;
    /// with `copied`, 0 is a cluster of an external data file).
    pub fn data(host: HostOffset, copied: bool) -> Result<Self, FormatError> {
        let offset = encodable(L2_ENTRY, host)?;
        if offset == 0 && !copied {
            return Err(FormatError::InsideHeader { field: L2_ENTRY, offset });
        }
        Ok(Self(offset | if copied { COPIED } else { 0 }))
    }

    /// An entry for a cluster that reads as zeros, keeping the host cluster `host` if one is given.
    /// Version 3 without extended L2 entries only. Without a host cluster the COPIED flag is not set.
    ///
    /// # Errors
    /// As [`L2Entry::data`].
    pub fn zero(host: Option<HostOffset>, copied: bool) -> Result<Self, FormatError> {
        match host {
            None => Ok(Self(ZERO)),
            Some(host) => Self::data(host, copied).map(|entry| Self(entry.0 | ZERO)),
        }
    }

    /// An entry for compressed data of `range.len` bytes (exact, not yet rounded to sectors) at `range.host`.
    ///
    /// # Errors
    /// The offset does not fit the descriptor (2^49 with 2 MiB clusters) or lies in the header's cluster, the length is
    /// 0 or more than the descriptor's sectors can say, or the image has an external data file.
    pub fn compressed(range: CompressedRange, geometry: &Geometry) -> Result<Self, FormatError> {
        if geometry.has_data_file {
            return Err(COMPRESSED_IN_DATA_FILE);
        }
        range.encode(geometry).map(Self)
    }

    /// What the entry says.
    ///
    /// The tests come in QEMU's order: compressed, then zero (not with extended L2), then offset 0. The COPIED flag
    /// means nothing on a compressed entry nor on an entry without a cluster, and is ignored there, as QEMU does.
    ///
    /// # Errors
    /// The entry is corrupt: unaligned offset, reserved bits, the zero bit where there is none (version 2, extended
    /// L2), a compressed cluster with an external data file or in the header's cluster.
    pub fn decode(self, geometry: &Geometry) -> Result<L2Kind, FormatError> {
        if self.0 & COMPRESSED != 0 {
            if geometry.has_data_file {
                return Err(COMPRESSED_IN_DATA_FILE);
            }
            return CompressedRange::decode(self.0, geometry).map(L2Kind::Compressed);
        }
        if self.0 & Self::RESERVED != 0 {
            return Err(FormatError::ReservedBits {
                field: L2_ENTRY,
                value: self.0,
                reserved: self.0 & Self::RESERVED,
            });
        }
        let zero = self.0 & ZERO != 0;
        if zero && (geometry.version < 3 || geometry.extended_l2) {
            return Err(FormatError::ReservedBits { field: L2_ENTRY, value: self.0, reserved: ZERO });
        }
        let copied = self.0 & COPIED != 0;
        let host = match self.0 & OFFSET_MASK {
            // Without an external data file offset 0 is the header: never hand it out.
            0 if !(geometry.has_data_file && copied) => None,
            offset => Some(decoded(L2_ENTRY, offset, geometry.cluster_bits)?),
        };
        Ok(match (zero, host) {
            (true, host) => L2Kind::Zero { host, copied: copied && host.is_some() },
            (false, None) => L2Kind::Unallocated,
            (false, Some(host)) => L2Kind::Data { host, copied },
        })
    }

    /// The same entry with the COPIED flag as given. Compressed entries never get it; an entry with offset 0 (nothing
    /// allocated, or the first cluster of an external data file, whose flag is what says so) stays as it is.
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        if self.0 & COMPRESSED != 0 {
            Self(self.0 & !COPIED)
        } else if self.0 & OFFSET_MASK == 0 {
            self
        } else if copied {
            Self(self.0 | COPIED)
        } else {
            Self(self.0 & !COPIED)
        }
    }

    /// A standard entry's offset bits (9 to 55) as they are, whatever the rest says: for a check of an entry that means
    /// nothing.
    #[must_use]
    pub const fn offset_bits(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// The same entry without the bits that are reserved in a standard one: what a check takes for meant. A compressed one stays
    /// as it is.
    #[must_use]
    pub const fn without_reserved(self, geometry: &Geometry) -> Self {
        let zero = if geometry.version < 3 || geometry.extended_l2 { ZERO } else { 0 };
        if self.0 & COMPRESSED != 0 { self } else { Self(self.0 & !(Self::RESERVED | zero)) }
    }

    /// Whether bit 63 is set, whatever the rest says (a check reports it where it must not be).
    #[must_use]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }
}

const COMPRESSED_IN_DATA_FILE: FormatError = FormatError::Inconsistent {
    field: COMPRESSED_ENTRY,
    problem: "an image with an external data file cannot have compressed clusters",
};

#[cfg(test)]
#[path = "entry_test.rs"]
mod tests;
