//! Header extensions: the chain of tagged blobs between the header and the backing file name.
//! (Specification, "Header extensions" and the sections after it.)
//!
//! Every extension is kept as its bytes, known or not, so that a header that is written again loses nothing; the known
//! ones are given meaning by the functions here and by [`crate::Header`]'s.

use crate::error::{Field, FormatError};
use crate::limits;
use crate::offset::{ClusterBits, HostOffset};
use crate::wire::{be32, be64, slice};

/// Which extension it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtensionKind {
    /// The backing file's format, as a string.
    BackingFormat,
    /// Names of feature bits.
    FeatureNames,
    /// Where the bitmap directory is.
    Bitmaps,
    /// Where the LUKS header is.
    Luks,
    /// The external data file's name.
    DataFileName,
    /// One that this crate does not know; never 0, which ends the chain.
    Unknown(u32),
}

impl ExtensionKind {
    /// The end of the chain.
    pub(crate) const END: u32 = 0;

    /// The kind with the type number `raw`.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Self {
        match raw {
            0xe279_2aca => Self::BackingFormat,
            0x6803_f857 => Self::FeatureNames,
            0x2385_2875 => Self::Bitmaps,
            0x0537_be77 => Self::Luks,
            0x4441_5441 => Self::DataFileName,
            other => Self::Unknown(other),
        }
    }

    /// The type number in the file.
    #[must_use]
    pub const fn raw(self) -> u32 {
        match self {
            Self::BackingFormat => 0xe279_2aca,
            Self::FeatureNames => 0x6803_f857,
            Self::Bitmaps => 0x2385_2875,
            Self::Luks => 0x0537_be77,
            Self::DataFileName => 0x4441_5441,
            Self::Unknown(other) => other,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::BackingFormat => "backing format extension",
            Self::FeatureNames => "feature name table extension",
            Self::Bitmaps => "bitmaps extension",
            Self::Luks => "encryption header extension",
            Self::DataFileName => "external data file name extension",
            Self::Unknown(_) => "unknown header extension",
        }
    }
}

/// One header extension, its data byte for byte (without the padding).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Which it is.
    pub kind: ExtensionKind,
    /// Its data.
    pub data: Vec<u8>,
}

impl Extension {
    /// Bytes of type and length in front of the data.
    const HEAD: usize = 8;

    /// Bytes that the extension takes in the file, the padding included.
    pub(crate) fn encoded_len(&self) -> usize {
        Self::HEAD + self.data.len().next_multiple_of(8)
    }

    /// Appends the extension with its padding.
    ///
    /// # Errors
    /// The data is 4 GiB or longer, or the kind is the number that ends the chain.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let field = Field::new(self.kind.name());
        let len = u32::try_from(self.data.len()).map_err(|_| FormatError::OutOfRange {
            field,
            value: self.data.len() as u64,
            min: 0,
            max: u32::MAX.into(),
        })?;
        if self.kind.raw() == ExtensionKind::END {
            return Err(FormatError::Inconsistent { field, problem: "type 0 is the end of the extensions" });
        }
        out.extend_from_slice(&self.kind.raw().to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(&self.data);
        let padding = self.data.len().next_multiple_of(8) - self.data.len();
        out.resize(out.len() + padding, 0);
        Ok(())
    }
}

/// Walks the chain that starts at byte `start` of `area`, which ends where the backing file name or the cluster's end
/// is. It ends at type 0, or where the area does.
///
/// Each step advances by at least 8 bytes, so it takes at most `area.len() / 8` of them, and the data copied is never
/// more than `area`.
///
/// # Errors
/// An extension that reaches past the end of the area.
pub(crate) fn parse_chain(area: &[u8], start: usize) -> Result<Vec<Extension>, FormatError> {
    let mut extensions = Vec::new();
    let mut at = start;
    while at < area.len() {
        let head = be32(area, at).zip(be32(area, at.saturating_add(4)));
        let (raw, len) = head.ok_or(FormatError::TooShort {
            field: Field::at("header extension", at as u64),
            needed: Extension::HEAD as u64,
            available: (area.len() - at) as u64,
        })?;
        if raw == ExtensionKind::END {
            break;
        }
        let kind = ExtensionKind::from_raw(raw);
        let (data_at, data_len) = (at + Extension::HEAD, len as usize);
        let data = slice(area, data_at, data_len).ok_or(FormatError::TooShort {
            field: Field::at(kind.name(), at as u64),
            needed: len.into(),
            available: area.len().saturating_sub(data_at) as u64,
        })?;
        extensions.push(Extension { kind, data: data.to_vec() });
        // The data lies inside the area, so neither rounding nor adding can overflow.
        at = data_at + data_len.next_multiple_of(8);
    }
    Ok(extensions)
}

/// What the bitmaps extension holds: where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many bitmaps there are, 1 to 65535.
    pub nb_bitmaps: u32,
    /// The directory's size in bytes, at most [`limits::BITMAP_DIRECTORY_BYTES_MAX`].
    pub directory_size: u64,
    /// Where the directory starts (a multiple of the cluster size).
    pub directory_offset: HostOffset,
}

impl BitmapsExtension {
    const LEN: usize = 24;
    /// Least size of a directory entry in bytes: its fixed part and a name of one byte, padded to 8.
    const ENTRY_MIN: u64 = 32;

    /// Parses the extension's data.
    ///
    /// # Errors
    /// Its length is not 24, a reserved byte is set, or a number is out of its bounds.
    pub fn parse(data: &[u8], cluster_bits: ClusterBits) -> Result<Self, FormatError> {
        let field = Field::new("bitmaps extension");
        let wrong_len = FormatError::Inconsistent { field, problem: "its length is not 24" };
        if data.len() != Self::LEN {
            return Err(wrong_len);
        }
        let (Some(nb_bitmaps), Some(reserved), Some(directory_size), Some(offset)) =
            (be32(data, 0), be32(data, 4), be64(data, 8), be64(data, 16))
        else {
            return Err(wrong_len);
        };
        if reserved != 0 {
            return Err(FormatError::ReservedBits { field, value: reserved.into(), reserved: reserved.into() });
        }
        in_range("nb_bitmaps", nb_bitmaps.into(), 1, limits::BITMAPS_MAX.into())?;
        let least = u64::from(nb_bitmaps) * Self::ENTRY_MIN;
        in_range("bitmap_directory_size", directory_size, least, limits::BITMAP_DIRECTORY_BYTES_MAX)?;
        let directory_offset = metadata_offset("bitmap_directory_offset", offset, directory_size, cluster_bits)?;
        Ok(Self { nb_bitmaps, directory_size, directory_offset })
    }

    /// The extension's data.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(Self::LEN);
        data.extend_from_slice(&self.nb_bitmaps.to_be_bytes());
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&self.directory_size.to_be_bytes());
        data.extend_from_slice(&self.directory_offset.get().to_be_bytes());
        data
    }
}

/// What the full disk encryption header pointer holds: where the LUKS header with its key material is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LuksExtension {
    /// Where the LUKS header starts (a multiple of the cluster size). Key material offsets in it are relative to this.
    pub offset: HostOffset,
    /// Bytes of header and key material, at most [`limits::LUKS_HEADER_BYTES_MAX`]; the space allocated is rounded up
    /// to clusters.
    pub len: u64,
}

impl LuksExtension {
    const LEN: usize = 16;
    /// Bytes of the LUKS partition header itself.
    const PARTITION_HEADER: u64 = 592;

    /// Parses the extension's data.
    ///
    /// # Errors
    /// Its length is not 16, or a number is out of its bounds.
    pub fn parse(data: &[u8], cluster_bits: ClusterBits) -> Result<Self, FormatError> {
        let field = Field::new("encryption header extension");
        let wrong_len = FormatError::Inconsistent { field, problem: "its length is not 16" };
        if data.len() != Self::LEN {
            return Err(wrong_len);
        }
        let (Some(offset), Some(len)) = (be64(data, 0), be64(data, 8)) else {
            return Err(wrong_len);
        };
        in_range("encryption header length", len, Self::PARTITION_HEADER, limits::LUKS_HEADER_BYTES_MAX)?;
        let offset = metadata_offset("encryption header offset", offset, len, cluster_bits)?;
        Ok(Self { offset, len })
    }

    /// The extension's data.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [self.offset.get().to_be_bytes(), self.len.to_be_bytes()].concat()
    }
}

fn in_range(name: &'static str, value: u64, min: u64, max: u64) -> Result<(), FormatError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(FormatError::OutOfRange { field: Field::new(name), value, min, max })
    }
}

/// Checks where a metadata structure of `len` bytes lies: aligned, past the header, below 2^56.
pub(crate) fn metadata_offset(
    name: &'static str,
    value: u64,
    len: u64,
    bits: ClusterBits,
) -> Result<HostOffset, FormatError> {
    let field = Field::new(name);
    if !bits.is_aligned(value) {
        return Err(FormatError::Misaligned { field, value, alignment: bits.size() });
    }
    if value < bits.size() {
        return Err(FormatError::InsideHeader { field, offset: value });
    }
    in_range(name, value, bits.size(), limits::HOST_OFFSET_END.saturating_sub(len))?;
    Ok(HostOffset::new(value))
}
