use super::*;

#[test]
fn sizes_are_hexadecimal_or_decimal_with_a_fraction_and_a_suffix() {
    let sizes = [
        "0",
        "0x10",
        "010",
        "+1",
        "1b",
        "1k",
        "1.5K",
        ".5k",
        "5.k",
        "0.1k",
        "0.4999999999k",
        "1.0",
        "1.99999999999999999999k",
    ];
    let read: Vec<_> = sizes.into_iter().map(|word| size(word).unwrap()).collect();
    assert_eq!(read, [0, 16, 10, 1, 1, 1024, 1536, 512, 5120, 102, 512, 1, 2048]);
    assert_eq!(size("7P"), Ok(7 << 50));
    assert_eq!(size("0x7fffffffffffffff"), Ok(i64::MAX as u64));
}

#[test]
fn what_is_no_size_is_told_from_what_is_too_large() {
    for word in
        ["", "x", "-x", ".", "k", "1.5", "0x", "0x10k", "0x1.5", "1e3", "1kB", "1_0", "inf", "0b1", "1,", "0x+1"]
    {
        assert_eq!(size(word), Err(NotASize::Syntax), "{word}");
    }
    for word in ["-1", "-0", "8E", "8192P", "9223372036854775808", "0x8000000000000000", "99999999999999999999"] {
        assert_eq!(size(word), Err(NotASize::Range), "{word}");
    }
}

#[test]
fn patterns_are_bytes_in_the_bases_of_c() {
    assert_eq!(["0", "010", "0xff", "255", "+3"].map(pattern), [Some(0), Some(8), Some(255), Some(255), Some(3)]);
    assert_eq!(["256", "-1", "0x", "08", "x", "", "--1", "0x-1"].map(pattern), [None; 8]);
}

#[test]
fn amounts_are_shown_as_qemu_shows_them() {
    let shown = |value: u64| amount(value as f64);
    assert_eq!(shown(0), "0 bytes");
    assert_eq!(shown(512), "512 bytes");
    assert_eq!(shown(1024), "1 KiB");
    assert_eq!(shown(1536), "1.500 KiB");
    assert_eq!(shown(0x2f_0000), "2.938 MiB");
    assert_eq!(shown(8191 << 50), "7.999 EiB");
    assert_eq!(amount(0.106_491), "0.106491 bytes");
    assert_eq!(amount(0.000_1), "0 bytes");
}
