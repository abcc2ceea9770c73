//! Raw images: the virtual disk is the file (or block device) itself.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};
use crate::flush::Flushes;
use crate::io::{Barrier, Buffer, File, IoSeg, Role, segs_len, split_segs, zero_segs};
use crate::probe::{PROBED, seems};
use crate::qcow2::create::Preallocation;
use crate::queue::Queue;
use crate::sync::{Arc, AtomicBool, Ordering};

/// An open raw image.
pub(crate) struct RawImage {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    /// The virtual size in bytes: the file's, rounded up to whole sectors.
    pub(crate) size: u64,
    writable: bool,
    /// Nobody said that it is raw: what is written into its first sector must not make it look like another format's.
    pub(crate) guessed: bool,
    /// Shared with the image that takes this one's place.
    flushes: Arc<Flushes>,
    /// The host cannot zero a range by itself.
    no_zero_range: AtomicBool,
}

impl RawImage {
    /// The unit in which space is given back.
    pub(crate) const GRANULARITY: u32 = 4096;

    /// Takes an open file. One that is to be filled is going to be `unfinished` bytes long.
    pub(crate) fn new(
        file: File,
        path: &Path,
        unfinished: Option<u64>,
        writable: bool,
        no_flush: bool,
    ) -> Result<Self> {
        let length = file.length().map_err(|e| Error::io("cannot tell the file's length", e).at_path(path))?;
        let length = unfinished.filter(|_| !file.traits().block_device).unwrap_or(length);
        Ok(Self {
            file: file.of(Role::Content),
            path: path.to_path_buf(),
            size: length.next_multiple_of(512),
            writable,
            guessed: false,
            flushes: Arc::new(Flushes::new(no_flush)),
            no_zero_range: AtomicBool::new(false),
        })
    }

    /// Why the file cannot be made `size` bytes long, as far as that can be told before.
    pub(crate) fn check_resize(&self, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        let refuse = |kind, message: &str| Err(Error::new(kind, message).at_path(&self.path));
        if self.file.traits().block_device && self.file.layer().is_some() {
            return refuse(ErrorKind::Unsupported, "Cannot resize fixed-size raw disks");
        }
        if self.file.traits().block_device {
            return refuse(ErrorKind::Unsupported, "a block device has the size that it has");
        }
        if preallocation == Preallocation::Metadata {
            return refuse(ErrorKind::Invalid, "Unsupported preallocation mode: metadata");
        }
        Ok(())
    }

    /// How long the file is, in bytes.
    pub(crate) fn length(&self) -> Result<u64> {
        self.file.length().map_err(|e| self.error("cannot tell the file's length", 0, e))
    }

    /// Makes the file `size` bytes long, durably; it takes the host's space for what is added if that is asked for.
    pub(crate) async fn resize(&self, queue: &Rc<Queue>, size: u64, preallocation: Preallocation) -> Result<()> {
        let old = self.length()?;
        let resized = queue.set_length(&self.file, size).await;
        resized.map_err(|e| self.error("cannot change the file's length", size, e))?;
        if let Err(e) = self.take_space(queue, size, preallocation).await {
            // As long as it was, so that nobody takes the disk for what it has not become. What went wrong is what matters.
            let _ = queue.set_length(&self.file, old).await;
            return Err(e);
        }
        self.flush(queue).await
    }

    async fn take_space(&self, queue: &Rc<Queue>, size: u64, preallocation: Preallocation) -> Result<()> {
        match preallocation {
            _ if size <= self.size => Ok(()),
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => {
                let taken = queue.allocate(&self.file, self.size, size - self.size).await;
                taken.map_err(|e| self.error("cannot take space", self.size, e))
            }
            Preallocation::Full => self.write_zeros(queue, self.size, size - self.size).await,
        }
    }

    /// The image as a layer below another one: nothing is written to it any more.
    pub(crate) fn lowered(&self) -> Self {
        Self {
            file: self.file.clone(),
            path: self.path.clone(),
            size: self.size,
            writable: false,
            guessed: self.guessed,
            flushes: self.flushes.clone(),
            no_zero_range: AtomicBool::new(false),
        }
    }

    /// The image as its file is now.
    pub(crate) fn reload(&self) -> Result<Self> {
        let mut image = Self::new(self.file.clone(), &self.path, None, self.writable, false)?;
        image.flushes = self.flushes.clone();
        image.guessed = self.guessed;
        Ok(image)
    }

    pub(crate) fn mapped(&self, offset: u64, write: bool) -> Option<u64> {
        (!write || self.writable && !self.is_looked_at(offset)).then_some(offset)
    }

    pub(crate) async fn read(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        queue.read(&self.file, offset, data.to_vec()).await.map_err(|e| self.error("cannot read", offset, e))
    }

    pub(crate) async fn write(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<()> {
        self.check_writable()?;
        let (data, keep) = match self.is_looked_at(offset) && !data.is_empty() {
            true => self.harmless(queue, offset, data).await?,
            false => (data.to_vec(), Vec::new()),
        };
        let written = queue.write(&self.file, offset, data, keep).await;
        written.map_err(|e| self.error("cannot write", offset, e))
    }

    /// Whether a write at `offset` changes the bytes by which formats are guessed, and these must stay those of a raw disk.
    fn is_looked_at(&self, offset: u64) -> bool {
        self.guessed && offset < PROBED
    }

    /// What is to be written at `offset`, in the first sector, if the disk still looks like a raw one then. What was looked at is a copy, which
    /// nobody changes meanwhile. No other write to that sector is under way.
    async fn harmless(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> Result<(Vec<IoSeg>, Vec<Arc<Buffer>>)> {
        let len = segs_len(data);
        let there = len.min(PROBED - offset);
        let mut first = match there < PROBED {
            true => queue.read_buffer(&self.file, 0, PROBED as usize).await,
            false => Ok(Buffer::zeroed(PROBED as usize)),
        }
        .map_err(|e| self.error("cannot read", 0, e))?;
        first.gather(offset as usize, &split_segs(data, 0, there));
        if let Some(format) = seems(&first) {
            let message = format!(
                "the format was guessed to be raw, and what is to be written would make it look like {format}; say the \
                 format to have it written"
            );
            return Err(self.error(&message, offset, std::io::Error::from_raw_os_error(libc::EPERM)));
        }
        let first = Arc::new(first);
        let mut checked = vec![first.seg(offset as usize, there as usize)];
        checked.extend(split_segs(data, there, len - there));
        Ok((checked, vec![first]))
    }

    pub(crate) async fn flush(&self, queue: &Rc<Queue>) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.flushes.flush_for_all(queue, &self.file, &self.path, Barrier::Data).await
    }

    pub(crate) async fn discard(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        match queue.punch(&self.file, offset, len).await {
            // A host that cannot punch keeps the space: a discard is only a hint.
            Err(e) if !is_unsupported(&e) => Err(self.error("cannot discard", offset, e)),
            _ => Ok(()),
        }
    }

    pub(crate) async fn write_zeroes(&self, queue: &Rc<Queue>, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        let block_device = self.file.traits().block_device;
        // On a block device a punch need not give zeros, but zeroing may unmap.
        if unmap && !block_device && queue.punch(&self.file, offset, len).await.is_ok() {
            // A punch ends at the end of the file; the virtual size may be a little more, and is zero there anyway.
            return Ok(());
        }
        if !self.no_zero_range.load(Ordering::Relaxed) {
            match queue.write_zeroes(&self.file, offset, len).await {
                Ok(()) => return Ok(()),
                Err(e) if is_unsupported(&e) => self.no_zero_range.store(true, Ordering::Relaxed),
                Err(e) => return Err(self.error("cannot write zeros", offset, e)),
            }
        }
        self.write_zeros(queue, offset, len).await
    }

    /// Whether the host may be able to zero a range by itself: nothing is known to the contrary.
    pub(crate) fn may_zero(&self) -> bool {
        !self.no_zero_range.load(Ordering::Relaxed)
    }

    async fn write_zeros(&self, queue: &Rc<Queue>, offset: u64, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let n = (len - done).min(1 << 20);
            self.write(queue, offset + done, &zero_segs(n)).await?;
            done += n;
        }
        Ok(())
    }

    /// What a compressed write is answered.
    pub(crate) fn cannot_compress(&self) -> Error {
        Error::new(ErrorKind::Unsupported, "a raw image has no compressed clusters").at_path(&self.path)
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only").at_path(&self.path))
    }

    fn error(&self, what: &str, offset: u64, error: std::io::Error) -> Error {
        Error::io(what, error).at_path(&self.path).at_offset(offset)
    }
}

fn is_unsupported(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}
