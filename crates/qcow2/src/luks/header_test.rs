//! The header of QEMU's sample, and headers that differ from it in one field.

use proptest::prelude::*;

use super::*;
use crate::cipher::{Aes, Iv, Mode};
use crate::luks::{CreateParams, Iterations};
use crate::samples_test::Sample;

/// QEMU's header, and where it lies.
fn sample() -> (Vec<u8>, LuksExtension) {
    let sample = Sample::load("luks");
    let area = sample.header().luks_extension().unwrap().unwrap();
    (sample.bytes(area.offset, Header::LEN as u64), area)
}

/// What parsing says of the sample, changed by `change`.
fn changed(change: impl FnOnce(&mut [u8])) -> Result<Header, FormatError> {
    let (mut bytes, area) = sample();
    change(&mut bytes);
    Header::parse(&bytes, area)
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put_name(bytes: &mut [u8], at: usize, name: &[u8]) {
    bytes[at..at + 32].fill(0);
    bytes[at..at + name.len()].copy_from_slice(name);
}

/// Where a slot's field stands.
fn slot(number: usize, at: usize) -> usize {
    208 + number * 48 + at
}

#[test]
fn qemus_header_parses_and_is_written_back_byte_for_byte() {
    let (bytes, area) = sample();
    let header = Header::parse(&bytes, area).unwrap();
    assert_eq!(header.cipher(), CipherSpec { aes: Aes::Aes256, mode: Mode::Xts, iv: Iv::Plain64 });
    assert_eq!(header.hash(), Hash::Sha256);
    assert_eq!(header.uuid().len(), 36);
    assert_eq!(header.active_slots().collect::<Vec<_>>(), [0]);
    assert_eq!(header.payload_offset(), area.len);
    let slots = header.slots();
    assert_eq!(slots.map(|slot| slot.key_offset), std::array::from_fn(|number| 4096 + 258_048 * number as u64));
    assert_eq!(slots.map(|slot| slot.stripes), [4000; 8]);
    assert!(slots[0].active && slots[0].iterations >= 1000);
    assert_eq!(header.unlock_len(), 4096 + 256_000);
    assert_eq!(header.encode(), bytes);
}

#[test]
fn new_headers_lie_out_as_qemus_do() {
    let cipher = CipherSpec { aes: Aes::Aes256, mode: Mode::Xts, iv: Iv::Plain64 };
    let (iterations, digest_iterations) = (Iterations::MIN, Iterations::MIN);
    let params = CreateParams { cipher, hash: Hash::Sha256, iterations, digest_iterations };
    let ours = params.create(b"secret", &vec![7; params.entropy_len()]).unwrap().header;
    let (bytes, area) = sample();
    let theirs = Header::parse(&bytes, area).unwrap();
    assert_eq!(params.area_len() as u64, area.len);
    // All but what is random or counted.
    let blank = |header: &Header| {
        let mut raw = header.raw;
        (raw.mk_digest, raw.mk_digest_salt, raw.mk_digest_iter) = ([0; DIGEST], [0; SALT], 0.into());
        raw.uuid = [0; 40];
        raw.slots[0].salt = [0; SALT];
        raw.slots[0].iterations = 0.into();
        raw
    };
    assert_eq!(blank(&ours), blank(&theirs));
}

#[test]
fn names_are_read_as_cryptsetup_and_qemu_write_them() {
    let spec = |mode: &[u8], key_bytes| {
        changed(|bytes| {
            put_name(bytes, 40, mode);
            put(bytes, 108, key_bytes);
        })
        .map(|header| (header.cipher().aes, header.cipher().mode, header.cipher().iv))
    };
    assert_eq!(spec(b"xts-plain64", 64).unwrap(), (Aes::Aes256, Mode::Xts, Iv::Plain64));
    assert_eq!(spec(b"xts-plain64:sha256", 32).unwrap(), (Aes::Aes128, Mode::Xts, Iv::Plain64));
    assert_eq!(spec(b"xts-essiv:sha256", 48).unwrap(), (Aes::Aes192, Mode::Xts, Iv::EssivSha256));
    assert_eq!(spec(b"cbc-plain", 16).unwrap(), (Aes::Aes128, Mode::Cbc, Iv::Plain));
    assert_eq!(spec(b"cbc-essiv:sha256", 32).unwrap(), (Aes::Aes256, Mode::Cbc, Iv::EssivSha256));
    for mode in
        [&b"ecb-plain64"[..], b"xts", b"xts-", b"xts-essiv", b"xts-essiv:sha1", b"XTS-plain64", b"\xff-plain64", b""]
    {
        let Err(FormatError::UnknownName { field, .. }) = spec(mode, 64) else { panic!("{mode:?}") };
        assert_eq!(field.name(), "LUKS cipher mode", "{mode:?}");
    }
    for (mode, key_bytes) in
        [(&b"xts-plain64"[..], 16), (b"xts-plain64", 63), (b"cbc-plain64", 24), (b"cbc-plain64", u32::MAX)]
    {
        let Err(FormatError::UnknownValue { field, .. }) = spec(mode, key_bytes) else { panic!("{mode:?}") };
        assert_eq!(field.name(), "LUKS key length", "{mode:?}");
    }
}

#[test]
fn what_is_not_known_is_named() {
    let error = changed(|bytes| put_name(bytes, 8, b"serpent\n")).unwrap_err();
    assert_eq!(error.to_string(), "LUKS cipher name \"serpent\\n\" is not supported (known: aes)");
    assert_eq!(error.offset(), Some(0x40000 + 8));
    let error = changed(|bytes| put_name(bytes, 72, b"md5")).unwrap_err();
    let known = "sha1, sha224, sha256, sha384, sha512, ripemd160";
    assert_eq!(error.to_string(), format!("LUKS hash \"md5\" is not supported (known: {known})"));
    let error = changed(|bytes| bytes[72..104].fill(b'a')).unwrap_err();
    assert!(error.to_string().contains("(no text)"), "a name without its NUL: {error}");
    let error = changed(|bytes| bytes[7] = 2).unwrap_err();
    assert_eq!(error.to_string(), "LUKS version 2 is not supported (known: 1)");
    let error = changed(|bytes| bytes[0] = b'l').unwrap_err();
    assert_eq!(error.to_string(), "LUKS header: it does not begin with \"LUKS\\xba\\xbe\"");
}

#[test]
fn every_name_that_is_written_is_read() {
    let (bytes, area) = sample();
    for name in ["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"] {
        let mut bytes = bytes.clone();
        put_name(&mut bytes, 72, name.as_bytes());
        assert_eq!(Header::parse(&bytes, area).unwrap().hash().name(), name);
    }
}

#[test]
fn iterations_are_bounded_before_any_is_done() {
    for iterations in [0, LUKS_ITERATIONS_MAX + 1, u32::MAX] {
        for (at, name) in [(164, "LUKS master key digest iterations"), (slot(0, 4), "LUKS key slot 0's iterations")] {
            let Err(FormatError::OutOfRange { field, value, .. }) = changed(|bytes| put(bytes, at, iterations)) else {
                panic!("{name} {iterations}")
            };
            assert_eq!((field.name(), value), (name, iterations.into()));
            assert_eq!(field, Field::at(name, 0x40000 + at as u64));
        }
    }
    assert!(changed(|bytes| put(bytes, slot(0, 4), LUKS_ITERATIONS_MAX)).is_ok());
    assert!(changed(|bytes| put(bytes, slot(1, 4), u32::MAX)).is_ok(), "a slot that is not active has no say");
}

#[test]
fn slots_outside_of_their_bounds_are_refused() {
    let refused = |at, value, name: &str| {
        let error = changed(|bytes| put(bytes, at, value)).unwrap_err();
        assert_eq!(error.offset(), Some(0x40000 + at as u64), "{error}");
        assert!(error.to_string().starts_with(name), "{error}");
    };
    refused(slot(3, 0), 0x00ac_71f2, "LUKS key slot 3's state");
    refused(slot(7, 44), 3999, "LUKS key slot 7's number of stripes");
    refused(slot(2, 44), u32::MAX, "LUKS key slot 2's number of stripes");
    for offset in [0, 1, 4040 - 499, u32::MAX] {
        refused(slot(7, 40), offset, "LUKS key slot 7's key material offset");
    }
    // In the middle of another slot's, exactly in its place, in its last sector.
    for offset in [8 + 504 + 100, 8 + 504, 8 + 504 + 499] {
        refused(slot(7, 40), offset, "LUKS key slot 7's key material offset: it lies inside another");
    }
}

#[test]
fn slots_in_any_order_may_touch_but_not_overlap() {
    // The first two slots change places; the material is 500 sectors long.
    let swapped = |second| {
        changed(|bytes| {
            put(bytes, slot(0, 40), 512);
            put(bytes, slot(1, 40), second);
        })
    };
    assert!(swapped(12).is_ok());
    assert_eq!(swapped(13).unwrap_err().offset(), Some(0x40000 + slot(1, 40) as u64));
}

#[test]
fn key_material_ends_before_the_area_and_the_payload_do() {
    let (bytes, area) = sample();
    let last = Header::parse(&bytes, area).unwrap().material(7).unwrap().end;
    assert!(Header::parse(&bytes, LuksExtension { len: last, ..area }).is_ok());
    assert!(Header::parse(&bytes, LuksExtension { len: last - 1, ..area }).is_err());
    assert!(changed(|bytes| put(bytes, 104, (last / 512) as u32)).is_ok());
    assert!(changed(|bytes| put(bytes, 104, (last / 512 - 1) as u32)).is_err());
    assert!(changed(|bytes| put(bytes, 104, 0)).is_err());
    for len in [0, 6, 591] {
        assert!(matches!(Header::parse(&bytes[..len], area), Err(FormatError::TooShort { .. })), "{len}");
    }
}

proptest! {
    #[test]
    fn no_bytes_panic_and_what_is_accepted_is_written_back(
        changes in prop::collection::vec((0_usize..592, any::<u8>()), 0..6),
        offset in 0_u64..u64::MAX,
        len in any::<u64>(),
    ) {
        let (mut bytes, _) = sample();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let area = LuksExtension { offset: crate::HostOffset::new(offset), len };
        if let Ok(header) = Header::parse(&bytes, area) {
            prop_assert_eq!(header.encode(), bytes);
            prop_assert!(header.unlock_len() <= len);
            prop_assert!(header.slots().len() == 8 && header.uuid().len() <= 40);
        }
    }
}
