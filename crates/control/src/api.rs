//! What is asked and answered: the JSON bodies of the API. Sizes are in bytes.

use serde::{Deserialize, Serialize};

/// The answer to `GET /v1/disks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskList {
    /// The disks, in the order in which they were given.
    pub disks: Vec<Disk>,
}

/// A disk that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name.
    pub id: String,
    /// Its virtual size, as the guest sees it.
    pub size: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Whether its images are open and locked: behind vhost-user they are while a guest uses the disk.
    pub open: bool,
    /// Its images, the topmost first; only known while they are open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<Vec<Layer>>,
}

/// An image of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its file; bytes that are not UTF-8 are shown as U+FFFD.
    pub path: String,
    /// Its format: `qcow2` or `raw`.
    pub format: String,
    /// Its virtual size.
    pub size: u64,
}

/// The body of `POST /v1/disks/{id}/resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// The new size.
    pub size: u64,
    /// Whether the disk may become smaller: what is cut off is lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shrink: bool,
}

/// What sort of failure it is: for programs, which should not have to read the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request, or what it asks for, makes no sense.
    Invalid,
    /// There is no such thing.
    NotFound,
    /// What is there does not take this method.
    MethodNotAllowed,
    /// The body is larger than any body needs to be.
    TooLarge,
    /// The disk may not be written.
    ReadOnly,
    /// Another process holds the image.
    Locked,
    /// Refused for safety.
    Refused,
    /// The image cannot do that.
    Unsupported,
    /// The host has no space.
    NoSpace,
    /// The image is damaged.
    Corrupt,
    /// The host's I/O failed.
    Io,
    /// A mistake in cowhand.
    Internal,
}

impl ErrorKind {
    /// The HTTP status that goes with it.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::ReadOnly | Self::Locked | Self::Refused | Self::Unsupported => 409,
            Self::TooLarge => 413,
            Self::NoSpace | Self::Corrupt | Self::Io | Self::Internal => 500,
        }
    }
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Error {
    /// What sort of failure it is.
    pub kind: ErrorKind,
    /// One line for people.
    pub message: String,
}

impl Error {
    /// An error that says `message`.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// The body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: Error,
}
