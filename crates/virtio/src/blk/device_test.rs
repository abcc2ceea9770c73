use std::sync::atomic::Ordering::SeqCst;

use super::super::fake::{Backend, FakeDisk};
use super::*;
use crate::testing::{Driver, Interrupts};

fn device(disk: FakeDisk) -> Block {
    Block::new(Arc::new(Backend(Arc::new(disk))), BlockOptions { queues: 3, ..Default::default() }).unwrap()
}

fn field<const N: usize>(device: &Block, offset: u64) -> [u8; N] {
    let mut data = [0xee; N];
    device.read_config(offset, &mut data);
    data
}

#[test]
fn features_of_a_writable_disk_are_offered() {
    let device = device(FakeDisk::new(1 << 20));

    let expected = [2, 4, 6, 9, 10, 11, 12, 13, 14, 28, 29, 32];
    assert_eq!(device.features(), bits(&expected));
    assert_eq!(device.queue_max_sizes(), [256; 3]);
    assert_eq!(device.device_type(), 2);
}

#[test]
fn features_of_a_read_only_disk_are_without_discard() {
    let device = device(FakeDisk { read_only: true, ..FakeDisk::new(1 << 20) });

    assert_eq!(device.features(), bits(&[2, 4, 5, 6, 9, 10, 11, 12, 28, 29, 32]));
}

#[test]
fn config_past_its_end_reads_zero() {
    let device = device(FakeDisk::new(1 << 20));

    assert_eq!(field::<4>(&device, 58), [0; 4]);
    assert_eq!(field::<8>(&device, 60), [0; 8]);
    assert_eq!(field::<8>(&device, u64::MAX), [0; 8]);
}

#[test]
fn config_writes_without_negotiation_or_of_other_fields_are_ignored() {
    let mut device = device(FakeDisk::new(1 << 20));

    device.write_config(WRITEBACK, &[0]);
    assert_eq!(field::<1>(&device, WRITEBACK), [1]);
    device.negotiated(bits(&[9, 11, 32]));
    device.write_config(0, &[0; 8]);
    device.write_config(WRITEBACK, &[2]);
    device.write_config(WRITEBACK, &[0, 0]);
    device.write_config(WRITEBACK - 1, &[0]);
    assert_eq!(field::<1>(&device, WRITEBACK), [1]);
    device.write_config(WRITEBACK, &[0]);
    assert_eq!(field::<1>(&device, WRITEBACK), [0]);
    assert_eq!(field::<8>(&device, 0), 2048u64.to_le_bytes());
}

#[test]
fn reset_turns_the_write_cache_on_again() {
    let mut device = device(FakeDisk::new(1 << 20));
    device.negotiated(bits(&[11, 32]));
    assert_eq!(field::<1>(&device, WRITEBACK), [0]);

    device.reset();

    assert_eq!(field::<1>(&device, WRITEBACK), [1]);
}

#[test]
fn options_that_cannot_be_are_refused() {
    let backend = Arc::new(Backend(Arc::new(FakeDisk::new(1 << 20))));

    for (queues, queue_size) in [(0, 256), (1, 0), (1, 100), (1, 2), (1, 65535)] {
        let options = BlockOptions { queues, queue_size, ..Default::default() };
        assert!(Block::new(backend.clone(), options).is_err());
    }
}

#[test]
fn activate_twice_or_without_queues_is_refused() {
    let disk = Arc::new(FakeDisk::new(1 << 20));
    let mut device = Block::new(Arc::new(Backend(disk.clone())), BlockOptions::default()).unwrap();
    let driver = Driver::new(16);
    let activation = |queues| Activation {
        memory: driver.memory.clone(),
        features: bits(&[32]),
        queues,
        interrupt: Arc::new(Interrupts::default()),
    };

    assert!(matches!(device.activate(activation(Vec::new())), Err(ActivateError::QueueMissing(0))));
    device.activate(activation(vec![driver.queue(false)])).unwrap();
    assert!(matches!(device.activate(activation(vec![driver.queue(false)])), Err(ActivateError::AlreadyActive)));
    drop(device);

    assert_eq!(disk.dropped.load(SeqCst), 1);
}
