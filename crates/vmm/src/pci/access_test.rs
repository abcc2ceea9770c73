use crate::pci::testing::{DEVICE, ECAM, World};

fn ports_read<const N: usize>(world: &World, address: u32, port: u64) -> [u8; N] {
    let mut data = [0; N];
    world.pio.write(0xcf8, &address.to_le_bytes());
    world.pio.read(port, &mut data);
    data
}

#[test]
fn ports_and_ecam_show_the_same_registers() {
    let (world, _) = World::with_device();

    assert_eq!(ports_read::<4>(&world, 0x8001_0000, 0xcfc), 0x1042_1af4u32.to_le_bytes());
    assert_eq!(world.config_u32(DEVICE, 0), 0x1042_1af4);
    assert_eq!(ports_read::<2>(&world, 0x8001_0000, 0xcfe), [0x42, 0x10]);
    assert_eq!(ports_read::<1>(&world, 0x8001_0000, 0xcfd), [0x1a]);
    assert_eq!(world.config::<1>(DEVICE, 3), [0x10]);
}

#[test]
fn ports_write_bytes_words_and_double_words() {
    let (world, _) = World::with_device();
    world.pio.write(0xcf8, &0x8001_0004u32.to_le_bytes());

    world.pio.write(0xcfd, &[0x04]);
    assert_eq!(world.config_u16(DEVICE, 4), 0x0406);
    world.pio.write(0xcfc, &[0, 0]);
    assert_eq!(world.config_u16(DEVICE, 4), 0);
    world.pio.write(0xcfc, &[7, 4, 0xff, 0xff]);
    assert_eq!(world.config_u32(DEVICE, 4), 0x0010_0407);
}

#[test]
fn ports_address_reads_back_without_reserved_bits() {
    let world = World::new();
    assert_eq!(ports_read::<4>(&world, u32::MAX, 0xcf8), 0x80ff_fffcu32.to_le_bytes());

    // Only a double word reaches the address register.
    world.pio.write(0xcf8, &[0]);
    world.pio.write(0xcf9, &[0xff]);
    world.pio.write(0xcf8, &[0, 0]);
    let mut data = [0; 4];
    world.pio.read(0xcf8, &mut data);
    assert_eq!(data, 0x80ff_fffcu32.to_le_bytes());
    let mut byte = [0];
    world.pio.read(0xcf9, &mut byte);
    assert_eq!(byte, [0xff]);
}

#[test]
fn ports_disabled_or_accessed_across_the_end_read_ones_and_write_nothing() {
    let (world, _) = World::with_device();

    assert_eq!(ports_read::<4>(&world, 0x0001_0000, 0xcfc), [0xff; 4]);
    world.pio.write(0xcfc, &[0; 4]);
    assert_eq!(ports_read::<2>(&world, 0x8001_0004, 0xcfd), [0xff; 2]);
    assert_eq!(ports_read::<4>(&world, 0x8001_0004, 0xcfe), [0xff; 4]);
    assert_eq!(ports_read::<3>(&world, 0x8001_0004, 0xcfc), [0xff; 3]);
    assert_eq!(ports_read::<8>(&world, 0x8001_0004, 0xcf8), [0xff; 8]);
    assert_eq!(world.config_u16(DEVICE, 4), 6);
}

#[test]
fn ecam_accesses_that_are_no_registers_read_ones_and_write_nothing() {
    let (world, _) = World::with_device();

    assert_eq!(world.config::<8>(DEVICE, 0), [0xff; 8]);
    assert_eq!(world.config::<2>(DEVICE, 1), [0xff; 2]);
    assert_eq!(world.config::<4>(DEVICE, 2), [0xff; 4]);
    assert_eq!(world.config::<3>(DEVICE, 0), [0xff; 3]);
    world.config_write(DEVICE, 3, &[0, 0]);
    world.config_write(DEVICE, 4, &[0; 8]);
    assert_eq!(world.config_u16(DEVICE, 4), 6);
}

#[test]
fn ecam_where_nobody_is_reads_ones() {
    let (world, _) = World::with_device();

    for at in [(0, 0, 1), (0, 1, 1), (0, 2, 0), (0, 31, 7), (1, 0, 1), (1, 1, 0), (2, 0, 0), (255, 31, 7)] {
        assert_eq!(world.config_u32(at, 0), u32::MAX, "{at:?}");
    }
    assert_eq!(world.config_u32((0, 0, 0), 0), 0x0008_1b36);
    let mut data = [0; 4];
    world.mmio.read(ECAM + (256 << 20), &mut data);
    assert_eq!(data, [0xff; 4]);
}
