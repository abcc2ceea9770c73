use super::*;

fn endpoint() -> ConfigSpace {
    ConfigSpace::endpoint(Identity { vendor: 0x1af4, device: 0x1042, revision: 1, class: 0x01_80_00 }, 0x1af4, 0x1042)
}

#[test]
fn config_header_has_identity_class_and_no_interrupt_pin() {
    let config = endpoint();

    assert_eq!(config.u32(0), 0x1042_1af4);
    assert_eq!(config.u32(8), 0x0180_0001);
    assert_eq!(config.u32(0x2c), 0x1042_1af4);
    assert_eq!(config.u8(0x3d), 0);
}

#[test]
fn config_write_only_writable_bits_change() {
    let mut config = endpoint();

    config.write(0, &[0xff; 64]);

    assert_eq!(config.u32(0), 0x1042_1af4);
    assert_eq!(config.u16(reg::COMMAND), COMMAND_WRITABLE);
    assert_eq!(config.u16(reg::STATUS), 0);
    assert_eq!(config.u8(reg::HEADER_TYPE), 0);
}

#[test]
fn config_write_ones_clear_clearable_bits_and_zeros_keep_them() {
    let mut config = endpoint();
    config.set_u16(0x50, 0x0109);
    config.allow_clear_u16(0x50, 0x0101);

    config.write(0x50, &[0, 0]);
    assert_eq!(config.u16(0x50), 0x0109);
    config.write(0x50, &[0xff, 0]);
    assert_eq!(config.u16(0x50), 0x0108);
    config.write(0x51, &[0xff]);
    assert_eq!(config.u16(0x50), 0x0008);
}

#[test]
fn config_extended_space_reads_zero_and_ignores_writes() {
    let mut config = endpoint();
    let mut data = [0xaa; 4];

    config.write(0xfe, &[1, 2, 3, 4]);
    config.write(0x100, &[1, 2, 3, 4]);
    config.write(0xffff, &[1, 2, 3, 4]);
    config.read(0x100, &mut data);

    assert_eq!(data, [0; 4]);
}

#[test]
fn config_capabilities_are_linked_in_order_and_dword_aligned() {
    let mut config = endpoint();

    let first = config.add_capability(0x11, &[0; 10]).unwrap();
    let second = config.add_capability(0x09, &[16, 1, 0]).unwrap();
    let third = config.add_capability(0x10, &[0; 2]).unwrap();

    assert_eq!([first, second, third], [0x40, 0x4c, 0x54]);
    assert_eq!(config.u8(reg::CAPABILITIES), 0x40);
    assert_eq!(config.u8(first + 1), 0x4c);
    assert_eq!(config.u8(second + 1), 0x54);
    assert_eq!(config.u8(third + 1), 0);
    assert_eq!(config.u16(reg::STATUS) & 0x10, 0x10);
    assert_eq!(config.add_capability(0x09, &[0; 200]), None);
}
