//! A repair that a power cut ends: the image is no worse than it was, the guest reads what it read, and the next repair goes on.

use std::path::Path;

use super::dice;
use super::image::Shape;
use super::repair_test::{Victim, lines};
use crate::chain::OpenPolicy;
use crate::check::{CheckReport, FindingKind, Message, Repair};
use crate::disk::Disk;
use crate::io::sim::{Rng, World};
use crate::io::{Barrier, Buffer, OpenMode, Storage};
use crate::qcow2::check::Checker;
use crate::queue::Queue;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::{Arc, Mutex};

const IMAGE: &str = "/disk.qcow2";

fn world(seed: u64, image: &[u8]) -> World {
    let world = World::new(seed);
    world.put(Path::new(IMAGE), image.to_vec());
    world
}

/// Checks in the world, step by step as long as `goes_on`: none if it was not over by then.
fn check_while(
    world: &World,
    repair: Repair,
    mut goes_on: impl FnMut(u64) -> bool,
) -> Option<(CheckReport, Vec<Message>)> {
    let queue = Queue::new(world.driver().unwrap());
    let file = world.open(Path::new(IMAGE), OpenMode { write: true, ..OpenMode::default() }).unwrap();
    let messages: Arc<Mutex<Vec<Message>>> = Arc::default();
    let report: Arc<Mutex<Option<CheckReport>>> = Arc::default();
    let task = {
        let (queue, messages, report) = (queue.clone(), messages.clone(), report.clone());
        async move {
            let sink = Box::new(move |message| messages.lock().push(message));
            let mut checker = Checker::open(&queue, file, Path::new(IMAGE), sink).await.unwrap();
            *report.lock() = Some(checker.run(repair).await.unwrap());
        }
    };
    queue.spawn(task);
    let mut outcomes = Vec::new();
    for step in 0.. {
        if !goes_on(step) {
            break;
        }
        queue.turn(false, &mut outcomes).unwrap();
        if queue.live_tasks() == 0 {
            break;
        }
        world.step();
    }
    queue.shut_down();
    let report = *report.lock();
    let messages = std::mem::take(&mut *messages.lock());
    report.map(|report| (report, messages))
}

fn check(world: &World, repair: Repair) -> (CheckReport, Vec<Message>) {
    check_while(world, repair, |_| true).unwrap()
}

/// What the guest reads; each cluster for itself, as some may not be readable. None if the image cannot even be opened.
fn content(image: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let world = World::orderly();
    world.put(Path::new(IMAGE), image.to_vec());
    let policy = OpenPolicy {
        storage: Arc::new(world),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: "/".into(),
        ..OpenPolicy::host()
    };
    let spec = DiskSpec { readonly: true, ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) };
    let disk = Disk::open(&spec, &policy).ok()?;
    let mut queue = disk.queue().unwrap();
    let mut parts = Vec::new();
    for offset in (0..disk.size()).step_by(4096) {
        let len = 4096.min(disk.size() - offset) as usize;
        let buffer = Buffer::zeroed(len);
        queue.submit(0, Request::Read { offset, data: vec![buffer.seg(0, len)] });
        let mut events = Vec::new();
        queue.wait(Wait::Block, &mut events).unwrap();
        let ok = matches!(events[..], [Event::Done { result: Ok(()), .. }]);
        parts.push(ok.then(|| buffer.to_vec()));
    }
    drop(queue);
    disk.close().unwrap();
    Some(parts)
}

/// How much is wrong that could lose data. Not the COPIED flags: where one is set wrongly the refcount was too low before, which
/// is the same danger, and is raised first.
fn danger(messages: &[Message]) -> usize {
    let harmless = [FindingKind::Leak, FindingKind::Copied];
    let counts = |message: &&Message| matches!(message, Message::Found(f) if !harmless.contains(&f.kind));
    messages.iter().filter(counts).count()
}

/// A damaged image, and what the guest reads of it.
struct Damaged {
    image: Vec<u8>,
    content: Vec<Option<Vec<u8>>>,
    danger: usize,
}

impl Damaged {
    fn new(image: Vec<u8>) -> Option<Self> {
        let content = content(&image)?;
        let danger = danger(&check(&world(1, &image), Repair::None).1);
        Some(Self { image, content, danger })
    }

    fn same_content(&self, image: &[u8]) -> Result<(), String> {
        let now = content(image).ok_or("the image cannot be opened any more")?;
        let changed = self.content.iter().zip(now).position(|(before, now)| before.is_some() && *before != now);
        changed.map_or(Ok(()), |part| Err(format!("the guest's data at {:#x} changed", part * 4096)))
    }

    /// Cut off at one moment. Whether the repair was over by then.
    fn cut(&self, seed: u64, steps: u64, skipped: Option<Barrier>) -> Result<bool, String> {
        let world = world(seed, &self.image);
        world.skip_barrier(skipped);
        let over = check_while(&world, Repair::All, |step| step < steps).is_some();
        world.cut_power();
        world.skip_barrier(None);
        let left = world.content(Path::new(IMAGE)).unwrap();
        let (_, now) = check(&world, Repair::None);
        if danger(&now) > self.danger {
            let before = lines(&check(&self::world(seed, &self.image), Repair::None).1);
            return Err(format!("worse after {steps} steps:\n{}\nbefore:\n{before}", lines(&now)));
        }
        self.same_content(&left).map_err(|what| format!("after {steps} steps: {what}"))?;
        let (report, messages) = check(&world, Repair::All);
        if !report.is_clean() {
            return Err(format!("not repaired after {steps} steps:\n{}", lines(&messages)));
        }
        let repaired = world.content(Path::new(IMAGE)).unwrap();
        self.same_content(&repaired).map_err(|what| format!("in the end, after {steps} steps: {what}"))?;
        Ok(over)
    }
}

/// An image with something wrong in it that can be repaired wholly.
fn damaged(rng: &mut Rng, shape: &Shape) -> Damaged {
    let victim = Victim::new(shape, rng);
    loop {
        let mut image = victim.bytes.clone();
        if rng.one_in(3) {
            let (at, len) = victim.refcount_table;
            image[at..at + len].fill(0);
        }
        for _ in 0..2 + rng.below(4) {
            victim.damage(&mut image, rng);
        }
        // Guest data where an L2 table lies, so that it has to move; and where a bitmap's bits lie, which are given up. As QEMU's
        // repair leaves it: all of it counted.
        let (from, to) = (victim.l2s[0].0, victim.l2s[victim.l2s.len() - 1].0);
        let places = [Some(to as u64), victim.bitmap_cluster()];
        for (index, place) in places.into_iter().flatten().enumerate() {
            image[from + 64 + index * 8..from + 72 + index * 8].copy_from_slice(&place.to_be_bytes());
            let count = victim.refcount_blocks[0].0 + place as usize / 4096 * 2;
            if !rng.one_in(4) {
                image[count..count + 2].copy_from_slice(&[0, 2]);
            }
        }
        let world = world(1, &image);
        let opens = std::panic::catch_unwind(|| check(&world, Repair::All));
        if let Ok((report, _)) = opens
            && report.is_clean()
            && report.corruptions_fixed > 0
            && let Some(damaged) = Damaged::new(image)
        {
            return damaged;
        }
    }
}

#[test]
fn a_power_cut_in_a_repair_makes_nothing_worse() {
    let mut rng = dice("repair crash");
    for shape in [Shape::new(4096), Shape { snapshot: true, ..Shape::new(4096) }] {
        for _ in 0..2 {
            let damaged = damaged(&mut rng, &shape);
            let mut over = false;
            let mut steps = 5;
            while !over {
                over = damaged.cut(rng.next_u64(), steps, None).unwrap();
                steps += 1 + rng.below(10);
            }
        }
    }
}

/// Two L2 tables that are guest data, each where the other says, and one where it says itself; and one of them has an entry that
/// names the L1 table, so that it must change.
fn entangled(shape: &Shape, rng: &mut Rng) -> Damaged {
    let victim = Victim::new(shape, rng);
    let mut image = victim.bytes.clone();
    let (first, last) = (victim.l2s[0].0, victim.l2s[victim.l2s.len() - 1].0);
    let l1 = victim.header.l1_table_offset.get() as usize;
    for (table, places) in [(first, [last, first, l1]), (last, [first, l1, last])] {
        for (index, place) in places.into_iter().enumerate() {
            image[table + 64 + index * 8..table + 72 + index * 8].copy_from_slice(&(place as u64).to_be_bytes());
        }
    }
    Damaged::new(image).unwrap()
}

#[test]
fn guest_data_in_l2_tables_is_what_it_was_after_a_power_cut_in_a_repair() {
    let mut rng = dice("repair crash, tables");
    for shape in [Shape::new(4096), Shape { snapshot: true, ..Shape::new(4096) }] {
        let damaged = entangled(&shape, &mut rng);
        let mut steps = 5;
        while [0; 2].map(|_| damaged.cut(rng.next_u64(), steps, None).unwrap()) != [true; 2] {
            steps += 1 + rng.below(3);
        }
    }
}

/// After which steps of the repair there is such a flush.
fn moments(damaged: &Damaged, barrier: Barrier) -> Vec<u64> {
    let world = world(1, &damaged.image);
    let mut moments = Vec::new();
    check_while(&world, Repair::All, |step| {
        if world.flushes(barrier) > moments.len() as u64 {
            moments.push(step);
        }
        true
    });
    moments
}

/// With the barrier taken out, a cut soon after it does harm.
fn assert_needed(barrier: Barrier) {
    let mut rng = dice("repair barrier");
    for _ in 0..30 {
        let damaged = damaged(&mut rng, &Shape::new(4096));
        for moment in moments(&damaged, barrier) {
            for steps in moment..moment + 12 {
                if (0..4).any(|_| damaged.cut(rng.next_u64(), steps, Some(barrier)).is_err()) {
                    return;
                }
            }
        }
    }
    panic!("a repair does without {barrier:?}");
}

#[test]
fn a_repair_needs_the_barrier_before_the_mapping() {
    assert_needed(Barrier::BeforeMapping);
}

#[test]
fn a_rebuild_needs_its_barrier() {
    assert_needed(Barrier::NewRefTable);
}
