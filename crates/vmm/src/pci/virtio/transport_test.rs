use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::irq::MsiVector;
use crate::pci::msix::Msix;
use crate::pci::testing::{FEATURES, FakeDevice, FakeDoorbells, FakeVector, Seen, memory};
use crate::pci::virtio::interrupt::NO_VECTOR;

struct World {
    transport: Transport,
    seen: Arc<Seen>,
    interrupt: Arc<VirtioInterrupt>,
    doorbells: Arc<Doorbells>,
    registry: Arc<FakeDoorbells>,
}

impl World {
    fn new() -> Self {
        let irqs = (0..3).map(|_| FakeVector::new() as Arc<dyn MsiVector>).collect();
        let interrupt = Arc::new(VirtioInterrupt::new(Arc::new(Msix::new(irqs)), 2));
        let registry = Arc::new(FakeDoorbells::default());
        let doorbells = Arc::new(Doorbells::new(registry.clone(), 2).unwrap());
        let seen = Arc::new(Seen { log: Mutex::default(), ..Seen::default() });
        let device = Box::new(FakeDevice(seen.clone()));
        let transport = Transport::new(device, memory(), interrupt.clone(), doorbells.clone());
        Self { transport, seen, interrupt, doorbells, registry }
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        self.transport.read_common(offset, &mut data);
        data
    }

    fn u16(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    fn u32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.transport.write_common(offset, data);
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    fn set_status(&mut self, status: u8) -> u8 {
        self.write(0x14, &[status]);
        self.status()
    }

    fn accept(&mut self, features: u64) {
        for word in 0..2u32 {
            self.write(0x08, &word.to_le_bytes());
            self.write(0x0c, &((features >> (32 * word)) as u32).to_le_bytes());
        }
    }

    /// Up to FEATURES_OK with all features.
    fn negotiate(&mut self) {
        self.set_status(1);
        self.set_status(3);
        self.accept(FEATURES);
        assert_eq!(self.set_status(11), 11);
        self.seen.log();
    }

    fn set_queue(&mut self, index: u16, size: u16, addresses: [u64; 3]) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &size.to_le_bytes());
        for (n, address) in (0..).zip(addresses) {
            self.write(0x20 + 8 * n, &(address as u32).to_le_bytes());
            self.write(0x24 + 8 * n, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(0x1c, &[1, 0]);
    }
}

#[test]
fn features_are_read_in_words_and_none_beyond() {
    let mut world = World::new();

    assert_eq!(world.u32(4), FEATURES as u32);
    world.write(0, &1u32.to_le_bytes());
    assert_eq!(world.u32(4), 1);
    world.write(0, &2u32.to_le_bytes());
    assert_eq!(world.u32(4), 0);
    world.write(0, &u32::MAX.to_le_bytes());
    assert_eq!((world.u32(0), world.u32(4)), (u32::MAX, 0));
}

#[test]
fn features_ok_sticks_for_a_subset_with_version_1() {
    let mut world = World::new();
    world.set_status(3);
    world.accept((1 << 32) | 1);

    assert_eq!(world.set_status(11), 11);

    assert_eq!(world.seen.log(), ["negotiated 0x100000001"]);
    // No more once agreed.
    world.accept(0);
    world.write(0x08, &[0; 4]);
    assert_eq!(world.u32(0x0c), 1);
}

#[test]
fn features_ok_is_refused_for_what_is_not_offered_or_without_version_1() {
    for features in [(1 << 32) | 2, FEATURES & 0xffff_ffff, 0, u64::MAX] {
        let mut world = World::new();
        world.set_status(3);
        world.accept(features);

        assert_eq!(world.set_status(11), 3, "{features:#x}");
        assert_eq!(world.set_status(15), 3, "{features:#x}");
        assert!(world.seen.log().is_empty());
    }
}

#[test]
fn status_steps_out_of_order_or_of_the_device_are_ignored() {
    let mut world = World::new();
    world.accept(FEATURES);

    assert_eq!(world.set_status(8), 0, "FEATURES_OK before DRIVER");
    assert_eq!(world.set_status(4), 0, "DRIVER_OK before FEATURES_OK");
    assert_eq!(world.set_status(0x40), 0, "NEEDS_RESET is the device's");
    assert_eq!(world.set_status(0xb0), 0x80);
    assert_eq!(world.set_status(3), 0x83, "bits are only added");
}

#[test]
fn driver_ok_activates_the_enabled_queues() {
    let mut world = World::new();
    world.negotiate();
    world.set_queue(1, 16, [0x1000, 0x2000, 0x3000]);

    assert_eq!(world.set_status(15), 15);

    assert_eq!(world.seen.log(), [format!("activate {FEATURES:#x} queues 1")]);
    let queues = world.seen.queues.lock().unwrap();
    let queue = &queues[0].queue;
    assert_eq!((queues[0].index, queue.size(), queue.event_idx_enabled()), (1, 16, true));
    assert_eq!((queue.desc_table(), queue.avail_ring(), queue.used_ring()), (0x1000, 0x2000, 0x3000));
}

#[test]
fn driver_ok_with_queues_that_cannot_be_needs_a_reset() {
    let outside = 1 << 20;
    let bad = [
        [outside, 0x2000, 0x3000],
        [0x1000, outside - 2, 0x3000],
        [0x1000, 0x2000, outside - 4],
        [0x1001, 0x2000, 0x3000],
        [0x1000, 0x2001, 0x3000],
        [0x1000, 0x2000, 0x3002],
        [!15, !1, !3],
    ];
    for addresses in bad {
        let mut world = World::new();
        world.negotiate();
        world.set_queue(0, 16, addresses);

        assert_eq!(world.set_status(15), 0x4f, "{addresses:x?}");
        assert!(world.seen.log().is_empty());
        assert_eq!(world.set_status(0), 0);
    }
}

#[test]
fn driver_ok_refused_by_the_device_needs_a_reset() {
    let mut world = World::new();
    world.seen.refuse.store(true, SeqCst);
    world.negotiate();

    assert_eq!(world.set_status(15), 0x4f);
    world.set_status(0);
    world.seen.refuse.store(false, SeqCst);
    world.negotiate();

    assert_eq!(world.set_status(15), 15);
}

#[test]
fn queue_registers_hold_what_is_valid_until_the_queue_is_enabled() {
    let mut world = World::new();
    assert_eq!((world.u16(0x12), world.u16(0x18), world.u16(0x1e)), (2, 256, 0));

    world.write(0x18, &100u16.to_le_bytes());
    world.write(0x18, &512u16.to_le_bytes());
    world.write(0x18, &[0, 0]);
    assert_eq!(world.u16(0x18), 256);
    world.write(0x20, &0x1_2345_6780u64.to_le_bytes());
    assert_eq!((world.u32(0x20), world.u32(0x24)), (0x2345_6780, 1));
    world.write(0x1c, &[2, 0]);
    assert_eq!(world.u16(0x1c), 0);
    world.write(0x1c, &[1, 0]);
    world.write(0x1c, &[0, 0]);
    world.write(0x20, &[0; 4]);
    world.write(0x18, &[16, 0]);

    assert_eq!((world.u16(0x1c), world.u16(0x18), world.u32(0x20)), (1, 256, 0x2345_6780));
}

#[test]
fn queue_selected_beyond_the_last_reads_zeros_and_takes_nothing() {
    let mut world = World::new();

    for select in [2, u16::MAX] {
        world.set_queue(select, 16, [0x1000, 0x2000, 0x3000]);
        world.write(0x1a, &[0, 0]);
        assert_eq!(world.read::<32>(0x18), [0; 32]);
    }
}

#[test]
fn queue_enabled_after_driver_ok_is_ignored() {
    let mut world = World::new();
    world.negotiate();
    world.set_status(15);

    world.set_queue(0, 16, [0x1000, 0x2000, 0x3000]);

    assert_eq!((world.u16(0x1c), world.u16(0x18)), (0, 256));
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let mut world = World::new();
    assert_eq!((world.u16(0x10), world.u16(0x1a)), (NO_VECTOR, NO_VECTOR));

    world.write(0x10, &[2, 0]);
    world.write(0x1a, &[1, 0]);
    assert_eq!((world.u16(0x10), world.u16(0x1a)), (2, 1));
    world.write(0x10, &[3, 0]);
    world.write(0x1a, &[0, 1]);

    assert_eq!((world.u16(0x10), world.u16(0x1a)), (NO_VECTOR, NO_VECTOR));
}

#[test]
fn writes_of_other_widths_and_places_change_nothing() {
    let mut world = World::new();
    let before = world.read::<64>(0);

    for offset in 0..80 {
        for len in [3, 5, 16] {
            world.write(offset, &vec![0xff; len]);
        }
        if offset != 0x14 {
            world.write(offset, &[0xff]);
        }
    }
    for offset in [0x04, 0x12, 0x15, 0x1c, 0x1e, 0x38, 0x3a, u64::MAX - 1] {
        world.write(offset, &[0xff; 2]);
    }
    for offset in [0x04, 0x14, 0x18, 0x22, 0x38, u64::MAX - 3] {
        world.write(offset, &[0xff; 4]);
    }
    world.write(0x1c, &[0xff; 8]);

    assert_eq!(world.read::<64>(0), before);
    assert_eq!(world.read::<8>(60), [0; 8]);
    assert_eq!(world.read::<8>(u64::MAX), [0; 8]);
}

#[test]
fn reset_stops_the_device_and_forgets_all() {
    let mut world = World::new();
    let before = world.read::<64>(0);
    world.negotiate();
    world.write(0x10, &[1, 0]);
    world.set_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    world.write(0x1a, &[1, 0]);
    world.set_status(15);
    world.doorbells.set_base(Some(0xd000_3000));
    assert_eq!(world.registry.addresses(), [0xd000_3000, 0xd000_3004]);
    world.seen.log();

    assert_eq!(world.set_status(0), 0);

    assert_eq!(world.seen.log(), ["stop"]);
    assert_eq!(world.read::<64>(0), before);
    assert!(world.registry.addresses().is_empty());
}

#[test]
fn needs_reset_shows_until_the_reset_and_config_changes_count() {
    let mut world = World::new();
    world.negotiate();
    world.set_status(15);
    let interrupt = world.seen.interrupt();

    interrupt.signal_config();
    assert_eq!(world.read::<1>(0x15), [1]);
    assert_eq!(world.interrupt.take_isr(), 2);
    interrupt.signal_queue(0);
    assert_eq!((world.interrupt.take_isr(), world.interrupt.take_isr()), (1, 0));
    interrupt.signal_needs_reset();
    assert_eq!(world.status(), 0x4f);
    assert_eq!(world.interrupt.take_isr(), 2);

    assert_eq!(world.set_status(0), 0);
    assert_eq!(world.read::<1>(0x15), [1]);
}

#[test]
fn closed_transport_cannot_be_started_again() {
    let mut world = World::new();

    world.transport.close();
    world.negotiate();

    assert_eq!(world.set_status(15), 11);
}

#[test]
fn doorbell_rings_only_while_active_and_only_its_queue() {
    let mut world = World::new();
    world.doorbells.ring(0);
    world.negotiate();
    world.set_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    world.set_queue(1, 16, [0x5000, 0x6000, 0x7000]);
    world.doorbells.ring(0);
    world.set_status(15);
    let kicks = world.seen.queues.lock().unwrap();
    assert!(kicks[0].kick.read().is_err());

    world.doorbells.ring(1);
    world.doorbells.ring(2);
    world.doorbells.ring(u64::MAX);

    assert!(kicks[0].kick.read().is_err());
    assert_eq!(kicks[1].kick.read().unwrap(), 1);
}
