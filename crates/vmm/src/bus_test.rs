use super::*;

struct Echo;

impl BusDevice for Echo {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[test]
fn read_inside_a_device_gives_its_offset() {
    let bus = Bus::new();
    bus.insert(0x1000, 0x10, Arc::new(Echo)).unwrap();
    let mut data = [0u8; 2];
    bus.read(0x1004, &mut data);
    assert_eq!(data, [4, 4]);
}

#[test]
fn read_across_a_device_end_gives_ones() {
    let bus = Bus::new();
    bus.insert(0x1000, 0x10, Arc::new(Echo)).unwrap();
    let mut data = [0u8; 4];
    bus.read(0x100e, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn read_at_the_top_of_the_address_space_gives_ones() {
    let bus = Bus::new();
    bus.insert(u64::MAX - 7, 8, Arc::new(Echo)).unwrap();
    let mut data = [0u8; 8];
    bus.read(u64::MAX, &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn insert_overlapping_returns_error() {
    let bus = Bus::new();
    bus.insert(0x1000, 0x10, Arc::new(Echo)).unwrap();
    for (base, len) in [(0xff8, 0x10), (0x100f, 1), (0x0, 0x10000)] {
        assert_eq!(bus.insert(base, len, Arc::new(Echo)), Err(BusError::Overlap { base, len }));
    }
    assert!(bus.insert(0x1010, 1, Arc::new(Echo)).is_ok());
}

#[test]
fn insert_empty_or_wrapping_returns_error() {
    let bus = Bus::new();
    assert!(matches!(bus.insert(0, 0, Arc::new(Echo)), Err(BusError::BadRange { .. })));
    assert!(matches!(bus.insert(u64::MAX, 2, Arc::new(Echo)), Err(BusError::BadRange { .. })));
}
