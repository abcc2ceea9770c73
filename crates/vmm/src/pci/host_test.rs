use std::sync::atomic::Ordering::SeqCst;

use cowhand_block::io::sim::Rng as Dice;
use cowhand_virtio::rng::Rng;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::pci::testing::{DEVICE, ECAM, FakeDevice, MEM32, MEM64, PORT, Seen, World, memory};

#[test]
fn host_over_another_device_is_refused_and_leaves_the_buses_as_they_were() {
    let world = World::new();
    let config = |ecam, pio| PciHostConfig {
        windows: Windows { mem32: MEM32, mem64: None },
        ecam: Ecam { base: ecam, buses: 1 },
        mmio: world.mmio.clone(),
        pio,
        msi: world.msi.clone(),
        doorbells: world.doorbells.clone(),
        memory: memory(),
    };

    assert!(PciHost::new(config(ECAM + (255 << 20), Arc::new(Bus::new()))).is_err());
    assert!(PciHost::new(config(ECAM + (256 << 20), world.pio.clone())).is_err());
    let host = PciHost::new(config(ECAM + (256 << 20), Arc::new(Bus::new()))).unwrap();

    assert!(matches!(host.add_port(), Err(PciError::NoPortLeft)), "there is only bus 0");
}

#[test]
fn host_without_a_64_bit_window_puts_bars_below_4_gib() {
    let world = World::new();
    world.host.shutdown();
    let host = PciHost::new(PciHostConfig {
        windows: Windows { mem32: MEM32, mem64: None },
        ecam: Ecam { base: ECAM, buses: 4 },
        mmio: world.mmio.clone(),
        pio: world.pio.clone(),
        msi: world.msi.clone(),
        doorbells: world.doorbells.clone(),
        memory: memory(),
    })
    .unwrap();
    host.add_virtio(Box::new(FakeDevice(Arc::new(Seen::default())))).unwrap();
    world.decode();

    assert_eq!(world.config_u32(PORT, 0x20), 0xc010_c000);
    assert_eq!(world.config_u32(PORT, 0x24), 0xc031_c021);
    assert_eq!(world.config_u32(DEVICE, 0x10), 0xc020_000c);
    let mut queues = [0; 2];
    world.mmio.read(0xc020_0012, &mut queues);
    assert_eq!(queues, [2, 0]);
}

#[test]
fn driver_reads_entropy_over_the_whole_path() {
    let world = World::new();
    world.host.add_virtio(Box::new(Rng::new())).unwrap();
    world.decode();
    let msix = world.capability(DEVICE, 0x11, None);
    world.config_write(DEVICE, msix + 2, &[0, 0x80]);
    world.bar_write(0x4010, &0xfee0_0000u64.to_le_bytes());
    world.bar_write(0x401c, &[0; 4]);
    world.bar_write(0x14, &[3]);
    world.bar_write(0x08, &1u32.to_le_bytes());
    world.bar_write(0x0c, &1u32.to_le_bytes());
    world.bar_write(0x14, &[11]);
    for (register, address) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
        world.bar_write(register, &address.to_le_bytes());
    }
    world.bar_write(0x1a, &[1, 0]);
    world.bar_write(0x1c, &[1, 0]);
    world.bar_write(0x14, &[15]);
    let memory = world.memory.memory();
    // One writable descriptor of 64 bytes at 0x8000, made available.
    memory.write_obj(0x8000u64, GuestAddress(0x1000)).unwrap();
    memory.write_obj(64u32, GuestAddress(0x1008)).unwrap();
    memory.write_obj(2u16, GuestAddress(0x100c)).unwrap();
    memory.store(1u16, GuestAddress(0x2002), SeqCst).unwrap();

    world.bar_write(0x3000, &[0, 0]);

    let vector = world.msi.vector(2);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while vector.taken() == 0 {
        assert!(std::time::Instant::now() < end, "no interrupt came");
        std::thread::yield_now();
    }
    let used: u32 = memory.read_obj(GuestAddress(0x3008)).unwrap();
    let bytes: [u8; 32] = memory.read_obj(GuestAddress(0x8000)).unwrap();
    assert_eq!(used, 64);
    assert_ne!(bytes, [0; 32]);
    world.host.shutdown();
}

#[test]
fn rubbish_from_several_vcpus_does_no_harm() {
    let (world, seen) = (World::new(), Arc::new(Seen::default()));
    for _ in 0..2 {
        world.host.add_virtio(Box::new(FakeDevice(seen.clone()))).unwrap();
    }
    world.host.add_virtio(Box::new(Rng::new())).unwrap();
    let empty = world.host.add_port().unwrap();
    let mut random = Dice::from_environment("SEED", "rubbish_from_several_vcpus");
    let mut activations = 0;
    // How far rubbish gets hangs on how the threads interleave, and it soon moves or closes the windows that it needs: rounds, each from
    // a reset, until it got far enough to mean something.
    for _ in 0..50 {
        world.host.reset();
        world.decode();
        let seeds: Vec<u64> = (0..4).map(|_| random.next_u64()).collect();
        std::thread::scope(|scope| {
            for seed in seeds {
                let world = &world;
                scope.spawn(move || rubbish(world, &mut Dice::new(seed), 20_000));
            }
            for _ in 0..50 {
                let _ = world.host.hot_add(empty, Box::new(Rng::new()));
                world.host.request_removal(empty).unwrap();
                world.host.remove(empty).unwrap();
            }
        });
        activations += seen.log().iter().filter(|entry| entry.starts_with("activate")).count();
        if activations > 10 {
            break;
        }
    }

    assert!(activations > 10, "only {activations} activations: the rubbish does not get far");
    world.host.reset();
    world.decode();
    assert_eq!(world.config_u32(DEVICE, 0), 0x1042_1af4);
    assert_eq!(world.bar::<2>(0x12), [2, 0]);
    assert_eq!(world.bar::<1>(0x14), [0]);
    world.host.shutdown();
    assert!(world.doorbells.addresses().is_empty());
}

/// Reads and writes of any width where something is likely to be.
fn rubbish(world: &World, random: &mut Dice, count: usize) {
    for _ in 0..count {
        let width = [1, 2, 4, 8][random.below(4) as usize];
        let mut data = random.next_u64().to_le_bytes();
        match random.below(8) {
            // Values that mean something get further than noise.
            0 => data = [0; 8],
            1 => data = [0xff; 8],
            2 => data = random.below(16).to_le_bytes(),
            3 => data = (MEM64.base + random.below(4) * 0x8000).to_le_bytes(),
            4 => data = (random.below(0x20) * 0x1000).to_le_bytes(),
            _ => {}
        }
        let config = ECAM
            + [random.below(5) << 20, (random.below(2) << 15) | (random.below(4) << 12)][random.below(2) as usize]
            + random.below(0x110);
        let config = if random.below(3) == 0 { config + (random.below(5) << 20) } else { config };
        let bar = MEM64.base + random.below(3) * 0x20_0000 + random.below(9) * 0x1000 + random.below(0x48);
        let (bus, address) = match random.below(8) {
            0..3 => (&world.mmio, config),
            3..7 => (&world.mmio, bar),
            _ => (&world.pio, 0xcf8 + random.below(9)),
        };
        if random.below(3) == 0 {
            bus.read(address, &mut data[..width]);
        } else {
            bus.write(address, &data[..width]);
        }
        if random.below(64) == 0 {
            // The way to DRIVER_OK, so that what is behind it is reached too.
            let base = MEM64.base + random.below(3) * 0x20_0000;
            for bus in 1..4 {
                world.config_write((bus, 0, 0), 4, &[6, 0]);
                world.config_write((0, 1, bus - 1), 4, &[6, 0]);
            }
            for (offset, value) in [(0x14, 0u32), (0x14, 3), (0x08, 0), (0x0c, 0), (0x08, 1), (0x0c, 1), (0x14, 11)] {
                let width = if offset == 0x14 { 1 } else { 4 };
                world.mmio.write(base + offset, &value.to_le_bytes()[..width]);
            }
            for (offset, address) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
                world.mmio.write(base + offset, &address.to_le_bytes());
            }
            world.mmio.write(base + 0x1c, &[1, 0]);
            world.mmio.write(base + 0x14, &[15]);
            world.mmio.write(base + 0x3000, &[0, 0]);
        }
    }
}
