use super::*;

fn size(word: &str) -> Result<u64, SizeError> {
    parse_size(word, 1)
}

#[test]
fn sizes_are_hexadecimal_or_decimal_with_a_fraction_and_a_suffix() {
    for (word, bytes) in [
        ("0", 0),
        ("0x10", 16),
        ("010", 10),
        ("+1", 1),
        (" 3M", 3 << 20),
        ("1b", 1),
        ("1k", 1024),
        ("1.5K", 1536),
        (".5k", 512),
        ("5.k", 5120),
        ("1.", 1),
        ("0.1k", 102),
        ("0.4999999999k", 512),
        ("1.0", 1),
        ("1024.0b", 1024),
        ("1.99999999999999999999k", 2048),
        ("1.25M", 5 << 18),
        ("7P", 7 << 50),
        ("7E", 7 << 60),
        ("0x7fffffffffffffff", i64::MAX as u64),
    ] {
        assert_eq!(size(word), Ok(bytes), "{word}");
    }
}

#[test]
fn a_number_alone_counts_in_units() {
    assert_eq!(["3", "0x3", "1.5", "3b", "1k"].map(|word| parse_size(word, 512)), [1536, 1536, 768, 3, 1024].map(Ok));
}

#[test]
fn what_is_no_size_is_told_from_what_is_too_large() {
    for word in [
        "", "x", "-x", ".", "k", ".k", "1.5", "1.5b", "1.5.5k", "++5", "0x", "0x10k", "0x1.5", "1e3", "1kB", "1 k",
        "1_0", "inf", "0b1", "-1k", "-0x10", "-1.0", "-", "1,", "0x+1",
    ] {
        assert_eq!(size(word), Err(SizeError::Malformed), "{word}");
    }
    for word in ["-1", "-0", "8E", "8192P", "9223372036854775808", "0x8000000000000000", "99999999999999999999"] {
        assert_eq!(size(word), Err(SizeError::TooLarge), "{word}");
    }
}
