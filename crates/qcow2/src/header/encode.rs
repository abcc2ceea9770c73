//! Writing a header, and the checks that reading and writing share.

use zerocopy::{FromBytes, IntoBytes};

use super::raw::{RawV2, RawV3};
use super::{Compression, CryptMethod, Header};
use crate::error::{Field, FormatError};
use crate::extension::{ExtensionKind, LuksExtension};
use crate::feature::{Autoclear, Incompatible};
use crate::limits;

/// What is written in one go, and what a disk writes whole or not at all.
const SECTOR: usize = 512;

impl Header {
    /// The whole header area: header, extensions, end marker, backing file name; padded with zeros to a multiple of 512
    /// bytes (at most one cluster). Parsing it gives this header back, with `header_length` rounded up to 8.
    ///
    /// # Errors
    /// It does not fit into a cluster, or a field has a value that parsing would refuse. Where the tables lie is not
    /// looked at.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        self.check_fields()?;
        self.check_layout()?;
        let header_length = self.encoded_header_length();
        let extensions = self.extensions.iter().map(|e| e.encoded_len() as u64).sum::<u64>();
        let end_marker = 8;
        let name = self.backing_name.as_deref().unwrap_or_default();
        let name_at = u64::from(header_length) + extensions + end_marker;
        let needed = name_at + name.len() as u64;
        if needed > self.cluster_bits.size() {
            return Err(FormatError::HeaderFull { needed, available: self.cluster_bits.size() });
        }

        let mut out = Vec::with_capacity((needed as usize).next_multiple_of(SECTOR));
        out.extend_from_slice(self.raw_v2(name_at).as_bytes());
        if self.version >= 3 {
            out.extend_from_slice(self.raw_v3(header_length).as_bytes());
            if header_length > limits::COMPRESSION_TYPE_AT {
                out.push(match self.compression {
                    Compression::Zlib => 0,
                    Compression::Zstd => 1,
                });
                out.extend_from_slice(&self.unknown_fields);
            }
            out.resize(header_length as usize, 0);
        }
        for extension in &self.extensions {
            extension.encode(&mut out)?;
        }
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(name);
        out.resize(out.len().next_multiple_of(SECTOR), 0);
        Ok(out)
    }

    /// `current` (the first sector of the image, or more of it) with the numbers of this header put in: size, L1 table,
    /// refcount table, snapshots, feature bits. This is how a change of those is written: one sector, and what lies
    /// around them stays as it is, whoever laid it out.
    ///
    /// # Errors
    /// `current` is not this image's header (other version, cluster size, `header_length`, backing name length, …), so
    /// that more than those numbers would have to change: that takes [`Header::encode`]. Of the incompatible features
    /// only the dirty and the corrupt bit may change so; the others say what the rest of the image is like. Or a field
    /// has a value that parsing would refuse.
    pub fn encode_fixed(&self, current: &[u8]) -> Result<Vec<u8>, FormatError> {
        self.check_fields()?;
        let other = || inconsistent("header", 0, "more than one sector's numbers would have to change");
        let mut sector = current.to_vec();
        let (v2, rest) = RawV2::mut_from_prefix(&mut sector).map_err(|_| other())?;
        let (old_len, new_len) = (v2.backing_file_size.get(), self.backing_name.as_ref().map_or(0, Vec::len));
        let same_name = if v2.backing_file_offset.get() == 0 { new_len == 0 } else { old_len as usize == new_len };
        let new = self.raw_v2(v2.backing_file_offset.get());
        let same = v2.magic == new.magic
            && v2.version == new.version
            && v2.cluster_bits == new.cluster_bits
            && v2.crypt_method == new.crypt_method
            && same_name;
        if !same {
            return Err(other());
        }
        *v2 = RawV2 { backing_file_offset: v2.backing_file_offset, backing_file_size: v2.backing_file_size, ..new };
        if self.version >= 3 {
            let (v3, _) = RawV3::mut_from_prefix(rest).map_err(|_| other())?;
            let new = self.raw_v3(self.header_length);
            let changed = Incompatible::from_bits_retain(v3.incompatible_features.get()) ^ self.incompatible;
            let same = v3.header_length == new.header_length && v3.refcount_order == new.refcount_order;
            if !same || !changed.difference(Incompatible::DIRTY | Incompatible::CORRUPT).is_empty() {
                return Err(other());
            }
            *v3 = new;
        }
        Ok(sector)
    }

    fn raw_v2(&self, name_at: u64) -> RawV2 {
        let name_len = self.backing_name.as_ref().map_or(0, Vec::len);
        RawV2 {
            magic: Self::MAGIC,
            version: self.version.into(),
            backing_file_offset: if name_len == 0 { 0 } else { name_at }.into(),
            // check_layout has bounded the name.
            backing_file_size: u32::try_from(name_len).unwrap_or(u32::MAX).into(),
            cluster_bits: self.cluster_bits.bits().into(),
            size: self.size.into(),
            crypt_method: match self.crypt_method {
                CryptMethod::None => 0,
                CryptMethod::Aes => 1,
                CryptMethod::Luks => 2,
            }
            .into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_table_offset.get().into(),
            refcount_table_offset: self.refcount_table_offset.get().into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshot_count.into(),
            snapshots_offset: self.snapshots_offset.get().into(),
        }
    }

    fn raw_v3(&self, header_length: u32) -> RawV3 {
        RawV3 {
            incompatible_features: self.incompatible.bits().into(),
            compatible_features: self.compatible.bits().into(),
            autoclear_features: self.autoclear.bits().into(),
            refcount_order: self.refcount_order.into(),
            header_length: header_length.into(),
        }
    }

    /// `header_length` as it is written: never less than what the fields need, a multiple of 8.
    pub(super) fn encoded_header_length(&self) -> u32 {
        if self.version < 3 {
            return limits::HEADER_LEN_V2;
        }
        let needs_compression = self.compression != Compression::Zlib || !self.unknown_fields.is_empty();
        let least = if needs_compression { limits::HEADER_LEN_V3 } else { limits::HEADER_LEN_V3_MIN };
        let known = limits::COMPRESSION_TYPE_AT as usize + 1 + self.unknown_fields.len();
        let with_unknown = if needs_compression { u32::try_from(known).unwrap_or(u32::MAX - 7) } else { 0 };
        self.header_length.min(u32::MAX - 7).max(least).max(with_unknown).next_multiple_of(8)
    }

    /// What must hold of a header that is to be written, beyond [`Header::check_fields`].
    fn check_layout(&self) -> Result<(), FormatError> {
        let cluster_size = self.cluster_bits.size();
        if u64::from(self.encoded_header_length()) > cluster_size {
            return Err(FormatError::HeaderFull { needed: self.header_length.into(), available: cluster_size });
        }
        let name_len = self.backing_name.as_ref().map_or(0, Vec::len) as u64;
        if name_len > limits::BACKING_NAME_MAX.into() {
            return Err(FormatError::OutOfRange {
                field: Field::at("backing_file_size", 16),
                value: name_len,
                min: 0,
                max: limits::BACKING_NAME_MAX.into(),
            });
        }
        if self.incompatible.contains(Incompatible::COMPRESSION) != (self.compression != Compression::Zlib) {
            return Err(FormatError::Inconsistent {
                field: Field::at("compression_type", limits::COMPRESSION_TYPE_AT.into()),
                problem: "the compression type feature bit must be set exactly when it is not zlib",
            });
        }
        let v3_only = !self.incompatible.is_empty()
            || !self.compatible.is_empty()
            || !self.autoclear.is_empty()
            || !self.unknown_fields.is_empty();
        if self.version < 3 && v3_only {
            return Err(inconsistent("version", 4, "version 2 has no feature bits and no additional fields"));
        }
        Ok(())
    }

    /// What must hold between the fields, whether they were read or are to be written.
    pub(super) fn check_fields(&self) -> Result<(), FormatError> {
        if !(2..=3).contains(&self.version) {
            return Err(FormatError::UnsupportedVersion { version: self.version });
        }
        if !self.incompatible.unknown().is_empty() {
            let names = crate::feature::describe_unknown(self.incompatible.unknown(), &self.feature_names());
            return Err(FormatError::UnknownFeatures { bits: self.incompatible.unknown().bits(), names });
        }
        let order_min = if self.version < 3 { limits::REFCOUNT_ORDER_DEFAULT } else { 0 };
        let order_max = if self.version < 3 { limits::REFCOUNT_ORDER_DEFAULT } else { limits::REFCOUNT_ORDER_MAX };
        if !(order_min..=order_max).contains(&self.refcount_order) {
            return Err(FormatError::OutOfRange {
                field: Field::at("refcount_order", 96),
                value: self.refcount_order.into(),
                min: order_min.into(),
                max: order_max.into(),
            });
        }
        if self.is_extended_l2() && self.cluster_bits.bits() < limits::EXTENDED_L2_CLUSTER_BITS_MIN {
            return Err(inconsistent("cluster_bits", 20, "extended L2 entries need at least 14"));
        }
        self.check_data_file()?;
        self.check_extensions()
    }

    fn check_data_file(&self) -> Result<(), FormatError> {
        let raw = self.autoclear.contains(Autoclear::RAW_DATA_FILE);
        if raw && !self.has_data_file() {
            return Err(inconsistent("autoclear_features", 88, "raw external data without an external data file"));
        }
        if raw && self.backing_name.is_some() {
            return Err(inconsistent("backing_file_offset", 8, "a raw external data file excludes a backing file"));
        }
        if self.has_data_file() && self.snapshot_count != 0 {
            return Err(inconsistent("nb_snapshots", 60, "an external data file excludes internal snapshots"));
        }
        Ok(())
    }

    fn check_extensions(&self) -> Result<(), FormatError> {
        // A backing format may be there twice: tools that add header extensions leave the old one, and the last one holds.
        let once =
            [ExtensionKind::FeatureNames, ExtensionKind::Bitmaps, ExtensionKind::Luks, ExtensionKind::DataFileName];
        for kind in once {
            if self.extensions.iter().filter(|e| e.kind == kind).count() > 1 {
                return Err(FormatError::Inconsistent { field: Field::new(kind.name()), problem: "it is there twice" });
            }
        }
        if let Some(format) = self.extension(ExtensionKind::BackingFormat) {
            let field = Field::new(ExtensionKind::BackingFormat.name());
            if format.len() > limits::BACKING_FORMAT_MAX {
                return Err(FormatError::OutOfRange {
                    field,
                    value: format.len() as u64,
                    min: 0,
                    max: limits::BACKING_FORMAT_MAX as u64,
                });
            }
            if std::str::from_utf8(format).is_err() {
                return Err(FormatError::Inconsistent { field, problem: "it is no UTF-8" });
            }
        }
        if self.autoclear.contains(Autoclear::BITMAPS) && self.bitmaps_extension()?.is_none() {
            return Err(inconsistent("autoclear_features", 88, "the bitmaps bit is set without a bitmaps extension"));
        }
        let luks: Option<LuksExtension> = self.luks_extension()?;
        match (self.crypt_method == CryptMethod::Luks, luks) {
            (true, None) => Err(inconsistent("crypt_method", 32, "LUKS without an encryption header extension")),
            (false, Some(_)) => Err(inconsistent("crypt_method", 32, "an encryption header extension without LUKS")),
            _ => Ok(()),
        }
    }
}

fn inconsistent(name: &'static str, at: u64, problem: &'static str) -> FormatError {
    FormatError::Inconsistent { field: Field::at(name, at), problem }
}

#[cfg(test)]
#[path = "encode_test.rs"]
mod tests;
