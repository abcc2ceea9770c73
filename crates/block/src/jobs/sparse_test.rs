use super::*;

fn data(range: Range<usize>) -> Part {
    Part { range, zero: false }
}

fn zero(range: Range<usize>) -> Part {
    Part { range, zero: true }
}

#[test]
fn one_byte_anywhere_is_no_zero() {
    for len in [1, 15, 16, 17, 255, 272, 273, 4096, 5000] {
        let mut bytes = vec![0u8; len];
        assert!(is_zero(&bytes));
        for at in [0, len / 2, len - 1] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at} of {len}");
            bytes[at] = 0;
        }
    }
}

#[test]
fn zeros_are_told_apart_in_blocks_of_the_disk() {
    let mut bytes = vec![0u8; 5 * 4096];
    bytes[4096 + 100] = 1;
    assert_eq!(parts(&bytes, 0, 4096, 4096), [zero(0..4096), data(4096..8192), zero(8192..5 * 4096)]);
    // The same bytes 512 further on: the data lies in another block.
    let shifted = parts(&bytes, 512, 4096, 4096);
    assert_eq!(shifted, [zero(0..3584), data(3584..3584 + 4096), zero(3584 + 4096..5 * 4096)]);
}

#[test]
fn short_zeros_between_data_are_data() {
    let mut bytes = vec![0u8; 16 * 512];
    bytes[2 * 512] = 1;
    bytes[5 * 512] = 1;
    bytes[12 * 512] = 1;
    let found = parts(&bytes, 0, 512, 4 * 512);
    assert_eq!(
        found,
        [
            zero(0..1024),
            data(1024..6 * 512),
            zero(6 * 512..12 * 512),
            data(12 * 512..13 * 512),
            zero(13 * 512..16 * 512)
        ]
    );
}

#[test]
fn what_is_zero_as_a_whole_is_a_hole_however_short() {
    assert_eq!(parts(&[0; 512], 0, 4096, 4096), [zero(0..512)]);
    assert_eq!(parts(&[], 0, 4096, 4096), []);
}
