//! The header of a new image.

use super::{Compression, CryptMethod, Header};
use crate::error::{Field, FormatError};
use crate::extension::{Extension, ExtensionKind};
use crate::feature::{Autoclear, Compatible, FeatureName, Incompatible};
use crate::limits;
use crate::offset::{ClusterBits, HostOffset};

/// What a new image shall be. [`CreateParams::new`] has what `qemu-img create` would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateParams {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// Refcounts are 2^`refcount_order` bits wide.
    pub refcount_order: u32,
    /// The virtual size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// The backing file's name and its format.
    pub backing: Option<(Vec<u8>, String)>,
    /// The external data file's name.
    pub data_file: Option<Vec<u8>>,
    /// The external data file shall read as a raw image by itself.
    pub data_file_raw: bool,
    /// How compressed clusters will be compressed.
    pub compression: Compression,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
}

impl CreateParams {
    /// Version 3, 64 KiB clusters, 16-bit refcounts, no backing file.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            version: 3,
            cluster_bits: ClusterBits::DEFAULT,
            refcount_order: limits::REFCOUNT_ORDER_DEFAULT,
            size,
            backing: None,
            data_file: None,
            data_file_raw: false,
            compression: Compression::Zlib,
            extended_l2: false,
            lazy_refcounts: false,
        }
    }

    /// The header, with `l1_size` as the size needs. Where the tables lie (`l1_table_offset`, `refcount_table_offset`,
    /// `refcount_table_clusters`) is for the caller to fill in.
    ///
    /// # Errors
    /// The options contradict each other, version 2 is asked for what it does not have, the L1 table for `size` would
    /// be over 32 MiB, or the names do not fit the first cluster.
    pub fn header(&self) -> Result<Header, FormatError> {
        let too_large = |max| FormatError::OutOfRange { field: Field::new("size"), value: self.size, min: 0, max };
        let size = self.size.checked_next_multiple_of(512).ok_or_else(|| too_large(u64::MAX - 511))?;
        let mut header = Header {
            version: self.version,
            cluster_bits: self.cluster_bits,
            size,
            backing_name: None,
            crypt_method: CryptMethod::None,
            l1_size: 0,
            l1_table_offset: HostOffset::default(),
            refcount_table_offset: HostOffset::default(),
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: HostOffset::default(),
            incompatible: self.incompatible(),
            compatible: if self.lazy_refcounts { Compatible::LAZY_REFCOUNTS } else { Compatible::empty() },
            autoclear: if self.data_file_raw { Autoclear::RAW_DATA_FILE } else { Autoclear::empty() },
            refcount_order: self.refcount_order,
            compression: self.compression,
            header_length: if self.version < 3 { limits::HEADER_LEN_V2 } else { limits::HEADER_LEN_V3 },
            // The padding of the 112-byte header.
            unknown_fields: vec![0; if self.version < 3 { 0 } else { 7 }],
            extensions: self.extensions(),
        };
        if let Some((name, format)) = &self.backing {
            header.set_backing(Some(name), Some(format));
        }
        let entries_max = limits::L1_TABLE_BYTES_MAX / 8;
        let entries = header.l1_entries_needed();
        let l1_size = u32::try_from(entries).ok().filter(|_| entries <= entries_max);
        header.l1_size =
            l1_size.ok_or_else(|| too_large(header.geometry().l2_coverage().saturating_mul(entries_max)))?;
        // Also says whether everything fits.
        header.encode()?;
        Ok(header)
    }

    fn incompatible(&self) -> Incompatible {
        let mut bits = Incompatible::empty();
        bits.set(Incompatible::DATA_FILE, self.data_file.is_some());
        bits.set(Incompatible::COMPRESSION, self.compression != Compression::Zlib);
        bits.set(Incompatible::EXTENDED_L2, self.extended_l2);
        bits
    }

    /// In QEMU's order; the backing format goes in front of them.
    fn extensions(&self) -> Vec<Extension> {
        let mut extensions = Vec::new();
        if let Some(name) = &self.data_file {
            extensions.push(Extension { kind: ExtensionKind::DataFileName, data: name.clone() });
        }
        // Of a 512-byte cluster the table would take nearly all; QEMU leaves it out there, too.
        if self.version >= 3 && self.cluster_bits.bits() > limits::CLUSTER_BITS_MIN {
            let data = FeatureName::known_table();
            extensions.push(Extension { kind: ExtensionKind::FeatureNames, data });
        }
        extensions
    }
}
