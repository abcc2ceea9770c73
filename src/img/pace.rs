//! How far a job is, shown, and how fast it goes, bounded.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Failure;
use super::progress::Progress;
use super::units::parse_size;

/// The longest that a job stands still at once.
const LONGEST_REST: Duration = Duration::from_secs(1);

/// What a job tells of its work goes here.
pub(crate) struct Pace {
    progress: Option<Rc<Progress>>,
    rate: Option<u64>,
}

impl Pace {
    /// Shows progress if that is asked for, and lets no more than `rate` bytes a second pass.
    pub(crate) fn new(shown: bool, rate: Option<u64>) -> Self {
        Self { progress: shown.then(|| Rc::new(Progress::new())), rate }
    }

    /// What a job is to call.
    pub(crate) fn teller(&self) -> Box<dyn FnMut(u64, u64)> {
        let (progress, rate) = (self.progress.clone(), self.rate.filter(|&rate| rate > 0));
        let (begun, rested) = (Instant::now(), Cell::new(0));
        Box::new(move |done, total| {
            if let Some(progress) = &progress {
                progress.show(done, total);
            }
            let Some(rate) = rate.filter(|_| done > rested.replace(done)) else { return };
            let due = Duration::from_secs_f64(done as f64 / rate as f64);
            while let Some(left) = due.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) {
                std::thread::sleep(left.min(LONGEST_REST));
            }
        })
    }

    /// Ends the line of progress.
    pub(crate) fn end(&self) {
        if let Some(progress) = &self.progress {
            progress.end();
        }
    }
}

/// A number of bytes a second.
pub(crate) fn rate(text: &str) -> Result<u64, Failure> {
    parse_size(text, 1).map_err(|_| Failure::new(format!("Invalid rate limit specified: '{text}'.")))
}

/// The system's words for an error without Rust's "(os error N)".
pub(crate) fn os_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}
