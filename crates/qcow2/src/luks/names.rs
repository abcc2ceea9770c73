//! The names by which a header says what it uses, as cryptsetup and QEMU write them.

use super::hash::Hash;
use crate::cipher::{Aes, CipherSpec, Iv, Mode};
use crate::error::{Field, FormatError};

const HASHES: [Hash; 6] = [Hash::Sha1, Hash::Sha224, Hash::Sha256, Hash::Sha384, Hash::Sha512, Hash::Ripemd160];

/// The cipher's name, of which there is one.
const AES: &str = "aes";

impl Hash {
    /// The name in the header.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
        }
    }
}

impl CipherSpec {
    /// The names in the header: the cipher's ("aes"), and the mode's with the IV's ("xts-plain64").
    #[must_use]
    pub fn names(self) -> (&'static str, String) {
        let mode = match self.mode {
            Mode::Xts => "xts",
            Mode::Cbc => "cbc",
        };
        let iv = match self.iv {
            Iv::Plain => "plain",
            Iv::Plain64 => "plain64",
            Iv::EssivSha256 => "essiv:sha256",
        };
        (AES, format!("{mode}-{iv}"))
    }
}

/// The hash that a header names.
pub(super) fn hash(bytes: &[u8], field: Field) -> Result<Hash, FormatError> {
    let name = text(bytes);
    let known = "sha1, sha224, sha256, sha384, sha512, ripemd160";
    HASHES.into_iter().find(|hash| name == Some(hash.name())).ok_or_else(|| unknown(field, name, known))
}

/// The cipher that a header names and whose key has `key_bytes`.
pub(super) fn cipher(
    name: (&[u8], Field),
    mode: (&[u8], Field),
    key_bytes: (u32, Field),
) -> Result<CipherSpec, FormatError> {
    if text(name.0) != Some(AES) {
        return Err(unknown(name.1, text(name.0), AES));
    }
    let words = text(mode.0);
    let spec = words.and_then(|words| mode_and_iv(words, key_bytes.0));
    let known = "xts or cbc with plain, plain64, essiv:sha256";
    match spec {
        Some(Ok(spec)) => Ok(spec),
        Some(Err(known)) => Err(FormatError::UnknownValue { field: key_bytes.1, value: key_bytes.0.into(), known }),
        None => Err(unknown(mode.1, words, known)),
    }
}

/// `None` for a mode that is not known, an error that says which key lengths are known.
fn mode_and_iv(words: &str, key_bytes: u32) -> Option<Result<CipherSpec, &'static str>> {
    let (mode, iv) = words.split_once('-')?;
    let mode = match mode {
        "xts" => Mode::Xts,
        "cbc" => Mode::Cbc,
        _ => return None,
    };
    // A hash means nothing to an IV that uses none; dm-crypt and QEMU ignore it there.
    let iv = match iv.split_once(':').unwrap_or((iv, "")) {
        ("plain", _) => Iv::Plain,
        ("plain64", _) => Iv::Plain64,
        ("essiv", "sha256") => Iv::EssivSha256,
        _ => return None,
    };
    // The material of an AES-192 key in CBC mode is no whole number of sectors, and QEMU cannot write it.
    let aes = match (mode, key_bytes) {
        (Mode::Xts, 32) | (Mode::Cbc, 16) => Aes::Aes128,
        (Mode::Xts, 48) => Aes::Aes192,
        (Mode::Xts, 64) | (Mode::Cbc, 32) => Aes::Aes256,
        (Mode::Xts, _) => return Some(Err("32, 48, 64 in XTS mode")),
        (Mode::Cbc, _) => return Some(Err("16, 32 in CBC mode")),
    };
    Some(Ok(CipherSpec { aes, mode, iv }))
}

/// What stands before the NUL, which must be there.
pub(super) fn text(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    std::str::from_utf8(bytes.get(..end)?).ok()
}

/// `name` as a field of the header. Every name that can be written is shorter than its field.
pub(super) fn field<const N: usize>(name: &str) -> [u8; N] {
    debug_assert!(name.len() < N);
    let mut bytes = [0; N];
    bytes.iter_mut().zip(name.as_bytes()).for_each(|(byte, new)| *byte = *new);
    bytes
}

fn unknown(field: Field, name: Option<&str>, known: &'static str) -> FormatError {
    FormatError::UnknownName { field, name: name.unwrap_or("(no text)").to_owned(), known }
}
