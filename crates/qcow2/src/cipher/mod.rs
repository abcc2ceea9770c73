//! The cipher over an image's sectors: AES in XTS or CBC mode with an IV for each 512-byte sector.
//!
//! Responsible for: encrypting and decrypting runs of sectors in place, fast, from any number of threads at once, and
//! knowing which offset the sector numbers come from. ([`numbering`](Cipher::numbering); specification, "Header",
//! `crypt_method`.)
//!
//! Not responsible for: where the key comes from ([`crate::luks`], or the password itself for the legacy method), and
//! which bytes of an image are encrypted: only data clusters are, neither metadata nor compressed clusters.
//!
//! No locks: a cipher is immutable once made.

mod iv;
mod modes;

use std::fmt;

use aes::cipher::KeyInit;
use aes::{Aes128, Aes192, Aes256, Block};
use zeroize::Zeroizing;

use crate::offset::{GuestOffset, HostOffset};
use iv::IvGenerator;
use modes::{Cbc, SectorMode, Xts};

/// Bytes that one IV covers, in both encryption methods.
pub const SECTOR: usize = 512;

/// Sectors that are worked on at once: enough to keep the processor's AES units busy, few enough for the first-level
/// cache with what XTS keeps beside them.
const LANES: usize = 8;

const BLOCK: usize = 16;
const BLOCKS_PER_SECTOR: usize = SECTOR / BLOCK;

/// AES by the length of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aes {
    /// 16 bytes.
    Aes128,
    /// 24 bytes.
    Aes192,
    /// 32 bytes.
    Aes256,
}

impl Aes {
    /// Bytes of one key.
    #[must_use]
    pub const fn key_bytes(self) -> usize {
        match self {
            Self::Aes128 => 16,
            Self::Aes192 => 24,
            Self::Aes256 => 32,
        }
    }
}

/// How the blocks of a sector hang together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// XEX with a second key of the same length for the tweak (IEEE 1619).
    Xts,
    /// Cipher block chaining.
    Cbc,
}

/// How a sector's number becomes its IV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iv {
    /// The number's low 32 bits, little-endian: it comes round every 2 TiB.
    Plain,
    /// The number in 64 bits, little-endian.
    Plain64,
    /// The same, encrypted with AES-256 under the SHA-256 of the key.
    EssivSha256,
}

/// A cipher without its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    /// The block cipher.
    pub aes: Aes,
    /// The mode.
    pub mode: Mode,
    /// The IVs.
    pub iv: Iv,
}

impl CipherSpec {
    /// Bytes of key that the cipher takes: two AES keys in XTS mode.
    #[must_use]
    pub const fn key_bytes(self) -> usize {
        match self.mode {
            Mode::Xts => 2 * self.aes.key_bytes(),
            Mode::Cbc => self.aes.key_bytes(),
        }
    }
}

/// Which offset of a sector its number counts from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorNumbering {
    /// The one in the file that holds the data (LUKS): moving a cluster means encrypting it again.
    Host,
    /// The one that the guest sees (legacy AES).
    Guest,
}

impl SectorNumbering {
    /// The number of the sector that lies at `guest` of the disk and at `host` of the file. `None` if the offset
    /// that counts is not a multiple of [`SECTOR`].
    #[must_use]
    pub const fn sector(self, guest: GuestOffset, host: HostOffset) -> Option<u64> {
        let offset = match self {
            Self::Host => host.get(),
            Self::Guest => guest.get(),
        };
        if offset.is_multiple_of(SECTOR as u64) { Some(offset / SECTOR as u64) } else { None }
    }
}

/// Why a cipher cannot be made or used. The data is unchanged then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CipherError {
    /// Only whole sectors have an IV.
    #[error("{len} bytes are to be encrypted or decrypted, which is not a multiple of 512")]
    NotSectors {
        /// Bytes that were given.
        len: usize,
    },

    /// The legacy method is there to be read and converted; nothing new is encrypted with it.
    #[error("images with the legacy AES encryption are read-only: convert the image to LUKS")]
    LegacyIsReadOnly,

    /// A key that does not fit the cipher.
    #[error("the cipher takes a key of {needed} bytes, not {given}")]
    KeyLength {
        /// Bytes that the cipher takes.
        needed: usize,
        /// Bytes that were given.
        given: usize,
    },
}

/// A cipher with its key, to be shared by all threads that read and write an image. The key is wiped from memory when
/// the cipher is dropped.
pub struct Cipher {
    mode: Box<dyn SectorMode>,
    iv: IvGenerator,
    numbering: SectorNumbering,
}

impl Cipher {
    /// The cipher of a LUKS image: sectors are numbered by their offset in the file.
    ///
    /// # Errors
    /// The key's length is not [`CipherSpec::key_bytes`].
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Self, CipherError> {
        let wrong_len = || CipherError::KeyLength { needed: spec.key_bytes(), given: key.len() };
        let mode = match spec.aes {
            Aes::Aes128 => mode::<Aes128>(spec.mode, key),
            Aes::Aes192 => mode::<Aes192>(spec.mode, key),
            Aes::Aes256 => mode::<Aes256>(spec.mode, key),
        };
        let mode = mode.ok_or_else(wrong_len)?;
        Ok(Self { mode, iv: IvGenerator::new(spec.iv, key), numbering: SectorNumbering::Host })
    }

    /// The cipher of the legacy method: AES-128 in CBC mode, whose key is the password itself, its first 16 bytes or
    /// filled up with zeros. It only decrypts. Nothing in the image says whether the password is right: with a wrong
    /// one the data is rubbish.
    #[must_use]
    pub fn legacy_aes(password: &[u8]) -> Self {
        let mut key = Zeroizing::new([0; 16]);
        key.iter_mut().zip(password).for_each(|(key, byte)| *key = *byte);
        let mode = Box::new(Cbc(Aes128::new((&*key).into())));
        Self { mode, iv: IvGenerator::Plain64, numbering: SectorNumbering::Guest }
    }

    /// Which offset the sector numbers come from.
    #[must_use]
    pub const fn numbering(&self) -> SectorNumbering {
        self.numbering
    }

    /// Whether the cipher encrypts; the legacy one does not.
    #[must_use]
    pub fn can_encrypt(&self) -> bool {
        self.numbering == SectorNumbering::Host
    }

    /// Encrypts a run of sectors in place, the first of which has the number `sector`
    /// (see [`SectorNumbering::sector`]).
    ///
    /// # Errors
    /// The length is not a multiple of [`SECTOR`], or the cipher is the legacy one; the data is unchanged.
    pub fn encrypt(&self, sector: u64, data: &mut [u8]) -> Result<(), CipherError> {
        if !self.can_encrypt() {
            return Err(CipherError::LegacyIsReadOnly);
        }
        self.each_batch(sector, data, |ivs, blocks| self.mode.encrypt(ivs, blocks))
    }

    /// Decrypts a run of sectors in place, the first of which has the number `sector`
    /// (see [`SectorNumbering::sector`]).
    ///
    /// # Errors
    /// The length is not a multiple of [`SECTOR`]; the data is unchanged.
    pub fn decrypt(&self, sector: u64, data: &mut [u8]) -> Result<(), CipherError> {
        self.each_batch(sector, data, |ivs, blocks| self.mode.decrypt(ivs, blocks))
    }

    /// Calls `work` with up to [`LANES`] sectors at a time, and an IV for each.
    fn each_batch(
        &self,
        mut sector: u64,
        data: &mut [u8],
        work: impl Fn(&mut [Block], &mut [Block]),
    ) -> Result<(), CipherError> {
        if !data.len().is_multiple_of(SECTOR) {
            return Err(CipherError::NotSectors { len: data.len() });
        }
        let mut ivs = [Block::default(); LANES];
        for batch in data.chunks_mut(LANES * SECTOR) {
            let blocks = Block::slice_as_chunks_mut(batch).0;
            // chunks_mut gives at most LANES sectors.
            let ivs = &mut ivs[..blocks.len() / BLOCKS_PER_SECTOR];
            self.iv.fill(sector, ivs);
            work(ivs, blocks);
            // No file reaches 2^64 sectors; wrapping only keeps a nonsense number from being a panic.
            sector = sector.wrapping_add(ivs.len() as u64);
        }
        Ok(())
    }
}

impl fmt::Debug for Cipher {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cipher").field("numbering", &self.numbering).finish_non_exhaustive()
    }
}

/// The mode with its keys, or `None` if `key` has the wrong length.
fn mode<C: modes::BlockCipher>(mode: Mode, key: &[u8]) -> Option<Box<dyn SectorMode>> {
    match mode {
        Mode::Xts => {
            let (data, tweak) = key.split_at(key.len() / 2);
            let (data, tweak) = (C::new_from_slice(data).ok()?, C::new_from_slice(tweak).ok()?);
            Some(Box::new(Xts { data, tweak }))
        }
        Mode::Cbc => Some(Box::new(Cbc(C::new_from_slice(key).ok()?))),
    }
}

#[cfg(test)]
#[path = "cipher_test.rs"]
mod tests;
