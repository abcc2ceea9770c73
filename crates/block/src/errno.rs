//! Which of the system's errors an [`Error`] is, for those who answer in the system's words.

use std::error::Error as _;
use std::io;

use crate::error::{Error, ErrorKind, os_text};

impl Error {
    /// The system's number for the failure: that of the call that failed or, where none did, what stands for its kind.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let source = self.source().and_then(|source| source.downcast_ref::<io::Error>());
        if let Some(number) = source.and_then(io::Error::raw_os_error) {
            return number;
        }
        match self.kind() {
            ErrorKind::Io | ErrorKind::Corrupt => libc::EIO,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::Unsupported => libc::ENOTSUP,
            ErrorKind::Invalid => libc::EINVAL,
            ErrorKind::ReadOnly | ErrorKind::Refused => libc::EPERM,
            ErrorKind::Locked => libc::EAGAIN,
            ErrorKind::NotFound => libc::ENOENT,
        }
    }

    /// The system's words for the failure: "Input/output error".
    #[must_use]
    pub fn strerror(&self) -> String {
        os_text(&io::Error::from_raw_os_error(self.errno()))
    }
}

#[cfg(test)]
#[path = "errno_test.rs"]
mod tests;
