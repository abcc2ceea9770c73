//! The seam on a Linux host: files, directories and image locks; its I/O queues are [`uring`] and [`threads`],
//! its pool that computes is [`compute`]; [`attributes`] are what file systems can be asked for.

mod attributes;
mod compute;
mod inline;
mod lock;
mod threads;
mod uring;

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;

use self::compute::Pool;
use super::{Driver, File, FileKind, FileOps, FileTraits, LockError, LockMasks, Notify, OpenMode, Storage};
use crate::secret::{Secret, SecretSource};

/// Which I/O queue [`Host::driver`] makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring; where the host refuses it, threads.
    #[default]
    Auto,
    /// A pool of threads.
    Threads,
}

/// The host.
#[derive(Debug, Default)]
pub struct Host {
    engine: Engine,
    /// Shared by the queues; it ends with the last of them and the host.
    pool: Arc<Pool>,
}

impl Host {
    /// The host, with the given sort of I/O queue.
    #[must_use]
    pub fn new(engine: Engine) -> Self {
        Self { engine, pool: Arc::default() }
    }
}

/// Whether this host lets us use io_uring.
///
/// # Errors
/// The system's reason why not.
pub fn probe_io_uring() -> io::Result<()> {
    uring::Uring::new(&Arc::default()).map(drop)
}

struct HostFile {
    fd: OwnedFd,
    traits: FileTraits,
}

impl HostFile {
    fn from_fd(fd: OwnedFd, direct: bool) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        let block_device = kind == FileType::BlockDevice;
        let align = if direct { direct_alignment(&fd) } else { 1 };
        Ok(Self { fd, traits: FileTraits { identity: (stat.st_dev, stat.st_ino), block_device, align } })
    }
}

/// What direct I/O on this file must be aligned to: what the kernel says, or a page where it does not say.
fn direct_alignment(fd: &OwnedFd) -> u32 {
    let statx = rustix::fs::statx(fd, "", rustix::fs::AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::DIOALIGN);
    match statx {
        Ok(s) if s.stx_dio_offset_align.is_power_of_two() && s.stx_dio_mem_align <= super::Buffer::ALIGN as u32 => {
            s.stx_dio_offset_align.max(s.stx_dio_mem_align).max(512)
        }
        _ => super::Buffer::ALIGN as u32,
    }
}

impl FileOps for HostFile {
    fn id(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn traits(&self) -> FileTraits {
        self.traits
    }

    fn length(&self) -> io::Result<u64> {
        // Seeking gives a block device's size too; nothing here uses the file position.
        Ok(rustix::fs::seek(&self.fd, SeekFrom::End(0))?)
    }

    fn allocated(&self) -> io::Result<u64> {
        // The system counts in 512 bytes, whatever the file system's blocks are.
        Ok(rustix::fs::fstat(&self.fd)?.st_blocks.cast_unsigned().saturating_mul(512))
    }

    fn set_no_copy_on_write(&self) -> io::Result<()> {
        let flags = rustix::fs::ioctl_getflags(&self.fd)?;
        Ok(rustix::fs::ioctl_setflags(&self.fd, flags | rustix::fs::IFlags::NOCOW)?)
    }

    fn set_extent_size(&self, bytes: u32) -> io::Result<()> {
        attributes::set_extent_size(&self.fd, bytes)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        // Nothing here uses the file position.
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // The file system does not know.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => offset,
            Err(error) => return Err(error.into()),
        };
        let end = match rustix::fs::seek(&self.fd, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => self.length()?,
            Err(error) => return Err(error.into()),
        };
        Ok((start < end).then_some(start..end))
    }

    fn copy_from(&self, (from, from_offset): (&dyn FileOps, u64), offset: u64, len: u64) -> io::Result<u64> {
        // Something in a file's place has no descriptor.
        if from.id() < 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // SAFETY: a number that is no descriptor, or another storage's, gives an error or is a file that `from` has open; it is used in
        // this call alone, while `from` is borrowed.
        let from = unsafe { std::os::fd::BorrowedFd::borrow_raw(from.id()) };
        let (mut from_offset, mut into_offset, mut copied) = (from_offset, offset, 0);
        while copied < len {
            let most = usize::try_from(len - copied).unwrap_or(usize::MAX).min(1 << 30);
            let done =
                rustix::fs::copy_file_range(from, Some(&mut from_offset), &self.fd, Some(&mut into_offset), most)?;
            if done == 0 {
                break;
            }
            copied += done as u64;
        }
        Ok(copied)
    }

    fn lock(&self, masks: LockMasks) -> Result<(), LockError> {
        lock::lock(self.fd.as_fd(), masks)
    }

    fn relax(&self, masks: LockMasks) {
        lock::relax(self.fd.as_fd(), masks);
    }

    fn unlock(&self) {
        lock::unlock(self.fd.as_fd());
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

impl Storage for Host {
    fn secret(&self, source: &SecretSource) -> io::Result<Secret> {
        let file = match source {
            SecretSource::File(path) => std::fs::File::open(path)?,
            // Opened anew, so that the descriptor stays whoever's it is.
            SecretSource::Descriptor(number) => std::fs::File::open(format!("/proc/self/fd/{number}"))?,
            SecretSource::Known(secret) => return Ok(secret.clone()),
        };
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, Secret::MAX as u64 + 1), &mut bytes)?;
        if bytes.len() > Secret::MAX {
            return Err(io::Error::other(format!("more than {} bytes are no secret", Secret::MAX)));
        }
        Ok(Secret::new(bytes))
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<File> {
        let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY;
        if mode.direct {
            flags |= OFlags::DIRECT;
        }
        // A FIFO would block the open for ever: look first. (Swapping it in between only blocks whoever swaps.)
        let kind = std::fs::metadata(path)?.file_type();
        // Of a directory that is to be written the system's own error says more.
        let fits = kind.is_dir() && mode.write
            || match mode.kind {
                FileKind::Either => !(kind.is_fifo() || kind.is_socket() || kind.is_char_device()),
                FileKind::Regular => kind.is_file(),
                FileKind::Device => kind.is_char_device() || kind.is_block_device(),
            };
        if !fits {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file or block device"));
        }
        let file =
            OpenOptions::new().read(true).write(mode.write).custom_flags(flags.bits().cast_signed()).open(path)?;
        Ok(File::new(HostFile::from_fd(file.into(), mode.direct)?))
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(path)?;
        Ok(File::new(HostFile::from_fd(file.into(), false)?))
    }

    fn create_unnamed(&self, dir: &Path) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let fd = match rustix::fs::open(dir, flags, mode) {
            Ok(fd) => fd,
            // Not every file system has O_TMPFILE (NFS and FUSE lack it): a name, gone at once, does the same.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
                let mut random = [0u8; 8];
                self.entropy(&mut random)?;
                let path = dir.join(format!(".cowhand-{:016x}", u64::from_ne_bytes(random)));
                let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
                std::fs::remove_file(&path)?;
                file.into()
            }
            Err(e) => return Err(e.into()),
        };
        Ok(File::new(HostFile::from_fd(fd, false)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        std::fs::File::open(if dir.as_os_str().is_empty() { parent(dir) } else { dir })?.sync_all()
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }

    fn driver(&self) -> io::Result<Box<dyn Driver>> {
        if self.engine == Engine::Auto {
            match uring::Uring::new(&self.pool) {
                Ok(ring) => return Ok(Box::new(ring)),
                Err(e) => tracing::info!("io_uring is refused here ({e}); using threads"),
            }
        }
        Ok(Box::new(threads::Threads::new(&self.pool)?))
    }

    fn blocking_driver(&self) -> io::Result<Box<dyn Driver>> {
        Ok(Box::new(inline::Inline::new()?))
    }

    fn entropy(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
        }
        Ok(())
    }

    fn now(&self) -> Duration {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Duration::new(t.tv_sec.unsigned_abs(), u32::try_from(t.tv_nsec).unwrap_or(0))
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn date(&self) -> Duration {
        // A host whose clock stands before 1970 gets 1970.
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }
}

/// The eventfd by which other threads wake a queue's thread.
struct Wake(OwnedFd);

impl Wake {
    fn new() -> io::Result<Arc<Self>> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Arc::new(Self(rustix::event::eventfd(0, flags)?)))
    }
}

impl Notify for Wake {
    fn notify(&self) {
        // A full counter (EAGAIN) is a wake-up that is already pending.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Blocks until `wake` has been signalled.
fn sleep_until_signalled(wake: &Wake) {
    let mut fd = libc::pollfd { fd: wake.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, ours, across the call. An interrupted sleep only makes the caller look again.
    unsafe { libc::poll(&raw mut fd, 1, -1) };
    drain_eventfd(wake.0.as_raw_fd());
}

/// Takes the signal of an eventfd of which polling said `events` (as poll(2) does). Whether it had been signalled.
///
/// # Errors
/// When it is broken or closed, and polling it would say so for ever.
fn take_signal(fd: RawFd, events: i32) -> io::Result<bool> {
    if events & i32::from(libc::POLLIN) != 0 && drain_eventfd(fd) {
        return Ok(true);
    }
    if events & i32::from(libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0 {
        return Err(io::Error::other("a watched eventfd is broken or closed"));
    }
    // Whoever else reads it was first.
    Ok(false)
}

/// Reads an eventfd's counter, so that it is quiet until the next signal. Whether it had been signalled.
fn drain_eventfd(fd: RawFd) -> bool {
    let mut counter = [0u8; 8];
    // SAFETY: the eight bytes are ours and live across the call; a descriptor that is not open gives an error.
    unsafe { libc::read(fd, counter.as_mut_ptr().cast(), counter.len()) == 8 }
}

#[cfg(test)]
#[path = "host_test.rs"]
mod tests;
