//! How long a queue's thread goes on looking for work before it sleeps.
//!
//! To be woken costs a sleeper and its waker tens of microseconds, more than a request does. So after a gap that was short
//! the thread looks on for a while, and sleeps only then; after one that was long it sleeps at once. An idle queue
//! costs nothing, and a busy one never more than the longest window for each gap. Where there is one processor only, whoever
//! is waited for needs it: there nobody looks.
//!
//! Not here: what is looked at (`worker`).

use std::time::Duration;

/// The longest that a thread looks for work unless it is told otherwise. A guest that is woken by its completion and asks again takes less.
pub const LONGEST_PATIENCE: Duration = Duration::from_micros(100);
/// The first window after a short gap.
const FIRST: Duration = Duration::from_micros(10);

/// What a thread has learned of the gaps between its work.
#[derive(Debug)]
pub(super) struct Patience {
    window: Duration,
    longest: Duration,
}

impl Patience {
    /// For a thread of this host, which never looks for longer than `longest`.
    pub(super) fn new(longest: Duration) -> Self {
        let alone = std::thread::available_parallelism().is_ok_and(|processors| processors.get() == 1);
        Self::of(if alone { Duration::ZERO } else { longest })
    }

    /// One that never looks for longer than `longest`, whatever the host.
    pub(super) fn of(longest: Duration) -> Self {
        Self { window: Duration::ZERO, longest }
    }

    /// How long to look for work now; zero: sleep at once.
    pub(super) fn window(&self) -> Duration {
        self.window
    }

    /// Takes note that work came `gap` after there was none left. One that came within the window changes nothing.
    pub(super) fn learn(&mut self, gap: Duration) {
        if gap > self.longest {
            self.window = Duration::ZERO;
        } else if gap > self.window {
            self.window = (self.window * 2).max(FIRST).min(self.longest);
        }
    }
}

#[cfg(test)]
#[path = "patience_test.rs"]
mod tests;
