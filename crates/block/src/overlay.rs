//! A disk that is being served goes on in an overlay: a snapshot of the disk outside of its image, which is left as it was at one
//! moment and is only read from then on.
//!
//! In two phases, for one disk or for several at one moment, all or none:
//!
//! 1. *Prepared*, while requests go on: each overlay is made (or one that is there is looked at), named durably, opened and locked;
//!    what the images that are written now have in memory is flushed.
//! 2. *Switched*, with the gates of all the disks closed ([`Grace::close`](crate::grace::Grace::close)): what came since is flushed,
//!    each image is opened anew as a lower layer, the caller [notes](snapshot_disks) what the disks' files are from now on,
//!    and the overlays take their places. Then the gates open, and the old images' locks become readers', as QEMU's do.
//!
//! Everything that can fail comes before the first overlay takes its place; then the disks go on as they were, and overlays that
//! were made are removed. An overlay is empty until its gate opens, so after a power cut in the midst it shows the same as the
//! image below it, and either may be taken for the disk's file. From the note on it has to be the overlay, since the next
//! write, and the next flush, reach it alone.
//!
//! Lock order: [`Disk::changes`] of the disks in the order of their addresses, then their gates in the same order.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cowhand_qcow2::{ClusterBits, CreateParams, Header};

use crate::chain::{self, DEPTH_MAX};
use crate::disk::{Disk, block_on, blocking_driver};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, File, LockMasks};
use crate::locks::lock;
use crate::node::Node;
use crate::qcow2::open::Opening;
use crate::qcow2::{Image, create};
use crate::queue::Queue;
use crate::sync::Arc;

/// The image in which a disk is to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Its file.
    pub path: PathBuf,
    /// Where it comes from.
    pub source: OverlaySource,
}

/// Where an overlay comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlaySource {
    /// It is made, in a file that must not be there yet.
    New(OverlayOptions),
    /// It is there: an empty qcow2 image of the disk's size, whose header names the disk's file as it is now, or none; that is
    /// written into it then.
    Prepared,
}

/// What a new overlay is like. It is of version 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayOptions {
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// L2 entries with subclusters, of clusters of at least 16 KiB.
    pub extended_l2: bool,
}

impl Default for OverlayOptions {
    fn default() -> Self {
        Self { cluster_bits: ClusterBits::DEFAULT, extended_l2: false }
    }
}

impl Overlay {
    /// A new one at `path`, as `qemu-img create` would make it.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), source: OverlaySource::New(OverlayOptions::default()) }
    }

    /// The one that is at `path`.
    #[must_use]
    pub fn prepared(path: &Path) -> Self {
        Self { path: path.to_path_buf(), source: OverlaySource::Prepared }
    }
}

impl Disk {
    /// Goes on in an overlay, at one moment between the call and its end; see [`snapshot_disks`].
    ///
    /// # Errors
    /// As there.
    pub fn snapshot_to(self: &Arc<Self>, overlay: Overlay) -> Result<()> {
        snapshot_disks(vec![(self.clone(), overlay)], || Ok(()))
    }
}

/// Lets several disks (of one storage) go on in overlays, all at one moment, or none.
///
/// `note` is called while all requests wait, when everything is durable and before anything is written to an overlay: whoever keeps
/// the names of the disks' files writes the new ones down here. If it fails nothing has happened. After a power cut the overlays
/// are the disks' files if `note` has returned; before that, either they or the files that were.
///
/// Blocks the calling thread, which must not be one that serves a queue of these disks with requests in flight.
///
/// # Errors
/// A disk that is read-only, thrown away, or named twice; a file that is there already, or a prepared one that does not fit; a place
/// from which the disk's file could not be opened again; the host's, and that of `note`. The disks are then as they were.
pub fn snapshot_disks(disks: Vec<(Arc<Disk>, Overlay)>, note: impl FnOnce() -> Result<()> + 'static) -> Result<()> {
    let Some((first, _)) = disks.first() else { return Ok(()) };
    let queue = Queue::new(blocking_driver(first.storage())?);
    let inner = queue.clone();
    block_on(&queue, async move { snapshot_on(&inner, &disks, note).await })
}

/// The same with the operations of `queue`.
pub(crate) async fn snapshot_on(
    queue: &Rc<Queue>,
    disks: &[(Arc<Disk>, Overlay)],
    note: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut ordered: Vec<_> = disks.iter().collect();
    ordered.sort_by_key(|(disk, _)| Arc::as_ptr(disk).addr());
    if let Some([(disk, _), _]) =
        ordered.windows(2).find(|pair| Arc::ptr_eq(&pair[0].0, &pair[1].0)).map(|p| [p[0], p[1]])
    {
        let message = "a disk can go on in one overlay only, and is named twice";
        return Err(Error::new(ErrorKind::Invalid, message).at_path(disk.node().path()));
    }
    let mut changes = Vec::new();
    for (disk, _) in &ordered {
        changes.push(disk.changes().lock().await);
    }
    let mut prepared = Vec::new();
    let switched = async {
        for (disk, overlay) in &ordered {
            prepared.push(Prepared::new(queue, disk, overlay).await?);
        }
        switch(queue, &mut prepared, note).await
    };
    let switched: Result<()> = switched.await;
    if switched.is_err() {
        prepared.into_iter().for_each(Prepared::undo);
    }
    switched
}

/// An overlay that is ready.
struct Prepared<'a> {
    disk: &'a Disk,
    path: &'a Path,
    /// The file was made for this.
    made: bool,
    /// Until it has taken its place.
    image: Option<Image>,
}

impl<'a> Prepared<'a> {
    async fn new(queue: &Rc<Queue>, disk: &'a Disk, overlay: &'a Overlay) -> Result<Self> {
        let top = disk.node();
        check_disk(disk, &top)?;
        let path = overlay.path.as_path();
        let backing = Backing::new(disk, &top, path)?;
        let made = match overlay.source {
            OverlaySource::Prepared => false,
            OverlaySource::New(options) => {
                make(queue, disk, path, &backing, options).await?;
                true
            }
        };
        let opened = open(queue, disk, path, &backing).await;
        let prepared = Self { disk, path, made, image: None };
        match opened {
            Ok(image) => Ok(Self { image: Some(image), ..prepared }),
            Err(e) => {
                prepared.undo();
                Err(e)
            }
        }
    }

    /// It is not needed: what was made for this goes.
    fn undo(self) {
        // What went wrong is what matters. A file that stays is an empty overlay, which does no harm.
        if self.made && self.disk.storage().remove(self.path).is_err() {
            tracing::warn!("cannot remove {}, which is not used", self.path.display());
        }
    }
}

fn check_disk(disk: &Disk, top: &Node) -> Result<()> {
    disk.check_whole()?;
    let refuse = |kind, message: &str| Err(Error::new(kind, message).at_path(top.path()));
    if disk.is_read_only() {
        return refuse(ErrorKind::ReadOnly, "the disk is read-only: it stays as it is without a snapshot");
    }
    if disk.spec().ephemeral {
        return refuse(
            ErrorKind::Unsupported,
            "the disk is thrown away (ephemeral=on), and so would be what an overlay needs",
        );
    }
    if disk.layers().len() >= DEPTH_MAX {
        return refuse(ErrorKind::Refused, &format!("the backing chain is {DEPTH_MAX} images deep already"));
    }
    Ok(())
}

/// How an overlay names the image below it.
struct Backing<'a> {
    top: &'a Node,
    name: Vec<u8>,
}

impl<'a> Backing<'a> {
    /// A name beside the overlay, or else an absolute path; only where it could be opened again from there.
    fn new(disk: &Disk, top: &'a Node, overlay: &Path) -> Result<Self> {
        let policy = disk.policy();
        let canonical = |path: &Path| {
            let error = |e| Error::io(format!("cannot find {}", path.display()), e).at_path(overlay);
            policy.storage.canonical(path).map_err(error)
        };
        let dir = canonical(chain::directory_of(overlay))?;
        let may_lie =
            |allowed: &PathBuf| policy.storage.canonical(allowed).is_ok_and(|allowed| dir.starts_with(allowed));
        if !policy.allow_dirs.is_empty() && !policy.allow_dirs.iter().any(may_lie) {
            let message = format!("{} is not one of the allowed directories; allow it with --allow-dir", dir.display());
            return Err(Error::new(ErrorKind::Refused, message).at_path(overlay));
        }
        let name = match top.path().file_name() {
            Some(name) if canonical(chain::directory_of(top.path()))? == dir => {
                // What has a colon would be taken for a protocol.
                let prefix: &[u8] = if name.as_bytes().contains(&b':') { b"./" } else { b"" };
                [prefix, name.as_bytes()].concat()
            }
            _ => canonical(top.path())?.as_os_str().as_bytes().to_vec(),
        };
        chain::referenced_path("backing file", &name, overlay, policy)?;
        Ok(Self { top, name })
    }

    fn format(&self) -> &'static str {
        self.top.format().name()
    }
}

/// Makes an empty overlay, durably.
async fn make(
    queue: &Rc<Queue>,
    disk: &Disk,
    path: &Path,
    backing: &Backing<'_>,
    OverlayOptions { cluster_bits, extended_l2 }: OverlayOptions,
) -> Result<()> {
    if backing.top.is_encrypted() {
        let message = "the disk is encrypted, and a new overlay would not be; make an encrypted one, and give that";
        return Err(Error::new(ErrorKind::Refused, message).at_path(backing.top.path()));
    }
    let params = CreateParams {
        cluster_bits,
        extended_l2,
        backing: Some((backing.name.clone(), backing.format().into())),
        ..CreateParams::new(backing.top.size())
    };
    let storage = disk.storage();
    let file = storage.create(path).map_err(|e| Error::io("cannot create", e).at_path(path))?;
    let made = create::create(queue, &file, path, &params, false).await;
    made.and_then(|()| sync_dir(disk, path)).inspect_err(|_| {
        // What went wrong is what matters; a file that stays is an empty overlay, or none.
        let _ = storage.remove(path);
    })
}

fn sync_dir(disk: &Disk, path: &Path) -> Result<()> {
    let synced = disk.storage().sync_dir(chain::directory_of(path));
    synced.map_err(|e| Error::io("cannot make the directory entry durable", e).at_path(path))
}

/// Looks at an overlay, opens and locks it, and makes it durable.
async fn open(queue: &Rc<Queue>, disk: &Disk, path: &Path, backing: &Backing<'_>) -> Result<Image> {
    let (spec, policy) = (disk.spec(), disk.policy());
    let refuse = |kind, message: &str| Err(Error::new(kind, message).at_path(path));
    let file = chain::open_unlocked(policy, path, true, spec)?;
    // Before the lock, which would blame another process.
    let identity = file.traits().identity;
    let mut layers = std::iter::successors(Some(backing.top), |node| node.backing().map(|node| &**node));
    if layers.any(|layer| layer.file().traits().identity == identity) {
        return refuse(ErrorKind::Invalid, "it is one of the disk's images already");
    }
    lock(&file, path, true, spec, policy)?;
    let mut opening = Opening::header(queue, file.clone(), path).await?;
    let size = opening.parsed().size.checked_next_multiple_of(512);
    if size != Some(backing.top.size()) {
        let message = format!("an overlay has the disk's size, which is {} bytes", backing.top.size());
        return refuse(ErrorKind::Invalid, &message);
    }
    if opening.parsed().is_data_file_raw() {
        return refuse(
            ErrorKind::Invalid,
            "its data file is to read as the disk by itself, so it cannot be an overlay",
        );
    }
    if opening.parsed().backing_name.is_none() {
        let header = opening.parsed().clone();
        // Looked at before anything is written to it.
        let image = chain::open_overlay(queue, opening, (&file, path), backing.top, (spec, policy)).await?;
        image.check_empty(queue).await?;
        name_backing(queue, (&file, path), header, backing).await?;
        opening = Opening::header(queue, file.clone(), path).await?;
    }
    check_backing(disk, opening.parsed(), path, backing)?;
    let image = chain::open_overlay(queue, opening, (&file, path), backing.top, (spec, policy)).await?;
    image.check_empty(queue).await?;
    let image_error = |e| Error::io("flush failed", e).at_path(path);
    queue.flush(&file, Barrier::Header).await.map_err(image_error)?;
    sync_dir(disk, path)?;
    image.begin_writing(queue).await?;
    Ok(image)
}

/// Whether an overlay's header leads to the disk's file as it is now, in its format.
fn check_backing(disk: &Disk, header: &Header, path: &Path, backing: &Backing<'_>) -> Result<()> {
    let policy = disk.policy();
    let name = header.backing_name.as_deref().unwrap_or_default();
    let below = chain::referenced_path("backing file", name, path, policy)?;
    let file = chain::open_unlocked(policy, &below, false, disk.spec())?;
    let top = backing.top;
    if file.traits().identity != top.file().traits().identity {
        let message = format!("its backing file is {}, not {}", below.display(), top.path().display());
        return Err(Error::new(ErrorKind::Invalid, message).at_path(path));
    }
    let said = header.backing_format();
    if said != Some(backing.format()) {
        let message = format!("it has to say that its backing file is {}, and says {said:?}", backing.format());
        return Err(Error::new(ErrorKind::Invalid, message).at_path(path));
    }
    Ok(())
}

/// Writes into the header of an image that nobody uses yet what its backing file is.
async fn name_backing(
    queue: &Rc<Queue>,
    (file, path): (&File, &Path),
    mut header: Header,
    backing: &Backing<'_>,
) -> Result<()> {
    header.set_backing(Some(&backing.name), Some(backing.format()));
    let encoded = header.encode();
    let bytes = encoded.map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()).at_path(path))?;
    let written = create::write_new_header(queue, file, &bytes, false).await;
    written.map_err(|e| Error::io("cannot write the header", e).at_path(path))
}

/// Puts the overlays into their places, at one moment.
async fn switch(queue: &Rc<Queue>, prepared: &mut [Prepared<'_>], note: impl FnOnce() -> Result<()>) -> Result<()> {
    // The most of it while requests go on, so that what they have to wait for is little.
    for Prepared { disk, .. } in &*prepared {
        disk.node().flush(queue).await?;
    }
    let mut held = Vec::new();
    for Prepared { disk, .. } in &*prepared {
        held.push(disk.grace().close().await);
        disk.check_whole()?;
    }
    let mut tops = Vec::new();
    for Prepared { disk, image, .. } in &mut *prepared {
        let top = disk.node();
        // What completed before is not to depend on a flush of the overlay. Bitmaps stay in use, in case that this fails later.
        top.settle(queue).await?;
        let cache = chain::metadata_cache_below(disk.spec(), disk.layers().len());
        let below = Arc::new(top.lowered(queue, cache).await?);
        if let Some(image) = image {
            image.put_over(below, disk.grace().clone());
        }
        tops.push(top);
    }
    for Prepared { disk, image, .. } in &*prepared {
        if let (Some(journal), Some(image)) = (disk.journal(), image) {
            journal.announce(image.file().traits().identity);
        }
    }
    note()?;
    // From here on nothing can fail.
    for (Prepared { disk, image, .. }, top) in prepared.iter_mut().zip(&tops) {
        if let Some(image) = image.take() {
            if let Some(journal) = disk.journal() {
                top.detach();
                journal.switch(image.file().traits().identity);
                image.attach(journal.ring());
            }
            disk.replace(Arc::new(Node::Qcow2(Box::new(image))));
        }
        // They are the old image's, and say what was changed in it up to now.
        if let Err(e) = top.save_bitmaps(queue).await {
            tracing::warn!("{e}; the dirty bitmaps in {} are inconsistent from now on", top.path().display());
        }
        for file in [top.file(), top.data_file()] {
            file.relax(LockMasks::READ);
        }
    }
    drop(held);
    Ok(())
}

#[cfg(test)]
#[path = "overlay_test.rs"]
mod tests;
