//! The header's hash: in PBKDF2, and in the anti-forensic splitter.

use std::time::Duration;

use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use zeroize::{Zeroize, Zeroizing};

use super::LuksError;
use crate::limits;

/// The hash functions that a header can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1, cryptsetup's default for a long time. PBKDF2 and the splitter do not depend on what is broken in it.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256, QEMU's default.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
}

impl Hash {
    /// Bytes of a digest.
    pub(super) const fn digest_len(self) -> usize {
        match self {
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// Replaces `data` by the beginning of the digest of `prefix` and `data`; `data` is at most a digest long.
    pub(super) fn replace(self, prefix: &[u8], data: &mut [u8]) {
        fn with<D: Digest>(prefix: &[u8], data: &mut [u8]) {
            let mut digest = D::new().chain_update(prefix).chain_update(&*data).finalize();
            data.iter_mut().zip(&digest).for_each(|(byte, new)| *byte = *new);
            digest.as_mut_slice().zeroize();
        }
        debug_assert!(data.len() <= self.digest_len());
        match self {
            Self::Sha1 => with::<Sha1>(prefix, data),
            Self::Sha224 => with::<Sha224>(prefix, data),
            Self::Sha256 => with::<Sha256>(prefix, data),
            Self::Sha384 => with::<Sha384>(prefix, data),
            Self::Sha512 => with::<Sha512>(prefix, data),
            Self::Ripemd160 => with::<Ripemd160>(prefix, data),
        }
    }

    /// PBKDF2 with HMAC of this hash: fills `out`. Takes as long as `iterations` say, once for each digest that fits
    /// into `out`.
    pub(super) fn pbkdf2(self, secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(secret, salt, iterations, out),
            Self::Sha224 => pbkdf2_hmac::<Sha224>(secret, salt, iterations, out),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(secret, salt, iterations, out),
            Self::Sha384 => pbkdf2_hmac::<Sha384>(secret, salt, iterations, out),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(secret, salt, iterations, out),
            Self::Ripemd160 => pbkdf2_hmac::<Ripemd160>(secret, salt, iterations, out),
        }
    }

    /// Does the work that unlocking a key of `key_bytes` with `iterations` takes, and nothing else, for the caller to
    /// measure how long that is. What comes of it goes into [`Iterations::within`].
    pub fn probe(self, key_bytes: usize, iterations: Iterations) {
        let mut out = Zeroizing::new(vec![0; key_bytes.min(limits::LUKS_KEY_BYTES_MAX)]);
        self.pbkdf2(b"probe", &[0; 32], iterations.get(), &mut out);
        std::hint::black_box(&out);
    }
}

/// How many times PBKDF2 iterates for something new: [`limits::LUKS_ITERATIONS_MIN`] to
/// [`limits::LUKS_ITERATIONS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Iterations(u32);

impl Iterations {
    /// The fewest that are allowed.
    pub const MIN: Self = Self(limits::LUKS_ITERATIONS_MIN);
    /// The most that are allowed.
    pub const MAX: Self = Self(limits::LUKS_ITERATIONS_MAX);

    /// Exactly `iterations`.
    ///
    /// # Errors
    /// Out of bounds.
    pub const fn new(iterations: u32) -> Result<Self, LuksError> {
        let (min, max) = (limits::LUKS_ITERATIONS_MIN, limits::LUKS_ITERATIONS_MAX);
        if min <= iterations && iterations <= max {
            Ok(Self(iterations))
        } else {
            Err(LuksError::Iterations { iterations, min, max })
        }
    }

    /// As many as fit into `budget`, when `probed` of them took `took` (see [`Hash::probe`]); the nearest bound if that
    /// is out of bounds. A probe of less than some ten milliseconds says little.
    #[must_use]
    pub fn within(budget: Duration, probed: Self, took: Duration) -> Self {
        let (budget, took) = (budget.as_nanos(), took.as_nanos().max(1));
        // 2^26 iterations times the nanoseconds of the longest Duration stay below 2^121.
        let fit = budget.saturating_mul(probed.0.into()) / took;
        Self(u32::try_from(fit).unwrap_or(u32::MAX).clamp(Self::MIN.0, Self::MAX.0))
    }

    /// An eighth of them: what QEMU and cryptsetup give the volume key's digest, whose input has no need of being
    /// hard to guess.
    #[must_use]
    pub fn eighth(self) -> Self {
        Self(self.0 / 8).max(Self::MIN)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
#[path = "hash_test.rs"]
mod tests;
