//! The modes, each over several sectors at once: processors have AES units that work on many blocks side by side, and
//! only what does not depend on its neighbour can keep them busy.

use aes::Block;
use aes::cipher::array::Array;
use aes::cipher::consts::U16;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

use super::{BLOCKS_PER_SECTOR, LANES};

/// Blocks in the largest batch.
const BATCH: usize = LANES * BLOCKS_PER_SECTOR;

/// AES with any key length.
pub(super) trait BlockCipher:
    BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt<BlockSize = U16> + KeyInit + Send + Sync + 'static
{
}

impl<C> BlockCipher for C where
    C: BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt<BlockSize = U16> + KeyInit + Send + Sync + 'static
{
}

/// A mode with its keys. Both functions take one IV for each sector, at most [`LANES`], and spend the IVs.
pub(super) trait SectorMode: Send + Sync {
    fn encrypt(&self, ivs: &mut [Block], blocks: &mut [Block]);
    fn decrypt(&self, ivs: &mut [Block], blocks: &mut [Block]);
}

/// XEX over whole blocks; a sector has no partial one, so nothing is ever stolen.
pub(super) struct Xts<C> {
    pub(super) data: C,
    pub(super) tweak: C,
}

impl<C: BlockCipher> Xts<C> {
    /// The tweak of each block: the encrypted IV times x^j in GF(2^128).
    fn tweaks(&self, ivs: &mut [Block], tweaks: &mut [Block; BATCH]) {
        self.tweak.encrypt_blocks(ivs);
        for (iv, sector) in ivs.iter().zip(tweaks.chunks_exact_mut(BLOCKS_PER_SECTOR)) {
            let mut tweak = u128::from_le_bytes((*iv).into());
            for block in sector {
                *block = tweak.to_le_bytes().into();
                // x^128 = x^7 + x^2 + x + 1.
                tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
            }
        }
    }
}

impl<C: BlockCipher> SectorMode for Xts<C> {
    fn encrypt(&self, ivs: &mut [Block], blocks: &mut [Block]) {
        let mut tweaks = [Array([0; 16]); BATCH];
        self.tweaks(ivs, &mut tweaks);
        xor(blocks, &tweaks);
        self.data.encrypt_blocks(blocks);
        xor(blocks, &tweaks);
    }

    fn decrypt(&self, ivs: &mut [Block], blocks: &mut [Block]) {
        let mut tweaks = [Array([0; 16]); BATCH];
        self.tweaks(ivs, &mut tweaks);
        xor(blocks, &tweaks);
        self.data.decrypt_blocks(blocks);
        xor(blocks, &tweaks);
    }
}

/// Cipher block chaining. A sector can only be encrypted one block after the other, so several are, in step.
pub(super) struct Cbc<C>(pub(super) C);

impl<C: BlockCipher> SectorMode for Cbc<C> {
    fn encrypt(&self, ivs: &mut [Block], blocks: &mut [Block]) {
        // `ivs` holds what the next block of each sector is chained to.
        for at in 0..BLOCKS_PER_SECTOR {
            for (chain, block) in ivs.iter_mut().zip(blocks.iter().skip(at).step_by(BLOCKS_PER_SECTOR)) {
                xor_block(chain, block);
            }
            self.0.encrypt_blocks(ivs);
            for (chain, block) in ivs.iter().zip(blocks.iter_mut().skip(at).step_by(BLOCKS_PER_SECTOR)) {
                *block = *chain;
            }
        }
    }

    fn decrypt(&self, ivs: &mut [Block], blocks: &mut [Block]) {
        let mut chain = [Array([0; 16]); BATCH];
        let sectors = chain.chunks_exact_mut(BLOCKS_PER_SECTOR).zip(blocks.chunks_exact(BLOCKS_PER_SECTOR));
        for (iv, (chain, sector)) in ivs.iter().zip(sectors) {
            chain[0] = *iv;
            chain[1..].copy_from_slice(&sector[..BLOCKS_PER_SECTOR - 1]);
        }
        self.0.decrypt_blocks(blocks);
        xor(blocks, &chain);
    }
}

fn xor(blocks: &mut [Block], others: &[Block]) {
    for (block, other) in blocks.iter_mut().zip(others) {
        xor_block(block, other);
    }
}

fn xor_block(block: &mut Block, other: &Block) {
    let value = u128::from_ne_bytes((*block).into()) ^ u128::from_ne_bytes((*other).into());
    *block = value.to_ne_bytes().into();
}
