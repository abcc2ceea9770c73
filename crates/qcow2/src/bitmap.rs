//! Persistent bitmaps: the directory and the tables of each. (Specification, "Bitmaps".)
//!
//! Not here: the header extension that points to the directory ([`crate::extension`]), the bits themselves.

use bitflags::bitflags;

use crate::entry::encodable;
use crate::error::{Field, FormatError};
use crate::extension::metadata_offset;
use crate::geometry::Geometry;
use crate::limits;
use crate::offset::HostOffset;
use crate::wire::{be16, be32, be64, slice};

const FIXED_LEN: usize = 24;
const ENTRY: Field = Field::new("bitmap directory entry");
const TABLE_ENTRY: Field = Field::new("bitmap table entry");

bitflags! {
    /// A bitmap's flags. Reserved bits are refused.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct BitmapFlags: u32 {
        /// It was not saved properly: inconsistent. Set on disk before the first write that it should reflect.
        const IN_USE = 1 << 0;
        /// It is enabled: every write must be reflected.
        const AUTO = 1 << 1;
        /// It may be used though its extra data is not known.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
    }
}

/// What sort of bitmap it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapKind {
    /// Which parts of the disk were written.
    DirtyTracking,
}

/// One bitmap, as the directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Where its table starts.
    pub table_offset: HostOffset,
    /// Entries in its table.
    pub table_size: u32,
    /// Its flags.
    pub flags: BitmapFlags,
    /// What sort it is.
    pub kind: BitmapKind,
    /// One bit stands for 2^`granularity_bits` bytes of disk, 9 to 31.
    pub granularity_bits: u8,
    /// Its name, 1 to 1023 bytes, unique in the image.
    pub name: Vec<u8>,
    /// Extra data, byte for byte. No meaning is defined for any.
    pub extra_data: Vec<u8>,
}

impl DirectoryEntry {
    /// Whether it may be used: not when its extra data is unknown (as all is) and not said to be compatible. It is kept
    /// as it is then.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.extra_data.is_empty() || self.flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE)
    }

    /// Bytes of bitmap data for a disk of `size` bytes.
    #[must_use]
    pub fn data_len(&self, size: u64) -> u64 {
        // One byte stands for 2^(granularity_bits + 3) bytes of disk.
        size.div_ceil(1u64 << self.granularity_bits.min(limits::BITMAP_GRANULARITY_BITS_MAX)).div_ceil(8)
    }

    /// Parses the entry that `bytes` begin with; also gives the bytes it takes, padded to 8.
    ///
    /// # Errors
    /// `bytes` are too short; reserved bits or padding are set; an unknown type; a number out of its bounds.
    pub fn parse(bytes: &[u8], geometry: &Geometry) -> Result<(Self, usize), FormatError> {
        let too_short = |needed: usize| FormatError::TooShort {
            field: ENTRY,
            needed: needed as u64,
            available: bytes.len() as u64,
        };
        let fixed = slice(bytes, 0, FIXED_LEN).ok_or_else(|| too_short(FIXED_LEN))?;
        let u16_at = |at| be16(fixed, at).ok_or_else(|| too_short(FIXED_LEN));
        let u32_at = |at| be32(fixed, at).ok_or_else(|| too_short(FIXED_LEN));

        let raw_flags = u32_at(12)?;
        let flags = BitmapFlags::from_bits(raw_flags).ok_or(FormatError::ReservedBits {
            field: Field::new("bitmap's flags"),
            value: raw_flags.into(),
            reserved: (raw_flags & !BitmapFlags::all().bits()).into(),
        })?;
        let [kind, granularity_bits] = u16_at(16)?.to_be_bytes();
        if kind != 1 {
            let field = Field::new("bitmap's type");
            return Err(FormatError::UnknownValue { field, value: kind.into(), known: "1 (dirty tracking)" });
        }
        let extra_len = u32_at(20)?;
        if extra_len > limits::BITMAP_EXTRA_DATA_MAX {
            let (value, max) = (extra_len.into(), limits::BITMAP_EXTRA_DATA_MAX.into());
            return Err(FormatError::OutOfRange { field: Field::new("bitmap's extra data size"), value, min: 0, max });
        }
        let name_at = FIXED_LEN + extra_len as usize;
        let name_len = usize::from(u16_at(18)?);
        let padded = (name_at + name_len).next_multiple_of(8);
        let whole = slice(bytes, 0, padded).ok_or_else(|| too_short(padded))?;
        let part = |at, len| slice(whole, at, len).ok_or_else(|| too_short(padded));
        if part(name_at + name_len, padded - name_at - name_len)?.iter().any(|&byte| byte != 0) {
            return Err(FormatError::Inconsistent { field: ENTRY, problem: "its padding is not zero" });
        }
        let entry = Self {
            table_offset: HostOffset::new(be64(fixed, 0).ok_or_else(|| too_short(FIXED_LEN))?),
            table_size: u32_at(8)?,
            flags,
            kind: BitmapKind::DirtyTracking,
            granularity_bits,
            name: part(name_at, name_len)?.to_vec(),
            extra_data: part(FIXED_LEN, extra_len as usize)?.to_vec(),
        };
        entry.check(geometry)?;
        Ok((entry, padded))
    }

    /// Parses the directory of `count` bitmaps, which is the whole of `bytes`.
    ///
    /// # Errors
    /// Too many bitmaps, two of one name, a directory that does not end where `bytes` do; what
    /// [`DirectoryEntry::parse`] says of an entry.
    pub fn parse_directory(bytes: &[u8], count: u32, geometry: &Geometry) -> Result<Vec<Self>, FormatError> {
        let field = Field::new("bitmap directory");
        let (value, max) = (count.into(), limits::BITMAPS_MAX.into());
        if value > max {
            return Err(FormatError::OutOfRange { field: Field::new("nb_bitmaps"), value, min: 0, max });
        }
        let mut entries = Vec::with_capacity((count as usize).min(bytes.len() / FIXED_LEN));
        let mut at = 0;
        for _ in 0..count {
            let (entry, len) = Self::parse(bytes.get(at..).unwrap_or_default(), geometry)?;
            entries.push(entry);
            at += len;
        }
        if at != bytes.len() {
            let problem = "its size is not the sum of its entries";
            return Err(FormatError::Inconsistent { field, problem });
        }
        let mut names: Vec<&[u8]> = entries.iter().map(|e: &Self| e.name.as_slice()).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
            return Err(FormatError::Inconsistent { field, problem: "two bitmaps have the same name" });
        }
        Ok(entries)
    }

    /// Appends the entry, padded to 8 bytes.
    ///
    /// # Errors
    /// A field has a value that parsing would refuse.
    pub fn encode(&self, geometry: &Geometry, out: &mut Vec<u8>) -> Result<(), FormatError> {
        self.check(geometry)?;
        let too_long = |what: &[u8], max: u32| FormatError::OutOfRange {
            field: ENTRY,
            value: what.len() as u64,
            min: 0,
            max: max.into(),
        };
        let name_len = u16::try_from(self.name.len()).map_err(|_| too_long(&self.name, limits::BITMAP_NAME_MAX))?;
        let extra_len = u32::try_from(self.extra_data.len())
            .ok()
            .filter(|&len| len <= limits::BITMAP_EXTRA_DATA_MAX)
            .ok_or_else(|| too_long(&self.extra_data, limits::BITMAP_EXTRA_DATA_MAX))?;
        let start = out.len();
        out.extend_from_slice(&self.table_offset.get().to_be_bytes());
        out.extend_from_slice(&self.table_size.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        let BitmapKind::DirtyTracking = self.kind;
        out.extend_from_slice(&[1, self.granularity_bits]);
        out.extend_from_slice(&name_len.to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&self.extra_data);
        out.extend_from_slice(&self.name);
        let padded = (out.len() - start).next_multiple_of(8);
        out.resize(start + padded, 0);
        Ok(())
    }

    fn check(&self, geometry: &Geometry) -> Result<(), FormatError> {
        let bits = u64::from(self.granularity_bits);
        let (min, max) = (limits::BITMAP_GRANULARITY_BITS_MIN.into(), limits::BITMAP_GRANULARITY_BITS_MAX.into());
        if !(min..=max).contains(&bits) {
            let field = Field::new("bitmap's granularity_bits");
            return Err(FormatError::OutOfRange { field, value: bits, min, max });
        }
        let (name_len, max) = (self.name.len() as u64, limits::BITMAP_NAME_MAX.into());
        if !(1..=max).contains(&name_len) {
            let field = Field::new("bitmap's name_size");
            return Err(FormatError::OutOfRange { field, value: name_len, min: 1, max });
        }
        if self.flags.bits() & !BitmapFlags::all().bits() != 0 {
            let (value, known) = (u64::from(self.flags.bits()), u64::from(BitmapFlags::all().bits()));
            let field = Field::new("bitmap's flags");
            return Err(FormatError::ReservedBits { field, value, reserved: value & !known });
        }
        let max = limits::BITMAP_BYTES_MAX >> geometry.cluster_bits.bits();
        if u64::from(self.table_size) > max {
            let field = Field::new("bitmap_table_size");
            return Err(FormatError::OutOfRange { field, value: self.table_size.into(), min: 0, max });
        }
        let len = u64::from(self.table_size) * 8;
        if len == 0 && geometry.cluster_bits.is_aligned(self.table_offset.get()) {
            return Ok(());
        }
        metadata_offset("bitmap_table_offset", self.table_offset.get(), len, geometry.cluster_bits).map(|_| ())
    }
}

/// An entry of a bitmap table: where a cluster of the bitmap's bits is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// All bits are 0.
    AllZeros,
    /// All bits are 1.
    AllOnes,
    /// The bits are in this cluster.
    Cluster(HostOffset),
}

impl BitmapTableEntry {
    /// Decodes the value `raw` (in host byte order).
    ///
    /// # Errors
    /// Reserved bits are set, or the offset is not the start of a cluster, or it is the header's.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, FormatError> {
        let offset = raw & (limits::HOST_OFFSET_END - 1) & !0x1ff;
        let reserved = if offset == 0 { raw & !1 } else { raw & !offset };
        if reserved != 0 {
            return Err(FormatError::ReservedBits { field: TABLE_ENTRY, value: raw, reserved });
        }
        match raw {
            0 => Ok(Self::AllZeros),
            1 => Ok(Self::AllOnes),
            _ => {
                let bits = geometry.cluster_bits;
                metadata_offset("bitmap table entry", offset, bits.size(), bits).map(Self::Cluster)
            }
        }
    }

    /// The entry's value (in host byte order).
    ///
    /// # Errors
    /// The offset is 0, not a multiple of 512, or not below 2^56.
    pub fn encode(self) -> Result<u64, FormatError> {
        match self {
            Self::AllZeros => Ok(0),
            Self::AllOnes => Ok(1),
            Self::Cluster(host) => match encodable(TABLE_ENTRY, host)? {
                0 => Err(FormatError::InsideHeader { field: TABLE_ENTRY, offset: 0 }),
                offset => Ok(offset),
            },
        }
    }
}

#[cfg(test)]
#[path = "bitmap_test.rs"]
mod tests;
