//! Where guest data itself is read and written: in the image's own file or in its external data file, through its cipher if it has
//! one.
//!
//! Encrypted data goes through a buffer: what the guest's memory holds is never the cipher's to work in.

use std::path::PathBuf;
use std::rc::Rc;

use cowhand_qcow2::cipher::{Cipher, CipherError};
use cowhand_qcow2::{GuestOffset, HostOffset};

use super::Image;
use super::refcounts::Extent;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffer, File, IoSeg, segs_len};
use crate::queue::Queue;
use crate::sync::Arc;

/// An external data file: each cluster lies in it where the guest sees it. (Specification, incompatible bit 2.)
#[derive(Clone)]
pub(crate) struct DataFile {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    /// The file is to read as a raw image by itself (autoclear bit 1): what reads as zeros must be zeros in it.
    pub(crate) raw: bool,
}

/// Where some guest data lies.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    pub(super) guest: u64,
    pub(super) host: u64,
}

impl Image {
    /// The file that holds guest data.
    pub(crate) fn data_file(&self) -> &File {
        self.external.as_ref().map_or(&self.content, |external| &external.file)
    }

    /// Whether guest data lies in a file that is to read as the disk by itself.
    pub(super) fn has_raw_data_file(&self) -> bool {
        self.external.as_ref().is_some_and(|external| external.raw)
    }

    /// Whether guest data can be read and written where it lies, as it is.
    pub(super) fn is_plain(&self) -> bool {
        self.cipher.is_none()
    }

    /// Clusters for guest data from `offset` (the start of a cluster) on: up to `wanted`, together.
    pub(super) async fn allocate_data(&self, queue: &Rc<Queue>, offset: u64, wanted: u64) -> Result<Extent> {
        match &self.external {
            // They have their place, and no refcounts; what was there before is still in them.
            Some(_) => Ok(Extent { host: HostOffset::new(offset), clusters: wanted, zeroed: false }),
            None => {
                let extent = self.allocate(queue, wanted).await?;
                // Zeros in the file are no zeros to a cipher.
                Ok(Extent { zeroed: extent.zeroed && self.is_plain(), ..extent })
            }
        }
    }

    /// Clusters of [`allocate_data`](Self::allocate_data) that did not come into the mapping are free again.
    pub(super) fn give_back_data(&self, extent: Extent) {
        if self.external.is_none() {
            self.give_back(extent);
        }
    }

    pub(super) async fn read_data(&self, queue: &Rc<Queue>, spot: Spot, data: Vec<IoSeg>) -> Result<()> {
        let error = |e| self.data_error("cannot read", spot.host, e);
        let Some(cipher) = &self.cipher else {
            return queue.read(self.data_file(), spot.host, data).await.map_err(error);
        };
        let read = queue.read_buffer(self.data_file(), spot.host, segs_len(&data) as usize).await;
        let mut buffer = read.map_err(error)?;
        let sector = sector(cipher, spot);
        sector.and_then(|sector| cipher.decrypt(sector, &mut buffer)).map_err(|e| self.cipher_error(e, spot))?;
        buffer.scatter(0, &data);
        Ok(())
    }

    /// Writes segments, of which some lie in `keep`.
    pub(super) async fn write_data(
        &self,
        queue: &Rc<Queue>,
        spot: Spot,
        data: Vec<IoSeg>,
        keep: Vec<Arc<Buffer>>,
    ) -> Result<()> {
        let written = match &self.cipher {
            None => queue.write(self.data_file(), spot.host, data, keep).await,
            Some(cipher) => {
                let mut buffer = Buffer::zeroed(segs_len(&data) as usize);
                buffer.gather(0, &data);
                let sector = sector(cipher, spot);
                sector
                    .and_then(|sector| cipher.encrypt(sector, &mut buffer))
                    .map_err(|e| self.cipher_error(e, spot))?;
                queue.write_buffer(self.data_file(), spot.host, buffer).await
            }
        };
        written.map_err(|e| self.data_error("cannot write", spot.host, e))
    }

    /// Gives the space of data that nothing maps any more back, where no refcount does: in an external data file.
    pub(super) async fn forget_data(&self, queue: &Rc<Queue>, offset: u64, len: u64) {
        if let Some(external) = &self.external
            && let Err(e) = queue.punch(&external.file, offset, len).await
        {
            tracing::debug!("{}: cannot punch {offset:#x}+{len:#x}: {e}", external.path.display());
        }
    }

    /// Gives the space of clusters back that keep their place and read as zeros. Nobody else refers to them; the caller holds their
    /// range lock, so that no write comes in between. Before the mapping says so durably, a power cut leaves zeros where data was,
    /// or the data: but what was encrypted would be neither, and stays.
    pub(super) async fn empty_data(&self, queue: &Rc<Queue>, host: HostOffset, len: u64) {
        if self.external.is_none()
            && self.is_plain()
            && let Err(e) = queue.punch(&self.file, host.get(), len).await
        {
            tracing::debug!("{}: cannot punch {:#x}+{len:#x}: {e}", self.path.display(), host.get());
        }
    }

    fn data_error(&self, what: &str, offset: u64, error: std::io::Error) -> Error {
        let path = self.external.as_ref().map_or(&self.path, |external| &external.path);
        Error::io(what, error).at_path(path).at_offset(offset)
    }

    fn cipher_error(&self, error: CipherError, spot: Spot) -> Error {
        Error::new(ErrorKind::Invalid, error.to_string()).at_path(&self.path).at_offset(spot.host)
    }
}

/// The number by which the cipher knows the first sector.
fn sector(cipher: &Cipher, spot: Spot) -> std::result::Result<u64, CipherError> {
    let number = cipher.numbering().sector(GuestOffset::new(spot.guest), HostOffset::new(spot.host));
    number.ok_or(CipherError::NotSectors { len: (spot.host % 512) as usize })
}
