use std::sync::atomic::Ordering::SeqCst;

use crate::bus::BusDevice;
use crate::irq::MsiMessage;
use crate::pci::PciError;
use crate::pci::testing::{DEVICE, FEATURES, MEM64, World};

struct Nothing;

impl BusDevice for Nothing {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x77);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// Drives the device at 01:00.0 to DRIVER_OK through its BAR, queue 0 enabled.
fn start(world: &World) {
    world.bar_write(0x14, &[3]);
    for word in 0..2u32 {
        world.bar_write(0x08, &word.to_le_bytes());
        world.bar_write(0x0c, &((FEATURES >> (32 * word)) as u32).to_le_bytes());
    }
    world.bar_write(0x14, &[11]);
    world.bar_write(0x20, &0x1000u64.to_le_bytes());
    world.bar_write(0x28, &0x3000u64.to_le_bytes());
    world.bar_write(0x30, &0x4000u64.to_le_bytes());
    world.bar_write(0x1c, &[1, 0]);
    world.bar_write(0x14, &[15]);
    assert_eq!(world.bar::<1>(0x14), [15]);
}

fn move_bar(world: &World, base: u64) {
    world.config_write(DEVICE, 0x10, &(base as u32).to_le_bytes());
    world.config_write(DEVICE, 0x14, &((base >> 32) as u32).to_le_bytes());
}

#[test]
fn capabilities_describe_structures_inside_the_bar() {
    let (world, _) = World::with_device();

    for (kind, offset, len) in [(1, 0, 64), (2, 0x3000, 8), (3, 0x1000, 1), (4, 0x2000, 8), (5, 0, 0)] {
        let at = world.capability(DEVICE, 0x09, Some(kind));
        assert_eq!(world.config::<1>(DEVICE, at + 4), [0], "BAR 0");
        assert_eq!((world.config_u32(DEVICE, at + 8), world.config_u32(DEVICE, at + 12)), (offset, len));
    }
    let notify = world.capability(DEVICE, 0x09, Some(2));
    assert_eq!(world.config::<1>(DEVICE, notify + 2), [20]);
    assert_eq!(world.config_u32(DEVICE, notify + 16), 4);
    let msix = world.capability(DEVICE, 0x11, None);
    assert_eq!(world.config_u16(DEVICE, msix + 2), 2, "three vectors");
    assert_eq!((world.config_u32(DEVICE, msix + 4), world.config_u32(DEVICE, msix + 8)), (0x4000, 0x6000));
    let express = world.capability(DEVICE, 0x10, None);
    assert_eq!(world.config_u16(DEVICE, express + 2), 2, "version 2 endpoint");
    assert_eq!(world.config_u32(DEVICE, 8), 0x0180_0001, "mass storage, revision 1");
    assert_eq!(world.config::<1>(DEVICE, 0x3d), [0]);
}

#[test]
fn bar_is_sized_as_linux_does_and_keeps_its_address() {
    let (world, _) = World::with_device();
    world.config_write(DEVICE, 4, &[0, 0]);
    let (low, high) = (world.config_u32(DEVICE, 0x10), world.config_u32(DEVICE, 0x14));

    world.config_write(DEVICE, 0x10, &[0xff; 4]);
    world.config_write(DEVICE, 0x14, &[0xff; 4]);
    assert_eq!(world.config_u32(DEVICE, 0x10), 0xffff_800c);
    assert_eq!(world.config_u32(DEVICE, 0x14), u32::MAX);
    world.config_write(DEVICE, 0x10, &low.to_le_bytes());
    world.config_write(DEVICE, 0x14, &high.to_le_bytes());
    world.config_write(DEVICE, 4, &[6, 0]);

    assert_eq!(u64::from(low & !15) | (u64::from(high) << 32), MEM64.base);
    assert_eq!(world.bar::<2>(0x12), [2, 0]);
    for other in [0x18, 0x1c, 0x20, 0x24, 0x30] {
        world.config_write(DEVICE, other, &[0xff; 4]);
        assert_eq!(world.config_u32(DEVICE, other), 0);
    }
}

#[test]
fn bar_moved_inside_the_window_answers_there_and_only_there() {
    let (world, _) = World::with_device();
    let mut data = [0; 2];

    move_bar(&world, MEM64.base + 0x10_0000);
    world.mmio.read(MEM64.base + 0x10_0012, &mut data);

    assert_eq!(data, [2, 0]);
    assert_eq!(world.bar::<2>(0x12), [0xff; 2]);
}

#[test]
fn bar_moved_out_of_the_window_answers_nowhere_and_can_come_back() {
    let (world, _) = World::with_device();

    for base in [0, 0x10_0000, MEM64.base + 0x20_0000, MEM64.base - 0x8000, !0x7fff] {
        move_bar(&world, base);
        assert_eq!(world.bar::<2>(0x12), [0xff; 2], "{base:#x}");
        let mut data = [0; 2];
        world.mmio.read(base.wrapping_add(0x12), &mut data);
        assert_eq!(data, [0xff; 2], "{base:#x}");
    }
    move_bar(&world, MEM64.base);
    assert_eq!(world.bar::<2>(0x12), [2, 0]);
}

#[test]
fn bar_over_another_device_leaves_that_one_alone() {
    let (world, _) = World::with_device();
    let other = MEM64.base + 0x10_4000;
    world.mmio.insert(other, 0x1000, std::sync::Arc::new(Nothing)).unwrap();
    let mut data = [0; 2];

    move_bar(&world, MEM64.base + 0x10_0000);
    world.mmio.read(other, &mut data);
    assert_eq!(data, [0x77; 2]);
    world.mmio.read(MEM64.base + 0x10_0012, &mut data);
    assert_eq!(data, [0xff; 2]);
    move_bar(&world, MEM64.base);

    world.mmio.read(other, &mut data);
    assert_eq!(data, [0x77; 2]);
    assert_eq!(world.bar::<2>(0x12), [2, 0]);
}

#[test]
fn doorbells_are_connected_while_active_and_follow_the_bar() {
    let (world, seen) = World::with_device();
    assert!(world.doorbells.addresses().is_empty());

    start(&world);
    assert_eq!(world.doorbells.addresses(), [MEM64.base + 0x3000, MEM64.base + 0x3004]);
    let kick = world.doorbells.connected.lock().unwrap()[0].1.try_clone().unwrap();
    kick.write(1).unwrap();
    assert_eq!(seen.queues.lock().unwrap()[0].kick.read().unwrap(), 1);
    move_bar(&world, MEM64.base + 0x8000);
    assert_eq!(world.doorbells.addresses(), [MEM64.base + 0xb000, MEM64.base + 0xb004]);
    world.config_write(DEVICE, 4, &[4, 0]);
    assert!(world.doorbells.addresses().is_empty());
}

#[test]
fn doorbell_outside_the_kernel_works_all_the_same() {
    let (world, seen) = World::with_device();
    world.doorbells.refuse.store(true, SeqCst);

    start(&world);
    world.bar_write(0x3000, &[0, 0]);
    world.bar_write(0x3000, &[0, 0, 0, 0]);
    world.bar_write(0x3001, &[0]);
    world.bar_write(0x3ffc, &[0, 0]);

    assert_eq!(seen.queues.lock().unwrap()[0].kick.read().unwrap(), 2);
}

#[test]
fn interrupts_go_to_the_vectors_that_the_driver_assigned() {
    let (world, seen) = World::with_device();
    let msix = world.capability(DEVICE, 0x11, None);
    world.config_write(DEVICE, msix + 2, &[0, 0x80]);
    for vector in 0..3u64 {
        world.bar_write(0x4000 + vector * 16, &(0xfee0_0000 + (vector << 12)).to_le_bytes());
        world.bar_write(0x4008 + vector * 16, &(0x40 + vector as u32).to_le_bytes());
        world.bar_write(0x400c + vector * 16, &[0; 4]);
    }
    world.bar_write(0x10, &[0, 0]);
    world.bar_write(0x16, &[1, 0]);
    world.bar_write(0x1a, &[2, 0]);
    world.bar_write(0x16, &[0, 0]);
    start(&world);
    let interrupt = seen.interrupt();
    // Vector 0 of the allocator is the port's.
    let taken = || [1, 2, 3].map(|n| world.msi.vector(n).taken());

    interrupt.signal_config();
    assert_eq!(taken(), [1, 0, 0]);
    interrupt.signal_queue(1);
    assert_eq!(taken(), [0, 0, 1]);
    interrupt.signal_queue(0);
    assert_eq!(taken(), [0, 0, 0], "queue 0 has no vector");
    interrupt.signal_needs_reset();
    assert_eq!(taken(), [1, 0, 0]);

    let expected = MsiMessage { address: 0xfee0_2000, data: 0x42, device_id: 0x100 };
    assert_eq!(world.msi.vector(3).routed(), Some(expected));
    assert_eq!(world.bar::<1>(0x1000), [0], "no ISR status with MSI-X");
}

#[test]
fn interrupts_wait_while_the_function_may_not_send() {
    let (world, seen) = World::with_device();
    let msix = world.capability(DEVICE, 0x11, None);
    world.config_write(DEVICE, msix + 2, &[0, 0x80]);
    world.bar_write(0x400c, &[0; 4]);
    world.bar_write(0x1a, &[0, 0]);
    start(&world);
    world.config_write(DEVICE, 4, &[2, 0]);

    seen.interrupt().signal_queue(0);
    assert_eq!((world.msi.vector(1).taken(), world.bar::<1>(0x6000)), (0, [1]));
    world.config_write(DEVICE, 4, &[6, 0]);

    assert_eq!((world.msi.vector(1).taken(), world.bar::<1>(0x6000)), (1, [0]));
}

#[test]
fn isr_status_without_msix_clears_when_read() {
    let (world, seen) = World::with_device();
    start(&world);

    seen.interrupt().signal_queue(0);
    seen.interrupt().signal_config();

    assert_eq!(world.bar::<4>(0x1000), [3, 0, 0, 0]);
    assert_eq!(world.bar::<1>(0x1000), [0]);
}

#[test]
fn device_configuration_is_read_and_written() {
    let (world, seen) = World::with_device();
    *seen.config.lock().unwrap() = [1, 2, 3, 4, 5, 6, 7, 8];

    assert_eq!(world.bar::<4>(0x2002), [3, 4, 5, 6]);
    assert_eq!(world.bar::<8>(0x2004), [5, 6, 7, 8, 0, 0, 0, 0]);
    world.bar_write(0x2003, &[9]);

    assert_eq!(seen.log(), ["config 3 [9]"]);
}

#[test]
fn pci_access_capability_reaches_the_bar_without_memory_decoding() {
    let (world, seen) = World::with_device();
    world.config_write(DEVICE, 4, &[0, 0]);
    let at = world.capability(DEVICE, 0x09, Some(5));
    let point = |offset: u32, len: u32| {
        world.config_write(DEVICE, at + 8, &offset.to_le_bytes());
        world.config_write(DEVICE, at + 12, &len.to_le_bytes());
    };

    point(0x12, 2);
    assert_eq!(world.config::<2>(DEVICE, at + 16), [2, 0]);
    point(0x14, 1);
    world.config_write(DEVICE, at + 16, &[3, 0, 0, 0]);
    assert_eq!(world.config::<1>(DEVICE, at + 16), [3]);
    point(0x2000, 4);
    world.config_write(DEVICE, at + 16, &[1, 2, 3, 4]);

    assert_eq!(seen.log(), ["config 0 [1, 2, 3, 4]"]);
}

#[test]
fn pci_access_capability_pointing_nowhere_does_nothing() {
    let (world, seen) = World::with_device();
    let at = world.capability(DEVICE, 0x09, Some(5));
    for (bar, offset, len) in
        [(1, 0x2000u32, 4u32), (0, 0x2000, 3), (0, 0x2000, 0), (0, 0x2001, 2), (0, 0x7ffe, 4), (0, u32::MAX, 1)]
    {
        world.config_write(DEVICE, at + 4, &[bar]);
        world.config_write(DEVICE, at + 8, &offset.to_le_bytes());
        world.config_write(DEVICE, at + 12, &len.to_le_bytes());
        world.config_write(DEVICE, at + 16, &[0xab; 4]);
        world.config::<4>(DEVICE, at + 16);
    }
    assert!(seen.log().is_empty());
}

#[test]
fn reset_of_the_host_stops_the_device_and_restores_its_registers() {
    let (world, seen) = World::with_device();
    start(&world);
    move_bar(&world, MEM64.base + 0x8000);
    seen.log();

    world.host.reset();

    assert_eq!(seen.log(), ["stop"]);
    assert!(world.doorbells.addresses().is_empty());
    assert_eq!(world.bar::<2>(0x12), [0xff; 2]);
    world.decode();
    assert_eq!(world.bar::<1>(0x14), [0]);
    start(&world);
}

#[test]
fn shutdown_stops_devices_and_empties_the_buses() {
    let (world, seen) = World::with_device();
    start(&world);
    seen.log();

    world.host.shutdown();

    assert_eq!(seen.log(), ["stop"]);
    assert_eq!(world.bar::<4>(0), [0xff; 4]);
    assert_eq!(world.config_u32((0, 0, 0), 0), u32::MAX);
    assert_eq!(std::sync::Arc::strong_count(&seen), 1);
}

#[test]
fn host_dropped_stops_its_devices() {
    let (world, seen) = World::with_device();
    start(&world);
    seen.log();

    drop(world);

    assert_eq!(seen.log(), ["stop"]);
    assert_eq!(std::sync::Arc::strong_count(&seen), 1);
}

struct ManyQueues(Vec<u16>);

impl cowhand_virtio::VirtioDevice for ManyQueues {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        1 << 32
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.0
    }

    fn activate(&mut self, _: cowhand_virtio::Activation) -> Result<(), cowhand_virtio::ActivateError> {
        Ok(())
    }

    fn stop(&mut self) -> Vec<cowhand_virtio::ActiveQueue> {
        Vec::new()
    }
}

#[test]
fn device_with_too_many_queues_is_refused() {
    let world = World::new();

    world.host.add_virtio(Box::new(ManyQueues(vec![64; 256]))).unwrap();
    let refused = world.host.add_virtio(Box::new(ManyQueues(vec![64; 257])));

    assert!(matches!(refused, Err(PciError::TooManyQueues { queues: 257, max: 256 })));
}
