//! The image header: its fields, what they mean together, and changes to it.
//! (Specification, "Header", "Additional fields", "Header extensions".)
//!
//! `parse` reads and validates, `encode` writes, `switch` changes the extensions of an image in use and `replace` anything in it,
//! `create` makes the header of a new image.

mod create;
mod encode;
mod parse;
mod raw;
mod replace;
mod switch;

pub use create::CreateParams;
pub use switch::{HeaderStep, HeaderSwitch};

use crate::error::FormatError;
use crate::extension::{BitmapsExtension, Extension, ExtensionKind, LuksExtension};
use crate::feature::{Autoclear, Compatible, FeatureName, Incompatible};
use crate::geometry::Geometry;
use crate::offset::{ClusterBits, HostOffset};

/// How guest data is encrypted (`crypt_method`). Without a key guest data is refused; metadata is never encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CryptMethod {
    /// Not at all.
    #[default]
    None,
    /// AES-256-CBC with the guest's sector as IV: legacy, weak.
    Aes,
    /// As the LUKS header says, which the header's extension points to.
    Luks,
}

/// How compressed clusters are compressed (`compression_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, called "zlib" by QEMU.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A validated header with everything that lies in the header area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// The virtual size in bytes; need not be a multiple of anything.
    pub size: u64,
    /// The backing file's name, as the bytes in the file (1 to 1023 of them); `None` without a backing file.
    pub backing_name: Option<Vec<u8>>,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Entries in the active L1 table: at least [`Header::l1_entries_needed`], more with VM state.
    pub l1_size: u32,
    /// Where the active L1 table starts (0 only when it has no entries).
    pub l1_table_offset: HostOffset,
    /// Where the refcount table starts.
    pub refcount_table_offset: HostOffset,
    /// Clusters that the refcount table takes.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table starts (0 when there are none).
    pub snapshots_offset: HostOffset,
    /// Features that must be known; all bits as in the file.
    pub incompatible: Incompatible,
    /// Features that may be ignored; all bits as in the file.
    pub compatible: Compatible,
    /// Features that a writer must keep up; all bits as in the file.
    pub autoclear: Autoclear,
    /// Refcounts are 2^`refcount_order` bits wide, 0 to 6; always 4 in version 2.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// `header_length` in bytes, as in the file: 72 in version 2, at least 104 in version 3. Encoding rounds it up to a
    /// multiple of 8.
    pub header_length: u32,
    /// What the header holds past the fields known here, from byte 105 to `header_length`: kept byte for byte.
    pub unknown_fields: Vec<u8>,
    /// The header extensions, in file order, each kept byte for byte.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// The first four bytes of every image.
    pub const MAGIC: [u8; 4] = *b"QFI\xfb";

    /// What table entries and index arithmetic have to know.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            version: self.version,
            extended_l2: self.is_extended_l2(),
            has_data_file: self.has_data_file(),
            refcount_order: self.refcount_order,
        }
    }

    /// L1 entries that the virtual size needs.
    #[must_use]
    pub fn l1_entries_needed(&self) -> u64 {
        self.geometry().l1_entries_for(self.size)
    }

    /// Width of a refcount in bits, 1 to 64.
    #[must_use]
    pub fn refcount_bits(&self) -> u32 {
        self.geometry().refcount_bits()
    }

    /// Entries in one L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        self.geometry().l2_entries()
    }

    /// Refcounts in one refcount block.
    #[must_use]
    pub fn refcount_block_entries(&self) -> u64 {
        self.geometry().refcount_block_entries()
    }

    /// Whether L2 entries are 16 bytes, with subclusters.
    #[must_use]
    pub fn is_extended_l2(&self) -> bool {
        self.incompatible.contains(Incompatible::EXTENDED_L2)
    }

    /// Whether guest data lies in an external data file.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.incompatible.contains(Incompatible::DATA_FILE)
    }

    /// Whether the external data file must read as a raw image by itself.
    #[must_use]
    pub fn is_data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear.contains(Autoclear::RAW_DATA_FILE)
    }

    /// Whether refcounts may be written late, under the dirty bit.
    #[must_use]
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible.contains(Compatible::LAZY_REFCOUNTS)
    }

    /// The data of the extension of this kind; of the last one, as in QEMU, if a backing format is there twice.
    #[must_use]
    pub fn extension(&self, kind: ExtensionKind) -> Option<&[u8]> {
        self.extensions.iter().rfind(|e| e.kind == kind).map(|e| e.data.as_slice())
    }

    /// Sets the data of the extension of this kind, keeping its place in the chain, or takes it away. A new one goes to
    /// the front, as the known ones stand before the unknown ones in what QEMU writes. Of a kind that was there twice the last one stays.
    pub fn set_extension(&mut self, kind: ExtensionKind, data: Option<Vec<u8>>) {
        let mut later = self.extensions.iter().filter(|e| e.kind == kind).count();
        self.extensions.retain(|e| {
            let counts = e.kind == kind;
            later -= usize::from(counts);
            !counts || later == 0
        });
        let at = self.extensions.iter().position(|e| e.kind == kind);
        match (at.and_then(|at| self.extensions.get_mut(at)), data) {
            (Some(old), Some(data)) => old.data = data,
            (None, Some(data)) => self.extensions.insert(0, Extension { kind, data }),
            (_, None) => self.extensions.retain(|e| e.kind != kind),
        }
    }

    /// The backing file's format, if the header says it. It is never guessed where it does not.
    #[must_use]
    pub fn backing_format(&self) -> Option<&str> {
        // Parsing refuses one that is no UTF-8.
        self.extension(ExtensionKind::BackingFormat).and_then(|data| std::str::from_utf8(data).ok())
    }

    /// The external data file's name, as the bytes in the file; may be missing though there is a data file.
    #[must_use]
    pub fn external_data_file_name(&self) -> Option<&[u8]> {
        self.extension(ExtensionKind::DataFileName)
    }

    /// The entries of the feature name table, none if there is no table.
    #[must_use]
    pub fn feature_names(&self) -> Vec<FeatureName> {
        self.extension(ExtensionKind::FeatureNames)
            .map(|data| FeatureName::parse_table(data).collect())
            .unwrap_or_default()
    }

    /// Where the bitmap directory is. `None` without one, and also when the autoclear bit says that a writer did not
    /// keep it up: what the extension points to means nothing then.
    ///
    /// # Errors
    /// None for a parsed header (parsing has checked it); for one changed by hand, what [`BitmapsExtension::parse`] says.
    pub fn bitmaps_extension(&self) -> Result<Option<BitmapsExtension>, FormatError> {
        if !self.autoclear.contains(Autoclear::BITMAPS) {
            return Ok(None);
        }
        let data = self.extension(ExtensionKind::Bitmaps);
        data.map(|data| BitmapsExtension::parse(data, self.cluster_bits)).transpose()
    }

    /// Where the LUKS header is.
    ///
    /// # Errors
    /// None for a parsed header (parsing has checked it); for one changed by hand, what [`LuksExtension::parse`] says.
    pub fn luks_extension(&self) -> Result<Option<LuksExtension>, FormatError> {
        let data = self.extension(ExtensionKind::Luks);
        data.map(|data| LuksExtension::parse(data, self.cluster_bits)).transpose()
    }

    /// Encrypts the image with the LUKS header that lies at `place`, or not at all. The data is not touched.
    pub fn set_luks(&mut self, place: Option<LuksExtension>) {
        self.crypt_method = if place.is_some() { CryptMethod::Luks } else { CryptMethod::None };
        self.set_extension(ExtensionKind::Luks, place.map(|place| place.encode()));
    }

    /// Names the backing file and its format, or takes both away. The format of none is dropped with it.
    /// [`Header::encode`] checks the lengths.
    pub fn set_backing(&mut self, name: Option<&[u8]>, format: Option<&str>) {
        self.backing_name = name.filter(|name| !name.is_empty()).map(<[u8]>::to_vec);
        let format = format.filter(|_| self.backing_name.is_some());
        self.set_extension(ExtensionKind::BackingFormat, format.map(|format| format.as_bytes().to_vec()));
    }
}
