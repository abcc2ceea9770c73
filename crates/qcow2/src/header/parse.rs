//! Reading a header: every check that needs nothing but the first cluster and the file's length.
//!
//! What only some uses have to refuse passes: a dirty or corrupt image, encryption without a key.

use zerocopy::FromBytes;

use super::raw::{RawV2, RawV3};
use super::{Compression, CryptMethod, Header};
use crate::error::{Field, FormatError};
use crate::extension::{self, Extension, ExtensionKind};
use crate::feature::{Autoclear, Compatible, FeatureName, Incompatible, describe_unknown};
use crate::limits;
use crate::offset::{ClusterBits, HostOffset};

/// A header's refcount table may be missing or misplaced when the header is read for a check that will rebuild it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refcounts {
    Needed,
    ToBeRebuilt,
}

impl Header {
    /// Whether a file that begins so is (or claims to be) a QCOW2 image. Only ever to reject one that is given as
    /// something else: formats are not guessed.
    #[must_use]
    pub fn probe(first_bytes: &[u8]) -> bool {
        first_bytes.starts_with(&Self::MAGIC)
    }

    /// How many bytes from the start of the file [`Header::parse`] wants: one cluster, at most 2 MiB. (Of a file that
    /// is shorter, all of it.) `first` are the first bytes of the file, at least 24 of them.
    ///
    /// # Errors
    /// No magic, a version other than 2 and 3, a cluster size out of bounds, or fewer than 24 bytes.
    pub fn needed_len(first: &[u8]) -> Result<usize, FormatError> {
        if !Self::probe(first) {
            return Err(FormatError::NotQcow2);
        }
        let too_short = || header_too_short(limits::HEADER_LEN_V2, first.len());
        let version = crate::wire::be32(first, 4).ok_or_else(too_short)?;
        if !(2..=3).contains(&version) {
            return Err(FormatError::UnsupportedVersion { version });
        }
        let bits = crate::wire::be32(first, 20).ok_or_else(too_short)?;
        Ok(1 << ClusterBits::new(bits)?.bits())
    }

    /// Parses and validates the header of a file of `file_len` bytes, whose first cluster is `first_cluster` (or all of
    /// a file that is shorter; what is past one cluster is ignored).
    ///
    /// # Errors
    /// Whatever breaks the specification or a bound of [`limits`], an unknown incompatible feature (by its name in the
    /// image's own table), a table that does not lie in the file. Neither the dirty nor the corrupt bit, nor encryption,
    /// is an error here.
    pub fn parse(first_cluster: &[u8], file_len: u64) -> Result<Self, FormatError> {
        parse(first_cluster, file_len, Refcounts::Needed)
    }

    /// As [`Header::parse`], for a check that can rebuild refcounts: the refcount table may be empty, or point
    /// anywhere. [`Header::refcount_table_problem`] says whether it is usable.
    ///
    /// # Errors
    /// As [`Header::parse`], but for the refcount table.
    pub fn parse_for_check(first_cluster: &[u8], file_len: u64) -> Result<Self, FormatError> {
        parse(first_cluster, file_len, Refcounts::ToBeRebuilt)
    }

    /// What is wrong with where the refcount table lies in a file of `file_len` bytes, if anything.
    #[must_use]
    pub fn refcount_table_problem(&self, file_len: u64) -> Option<FormatError> {
        check_refcount_table(self, file_len).err()
    }
}

fn parse(first_cluster: &[u8], file_len: u64, refcounts: Refcounts) -> Result<Header, FormatError> {
    let cluster_size = Header::needed_len(first_cluster)?;
    let wanted = usize::try_from(file_len).unwrap_or(usize::MAX).min(cluster_size);
    let area = first_cluster.get(..wanted).ok_or_else(|| header_too_short(wanted, first_cluster.len()))?;

    let (v2, rest) = RawV2::read_from_prefix(area).map_err(|_| header_too_short(limits::HEADER_LEN_V2, area.len()))?;
    let version = v2.version.get();
    let v3 = if version >= 3 {
        let short = |_| header_too_short(limits::HEADER_LEN_V3_MIN, area.len());
        Some(RawV3::read_from_prefix(rest).map_err(short)?.0)
    } else {
        None
    };
    let (header_length, unknown_fields, compression_type) = match &v3 {
        Some(v3) => additional_fields(area, v3.header_length.get())?,
        None => (limits::HEADER_LEN_V2, Vec::new(), 0),
    };

    let incompatible =
        v3.map_or(Incompatible::empty(), |v3| Incompatible::from_bits_retain(v3.incompatible_features.get()));
    if !incompatible.unknown().is_empty() {
        return Err(unknown_features(incompatible.unknown(), area, header_length));
    }
    let (backing_name, extensions_end) = backing_name(&v2, area, header_length)?;
    let extension_area = area.get(..extensions_end).unwrap_or(area);

    let header = Header {
        version,
        cluster_bits: ClusterBits::new(v2.cluster_bits.get())?,
        size: v2.size.get(),
        backing_name,
        crypt_method: crypt_method(v2.crypt_method.get())?,
        l1_size: v2.l1_size.get(),
        l1_table_offset: HostOffset::new(v2.l1_table_offset.get()),
        refcount_table_offset: HostOffset::new(v2.refcount_table_offset.get()),
        refcount_table_clusters: v2.refcount_table_clusters.get(),
        snapshot_count: v2.nb_snapshots.get(),
        snapshots_offset: HostOffset::new(v2.snapshots_offset.get()),
        incompatible,
        compatible: v3.map_or(Compatible::empty(), |v3| Compatible::from_bits_retain(v3.compatible_features.get())),
        autoclear: v3.map_or(Autoclear::empty(), |v3| Autoclear::from_bits_retain(v3.autoclear_features.get())),
        refcount_order: v3.map_or(limits::REFCOUNT_ORDER_DEFAULT, |v3| v3.refcount_order.get()),
        compression: compression(compression_type, incompatible)?,
        header_length,
        unknown_fields,
        extensions: extension::parse_chain(extension_area, header_length as usize)?,
    };
    header.check_fields()?;
    check_tables(&header, file_len, refcounts)?;
    Ok(header)
}

/// `header_length` checked, what the header holds past the known fields, and `compression_type` (0 where it is absent).
fn additional_fields(area: &[u8], header_length: u32) -> Result<(u32, Vec<u8>, u8), FormatError> {
    if header_length < limits::HEADER_LEN_V3_MIN || header_length as usize > area.len() {
        return Err(FormatError::OutOfRange {
            field: Field::at("header_length", 100),
            value: header_length.into(),
            min: limits::HEADER_LEN_V3_MIN.into(),
            max: area.len() as u64,
        });
    }
    let additional = area.get(limits::COMPRESSION_TYPE_AT as usize..header_length as usize).unwrap_or_default();
    let (compression_type, unknown) = additional.split_first().map_or((0, &[][..]), |(first, rest)| (*first, rest));
    Ok((header_length, unknown.to_vec(), compression_type))
}

/// The backing file name, and where in `area` the extensions must have ended.
fn backing_name(v2: &RawV2, area: &[u8], header_length: u32) -> Result<(Option<Vec<u8>>, usize), FormatError> {
    let offset = v2.backing_file_offset.get();
    if offset == 0 {
        return Ok((None, area.len()));
    }
    let len = v2.backing_file_size.get();
    if len > limits::BACKING_NAME_MAX {
        return Err(FormatError::OutOfRange {
            field: Field::at("backing_file_size", 16),
            value: len.into(),
            min: 0,
            max: limits::BACKING_NAME_MAX.into(),
        });
    }
    let max = (area.len() as u64).saturating_sub(len.into());
    let out_of_range = FormatError::OutOfRange {
        field: Field::at("backing_file_offset", 8),
        value: offset,
        min: header_length.into(),
        max,
    };
    if offset < header_length.into() || offset > max {
        return Err(out_of_range);
    }
    let at = usize::try_from(offset).map_err(|_| out_of_range.clone())?;
    let name = crate::wire::slice(area, at, len as usize).ok_or(out_of_range)?;
    // A name without characters names nothing; QEMU takes it as no backing file, too.
    Ok(((!name.is_empty()).then(|| name.to_vec()), at))
}

fn crypt_method(raw: u32) -> Result<CryptMethod, FormatError> {
    match raw {
        0 => Ok(CryptMethod::None),
        1 => Ok(CryptMethod::Aes),
        2 => Ok(CryptMethod::Luks),
        other => Err(FormatError::UnknownValue {
            field: Field::at("crypt_method", 32),
            value: other.into(),
            known: "0, 1 (AES), 2 (LUKS)",
        }),
    }
}

fn compression(raw: u8, incompatible: Incompatible) -> Result<Compression, FormatError> {
    let field = Field::at("compression_type", limits::COMPRESSION_TYPE_AT.into());
    let flagged = incompatible.contains(Incompatible::COMPRESSION);
    match (raw, flagged) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => {
            let problem = "it is absent or 0, but the compression type feature bit is set";
            Err(FormatError::Inconsistent { field, problem })
        }
        (_, false) => {
            let problem = "it is not 0, but the compression type feature bit is not set";
            Err(FormatError::Inconsistent { field, problem })
        }
        (other, true) => Err(FormatError::UnknownValue { field, value: other.into(), known: "0 (zlib), 1 (zstd)" }),
    }
}

/// Names unknown features by the image's own table. Nothing else of such an image is known to be what it seems, so the
/// table is looked for leniently.
fn unknown_features(unknown: Incompatible, area: &[u8], header_length: u32) -> FormatError {
    let extensions = extension::parse_chain(area, header_length as usize).unwrap_or_default();
    let table = extensions.iter().find(|e| e.kind == ExtensionKind::FeatureNames);
    let names: Vec<_> = table.map(|e: &Extension| FeatureName::parse_table(&e.data).collect()).unwrap_or_default();
    FormatError::UnknownFeatures { bits: unknown.bits(), names: describe_unknown(unknown, &names) }
}

fn header_too_short(needed: impl TryInto<u64>, available: usize) -> FormatError {
    let needed = needed.try_into().unwrap_or(u64::MAX);
    FormatError::TooShort { field: Field::at("header", 0), needed, available: available as u64 }
}

fn check_tables(header: &Header, file_len: u64, refcounts: Refcounts) -> Result<(), FormatError> {
    let l1_bytes = u64::from(header.l1_size) * 8;
    let l1 = Table { size: Field::at("l1_size", 36), offset: Field::at("l1_table_offset", 40), entry_len: 8 };
    l1.check_size(header.l1_size.into(), limits::L1_TABLE_BYTES_MAX)?;
    let needed = header.l1_entries_needed();
    if u64::from(header.l1_size) < needed {
        return Err(FormatError::L1TooSmall { l1_size: header.l1_size.into(), needed, size: header.size });
    }
    l1.check_place(header, header.l1_table_offset, l1_bytes, file_len)?;

    if refcounts == Refcounts::Needed {
        check_refcount_table(header, file_len)?;
    }

    let snapshots =
        Table { size: Field::at("nb_snapshots", 60), offset: Field::at("snapshots_offset", 64), entry_len: 1 };
    // A repair cuts off what is too much.
    let count = match refcounts {
        Refcounts::Needed => header.snapshot_count,
        Refcounts::ToBeRebuilt => header.snapshot_count.min(limits::SNAPSHOTS_MAX),
    };
    snapshots.check_size(count.into(), limits::SNAPSHOTS_MAX.into())?;
    // Entries have no fixed length; each has at least its fixed part.
    let least = u64::from(count) * crate::snapshot::FIXED_LEN as u64;
    snapshots.check_place(header, header.snapshots_offset, least, file_len)
}

fn check_refcount_table(header: &Header, file_len: u64) -> Result<(), FormatError> {
    let clusters = header.refcount_table_clusters;
    let table = Table {
        size: Field::at("refcount_table_clusters", 56),
        offset: Field::at("refcount_table_offset", 48),
        entry_len: header.cluster_bits.size(),
    };
    if clusters == 0 {
        let max = limits::REFCOUNT_TABLE_BYTES_MAX >> header.cluster_bits.bits();
        return Err(FormatError::OutOfRange { field: table.size, value: 0, min: 1, max });
    }
    table.check_size(clusters.into(), limits::REFCOUNT_TABLE_BYTES_MAX)?;
    let bytes = u64::from(clusters) << header.cluster_bits.bits();
    table.check_place(header, header.refcount_table_offset, bytes, file_len)
}

/// A table that the header points to: which fields say how large it is and where.
struct Table {
    size: Field,
    offset: Field,
    /// Bytes to an entry, of what the size field counts.
    entry_len: u64,
}

impl Table {
    /// Holds a count of entries against the table's greatest size in bytes.
    fn check_size(&self, entries: u64, bytes_max: u64) -> Result<(), FormatError> {
        let max = bytes_max / self.entry_len;
        if entries > max {
            return Err(FormatError::OutOfRange { field: self.size, value: entries, min: 0, max });
        }
        Ok(())
    }

    /// Checks where a table of `len` bytes (bounded before) lies. An empty one may have any aligned offset.
    fn check_place(&self, header: &Header, offset: HostOffset, len: u64, file_len: u64) -> Result<(), FormatError> {
        let (bits, value) = (header.cluster_bits, offset.get());
        if !bits.is_aligned(value) {
            return Err(FormatError::Misaligned { field: self.offset, value, alignment: bits.size() });
        }
        if len == 0 {
            return Ok(());
        }
        if value < bits.size() {
            return Err(FormatError::InsideHeader { field: self.offset, offset: value });
        }
        let max = limits::HOST_OFFSET_END - len;
        if value > max {
            return Err(FormatError::OutOfRange { field: self.offset, value, min: bits.size(), max });
        }
        // The file's last cluster may be cut short; what is missing of it reads as zeros.
        let end = bits.align_up(file_len).unwrap_or(u64::MAX);
        if value + len > end {
            return Err(FormatError::OutsideFile { field: self.offset, offset: value, len, file_len });
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "parse_test.rs"]
mod tests;
