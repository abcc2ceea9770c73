//! The splitter is undone by the merge, and by nothing less than all of it. That it is LUKS's own, QEMU's images show.

use super::*;

const HASHES: [Hash; 3] = [Hash::Sha1, Hash::Sha256, Hash::Sha512];

fn stripes(hash: Hash, key: &[u8], count: usize) -> Vec<u8> {
    let random: Vec<u8> = (0..key.len() * (count - 1)).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut out = vec![0; key.len() * count];
    split(hash, key, &random, &mut out);
    assert_eq!(out[..random.len()], random);
    out
}

#[test]
fn merging_undoes_splitting_with_any_hash_and_key_length() {
    for hash in HASHES {
        for len in [1, 16, 20, 32, 33, 48, 64] {
            let key: Vec<u8> = (0..len).map(|at| at as u8 ^ 0x5a).collect();
            for count in [1, 2, 3, 100] {
                assert_eq!(*merge(hash, len, &stripes(hash, &key, count)), key, "{hash:?} {len} {count}");
            }
        }
    }
}

#[test]
fn any_bit_that_is_lost_loses_the_key() {
    let key = [0x33; 32];
    for hash in HASHES {
        let split = stripes(hash, &key, 9);
        for bit in (0..split.len() * 8).step_by(61) {
            let mut damaged = split.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(*merge(hash, key.len(), &damaged), key, "{hash:?} {bit}");
        }
    }
}
