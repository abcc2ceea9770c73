//! Another file in a file's place, the operations of which are made to fail, or come only in some sizes: QEMU's `blkdebug`, for tests.
//!
//! Which operations fail is said by rules ([`rules`]), in options or in a file. What happens here is what a file sees: reads, writes,
//! zeros, discards, flushes, and whether it is the disk's content that is read and written. What happens inside of QEMU's qcow2 driver
//! does not happen here, and rules that wait for it are refused.

mod config;
mod rules;

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

pub use self::rules::{Action, Event, Fault, Rule};
use self::rules::{IoType, State};
use super::{FileSpec, How, Layer, Served};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{File, FileOps, FileTraits, IoSeg, LockError, LockMasks, Op, Role, segs_len, split_segs, zero_segs};
use crate::queue::Queue;
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};

/// A file whose operations are made to fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Debug {
    /// A file with rules.
    pub config: Option<PathBuf>,
    /// Rules, after those of the file.
    pub rules: Vec<Rule>,
    /// How operations come.
    pub limits: Limits,
    /// The file.
    pub of: FileSpec,
}

/// How operations come to a file, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// What offsets and lengths are multiples of, a power of two; none that is larger than the file's own if not given.
    pub align: Option<u32>,
    /// The most that is read or written at once.
    pub max_transfer: Option<u32>,
    /// What a range to be zeroed is split at; less is written.
    pub opt_write_zero: Option<u32>,
    /// The most that is zeroed at once.
    pub max_write_zero: Option<u32>,
    /// What a range to be discarded is split at.
    pub opt_discard: Option<u32>,
    /// The most that is discarded at once.
    pub max_discard: Option<u32>,
}

/// No file with rules is longer.
const CONFIG_MAX: u64 = 1 << 20;

struct Open {
    of: File,
    limits: Limits,
    state: Mutex<State>,
    /// There is something to flush. As in QEMU, a flush of nothing does not happen.
    written: AtomicBool,
}

pub(super) async fn open(queue: &Rc<Queue>, debug: &Debug, how: How<'_>) -> Result<File> {
    let mut rules = match &debug.config {
        None => Vec::new(),
        Some(path) => read_config(queue, path, how).await?,
    };
    rules.extend(debug.rules.iter().cloned());
    let of = super::open(queue, &debug.of, How { ..how }).await?;
    Ok(File::layered(Open {
        of,
        limits: debug.limits.clone(),
        state: Mutex::new(State::new(rules)),
        written: AtomicBool::new(false),
    }))
}

async fn read_config(queue: &Rc<Queue>, path: &Path, how: How<'_>) -> Result<Vec<Rule>> {
    let failed = |e: io::Error| Error::io("Could not read blkdebug config file", e);
    let file = how.policy.storage.open(path, Default::default()).map_err(failed)?;
    let length = file.length().map_err(failed)?;
    if length > CONFIG_MAX {
        return Err(failed(io::Error::other(format!("more than {CONFIG_MAX} bytes are no rules"))));
    }
    let bytes = queue.read_buffer(&file, 0, length as usize).await.map_err(failed)?;
    config::parse(&String::from_utf8_lossy(&bytes)).map_err(|message| Error::new(ErrorKind::Invalid, message))
}

/// A range in pieces: split at multiples of `unit`, so that between the first and the last of these all pieces are made of whole units, and
/// none is longer than `most`.
fn pieces(range: Range<u64>, unit: Option<u32>, most: Option<u32>) -> impl Iterator<Item = Range<u64>> {
    let unit = u64::from(unit.unwrap_or(1).max(1));
    let most = most.map_or(u64::MAX, |most| u64::from(most) - u64::from(most) % unit).max(unit);
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let whole = range.end - range.end % unit;
        let end = if !at.is_multiple_of(unit) {
            at.next_multiple_of(unit).min(range.end)
        } else if whole > at {
            whole.min(at.saturating_add(most))
        } else {
            range.end
        };
        let piece = at..end;
        at = end;
        Some(piece)
    })
}

impl Open {
    fn check(&self, kind: IoType, range: Range<u64>) -> io::Result<()> {
        self.state.lock().check(kind, &range)
    }

    fn happens(&self, event: Event) {
        self.state.lock().happens(event);
    }

    fn file(&self, role: Role) -> File {
        self.of.of(role)
    }

    async fn read(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg], role: Role) -> io::Result<()> {
        let of = self.file(role);
        for piece in pieces(offset..offset + segs_len(data), None, self.limits.max_transfer) {
            self.check(IoType::Read, piece.clone())?;
            let data = split_segs(data, piece.start - offset, piece.end - piece.start);
            queue.read(&of, piece.start, data).await?;
        }
        Ok(())
    }

    async fn write(&self, queue: &Rc<Queue>, offset: u64, data: &[IoSeg], role: Role) -> io::Result<()> {
        let of = self.file(role);
        for piece in pieces(offset..offset + segs_len(data), None, self.limits.max_transfer) {
            self.happens(Event::Pwritev);
            self.check(IoType::Write, piece.clone())?;
            let data = split_segs(data, piece.start - offset, piece.end - piece.start);
            queue.write(&of, piece.start, data, Vec::new()).await?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, queue: &Rc<Queue>, range: Range<u64>, role: Role) -> io::Result<()> {
        let of = self.file(role);
        let unit = self.limits.opt_write_zero;
        for piece in pieces(range, unit, self.limits.max_write_zero) {
            let len = piece.end - piece.start;
            if len < unit.unwrap_or(0).into() {
                self.write(queue, piece.start, &zero_segs(len), role).await?;
                continue;
            }
            self.happens(Event::PwritevZero);
            self.check(IoType::WriteZeroes, piece.clone())?;
            queue.write_zeroes(&of, piece.start, len).await?;
        }
        Ok(())
    }

    async fn punch(&self, queue: &Rc<Queue>, range: Range<u64>, role: Role) -> io::Result<()> {
        let of = self.file(role);
        for piece in pieces(range, self.limits.opt_discard, self.limits.max_discard) {
            self.check(IoType::Discard, piece.clone())?;
            queue.punch(&of, piece.start, piece.end - piece.start).await?;
        }
        Ok(())
    }
}

impl Layer for Open {
    fn serve<'a>(&'a self, queue: &'a Rc<Queue>, op: &'a Op, role: Role) -> Served<'a> {
        Box::pin(async move {
            if !matches!(op, Op::Read { .. } | Op::Flush { .. }) {
                self.written.store(true, Ordering::SeqCst);
            }
            match op {
                Op::Read { offset, data } => {
                    match role {
                        Role::Content => self.happens(Event::ReadAio),
                        Role::L2Tables => self.happens(Event::L2Load),
                        Role::Metadata => {}
                    }
                    self.read(queue, *offset, data, role).await
                }
                Op::Write { offset, data } => {
                    if role == Role::Content {
                        self.happens(Event::WriteAio);
                    }
                    self.write(queue, *offset, data, role).await
                }
                Op::WriteZeroes { offset, len } => {
                    self.write_zeroes(queue, *offset..offset.saturating_add(*len), role).await
                }
                Op::Punch { offset, len } => self.punch(queue, *offset..offset.saturating_add(*len), role).await,
                Op::Flush { barrier } => {
                    self.happens(Event::FlushToOs);
                    if self.written.swap(false, Ordering::SeqCst) {
                        self.happens(Event::FlushToDisk);
                        let fault = self.check(IoType::Flush, 0..0);
                        self.written.fetch_or(fault.is_err(), Ordering::SeqCst);
                        fault?;
                    }
                    queue.flush(&self.of, *barrier).await
                }
                Op::Allocate { offset, len } => queue.allocate(&self.of, *offset, *len).await,
                Op::SetLength { len } => queue.set_length(&self.of, *len).await,
            }
        })
    }

    fn disk(&self) -> Option<&Arc<Disk>> {
        self.of.layer().and_then(|layer| layer.disk())
    }

    fn below(&self) -> Option<&File> {
        Some(&self.of)
    }
}

impl FileOps for Open {
    fn id(&self) -> RawFd {
        -1
    }

    fn traits(&self) -> FileTraits {
        // What the file's own operations must be multiples of they become on their way to it.
        FileTraits { align: self.limits.align.unwrap_or(1), ..self.of.traits() }
    }

    fn length(&self) -> io::Result<u64> {
        self.of.length()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.of.allocated()
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.check(IoType::BlockStatus, offset..offset.saturating_add(1))?;
        self.of.data_after(offset)
    }

    fn lock(&self, masks: LockMasks) -> std::result::Result<(), LockError> {
        self.of.lock(masks)
    }

    fn relax(&self, masks: LockMasks) {
        self.of.relax(masks);
    }

    fn unlock(&self) {
        self.of.unlock();
    }
}

#[cfg(test)]
#[path = "debug_test.rs"]
mod tests;
