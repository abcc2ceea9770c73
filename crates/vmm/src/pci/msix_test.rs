use super::*;
use crate::pci::testing::FakeVector;

const BDF: Bdf = Bdf::new(3, 0, 0);

fn table(count: usize) -> (Msix, Vec<Arc<FakeVector>>) {
    let vectors: Vec<_> = (0..count).map(|_| FakeVector::new()).collect();
    let irqs = vectors.iter().map(|vector| vector.clone() as Arc<dyn MsiVector>).collect();
    (Msix::new(irqs), vectors)
}

fn program(msix: &Msix, index: u64, address: u64, data: u32) {
    msix.write_table(index * 16, &address.to_le_bytes());
    msix.write_table(index * 16 + 8, &data.to_le_bytes());
}

fn set_mask(msix: &Msix, index: u64, masked: bool) {
    msix.write_table(index * 16 + 12, &u32::from(masked).to_le_bytes());
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.read_pending(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn vector_unmasked_and_enabled_is_routed_and_signalled() {
    let (msix, vectors) = table(2);
    program(&msix, 1, 0x1_fee0_1000, 0x41);
    set_mask(&msix, 1, false);
    assert_eq!(vectors[1].routed(), None);

    msix.set_control(true, false, BDF);
    msix.signal(1);

    let message = MsiMessage { address: 0x1_fee0_1000, data: 0x41, device_id: 0x300 };
    assert_eq!(vectors[1].routed(), Some(message));
    assert_eq!(vectors[1].taken(), 1);
    assert_eq!(vectors[0].routed(), None);
    assert_eq!(pending(&msix), 0);
}

#[test]
fn vector_masked_makes_signals_pending_and_unmasking_sends_one() {
    let (msix, vectors) = table(2);
    msix.set_control(true, false, BDF);
    program(&msix, 0, 0xfee0_0000, 1);

    msix.signal(0);
    msix.signal(0);
    assert_eq!((pending(&msix), vectors[0].taken()), (1, 0));
    set_mask(&msix, 0, false);

    assert_eq!((pending(&msix), vectors[0].taken()), (0, 1));
}

#[test]
fn function_masked_makes_signals_pending_and_unmasking_sends_them() {
    let (msix, vectors) = table(3);
    for index in 0..3 {
        program(&msix, index, 0xfee0_0000, 1);
        set_mask(&msix, index, false);
    }
    msix.set_control(true, true, BDF);

    msix.signal(0);
    msix.signal(2);
    assert_eq!(pending(&msix), 0b101);
    msix.set_control(true, false, BDF);

    assert_eq!(pending(&msix), 0);
    assert_eq!([vectors[0].taken(), vectors[1].taken(), vectors[2].taken()], [1, 0, 1]);
}

#[test]
fn vector_masked_and_unmasked_unchanged_is_not_routed_again() {
    let (msix, vectors) = table(1);
    msix.set_control(true, false, BDF);
    program(&msix, 0, 0xfee0_0000, 1);
    set_mask(&msix, 0, false);
    set_mask(&msix, 0, true);
    set_mask(&msix, 0, false);
    assert_eq!(vectors[0].routes.lock().unwrap().len(), 1);

    program(&msix, 0, 0xfee0_2000, 1);

    assert_eq!(vectors[0].routed().unwrap().address, 0xfee0_2000);
}

#[test]
fn disabled_drops_signals_and_disconnects() {
    let (msix, vectors) = table(1);
    program(&msix, 0, 0xfee0_0000, 1);
    set_mask(&msix, 0, false);

    msix.signal(0);
    msix.set_control(true, false, BDF);
    assert_eq!(vectors[0].taken(), 0);
    msix.set_control(false, false, BDF);

    assert_eq!(vectors[0].routed(), None);
    msix.signal(0);
    assert_eq!((pending(&msix), vectors[0].taken()), (0, 0));
}

#[test]
fn route_refused_keeps_the_interrupt_pending() {
    let (msix, vectors) = table(1);
    msix.set_control(true, false, BDF);
    vectors[0].refuse.store(true, Ordering::SeqCst);
    program(&msix, 0, u64::MAX, 1);
    set_mask(&msix, 0, false);
    msix.signal(0);
    assert_eq!((pending(&msix), vectors[0].taken()), (1, 0));

    vectors[0].refuse.store(false, Ordering::SeqCst);
    program(&msix, 0, 0xfee0_0000, 1);

    assert_eq!((pending(&msix), vectors[0].taken()), (0, 1));
}

#[test]
fn table_reads_back_what_was_written_and_starts_masked() {
    let (msix, _) = table(2);
    let mut entry = [0; 8];
    msix.read_table(16 + 8, &mut entry);
    assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0]);

    msix.write_table(16, &0x1234_5678_9abc_defbu64.to_le_bytes());
    msix.write_table(24, &[1, 2, 3, 4, 0xfe, 0xff, 0xff, 0xff]);

    msix.read_table(16, &mut entry);
    assert_eq!(u64::from_le_bytes(entry), 0x1234_5678_9abc_def8);
    msix.read_table(24, &mut entry);
    assert_eq!(entry, [1, 2, 3, 4, 0, 0, 0, 0]);
    let mut byte = [0xee];
    msix.read_table(25, &mut byte);
    assert_eq!(byte, [2]);
}

#[test]
fn table_accesses_of_odd_widths_or_beyond_the_end_do_nothing() {
    let (msix, vectors) = table(1);
    msix.set_control(true, false, BDF);

    msix.write_table(12, &[0]);
    msix.write_table(12, &[0, 0]);
    msix.write_table(10, &[0, 0, 0, 0]);
    msix.write_table(4, &[0; 8]);
    msix.write_table(12, &[0; 8]);
    msix.write_table(16 + 12, &[0; 4]);
    msix.write_table(u64::MAX - 3, &[0; 4]);
    let mut data = [0xee; 8];
    msix.read_table(12, &mut data);
    assert_eq!(data, [0; 8]);
    msix.read_pending(u64::MAX, &mut data);
    assert_eq!(data, [0; 8]);
    msix.signal(1);
    msix.signal(u16::MAX);

    assert_eq!(vectors[0].routed(), None);
}

#[test]
fn pending_bits_of_many_vectors_stand_in_order() {
    let (msix, _) = table(70);
    msix.set_control(true, false, BDF);
    msix.signal(9);
    msix.signal(69);

    let mut data = [0; 4];
    msix.read_pending(0, &mut data);
    assert_eq!(data, [0, 2, 0, 0]);
    msix.read_pending(8, &mut data);
    assert_eq!(data, [0x20, 0, 0, 0]);
}

#[test]
fn reset_masks_and_forgets() {
    let (msix, vectors) = table(1);
    msix.set_control(true, false, BDF);
    msix.signal(0);
    program(&msix, 0, 0xfee0_0000, 7);
    set_mask(&msix, 0, false);

    msix.reset();

    let mut entry = [0xee; 8];
    msix.read_table(8, &mut entry);
    assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(vectors[0].routed(), None);
    assert_eq!(pending(&msix), 0);
}
