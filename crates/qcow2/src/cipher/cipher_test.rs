//! The modes against the standard's numbers and against the same modes written as simply as can be. QEMU judges them in
//! the tests of LUKS.

use super::*;
use aes::cipher::BlockCipherEncrypt;

const ALL_AES: [Aes; 3] = [Aes::Aes128, Aes::Aes192, Aes::Aes256];
const ALL_IVS: [Iv; 3] = [Iv::Plain, Iv::Plain64, Iv::EssivSha256];

fn specs() -> impl Iterator<Item = CipherSpec> {
    let modes = [Mode::Xts, Mode::Cbc].into_iter().flat_map(|mode| ALL_AES.map(|aes| (mode, aes)));
    modes.flat_map(|(mode, aes)| ALL_IVS.map(|iv| CipherSpec { aes, mode, iv }))
}

/// Bytes in which no two blocks are the same.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// AES one block after another.
fn block_cipher(key: &[u8]) -> Box<dyn Fn([u8; 16]) -> [u8; 16]> {
    fn with<C: BlockCipherEncrypt<BlockSize = aes::cipher::consts::U16> + 'static>(
        cipher: C,
    ) -> Box<dyn Fn([u8; 16]) -> [u8; 16]> {
        Box::new(move |block| {
            let mut block = block.into();
            cipher.encrypt_block(&mut block);
            block.into()
        })
    }
    match key.len() {
        16 => with(Aes128::new_from_slice(key).unwrap()),
        24 => with(Aes192::new_from_slice(key).unwrap()),
        _ => with(Aes256::new_from_slice(key).unwrap()),
    }
}

fn xored(a: [u8; 16], b: [u8; 16]) -> [u8; 16] {
    std::array::from_fn(|at| a[at] ^ b[at])
}

/// Doubles as IEEE 1619 has it in its annex: byte by byte, with the carry folded into the first.
fn doubled(block: [u8; 16]) -> [u8; 16] {
    let mut out = [0; 16];
    let mut carry = 0;
    for at in 0..16 {
        out[at] = block[at] << 1 | carry;
        carry = block[at] >> 7;
    }
    if carry != 0 {
        out[0] ^= 0x87;
    }
    out
}

fn encrypted_plainly(spec: CipherSpec, key: &[u8], sector: u64, data: &[u8]) -> Vec<u8> {
    let (data_key, tweak_key) = if spec.mode == Mode::Xts { key.split_at(key.len() / 2) } else { (key, &key[..0]) };
    let mut out = Vec::new();
    for (number, sector_data) in data.chunks(SECTOR).enumerate() {
        let number = sector + number as u64;
        let number = if spec.iv == Iv::Plain { number & 0xffff_ffff } else { number };
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&number.to_le_bytes());
        if spec.iv == Iv::EssivSha256 {
            let salt = <sha2::Sha256 as sha2::Digest>::digest(key);
            iv = block_cipher(&salt)(iv);
        }
        let cipher = block_cipher(data_key);
        let mut chain = if spec.mode == Mode::Xts { block_cipher(tweak_key)(iv) } else { iv };
        for block in sector_data.chunks(16) {
            let block: [u8; 16] = block.try_into().unwrap();
            if spec.mode == Mode::Xts {
                out.extend(xored(cipher(xored(block, chain)), chain));
                chain = doubled(chain);
            } else {
                chain = cipher(xored(block, chain));
                out.extend(chain);
            }
        }
    }
    out
}

#[test]
fn xts_is_ieee_1619s() {
    // Vector 4: a sector of 00 to ff twice, number 0.
    let key = hex("2718281828459045235360287471352631415926535897932384626433832795");
    let mut data: Vec<u8> = (0..SECTOR).map(|at| at as u8).collect();
    let spec = CipherSpec { aes: Aes::Aes128, mode: Mode::Xts, iv: Iv::Plain64 };
    let cipher = Cipher::new(spec, &key).unwrap();
    cipher.encrypt(0, &mut data).unwrap();
    assert_eq!(data[..32], hex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"));
}

#[test]
fn every_cipher_is_its_definition_whatever_the_length_and_the_sector() {
    for (spec, sector) in specs().zip([0, 1, 7, 0xffff_fff9, 0x1_0000_0003, 1 << 47].into_iter().cycle()) {
        let key = bytes(1, spec.key_bytes());
        let cipher = Cipher::new(spec, &key).unwrap();
        for count in [0, 1, 2, 7, 8, 9, 16, 23] {
            let plain = bytes(2 + count as u64, count * SECTOR);
            let mut data = plain.clone();
            cipher.encrypt(sector, &mut data).unwrap();
            assert!(data == encrypted_plainly(spec, &key, sector, &plain), "{spec:?} {count} from {sector}");
            cipher.decrypt(sector, &mut data).unwrap();
            assert!(data == plain, "{spec:?} {count} from {sector}");
        }
    }
}

#[test]
fn legacy_aes_pads_and_cuts_its_password_and_only_decrypts() {
    let spec = CipherSpec { aes: Aes::Aes128, mode: Mode::Cbc, iv: Iv::Plain64 };
    for (password, key) in
        [("", [0; 16]), ("abc", *b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0"), ("0123456789abcdefgh", *b"0123456789abcdef")]
    {
        let plain = bytes(3, 3 * SECTOR);
        let mut data = encrypted_plainly(spec, &key, 9, &plain);
        let cipher = Cipher::legacy_aes(password.as_bytes());
        assert_eq!(cipher.encrypt(9, &mut data), Err(CipherError::LegacyIsReadOnly));
        cipher.decrypt(9, &mut data).unwrap();
        assert!(data == plain, "{password}");
    }
}

#[test]
fn partial_sectors_and_wrong_keys_are_refused_and_the_data_is_unchanged() {
    let spec = CipherSpec { aes: Aes::Aes256, mode: Mode::Xts, iv: Iv::Plain64 };
    let cipher = Cipher::new(spec, &[1; 64]).unwrap();
    let mut data = vec![5; 2 * SECTOR + 16];
    let len = data.len();
    assert_eq!(cipher.encrypt(0, &mut data), Err(CipherError::NotSectors { len }));
    assert_eq!(cipher.decrypt(0, &mut data), Err(CipherError::NotSectors { len }));
    assert!(data.iter().all(|byte| *byte == 5));
    for spec in specs() {
        for wrong in [0, 1, spec.key_bytes() - 1, spec.key_bytes() + 1, 128] {
            let error = Cipher::new(spec, &vec![0; wrong]).unwrap_err();
            assert_eq!(error, CipherError::KeyLength { needed: spec.key_bytes(), given: wrong }, "{spec:?}");
        }
    }
}

#[test]
fn numbering_takes_the_offset_that_counts() {
    let (guest, host) = (GuestOffset::new(0x400), HostOffset::new(0x10200));
    assert_eq!(SectorNumbering::Host.sector(guest, host), Some(0x81));
    assert_eq!(SectorNumbering::Guest.sector(guest, host), Some(2));
    assert_eq!(SectorNumbering::Host.sector(guest, HostOffset::new(0x10201)), None);
    assert_eq!(SectorNumbering::Guest.sector(GuestOffset::new(256), host), None);
}

#[test]
fn a_cipher_is_shared_by_threads_and_does_not_show_its_key() {
    fn shared<T: Send + Sync>(_: &T) {}
    let spec = CipherSpec { aes: Aes::Aes128, mode: Mode::Cbc, iv: Iv::EssivSha256 };
    let cipher = Cipher::new(spec, &[0xab; 16]).unwrap();
    shared(&cipher);
    assert_eq!(format!("{cipher:?}"), "Cipher { numbering: Host, .. }");
}

/// `cargo test --release -p cowhand-qcow2 speed -- --ignored --nocapture`
#[test]
#[ignore = "prints how fast the ciphers are, and checks nothing"]
fn speed() {
    const RUN: usize = 64 << 10;
    for spec in specs().filter(|spec| spec.iv != Iv::Plain) {
        let cipher = Cipher::new(spec, &bytes(1, spec.key_bytes())).unwrap();
        let mut data = vec![0; RUN];
        let mut measure = |work: &dyn Fn(&Cipher, &mut [u8])| {
            let (start, mut runs) = (std::time::Instant::now(), 0);
            while start.elapsed().as_millis() < 200 {
                work(&cipher, &mut data);
                runs += 1;
            }
            (runs * RUN) as f64 / start.elapsed().as_secs_f64() / 1e6
        };
        let encrypt = measure(&|cipher, data| cipher.encrypt(12345, data).unwrap());
        let decrypt = measure(&|cipher, data| cipher.decrypt(12345, data).unwrap());
        println!("{:?} {:?} {:?}: encrypt {encrypt:.0} MB/s, decrypt {decrypt:.0} MB/s", spec.aes, spec.mode, spec.iv);
    }
}
