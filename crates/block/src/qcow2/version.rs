//! Another version of the format.
//!
//! *Up*: the snapshot table is written anew, with what version 3 needs, and one switch of the header says the version and names it. *Down*:
//! what version 2 cannot say has gone before ([`Image::expand_zeroes`] for one), and one switch of the header says the version.
//!
//! Alone with the image, on the file, which is then read again; see [`super::snapshot`].

use std::rc::Rc;

use cowhand_qcow2::{
    Autoclear, Compatible, Compression, ExtensionKind, FeatureName, Geometry, Incompatible, L2Kind, Snapshot, limits,
};

use super::Image;
use super::layout::Structure;
use crate::error::{Error, ErrorKind, Result};
use crate::queue::Queue;

impl Image {
    /// Makes an image of version 2 one of version 3.
    ///
    /// # Errors
    /// There is no room in the header; the host's.
    pub(crate) async fn upgrade(&self, queue: &Rc<Queue>) -> Result<()> {
        self.check_writable()?;
        if self.geometry.version >= 3 {
            return Ok(());
        }
        let header = self.header.lock().header.clone();
        let old = self.snapshots(queue).await?;
        let mut snapshots = old.entries.clone();
        snapshots.iter_mut().for_each(|snapshot| snapshot.complete(header.size));
        let geometry = Geometry { version: 3, ..self.geometry };
        let table = Snapshot::encode_table(&snapshots, &geometry).map_err(|e| self.format_error(&e))?;
        let place = self.write_structure(queue, Structure::SnapshotTable, &table).await?;
        self.settle(queue).await?;
        self.replace_header(queue, |header| {
            header.version = 3;
            header.header_length = limits::HEADER_LEN_V3;
            // The padding of the 112-byte header.
            header.unknown_fields = vec![0; 7];
            header.snapshots_offset = place;
            if header.cluster_bits.bits() > limits::CLUSTER_BITS_MIN {
                header.set_extension(ExtensionKind::FeatureNames, Some(FeatureName::known_table()));
            }
        })
        .await?;
        let freed = self.drop_structure(queue, header.snapshots_offset, old.len).await;
        self.warn_of_leak(freed);
        Ok(())
    }

    /// Why an image cannot become one of version 2, given the width that its refcounts and the size that its disk will have.
    pub(crate) async fn check_downgrade(&self, queue: &Rc<Queue>, refcount_order: u32, size: u64) -> Result<()> {
        self.check_writable()?;
        let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, message).at_path(&self.path));
        let header = self.header.lock().header.clone();
        if refcount_order != limits::REFCOUNT_ORDER_DEFAULT {
            return refuse("compat=0.10 requires refcount_bits=16".into());
        }
        if header.has_data_file() {
            return refuse("Cannot downgrade an image with a data file".into());
        }
        let snapshots = self.snapshots(queue).await?.entries;
        let fits = |s: &Snapshot| s.vm_state_size <= u32::MAX.into() && s.disk_size.is_none_or(|then| then == size);
        if !snapshots.iter().all(fits) {
            return refuse("Internal snapshots prevent downgrade of image".into());
        }
        let left = header.incompatible.difference(Incompatible::DIRTY | Incompatible::COMPRESSION);
        if !left.is_empty() {
            return refuse(format!("Cannot downgrade an image with incompatible features {:#x} set", left.bits()));
        }
        if header.compression != Compression::Zlib && self.has_compressed(queue).await? {
            let message = "Cannot downgrade an image with zstd compression type and existing compressed clusters";
            return refuse(message.into());
        }
        Ok(())
    }

    /// Makes the image one of version 2: [`check_downgrade`](Self::check_downgrade) has agreed, and nothing is left that version 2 cannot
    /// say.
    pub(crate) async fn downgrade(&self, queue: &Rc<Queue>) -> Result<()> {
        self.replace_header(queue, |header| {
            header.version = 2;
            header.header_length = limits::HEADER_LEN_V2;
            header.unknown_fields.clear();
            header.compression = Compression::Zlib;
            header.incompatible = Incompatible::empty();
            header.compatible = Compatible::empty();
            header.autoclear = Autoclear::empty();
            header.set_extension(ExtensionKind::FeatureNames, None);
            header.set_extension(ExtensionKind::Bitmaps, None);
        })
        .await
    }

    /// Whether the disk or a snapshot has compressed clusters.
    async fn has_compressed(&self, queue: &Rc<Queue>) -> Result<bool> {
        for table in self.all_l2_tables(queue).await? {
            let bytes = self.read_l2(queue, table).await?;
            for entry in self.l2_entries(&bytes) {
                if matches!(entry.decode(&self.geometry), Ok(L2Kind::Compressed(_))) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
