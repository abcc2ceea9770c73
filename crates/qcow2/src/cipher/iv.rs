//! IVs out of sector numbers.

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes256, Block};
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

use super::Iv;

/// An [`Iv`] with the key that it needs.
pub(super) enum IvGenerator {
    Plain,
    Plain64,
    Essiv(Box<Aes256>),
}

impl IvGenerator {
    /// `key` is the whole key of the data's cipher, with both its halves in XTS mode.
    pub(super) fn new(iv: Iv, key: &[u8]) -> Self {
        match iv {
            Iv::Plain => Self::Plain,
            Iv::Plain64 => Self::Plain64,
            Iv::EssivSha256 => {
                let mut salt = Sha256::digest(key);
                let cipher = Box::new(Aes256::new(&salt));
                salt.as_mut_slice().zeroize();
                Self::Essiv(cipher)
            }
        }
    }

    /// Sets `ivs` to those of the sectors from `sector`.
    pub(super) fn fill(&self, sector: u64, ivs: &mut [Block]) {
        let mask = if matches!(self, Self::Plain) { u64::from(u32::MAX) } else { u64::MAX };
        let mut number = sector;
        for iv in &mut *ivs {
            *iv = u128::from(number & mask).to_le_bytes().into();
            number = number.wrapping_add(1);
        }
        if let Self::Essiv(cipher) = self {
            cipher.encrypt_blocks(ivs);
        }
    }
}
