//! Writes to guest memory are noted: exactly those, and before the driver can know of them.

use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;

use super::super::fake::{Backend, FakeDisk};
use super::*;
use crate::dirty::{DirtyLog, PageLog};
use crate::testing::{Driver, HOLE, Interrupts, USED, WRITE, Words, wait_until, words};

const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x1_0000;
const PAGE: u64 = 4096;
/// Where the log has the used ring: its flags and index at the end of a page, its entries on the next.
const LOGGED_RING: u64 = 0x2f0 * PAGE + PAGE - 4;

/// A driver whose worker notes pages.
struct World {
    driver: Driver,
    disk: Arc<FakeDisk>,
    log: Words,
    stop: EventFd,
    thread: std::thread::JoinHandle<ActiveQueue>,
}

impl World {
    fn new(event_idx: bool, used_ring: Option<u64>) -> Self {
        let (driver, disk, log) = (Driver::new(16), Arc::new(FakeDisk::new(1 << 20)), words(16));
        let dirty =
            DirtyMarks { log: Arc::new(PageLog::new(log.clone(), 128)), used_ring: used_ring.map(GuestAddress) };
        let stop = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let worker = worker(&driver, &disk, &stop, event_idx, dirty);
        let thread = std::thread::spawn(move || worker.run());
        Self { driver, disk, log, stop, thread }
    }

    fn request(&mut self, kind: u32, data: &[(u64, u32, u16)]) -> u8 {
        self.driver.put(HEADER, &kind.to_le_bytes());
        self.driver.put(HEADER + 4, &[0; 12]);
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, WRITE));
        self.driver.run(&chain);
        self.driver.byte(STATUS)
    }

    /// The pages that are marked once the worker has ended.
    fn pages(self) -> Vec<u64> {
        self.stop.write(1).unwrap();
        self.thread.join().unwrap();
        pages(&self.log)
    }
}

fn pages(log: &Words) -> Vec<u64> {
    (0..1024).filter(|page| log.0[page / 64].load(SeqCst) & 1 << (page % 64) != 0).map(|page| page as u64).collect()
}

fn worker(driver: &Driver, disk: &Arc<FakeDisk>, stop: &EventFd, event_idx: bool, dirty: DirtyMarks) -> BlockWorker {
    BlockWorker::new(WorkerParts {
        queue: driver.queue(event_idx),
        stop: stop.try_clone().unwrap(),
        memory: driver.memory.clone(),
        interrupt: Arc::<Interrupts>::default(),
        backend: Arc::new(Backend(disk.clone())),
        settings: Arc::new(BlockSettings::new("cow", true)),
        inflight: None,
        dirty: Some(dirty),
        patience: Duration::ZERO,
    })
}

/// The pages that one request marks, with its status.
fn marked(kind: u32, data: &[(u64, u32, u16)], fail: bool) -> (u8, Vec<u64>) {
    let mut world = World::new(true, None);
    world.disk.fail.store(fail, SeqCst);
    let status = world.request(kind, data);
    (status, world.pages())
}

#[test]
fn every_request_marks_exactly_the_pages_that_it_writes() {
    const STATUS_PAGE: u64 = STATUS / PAGE;
    let range = [(DATA, 16, 0)];
    // A read: all its data, also when it failed; across a page's end, and in a page of its own.
    let data = [(DATA + PAGE - 256, 512, WRITE), (DATA + 5 * PAGE, 512, WRITE)];
    assert_eq!(marked(0, &data, false), (0, vec![STATUS_PAGE, 0x10, 0x11, 0x15]));
    assert_eq!(marked(0, &data, true), (1, vec![STATUS_PAGE, 0x10, 0x11, 0x15]));
    // A read that is refused has written nothing.
    assert_eq!(marked(0, &[(DATA, 511, WRITE)], false), (1, vec![STATUS_PAGE]));
    assert_eq!(marked(0, &[(HOLE, 512, WRITE)], false), (1, vec![STATUS_PAGE]));
    // Writes, flushes, discards, zeros.
    assert_eq!(marked(1, &[(DATA, 512, 0)], false), (0, vec![STATUS_PAGE]));
    assert_eq!(marked(4, &[(DATA, 512, WRITE)], false), (0, vec![STATUS_PAGE]));
    assert_eq!(marked(11, &range, false), (0, vec![STATUS_PAGE]));
    assert_eq!(marked(13, &range, false), (0, vec![STATUS_PAGE]));
    // The identity, as far as it goes, and where it does not go at all.
    assert_eq!(marked(8, &[(DATA + PAGE - 10, 4096, WRITE)], false), (0, vec![STATUS_PAGE, 0x10, 0x11]));
    assert_eq!(marked(8, &[(DATA, 8, WRITE), (HOLE, 12, WRITE)], false), (1, vec![STATUS_PAGE]));
    // What is unknown.
    assert_eq!(marked(99, &[(DATA, 512, WRITE)], false), (2, vec![STATUS_PAGE]));
}

#[test]
fn status_byte_outside_memory_marks_nothing() {
    let mut world = World::new(true, None);
    world.driver.put(HEADER, &[0; 16]);
    world.driver.run(&[(HEADER, 16, 0), (HOLE + 5, 1, WRITE)]);
    assert!(world.pages().is_empty());
}

#[test]
fn used_ring_is_marked_where_the_log_has_it() {
    let mut world = World::new(true, Some(LOGGED_RING));
    wait_until("the worker to start", || pages(&world.log) == [0x2f0, 0x2f1]);
    world.log.0.iter().for_each(|word| word.store(0, SeqCst));
    world.request(1, &[(DATA, 512, 0)]);
    assert_eq!(world.pages(), [STATUS / PAGE, 0x2f0, 0x2f1]);

    // Beyond the log, where it wraps around, or not at all.
    for ring in [Some(1024 * PAGE), Some(u64::MAX - 1), None] {
        let mut world = World::new(true, ring);
        world.request(1, &[(DATA, 512, 0)]);
        assert_eq!(world.pages(), [STATUS / PAGE]);
    }
}

/// A log that takes note of each mark, with the used ring's index and the first byte then.
struct Noted {
    driver: Driver,
    marks: Mutex<Vec<(u64, u64, u16, u8)>>,
}

impl DirtyLog for Noted {
    fn mark(&self, at: GuestAddress, len: u64) {
        let byte = self.driver.mem.read_obj(at).unwrap_or(0);
        self.marks.lock().unwrap().push((at.0, len, self.driver.used_idx(), byte));
    }
}

#[test]
fn marks_come_after_what_they_speak_of_and_before_the_driver_can_know() {
    for event_idx in [true, false] {
        let mut driver = Driver::new(16);
        let noted = Arc::new(Noted { driver: driver.clone(), marks: Mutex::default() });
        let disk = Arc::new(FakeDisk::new(1 << 20));
        let stop = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let dirty = DirtyMarks { log: noted.clone(), used_ring: Some(GuestAddress(USED)) };
        let worker = worker(&driver, &disk, &stop, event_idx, dirty);
        driver.put(HEADER, &[0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        driver.put(STATUS, &[0xee]);
        let thread = std::thread::spawn(move || worker.run());
        driver.run(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        stop.write(1).unwrap();
        thread.join().unwrap();

        let notification = if event_idx { USED + 4 + 8 * 16 } else { USED };
        let marks = noted.marks.lock().unwrap();
        assert_eq!(marks[0], (USED, 4 + 8 * 16 + 2, 0, 0), "the ring as a whole, when the worker starts");
        let wake = |mark: &(u64, u64, u16, u8)| (mark.0, mark.1) == (notification, 2);
        assert!(marks[1..].iter().any(wake), "what tells the driver whether to kick: {marks:?}");
        let others: Vec<_> = marks[1..].iter().filter(|mark| !wake(mark)).copied().collect();
        assert_eq!(others, [(DATA, 512, 0, 5), (STATUS, 1, 0, 0), (USED + 4, 8, 1, 0), (USED + 2, 2, 1, 1)]);
    }
}

#[test]
fn warm_worker_with_a_log_allocates_nothing() {
    let mut world = World::new(true, Some(LOGGED_RING));
    world.disk.quiet.store(true, SeqCst);
    let mut run = |times| {
        for n in 0..times {
            let write = n % 2 == 1;
            world.request(write.into(), &[(DATA, 512, if write { 0 } else { WRITE })]);
        }
        world.disk.allocations.load(SeqCst)
    };
    let warm = run(50);
    assert!(warm > 0, "nothing is counted");
    assert_eq!(run(200), warm);
}
