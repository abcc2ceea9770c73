//! Nothing in a file's place: it has a size, takes what is written and forgets it, and reads as zeros. For measuring and for tests.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Layer, Served, no_space};
use crate::io::{File, FileOps, FileTraits, LockError, LockMasks, Op, Role, fill_zero, segs_len};
use crate::queue::Queue;

/// Nothing, of some size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Null {
    /// In bytes.
    pub size: u64,
    /// It says of itself that it reads as zeros, so that nobody needs to look.
    pub read_zeroes: bool,
    /// How long each operation takes.
    pub latency: Duration,
}

impl Default for Null {
    /// As QEMU's: 1 GiB.
    fn default() -> Self {
        Self { size: 1 << 30, read_zeroes: false, latency: Duration::ZERO }
    }
}

struct Open {
    null: Null,
    /// Tells one from the other.
    number: u64,
}

pub(super) fn open(null: &Null) -> File {
    static OPENED: AtomicU64 = AtomicU64::new(0);
    File::layered(Open { null: null.clone(), number: OPENED.fetch_add(1, Ordering::Relaxed) })
}

impl Layer for Open {
    fn serve<'a>(&'a self, queue: &'a Rc<Queue>, op: &'a Op, _role: Role) -> Served<'a> {
        Box::pin(async move {
            let latency = self.null.latency;
            if !latency.is_zero() {
                queue.compute(move || std::thread::sleep(latency)).await?;
            }
            let (offset, len) = match op {
                Op::Read { data, .. } => {
                    fill_zero(data);
                    return Ok(());
                }
                Op::Write { offset, data } => (*offset, segs_len(data)),
                Op::WriteZeroes { offset, len } | Op::Allocate { offset, len } => (*offset, *len),
                Op::SetLength { len } => (0, *len),
                Op::Punch { .. } | Op::Flush { .. } => return Ok(()),
            };
            if offset.saturating_add(len) > self.null.size { Err(no_space()) } else { Ok(()) }
        })
    }
}

impl FileOps for Open {
    fn id(&self) -> RawFd {
        -1
    }

    fn traits(&self) -> FileTraits {
        // As of a block device its length cannot change.
        FileTraits { identity: (u64::MAX, self.number), block_device: true, align: 1 }
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.null.size)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((!self.null.read_zeroes && offset < self.null.size).then_some(offset..self.null.size))
    }

    fn lock(&self, _masks: LockMasks) -> Result<(), LockError> {
        Ok(())
    }

    fn relax(&self, _masks: LockMasks) {}

    fn unlock(&self) {}
}
