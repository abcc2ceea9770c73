use super::*;
use crate::testing::{Driver, HOLE, Interrupts, WRITE, wait_until};

const DATA: u64 = 0x1_0000;

fn active() -> (Driver, Arc<Interrupts>, Rng) {
    let (driver, interrupts, mut rng) = (Driver::new(16), Arc::new(Interrupts::default()), Rng::new());
    rng.activate(Activation {
        memory: driver.memory.clone(),
        features: 1 << VIRTIO_F_VERSION_1,
        queues: vec![driver.queue(false)],
        interrupt: interrupts.clone(),
    })
    .unwrap();
    (driver, interrupts, rng)
}

#[test]
fn request_is_filled_with_entropy() {
    let (mut driver, interrupts, _rng) = active();

    assert_eq!(driver.run(&[(DATA, 32, WRITE), (DATA + 0x100, 32, WRITE)]), 64);
    assert_ne!(driver.bytes(DATA, 32), [0; 32]);
    assert_ne!(driver.bytes(DATA, 32), driver.bytes(DATA + 0x100, 32));
    wait_until("the interrupt", || interrupts.signals() == 1);
}

#[test]
fn request_for_much_gets_a_bounded_amount() {
    let (mut driver, _, _rng) = active();

    assert_eq!(driver.run(&[(DATA, 0x2_0000, WRITE)]), MAX_BYTES as u32);
}

#[test]
fn chain_that_makes_no_sense_comes_back_empty() {
    let (mut driver, _, _rng) = active();

    assert_eq!(driver.run(&[(DATA, 32, 0)]), 0);
    assert_eq!(driver.run(&[(HOLE, 32, WRITE)]), 0);
    assert_eq!(driver.run(&[(DATA, 32, WRITE), (DATA, 32, 0)]), 0);
    assert_eq!(driver.run(&[(DATA, 32, WRITE)]), 32);
}

#[test]
fn ring_that_is_broken_needs_a_reset_and_a_reset_helps() {
    let (mut driver, interrupts, mut rng) = active();

    driver.set_avail(100);
    driver.kick();
    wait_until("the device to say that it is broken", || interrupts.broken());
    rng.reset();

    let mut driver = Driver::new(16);
    rng.activate(Activation {
        memory: driver.memory.clone(),
        features: 1 << VIRTIO_F_VERSION_1,
        queues: vec![driver.queue(true)],
        interrupt: interrupts,
    })
    .unwrap();
    assert_eq!(driver.run(&[(DATA, 8, WRITE)]), 8);
}

#[test]
fn stop_gives_the_queue_back() {
    let (mut driver, _, mut rng) = active();
    driver.run(&[(DATA, 8, WRITE)]);

    let queues = rng.stop();

    assert_eq!(queues[0].queue.next_avail(), 1);
    assert!(rng.stop().is_empty());
}
