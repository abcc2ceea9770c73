//! Workers that are killed: what they leave is looked at, and gone on from, as it is at each store to the records.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;

use cowhand_block::io::sim::Rng;

use super::super::fake::{Backend, FakeDisk};
use super::super::{InflightError, LONGEST_PATIENCE};
use super::*;
use crate::SharedWords;
use crate::testing::{AVAIL, Driver, Interrupts, NEXT, USED, WRITE, Words, wait_until, words};

const SIZE: u16 = 16;
/// Chains of three descriptors that fit into the table side by side.
const CHAINS: u16 = 5;
const HEADERS: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x1_0000;
const READ: u32 = 0;
const WRITE_OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

fn data(chain: u16) -> u64 {
    DATA + u64::from(chain) * 0x1000
}

/// Lays out a chain of the driver's own numbering and gives its head.
fn lay_out(driver: &Driver, chain: u16, kind: u32) -> u16 {
    let (head, header) = (chain * 3, HEADERS + u64::from(chain) * 16);
    driver.put(header, &kind.to_le_bytes());
    driver.put(header + 4, &[0; 4]);
    driver.put(header + 8, &u64::from(chain).to_le_bytes());
    driver.put(STATUS + u64::from(chain), &[0xee]);
    let writable = if kind == WRITE_OUT { 0 } else { WRITE };
    driver.raw(head, header, 16, NEXT, head + 1);
    driver.raw(head + 1, data(chain), 512, writable | NEXT, head + 2);
    driver.raw(head + 2, STATUS + u64::from(chain), 1, WRITE, 0);
    head
}

struct Served {
    thread: JoinHandle<ActiveQueue>,
    stop: EventFd,
    interrupts: Arc<Interrupts>,
}

impl Served {
    fn start(driver: &Driver, queue: ActiveQueue, disk: &Arc<FakeDisk>, inflight: Inflight) -> Self {
        let stop = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let interrupts = Arc::<Interrupts>::default();
        let worker = BlockWorker::new(WorkerParts {
            queue,
            stop: stop.try_clone().unwrap(),
            memory: driver.memory.clone(),
            interrupt: interrupts.clone(),
            backend: Arc::new(Backend(disk.clone())),
            settings: Arc::new(BlockSettings::new("cow", false)),
            inflight: Some(inflight),
            dirty: None,
            patience: LONGEST_PATIENCE,
        });
        Self { thread: std::thread::spawn(move || worker.run()), stop, interrupts }
    }

    fn stop(self) -> ActiveQueue {
        self.stop.write(1).unwrap();
        self.thread.join().expect("the worker has panicked")
    }
}

/// The records in `words`, and the queue, as a transport sets them up that finds this driver.
fn recover(driver: &Driver, words: SharedWords, event_idx: bool) -> Result<(ActiveQueue, Inflight), InflightError> {
    let used_idx = driver.used_idx();
    let mut records = InflightQueue::new(words, 0, SIZE)?;
    let resubmit = records.recover(used_idx)?;
    let mut active = driver.queue(event_idx);
    active.queue.set_next_avail(used_idx.wrapping_add(resubmit.len() as u16));
    active.queue.set_next_used(used_idx);
    Ok((active, Inflight { records, resubmit }))
}

/// What a killed worker leaves.
struct Shot {
    words: Words,
    memory: Vec<u8>,
    outstanding: Vec<u16>,
}

/// Records that are looked at before each store to them.
struct Spy {
    words: Box<[AtomicU64]>,
    driver: Driver,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    start: u16,
    offered: Vec<u16>,
    used: Vec<u16>,
    looks: u64,
    shots: Vec<Shot>,
}

struct Spied(Arc<Spy>);

impl AsRef<[AtomicU64]> for Spied {
    fn as_ref(&self) -> &[AtomicU64] {
        self.0.look();
        &self.0.words
    }
}

/// Half-open, what of guest memory is kept of a killed worker: rings, headers, status bytes.
const KEPT: std::ops::Range<u64> = 0x1000..0xa000;

impl Spy {
    fn look(&self) {
        let mem = &self.driver.mem;
        let mut seen = self.seen.lock().unwrap();
        let avail: u16 = mem.load(GuestAddress(AVAIL + 2), SeqCst).unwrap();
        let used = self.driver.used_idx();
        while seen.start.wrapping_add(seen.used.len() as u16) != used {
            let slot = seen.start.wrapping_add(seen.used.len() as u16) % SIZE;
            let head: u32 = mem.read_obj(GuestAddress(USED + 4 + u64::from(slot) * 8)).unwrap();
            seen.used.push(head as u16);
        }
        let copy = words(self.words.len());
        copy.0.iter().zip(&self.words).for_each(|(to, from)| to.store(from.load(SeqCst), SeqCst));
        let Ok(mut records) = InflightQueue::new(copy.clone(), 0, SIZE) else { panic!("records are refused") };
        let resubmit = records.recover(used).unwrap();

        // What was offered and has not come back, in the order in which it was offered.
        let offered = avail.wrapping_sub(seen.start);
        let mut outstanding = seen.offered[..usize::from(offered)].to_vec();
        for head in &seen.used {
            let at = outstanding.iter().position(|it| it == head).expect("a chain came back twice");
            outstanding.remove(at);
        }
        let next_avail = used.wrapping_add(resubmit.len() as u16).wrapping_sub(seen.start);
        let found = [&resubmit[..], &seen.offered[usize::from(next_avail)..usize::from(offered)]].concat();
        assert_eq!(found, outstanding, "after {} looks, {} offered, {} used", seen.looks, offered, seen.used.len());

        seen.looks += 1;
        if seen.looks.is_multiple_of(23) {
            let mut memory = vec![0; (KEPT.end - KEPT.start) as usize];
            mem.read_slice(&mut memory, GuestAddress(KEPT.start)).unwrap();
            // The driver goes on offering while we copy; what the copy has is what counts.
            let avail = &mut memory[(AVAIL + 2 - KEPT.start) as usize..][..2];
            avail.copy_from_slice(&seen.start.wrapping_add(offered).to_le_bytes());
            seen.shots.push(Shot { words: copy, memory, outstanding });
        }
    }
}

/// Plays a driver against a worker with records; gives what the worker would have left at many moments.
fn play(seed: &str, start: u16, event_idx: bool) -> Vec<Shot> {
    let mut random = Rng::from_environment("SEED", seed);
    let mut driver = Driver::new(SIZE);
    let queue = driver.queue_at(start, event_idx);
    let disk = Arc::new(FakeDisk::new(1 << 20));
    disk.backwards.store(true, SeqCst);
    let area = InflightQueue::words_for(SIZE);
    let spy = Arc::new(Spy {
        words: (0..area).map(|_| AtomicU64::new(0)).collect(),
        driver: driver.clone(),
        seen: Mutex::new(Seen { start, ..Seen::default() }),
    });
    // Before anyone looks: the records of memory that was never used.
    let plain = words(area);
    InflightQueue::new(plain.clone(), 0, SIZE).ok().unwrap().recover(start).unwrap();
    plain.0.iter().zip(&spy.words).for_each(|(from, to)| to.store(from.load(SeqCst), SeqCst));
    let mut records = InflightQueue::new(Arc::new(Spied(spy.clone())), 0, SIZE).ok().unwrap();
    let resubmit = records.recover(start).unwrap();
    let served = Served::start(&driver, queue, &disk, Inflight { records, resubmit });

    let mut free: Vec<u16> = (0..CHAINS).collect();
    let mut left = 400;
    while left > 0 || free.len() < CHAINS.into() {
        while left > 0 && !free.is_empty() && random.below(4) > 0 {
            let chain = free.swap_remove(random.below(free.len() as u64) as usize);
            let head = lay_out(&driver, chain, [READ, WRITE_OUT, FLUSH, GET_ID][random.below(4) as usize]);
            spy.seen.lock().unwrap().offered.push(head);
            driver.offer(head);
            left -= 1;
        }
        disk.hold.store(random.below(3) == 0, SeqCst);
        disk.poke.write(1).unwrap();
        driver.kick();
        if free.len() < CHAINS.into() && random.below(3) > 0 {
            disk.hold.store(false, SeqCst);
            disk.poke.write(1).unwrap();
            let (head, _) = driver.used();
            free.push(head as u16 / 3);
        }
    }
    served.stop();
    let mut seen = spy.seen.lock().unwrap();
    assert!(seen.looks > 1500, "{} looks", seen.looks);
    std::mem::take(&mut seen.shots)
}

/// Goes on from what a killed worker left; each chain must come back once, and no other.
fn go_on(shot: &Shot, event_idx: bool) {
    let mut driver = Driver::new(SIZE);
    driver.put(KEPT.start, &shot.memory);
    driver.go_on_from_rings();
    let disk = Arc::new(FakeDisk::new(1 << 20));
    let (queue, inflight) = recover(&driver, shot.words.clone(), event_idx).unwrap();
    let served = Served::start(&driver, queue, &disk, inflight);

    let mut back: Vec<u16> = shot.outstanding.iter().map(|_| driver.used().0 as u16).collect();
    back.sort_unstable();
    let mut outstanding = shot.outstanding.clone();
    outstanding.sort_unstable();
    assert_eq!(back, outstanding);
    for head in back {
        assert_eq!(driver.byte(STATUS + u64::from(head / 3)), STATUS_OK);
    }
    wait_until("the driver to be told", || served.interrupts.signals() > 0);
    let queue = served.stop().queue;
    assert_eq!(queue.next_used(), driver.used_idx());
    assert_eq!(queue.next_avail(), queue.next_used());
    // All is given back: the one after us has nothing to start again.
    assert!(recover(&driver, shot.words.clone(), event_idx).unwrap().1.resubmit.is_empty());
}

#[test]
fn worker_killed_at_any_store_loses_nothing_and_does_nothing_again() {
    for (seed, start, event_idx) in [("killed", 0, false), ("killed_wrap", u16::MAX - 150, true)] {
        let shots = play(seed, start, event_idx);
        assert!(shots.iter().any(|shot| shot.outstanding.len() > 2));
        for shot in &shots {
            go_on(shot, event_idx);
        }
    }
}

/// Records with these chains taken, in this order; the ring's index stands at 0.
fn taken(heads: &[u16]) -> Words {
    let area = words(InflightQueue::words_for(SIZE));
    let mut records = InflightQueue::new(area.clone(), 0, SIZE).ok().unwrap();
    records.recover(0).unwrap();
    heads.iter().for_each(|head| records.taken(*head));
    area
}

#[test]
fn chains_in_flight_are_started_in_order_before_new_ones() {
    let mut driver = Driver::new(SIZE);
    for (n, chain) in [4, 0, 2, 1].into_iter().enumerate() {
        let head = lay_out(&driver, chain, READ);
        // The first three were taken in another order than they stand in the available ring by now.
        driver.offer(if n < 3 { 9 } else { head });
    }
    let disk = Arc::new(FakeDisk::new(1 << 20));
    let (queue, inflight) = recover(&driver, taken(&[12, 0, 6]), false).unwrap();
    let served = Served::start(&driver, queue, &disk, inflight);

    let heads: Vec<_> = (0..4).map(|_| driver.used().0).collect();
    assert_eq!(heads, [12, 0, 6, 3]);
    assert_eq!(disk.log(), ["read 2048+512", "read 0+512", "read 1024+512", "read 512+512"]);
    served.stop();
}

#[test]
fn driver_is_told_after_a_restart_though_it_did_not_ask() {
    for event_idx in [false, true] {
        let driver = Driver::new(SIZE);
        driver.set_avail_flags(1);
        driver.set_used_event(1000);
        let disk = Arc::new(FakeDisk::new(1 << 20));
        let (queue, inflight) = recover(&driver, taken(&[]), event_idx).unwrap();
        let served = Served::start(&driver, queue, &disk, inflight);
        wait_until("the interrupt", || served.interrupts.signals() == 1);
        served.stop();
    }
}

#[test]
fn stop_waits_for_chains_that_are_started_again() {
    let mut driver = Driver::new(SIZE);
    (0..CHAINS).for_each(|chain| driver.offer(chain * 3));
    for chain in 0..CHAINS {
        lay_out(&driver, chain, READ);
    }
    let disk = Arc::new(FakeDisk::new(1 << 20));
    let (queue, inflight) = recover(&driver, taken(&[0, 3, 6]), false).unwrap();
    let stop = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    let mut worker = BlockWorker::new(WorkerParts {
        queue,
        stop: stop.try_clone().unwrap(),
        memory: driver.memory.clone(),
        interrupt: Arc::<Interrupts>::default(),
        backend: Arc::new(Backend(disk.clone())),
        settings: Arc::new(BlockSettings::new("", false)),
        inflight: Some(inflight),
        dirty: None,
        patience: Duration::ZERO,
    });
    let mut engine = worker.backend.open_queue().unwrap();

    // Stopped before it could take anything: only what is in flight is its business.
    assert!(!worker.take(&mut *engine, false));

    assert_eq!(disk.in_flight.load(SeqCst), 3);
    assert_eq!(worker.queue.next_avail(), 3);
}

#[test]
fn hostile_records_give_back_what_they_name_and_break_nothing() {
    let mut driver = Driver::new(SIZE);
    // A chain that loops, one that lies outside memory, and one that nobody has laid out.
    driver.raw(1, DATA, 512, NEXT | WRITE, 1);
    driver.raw(2, u64::MAX, 512, WRITE, 0);
    (0..3).for_each(|_| driver.offer(9));
    let head = lay_out(&driver, 1, READ);
    driver.offer(head);
    let disk = Arc::new(FakeDisk::new(1 << 20));
    let (queue, mut inflight) = recover(&driver, taken(&[1, 2, 7]), true).unwrap();
    // What a transport would never find: heads beyond the queue, and one again and again.
    inflight.resubmit.extend([SIZE, u16::MAX]);
    inflight.resubmit.extend([1; 8]);
    let served = Served::start(&driver, queue, &disk, inflight);

    let back: Vec<_> = (0..12).map(|_| driver.used()).collect();
    assert_eq!(back[..3], [(1, 0), (2, 0), (7, 0)]);
    assert_eq!(back[11].0, u32::from(head));
    assert_eq!(driver.byte(STATUS + 1), STATUS_OK);
    assert!(!served.interrupts.broken());
    served.stop();
}

#[test]
fn records_ahead_of_the_available_ring_break_the_queue() {
    let driver = Driver::new(SIZE);
    let disk = Arc::new(FakeDisk::new(1 << 20));
    let (queue, inflight) = recover(&driver, taken(&[3]), false).unwrap();
    let served = Served::start(&driver, queue, &disk, inflight);
    wait_until("the queue to be found broken", || served.interrupts.broken());
    served.stop();
}

#[test]
fn queue_that_cannot_be_opened_fails_what_is_in_flight() {
    let mut driver = Driver::new(SIZE);
    let head = lay_out(&driver, 2, READ);
    driver.offer(head);
    let disk = Arc::new(FakeDisk::new(1 << 20));
    disk.open_fails.store(true, SeqCst);
    let records = taken(&[head]);
    let (queue, inflight) = recover(&driver, records.clone(), false).unwrap();
    let served = Served::start(&driver, queue, &disk, inflight);
    assert_eq!(driver.used().0, u32::from(head));
    assert_eq!(driver.byte(STATUS + 2), STATUS_IOERR);
    served.stop();
    assert!(recover(&driver, records, false).unwrap().1.resubmit.is_empty());
}
