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

/// Checks in the world, at most so many steps long: none if it was not over by then.
fn check(world: &World, repair: Repair, steps: u64) -> Option<(CheckReport, Vec<Message>)> {
    let queue = Queue::new(world.driver().unwrap());
    let file = world.open(Path::new(IMAGE), OpenMode { write: true, direct: false }).unwrap();
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
    for _ in 0..steps {
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

/// What the guest reads; each cluster for itself, as some may not be readable.
fn content(image: &[u8]) -> Vec<Option<Vec<u8>>> {
    let world = World::orderly();
    world.put(Path::new(IMAGE), image.to_vec());
    let policy = OpenPolicy { storage: Arc::new(world), allow_dirs: Vec::new(), temp_dir: "/".into() };
    let spec = DiskSpec { readonly: true, ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) };
    let disk = Disk::open(&spec, &policy).unwrap();
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
    parts
}

/// How much is wrong that could lose data. Not the COPIED flags: where one is set wrongly the refcount was too low before, which
/// is the same danger, and is raised first.
fn danger(messages: &[Message]) -> usize {
    let harmless = [FindingKind::Leak, FindingKind::Copied];
    let counts = |message: &&Message| matches!(message, Message::Found(f) if !harmless.contains(&f.kind));
    messages.iter().filter(counts).count()
}

/// One image, cut off at one moment.
fn cut(image: &[u8], seed: u64, steps: u64, skipped: Option<Barrier>) -> Result<bool, String> {
    let (_, found) = check(&world(seed, image), Repair::None, u64::MAX).unwrap();
    let world = world(seed, image);
    world.skip_barrier(skipped);
    let over = check(&world, Repair::All, steps).is_some();
    world.cut_power();
    world.skip_barrier(None);
    let left = world.content(Path::new(IMAGE)).unwrap();
    let (_, now) = check(&world, Repair::None, u64::MAX).unwrap();
    if danger(&now) > danger(&found) {
        return Err(format!("worse after {steps} steps:\n{}\nbefore:\n{}", lines(&now), lines(&found)));
    }
    for (part, (before, after)) in content(image).iter().zip(content(&left)).enumerate() {
        if before.is_some() && *before != after {
            return Err(format!("the guest's data at {:#x} changed after {steps} steps", part * 4096));
        }
    }
    let (report, messages) = check(&world, Repair::All, u64::MAX).unwrap();
    if !report.is_clean() {
        return Err(format!("not repaired after {steps} steps:\n{}", lines(&messages)));
    }
    let after = content(&world.content(Path::new(IMAGE)).unwrap());
    if content(image).iter().zip(&after).any(|(before, after)| before.is_some() && before != after) {
        return Err(format!("the guest's data changed in the end, after {steps} steps"));
    }
    Ok(over)
}

/// An image with something wrong in it that can be repaired wholly.
fn damaged(rng: &mut Rng, shape: &Shape) -> Vec<u8> {
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
        // Guest data where an L2 table lies, so that something has to move.
        let (from, to) = (victim.l2s[0].0, victim.l2s[victim.l2s.len() - 1].0);
        image[from + 64..from + 72].copy_from_slice(&(to as u64).to_be_bytes());
        if !rng.one_in(3) {
            // As QEMU's repair leaves it: counted twice.
            let counts = victim.refcount_blocks[0].0;
            image[counts + to / 4096 * 2..counts + to / 4096 * 2 + 2].copy_from_slice(&[0, 2]);
        }
        let world = world(1, &image);
        let opens = std::panic::catch_unwind(|| check(&world, Repair::All, u64::MAX));
        if let Ok(Some((report, _))) = opens
            && report.is_clean()
            && report.corruptions_fixed > 0
        {
            return image;
        }
    }
}

#[test]
fn a_power_cut_in_a_repair_makes_nothing_worse() {
    let mut rng = dice("repair crash");
    for shape in [Shape::new(4096), Shape { snapshot: true, ..Shape::new(4096) }] {
        for _ in 0..2 {
            let image = damaged(&mut rng, &shape);
            let mut over = false;
            let mut steps = 5;
            while !over {
                over = cut(&image, rng.next_u64(), steps, None).unwrap();
                steps += 1 + rng.below(10);
            }
        }
    }
}

/// With the barrier taken out, some moment is found at which a cut does harm.
fn assert_needed(barrier: Barrier) {
    let mut rng = dice("repair barrier");
    for _ in 0..20 {
        let image = damaged(&mut rng, &Shape::new(4096));
        let (mut over, mut steps) = (false, 5);
        while !over {
            match cut(&image, rng.next_u64(), steps, Some(barrier)) {
                Ok(ended) => over = ended,
                Err(_) => return,
            }
            steps += 1;
        }
    }
    panic!("a repair does without {barrier:?}");
}

#[test]
fn a_repair_needs_the_barrier_before_the_mapping() {
    assert_needed(Barrier::BeforeMapping);
}

#[test]
fn a_repair_needs_the_barrier_after_the_mapping() {
    assert_needed(Barrier::Mapping);
}

#[test]
fn a_rebuild_needs_its_barrier() {
    assert_needed(Barrier::NewRefTable);
}
