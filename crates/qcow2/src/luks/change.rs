//! New headers, and keys added to and erased from the slots.
//!
//! Everything here is worked out in memory; the caller writes it. A change of a slot is written in the same order
//! whether a key is added or erased: **the key material, a flush, the header, a flush**. Whatever is lost when the
//! power goes in between, every other slot opens as before: a slot whose material is gone opens with no secret, and one
//! that the header does not know is free.

use zeroize::Zeroizing;

use super::header::{ACTIVE, DIGEST, Header, INACTIVE, MAGIC, Raw, RawSlot, SALT, VERSION, material_len};
use super::{Hash, Iterations, LuksError, VolumeKey, af, names};
use crate::cipher::{CipherSpec, SECTOR};
use crate::error::FormatError;
use crate::extension::LuksExtension;
use crate::limits::{LUKS_SLOTS, LUKS_STRIPES};
use crate::offset::HostOffset;

/// What the header's own place and each slot's key material are aligned to, in bytes (QEMU's and cryptsetup's).
const ALIGNMENT: usize = 4096;

/// Bytes of a UUID before it is text.
const UUID: usize = 16;

/// What a new LUKS volume is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateParams {
    /// The cipher of data and key material.
    pub cipher: CipherSpec,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: Hash,
    /// PBKDF2 iterations of the first key slot.
    pub iterations: Iterations,
    /// PBKDF2 iterations of the volume key's digest; usually [`Iterations::eighth`] of the slot's.
    pub digest_iterations: Iterations,
}

/// A new LUKS volume.
#[derive(Debug)]
pub struct Created {
    /// The header, with one active slot: 0.
    pub header: Header,
    /// The volume key.
    pub key: VolumeKey,
    /// All that has to be written where the header extension will point to, [`CreateParams::area_len`] bytes: the
    /// header and the first slot's key material; the rest is zeros.
    pub area: Vec<u8>,
}

/// A key slot's change, to be written as the module's head says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotChange {
    /// The slot.
    pub slot: usize,
    /// Where [`material`](Self::material) belongs, in bytes from the start of the area.
    pub material_offset: u64,
    /// The slot's new key material (encrypted), or random bytes in its place.
    pub material: Vec<u8>,
    /// The header as it is afterwards: [`Header::encode`] belongs at the start of the area.
    pub header: Header,
}

impl CreateParams {
    /// Bytes of header and all slots' key material: the length that the header extension gives. At most some 2 MB.
    #[must_use]
    pub const fn area_len(&self) -> usize {
        ALIGNMENT + LUKS_SLOTS * self.slot_len()
    }

    /// Bytes of entropy that [`CreateParams::create`] takes, some 256 KB at most.
    #[must_use]
    pub const fn entropy_len(&self) -> usize {
        let key = self.cipher.key_bytes();
        key + SALT + UUID + SALT + material_len(self.cipher) - key
    }

    /// A new volume that opens with `secret`, with a new volume key. `entropy` is random, at least
    /// [`CreateParams::entropy_len`] bytes, used for nothing else, and wiped afterwards by the caller: the volume key
    /// is a part of it. Takes as long as the iterations say.
    ///
    /// # Errors
    /// Too little entropy; a secret that QEMU would not take; AES-192 in CBC mode, which no LUKS header can have.
    pub fn create(&self, secret: &[u8], entropy: &[u8]) -> Result<Created, LuksError> {
        let mut entropy = Entropy::new(entropy, self.entropy_len())?;
        let bytes = Zeroizing::new(entropy.take(self.cipher.key_bytes()).to_vec());
        let key = VolumeKey { bytes, cipher: self.cipher };
        let mut header = self.header_without_key(&mut entropy)?;
        header.raw.mk_digest = header.digest(&key.bytes);
        let SlotChange { header, material, material_offset, .. } =
            header.with_key(&key, secret, self.iterations, 0, entropy.rest())?;
        let mut area = header.encode();
        // The slots lie one after the other, so this slot's zeros before and after make up the area.
        area.resize(usize::try_from(material_offset).unwrap_or(area.len()), 0);
        area.extend_from_slice(&material);
        area.resize(self.area_len(), 0);
        Ok(Created { header, key, area })
    }

    /// Bytes from one slot's key material to the next's.
    const fn slot_len(&self) -> usize {
        material_len(self.cipher).next_multiple_of(ALIGNMENT)
    }

    /// A header with all slots free and no digest.
    fn header_without_key(&self, entropy: &mut Entropy) -> Result<Header, FormatError> {
        let (cipher_name, cipher_mode) = self.cipher.names();
        let slot = |number: usize| RawSlot {
            active: INACTIVE.into(),
            iterations: 0.into(),
            salt: [0; SALT],
            key_material_offset: sectors(ALIGNMENT + number * self.slot_len()).into(),
            stripes: LUKS_STRIPES.into(),
        };
        let raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            cipher_name: names::field(cipher_name),
            cipher_mode: names::field(&cipher_mode),
            hash_spec: names::field(self.hash.name()),
            payload_offset: sectors(self.area_len()).into(),
            key_bytes: u32::try_from(self.cipher.key_bytes()).unwrap_or(u32::MAX).into(),
            mk_digest: [0; DIGEST],
            mk_digest_salt: entropy.array(),
            mk_digest_iter: self.digest_iterations.get().into(),
            uuid: names::field(&uuid(entropy.array())),
            slots: std::array::from_fn(slot),
        };
        // What is made here must be what is accepted, above all the pair of mode and key length.
        let area = LuksExtension { offset: HostOffset::new(0), len: self.area_len() as u64 };
        Header::parse(zerocopy::IntoBytes::as_bytes(&raw), area)
    }
}

impl Header {
    /// Bytes of entropy that [`Header::add_key`] takes.
    #[must_use]
    pub const fn add_entropy_len(&self) -> usize {
        SALT + self.material_len() - self.cipher().key_bytes()
    }

    /// Bytes of entropy that [`Header::erase_key`] takes.
    #[must_use]
    pub const fn erase_entropy_len(&self) -> usize {
        self.material_len()
    }

    /// Lets `secret` open the volume, too, in the given slot or the first that is free. `entropy` is random, at least
    /// [`Header::add_entropy_len`] bytes, used for nothing else. Takes as long as the iterations say, and the digest's.
    ///
    /// # Errors
    /// The slot does not exist or is in use, or none is free; the volume key is another header's; too little entropy; a
    /// secret that QEMU would not take.
    pub fn add_key(
        &self,
        key: &VolumeKey,
        secret: &[u8],
        iterations: Iterations,
        slot: Option<usize>,
        entropy: &[u8],
    ) -> Result<SlotChange, LuksError> {
        let free = |slot: &usize| !self.is_active(*slot);
        let slot = match slot {
            Some(slot) if slot >= LUKS_SLOTS => return Err(LuksError::NoSuchSlot { slot }),
            Some(slot) if !free(&slot) => return Err(LuksError::SlotInUse { slot }),
            Some(slot) => slot,
            None => (0..LUKS_SLOTS).find(free).ok_or(LuksError::NoFreeSlot)?,
        };
        if !self.is_mine(key) {
            return Err(LuksError::WrongVolumeKey);
        }
        self.with_key(key, secret, iterations, slot, entropy)
    }

    /// The same in a given slot, whatever it holds.
    ///
    /// # Errors
    /// The slot does not exist; the volume key is another header's; too little entropy; a secret that QEMU would not take.
    pub fn put_key(
        &self,
        key: &VolumeKey,
        secret: &[u8],
        iterations: Iterations,
        slot: usize,
        entropy: &[u8],
    ) -> Result<SlotChange, LuksError> {
        if slot >= LUKS_SLOTS {
            return Err(LuksError::NoSuchSlot { slot });
        }
        if !self.is_mine(key) {
            return Err(LuksError::WrongVolumeKey);
        }
        self.with_key(key, secret, iterations, slot, entropy)
    }

    /// Takes a slot's key away and overwrites its key material, once, with `entropy`: random, at least
    /// [`Header::erase_entropy_len`] bytes. Old copies of the image, of the underlying file system or in a flash
    /// drive's spare blocks keep the key; so does whoever has unlocked the volume before.
    ///
    /// # Errors
    /// The slot does not exist, is not in use, or is the last one in use; too little entropy.
    pub fn erase_key(&self, slot: usize, entropy: &[u8]) -> Result<SlotChange, LuksError> {
        self.material(slot).ok_or(LuksError::NoSuchSlot { slot })?;
        if !self.is_active(slot) {
            return Err(LuksError::SlotNotInUse { slot });
        }
        if self.active_slots().count() == 1 {
            return Err(LuksError::LastSlot { slot });
        }
        self.erase_any_key(slot, entropy)
    }

    /// The same with the last slot in use, too: then no secret opens the volume any more, and nothing ever reads its data again.
    ///
    /// # Errors
    /// The slot does not exist, or is not in use; too little entropy.
    pub fn erase_any_key(&self, slot: usize, entropy: &[u8]) -> Result<SlotChange, LuksError> {
        let place = self.material(slot).ok_or(LuksError::NoSuchSlot { slot })?;
        if !self.is_active(slot) {
            return Err(LuksError::SlotNotInUse { slot });
        }
        let mut entropy = Entropy::new(entropy, self.erase_entropy_len())?;
        let mut header = self.clone();
        if let Some(raw) = header.raw.slots.get_mut(slot) {
            raw.active = INACTIVE.into();
            raw.iterations = 0.into();
            raw.salt = [0; SALT];
        }
        let material = entropy.take(self.material_len()).to_vec();
        Ok(SlotChange { slot, material_offset: place.start, material, header })
    }

    fn is_active(&self, slot: usize) -> bool {
        self.active_slots().any(|active| active == slot)
    }

    /// The header and key material with `key` in `slot`.
    fn with_key(
        &self,
        key: &VolumeKey,
        secret: &[u8],
        iterations: Iterations,
        slot: usize,
        entropy: &[u8],
    ) -> Result<SlotChange, LuksError> {
        check_secret(secret)?;
        let mut entropy = Entropy::new(entropy, self.add_entropy_len())?;
        let salt: [u8; SALT] = entropy.array();
        let mut material = Zeroizing::new(vec![0; self.material_len()]);
        let random = entropy.take(self.material_len() - key.bytes.len());
        af::split(self.hash(), &key.bytes, random, &mut material);
        self.slot_cipher(secret, &salt, iterations.get())?.encrypt(0, &mut material)?;

        let mut header = self.clone();
        let (Some(raw), Some(place)) = (header.raw.slots.get_mut(slot), self.material(slot)) else {
            return Err(LuksError::NoSuchSlot { slot });
        };
        raw.active = ACTIVE.into();
        raw.iterations = iterations.get().into();
        raw.salt = salt;
        Ok(SlotChange { slot, material_offset: place.start, material: std::mem::take(&mut material), header })
    }
}

/// QEMU takes secrets as text alone, and one that it could not be given would lock its users out. It takes an empty
/// one, but that is more likely an empty file than what was meant.
fn check_secret(secret: &[u8]) -> Result<(), LuksError> {
    let problem = match std::str::from_utf8(secret) {
        Err(_) => "is no UTF-8 text, which QEMU asks for",
        Ok("") => "is empty",
        Ok(text) if text.contains('\0') => "has a NUL byte in it, which QEMU refuses",
        Ok(_) => return Ok(()),
    };
    Err(LuksError::UnusableSecret { problem })
}

/// A length within the area, which is far below 2^32 sectors.
fn sectors(bytes: usize) -> u32 {
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

/// A random UUID as text (RFC 9562, version 4).
fn uuid(mut random: [u8; UUID]) -> String {
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (at, byte) in random.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.extend([byte >> 4, byte & 15].iter().filter_map(|digit| char::from_digit((*digit).into(), 16)));
    }
    text
}

/// Random bytes, each of which is used once.
struct Entropy<'a>(&'a [u8]);

impl<'a> Entropy<'a> {
    fn new(bytes: &'a [u8], needed: usize) -> Result<Self, LuksError> {
        if bytes.len() < needed {
            return Err(LuksError::Entropy { needed, given: bytes.len() });
        }
        Ok(Self(bytes))
    }

    /// The next `len` bytes, which [`Entropy::new`] has found to be there.
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N));
        bytes
    }

    fn rest(self) -> &'a [u8] {
        self.0
    }
}

#[cfg(test)]
#[path = "change_test.rs"]
mod tests;
