use super::*;

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
