use std::path::{Path, PathBuf};

use cowhand_qcow2::CreateParams;

use crate::chain::OpenPolicy;
use crate::disk::{Disk, DiskQueue};
use crate::io::sim::World;
use crate::io::{Buffer, Storage};
use crate::queue::Queue;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;
use crate::testing::run_cut_short;
use crate::{Preallocation, create_image};

const IMAGE: &str = "/disk.qcow2";

fn disk(world: &World) -> Arc<Disk> {
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    create_image(&storage, Path::new(IMAGE), &CreateParams::new(1 << 20), Preallocation::Off).unwrap();
    let policy = OpenPolicy {
        storage,
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: PathBuf::from("/"),
        ..OpenPolicy::host()
    };
    Disk::open(&DiskSpec::new(Path::new(IMAGE), Format::Qcow2), &policy).unwrap()
}

fn submit(queue: &mut DiskQueue, tag: u64, write: bool, offset: u64, buffer: &Buffer) {
    let data = vec![buffer.seg(0, buffer.len())];
    queue.submit(tag, if write { Request::Write { offset, data } } else { Request::Read { offset, data } });
}

/// The answers that are there: tags, and whether all is well.
fn answers(queue: &mut DiskQueue) -> Vec<(u64, bool)> {
    answers_by(queue, Wait::Poll)
}

fn answers_by(queue: &mut DiskQueue, wait: Wait) -> Vec<(u64, bool)> {
    let mut events = Vec::new();
    queue.wait(wait, &mut events).unwrap();
    let answer = |event| match event {
        Event::Done { tag, result, .. } => (tag, result.is_ok()),
        Event::Ready { .. } => panic!("nothing is watched"),
    };
    events.into_iter().map(answer).collect()
}

#[test]
fn requests_that_come_during_a_change_wait_and_are_checked_against_the_new_size() {
    let world = World::new(1);
    let disk = disk(&world);
    let mut queue = disk.queue().unwrap();
    let control = Queue::new(world.driver().unwrap());
    let (buffer, flush) = (Buffer::from_bytes(&[3; 512]), 9);
    // In flight before: it ends first.
    submit(&mut queue, 1, true, 0, &buffer);
    let task = {
        let (disk, control) = (disk.clone(), control.clone());
        async move { disk.resize_on(&control, 2 << 20, Preallocation::Off).await.unwrap() }
    };
    control.spawn(task);
    control.turn(false, &mut Vec::new()).unwrap();
    submit(&mut queue, 2, true, (2 << 20) - 512, &buffer);
    submit(&mut queue, 3, true, 2 << 20, &buffer);
    queue.submit(flush, Request::Flush);
    let mut order = Vec::new();
    while queue.in_flight() > 0 {
        world.step();
        control.turn(false, &mut Vec::new()).unwrap();
        let ended = answers(&mut queue);
        if !ended.is_empty() && ended[0].0 != 1 {
            assert_eq!(control.live_tasks(), 0, "served before the change was over: {ended:?}");
        }
        order.extend(ended);
    }
    assert_eq!(order[0], (1, true));
    order.sort_unstable();
    assert_eq!(order, [(1, true), (2, true), (3, false), (flush, true)]);
}

#[test]
fn a_queue_that_was_idle_during_a_change_sees_it() {
    let world = World::orderly();
    let disk = disk(&world);
    let mut queue = disk.queue().unwrap();
    let (old, new, read) = (Buffer::from_bytes(&[1; 512]), Buffer::from_bytes(&[2; 512]), Buffer::zeroed(512));
    submit(&mut queue, 0, true, 0, &old);
    assert_eq!(answers_by(&mut queue, Wait::Block), [(0, true)]);
    disk.create_snapshot("a").unwrap();
    submit(&mut queue, 1, true, 0, &new);
    assert_eq!(answers_by(&mut queue, Wait::Block), [(1, true)]);
    disk.apply_snapshot("a").unwrap();
    submit(&mut queue, 2, false, 0, &read);
    assert_eq!(answers_by(&mut queue, Wait::Block), [(2, true)]);
    assert!(read[..] == old[..]);
}

/// A snapshot is taken while every operation from the step `faulty` on fails. Whether requests are served afterwards.
fn snapshot_cut_short(faulty: u64) -> bool {
    let world = World::new(faulty);
    let disk = disk(&world);
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::from_bytes(&[3; 512]);
    submit(&mut queue, 0, true, 0, &buffer);
    while queue.in_flight() > 0 {
        world.step();
        answers(&mut queue);
    }
    run_cut_short(&world, faulty, |control| {
        let disk = disk.clone();
        async move { drop(disk.create_snapshot_on(&control, "a").await) }
    });
    submit(&mut queue, 1, true, 512, &buffer);
    let mut ended = Vec::new();
    while queue.in_flight() > 0 {
        world.step();
        ended.extend(answers(&mut queue));
    }
    drop(queue);
    let served = ended == [(1, true)];
    assert_eq!(disk.close().is_ok(), served, "a disk that serves nobody writes nothing either");
    drop(disk);
    crate::torture::assert_sound(&world.content(Path::new(IMAGE)).unwrap());
    served
}

#[test]
fn a_disk_that_cannot_be_read_again_after_a_change_serves_and_writes_nothing_more() {
    let served: Vec<bool> = (0..80).map(snapshot_cut_short).collect();
    // Early on nothing was changed yet; late, all is over.
    assert!(served[0] && served[79] && served.contains(&false), "{served:?}");
}
