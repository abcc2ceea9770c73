//! Changes of a whole disk while queues serve it: internal snapshots, another size, and the VM state beside the disk.
//!
//! A change is made alone with the disk. The gate ([`Grace::close`](crate::grace::Grace::close)) turns new requests away and lets
//! those that are in end; everything is committed; the change is made on the file, and the topmost layer is read again and
//! takes the old one's place; the gate opens, and the requests that came meanwhile go on. A guest sees requests that took a little longer. What a
//! change costs grows with the image's metadata, not with its data.
//!
//! Range locks would let guests go on for longer, but every table of the image changes in each of these operations, and all requests in
//! flight would have to be told apart by whether they began before; there is nothing in between that a guest could be served
//! from without a copy.
//!
//! When a change fails, the layer is read again all the same: the file tells how far it came, and every step of it leaves the image
//! sound; that is made durable before anyone goes on. When even that fails (or the thread that makes the change dies), requests
//! fail from then on, and nothing is written any more.
//!
//! Lock order: [`Disk::changes`] is the first of all, before those of [`crate::qcow2`].

use std::rc::Rc;
use std::time::Duration;

use cowhand_qcow2::Snapshot;

use crate::disk::{Disk, block_on, blocking_driver, check_size};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, IoSeg};
use crate::jobs::rebase::NewBacking;
use crate::node::Node;
use crate::qcow2::Image;
use crate::qcow2::create::Preallocation;
use crate::queue::Queue;
use crate::sync::Arc;

/// An internal snapshot, as it is shown to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its unique ID.
    pub id: String,
    /// Its name, which others may have too.
    pub name: String,
    /// When it was taken: time since the Epoch.
    pub date: Duration,
    /// How long the guest had run.
    pub vm_clock: Duration,
    /// Bytes of VM state, 0 if there is none.
    pub vm_state_size: u64,
    /// The virtual size in bytes when it was taken; None if the image does not say (version 2).
    pub disk_size: Option<u64>,
    /// The instruction count of record/replay.
    pub icount: Option<u64>,
}

impl From<&Snapshot> for SnapshotInfo {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            id: String::from_utf8_lossy(&snapshot.id).into_owned(),
            name: String::from_utf8_lossy(&snapshot.name).into_owned(),
            date: Duration::from_secs(snapshot.date_sec.into()) + Duration::from_nanos(snapshot.date_nsec.into()),
            vm_clock: Duration::from_nanos(snapshot.vm_clock_nsec),
            vm_state_size: snapshot.vm_state_size,
            disk_size: snapshot.disk_size,
            icount: snapshot.icount.filter(|&count| count != u64::MAX),
        }
    }
}

/// All of these block the calling thread, which must not be one that serves a queue of this disk with requests in flight: they
/// would be waited for.
impl Disk {
    /// The internal snapshots of the topmost layer, in the order of its table.
    ///
    /// # Errors
    /// The table is damaged, or cannot be read. A raw disk has no snapshots, which is no error.
    pub fn snapshots(self: &Arc<Self>) -> Result<Vec<SnapshotInfo>> {
        self.alone(async |disk, queue| disk.snapshots_on(queue).await)
    }

    /// Takes a snapshot of the disk at one moment between the call and its end. Names need not be unique; IDs are.
    ///
    /// # Errors
    /// A name that is empty or over 255 bytes; a disk that cannot have snapshots (raw, read-only, with an external data file); as
    /// many references to a cluster already as can be counted; the host's. The disk is then as it was.
    pub fn create_snapshot(self: &Arc<Self>, name: &str) -> Result<SnapshotInfo> {
        let name = name.to_string();
        self.alone(async move |disk, queue| disk.create_snapshot_on(queue, &name).await)
    }

    /// Makes the disk what it was when the snapshot was taken, its size included. `which` is an ID or else a name (of several that
    /// have it, the first). A guest that runs meanwhile would not know what happened to its disk.
    ///
    /// # Errors
    /// There is no such snapshot; its tables are damaged; the host's. The disk is then as it was.
    pub fn apply_snapshot(self: &Arc<Self>, which: &str) -> Result<()> {
        let which = which.to_string();
        self.alone(async move |disk, queue| disk.apply_snapshot_on(queue, &which).await)
    }

    /// Deletes a snapshot. `which` is an ID or else a name (of several that have it, the first).
    ///
    /// # Errors
    /// As [`apply_snapshot`](Self::apply_snapshot).
    pub fn delete_snapshot(self: &Arc<Self>, which: &str) -> Result<()> {
        let which = which.to_string();
        self.alone(async move |disk, queue| disk.delete_snapshot_on(queue, &which).await)
    }

    /// Has the disk, which is read-only, show what it was when the snapshot was taken, its size included. `which` chooses among the
    /// snapshots: the first for which it says so.
    ///
    /// # Errors
    /// There is no such snapshot; a disk that is not read-only, or raw; damaged tables.
    pub fn view_snapshot(self: &Arc<Self>, which: impl Fn(&SnapshotInfo) -> bool + 'static) -> Result<()> {
        self.alone(async move |disk, queue| disk.view_snapshot_on(queue, which).await)
    }

    /// Makes the disk `bytes` large. What is added reads as zeros; what is cut off is gone, and requests there fail.
    ///
    /// # Errors
    /// Not a multiple of the block size; more than the format can map; a version 2 image with snapshots; a block device; the
    /// host's. The disk is then as it was.
    pub fn resize(self: &Arc<Self>, bytes: u64) -> Result<()> {
        self.resize_with(bytes, Preallocation::Off)
    }

    /// The same, with the space of what is added taken at once. A raw disk has no metadata of which there could be more.
    ///
    /// # Errors
    /// Also when the disk becomes smaller, and yet space is to be taken.
    pub fn resize_with(self: &Arc<Self>, bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.alone(async move |disk, queue| disk.resize_on(queue, bytes, preallocation).await)
    }

    /// Does something on the calling thread, with a queue of its own.
    pub(crate) fn alone<T: 'static>(
        self: &Arc<Self>,
        work: impl AsyncFnOnce(&Self, &Rc<Queue>) -> Result<T> + 'static,
    ) -> Result<T> {
        let queue = Queue::new(blocking_driver(self.storage())?);
        let (disk, inner) = (self.clone(), queue.clone());
        block_on(&queue, async move { work(&disk, &inner).await })
    }

    pub(crate) async fn snapshots_on(&self, queue: &Rc<Queue>) -> Result<Vec<SnapshotInfo>> {
        let _changes = self.changes().lock().await;
        match &*self.node() {
            Node::Raw(_) => Ok(Vec::new()),
            Node::Qcow2(image) => Ok(image.snapshots(queue).await?.entries.iter().map(SnapshotInfo::from).collect()),
        }
    }

    pub(crate) async fn create_snapshot_on(&self, queue: &Rc<Queue>, name: &str) -> Result<SnapshotInfo> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        let image = self.with_snapshots(&node)?;
        let table = image.snapshots(queue).await?;
        let new = image.new_snapshot(&table, name, self.storage().date())?;
        let info = SnapshotInfo::from(&new);
        self.change(queue, async |image| image.create_snapshot(queue, &table, new).await).await?;
        Ok(info)
    }

    pub(crate) async fn apply_snapshot_on(&self, queue: &Rc<Queue>, which: &str) -> Result<()> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        let image = self.with_snapshots(&node)?;
        let snapshot = image.find_snapshot(&image.snapshots(queue).await?, which)?;
        // What is no multiple of 512 is served as if it were, see [`Disk::size`]; absurd sizes are refused later.
        let size = snapshot.disk_size.and_then(|size| size.checked_next_multiple_of(512));
        check_size(self.spec(), size.unwrap_or(0))?;
        self.check_followed(size.unwrap_or(0))?;
        self.until_copied(0..u64::MAX).await;
        self.change(queue, async |image| {
            self.mark_all();
            image.apply_snapshot(queue, &snapshot).await
        })
        .await
    }

    pub(crate) async fn delete_snapshot_on(&self, queue: &Rc<Queue>, which: &str) -> Result<()> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        let image = self.with_snapshots(&node)?;
        let table = image.snapshots(queue).await?;
        let snapshot = image.find_snapshot(&table, which)?;
        self.change(queue, async |image| image.delete_snapshot(queue, &table, &snapshot).await).await
    }

    pub(crate) async fn resize_on(&self, queue: &Rc<Queue>, bytes: u64, preallocation: Preallocation) -> Result<()> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        let old = match &*node {
            Node::Raw(raw) => {
                raw.check_resize(preallocation)?;
                // Which need not be a multiple of anything, though the disk's is.
                raw.length()?
            }
            Node::Qcow2(image) => {
                image.check_resize(bytes)?;
                image.size()
            }
        };
        let served = bytes.checked_next_multiple_of(512).unwrap_or(bytes);
        check_size(self.spec(), served)?;
        self.check_followed(served)?;
        if bytes < old && preallocation != Preallocation::Off {
            let message = "a disk that becomes smaller needs no space";
            return Err(Error::new(ErrorKind::Invalid, message).at_path(node.path()));
        }
        if bytes == old {
            return Ok(());
        }
        // What is cut off, if anything is.
        self.until_copied(bytes..u64::MAX).await;
        match &*node {
            Node::Raw(raw) => {
                let mut closed = self.grace().close().await;
                self.check_whole()?;
                raw.flush(queue).await?;
                closed.begin();
                let resized = raw.resize(queue, bytes, preallocation).await;
                self.replace(Arc::new(Node::Raw(raw.reload()?)));
                closed.finish();
                resized
            }
            Node::Qcow2(_) => self.change(queue, async |image| image.resize(queue, bytes, preallocation).await).await,
        }
    }

    async fn view_snapshot_on(&self, queue: &Rc<Queue>, which: impl Fn(&SnapshotInfo) -> bool) -> Result<()> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        let refuse = |kind, message| Err(Error::new(kind, message).at_path(node.path()));
        let Node::Qcow2(image) = &*node else {
            return refuse(ErrorKind::Unsupported, "a raw disk has no internal snapshots");
        };
        if !self.is_read_only() {
            return refuse(ErrorKind::Invalid, "only a read-only disk can show a snapshot");
        }
        let table = image.snapshots(queue).await?;
        let Some(snapshot) = table.entries.iter().find(|snapshot| which(&SnapshotInfo::from(*snapshot))) else {
            return refuse(ErrorKind::NotFound, "there is no such snapshot");
        };
        let closed = self.grace().close().await;
        let shown = image.as_of_snapshot(queue, snapshot).await?;
        self.replace(Arc::new(Node::Qcow2(Box::new(shown))));
        drop(closed);
        Ok(())
    }

    /// Takes everything out of the topmost image, so that the disk shows what its backing file has.
    pub(crate) async fn make_empty_on(&self, queue: &Rc<Queue>) -> Result<()> {
        let _changes = self.changes().lock().await;
        self.change(queue, async |image| image.make_empty(queue).await).await
    }

    /// Names another backing file in the topmost image's header.
    pub(crate) async fn set_backing_on(&self, queue: &Rc<Queue>, backing: &NewBacking) -> Result<()> {
        let _changes = self.changes().lock().await;
        let (name, format) = (backing.name.as_deref(), backing.format.as_deref());
        self.change(queue, async |image| image.set_backing(queue, name, format).await).await
    }

    /// Makes a change of the topmost image that concerns nothing but its file.
    pub(crate) async fn alter_on(&self, queue: &Rc<Queue>, work: impl AsyncFnOnce(&Image) -> Result<()>) -> Result<()> {
        let _changes = self.changes().lock().await;
        self.change(queue, work).await
    }

    /// Reads from the byte `at` of the VM state on, which lies behind the disk.
    pub(crate) async fn read_vm_state_on(&self, queue: &Rc<Queue>, at: u64, data: &[IoSeg]) -> Result<()> {
        let _changes = self.changes().lock().await;
        let node = self.node();
        self.with_vm_state(&node)?.read_vm_state(queue, at, data).await
    }

    /// Writes there, durably.
    pub(crate) async fn write_vm_state_on(&self, queue: &Rc<Queue>, at: u64, data: &[IoSeg]) -> Result<()> {
        let _changes = self.changes().lock().await;
        self.with_vm_state(&self.node())?;
        self.change(queue, async |image| image.write_vm_state(queue, at, data).await).await
    }

    fn with_vm_state<'a>(&self, node: &'a Node) -> Result<&'a Image> {
        match node {
            Node::Raw(raw) => Err(Error::new(ErrorKind::Unsupported, "a raw disk has no VM state").at_path(&raw.path)),
            Node::Qcow2(image) => Ok(image),
        }
    }

    fn with_snapshots<'a>(&self, node: &'a Node) -> Result<&'a Image> {
        match node {
            Node::Raw(raw) => {
                Err(Error::new(ErrorKind::Unsupported, "a raw disk has no internal snapshots").at_path(&raw.path))
            }
            Node::Qcow2(image) => {
                image.check_snapshots_writable()?;
                Ok(image)
            }
        }
    }

    /// Makes a change of the topmost layer, an image, alone with it. The caller holds [`Disk::changes`].
    pub(crate) async fn change<T>(&self, queue: &Rc<Queue>, work: impl AsyncFnOnce(&Image) -> Result<T>) -> Result<T> {
        // What is in memory does not fit the file any more.
        if self.grace().is_broken() {
            return Err(self.broken());
        }
        let mut closed = self.grace().close().await;
        self.check_whole()?;
        let node = self.node();
        let Node::Qcow2(image) = &*node else {
            return Err(Error::new(ErrorKind::Unsupported, "only an image can change so").at_path(node.path()));
        };
        image.watched(queue, image.finish(queue)).await?;
        closed.begin();
        // Whatever the change does is not acknowledged before it is in the file, and the journal is empty.
        image.detach();
        let worked = image.watched(queue, work(image)).await;
        // What is not written of the counts leaks, whether the change succeeded or not.
        let finished = image.finish(queue).await;
        image.warn_of_leak(finished);
        let reloaded = async {
            let image = image.reload(queue).await?;
            // A header that failed to be written may have been, and not be durable: a power cut would undo it, under data that was
            // written where it says that nothing is.
            if worked.is_err() {
                image.barrier(queue, Barrier::Header).await?;
            }
            Ok(image)
        };
        let reloaded: Result<Image> = reloaded.await;
        match reloaded {
            Ok(image) => {
                if let Some(journal) = self.journal() {
                    image.attach(journal.ring());
                }
                self.replace(Arc::new(Node::Qcow2(Box::new(image))));
                closed.finish();
                worked
            }
            Err(e) => Err(worked.err().unwrap_or(e)),
        }
    }
}

#[cfg(test)]
#[path = "change_test.rs"]
mod tests;
