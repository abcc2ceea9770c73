use super::*;

#[test]
fn sizes_are_read_as_qemu_reads_them() {
    for (text, bytes) in [
        ("0", 0),
        ("1024", 1024),
        ("1k", 1024),
        ("1.5K", 1536),
        ("0x200", 512),
        ("8E", i64::MAX as u64 + 1),
        ("7E", 7 << 60),
        ("512b", 512),
        (" 3M", 3 << 20),
        ("1024.0", 1024),
        ("1024.0b", 1024),
        ("1.", 1),
        (".5k", 512),
        ("+5", 5),
    ] {
        let read = parse_size(text, 1);
        if bytes > i64::MAX as u64 {
            assert_eq!(read, Err(SizeError::TooLarge))
        } else {
            assert_eq!(read, Ok(bytes), "{text}")
        }
    }
    assert_eq!(parse_size("3", 512), Ok(1536));
}

#[test]
fn nonsense_is_no_size() {
    for text in ["", "-1", "k", "1kk", "1.5", ".", ".k", "1.5b", "1.5.5k", "++5", "0x", "0x1k", "1 k", "foo"] {
        assert_eq!(parse_size(text, 1), Err(SizeError::Malformed), "{text}");
    }
    assert_eq!(parse_size("99999999999999999999", 1), Err(SizeError::TooLarge));
}

#[test]
fn sizes_are_shown_as_qemu_shows_them() {
    for (bytes, shown) in [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023, "0.999 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (196_616, "192 KiB"),
        (1_023_999, "1e+03 KiB"),
        (1 << 20, "1 MiB"),
        (1 << 30, "1 GiB"),
        (1_500_000_000, "1.4 GiB"),
        (u64::MAX >> 1, "8 EiB"),
    ] {
        assert_eq!(human(bytes), shown);
    }
}
