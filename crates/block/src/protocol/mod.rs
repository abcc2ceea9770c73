//! What the bytes of an image lie in: a file of the host, or what stands in a file's place, as QEMU's node options describe it.
//!
//! What stands in a file's place is a [`Layer`]: it serves the operations of a [`Queue`] by tasks of that queue, so that the engine above
//! sees a [`File`] like any other, in the simulator too. Files of the host are not touched by this.
//!
//! Not here: how options are read ([`crate::options`]), and which files may be opened ([`crate::chain`]).

mod debug;
mod image;
mod null;
mod part;

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;

pub use self::debug::{Action, Debug, Event, Fault, Limits, Rule};
pub use self::null::Null;
use crate::chain::{OpenPolicy, open_plain};
use crate::disk::Disk;
use crate::error::Result;
use crate::io::{File, FileKind, FileOps, Op, Role};
use crate::queue::Queue;
use crate::spec::DiskSpec;
use crate::sync::Arc;

/// What the bytes of an image lie in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// A file or a block device.
    #[default]
    Host,
    /// A regular file (`file`).
    Regular,
    /// A device (`host_device`, `host_cdrom`), by this name.
    Device(&'static str),
    /// Nothing (`null-co`).
    Null(Null),
    /// A part of another file (`raw` with an offset or a size).
    Part(Box<Part>),
    /// The disk that another image shows.
    Image(Box<DiskSpec>),
    /// Another file, the operations of which are made to fail, or come only in some sizes (`blkdebug`).
    Debug(Box<Debug>),
}

impl Protocol {
    /// The name of its driver; none of a file or block device, whichever it is.
    #[must_use]
    pub fn driver(&self) -> Option<&'static str> {
        match self {
            Self::Host => None,
            Self::Regular => Some("file"),
            Self::Device(name) => Some(name),
            Self::Null(_) => Some("null-co"),
            Self::Part(_) => Some("raw"),
            Self::Image(disk) => Some(disk.driver()),
            Self::Debug(_) => Some("blkdebug"),
        }
    }
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes, a multiple of 512; to the file's end if not given.
    pub size: Option<u64>,
    /// The file.
    pub of: FileSpec,
}

/// What an image lies in, and by what name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSpec {
    /// The file of the host that is meant in the end, for messages; a name of no file where there is none.
    pub path: PathBuf,
    /// What it is.
    pub protocol: Protocol,
}

impl FileSpec {
    /// A file or block device.
    #[must_use]
    pub fn host(path: &Path) -> Self {
        Self { path: path.to_path_buf(), protocol: Protocol::Host }
    }

    /// All files of the host that are opened by description alone, and not because an image names them.
    #[must_use]
    pub fn named(&self) -> Vec<PathBuf> {
        match &self.protocol {
            Protocol::Host | Protocol::Regular | Protocol::Device(_) => vec![self.path.clone()],
            Protocol::Null(_) => Vec::new(),
            Protocol::Part(part) => part.of.named(),
            Protocol::Image(disk) => disk.named(),
            Protocol::Debug(debug) => debug.config.iter().cloned().chain(debug.of.named()).collect(),
        }
    }

    /// What of this no image's header may ask for, if it asks for such: it would take memory or time without bound.
    pub(crate) fn not_for_headers(&self) -> Option<&'static str> {
        match &self.protocol {
            Protocol::Host | Protocol::Regular | Protocol::Device(_) => None,
            Protocol::Null(null) => (!null.latency.is_zero()).then_some("null-co that takes its time"),
            Protocol::Part(part) => part.of.not_for_headers(),
            // Its own header could name the first one again, or two of a kind that name two each.
            Protocol::Image(_) => Some("an image inside of another image's disk"),
            Protocol::Debug(debug) if debug.limits != Limits::default() => Some("blkdebug that changes sizes"),
            Protocol::Debug(debug) => debug.of.not_for_headers(),
        }
    }
}

/// What serves an operation.
pub(crate) type Served<'a> = Pin<Box<dyn Future<Output = io::Result<()>> + 'a>>;

/// What stands in a file's place.
pub(crate) trait Layer: FileOps {
    /// Serves an operation of `queue`, whole: a read past the end gives zeros. `role` says what is read or written.
    fn serve<'a>(&'a self, queue: &'a Rc<Queue>, op: &'a Op, role: Role) -> Served<'a>;

    /// The file that it serves operations with, if there is one.
    fn below(&self) -> Option<&File> {
        None
    }

    /// The disk of an image, if that is what the file shows, byte for byte.
    fn disk(&self) -> Option<&Arc<Disk>> {
        None
    }

    /// The disk of an image that is below it, whatever the file shows of it.
    fn inside(&self) -> Option<&Arc<Disk>> {
        self.disk().or_else(|| self.below()?.layer()?.inside())
    }

    /// Nobody will use it any more: writes what is not written yet.
    ///
    /// # Errors
    /// It could not be written.
    fn close(&self) -> Result<()> {
        self.below().and_then(File::layer).map_or(Ok(()), |layer| layer.close())
    }
}

/// How a file is opened.
#[derive(Clone, Copy)]
pub(crate) struct How<'a> {
    pub(crate) write: bool,
    /// The disk that it is for.
    pub(crate) spec: &'a DiskSpec,
    pub(crate) policy: &'a OpenPolicy,
}

/// Opens what an image lies in, without taking its locks.
pub(crate) fn open<'a>(
    queue: &'a Rc<Queue>,
    file: &'a FileSpec,
    how: How<'a>,
) -> Pin<Box<dyn Future<Output = Result<File>> + 'a>> {
    Box::pin(async move {
        let plain = |kind, name| open_plain(how.policy, &file.path, how.write, how.spec, (kind, name));
        match &file.protocol {
            Protocol::Host => plain(FileKind::Either, ""),
            Protocol::Regular => plain(FileKind::Regular, "file"),
            Protocol::Device(name) => plain(FileKind::Device, name),
            Protocol::Null(null) => Ok(null::open(null)),
            Protocol::Part(part) => part::open(open(queue, &part.of, how).await?, part),
            Protocol::Image(disk) => image::open(queue, disk, how).await,
            Protocol::Debug(debug) => debug::open(queue, debug, how).await,
        }
    })
}

/// An operation past the end of what cannot grow.
fn no_space() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

#[cfg(test)]
#[path = "protocol_test.rs"]
mod tests;
