use std::sync::Arc;

use crate::pci::PciError;
use crate::pci::testing::{DEVICE, FakeDevice, MEM32, MEM64, PORT, Seen, World};

const SLOT_CONTROL: u64 = 0x18;
const SLOT_STATUS: u64 = 0x1a;
const LINK_STATUS: u64 = 0x12;
/// Interrupts on attention button, presence and link; the power stays on.
const EVENTS_ON: u16 = 0x1029;
const POWER_OFF: u16 = 0x400;

struct Port {
    world: World,
    express: u64,
}

impl Port {
    /// A port (vector 0) that may hold a device, its MSI and its events switched on.
    fn new(device: Option<Arc<Seen>>) -> Self {
        let world = World::new();
        match device {
            Some(seen) => world.host.add_virtio(Box::new(FakeDevice(seen))).unwrap(),
            None => world.host.add_port().unwrap(),
        };
        world.decode();
        let (express, msi) = (world.capability(PORT, 0x10, None), world.capability(PORT, 0x05, None));
        world.config_write(PORT, msi + 4, &0xfee0_0000u32.to_le_bytes());
        world.config_write(PORT, msi + 12, &0x31u16.to_le_bytes());
        world.config_write(PORT, msi + 2, &[1, 0]);
        let port = Self { world, express };
        port.control(EVENTS_ON);
        port
    }

    fn control(&self, value: u16) {
        self.world.config_write(PORT, self.express + SLOT_CONTROL, &value.to_le_bytes());
    }

    fn status(&self) -> u16 {
        self.world.config_u16(PORT, self.express + SLOT_STATUS)
    }

    fn clear(&self, events: u16) {
        self.world.config_write(PORT, self.express + SLOT_STATUS, &events.to_le_bytes());
    }

    fn link_active(&self) -> bool {
        self.world.config_u16(PORT, self.express + LINK_STATUS) & 0x2000 != 0
    }

    fn interrupts(&self) -> u64 {
        self.world.msi.vector(0).taken()
    }

    fn id(&self) -> crate::pci::PortId {
        crate::pci::PortId::first()
    }
}

fn seen() -> Arc<Seen> {
    Arc::default()
}

#[test]
fn port_at_power_on_has_buses_and_windows_assigned() {
    let (world, _) = World::with_device();

    assert_eq!(world.config_u32(PORT, 0), 0x000c_1b36);
    assert_eq!(world.config::<1>(PORT, 0x0e), [0x81]);
    assert_eq!(world.config_u32(PORT, 0x18), 0x0001_0100);
    assert_eq!(world.config_u32(PORT, 0x20), 0xc010_c000);
    assert_eq!(world.config_u32(PORT, 0x24), 0x0011_0001);
    assert_eq!(world.config_u32(PORT, 0x28), (MEM64.base >> 32) as u32);
    assert_eq!(world.config_u32(PORT, 0x2c), (MEM64.base >> 32) as u32);
    assert_eq!(world.config_u16(PORT, 0x1c), 0, "no I/O window");
    assert_eq!(world.config::<1>(PORT, 0x3d), [0], "no INTx");
}

#[test]
fn ports_fill_functions_and_their_windows_do_not_overlap() {
    let world = World::new();
    for _ in 0..9 {
        world.host.add_port().unwrap();
    }

    assert_eq!(world.config_u32((0, 1, 7), 0x18), 0x0008_0800);
    assert_eq!(world.config_u32((0, 2, 0), 0x18), 0x0009_0900);
    assert_eq!(world.config_u32((0, 1, 1), 0x20), 0xc030_c020);
    assert_eq!(world.config_u32((0, 2, 0), 0x24), 0x0111_0101);
}

#[test]
fn ports_end_where_functions_or_windows_end() {
    let world = World::new();
    let added = (0..300).take_while(|_| world.host.add_port().is_ok()).count();
    // 256 MiB of 32-bit window, 2 MiB for each.
    assert_eq!(added, (MEM32.len / (2 << 20)) as usize);
    assert!(matches!(world.host.add_port(), Err(PciError::NoRoom { .. })));
}

#[test]
fn device_cold_plugged_is_there_without_events() {
    let port = Port::new(Some(seen()));

    assert_eq!(port.status(), 0x40);
    assert!(port.link_active());
    assert_eq!(port.interrupts(), 0);
    assert_eq!(port.world.config_u32(DEVICE, 0), 0x1042_1af4);
}

#[test]
fn hot_add_reports_presence_and_link_once() {
    let port = Port::new(None);
    assert_eq!((port.status(), port.link_active()), (0, false));
    assert_eq!(port.world.config_u32(DEVICE, 0), u32::MAX);

    port.world.host.hot_add(port.id(), Box::new(FakeDevice(seen()))).unwrap();

    assert_eq!((port.status(), port.link_active()), (0x148, true));
    assert_eq!(port.interrupts(), 1);
    assert_eq!(port.world.config_u32(DEVICE, 0), 0x1042_1af4);
    port.clear(0x108);
    assert_eq!(port.status(), 0x40);
    assert_eq!(port.interrupts(), 0);
    let again = port.world.host.hot_add(port.id(), Box::new(FakeDevice(seen())));
    assert!(matches!(again, Err(PciError::Occupied(_))));
}

#[test]
fn hot_add_into_a_slot_without_power_links_up_when_it_is_powered() {
    let port = Port::new(None);
    port.control(EVENTS_ON | POWER_OFF);

    port.world.host.hot_add(port.id(), Box::new(FakeDevice(seen()))).unwrap();
    assert_eq!((port.status(), port.link_active()), (0x49, false));
    assert_eq!(port.world.config_u32(DEVICE, 0), u32::MAX);
    assert_eq!(port.interrupts(), 1);
    port.clear(0x09);
    port.control(EVENTS_ON);

    assert_eq!((port.status(), port.link_active()), (0x140, true));
    assert_eq!(port.interrupts(), 1);
    assert_eq!(port.world.config_u32(DEVICE, 0), 0x1042_1af4);
}

#[test]
fn removal_waits_for_the_guest_to_turn_the_power_off() {
    let seen = seen();
    let port = Port::new(Some(seen.clone()));

    assert!(port.world.host.request_removal(port.id()).unwrap());
    assert_eq!((port.status(), port.interrupts()), (0x41, 1));
    assert!(port.world.host.occupied(port.id()).unwrap());
    assert_eq!(seen.log(), [] as [&str; 0]);
    port.clear(1);
    port.control(EVENTS_ON | POWER_OFF);

    assert!(!port.world.host.occupied(port.id()).unwrap());
    assert_eq!((port.status(), port.link_active()), (0x108, false));
    assert_eq!(seen.log(), ["stop"]);
    assert_eq!(Arc::strong_count(&seen), 1);
    assert!(!port.world.host.request_removal(port.id()).unwrap());
}

#[test]
fn power_cycle_by_the_guest_keeps_the_device_and_resets_it() {
    let seen = seen();
    let port = Port::new(Some(seen.clone()));

    port.control(EVENTS_ON | POWER_OFF);
    assert_eq!((port.status() & 0x40, port.link_active()), (0x40, false));
    assert_eq!(port.world.config_u32(DEVICE, 0), u32::MAX);
    port.control(EVENTS_ON);

    assert_eq!(port.world.config_u32(DEVICE, 0), 0x1042_1af4);
    assert_eq!(port.world.config_u16(DEVICE, 4), 0);
    assert_eq!(seen.log(), ["stop"]);
}

#[test]
fn surprise_removal_drains_the_device_and_tells_the_guest() {
    let seen = seen();
    let port = Port::new(Some(seen.clone()));

    assert!(port.world.host.remove(port.id()).unwrap());

    assert_eq!((port.status(), port.link_active()), (0x108, false));
    assert_eq!(port.interrupts(), 1);
    assert_eq!(seen.log(), ["stop"]);
    assert!(!port.world.host.remove(port.id()).unwrap());
}

#[test]
fn event_that_stands_interrupts_when_interrupts_are_switched_on() {
    let port = Port::new(None);
    port.control(0x1009);

    port.world.host.hot_add(port.id(), Box::new(FakeDevice(seen()))).unwrap();
    assert_eq!(port.interrupts(), 0);
    port.control(EVENTS_ON);

    assert_eq!(port.interrupts(), 1);
}

#[test]
fn link_disabled_hides_the_device() {
    let port = Port::new(Some(seen()));

    port.world.config_write(PORT, port.express + 0x10, &[0x10, 0]);
    assert!(!port.link_active());
    assert_eq!(port.world.config_u32(DEVICE, 0), u32::MAX);
    port.world.config_write(PORT, port.express + 0x10, &[0, 0]);

    assert!(port.link_active());
}

#[test]
fn secondary_bus_reset_resets_the_device() {
    let seen = seen();
    let port = Port::new(Some(seen.clone()));

    port.world.config_write(PORT, 0x3e, &[0x40, 0]);
    port.world.config_write(PORT, 0x3e, &[0x40, 0]);
    port.world.config_write(PORT, 0x3e, &[0, 0]);

    assert_eq!(seen.log(), ["stop"]);
    assert_eq!(port.world.config_u16(DEVICE, 4), 0);
}

#[test]
fn bus_renumbered_moves_the_device() {
    let port = Port::new(Some(seen()));

    port.world.config_write(PORT, 0x18, &[0, 9, 9, 0]);

    assert_eq!(port.world.config_u32(DEVICE, 0), u32::MAX);
    assert_eq!(port.world.config_u32((9, 0, 0), 0), 0x1042_1af4);
    port.world.config_write(PORT, 0x19, &[0]);
    assert_eq!(port.world.config_u32((9, 0, 0), 0), u32::MAX);
}

#[test]
fn windows_closed_or_moved_take_the_bar_off_the_bus() {
    let (world, _) = World::with_device();
    let feature = |world: &World| world.bar::<4>(4);
    assert_ne!(feature(&world), [0xff; 4]);

    world.config_write(PORT, 4, &[4, 0]);
    assert_eq!(feature(&world), [0xff; 4]);
    world.config_write(PORT, 4, &[6, 0]);
    assert_ne!(feature(&world), [0xff; 4]);
    // Prefetchable limit below its base.
    world.config_write(PORT, 0x26, &[0, 0]);
    world.config_write(PORT, 0x24, &[0xf1, 0xff]);
    assert_eq!(feature(&world), [0xff; 4]);
}

#[test]
fn reset_brings_registers_back_and_lets_a_leaving_device_go() {
    let seen = seen();
    let port = Port::new(Some(seen.clone()));
    port.world.config_write(PORT, 0x18, &[7, 8, 9, 0]);
    port.world.host.request_removal(port.id()).unwrap();

    port.world.host.reset();

    assert_eq!(port.world.config_u32(PORT, 0x18), 0x0001_0100);
    assert_eq!((port.status(), port.link_active()), (0, false));
    assert!(!port.world.host.occupied(port.id()).unwrap());
    assert_eq!(Arc::strong_count(&seen), 1);
}
