use std::sync::atomic::Ordering::SeqCst;

use cowhand_block::io::sim::Rng;

use super::super::fake::{Backend, FakeDisk};
use super::super::{Block, BlockOptions, DiskBackend};
use super::*;
use crate::device::{Activation, VirtioDevice};
use crate::testing::{Driver, HIGH, HOLE, INDIRECT, Interrupts, NEXT, WRITE, wait_until};

const HEADER: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x9000;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;

struct World {
    driver: Driver,
    disk: Arc<FakeDisk>,
    interrupts: Arc<Interrupts>,
    device: Block,
}

impl World {
    fn new(disk: FakeDisk) -> Self {
        Self::with(disk, VERSION_1 | FLUSH, false)
    }

    fn with(disk: FakeDisk, features: u64, event_idx: bool) -> Self {
        let disk = Arc::new(disk);
        let options = BlockOptions { serial: "cow-0123456789abcdefghi".into(), queue_size: 16, ..Default::default() };
        let device = Block::new(Arc::new(Backend(disk.clone())), options).unwrap();
        let mut world = Self { driver: Driver::new(16), disk, interrupts: Arc::default(), device };
        world.device.negotiated(features);
        world.activate(features, event_idx);
        world
    }

    fn activate(&mut self, features: u64, event_idx: bool) {
        let activation = Activation {
            memory: self.driver.memory.clone(),
            features,
            queues: vec![self.driver.queue(event_idx)],
            interrupt: self.interrupts.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.put(HEADER, &kind.to_le_bytes());
        self.driver.put(HEADER + 4, &[0; 4]);
        self.driver.put(HEADER + 8, &sector.to_le_bytes());
        self.driver.put(STATUS, &[0xee]);
    }

    /// Runs header, `data` and status; gives the status byte and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, WRITE));
        let len = self.driver.run(&chain);
        (self.driver.byte(STATUS), len)
    }

    fn range(&self, at: u64, sector: u64, sectors: u32, flags: u32) {
        self.driver.put(at, &sector.to_le_bytes());
        self.driver.put(at + 8, &sectors.to_le_bytes());
        self.driver.put(at + 12, &flags.to_le_bytes());
    }
}

fn disk() -> FakeDisk {
    FakeDisk::new(1 << 20)
}

#[test]
fn read_fills_the_buffers_and_reports_their_length() {
    let mut world = World::new(disk());

    let (status, len) = world.request(0, 3, &[(DATA, 512, WRITE), (DATA + 0x1000, 1024, WRITE)]);

    assert_eq!((status, len), (OK, 1537));
    assert_eq!(world.driver.bytes(DATA, 512), vec![3; 512]);
    assert_eq!(world.driver.bytes(DATA + 0x1000, 512), vec![4; 512]);
    assert_eq!(world.driver.bytes(DATA + 0x1200, 512), vec![5; 512]);
}

#[test]
fn write_changes_the_disk_and_reports_only_the_status() {
    let mut world = World::new(disk());
    world.driver.put(DATA, &[0xaa; 1024]);

    let (status, len) = world.request(1, 8, &[(DATA, 1024, 0)]);

    assert_eq!((status, len), (OK, 1));
    assert_eq!(&world.disk.data.lock().unwrap()[4096..5120], &[0xaa; 1024]);
    assert_eq!(world.disk.log(), ["write 4096+1024"]);
}

#[test]
fn chain_cut_in_odd_places_is_read_all_the_same() {
    let mut world = World::new(disk());
    world.header(0, 7);

    // Header in three pieces, data and status in one buffer.
    let chain = [(HEADER, 3, 0), (HEADER + 3, 8, 0), (HEADER + 11, 5, 0), (DATA, 100, WRITE), (DATA + 100, 413, WRITE)];
    let len = world.driver.run(&chain);

    assert_eq!(len, 513);
    assert_eq!(world.driver.bytes(DATA, 512), vec![7; 512]);
    assert_eq!(world.driver.byte(DATA + 512), OK);
}

#[test]
fn write_header_and_data_in_one_descriptor_is_taken() {
    let mut world = World::new(disk());
    world.driver.put(DATA, &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    world.driver.put(DATA + 16, &[0x55; 512]);

    world.driver.run(&[(DATA, 528, 0), (STATUS, 1, WRITE)]);

    assert_eq!(world.driver.byte(STATUS), OK);
    assert_eq!(&world.disk.data.lock().unwrap()[1024..1536], &[0x55; 512]);
}

#[test]
fn indirect_descriptors_are_followed() {
    let mut world = World::new(disk());
    world.header(0, 9);
    let table = 0xa000;
    world.driver.descriptor(table, 0, HEADER, 16, NEXT, 2);
    world.driver.descriptor(table, 2, DATA, 512, WRITE | NEXT, 1);
    world.driver.descriptor(table, 1, STATUS, 1, WRITE, 0);

    let len = world.driver.run(&[(table, 48, INDIRECT)]);

    assert_eq!((len, world.driver.byte(STATUS)), (513, OK));
    assert_eq!(world.driver.bytes(DATA, 512), vec![9; 512]);
}

#[test]
fn get_id_gives_twenty_bytes() {
    let mut world = World::new(disk());

    let (status, len) = world.request(8, 0, &[(DATA, 20, WRITE)]);

    assert_eq!((status, len), (OK, 21));
    assert_eq!(world.driver.bytes(DATA, 20), b"cow-0123456789abcdef");
}

#[test]
fn get_id_with_another_room_writes_no_further() {
    let mut world = World::new(disk());
    world.driver.put(DATA, &[0xee; 64]);

    assert_eq!(world.request(8, 0, &[(DATA, 4, WRITE)]), (OK, 5));
    assert_eq!(world.driver.bytes(DATA, 6), b"cow-\xee\xee");
    // The status is not part of the gapless beginning.
    assert_eq!(world.request(8, 0, &[(DATA, 64, WRITE)]), (OK, 20));
}

#[test]
fn flush_reaches_the_engine() {
    let mut world = World::new(disk());

    assert_eq!(world.request(4, 0, &[]), (OK, 1));
    assert_eq!(world.disk.log(), ["flush"]);
}

#[test]
fn flush_failure_is_an_io_error() {
    let mut world = World::new(disk());
    world.disk.fail.store(true, SeqCst);

    assert_eq!(world.request(4, 0, &[]), (IOERR, 1));
    assert!(!world.interrupts.broken());
}

#[test]
fn read_failure_is_an_io_error_with_no_length() {
    let mut world = World::new(disk());
    world.disk.fail.store(true, SeqCst);

    assert_eq!(world.request(0, 0, &[(DATA, 512, WRITE)]), (IOERR, 0));
}

#[test]
fn discard_ranges_all_reach_the_engine() {
    let mut world = World::new(disk());
    world.range(DATA, 128, 128, 0);
    world.range(DATA + 16, 512, 1, 0);
    world.range(DATA + 32, 700, 0, 0);

    assert_eq!(world.request(11, 0, &[(DATA, 20, 0), (DATA + 20, 28, 0)]), (OK, 1));
    assert_eq!(world.disk.log(), ["discard 65536+65536", "discard 262144+512"]);
}

#[test]
fn write_zeroes_passes_the_unmap_flag() {
    let mut world = World::new(disk());
    world.range(DATA, 1, 1, 1);
    world.range(DATA + 16, 3, 2, 0);

    assert_eq!(world.request(13, 0, &[(DATA, 32, 0)]), (OK, 1));
    assert_eq!(world.disk.log(), ["zero 512+512 unmap=true", "zero 1536+1024 unmap=false"]);
    assert_eq!(&world.disk.data.lock().unwrap()[512..1024], &[0; 512]);
}

#[test]
fn range_out_of_bounds_fails_the_request_and_no_range_is_carried_out() {
    let mut world = World::new(disk());
    world.range(DATA, 0, 1, 0);
    world.range(DATA + 16, 2047, 2, 0);
    assert_eq!(world.request(13, 0, &[(DATA, 32, 0)]), (IOERR, 1));

    world.range(DATA + 16, u64::MAX / 512, 2, 0);
    assert_eq!(world.request(11, 0, &[(DATA, 32, 0)]), (IOERR, 1));
    assert!(world.disk.log().is_empty());
}

#[test]
fn range_flags_unknown_are_unsupported() {
    let mut world = World::new(disk());

    world.range(DATA, 0, 1, 2);
    assert_eq!(world.request(13, 0, &[(DATA, 16, 0)]).0, UNSUPP);
    assert_eq!(world.request(11, 0, &[(DATA, 16, 0)]).0, UNSUPP);
    world.range(DATA, 0, 1, 1);
    assert_eq!(world.request(11, 0, &[(DATA, 16, 0)]).0, UNSUPP);
    assert!(world.disk.log().is_empty());
}

#[test]
fn ranges_too_many_too_long_or_cut_are_io_errors() {
    let mut limited = disk();
    limited.limits.max_discard = 65536;
    let mut world = World::new(limited);
    world.range(DATA, 0, 129, 0);

    assert_eq!(world.request(11, 0, &[(DATA, 16, 0)]).0, IOERR);
    assert_eq!(world.request(11, 0, &[(DATA, 15, 0)]).0, IOERR);
    assert_eq!(world.request(11, 0, &[]).0, IOERR);
    world.driver.put(DATA, &[0; 33 * 16]);
    assert_eq!(world.request(11, 0, &[(DATA, 33 * 16, 0)]).0, IOERR);
    assert!(world.disk.log().is_empty());
}

#[test]
fn request_type_unknown_is_unsupported() {
    let mut world = World::new(disk());

    for kind in [2, 3, 5, 10, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(world.request(kind, 0, &[(DATA, 512, WRITE)]), (UNSUPP, 0));
    }
}

#[test]
fn read_outside_the_disk_or_of_odd_length_is_an_io_error() {
    let mut world = World::new(disk());

    assert_eq!(world.request(0, 2047, &[(DATA, 1024, WRITE)]).0, IOERR);
    assert_eq!(world.request(0, u64::MAX, &[(DATA, 512, WRITE)]).0, IOERR);
    assert_eq!(world.request(0, 1 << 55, &[(DATA, 512, WRITE)]).0, IOERR);
    assert_eq!(world.request(0, 0, &[(DATA, 511, WRITE)]).0, IOERR);
    assert!(world.disk.log().is_empty());
    assert_eq!(world.request(0, 2047, &[(DATA, 512, WRITE)]).0, OK);
}

#[test]
fn read_without_data_succeeds_and_asks_for_nothing() {
    let mut world = World::new(disk());

    assert_eq!(world.request(0, 0, &[]), (OK, 1));
    assert_eq!(world.request(0, 0, &[(DATA, 0, WRITE)]), (OK, 1));
    assert!(world.disk.log().is_empty());
}

#[test]
fn data_in_the_wrong_direction_is_an_io_error() {
    let mut world = World::new(disk());

    assert_eq!(world.request(0, 0, &[(DATA, 512, 0)]).0, IOERR);
    assert_eq!(world.request(1, 0, &[(DATA, 512, WRITE)]).0, IOERR);
    // Readable after writable.
    assert_eq!(world.request(0, 0, &[(DATA, 512, WRITE), (DATA, 512, 0)]).0, IOERR);
    assert!(world.disk.log().is_empty());
}

#[test]
fn data_outside_memory_is_an_io_error() {
    let mut world = World::new(disk());

    for at in [HOLE, HOLE - 10, HIGH - 1, HIGH + (1 << 20) - 1, u64::MAX - 100, u64::MAX] {
        assert_eq!(world.request(0, 0, &[(at, 512, WRITE)]).0, IOERR, "{at:#x}");
        assert_eq!(world.request(1, 0, &[(at, 512, 0)]).0, IOERR, "{at:#x}");
        assert_eq!(world.request(8, 0, &[(at, 20, WRITE)]).0, IOERR, "{at:#x}");
    }
    assert!(world.disk.log().is_empty());
    assert_eq!(world.request(0, 5, &[(HIGH, 512, WRITE)]).0, OK);
}

#[test]
fn header_short_or_outside_memory_is_an_io_error() {
    let mut world = World::new(disk());
    world.header(0, 0);

    world.driver.run(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
    assert_eq!(world.driver.byte(STATUS), IOERR);
    world.driver.put(STATUS, &[0xee]);
    world.driver.run(&[(HOLE, 16, 0), (STATUS, 1, WRITE)]);
    assert_eq!(world.driver.byte(STATUS), IOERR);
}

#[test]
fn chain_without_status_comes_back_empty_and_the_queue_goes_on() {
    let mut world = World::new(disk());
    world.header(1, 0);

    assert_eq!(world.driver.run(&[(HEADER, 16, 0), (DATA, 512, 0)]), 0);
    assert_eq!(world.driver.run(&[(HEADER, 16, 0), (DATA, 512, 0), (HOLE, 1, WRITE)]), 0);
    assert_eq!(world.request(0, 1, &[(DATA, 512, WRITE)]).0, OK);
    assert!(!world.interrupts.broken());
}

#[test]
fn chain_that_loops_comes_back_empty_and_the_queue_goes_on() {
    let mut world = World::new(disk());
    world.header(0, 0);
    world.driver.raw(0, HEADER, 16, NEXT, 1);
    world.driver.raw(1, DATA, 512, WRITE | NEXT, 1);

    world.driver.offer(0);
    world.driver.kick();

    assert_eq!(world.driver.used(), (0, 0));
    assert_eq!(world.driver.byte(STATUS), 0xee);
    assert_eq!(world.request(0, 1, &[(DATA, 512, WRITE)]).0, OK);
}

#[test]
fn chain_with_a_next_beyond_the_table_comes_back_empty() {
    let mut world = World::new(disk());
    world.header(0, 0);
    world.driver.raw(0, HEADER, 16, NEXT, 16);

    world.driver.offer(0);
    world.driver.kick();

    assert_eq!(world.driver.used(), (0, 0));
}

#[test]
fn indirect_table_nested_or_outside_memory_comes_back_empty() {
    let mut world = World::new(disk());
    world.header(0, 0);
    world.driver.descriptor(0xa000, 0, 0xb000, 16, INDIRECT, 0);

    assert_eq!(world.driver.run(&[(0xa000, 16, INDIRECT)]), 0);
    assert_eq!(world.driver.run(&[(HOLE, 16, INDIRECT)]), 0);
    assert_eq!(world.driver.run(&[(0xa000, 17, INDIRECT)]), 0);
    assert_eq!(world.driver.run(&[(0xa000, 0, INDIRECT)]), 0);
}

#[test]
fn indirect_table_of_thousands_of_buffers_is_an_io_error() {
    let mut world = World::new(disk());
    world.header(0, 0);
    let (table, count) = (HIGH, 5000);
    world.driver.descriptor(table, 0, HEADER, 16, NEXT, 1);
    for n in 1..count {
        world.driver.descriptor(table, n, DATA, 512, WRITE | NEXT, n + 1);
    }
    world.driver.descriptor(table, count, STATUS, 1, WRITE, 0);

    world.driver.run(&[(table, (u32::from(count) + 1) * 16, INDIRECT)]);

    assert_eq!(world.driver.byte(STATUS), IOERR);
    assert!(world.disk.log().is_empty());
}

#[test]
fn head_beyond_the_queue_is_skipped() {
    let mut world = World::new(disk());

    world.driver.offer(16);
    world.driver.offer(u16::MAX);

    assert_eq!(world.request(0, 1, &[(DATA, 512, WRITE)]).0, OK);
    assert!(!world.interrupts.broken());
}

#[test]
fn available_index_that_jumps_needs_a_reset_and_a_reset_helps() {
    let mut world = World::new(disk());

    world.driver.set_avail(17);
    world.driver.kick();
    wait_until("the device to say that it is broken", || world.interrupts.broken());
    world.device.reset();
    world.driver = Driver::new(16);
    world.device.negotiated(VERSION_1 | FLUSH);
    world.activate(VERSION_1 | FLUSH, false);

    assert_eq!(world.request(0, 1, &[(DATA, 512, WRITE)]).0, OK);
}

#[test]
fn read_only_disk_refuses_all_writes() {
    let mut world = World::new(FakeDisk { read_only: true, ..disk() });
    world.range(DATA, 0, 1, 0);

    assert_eq!(world.request(1, 0, &[(DATA, 512, 0)]).0, IOERR);
    assert_eq!(world.request(1, 0, &[]).0, IOERR);
    // Not offered on a disk that cannot be written.
    assert_eq!(world.request(11, 0, &[(DATA, 16, 0)]).0, UNSUPP);
    assert_eq!(world.request(13, 0, &[(DATA, 16, 0)]).0, UNSUPP);
    assert_eq!(world.request(0, 0, &[(DATA, 512, WRITE)]).0, OK);
    assert_eq!(world.disk.log(), ["read 0+512"]);
}

#[test]
fn driver_without_flush_gets_every_write_flushed() {
    let mut world = World::with(disk(), VERSION_1, false);
    world.range(DATA, 5, 1, 0);

    assert_eq!(world.request(1, 0, &[(DATA, 512, 0)]), (OK, 1));
    assert_eq!(world.request(13, 0, &[(DATA, 16, 0)]), (OK, 1));
    assert_eq!(world.request(0, 0, &[(DATA, 512, WRITE)]).0, OK);

    assert_eq!(world.disk.log(), ["write 0+512", "flush", "zero 2560+512 unmap=false", "flush", "read 0+512"]);
}

#[test]
fn driver_can_turn_the_write_cache_off_and_on() {
    let mut world = World::with(disk(), VERSION_1 | FLUSH | CONFIG_WCE, false);

    world.device.write_config(32, &[0]);
    world.request(1, 0, &[(DATA, 512, 0)]);
    world.device.write_config(32, &[1]);
    world.request(1, 1, &[(DATA, 512, 0)]);

    assert_eq!(world.disk.log(), ["write 0+512", "flush", "write 512+512"]);
}

#[test]
fn batch_is_told_by_few_interrupts_with_event_index() {
    let mut world = World::with(disk(), VERSION_1 | FLUSH, true);
    world.header(0, 1);
    world.disk.hold.store(true, SeqCst);
    world.driver.set_used_event(4);
    for _ in 0..5 {
        let head = world.driver.chain(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        world.driver.offer(head);
    }
    world.driver.kick();
    wait_until("all to be in flight", || world.disk.in_flight.load(SeqCst) == 5);

    world.disk.hold.store(false, SeqCst);
    world.disk.poke.write(1).unwrap();
    for _ in 0..5 {
        world.driver.used();
    }

    wait_until("the interrupt", || world.interrupts.signals() == 1);
}

#[test]
fn driver_that_wants_no_interrupt_gets_none() {
    let mut world = World::new(disk());
    world.driver.set_avail_flags(1);
    world.request(0, 0, &[(DATA, 512, WRITE)]);
    world.request(0, 0, &[(DATA, 512, WRITE)]);
    world.device.stop();
    assert_eq!(world.interrupts.signals(), 0);
}

#[test]
fn same_chain_offered_again_and_again_is_bounded_by_the_queue() {
    let mut world = World::new(disk());
    world.header(0, 1);
    world.disk.hold.store(true, SeqCst);
    let head = world.driver.chain(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    for _ in 0..16 {
        world.driver.offer(head);
    }
    world.driver.kick();
    wait_until("a queue full", || world.disk.in_flight.load(SeqCst) == 16);
    for _ in 0..16 {
        world.driver.offer(head);
    }
    world.driver.kick();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(world.disk.in_flight.load(SeqCst), 16);

    world.disk.hold.store(false, SeqCst);
    world.disk.poke.write(1).unwrap();

    for _ in 0..32 {
        assert_eq!(world.driver.used(), (0, 513));
    }
}

#[test]
fn stop_drains_what_is_in_flight_and_gives_the_queue_back() {
    let mut world = World::new(disk());
    world.header(0, 1);
    world.disk.hold.store(true, SeqCst);
    let head = world.driver.chain(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    world.driver.offer(head);
    world.driver.kick();
    wait_until("the request to be in flight", || world.disk.in_flight.load(SeqCst) == 1);
    let disk = world.disk.clone();
    let release = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        disk.hold.store(false, SeqCst);
        disk.poke.write(1).unwrap();
    });

    let queues = world.device.stop();

    release.join().unwrap();
    assert_eq!(world.driver.used_idx(), 1);
    assert_eq!(world.driver.byte(STATUS), OK);
    assert_eq!(queues.len(), 1);
    assert_eq!((queues[0].queue.next_avail(), queues[0].queue.next_used()), (1, 1));
    assert_eq!(world.disk.dropped.load(SeqCst), 1);
}

/// A worker without a device, the driver of its queue, what stops it, and a read of sector 1 that is ready to be offered.
fn worker(disk: &Arc<FakeDisk>) -> (BlockWorker, Driver, EventFd) {
    let driver = Driver::new(16);
    let stop = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    let worker = BlockWorker::new(WorkerParts {
        queue: driver.queue(true),
        stop: stop.try_clone().unwrap(),
        memory: driver.memory.clone(),
        interrupt: Arc::new(Interrupts::default()),
        backend: Arc::new(Backend(disk.clone())),
        settings: Arc::new(BlockSettings::new("", false)),
        inflight: None,
        dirty: None,
        patience: Duration::ZERO,
    });
    driver.put(HEADER, &0u32.to_le_bytes());
    driver.put(HEADER + 4, &[0; 4]);
    driver.put(HEADER + 8, &1u64.to_le_bytes());
    (worker, driver, stop)
}

#[test]
fn stop_drains_what_is_in_flight_though_the_driver_offers_more() {
    let disk = Arc::new(disk());
    // It never looks for work without sleeping, which would find the completion by chance.
    let (worker, mut driver, stop) = worker(&disk);
    disk.hold.store(true, SeqCst);
    let head = driver.chain(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    driver.offer(head);
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(worker.run().queue.next_used()));
    driver.kick();
    wait_until("the request to be in flight", || disk.in_flight.load(SeqCst) == 1);
    // Without a kick: the worker sleeps until it hears the stop, and finds this then.
    driver.set_avail(2);
    stop.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));

    disk.hold.store(false, SeqCst);
    disk.poke.write(1).unwrap();

    // How many it served depends on whether it was asleep when more was offered.
    assert!(ended.recv_timeout(Duration::from_secs(20)).is_ok(), "the worker goes round for ever");
}

#[test]
fn chain_that_comes_while_the_worker_looks_needs_no_kick_and_a_stop_is_heard() {
    let disk = Arc::new(disk());
    let (mut worker, mut driver, stop) = worker(&disk);
    worker.patience = Patience::of(Duration::from_secs(3600));
    (0..40).for_each(|_| worker.patience.learn(Duration::from_secs(3600)));
    let thread = std::thread::spawn(move || worker.run());

    for _ in 0..3 {
        let head = driver.chain(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        driver.offer(head);
        assert_eq!(driver.used().0, u32::from(head));
    }
    stop.write(1).unwrap();
    disk.news.store(true, SeqCst);

    assert_eq!(thread.join().unwrap().queue.next_used(), 3);
}

#[test]
fn stopped_device_goes_on_where_it_was_with_the_queues_given_back() {
    let mut world = World::new(disk());
    assert_eq!(world.request(0, 1, &[(DATA, 512, WRITE)]).0, OK);
    let queues = world.device.stop();

    world
        .device
        .activate(Activation {
            memory: world.driver.memory.clone(),
            features: VERSION_1 | FLUSH,
            queues,
            interrupt: world.interrupts.clone(),
        })
        .unwrap();

    assert_eq!(world.request(0, 2, &[(DATA, 512, WRITE)]).0, OK);
    assert_eq!(world.driver.bytes(DATA, 1), [2]);
}

#[test]
fn driver_failure_fails_what_is_in_flight_and_all_that_follows() {
    let mut world = World::new(disk());
    world.header(0, 1);
    world.disk.hold.store(true, SeqCst);
    let head = world.driver.chain(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    world.driver.offer(head);
    world.driver.kick();
    wait_until("the request to be in flight", || world.disk.in_flight.load(SeqCst) == 1);

    world.disk.driver_fails.store(true, SeqCst);
    world.disk.poke.write(1).unwrap();

    assert_eq!(world.driver.used(), (0, 0));
    assert_eq!(world.driver.byte(STATUS), IOERR);
    assert_eq!(world.disk.dropped.load(SeqCst), 1);
    assert_eq!(world.request(1, 1, &[(DATA, 512, 0)]).0, IOERR);
    assert!(world.interrupts.broken());
    assert_eq!(world.device.stop().len(), 1);
}

#[test]
fn queue_that_cannot_be_opened_fails_all_requests() {
    let failing = disk();
    failing.open_fails.store(true, SeqCst);
    let mut world = World::new(failing);

    assert_eq!(world.request(0, 1, &[(DATA, 512, WRITE)]), (IOERR, 0));
    assert_eq!(world.request(4, 0, &[]), (IOERR, 1));
    assert!(world.interrupts.broken());
}

#[test]
fn warm_worker_allocates_nothing() {
    let mut world = World::new(disk());
    world.disk.quiet.store(true, SeqCst);
    world.range(DATA + 0x2000, 0, 8, 0);
    let mut run = |times| {
        for n in 0..times {
            world.request(n % 2, 4, &[(DATA, 512, if n % 2 == 0 { WRITE } else { 0 })]);
            world.request(1, 8, &[(DATA, 512, 0), (DATA + 4096, 1536, 0)]);
            world.request(11, 0, &[(DATA + 0x2000, 16, 0)]);
            world.request(8, 0, &[(DATA, 20, WRITE)]);
            world.request(4, 0, &[]);
        }
        world.disk.allocations.load(SeqCst)
    };
    let warm = run(50);

    assert!(warm > 0, "nothing is counted");
    assert_eq!(run(200), warm);
}

#[test]
fn engine_disk_keeps_what_was_written_and_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let spec = cowhand_block::DiskSpec::parse(&format!("path={},format=raw", path.display())).unwrap();
    let disk = cowhand_block::Disk::open(&spec, &cowhand_block::OpenPolicy::host()).unwrap();
    let mut world = World::new(FakeDisk::new(1 << 20));
    world.device = Block::new(Arc::new(DiskBackend(disk.clone())), BlockOptions::default()).unwrap();
    world.driver = Driver::new(16);
    world.activate(VERSION_1 | FLUSH, true);
    world.driver.put(DATA, &[0xc0; 1024]);

    assert_eq!(world.request(0, 1, &[(DATA + 0x1000, 512, WRITE)]), (OK, 513));
    assert_eq!(world.request(1, 3, &[(DATA, 512, 0), (DATA + 512, 512, 0)]), (OK, 1));
    assert_eq!(world.request(4, 0, &[]), (OK, 1));
    assert_eq!(world.request(0, 3, &[(HIGH, 1024, WRITE)]), (OK, 1025));
    assert_eq!(world.driver.bytes(HIGH, 1024), vec![0xc0; 1024]);
    world.device.reset();
    drop(world);
    disk.close().unwrap();

    let image = std::fs::read(&path).unwrap();
    assert_eq!(&image[1024..3072], [vec![7; 512], vec![0xc0; 1024], vec![7; 512]].concat());
}

#[test]
fn rubbish_in_rings_and_descriptors_never_stops_the_worker() {
    let mut random = Rng::from_environment("SEED", "rubbish_in_rings");
    for round in 0..60 {
        let mut world = World::with(disk(), VERSION_1 | FLUSH, round % 2 == 0);
        for _ in 0..40 {
            let index = random.below(16) as u16;
            let addr = match random.below(6) {
                0 => random.next_u64(),
                1 => HOLE - random.below(600),
                2 => HIGH + random.below(1 << 20),
                3 => 0x1000 + random.below(0x5000),
                _ => HEADER + random.below(0x9000),
            };
            let len = match random.below(4) {
                0 => random.next_u64() as u32,
                1 => 16 * random.below(20) as u32,
                _ => random.below(2000) as u32,
            };
            world.driver.raw(index, addr, len, random.below(8) as u16, random.below(18) as u16);
            world.header([0, 1, 4, 8, 11, 13, random.next_u64() as u32][random.below(7) as usize], random.below(3000));
            match random.below(40) {
                0 => world.driver.set_avail(random.next_u64() as u16),
                _ => world.driver.offer(random.below(17) as u16),
            }
            world.driver.kick();
        }
        world.device.reset();
    }
}
