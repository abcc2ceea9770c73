//! What requests report: how much they moved and how fast, and the bytes themselves.

use std::fmt::Write as _;
use std::time::Duration;

use super::number::amount;

/// What a request did.
pub(crate) struct Report<'a> {
    /// `read`, `wrote` or `discard`.
    pub(crate) what: &'a str,
    pub(crate) offset: u64,
    /// Bytes asked for.
    pub(crate) count: u64,
    /// Bytes moved.
    pub(crate) total: u64,
    pub(crate) time: Duration,
}

impl Report<'_> {
    /// For people, or on one line for programs.
    pub(crate) fn text(&self, for_programs: bool) -> String {
        let Self { what, offset, count, total, time } = self;
        // A clock that did not move on would make infinity of it.
        let seconds = time.as_secs_f64().max(1e-9);
        let (bytes, operations) = (*total as f64 / seconds, 1.0 / seconds);
        if for_programs {
            return format!("{total},1,{},{bytes:.3},{operations:.3}\n", clock(*time));
        }
        let (moved, speed) = (amount(*total as f64), amount(bytes));
        format!(
            "{what} {total}/{count} bytes at offset {offset}\n{moved}, 1 ops; {} ({speed}/sec and {operations:.4} ops/sec)\n",
            duration(*time)
        )
    }
}

/// Hours, minutes, and seconds with two places.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let rest = (seconds % 60) as f64 + f64::from(time.subsec_nanos()) / 1e9;
    format!("{}:{:02}:{rest:05.2}", seconds / 3600, seconds / 60 % 60)
}

/// Seconds; with hours and minutes only if it took hours.
fn duration(time: Duration) -> String {
    if time.as_secs() >= 3600 {
        return clock(time);
    }
    format!("{:05.2} sec", (time.as_secs() % 60) as f64 + f64::from(time.subsec_nanos()) / 1e9)
}

/// Sixteen bytes a line, the first of which is at `offset`.
pub(crate) fn dump(bytes: &[u8], offset: u64) -> String {
    let mut text = String::new();
    for (line, at) in bytes.chunks(16).zip((offset..).step_by(16)) {
        let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
        let shown: String =
            line.iter().map(|&byte| if byte.is_ascii_alphanumeric() { char::from(byte) } else { '.' }).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{at:08x}:  {hex} {shown}");
    }
    text
}

#[cfg(test)]
#[path = "report_test.rs"]
mod tests;
