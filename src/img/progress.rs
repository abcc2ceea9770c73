//! How far a command is, shown in one line that is written over again and again.

use std::cell::Cell;
use std::io::Write;

/// The least step that is shown, in hundredths of a per cent: what a terminal can keep up with.
const STEP: u64 = 1;

/// A line of progress on standard output.
pub(crate) struct Progress {
    /// What was shown last, in hundredths of a per cent.
    last: Cell<Option<u64>>,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let progress = Self { last: Cell::new(None) };
        progress.show(0, 1);
        progress
    }

    /// Shows that so much of so much is done, if that is more than was shown.
    pub(crate) fn show(&self, done: u64, total: u64) {
        let hundredths = u128::from(done.min(total)) * 10_000 / u128::from(total.max(1));
        let now = hundredths as u64;
        // The end is shown whenever it is said, as QEMU does.
        if now < 10_000 && self.last.get().is_some_and(|last| now < last + STEP) {
            return;
        }
        self.last.set(Some(now));
        print!("    ({}.{:02}/100%)\r", now / 100, now % 100);
        // Somebody who does not look any more is no reason to stop.
        let _ = std::io::stdout().flush();
    }

    /// Shows that all is done, as QEMU does though it may have been shown.
    pub(crate) fn all(&self) {
        self.last.set(None);
        self.show(1, 1);
    }

    /// Ends the line.
    pub(crate) fn end(&self) {
        println!();
    }
}
