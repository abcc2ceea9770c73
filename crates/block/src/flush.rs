//! The flushes of one file, of which a failed one is the last.
//!
//! The kernel marks pages clean that it could not write: after one failure no later success means anything, so none is
//! asked for. Why a flush is made is its [`Barrier`]; which barriers are needed, and when, is the formats' to know.

use std::path::Path;
use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Barrier, File};
use crate::mutation::Mutation;
use crate::queue::Queue;
use crate::sync::{AsyncGuard, AsyncMutex, AtomicBool, AtomicU64, Ordering};

/// What is known of a file's flushes.
pub(crate) struct Flushes {
    /// They do nothing: the file is thrown away (`ephemeral`), or its owner said that he does not care (`cache=unsafe`).
    skipped: bool,
    failed: AtomicBool,
    /// One at a time: the kernel tells of what it could not write once. Of two flushes that run side by side one would hear of it,
    /// and the other would be told that all is well.
    running: AsyncMutex,
    /// Counts those that ended well.
    done: AtomicU64,
}

impl Flushes {
    /// Of a file just opened.
    pub(crate) fn new(skipped: bool) -> Self {
        Self { skipped, failed: AtomicBool::new(false), running: AsyncMutex::default(), done: AtomicU64::new(0) }
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
        let _running = self.turn().await;
        self.flush_now(queue, file, path, barrier).await
    }

    /// The same where all flushes are of one file: one that began after the call does for it.
    pub(crate) async fn flush_for_all(
        &self,
        queue: &Rc<Queue>,
        file: &File,
        path: &Path,
        barrier: Barrier,
    ) -> Result<()> {
        if self.skipped {
            return Ok(());
        }
        let seen = self.done.load(Ordering::SeqCst);
        let _running = self.turn().await;
        // The first to end may have been running when we came; the second was not.
        if self.done.load(Ordering::SeqCst) >= seen + 2 {
            return self.check(path);
        }
        self.flush_now(queue, file, path, barrier).await
    }

    async fn turn(&self) -> Option<AsyncGuard<'_>> {
        if Mutation::FlushesSideBySide.is_on() { None } else { Some(self.running.lock().await) }
    }

    async fn flush_now(&self, queue: &Rc<Queue>, file: &File, path: &Path, barrier: Barrier) -> Result<()> {
        self.check(path)?;
        queue.flush(file, barrier).await.map_err(|e| {
            self.failed.store(!Mutation::FailedFlushForgotten.is_on(), Ordering::SeqCst);
            Error::io("flush failed", e).at_path(path)
        })?;
        self.done.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[cfg(test)]
#[path = "flush_test.rs"]
mod tests;

#[cfg(all(test, feature = "shuttle"))]
#[path = "flush_model.rs"]
mod model;
