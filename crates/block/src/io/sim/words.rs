//! What happens in the world, in words, for traces.

use crate::io::{Barrier, Op, segs_len};

pub(super) fn barrier_name(barrier: Barrier) -> &'static str {
    match barrier {
        Barrier::Data => "data",
        Barrier::NewRefblocks => "new refblocks",
        Barrier::BeforeMapping => "before mapping",
        Barrier::Mapping => "mapping",
        Barrier::NewRefTable => "new refcount table",
        Barrier::BeforeHeader => "before header",
        Barrier::Header => "header",
        Barrier::Create => "create",
    }
}

pub(super) fn describe(op: &Op) -> String {
    match op {
        Op::Read { offset, data } => format!("read {offset:#x}+{:#x}", segs_len(data)),
        Op::Write { offset, data } => format!("write {offset:#x}+{:#x}", segs_len(data)),
        Op::WriteZeroes { offset, len } => format!("zero {offset:#x}+{len:#x}"),
        Op::Punch { offset, len } => format!("punch {offset:#x}+{len:#x}"),
        Op::Allocate { offset, len } => format!("allocate {offset:#x}+{len:#x}"),
        Op::SetLength { len } => format!("set length {len:#x}"),
        Op::Flush { barrier } => format!("flush ({})", barrier_name(*barrier)),
    }
}
