use super::*;
use crate::kvm;

fn router() -> Arc<InterruptRouter> {
    let vm = kvm::create_vm(&kvm::open().unwrap()).unwrap();
    vm.create_irq_chip().unwrap();
    Arc::new(InterruptRouter::new(Arc::new(vm)))
}

const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x41, device_id: 8 };

#[test]
fn vectors_get_gsis_of_their_own_and_give_them_back() {
    let router = router();
    let allocator = KvmMsiAllocator(router.clone());
    let first = allocator.allocate().unwrap();
    let second = allocator.allocate().unwrap();
    assert_eq!(router.lock().keys().copied().collect::<Vec<_>>(), [24, 25]);
    first.route(MESSAGE).unwrap();
    second.route(MsiMessage { data: 0x42, ..MESSAGE }).unwrap();
    drop(first);
    assert_eq!(router.lock().keys().copied().collect::<Vec<_>>(), [25]);
    let _third = allocator.allocate().unwrap();
    assert_eq!(router.lock().len(), 2);
}

#[test]
fn a_masked_vector_keeps_signals_pending() {
    let vector = KvmMsiAllocator(router()).allocate().unwrap();
    vector.route(MESSAGE).unwrap();
    vector.mask().unwrap();
    vector.mask().unwrap();
    vector.eventfd().write(3).unwrap();
    assert_eq!(vector.eventfd().read().unwrap(), 3);
    vector.eventfd().write(1).unwrap();
    vector.route(MESSAGE).unwrap();
}

#[test]
fn allocation_beyond_the_last_gsi_returns_error() {
    let router = router();
    router.lock().extend((layout::IOAPIC_PINS..MAX_GSIS).map(|gsi| (gsi, None)));
    assert!(KvmMsiAllocator(router).allocate().is_err());
}

#[test]
fn a_doorbell_is_registered_once_and_unregistered_once() {
    let vm = router().vm.clone();
    let doorbells = KvmDoorbells(vm);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    doorbells.register(&event, 0xc000_1000).unwrap();
    assert!(doorbells.register(&event, 0xc000_1000).is_err());
    doorbells.unregister(&event, 0xc000_1000).unwrap();
    assert!(doorbells.unregister(&event, 0xc000_1000).is_err());
}
