//! Where the guest's console output goes, byte by byte, from a vCPU thread.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::SerialConfig;
use super::panic_line::{Heard, PanicListener};
use crate::control::{Control, Exit};

/// The host's side of the output.
#[derive(Debug)]
pub enum Sink {
    /// Standard output.
    Stdout,
    /// A file.
    File(File),
    /// Nowhere.
    Null,
}

impl Sink {
    /// Opens what `config` names.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn open(config: &SerialConfig) -> io::Result<Self> {
        Ok(match config {
            SerialConfig::Stdio => Self::Stdout,
            SerialConfig::File(path) => {
                Self::File(OpenOptions::new().write(true).create(true).truncate(true).open(path)?)
            }
            SerialConfig::Null => Self::Null,
        })
    }

    /// The same sink once more, for the machine after a reset.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Stdout => Self::Stdout,
            Self::File(file) => Self::File(file.try_clone()?),
            Self::Null => Self::Null,
        })
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Stdout => Some(rustix::stdio::stdout()),
            Self::File(file) => Some(file.as_fd()),
            Self::Null => None,
        }
    }
}

/// The guest's output: a [`Sink`], and someone who listens for the kernel's panic.
pub struct ConsoleOutput {
    sink: Sink,
    listener: Option<PanicListener>,
    control: Arc<Control>,
}

impl ConsoleOutput {
    /// Output into `sink`; with `listen`, a panic heard in it is reported to `control`.
    #[must_use]
    pub fn new(sink: Sink, listen: bool, control: Arc<Control>) -> Self {
        Self { sink, listener: listen.then(PanicListener::default), control }
    }

    /// Writes to the sink; gives up when the machine ends, for a reader that reads no more must not keep it alive.
    fn write_sink(&self, buf: &[u8]) -> io::Result<usize> {
        let Some(fd) = self.sink.fd() else { return Ok(buf.len()) };
        loop {
            match rustix::io::write(fd, buf) {
                Ok(n) => return Ok(n),
                Err(Errno::INTR | Errno::AGAIN) if self.control.stopping() => return Ok(buf.len()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                    match poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&timeout)) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Write for ConsoleOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = self.write_sink(buf);
        let Some(listener) = &mut self.listener else { return written };
        // What the sink refuses (a closed pipe) was said all the same.
        let heard = *written.as_ref().unwrap_or(&buf.len());
        for byte in &buf[..heard.min(buf.len())] {
            match listener.hear(*byte) {
                Heard::Nothing => {}
                Heard::Panic => self.control.report_panic(),
                Heard::End => self.control.end(Exit::Panic),
            }
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "output_test.rs"]
mod tests;
