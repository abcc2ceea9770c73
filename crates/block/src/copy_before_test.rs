use std::path::{Path, PathBuf};

use cowhand_qcow2::CreateParams;

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::DiskQueue;
use crate::io::sim::World;
use crate::io::{Buffer, Storage};
use crate::qcow2::create::create_image;
use crate::queue::Queue;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::testing::within_seconds;
use crate::{Overlay, Preallocation};

const CLUSTER: u64 = 65536;

struct Scene {
    world: World,
    disk: Arc<Disk>,
    guest: DiskQueue,
    copier: DiskQueue,
    control: std::rc::Rc<Queue>,
}

impl Scene {
    /// A disk of four clusters, the first of which holds ones.
    fn new() -> Self {
        let world = World::new(1);
        let storage: Arc<dyn Storage> = Arc::new(world.clone());
        let path = Path::new("/disk.qcow2");
        create_image(&storage, path, &CreateParams::new(4 * CLUSTER), Preallocation::Off).unwrap();
        let policy = OpenPolicy {
            storage,
            allow_dirs: Vec::new(),
            probe: false,
            temp_dir: PathBuf::from("/"),
            ..OpenPolicy::host()
        };
        let disk = Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy).unwrap();
        let (guest, copier) = (disk.queue().unwrap(), disk.queue().unwrap());
        let control = Queue::new(world.driver().unwrap());
        let mut scene = Self { world, disk, guest, copier, control };
        scene.write(0, 0, 1);
        assert!(scene.settle());
        scene
    }

    fn submit(&mut self, tag: u64, request: Request) {
        self.guest.submit(tag, request);
    }

    /// The memory that is written from lives as long as the test.
    fn write(&mut self, tag: u64, offset: u64, byte: u8) {
        let buffer: &'static Buffer = Box::leak(Box::new(Buffer::from_bytes(&[byte; 512])));
        self.submit(tag, Request::Write { offset, data: vec![buffer.seg(0, 512)] });
    }

    /// Lets everything go as far as it gets; whether all of the guest's requests were answered, well.
    fn settle(&mut self) -> bool {
        let mut events = Vec::new();
        for _ in 0..200 {
            self.world.step();
            self.control.turn(false, &mut Vec::new()).unwrap();
            self.guest.wait(Wait::Poll, &mut events).unwrap();
        }
        assert!(events.iter().all(|event| matches!(event, Event::Done { result: Ok(()), .. })), "{events:?}");
        self.guest.in_flight() == 0
    }

    fn change(&self, change: impl AsyncFnOnce(&Disk, &std::rc::Rc<Queue>) + 'static) {
        let (disk, control) = (self.disk.clone(), self.control.clone());
        self.control.spawn(async move { change(&disk, &control).await });
    }

    /// Copies one range: where it begins, and its first byte.
    fn copy(&mut self, copy: &CopyBeforeWrite) -> (u64, u8) {
        let range = copy.next(CLUSTER).unwrap();
        let buffer = Buffer::zeroed((range.end - range.start) as usize);
        self.copier.submit(0, Request::Read { offset: range.start, data: vec![buffer.seg(0, buffer.len())] });
        let mut events = Vec::new();
        while events.is_empty() {
            self.world.step();
            self.control.turn(false, &mut Vec::new()).unwrap();
            self.guest.wait(Wait::Poll, &mut Vec::new()).unwrap();
            self.copier.wait(Wait::Poll, &mut events).unwrap();
        }
        assert!(matches!(events[0], Event::Done { result: Ok(()), .. }));
        copy.copied(&range);
        (range.start / CLUSTER, buffer[0])
    }
}

#[test]
fn a_write_waits_for_the_copy_of_its_clusters_which_come_first() {
    let mut scene = Scene::new();
    let copy = scene.disk.copy_before_write(None).unwrap();
    assert_eq!((copy.size(), copy.granularity(), copy.progress()), (4 * CLUSTER, CLUSTER, (0, 4)));
    scene.write(1, 2 * CLUSTER, 7);
    scene.submit(2, Request::Flush);
    assert!(!scene.settle() && copy.is_urgent());
    assert_eq!(scene.copy(&copy), (2, 0));
    assert!(scene.settle() && !copy.is_urgent());
    scene.write(3, 2 * CLUSTER + 512, 7);
    assert!(scene.settle(), "what was copied is written at once");
    scene.submit(4, Request::WriteZeroes { offset: 0, len: 2 * CLUSTER, unmap: true });
    assert!(!scene.settle());
    assert_eq!(scene.copy(&copy), (0, 1));
    assert!(!scene.settle(), "half of it is not enough");
    assert_eq!(scene.copy(&copy), (1, 0));
    assert!(scene.settle());
    scene.submit(5, Request::Discard { offset: 3 * CLUSTER, len: CLUSTER });
    assert!(!scene.settle() && !copy.is_complete());
    assert_eq!(scene.copy(&copy), (3, 0));
    assert!(scene.settle() && copy.is_complete());
    assert_eq!(copy.next(CLUSTER), None);
    copy.finish().unwrap();
    assert!(scene.disk.hooks().is_none());
}

#[test]
fn what_could_not_be_copied_is_given_out_again_and_waited_for() {
    let mut scene = Scene::new();
    let copy = scene.disk.copy_before_write(None).unwrap();
    let range = copy.next(2 * CLUSTER).unwrap();
    assert_eq!(range, 0..2 * CLUSTER);
    scene.write(1, CLUSTER, 7);
    assert!(!scene.settle() && !copy.is_urgent(), "it is under way");
    copy.failed(&range);
    assert!(copy.is_urgent() && !scene.settle());
    assert_eq!((scene.copy(&copy), scene.copy(&copy)), ((1, 0), (0, 1)));
    assert!(scene.settle());
}

#[test]
fn a_copy_that_is_given_up_holds_nobody_up() {
    let mut scene = Scene::new();
    let copy = scene.disk.copy_before_write(None).unwrap();
    scene.write(1, 0, 7);
    assert!(!scene.settle());
    drop(copy);
    assert!(scene.settle());
    scene.write(2, CLUSTER, 7);
    assert!(scene.settle());
}

#[test]
fn several_copies_are_all_waited_for() {
    let mut scene = Scene::new();
    let first = scene.disk.copy_before_write(None).unwrap();
    scene.write(1, 0, 7);
    assert!(!scene.settle());
    let second = scene.disk.copy_before_write(Some(512)).unwrap();
    assert_eq!(scene.copy(&first), (0, 1));
    assert!(!scene.settle());
    assert_eq!(second.next(512), Some(0..512));
    second.copied(&(0..512));
    assert!(scene.settle());
}

#[test]
fn the_gate_closes_while_a_write_waits_for_a_copy() {
    within_seconds(|| {
        let mut scene = Scene::new();
        let copy = scene.disk.copy_before_write(None).unwrap();
        scene.write(1, 0, 7);
        assert!(!scene.settle());
        scene.disk.snapshot_to(Overlay::new(Path::new("/over"))).unwrap();
        scene.disk.create_snapshot("a").unwrap();
        scene.disk.resize(6 * CLUSTER).unwrap();
        assert!(!scene.settle());
        // What it reads is what was at its beginning, though it lies elsewhere now.
        assert_eq!(scene.copy(&copy), (0, 1));
        assert!(scene.settle());
        scene.write(2, 5 * CLUSTER, 7);
        assert!(scene.settle(), "what the disk did not have is not copied");
    });
}

#[test]
fn a_disk_that_shrinks_or_goes_back_waits_until_the_copy_has_what_is_lost() {
    let mut scene = Scene::new();
    scene.disk.create_snapshot("a").unwrap();
    scene.write(1, 3 * CLUSTER, 3);
    assert!(scene.settle());
    let copy = scene.disk.copy_before_write(None).unwrap();
    scene.change(async |disk, queue| disk.resize_on(queue, 3 * CLUSTER, Preallocation::Off).await.unwrap());
    assert!(scene.settle() && scene.control.live_tasks() == 1);
    assert_eq!(scene.copy(&copy), (3, 3));
    scene.settle();
    assert_eq!((scene.control.live_tasks(), scene.disk.size()), (0, 3 * CLUSTER));
    scene.change(async |disk, queue| disk.apply_snapshot_on(queue, "a").await.unwrap());
    for cluster in 0..3 {
        assert!(scene.settle() && scene.control.live_tasks() == 1);
        assert_eq!(scene.copy(&copy), (cluster, u8::from(cluster == 0)));
    }
    scene.settle();
    assert_eq!((scene.control.live_tasks(), scene.disk.size()), (0, 4 * CLUSTER));
}
