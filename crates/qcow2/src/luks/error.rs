//! What can go wrong with LUKS besides a header that breaks the format's rules.

use crate::cipher::CipherError;
use crate::error::FormatError;

/// Why an image cannot be unlocked, or its key slots cannot be changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LuksError {
    /// The header breaks a rule of the format, or asks for something that is not supported.
    #[error(transparent)]
    Format(#[from] FormatError),

    /// The cipher does not take the key.
    #[error(transparent)]
    Cipher(#[from] CipherError),

    /// No active key slot holds the volume key for this secret.
    #[error("no key slot opens with this secret")]
    NoSlotOpens,

    /// No slot is active: nothing opens the image any more.
    #[error("the LUKS header has no active key slot: no secret can open the image")]
    NoActiveSlot,

    /// A slot number that does not exist.
    #[error("there is no key slot {slot} (0 to 7)")]
    NoSuchSlot {
        /// The number.
        slot: usize,
    },

    /// A new secret cannot take the place of another.
    #[error("key slot {slot} is in use: erase it first, or take another")]
    SlotInUse {
        /// The slot.
        slot: usize,
    },

    /// There is nothing to erase.
    #[error("key slot {slot} is not in use")]
    SlotNotInUse {
        /// The slot.
        slot: usize,
    },

    /// All eight slots are active.
    #[error("all 8 key slots are in use: erase one first")]
    NoFreeSlot,

    /// Erasing the last key would lose the data for ever.
    #[error("key slot {slot} is the only one in use: without it nothing could open the image")]
    LastSlot {
        /// The slot.
        slot: usize,
    },

    /// A volume key of another image.
    #[error("this volume key is not the one that the LUKS header belongs to")]
    WrongVolumeKey,

    /// A secret that QEMU would not take, or that is none.
    #[error("the secret cannot be used: it {problem}")]
    UnusableSecret {
        /// What is wrong with it.
        problem: &'static str,
    },

    /// A number of iterations that is not to be written.
    #[error("{iterations} PBKDF2 iterations are out of bounds ({min} to {max})")]
    Iterations {
        /// What was asked for.
        iterations: u32,
        /// [`crate::limits::LUKS_ITERATIONS_MIN`].
        min: u32,
        /// [`crate::limits::LUKS_ITERATIONS_MAX`].
        max: u32,
    },

    /// The caller gave too few random bytes.
    #[error("{needed} bytes of entropy are needed, but {given} were given")]
    Entropy {
        /// Bytes needed.
        needed: usize,
        /// Bytes given.
        given: usize,
    },
}
