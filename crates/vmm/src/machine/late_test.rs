use std::time::Duration;

use vm_memory::GuestMemoryBackend;

use super::*;

const BASE: u64 = 0x10_0000;

/// Late RAM for an initrd that is said to have `len` bytes, on a bus.
fn late(bytes: &[u8], len: u64) -> (Arc<LateRam>, Arc<Bus>) {
    let vm = Arc::new(kvm::create_vm(&kvm::open().unwrap()).unwrap());
    let memory = memory::create(32 << 20).unwrap();
    let file = NamedFile::from_bytes("initrd", bytes).unwrap();
    let bus = Arc::new(Bus::new());
    let late = LateRam::new(&memory, InitrdRange { base: BASE, len }, file, (vm, 7), &bus).unwrap();
    (late, bus)
}

#[test]
fn an_access_waits_for_the_initrd_and_then_sees_memory() {
    let (late, bus) = late(&[1, 2, 3, 4, 5], 5);
    let guest = std::thread::spawn({
        let bus = bus.clone();
        move || {
            let mut data = [0; 2];
            bus.read(BASE + 3, &mut data);
            bus.write(BASE + 5, &[9]);
            data
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!guest.is_finished());
    late.fill().unwrap();
    assert_eq!(guest.join().unwrap(), [4, 5]);
    let mut memory = [0; 6];
    late.memory.read_slice(&mut memory, GuestAddress(BASE)).unwrap();
    assert_eq!(memory, [1, 2, 3, 4, 5, 9]);
}

#[test]
fn only_the_pages_of_the_initrd_are_late() {
    let (late, bus) = late(&[7; 5000], 5000);
    late.fill().unwrap();
    let mut byte = [0];
    bus.read(BASE + 8191, &mut byte);
    assert_eq!(byte, [0]);
    bus.read(BASE + 8192, &mut byte);
    assert_eq!(byte, [0xff]);
    assert!(late.memory.address_in_range(GuestAddress(BASE + 8192)));
}

#[test]
fn an_initrd_that_shrank_is_an_error_and_nobody_waits_for_it() {
    let (late, bus) = late(&[7; 5000], 10_000);
    let error = late.fill().unwrap_err().to_string();
    assert_eq!(error, "initrd: cannot be read: the file ends too early");
    bus.read(BASE, &mut [0]);
}
