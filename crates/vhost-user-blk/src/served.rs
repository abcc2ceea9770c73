//! The disk behind an export: open only while a ring runs.
//!
//! So of two processes that serve one image, a migration's source and its destination, only one ever has it open: the source, when the
//! last of its rings has stopped, has flushed, forgotten what it cached and unlocked; the destination locks and loads everything when
//! its first ring starts. Before that only headers are read, for what the configuration space says.
//!
//! A throw-away overlay (`ephemeral=on`) is another matter: it is there only while the disk is open, and a guest that pauses or reboots
//! must find it again. So that disk stays open until the export ends.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cowhand_block::{Disk, DiskShape, DiskSpec, Error, ErrorKind, Limits, OpenPolicy, RequestQueue, Survival};
use cowhand_virtio::blk::BlockBackend;

use crate::command::{Commanded, ExportStatus, Shrink};

/// How long an image's lock is waited for: after the death of a process the kernel gives its locks back only when the I/O that it had
/// under way has ended, and that may take a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What is known of the disk while it is not open: what a device model needs for features and configuration.
pub(crate) struct Shape {
    shape: Mutex<DiskShape>,
}

impl Shape {
    fn get(&self) -> DiskShape {
        self.shape.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of the size; says whether it is another one.
    fn set_size(&self, size: u64) -> bool {
        let mut shape = self.shape.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut shape.size, size) != size
    }
}

impl BlockBackend for Shape {
    fn size(&self) -> u64 {
        self.get().size
    }

    fn read_only(&self) -> bool {
        self.get().read_only
    }

    fn limits(&self) -> Limits {
        self.get().limits
    }

    fn open_queue(&self) -> cowhand_block::Result<Box<dyn RequestQueue>> {
        Err(Error::io("the disk is not open", std::io::ErrorKind::NotConnected.into()))
    }
}

/// A disk that is opened and closed again and again.
pub(crate) struct Served {
    spec: DiskSpec,
    policy: OpenPolicy,
    shape: Arc<Shape>,
    /// See [`instance`](Self::instance).
    instance: u64,
    disk: Option<Arc<Disk>>,
}

impl Served {
    /// Reads the headers of the disk's images.
    ///
    /// # Errors
    /// What would keep the disk from being opened, as far as headers tell.
    pub(crate) fn new(spec: DiskSpec, policy: OpenPolicy) -> cowhand_block::Result<Self> {
        let shape = Mutex::new(Disk::shape(&spec, &policy)?);
        let policy = OpenPolicy { lock_patience: LOCK_PATIENCE, ..policy };
        let instance = if spec.ephemeral { RandomState::new().hash_one(0) | 1 } else { 0 };
        Ok(Self { spec, policy, shape: Arc::new(Shape { shape }), instance, disk: None })
    }

    /// 0, or of a disk that ends with this process a number that no other has.
    pub(crate) fn instance(&self) -> u64 {
        self.instance
    }

    /// What the device model is made of.
    pub(crate) fn shape(&self) -> &Arc<Shape> {
        &self.shape
    }

    /// The description of the disk.
    pub(crate) fn spec(&self) -> &DiskSpec {
        &self.spec
    }

    /// The disk, opened if it is not open yet; what was acknowledged before an earlier process died is in it then. Says whether its
    /// size is another one than was known.
    ///
    /// # Errors
    /// It cannot be opened or locked, or `survival` is not of this image.
    pub(crate) fn open(&mut self, survival: Survival) -> cowhand_block::Result<(Arc<Disk>, bool)> {
        if let Some(disk) = &self.disk {
            return Ok((disk.clone(), false));
        }
        let policy = OpenPolicy { survival, ..self.policy.clone() };
        let disk = Disk::open(&self.spec, &policy)?;
        tracing::info!("{}: opened", self.spec.path.display());
        self.disk = Some(disk.clone());
        Ok((disk.clone(), self.shape.set_size(disk.size())))
    }

    /// No ring runs any more: flushes, unlocks and closes the disk, unless it would be lost.
    ///
    /// # Errors
    /// Something could not be written.
    pub(crate) fn rest(&mut self) -> cowhand_block::Result<()> {
        if self.spec.ephemeral { Ok(()) } else { self.close() }
    }

    /// Flushes, unlocks and closes the disk. Nobody uses it any more.
    ///
    /// # Errors
    /// Something could not be written.
    pub(crate) fn close(&mut self) -> cowhand_block::Result<()> {
        let Some(disk) = self.disk.take() else { return Ok(()) };
        let closed = disk.close();
        tracing::info!("{}: closed", self.spec.path.display());
        closed
    }

    /// Changes the disk's size, open or not; `survival` is for one that is not. Says whether it is another one than was known.
    ///
    /// # Errors
    /// The disk would become smaller, and that is refused; the image cannot have that size, or it cannot be opened or written.
    pub(crate) fn resize(&mut self, bytes: u64, shrink: Shrink, survival: Survival) -> cowhand_block::Result<bool> {
        let was_open = self.disk.is_some();
        let (disk, found) = self.open(survival)?;
        let resized = if bytes < disk.size() && shrink == Shrink::Refused {
            let message = format!("the disk has {} bytes: with {bytes} it would lose data", disk.size());
            Err(Error::new(ErrorKind::Refused, message).at_path(&self.spec.path))
        } else {
            disk.resize(bytes)
        };
        drop(disk);
        if !was_open {
            self.rest()?;
        }
        resized?;
        Ok(self.shape.set_size(bytes) || found)
    }

    /// How the disk is doing, as far as it goes without a front-end.
    pub(crate) fn status(&self) -> ExportStatus {
        let DiskShape { size, read_only, .. } = self.shape.get();
        let layers = self.disk.as_ref().map(|disk| disk.layers());
        ExportStatus { size, read_only, connected: false, layers }
    }
}

/// While no front-end is there.
impl Commanded for Served {
    fn status(&self) -> ExportStatus {
        self.status()
    }

    fn resize(&mut self, bytes: u64, shrink: Shrink) -> cowhand_block::Result<()> {
        // Nobody writes: that a power cut finds the disk in order is enough.
        self.resize(bytes, shrink, Survival::PowerCut).map(drop)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("{error}");
        }
    }
}
