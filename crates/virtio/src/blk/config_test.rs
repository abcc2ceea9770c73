use std::sync::Arc;

use cowhand_block::Limits;

use super::super::fake::{Backend, FakeDisk};
use super::*;

fn image_of(limits: Limits, len: usize) -> [u8; CONFIG_LEN] {
    image(&Backend(Arc::new(FakeDisk { limits, ..FakeDisk::new(len) })), 4, 256, true)
}

fn u32_at(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
}

#[test]
fn image_fields_stand_where_the_specification_puts_them() {
    let limits =
        Limits { block_size: 512, physical_block_size: 4096, discard_granularity: 65536, max_discard: (1 << 30) + 512 };

    let image = image_of(limits, 64 << 20);

    assert_eq!(image[..8], (64u64 << 11).to_le_bytes());
    assert_eq!(u32_at(&image, 12), 254);
    assert_eq!(image[16..20], [130, 0, 16, 63]);
    assert_eq!(u32_at(&image, 20), 512);
    assert_eq!(image[24..28], [3, 0, 8, 0]);
    assert_eq!(image[32], 1);
    assert_eq!(image[34..36], [4, 0]);
    assert_eq!(u32_at(&image, 36), 1 << 21);
    assert_eq!(u32_at(&image, 40), 32);
    assert_eq!(u32_at(&image, 44), 128);
    assert_eq!(u32_at(&image, 48), 1 << 21);
    assert_eq!(u32_at(&image, 52), 32);
    assert_eq!(image[56], 1);
}

#[test]
fn image_of_a_huge_discard_limit_is_capped_to_whole_granules() {
    let limits =
        Limits { block_size: 4096, physical_block_size: 4096, discard_granularity: 65536, max_discard: u64::MAX };

    let image = image_of(limits, 1 << 20);

    assert_eq!(u32_at(&image, 36), u32::MAX / 128 * 128);
    assert_eq!(u32_at(&image, 20), 4096);
    assert_eq!(image[24], 0);
}

#[test]
fn image_of_limits_that_make_no_sense_is_still_sound() {
    let limits = Limits { block_size: 0, physical_block_size: 0, discard_granularity: 0, max_discard: 0 };

    let image = image_of(limits, 1000);

    assert_eq!(image[..8], 1u64.to_le_bytes());
    assert_eq!(u32_at(&image, 20), 512);
    assert_eq!(u32_at(&image, 44), 1);
}
