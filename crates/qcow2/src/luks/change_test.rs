//! Volumes that are made here open here; slots come and go.

use super::*;
use crate::cipher::{Aes, Iv, Mode};

const XTS: CipherSpec = CipherSpec { aes: Aes::Aes256, mode: Mode::Xts, iv: Iv::Plain64 };

/// No entropy at all, but bytes that differ.
fn entropy(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect()
}

fn params(cipher: CipherSpec, hash: Hash) -> CreateParams {
    CreateParams { cipher, hash, iterations: Iterations::MIN, digest_iterations: Iterations::MIN }
}

fn create(cipher: CipherSpec, hash: Hash, secret: &[u8]) -> Created {
    let params = params(cipher, hash);
    params.create(secret, &entropy(1, params.entropy_len())).unwrap()
}

/// What the file holds after a change has been written.
fn apply(area: &mut [u8], change: &SlotChange) -> Header {
    let start = change.material_offset as usize;
    area[start..start + change.material.len()].copy_from_slice(&change.material);
    area[..Header::LEN].copy_from_slice(&change.header.encode());
    let at = LuksExtension { offset: HostOffset::new(0x50000), len: area.len() as u64 };
    let header = Header::parse(area, at).unwrap();
    assert_eq!(header, change.header);
    header
}

fn add(header: &Header, key: &VolumeKey, secret: &[u8], slot: Option<usize>) -> Result<SlotChange, LuksError> {
    header.add_key(key, secret, Iterations::MIN, slot, &entropy(2, header.add_entropy_len()))
}

fn erase(header: &Header, slot: usize) -> Result<SlotChange, LuksError> {
    header.erase_key(slot, &entropy(3, header.erase_entropy_len()))
}

#[test]
fn new_volumes_open_with_their_secret_and_no_other() {
    let cbc = CipherSpec { aes: Aes::Aes128, mode: Mode::Cbc, iv: Iv::EssivSha256 };
    let odd = CipherSpec { aes: Aes::Aes192, mode: Mode::Xts, iv: Iv::Plain };
    for (cipher, hash) in [(XTS, Hash::Sha256), (cbc, Hash::Sha1), (odd, Hash::Ripemd160)] {
        let created = create(cipher, hash, b"correct horse");
        assert_eq!(created.area.len(), params(cipher, hash).area_len());
        let at = LuksExtension { offset: HostOffset::new(0x50000), len: created.area.len() as u64 };
        let header = Header::parse(&created.area, at).unwrap();
        assert_eq!(header, created.header);
        let needed = &created.area[..header.unlock_len() as usize];
        let unlocked = header.unlock(needed, b"correct horse").unwrap();
        assert_eq!((unlocked.slot, &unlocked.key), (0, &created.key));
        for wrong in [&b"correct horsf"[..], b"correct hors", b"correct horse\n", b""] {
            assert_eq!(header.unlock(needed, wrong).unwrap_err(), LuksError::NoSlotOpens, "{cipher:?}");
        }
        assert!(header.unlock(&needed[..needed.len() - 1], b"correct horse").is_err());
    }
}

#[test]
fn different_entropy_makes_a_different_volume() {
    let params = params(XTS, Hash::Sha256);
    let [a, b] = [1, 2].map(|seed| params.create(b"s", &entropy(seed, params.entropy_len())).unwrap());
    assert_ne!(a.key, b.key);
    assert_ne!(a.header.uuid(), b.header.uuid());
    assert_ne!(a.area, b.area);
    assert_eq!((a.header.uuid().len(), &a.header.uuid()[14..15]), (36, "4"));
}

#[test]
fn keys_come_and_go() {
    let Created { header, key, mut area } = create(XTS, Hash::Sha256, b"first");
    let header = apply(&mut area, &add(&header, &key, b"second", None).unwrap());
    let header = apply(&mut area, &add(&header, &key, b"third", Some(7)).unwrap());
    for (slot, secret) in [(0, &b"first"[..]), (1, b"second"), (7, b"third")] {
        let unlocked = header.unlock(&area, secret).unwrap();
        assert_eq!((unlocked.slot, &unlocked.key), (slot, &key));
        assert_eq!(header.open_slot(slot, &area, secret).unwrap().as_ref(), Some(&key));
    }
    assert_eq!(header.open_slot(0, &area, b"second"), Ok(None));
    assert_eq!(header.open_slot(2, &area, b"second"), Ok(None));

    let old = area.clone();
    let header = apply(&mut area, &erase(&header, 0).unwrap());
    assert_eq!(header.unlock(&area, b"first").unwrap_err(), LuksError::NoSlotOpens);
    assert_eq!(header.unlock(&area, b"third").unwrap().slot, 7);
    // Not even the old header finds the key in what is left.
    area[..Header::LEN].copy_from_slice(&old[..Header::LEN]);
    let at = LuksExtension { offset: HostOffset::new(0), len: area.len() as u64 };
    let header = Header::parse(&area, at).unwrap();
    assert_eq!(header.unlock(&area, b"first").unwrap_err(), LuksError::NoSlotOpens);
}

#[test]
fn a_change_that_is_half_written_leaves_the_other_slots_open() {
    let Created { header, key, mut area } = create(XTS, Hash::Sha256, b"first");
    let header = apply(&mut area, &add(&header, &key, b"second", None).unwrap());
    for change in [add(&header, &key, b"third", None).unwrap(), erase(&header, 0).unwrap()] {
        let (mut torn, start) = (area.clone(), change.material_offset as usize);
        torn[start..start + 512].copy_from_slice(&change.material[..512]);
        assert_eq!(header.unlock(&torn, b"second").unwrap().slot, 1);
        torn[..512].copy_from_slice(&change.header.encode()[..512]);
        let at = LuksExtension { offset: HostOffset::new(0), len: area.len() as u64 };
        let torn_header = Header::parse(&torn, at).unwrap();
        assert_eq!(torn_header.unlock(&torn, b"second").unwrap().key, key);
    }
}

#[test]
fn slots_that_cannot_be_changed_are_refused() {
    let Created { header, key, mut area } = create(XTS, Hash::Sha1, b"first");
    assert_eq!(add(&header, &key, b"x", Some(0)), Err(LuksError::SlotInUse { slot: 0 }));
    assert_eq!(add(&header, &key, b"x", Some(8)), Err(LuksError::NoSuchSlot { slot: 8 }));
    assert_eq!(erase(&header, 0), Err(LuksError::LastSlot { slot: 0 }));
    assert_eq!(erase(&header, 1), Err(LuksError::SlotNotInUse { slot: 1 }));
    assert_eq!(erase(&header, 8), Err(LuksError::NoSuchSlot { slot: 8 }));
    assert_eq!(header.open_slot(8, &area, b"first"), Err(LuksError::NoSuchSlot { slot: 8 }));
    let other = params(XTS, Hash::Sha1).create(b"s", &entropy(9, 300_000)).unwrap().key;
    assert_eq!(add(&header, &other, b"x", None), Err(LuksError::WrongVolumeKey));

    let mut full = header;
    for number in 1..8 {
        let change = add(&full, &key, format!("secret {number}").as_bytes(), None).unwrap();
        assert_eq!(change.slot, number);
        full = apply(&mut area, &change);
    }
    assert_eq!(add(&full, &key, b"x", None), Err(LuksError::NoFreeSlot));
    assert_eq!(full.unlock(&area, b"secret 7").unwrap().slot, 7);
}

#[test]
fn a_header_without_active_slots_says_so() {
    let Created { header, area, .. } = create(XTS, Hash::Sha256, b"first");
    let mut bytes = area.clone();
    bytes[208..212].copy_from_slice(&INACTIVE.to_be_bytes());
    let at = LuksExtension { offset: HostOffset::new(0), len: area.len() as u64 };
    let dead = Header::parse(&bytes, at).unwrap();
    assert_eq!(dead.unlock(&bytes, b"first").unwrap_err(), LuksError::NoActiveSlot);
    assert_eq!(dead.unlock_len(), Header::LEN as u64);
    assert!(header.unlock(&area, b"first").is_ok());
}

#[test]
fn secrets_that_qemu_would_not_take_are_not_written() {
    let params = params(XTS, Hash::Sha256);
    let entropy = entropy(1, params.entropy_len());
    for secret in [&b""[..], b"\xff\xfe", b"a\0b"] {
        let error = params.create(secret, &entropy).unwrap_err();
        assert!(matches!(error, LuksError::UnusableSecret { .. }), "{secret:?}: {error}");
    }
    assert!(params.create("pässwörd".as_bytes(), &entropy).is_ok());
}

#[test]
fn too_little_entropy_and_impossible_ciphers_are_refused() {
    let params = params(XTS, Hash::Sha256);
    let needed = params.entropy_len();
    let error = params.create(b"s", &entropy(1, needed - 1)).unwrap_err();
    assert_eq!(error, LuksError::Entropy { needed, given: needed - 1 });
    let Created { header, key, .. } = create(XTS, Hash::Sha256, b"first");
    assert!(matches!(header.add_key(&key, b"s", Iterations::MIN, None, &[]), Err(LuksError::Entropy { .. })));
    assert!(matches!(header.erase_key(1, &[]), Err(LuksError::SlotNotInUse { slot: 1 })));
    let cbc_192 = CreateParams { cipher: CipherSpec { aes: Aes::Aes192, mode: Mode::Cbc, iv: Iv::Plain64 }, ..params };
    let error = cbc_192.create(b"s", &entropy(1, cbc_192.entropy_len())).unwrap_err();
    assert_eq!(error.to_string(), "LUKS key length 24 is not supported (known: 16, 32 in CBC mode)");
}

#[test]
fn keys_do_not_show() {
    let created = create(XTS, Hash::Sha256, b"first");
    let shown = format!("{:?}", created.key);
    assert!(shown.starts_with("VolumeKey { cipher: CipherSpec") && shown.ends_with(".. }"), "{shown}");
}
