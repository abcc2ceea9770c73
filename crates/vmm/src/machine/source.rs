//! Files that a guest is booted from, opened once: they are read again after a reset.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

/// Why a file cannot be booted from.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be opened.
    #[error("{}: cannot be opened: {}", file.display(), reason(source))]
    Open {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is a directory.
    #[error("{}: is a directory; give a file", .0.display())]
    Directory(PathBuf),
    /// It is a device, a pipe, a socket.
    #[error("{}: is not a regular file; copy it into one", .0.display())]
    NotRegular(PathBuf),
}

/// The system's words without Rust's "(os error N)".
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error ").next().unwrap_or_default().to_string()
}

/// A regular file, open for reading, and its name for messages.
#[derive(Debug)]
pub struct NamedFile {
    file: File,
    path: PathBuf,
}

impl NamedFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// When it cannot be opened or is no regular file.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let open = |source| SourceError::Open { file: path.to_path_buf(), source };
        // Looked at before it is opened: opening a pipe would wait for a writer.
        let kind = std::fs::metadata(path).map_err(open)?;
        if kind.is_dir() {
            return Err(SourceError::Directory(path.to_path_buf()));
        }
        if !kind.is_file() {
            return Err(SourceError::NotRegular(path.to_path_buf()));
        }
        Ok(Self { file: File::open(path).map_err(open)?, path: path.to_path_buf() })
    }

    /// A file that exists in memory only.
    ///
    /// # Errors
    /// When the system has no memory for it.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> io::Result<Self> {
        let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
        file.write_all(bytes)?;
        Ok(Self { file, path: name.into() })
    }

    /// The same open file once more.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, path: self.path.clone() })
    }

    /// The file and its name.
    #[must_use]
    pub fn parts(&self) -> (&File, &Path) {
        (&self.file, &self.path)
    }
}

#[cfg(test)]
#[path = "source_test.rs"]
mod tests;
