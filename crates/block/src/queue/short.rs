//! Reads and writes that come back short: what is left of them goes on, so that whoever waits sees them whole.

use std::io;

use crate::io::{IoSeg, Op, fill_zero, segs_len, split_segs};

/// A read or write that may come back short.
pub(super) struct Rest {
    write: bool,
    offset: u64,
    len: u64,
    /// The bytes of a block that the last attempt moved, less than one block.
    part: Option<u64>,
    /// The whole list, once a short completion forced a list of the remainder.
    whole: Option<Vec<IoSeg>>,
}

impl Rest {
    pub(super) fn new(write: bool, offset: u64, data: &[IoSeg]) -> Self {
        Self { write, offset, len: segs_len(data), part: None, whole: None }
    }
}

/// What comes after a completion.
pub(super) enum Resumed {
    /// This operation does what is left.
    Again(Op),
    /// It is over.
    Done(io::Result<()>, Vec<IoSeg>),
}

/// Sees to it that a read or write is whole: sends the remainder of a short one, and zero-fills past the end of the file.
///
/// Direct I/O goes on at the block that was moved in part, as all of it must be aligned. A block of which the
/// second time no more is read than the first time is the one in which the file ends.
pub(super) fn resume(rest: &mut Option<Rest>, align: u32, result: io::Result<usize>, data: Vec<IoSeg>) -> Resumed {
    let align = u64::from(align);
    let Some(rest) = rest else {
        return Resumed::Done(result.map(drop), data);
    };
    let moved = match result {
        Ok(n) => n as u64,
        Err(e) if e.kind() == io::ErrorKind::Interrupted => {
            let offset = rest.offset;
            return Resumed::Again(if rest.write { Op::Write { offset, data } } else { Op::Read { offset, data } });
        }
        Err(e) => return Resumed::Done(Err(e), rest.whole.take().unwrap_or(data)),
    };
    if moved >= rest.len {
        return Resumed::Done(Ok(()), rest.whole.take().unwrap_or(data));
    }
    let blocks = moved - moved % align;
    if moved == 0 || (blocks == 0 && rest.part.is_some_and(|part| moved <= part)) {
        if rest.write {
            let error = io::Error::new(io::ErrorKind::WriteZero, "the host does not write on");
            return Resumed::Done(Err(error), rest.whole.take().unwrap_or(data));
        }
        // The end of the file: what is missing reads as zeros.
        fill_zero(&split_segs(&data, moved, rest.len - moved));
        return Resumed::Done(Ok(()), rest.whole.take().unwrap_or(data));
    }
    rest.part = (moved > blocks).then_some(moved - blocks);
    let left = split_segs(&data, blocks, rest.len - blocks);
    rest.whole.get_or_insert(data);
    rest.offset += blocks;
    rest.len -= blocks;
    let (offset, data) = (rest.offset, left);
    Resumed::Again(if rest.write { Op::Write { offset, data } } else { Op::Read { offset, data } })
}
