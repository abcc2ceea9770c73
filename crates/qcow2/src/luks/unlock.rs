//! From a secret to the volume key: the slots' key material, decrypted and merged, and held against the digest.
//! (LUKS1 specification, section 4.)

use std::fmt;

use zeroize::Zeroizing;

use super::header::{DIGEST, Header};
use super::{LuksError, af};
use crate::cipher::{Cipher, CipherSpec};
use crate::error::{Field, FormatError};
use crate::wire::slice;

/// The key that the data is encrypted with. It is the same for the whole life of an image, whichever secrets open it.
/// Wiped from memory when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct VolumeKey {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) cipher: CipherSpec,
}

impl VolumeKey {
    /// The cipher with this key.
    ///
    /// # Errors
    /// None: a volume key fits the cipher that it was unlocked for.
    pub fn cipher(&self) -> Result<Cipher, LuksError> {
        Ok(Cipher::new(self.cipher, &self.bytes)?)
    }
}

impl fmt::Debug for VolumeKey {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VolumeKey").field("cipher", &self.cipher).finish_non_exhaustive()
    }
}

/// What a secret has opened.
#[derive(Debug)]
pub struct Unlocked {
    /// The volume key.
    pub key: VolumeKey,
    /// The slot that it came from.
    pub slot: usize,
}

impl Header {
    /// Tries `secret` on the active slots, one after the other. `area` begins with the header; [`Header::unlock_len`]
    /// bytes of it are enough.
    ///
    /// This is slow on purpose: each slot takes as long as its iterations say, and nothing interrupts it.
    ///
    /// # Errors
    /// No slot opens, none is active, or `area` ends before the key material.
    pub fn unlock(&self, area: &[u8], secret: &[u8]) -> Result<Unlocked, LuksError> {
        let mut nothing = LuksError::NoActiveSlot;
        for slot in self.active_slots() {
            if let Some(key) = self.open_slot(slot, area, secret)? {
                return Ok(Unlocked { key, slot });
            }
            nothing = LuksError::NoSlotOpens;
        }
        Err(nothing)
    }

    /// Tries `secret` on one slot: the volume key, or `None` if the slot does not open with it or is not active.
    ///
    /// # Errors
    /// There is no such slot, or `area` ends before the key material does.
    pub fn open_slot(&self, slot: usize, area: &[u8], secret: &[u8]) -> Result<Option<VolumeKey>, LuksError> {
        let (Some(raw), Some(place)) = (self.raw.slots.get(slot), self.material(slot)) else {
            return Err(LuksError::NoSuchSlot { slot });
        };
        if !self.active_slots().any(|active| active == slot) {
            return Ok(None);
        }
        let too_short = FormatError::TooShort {
            field: Field::new("LUKS key material"),
            needed: place.end,
            available: area.len() as u64,
        };
        let start = usize::try_from(place.start).ok();
        let material = start.and_then(|start| slice(area, start, self.material_len())).ok_or(too_short)?;
        let mut material = Zeroizing::new(material.to_vec());
        self.slot_cipher(secret, &raw.salt, raw.iterations.get())?.decrypt(0, &mut material)?;
        let bytes = af::merge(self.hash, self.cipher.key_bytes(), &material);
        let key = VolumeKey { bytes, cipher: self.cipher };
        Ok(self.is_mine(&key).then_some(key))
    }

    /// The cipher of a slot's key material: the data's, with a key derived from the secret, and with sectors numbered
    /// from the material's start.
    pub(super) fn slot_cipher(&self, secret: &[u8], salt: &[u8], iterations: u32) -> Result<Cipher, LuksError> {
        let mut key = Zeroizing::new(vec![0; self.cipher.key_bytes()]);
        self.hash.pbkdf2(secret, salt, iterations, &mut key);
        Ok(Cipher::new(self.cipher, &key)?)
    }

    /// Whether the digest in the header is this key's.
    pub(super) fn is_mine(&self, key: &VolumeKey) -> bool {
        self.digest(&key.bytes) == self.raw.mk_digest
    }

    pub(super) fn digest(&self, key: &[u8]) -> [u8; DIGEST] {
        let mut digest = [0; DIGEST];
        self.hash.pbkdf2(key, &self.raw.mk_digest_salt, self.raw.mk_digest_iter.get(), &mut digest);
        digest
    }
}
