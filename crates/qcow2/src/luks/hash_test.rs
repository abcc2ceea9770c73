//! PBKDF2 against published numbers, and how many iterations fit into a time.

use super::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn pbkdf2_gives_the_published_results() {
    // RFC 6070 and RFC 7914; the others with Python's hashlib.
    let cases = [
        (Hash::Sha1, 4096, "4b007901b765489abead49d926f721d065a429c1"),
        (Hash::Sha256, 4096, "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a"),
        (Hash::Sha224, 1000, "d3bcf320fd918908eafcaa460faf40e201f6508d4e6f3d9c"),
        (Hash::Sha384, 1000, "3bd37e2236941d4a77b1b5b714c6f913fabb6b0841a6d7d8"),
        (Hash::Sha512, 1000, "afe6c5530785b6cc6b1c6453384731bd5ee432ee549fd42f"),
    ];
    for (hash, iterations, expected) in cases {
        let mut out = vec![0; expected.len() / 2];
        hash.pbkdf2(b"password", b"salt", iterations, &mut out);
        assert_eq!(hex(&out), expected, "{hash:?}");
    }
}

#[test]
fn replace_gives_the_beginning_of_the_digest() {
    // The digests of "abc".
    let cases = [
        (Hash::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
        (Hash::Sha224, "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
        (Hash::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            Hash::Sha384,
            "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7",
        ),
        (
            Hash::Sha512,
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
             2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        ),
        (Hash::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
    ];
    for (hash, digest) in cases {
        assert_eq!(digest.len(), 2 * hash.digest_len(), "{hash:?}");
        let mut data = *b"c";
        hash.replace(b"ab", &mut data);
        assert_eq!(hex(&data), digest[..2], "{hash:?}");
    }
}

#[test]
fn iterations_are_bounded() {
    assert_eq!(Iterations::new(999), Err(LuksError::Iterations { iterations: 999, min: 1000, max: 1 << 26 }));
    assert_eq!(Iterations::new(1000), Ok(Iterations::MIN));
    assert_eq!(Iterations::new(1 << 26), Ok(Iterations::MAX));
    assert!(Iterations::new((1 << 26) + 1).is_err());
    assert_eq!(Iterations::new(80_000).unwrap().eighth().get(), 10_000);
    assert_eq!(Iterations::MIN.eighth(), Iterations::MIN);
}

#[test]
fn iterations_follow_the_time_and_stay_in_bounds() {
    let probed = Iterations::new(10_000).unwrap();
    let within = |budget, took| Iterations::within(budget, probed, took).get();
    let ms = Duration::from_millis;
    assert_eq!(within(ms(2000), ms(20)), 1_000_000);
    assert_eq!(within(ms(1), ms(20)), 1000);
    assert_eq!(within(Duration::ZERO, ms(20)), 1000);
    assert_eq!(within(Duration::MAX, ms(20)), 1 << 26);
    assert_eq!(within(Duration::MAX, Duration::ZERO), 1 << 26);
}

/// `cargo test --release -p cowhand-qcow2 speed -- --ignored --nocapture`
#[test]
#[ignore = "prints how fast PBKDF2 is, and checks nothing"]
fn speed() {
    let probed = Iterations::new(200_000).unwrap();
    for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
        let start = std::time::Instant::now();
        hash.probe(hash.digest_len(), probed);
        println!(
            "{hash:?}: {} iterations/s",
            Iterations::within(Duration::from_secs(1), probed, start.elapsed()).get()
        );
    }
}
