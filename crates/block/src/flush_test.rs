use super::*;
use crate::chain::OpenPolicy;
use crate::disk::{Disk, block_on};
use crate::io::sim::{Faults, World};
use crate::io::{Buffer, Storage};
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

const PATH: &str = "/file";

fn flush(world: &World, flushes: &Arc<Flushes>) -> Result<()> {
    let queue = Queue::new(world.driver().unwrap());
    let file = world.open(Path::new(PATH), Default::default()).unwrap();
    let task = {
        let (queue, flushes) = (queue.clone(), flushes.clone());
        async move { flushes.flush(&queue, &file, Path::new(PATH), Barrier::Data).await }
    };
    block_on(&queue, task)
}

fn world(fails: u32) -> World {
    let world = World::orderly();
    world.put(Path::new(PATH), vec![0; 512]);
    world.set_faults(Faults { flush: fails, ..Faults::default() });
    world
}

#[test]
fn after_a_flush_that_failed_none_is_tried_any_more() {
    let world = world(1);
    let flushes = Arc::new(Flushes::new(false));
    let error = flush(&world, &flushes).unwrap_err().to_string();
    assert!(error.starts_with("/file: flush failed: "), "{error}");
    world.set_faults(Faults::default());
    let error = flush(&world, &flushes).unwrap_err().to_string();
    assert!(error.starts_with("/file: an earlier flush of this file failed"), "{error}");
    assert!(flushes.check(Path::new(PATH)).is_err());
    assert_eq!(world.flushes(Barrier::Data), 1);
}

#[test]
fn flushes_that_are_skipped_neither_happen_nor_fail() {
    let world = world(1);
    let flushes = Arc::new(Flushes::new(true));
    flush(&world, &flushes).unwrap();
    flushes.check(Path::new(PATH)).unwrap();
    assert_eq!(world.flushes(Barrier::Data), 0);
}

/// A sector is written to a raw disk, flushed from two queues side by side, and the power fails. What a flush that succeeded promised
/// must be there, also when the other one failed.
fn lost_after_a_flush(seed: u64) -> bool {
    let world = World::new(seed);
    world.put(Path::new(PATH), vec![0; 512]);
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: "/".into(),
        ..OpenPolicy::host()
    };
    let disk = Disk::open(&DiskSpec::new(Path::new(PATH), Format::Raw), &policy).unwrap();
    let mut queues = [disk.queue().unwrap(), disk.queue().unwrap()];
    let buffer = Buffer::from_bytes(&[1; 512]);
    let mut events = Vec::new();
    queues[0].submit(0, Request::Write { offset: 0, data: vec![buffer.seg(0, 512)] });
    while events.is_empty() {
        world.step();
        queues[0].wait(Wait::Poll, &mut events).unwrap();
    }
    world.set_faults(Faults { flush: 2, ..Faults::default() });
    queues.iter_mut().for_each(|queue| queue.submit(1, Request::Flush));
    let mut ended = Vec::new();
    while ended.len() < 2 {
        world.step();
        queues.iter_mut().for_each(|queue| queue.wait(Wait::Poll, &mut ended).unwrap());
    }
    let promised = ended.iter().any(|event| matches!(event, Event::Done { result: Ok(()), .. }));
    world.cut_power();
    disk.forget();
    promised && world.content(Path::new(PATH)).unwrap() != [1; 512]
}

#[test]
fn of_two_flushes_side_by_side_none_promises_what_the_other_lost() {
    assert!(!(0..500).any(lost_after_a_flush));
    Mutation::switch(Some(Mutation::FlushesSideBySide));
    let noticed = (0..500).any(lost_after_a_flush);
    Mutation::switch(None);
    assert!(noticed);
}
