//! The flushes of one file, of which a failed one is the last.
//!
//! The kernel marks pages clean that it could not write: after one failure no later success means anything, so none is
//! asked for. Why a flush is made is its [`Barrier`]; which barriers are needed, and when, is the formats' to know.

use std::path::Path;
use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, File};
use crate::queue::Queue;
use crate::sync::{AtomicBool, Ordering};

/// What is known of a file's flushes.
pub(crate) struct Flushes {
    /// They do nothing: the file is thrown away (`ephemeral`), or its owner said that he does not care (`cache=unsafe`).
    skipped: bool,
    failed: AtomicBool,
}

impl Flushes {
    /// Of a file just opened.
    pub(crate) const fn new(skipped: bool) -> Self {
        Self { skipped, failed: AtomicBool::new(false) }
    }

    /// Refuses if a flush has failed: nothing is promised any more.
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        if !self.failed.load(Ordering::SeqCst) {
            return Ok(());
        }
        let message =
            "an earlier flush of this file failed, so what was written since may be lost; stop using the disk";
        Err(Error::new(ErrorKind::Io, message).at_path(path))
    }

    /// Makes what was written to `file` durable.
    pub(crate) async fn flush(&self, queue: &Rc<Queue>, file: &File, path: &Path, barrier: Barrier) -> Result<()> {
        if self.skipped {
            return Ok(());
        }
        self.check(path)?;
        queue.flush(file, barrier).await.map_err(|e| {
            self.failed.store(true, Ordering::SeqCst);
            Error::io("flush failed", e).at_path(path)
        })
    }
}

#[cfg(test)]
#[path = "flush_test.rs"]
mod tests;
