//! The disk that an image shows, in a file's place: an image inside another one. Its size is what it is.

use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;

use super::{How, Layer, Served, no_space};
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::io::{File, FileOps, FileTraits, IoSeg, LockError, LockMasks, Op, Role, fill_zero, segs_len, split_segs};
use crate::journal::Survival;
use crate::queue::Queue;
use crate::request::Request;
use crate::spec::DiskSpec;
use crate::sync::Arc;

struct Open {
    disk: Arc<Disk>,
    /// By which its requests are counted.
    number: usize,
}

pub(super) async fn open(queue: &Rc<Queue>, disk: &DiskSpec, how: How<'_>) -> Result<File> {
    let readonly = !how.write;
    let spec = DiskSpec { readonly, ephemeral: false, cache: how.spec.cache, lock: how.spec.lock, ..disk.clone() };
    // The journal is the outer disk's.
    let survival = match &how.policy.survival {
        Survival::PowerCut => Survival::PowerCut,
        Survival::Journal(_) | Survival::Synchronous => Survival::Synchronous,
    };
    let policy = OpenPolicy { survival, ..how.policy.clone() };
    let disk = Disk::open_on(queue, &spec, &policy).await?;
    let number = disk.next_queue_number();
    Ok(File::layered(Open { disk, number }))
}

impl Open {
    async fn request(&self, queue: &Rc<Queue>, request: Request) -> io::Result<()> {
        self.disk.request(queue, self.number, &request).await.map_err(as_host_error)
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.disk.size()) { Err(no_space()) } else { Ok(()) }
    }

    async fn read(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg]) -> io::Result<()> {
        let len = segs_len(data);
        let inside = len.min(self.disk.size().saturating_sub(offset));
        fill_zero(&split_segs(data, inside, len - inside));
        if inside == 0 {
            return Ok(());
        }
        self.request(queue, Request::Read { offset, data: split_segs(data, 0, inside) }).await
    }
}

/// The host's error that is behind it, for those who know nothing of images.
fn as_host_error(error: Error) -> io::Error {
    match error.host_error().and_then(io::Error::raw_os_error) {
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::other(error),
    }
}

impl Layer for Open {
    fn serve<'a>(&'a self, queue: &'a Rc<Queue>, op: &'a Op, _role: Role) -> Served<'a> {
        Box::pin(async move {
            match op {
                Op::Read { offset, data } => self.read(queue, *offset, data).await,
                Op::Write { offset, data } => {
                    self.check(*offset, segs_len(data))?;
                    self.request(queue, Request::Write { offset: *offset, data: data.clone() }).await
                }
                Op::WriteZeroes { offset, len } => {
                    self.check(*offset, *len)?;
                    self.request(queue, Request::WriteZeroes { offset: *offset, len: *len, unmap: false }).await
                }
                Op::Punch { offset, len } => {
                    let len = (*len).min(self.disk.size().saturating_sub(*offset));
                    if len == 0 {
                        return Ok(());
                    }
                    self.request(queue, Request::Discard { offset: *offset, len }).await
                }
                Op::Flush { .. } => self.request(queue, Request::Flush).await,
                // What space there is shows when it is written.
                Op::Allocate { offset, len } => self.check(*offset, *len),
                Op::SetLength { len } => {
                    if *len == self.disk.size() {
                        Ok(())
                    } else {
                        Err(no_space())
                    }
                }
            }
        })
    }

    fn disk(&self) -> Option<&Arc<Disk>> {
        Some(&self.disk)
    }

    fn close(&self) -> Result<()> {
        self.disk.close()
    }
}

impl FileOps for Open {
    fn id(&self) -> RawFd {
        -1
    }

    fn traits(&self) -> FileTraits {
        let node = self.disk.node();
        let unit = u32::try_from(node.unit()).unwrap_or(512);
        // Its length cannot change, and what it has discarded need not read as zeros.
        FileTraits { identity: node.file().traits().identity, block_device: true, align: unit }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.size())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.disk.node().file().allocated()
    }

    // The disk has taken its locks as it was opened.

    fn lock(&self, _masks: LockMasks) -> std::result::Result<(), LockError> {
        Ok(())
    }

    fn relax(&self, _masks: LockMasks) {}

    fn unlock(&self) {}
}
