use super::*;

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
