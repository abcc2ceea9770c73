//! What can be wrong with an image's bytes: one enum, whose message names the field, its value and the bound.
//!
//! Not here: file names. The engine puts the path in front.

use std::fmt;

/// Which field of the format an error is about, and where in the file it stands, if that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    name: &'static str,
    at: Option<u64>,
}

impl Field {
    /// A field whose place in the file is not known here (a table entry).
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self { name, at: None }
    }

    /// A field that stands at byte `at` of the file.
    #[must_use]
    pub const fn at(name: &'static str, at: u64) -> Self {
        Self { name, at: Some(at) }
    }

    /// The field's name as the specification has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.name
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// What an error calls for; the engine maps it to its own kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The bytes are no QCOW2 image at all.
    NotQcow2,
    /// The image is (or claims to be) in order, but asks for something that this crate does not know.
    Unsupported,
    /// The image breaks the format's rules.
    Corrupt,
    /// The caller asked for something that the format cannot express; the image is not to blame.
    Invalid,
}

/// An image's bytes, or what was to be written into them, break a rule of the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The first four bytes are not the magic.
    #[error("not a QCOW2 image: it does not begin with \"QFI\\xfb\"")]
    NotQcow2,

    /// A version other than 2 and 3.
    #[error("QCOW2 version {version} is not supported (2 and 3 are)")]
    UnsupportedVersion {
        /// The version field.
        version: u32,
    },

    /// Incompatible feature bits that this crate does not know.
    #[error("the image uses features that are not supported: {names}")]
    UnknownFeatures {
        /// The unknown bits of the incompatible mask.
        bits: u64,
        /// Their names out of the image's feature name table, or "bit N".
        names: String,
    },

    /// A field holds a number for which no meaning is defined (or none that is supported).
    #[error("{field} {value} is not supported (known: {known})")]
    UnknownValue {
        /// The field.
        field: Field,
        /// What it holds.
        value: u64,
        /// The values that are known.
        known: &'static str,
    },

    /// A field holds a name that is not supported, or no name.
    #[error("{field} \"{}\" is not supported (known: {known})", name.escape_debug())]
    UnknownName {
        /// The field.
        field: Field,
        /// What it holds, as far as it is text.
        name: String,
        /// The names that are known.
        known: &'static str,
    },

    /// Fewer bytes than the structure needs.
    #[error("{field} needs {needed} bytes, but only {available} are there: the image is truncated or corrupt")]
    TooShort {
        /// The structure.
        field: Field,
        /// How many bytes it takes.
        needed: u64,
        /// How many there are.
        available: u64,
    },

    /// A number outside its bounds.
    #[error("{field} is {value}, outside of {min} to {max}")]
    OutOfRange {
        /// The field.
        field: Field,
        /// What it holds.
        value: u64,
        /// The least legal value.
        min: u64,
        /// The greatest legal value.
        max: u64,
    },

    /// An offset that is not aligned.
    #[error("{field} {value:#x} is not a multiple of {alignment:#x}")]
    Misaligned {
        /// The field.
        field: Field,
        /// What it holds.
        value: u64,
        /// What it must be a multiple of, in bytes.
        alignment: u64,
    },

    /// Reserved bits are set.
    #[error("{field} {value:#x} has reserved bits set ({reserved:#x})")]
    ReservedBits {
        /// The field.
        field: Field,
        /// What it holds.
        value: u64,
        /// Those of its bits that must be zero.
        reserved: u64,
    },

    /// A table that does not lie inside the file.
    #[error(
        "{field} ({len} bytes at {offset:#x}) lies past the end of the file ({file_len} bytes): truncated or corrupt"
    )]
    OutsideFile {
        /// The field that points to the table.
        field: Field,
        /// Where the table starts, in bytes.
        offset: u64,
        /// The table's length in bytes.
        len: u64,
        /// The file's length in bytes.
        file_len: u64,
    },

    /// Something that points into the first cluster, which belongs to the header.
    #[error("{field} {offset:#x} points into the header's cluster")]
    InsideHeader {
        /// The field.
        field: Field,
        /// Where it points, in bytes.
        offset: u64,
    },

    /// An L1 table that does not reach to the end of the disk.
    #[error("l1_size is {l1_size}, but a disk of {size} bytes needs {needed} entries")]
    L1TooSmall {
        /// Entries in the table.
        l1_size: u64,
        /// Entries that the virtual size needs.
        needed: u64,
        /// The virtual size in bytes.
        size: u64,
    },

    /// Fields that contradict each other or the specification in a way that one sentence says best.
    #[error("{field}: {problem}")]
    Inconsistent {
        /// The field that is at fault.
        field: Field,
        /// What is wrong with it.
        problem: &'static str,
    },

    /// The header, its extensions and the backing file name do not fit into the first cluster.
    #[error("the header needs {needed} bytes, but the first cluster has only {available}")]
    HeaderFull {
        /// Bytes needed.
        needed: u64,
        /// Bytes in a cluster.
        available: u64,
    },

    /// An entry of the snapshot table has more extra data than there may be.
    #[error("snapshot table entry {index} has {len} bytes of extra data, more than {max}", max = crate::limits::SNAPSHOT_EXTRA_DATA_MAX)]
    SnapshotExtraData {
        /// The entry's number.
        index: u32,
        /// Bytes of extra data.
        len: u32,
    },

    /// The snapshot table is longer than it may be.
    #[error("the last {overhanging} entries of the snapshot table lie beyond the 64 MiB that it may take")]
    SnapshotTableTooLong {
        /// Entries that do not fit.
        overhanging: u32,
    },

    /// A refcount that its width cannot hold.
    #[error("refcount {value} is too large for {bits}-bit refcounts (at most {max})")]
    RefcountOverflow {
        /// The refcount to be stored.
        value: u64,
        /// The width in bits.
        bits: u32,
        /// The largest that fits.
        max: u64,
    },
}

impl FormatError {
    /// Where in the file the offending field stands, in bytes, if that is known.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::NotQcow2 => Some(0),
            Self::UnsupportedVersion { .. } => Some(4),
            Self::L1TooSmall { .. } => Some(36),
            Self::UnknownFeatures { .. } => Some(72),
            Self::UnknownValue { field, .. }
            | Self::UnknownName { field, .. }
            | Self::TooShort { field, .. }
            | Self::OutOfRange { field, .. }
            | Self::Misaligned { field, .. }
            | Self::ReservedBits { field, .. }
            | Self::OutsideFile { field, .. }
            | Self::InsideHeader { field, .. }
            | Self::Inconsistent { field, .. } => field.at,
            Self::HeaderFull { .. }
            | Self::RefcountOverflow { .. }
            | Self::SnapshotExtraData { .. }
            | Self::SnapshotTableTooLong { .. } => None,
        }
    }

    /// What the error calls for.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NotQcow2 => ErrorClass::NotQcow2,
            Self::UnsupportedVersion { .. }
            | Self::UnknownFeatures { .. }
            | Self::UnknownValue { .. }
            | Self::UnknownName { .. } => ErrorClass::Unsupported,
            Self::HeaderFull { .. } | Self::RefcountOverflow { .. } => ErrorClass::Invalid,
            Self::TooShort { .. }
            | Self::OutOfRange { .. }
            | Self::Misaligned { .. }
            | Self::ReservedBits { .. }
            | Self::OutsideFile { .. }
            | Self::InsideHeader { .. }
            | Self::L1TooSmall { .. }
            | Self::SnapshotExtraData { .. }
            | Self::SnapshotTableTooLong { .. }
            | Self::Inconsistent { .. } => ErrorClass::Corrupt,
        }
    }
}
