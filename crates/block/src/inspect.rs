//! What an image says of itself: its header, snapshots and bitmaps, for people and scripts.
//!
//! One file is opened, for reading, and nothing that it names: neither a backing file nor an external data file. (CVE-2024-4467.) No secret
//! is asked for, and no guest data is read.

use std::path::PathBuf;

use cowhand_qcow2::{Header, luks};

use crate::bitmap::BitmapInfo;
use crate::chain::{self, OpenPolicy};
use crate::change::SnapshotInfo;
use crate::disk::{block_on, blocking_driver};
use crate::error::{Error, Result};
use crate::protocol::How;
use crate::qcow2::inspect::Inspection;
use crate::queue::Queue;
use crate::spec::{Cache, DiskSpec, Format};

/// What there is to say of an image.
#[derive(Clone, Debug)]
pub struct ImageInfo {
    /// Its file.
    pub path: PathBuf,
    /// As it was given.
    pub format: Format,
    /// The virtual size in bytes.
    pub virtual_size: u64,
    /// How long the file is, in bytes.
    pub file_len: u64,
    /// How much of the host's space the file takes, in bytes.
    pub allocated: u64,
    /// What only a qcow2 image has.
    pub qcow2: Option<Qcow2Info>,
}

impl ImageInfo {
    /// The backing file that the image names, if there is one, where the policy allows to open it.
    ///
    /// # Errors
    /// It is no plain file, is not there, or lies outside the allowed directories.
    pub fn backing(&self, policy: &OpenPolicy) -> Result<Option<PathBuf>> {
        let name = self.qcow2.as_ref().and_then(|qcow2| qcow2.header.backing_name.as_ref());
        name.map(|name| chain::referenced_path("backing file", name, &self.path, policy)).transpose()
    }
}

/// What there is to say of a qcow2 image.
#[derive(Clone, Debug)]
pub struct Qcow2Info {
    /// All that its header says.
    pub header: Header,
    /// Its internal snapshots, in the order of their table.
    pub snapshots: Vec<SnapshotInfo>,
    /// Its bitmaps, in the order of their directory.
    pub bitmaps: Vec<BitmapInfo>,
    /// Its LUKS header.
    pub luks: Option<luks::Header>,
}

/// Looks at the image that is described, which is locked for as long unless it is to be opened without locks.
///
/// # Errors
/// The file cannot be opened, locked or read; it is not of this format; its header, snapshot table, bitmap directory or LUKS header is
/// damaged.
pub fn inspect(spec: &DiskSpec, policy: &OpenPolicy) -> Result<ImageInfo> {
    let queue = Queue::new(blocking_driver(&policy.storage)?);
    let (path, format) = (&*spec.path, spec.format);
    let opening = {
        let (queue, policy) = (queue.clone(), policy.clone());
        let spec = DiskSpec { readonly: true, cache: Cache::default(), ..spec.clone() };
        async move { chain::open_file(&queue, How { write: false, spec: &spec, policy: &policy }).await }
    };
    let file = block_on(&queue, opening)?;
    let io_error = |e| Error::io("cannot tell the file's length", e).at_path(path);
    let file_len = file.length().map_err(io_error)?;
    let allocated = file.allocated().map_err(io_error)?;
    let mut info = ImageInfo {
        path: path.to_path_buf(),
        format,
        virtual_size: file_len.next_multiple_of(512),
        file_len,
        allocated,
        qcow2: None,
    };
    if format == Format::Qcow2 {
        let task = {
            let (queue, file, path) = (queue.clone(), file.clone(), path.to_path_buf());
            async move { Inspection::make(&queue, file, &path).await }
        };
        let Inspection { header, snapshots, bitmaps, luks } = block_on(&queue, task)?;
        info.virtual_size = header.size;
        info.qcow2 = Some(Qcow2Info { header, snapshots, bitmaps, luks });
    }
    file.unlock();
    Ok(info)
}
