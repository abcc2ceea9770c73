//! A part of a file in a file's place: what is outside of it is out of reach.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::rc::Rc;

use super::{Layer, Part, Served, no_space};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{File, FileOps, FileTraits, LockError, LockMasks, Op, Role, fill_zero, segs_len, split_segs};
use crate::queue::Queue;

struct Open {
    of: File,
    offset: u64,
    size: Option<u64>,
}

pub(super) fn open(of: File, part: &Part) -> Result<File> {
    let refuse = |message: String| Err(Error::new(ErrorKind::Invalid, message).at_path(&part.of.path));
    let length = of.length().map_err(|e| Error::io("cannot tell the file's length", e).at_path(&part.of.path))?;
    // As a raw disk it has whole sectors.
    let whole = length.next_multiple_of(512);
    if part.offset > whole {
        return refuse(format!(
            "Offset ({}) cannot be greater than size of the containing file ({whole})",
            part.offset
        ));
    }
    if let Some(size) = part.size
        && size > whole - part.offset
    {
        return refuse(format!(
            "The sum of offset ({}) and size ({size}) has to be smaller or equal to the  actual size of the containing file \
             ({whole})",
            part.offset
        ));
    }
    Ok(File::layered(Open { of, offset: part.offset, size: part.size }))
}

impl Open {
    /// Where a range lies in the file; an error if it goes past the part's end.
    fn place(&self, offset: u64, len: u64) -> io::Result<u64> {
        let end = offset.checked_add(len).ok_or_else(no_space)?;
        if self.size.is_some_and(|size| end > size) {
            return Err(no_space());
        }
        self.offset.checked_add(end).map(|end| end - len).ok_or_else(no_space)
    }

    /// How much of a range lies in the part.
    fn inside(&self, offset: u64, len: u64) -> u64 {
        self.size.map_or(len, |size| len.min(size.saturating_sub(offset)))
    }
}

impl Layer for Open {
    fn serve<'a>(&'a self, queue: &'a Rc<Queue>, op: &'a Op, role: Role) -> Served<'a> {
        Box::pin(async move {
            let of = &self.of.of(role);
            match op {
                Op::Read { offset, data } => {
                    let len = segs_len(data);
                    let inside = self.inside(*offset, len);
                    fill_zero(&split_segs(data, inside, len - inside));
                    if inside == 0 {
                        return Ok(());
                    }
                    queue.read(of, self.place(*offset, inside)?, split_segs(data, 0, inside)).await
                }
                Op::Write { offset, data } => {
                    let place = self.place(*offset, segs_len(data))?;
                    queue.write(of, place, data.clone(), Vec::new()).await
                }
                Op::WriteZeroes { offset, len } => queue.write_zeroes(of, self.place(*offset, *len)?, *len).await,
                Op::Punch { offset, len } => {
                    let len = self.inside(*offset, *len);
                    if len == 0 { Ok(()) } else { queue.punch(of, self.place(*offset, len)?, len).await }
                }
                Op::Flush { barrier } => queue.flush(of, *barrier).await,
                Op::Allocate { offset, len } => queue.allocate(of, self.place(*offset, *len)?, *len).await,
                Op::SetLength { len } if self.size.is_some() => {
                    if self.size == Some(*len) {
                        Ok(())
                    } else {
                        Err(no_space())
                    }
                }
                Op::SetLength { len } => queue.set_length(of, self.place(0, *len)?.saturating_add(*len)).await,
            }
        })
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
        let of = self.of.traits();
        // What the file's operations must be multiples of they become on their way to it.
        FileTraits { block_device: of.block_device || self.size.is_some(), align: 1, ..of }
    }

    fn length(&self) -> io::Result<u64> {
        let whole = self.of.length()?.next_multiple_of(512);
        Ok(self.size.unwrap_or(whole.saturating_sub(self.offset)))
    }

    fn allocated(&self) -> io::Result<u64> {
        self.of.allocated()
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let length = self.length()?;
        if offset >= length {
            return Ok(None);
        }
        let found = self.of.data_after(self.offset.saturating_add(offset))?;
        let here = |place: u64| place.saturating_sub(self.offset).min(length);
        Ok(found.map(|range| here(range.start)..here(range.end)).filter(|range| !range.is_empty()))
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
