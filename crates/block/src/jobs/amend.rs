//! An image that is there becomes another sort of image: another version, refcount width, size, other flags, other keys.
//!
//! Everything that can be refused is refused before the first change. Each change is made alone with the image and is whole by itself,
//! so whatever ends the work half-way leaves a sound image with the same content, and doing it again completes it.

use std::rc::Rc;

use cowhand_qcow2::limits;

use super::Progress;
use crate::disk::{Disk, block_on};
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use crate::qcow2::create::Preallocation;
pub use crate::qcow2::keys::KeyChange;
use crate::queue::Queue;
use crate::sync::Arc;

/// What is to change; what is none stays as it is.
#[derive(Clone, Debug, Default)]
pub struct AmendOptions {
    /// The version of the format: 2 or 3.
    pub version: Option<u32>,
    /// Refcounts become 2^this bits wide.
    pub refcount_order: Option<u32>,
    /// Whether QEMU may write refcounts late.
    pub lazy_refcounts: Option<bool>,
    /// The virtual size in bytes.
    pub size: Option<u64>,
    /// The name of the external data file; an empty one is taken out of the header.
    pub data_file: Option<Vec<u8>>,
    /// Whether the data file must read as the disk by itself.
    pub data_file_raw: Option<bool>,
    /// The backing file, which must be the one that is named already: it changes by a rebase.
    pub backing_file: Option<Vec<u8>>,
    /// Its format, likewise.
    pub backing_format: Option<String>,
    /// The key slots of an encrypted image.
    pub keys: Option<KeyChange>,
}

/// Changes the disk's topmost image, on the calling thread.
///
/// # Errors
/// The image cannot become that, in QEMU's words; the host's. It is sound then, and has the content that it had.
pub fn amend(disk: &Arc<Disk>, options: &AmendOptions, progress: Progress) -> Result<()> {
    let driver = disk.storage().driver().map_err(|e| Error::io("cannot set up an I/O queue", e))?;
    let queue = Queue::new(driver);
    let task = {
        let (queue, disk, options) = (queue.clone(), disk.clone(), options.clone());
        async move { amend_on(&queue, &disk, &options, progress).await }
    };
    block_on(&queue, task)
}

/// The same with the operations of `queue`.
pub(crate) async fn amend_on(
    queue: &Rc<Queue>,
    disk: &Arc<Disk>,
    options: &AmendOptions,
    mut progress: Progress,
) -> Result<()> {
    let node = disk.node();
    let Node::Qcow2(image) = &*node else {
        let message = format!("Format driver '{}' does not support option amendment", node.format().name());
        return Err(Error::new(ErrorKind::Unsupported, message).at_path(node.path()));
    };
    let header = image.header_now();
    let version = options.version.unwrap_or(header.version);
    let order = options.refcount_order.unwrap_or(header.refcount_order);
    let refuse = |message: &str| Err(Error::new(ErrorKind::Invalid, message).at_path(node.path()));
    if options.data_file.is_some() && !header.has_data_file() {
        return refuse("data-file can only be set for images that use an external data file");
    }
    if options.data_file_raw == Some(true) && !header.is_data_file_raw() {
        return refuse("data-file-raw cannot be set on existing images");
    }
    if version < 3 && options.refcount_order.is_some_and(|order| order != limits::REFCOUNT_ORDER_DEFAULT) {
        return refuse(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
        );
    }
    let backing = options.backing_file.as_deref().or(header.backing_name.as_deref());
    let format = options.backing_format.as_deref().or(header.backing_format());
    if backing != header.backing_name.as_deref() || format != header.backing_format() {
        return refuse("Cannot amend the backing file");
    }
    if version < 3 && options.lazy_refcounts == Some(true) {
        return refuse(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        );
    }
    if let Some(size) = options.size {
        image.check_resize_as(size, version.max(header.version))?;
    }
    if version < header.version {
        image.check_downgrade(queue, order, options.size.unwrap_or(header.size)).await?;
    }
    if order != header.refcount_order {
        image.check_refcount_order(queue, order).await?;
    }
    if let Some(keys) = &options.keys {
        image.check_keys(keys)?;
    }
    drop(node);

    if version > header.version {
        disk.alter_on(queue, async |image| image.upgrade(queue).await).await?;
    }
    if let Some(keys) = &options.keys {
        let secret = disk.secret()?;
        let storage = disk.storage().clone();
        disk.alter_on(queue, async |image| image.change_keys(queue, &storage, keys, secret.as_ref()).await).await?;
    }
    if order != header.refcount_order {
        let told = &mut progress;
        disk.alter_on(queue, async |image| image.set_refcount_order(queue, order, &mut **told).await).await?;
    }
    disk.alter_on(queue, async |image| {
        image.set_flags(queue, options.data_file.as_deref(), options.data_file_raw, options.lazy_refcounts).await
    })
    .await?;
    if let Some(size) = options.size {
        disk.resize_on(queue, size, Preallocation::Off).await?;
    }
    if version < header.version {
        let told = &mut progress;
        let Node::Qcow2(image) = &*disk.node() else { return Ok(()) };
        image.check_downgrade(queue, order, image.header_now().size).await?;
        let bitmaps = disk.bitmaps_on(queue).await?;
        if !bitmaps.is_empty() {
            let path = &disk.spec().path;
            tracing::warn!("{}: version 2 has no bitmaps: those of the image are removed", path.display());
        }
        for bitmap in bitmaps {
            disk.change_bitmaps_on(queue, &crate::bitmap::BitmapChange::Remove(bitmap.name)).await?;
        }
        disk.alter_on(queue, async |image| image.expand_zeroes(queue, &mut **told).await).await?;
        disk.alter_on(queue, async |image| image.downgrade(queue).await).await?;
    }
    progress(1, 1);
    Ok(())
}
