//! The LUKS1 partition header. (LUKS1 specification, section 3.)

use std::fmt;
use std::ops::Range;

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::hash::Hash;
use super::names;
use crate::cipher::{CipherSpec, SECTOR};
use crate::error::{Field, FormatError};
use crate::extension::LuksExtension;
use crate::limits::{LUKS_ITERATIONS_MAX, LUKS_SLOTS, LUKS_STRIPES};

/// Bytes of a salt.
pub(super) const SALT: usize = 32;
/// Bytes of the volume key's digest.
pub(super) const DIGEST: usize = 20;

pub(super) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
pub(super) const VERSION: u16 = 1;
pub(super) const ACTIVE: u32 = 0x00ac_71f3;
pub(super) const INACTIVE: u32 = 0x0000_dead;

/// The header as it stands in the file. What is parsed is written back byte for byte but for the slots that change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Raw {
    pub magic: [u8; 6],
    pub version: U16,
    pub cipher_name: [u8; 32],
    pub cipher_mode: [u8; 32],
    pub hash_spec: [u8; 32],
    pub payload_offset: U32,
    pub key_bytes: U32,
    pub mk_digest: [u8; DIGEST],
    pub mk_digest_salt: [u8; SALT],
    pub mk_digest_iter: U32,
    pub uuid: [u8; 40],
    pub slots: [RawSlot; LUKS_SLOTS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawSlot {
    pub active: U32,
    pub iterations: U32,
    pub salt: [u8; SALT],
    pub key_material_offset: U32,
    pub stripes: U32,
}

const _: () = assert!(size_of::<Raw>() == Header::LEN);

/// A key slot as it can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether a secret opens it.
    pub active: bool,
    /// PBKDF2 iterations; 0 in most slots that are not active.
    pub iterations: u32,
    /// Where its key material starts, in bytes from the start of the area.
    pub key_offset: u64,
    /// Stripes that the volume key is split into.
    pub stripes: u32,
}

/// A valid LUKS1 header: every field is known and within its bounds, and the slots' key material lies inside the area,
/// past the header, no two slots' in the same place.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    pub(super) raw: Raw,
    pub(super) cipher: CipherSpec,
    pub(super) hash: Hash,
}

impl Header {
    /// Bytes of the header, without key material.
    pub const LEN: usize = 592;

    /// Parses the header that `bytes` begin with; `area` is where it lies in the file. Nothing is allocated by what the
    /// header says.
    ///
    /// # Errors
    /// No LUKS header or one of another version; a cipher, mode, hash or key length that is not supported; iterations
    /// that are 0 or more than [`LUKS_ITERATIONS_MAX`]; other than 4000 stripes; key material outside of the area or in
    /// the header's or another slot's place.
    pub fn parse(bytes: &[u8], area: LuksExtension) -> Result<Self, FormatError> {
        let at = |name, offset: u64| Field::at(name, area.offset.get().saturating_add(offset));
        let field = at("LUKS header", 0);
        let (raw, _) = Raw::read_from_prefix(bytes).map_err(|_| FormatError::TooShort {
            field,
            needed: Self::LEN as u64,
            available: bytes.len() as u64,
        })?;
        if raw.magic != MAGIC {
            return Err(FormatError::Inconsistent { field, problem: "it does not begin with \"LUKS\\xba\\xbe\"" });
        }
        if raw.version.get() != VERSION {
            let (field, value) = (at("LUKS version", 6), raw.version.get().into());
            return Err(FormatError::UnknownValue { field, value, known: "1" });
        }
        let cipher = names::cipher(
            (&raw.cipher_name, at("LUKS cipher name", 8)),
            (&raw.cipher_mode, at("LUKS cipher mode", 40)),
            (raw.key_bytes.get(), at("LUKS key length", 108)),
        )?;
        let hash = names::hash(&raw.hash_spec, at("LUKS hash", 72))?;
        iterations(at("LUKS master key digest iterations", 164), raw.mk_digest_iter.get())?;
        let header = Self { raw, cipher, hash };
        header.check_slots(area)?;
        Ok(header)
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.raw.as_bytes().to_vec()
    }

    /// The cipher that data and key material are encrypted with.
    #[must_use]
    pub const fn cipher(&self) -> CipherSpec {
        self.cipher
    }

    /// The hash of PBKDF2 and of the anti-forensic splitter.
    #[must_use]
    pub const fn hash(&self) -> Hash {
        self.hash
    }

    /// The volume's UUID as text; empty if it is none.
    #[must_use]
    pub fn uuid(&self) -> &str {
        names::text(&self.raw.uuid).unwrap_or_default()
    }

    /// PBKDF2 iterations of the volume key's digest.
    #[must_use]
    pub const fn digest_iterations(&self) -> u32 {
        self.raw.mk_digest_iter.get()
    }

    /// Where the data of a plain LUKS volume would start, in bytes; in a QCOW2 image the length of the area.
    #[must_use]
    pub fn payload_offset(&self) -> u64 {
        sectors(self.raw.payload_offset)
    }

    /// The eight key slots.
    #[must_use]
    pub fn slots(&self) -> [KeySlot; LUKS_SLOTS] {
        self.raw.slots.map(|slot| KeySlot {
            active: slot.active.get() == ACTIVE,
            iterations: slot.iterations.get(),
            key_offset: sectors(slot.key_material_offset),
            stripes: slot.stripes.get(),
        })
    }

    /// The numbers of the slots that are active.
    pub fn active_slots(&self) -> impl Iterator<Item = usize> {
        let slots = self.raw.slots.into_iter().enumerate();
        slots.filter(|(_, slot)| slot.active.get() == ACTIVE).map(|(number, _)| number)
    }

    /// Bytes of the area that have to be read to unlock: up to the end of the last active slot's key material. At most
    /// the area's length.
    #[must_use]
    pub fn unlock_len(&self) -> u64 {
        let ends = self.active_slots().filter_map(|slot| Some(self.material(slot)?.end));
        ends.max().unwrap_or(0).max(Self::LEN as u64)
    }

    /// Bytes of one slot's key material, at most 256000.
    pub(super) const fn material_len(&self) -> usize {
        material_len(self.cipher)
    }

    /// Where a slot's key material lies, in bytes from the start of the area.
    pub(super) fn material(&self, slot: usize) -> Option<Range<u64>> {
        let start = sectors(self.raw.slots.get(slot)?.key_material_offset);
        Some(start..start.checked_add(self.material_len() as u64)?)
    }

    /// All slots are checked, not just the active ones: any can be used when a key is added, and QEMU refuses the
    /// header otherwise.
    fn check_slots(&self, area: LuksExtension) -> Result<(), FormatError> {
        let end = area.len.min(self.payload_offset());
        for (number, slot) in self.raw.slots.iter().enumerate() {
            match slot.active.get() {
                ACTIVE => iterations(in_slot(&ITERATIONS, number, 4, area), slot.iterations.get())?,
                INACTIVE => {}
                other => {
                    let (field, known) = (in_slot(&STATE, number, 0, area), "0xac71f3 (active), 0xdead (not active)");
                    return Err(FormatError::UnknownValue { field, value: other.into(), known });
                }
            }
            if slot.stripes.get() != LUKS_STRIPES {
                let (field, value) = (in_slot(&STRIPES, number, 44, area), slot.stripes.get().into());
                return Err(FormatError::UnknownValue { field, value, known: "4000" });
            }
            let offset = sectors(slot.key_material_offset);
            let (min, max) = (Self::LEN as u64, end.saturating_sub(self.material_len() as u64));
            if !(min..=max).contains(&offset) {
                return Err(FormatError::OutOfRange {
                    field: in_slot(&OFFSET, number, 40, area),
                    value: offset,
                    min,
                    max,
                });
            }
        }
        for number in 1..LUKS_SLOTS {
            if (0..number).any(|other| self.overlap(number, other)) {
                let problem = "it lies inside another slot's key material";
                return Err(FormatError::Inconsistent { field: in_slot(&OFFSET, number, 40, area), problem });
            }
        }
        Ok(())
    }

    /// Whether two slots' key material lies in the same place.
    fn overlap(&self, one: usize, other: usize) -> bool {
        let places = self.material(one).zip(self.material(other));
        places.is_some_and(|(one, other)| one.start < other.end && other.start < one.end)
    }
}

impl fmt::Debug for Header {
    /// What a person wants to know of it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header")
            .field("cipher", &self.cipher)
            .field("hash", &self.hash)
            .field("uuid", &self.uuid())
            .field("slots", &self.slots())
            .finish_non_exhaustive()
    }
}

/// Bytes that a volume key takes in a slot: a whole number of sectors with every cipher that is supported.
pub(super) const fn material_len(cipher: CipherSpec) -> usize {
    cipher.key_bytes() * LUKS_STRIPES as usize
}

/// The field at byte `at` of a slot, of which `names` has the name in each of them.
fn in_slot(names: &[&'static str; LUKS_SLOTS], number: usize, at: usize, area: LuksExtension) -> Field {
    let first = Header::LEN - LUKS_SLOTS * size_of::<RawSlot>();
    let at = (first + number * size_of::<RawSlot>() + at) as u64;
    Field::at(names.get(number).unwrap_or(&"LUKS key slot"), area.offset.get().saturating_add(at))
}

fn sectors(count: U32) -> u64 {
    u64::from(count.get()) * SECTOR as u64
}

fn iterations(field: Field, value: u32) -> Result<(), FormatError> {
    if (1..=LUKS_ITERATIONS_MAX).contains(&value) {
        return Ok(());
    }
    Err(FormatError::OutOfRange { field, value: value.into(), min: 1, max: LUKS_ITERATIONS_MAX.into() })
}

/// The name of a field in each of the slots.
macro_rules! in_each_slot {
    ($field:literal) => {
        [
            concat!("LUKS key slot 0's ", $field),
            concat!("LUKS key slot 1's ", $field),
            concat!("LUKS key slot 2's ", $field),
            concat!("LUKS key slot 3's ", $field),
            concat!("LUKS key slot 4's ", $field),
            concat!("LUKS key slot 5's ", $field),
            concat!("LUKS key slot 6's ", $field),
            concat!("LUKS key slot 7's ", $field),
        ]
    };
}

const STATE: [&str; LUKS_SLOTS] = in_each_slot!("state");
const ITERATIONS: [&str; LUKS_SLOTS] = in_each_slot!("iterations");
const OFFSET: [&str; LUKS_SLOTS] = in_each_slot!("key material offset");
const STRIPES: [&str; LUKS_SLOTS] = in_each_slot!("number of stripes");

#[cfg(test)]
#[path = "header_test.rs"]
mod tests;
