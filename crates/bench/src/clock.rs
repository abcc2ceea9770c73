//! Processor time of a process: user and system, of all its threads, those that have ended included, in nanoseconds.
//!
//! io_uring's workers are threads of the process and so are counted; what the kernel does on its own threads (writing dirty pages
//! back) is nobody's.

use std::io;
use std::time::Duration;

/// The clock of one process's processor time.
#[derive(Clone, Copy, Debug)]
pub struct ProcessClock(libc::clockid_t);

impl ProcessClock {
    /// The clock of process `pid`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let mut clock = 0;
        // SAFETY: the call writes one clockid_t to where the pointer, of that type and live, points.
        match unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) } {
            0 => Ok(Self(clock)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// The clock of this process.
    #[must_use]
    pub const fn own() -> Self {
        Self(libc::CLOCK_PROCESS_CPUTIME_ID)
    }

    /// The time taken since the process began.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn now(self) -> io::Result<Duration> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call writes one timespec to where the pointer, of that type and live, points.
        if unsafe { libc::clock_gettime(self.0, &raw mut time) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)))
    }
}

#[cfg(test)]
#[path = "clock_test.rs"]
mod tests;
