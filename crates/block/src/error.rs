//! The engine's one public error: a small, stable kind to match on, and the context a person needs.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What sort of failure it is; device models map it to a status, commands to an exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The host's I/O failed.
    Io,
    /// No space on the host (or a limit on file size).
    NoSpace,
    /// The image breaks the format's rules.
    Corrupt,
    /// The image or the option asks for something that cowhand does not do.
    Unsupported,
    /// A request or an option that makes no sense (out of range, misaligned).
    Invalid,
    /// The disk or the file may not be written.
    ReadOnly,
    /// Another process holds the image.
    Locked,
    /// A file, or a right to it, is missing.
    NotFound,
    /// Refused for safety: a file outside the allowed directories, a format that would have to be guessed.
    Refused,
}

/// An error of the engine: one line that names the file and, where it matters, the offset.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    /// QEMU's words for it, where they differ.
    brief: Option<String>,
    path: Option<PathBuf>,
    offset: Option<u64>,
    damage: bool,
    /// The message names the file.
    named: bool,
    source: Option<io::Error>,
}

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A new error that says `message`: what is wrong and, where it helps, what to do.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            brief: None,
            path: None,
            offset: None,
            damage: false,
            named: false,
            source: None,
        }))
    }

    /// An error of the host's I/O, met while doing `what` ("read", "open", …).
    #[must_use]
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::NoSpace
            }
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => ErrorKind::NotFound,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        };
        let mut error = Self::new(kind, what);
        error.0.source = Some(source);
        error
    }

    /// The same error, naming the file it is about (the innermost name is kept).
    #[must_use]
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Self {
        if self.0.path.is_none() {
            self.0.path = Some(path.as_ref().to_path_buf());
        }
        self
    }

    /// A file that could not be opened, said as QEMU says it.
    pub(crate) fn open(path: &Path, source: io::Error) -> Self {
        let mut error = Self::io(format!("Could not open '{}'", path.display()), source).at_path(path);
        error.0.named = true;
        error
    }

    /// A file that could not be made, said as QEMU says it.
    pub(crate) fn create(path: &Path, source: io::Error) -> Self {
        let mut error = Self::io(format!("Could not create '{}'", path.display()), source).at_path(path);
        error.0.named = true;
        error
    }

    /// The same error, with QEMU's words for it.
    #[must_use]
    pub(crate) fn briefly(mut self, words: Option<impl Into<String>>) -> Self {
        self.0.brief = words.map(Into::into);
        self
    }

    /// The same error, naming the byte offset in the file (the innermost is kept).
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// The same error, which shows that the image it is about must not be written any more.
    pub(crate) fn damaging(mut self) -> Self {
        self.0.damage = true;
        self
    }

    /// Whether the image must not be written any more.
    pub(crate) fn is_damage(&self) -> bool {
        self.0.damage
    }

    /// What sort of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The text without the name of the file that the error is about, for those who have named it; in QEMU's words, where
    /// it has some for the same failure.
    #[must_use]
    pub fn reason(&self) -> String {
        self.0.brief.clone().unwrap_or_else(|| self.message())
    }

    fn message(&self) -> String {
        let inner = &*self.0;
        let mut text = inner.message.clone();
        if let Some(offset) = inner.offset {
            text.push_str(&format!(" (at offset {offset:#x})"));
        }
        // One line is what a person reads, so the cause belongs into it; `source` is kept for programs.
        if let Some(source) = &inner.source {
            text.push_str(&format!(": {}", os_text(source)));
        }
        text
    }

    /// The host's error that is behind it.
    #[must_use]
    pub fn host_error(&self) -> Option<&io::Error> {
        self.0.source.as_ref()
    }

    /// The file that the error is about.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.path {
            Some(path) if !self.0.named => write!(f, "{}: {}", path.display(), self.message()),
            _ => f.write_str(&self.message()),
        }
    }
}

/// The system's words for an error without Rust's "(os error N)".
pub(crate) fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}
