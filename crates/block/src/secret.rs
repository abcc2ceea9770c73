//! The secret of encrypted images: where it comes from, and itself.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use zeroize::Zeroizing;

/// Where a secret comes from: `file:PATH` or `fd:N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// A file that holds it, and nothing else.
    File(PathBuf),
    /// An open descriptor of this process, which is read to its end.
    Descriptor(u32),
    /// It is known already.
    Known(Secret),
}

impl FromStr for SecretSource {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("fd", number)) => number.parse().map(Self::Descriptor).map_err(|_| ()),
            _ => Err(()),
        }
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Descriptor(number) => write!(f, "file descriptor {number}"),
            Self::Known(_) => f.write_str("what was given"),
        }
    }
}

/// A secret, byte for byte as its source holds it (a line's end at the end counts). Wiped from memory when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// The most bytes that a secret may have.
    pub const MAX: usize = 8 << 10;

    /// Takes the bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}
