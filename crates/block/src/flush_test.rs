use super::*;
use crate::disk::block_on;
use crate::io::Storage;
use crate::io::sim::{Faults, World};
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
