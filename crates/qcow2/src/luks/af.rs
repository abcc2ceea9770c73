//! The anti-forensic splitter: a key is blown up to many stripes of which every single bit is needed to get it back,
//! so that an erased slot cannot be restored if only a part of the old bytes survives somewhere. (LUKS1 specification,
//! section 2.4.)

use zeroize::Zeroizing;

use super::hash::Hash;

/// Splits `key` into stripes of its own length that fill `out`: all but the last are `random`, which must hold that
/// many bytes.
pub(super) fn split(hash: Hash, key: &[u8], random: &[u8], out: &mut [u8]) {
    debug_assert_eq!(random.len() + key.len(), out.len());
    out.iter_mut().zip(random).for_each(|(out, random)| *out = *random);
    let last = out.len().saturating_sub(key.len());
    let (stripes, last) = out.split_at_mut(last);
    let sum = sum(hash, key.len(), stripes);
    for ((out, sum), key) in last.iter_mut().zip(&*sum).zip(key) {
        *out = sum ^ key;
    }
}

/// The key of `len` bytes that `stripes` were split from.
pub(super) fn merge(hash: Hash, len: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let (stripes, last) = stripes.split_at(stripes.len().saturating_sub(len));
    let mut key = sum(hash, len, stripes);
    xor(&mut key, last);
    key
}

/// What all stripes but the last add up to: each is added and the sum then diffused.
fn sum(hash: Hash, len: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut sum = Zeroizing::new(vec![0; len]);
    for stripe in stripes.chunks_exact(len.max(1)) {
        xor(&mut sum, stripe);
        for (number, piece) in (0u32..).zip(sum.chunks_mut(hash.digest_len())) {
            hash.replace(&number.to_be_bytes(), piece);
        }
    }
    sum
}

fn xor(bytes: &mut [u8], others: &[u8]) {
    bytes.iter_mut().zip(others).for_each(|(byte, other)| *byte ^= other);
}

#[cfg(test)]
#[path = "af_test.rs"]
mod tests;
