use super::*;

#[test]
fn window_allocator_parts_are_aligned_disjoint_and_inside() {
    let mut allocator = WindowAllocator::new(Window { base: 0x1800, len: 0x3000 });

    assert_eq!(allocator.allocate(0x800, 0x1000), Some(Window { base: 0x2000, len: 0x800 }));
    assert_eq!(allocator.allocate(0x1000, 0x1000), Some(Window { base: 0x3000, len: 0x1000 }));
    assert_eq!(allocator.allocate(0x1000, 0x1000), None);
    assert_eq!(allocator.allocate(0x800, 0x800), Some(Window { base: 0x4000, len: 0x800 }));
    assert_eq!(allocator.allocate(1, 1), None);
}

#[test]
fn window_contains_wrapping_range_is_false() {
    let window = Window { base: 0x1000, len: 0x1000 };

    assert!(window.contains(0x1000, 0x1000));
    assert!(!window.contains(0x1001, 0x1000));
    assert!(!window.contains(0xfff, 1));
    assert!(!window.contains(0x1800, 0));
    assert!(!window.contains(u64::MAX, 2));
}

#[test]
fn window_allocator_at_the_end_of_the_address_space_says_no() {
    let mut allocator = WindowAllocator::new(Window { base: u64::MAX - 0xfff, len: 0x1000 });

    assert_eq!(allocator.allocate(0x1000, 0x10_0000), None);
}
