//! Refcounts of every width against a naive model, and their sharp edges.

use proptest::prelude::*;

use crate::*;

/// A refcount read bit by bit, as the specification says it: sub-byte widths from the least significant bit, others
/// big-endian.
fn model_get(order: u32, bytes: &[u8], index: usize) -> u64 {
    let width = 1usize << order;
    let mut value = 0;
    for bit in 0..width {
        let at = index * width + bit;
        let (byte, shift) = if width < 8 { (at / 8, at % 8) } else { (at / 8, 7 - at % 8) };
        let set = u64::from(bytes[byte] >> shift & 1);
        value |= if width < 8 { set << bit } else { set << (width - 1 - bit) };
    }
    value
}

#[test]
fn edge_07_refcount_64_bit_max_does_not_overflow() {
    assert_eq!(refcount::max(6), u64::MAX);
    assert_eq!((0..6).map(refcount::max).collect::<Vec<_>>(), [1, 3, 15, 255, 65535, u64::from(u32::MAX)]);
    let mut block = [0; 16];
    refcount::set(6, &mut block, 1, u64::MAX).unwrap();
    assert_eq!(refcount::get(6, &block, 1), Ok(u64::MAX));
    assert_eq!(refcount::get(6, &block, 0), Ok(0));
}

#[test]
fn edge_28_widths_under_8_bits_pack_from_the_least_significant_bit() {
    let mut block = [0u8; 2];
    refcount::set(0, &mut block, 0, 1).unwrap();
    refcount::set(0, &mut block, 9, 1).unwrap();
    assert_eq!(block, [0x01, 0x02]);
    let mut block = [0u8; 2];
    refcount::set(1, &mut block, 1, 3).unwrap();
    refcount::set(1, &mut block, 4, 2).unwrap();
    assert_eq!(block, [0x0c, 0x02]);
    let mut block = [0u8; 2];
    refcount::set(2, &mut block, 0, 0xa).unwrap();
    refcount::set(2, &mut block, 3, 0xb).unwrap();
    assert_eq!(block, [0x0a, 0xb0]);
}

#[test]
fn edge_28_widths_of_8_bits_and_more_are_big_endian() {
    let mut block = [0u8; 8];
    refcount::set(4, &mut block, 1, 0x1234).unwrap();
    refcount::set(5, &mut block, 1, 0x0102_0304).unwrap();
    assert_eq!(block, [0, 0, 0x12, 0x34, 1, 2, 3, 4]);
}

#[test]
fn edge_52_refcount_over_the_width_is_refused_and_changes_nothing() {
    for order in 0..6 {
        let mut block = [0x5a; 8];
        let value = refcount::max(order) + 1;
        let error = refcount::set(order, &mut block, 0, value);
        assert_eq!(error, Err(FormatError::RefcountOverflow { value, bits: 1 << order, max: value - 1 }));
        assert_eq!(block, [0x5a; 8]);
    }
}

#[test]
fn refcount_past_the_block_or_of_a_width_that_is_none_is_an_error() {
    let mut block = [0; 8];
    for order in 0..=6 {
        let entries = 64 >> order;
        assert!(refcount::get(order, &block, entries - 1).is_ok());
        for index in [entries, usize::MAX / 8, usize::MAX] {
            assert!(refcount::get(order, &block, index).is_err(), "{order} {index}");
            assert!(refcount::set(order, &mut block, index, 1).is_err(), "{order} {index}");
        }
    }
    assert!(refcount::get(7, &block, 0).is_err());
    assert!(refcount::set(u32::MAX, &mut block, 0, 0).is_err());
}

#[test]
fn refcount_table_entry_is_checked() {
    let geometry = Geometry {
        cluster_bits: ClusterBits::DEFAULT,
        version: 3,
        extended_l2: false,
        has_data_file: false,
        refcount_order: 4,
    };
    let offset = |raw| RefTableEntry::from_raw(raw).offset(&geometry);
    assert_eq!(offset(0), Ok(None));
    assert_eq!(offset(0x20000), Ok(Some(HostOffset::new(0x20000))));
    for raw in [1, 0x100, 0x20001, 0x20200, 1 << 56, 1 << 63, u64::MAX] {
        assert_eq!(offset(raw).unwrap_err().class(), ErrorClass::Corrupt, "{raw:#x}");
    }
}

proptest! {
    #[test]
    fn get_agrees_with_the_model(order in 0u32..=6, bytes in proptest::collection::vec(any::<u8>(), 64)) {
        for index in 0..512 >> order {
            prop_assert_eq!(refcount::get(order, &bytes, index), Ok(model_get(order, &bytes, index)));
        }
    }

    #[test]
    fn set_changes_one_refcount_and_no_other(
        order in 0u32..=6,
        bytes in proptest::collection::vec(any::<u8>(), 64),
        index in any::<prop::sample::Index>(),
        value in any::<u64>(),
    ) {
        let (entries, value) = (512 >> order, value & refcount::max(order));
        let index = index.index(entries);
        let mut changed = bytes.clone();
        refcount::set(order, &mut changed, index, value).unwrap();
        for i in 0..entries {
            let expected = if i == index { value } else { model_get(order, &bytes, i) };
            prop_assert_eq!(model_get(order, &changed, i), expected);
        }
    }
}

#[test]
fn a_check_sees_through_a_table_entrys_reserved_bits() {
    assert_eq!(RefTableEntry::from_raw(0x50000 | 0x1ff).without_reserved().raw(), 0x50000);
    assert_eq!(RefTableEntry::from_raw(0x50200).without_reserved().raw(), 0x50200);
}
