//! Images that were not closed (sharp edge 12): QEMU leaves them so with lazy refcounts (edge 34) when it is killed.

use std::fs;
use std::path::{Path, PathBuf};

use cowhand_qcow2::{Header, Incompatible};

use super::check_test::ours;
use super::dice;
use super::guest::{ask, policy};
use super::qemu::{self, text};
use crate::chain::OpenPolicy;
use crate::check::{FindingKind, Message, Repair};
use crate::disk::Disk;
use crate::io::host::Engine;
use crate::io::sim::World;
use crate::io::{Barrier, Buffer, Storage};
use crate::qcow2::check::Checker;
use crate::queue::Queue;
use crate::request::Request;
use crate::spec::{DiskSpec, Format};
use crate::sync::{Arc, Mutex};

/// An image that QEMU wrote to and did not close.
fn left_dirty(options: &str, snapshot: bool) -> (tempfile::TempDir, PathBuf) {
    left_dirty_after(options, |path| {
        if snapshot {
            qemu::img(&["snapshot", "-c", "before", text(path)]);
        }
    })
}

/// The same, with something done to the image between.
fn left_dirty_after(options: &str, between: impl FnOnce(&Path)) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let options = format!("lazy_refcounts=on,{options}");
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "8M"]);
    qemu::io(&path, &["write -q -P 1 0 1M".into()]);
    between(&path);
    kill_qemu(&path, &["write -q -P 2 512k 2M", "write -q -P 3 5M 1M", "discard -q 2M 128k"]);
    assert!(is_dirty(&fs::read(&path).unwrap()), "QEMU cleaned up behind itself");
    (dir, path)
}

/// Has QEMU write to an image, and kills it.
fn kill_qemu(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.extend(["-c", "sigraise 9", text(path)]);
    assert_eq!(qemu::run("qemu-io", &args).status, -1, "qemu-io was not killed");
}

fn header(image: &[u8]) -> Header {
    Header::parse(image, image.len() as u64).unwrap()
}

fn is_dirty(image: &[u8]) -> bool {
    header(image).incompatible.contains(Incompatible::DIRTY)
}

fn spec(path: &Path) -> DiskSpec {
    DiskSpec::new(path, Format::Qcow2)
}

fn open(spec: &DiskSpec) -> Arc<Disk> {
    Disk::open(spec, &policy(Engine::Auto)).unwrap()
}

fn sorts() -> [(&'static str, bool); 4] {
    [
        ("cluster_size=65536", false),
        ("cluster_size=4096", true),
        ("cluster_size=65536,refcount_bits=64", true),
        ("cluster_size=16384,extended_l2=on,refcount_bits=8", false),
    ]
}

#[test]
fn edge_12_an_image_that_qemu_left_dirty_has_its_references_counted_before_it_is_written() {
    for (options, snapshot) in sorts() {
        let (_dir, path) = left_dirty(options, snapshot);
        let stale = ours(&path, Repair::None).unwrap().0;
        assert!(stale.corruptions > 0, "{options}: no refcount was postponed: nothing is tested");
        let content = qemu::content(&path);

        // Nothing is done for a reader.
        let before = fs::read(&path).unwrap();
        open(&DiskSpec { readonly: true, ..spec(&path) }).close().unwrap();
        open(&DiskSpec { ephemeral: true, ..spec(&path) }).close().unwrap();
        assert!(fs::read(&path).unwrap() == before, "{options}: a reader wrote");

        let disk = open(&spec(&path));
        let now = fs::read(&path).unwrap();
        assert!(!is_dirty(&now), "{options}");
        assert!(header(&now).has_lazy_refcounts(), "{options}: lazy_refcounts is gone");
        let mut queue = disk.queue().unwrap();
        let buffer = Buffer::from_bytes(&[9; 1 << 20]);
        ask(&mut queue, Request::Write { offset: 3 << 20, data: vec![buffer.seg(0, 1 << 20)] }).unwrap();
        drop(queue);
        disk.close().unwrap();
        qemu::assert_clean(&path);
        let mut expected = content;
        expected[3 << 20..4 << 20].fill(9);
        assert!(qemu::content(&path) == expected, "{options}: the data changed");
    }
}

#[test]
fn edge_34_lazy_refcounts_stay_on_when_the_disk_changes_as_a_whole_and_nothing_is_left_dirty() {
    let (_dir, path) = left_dirty("cluster_size=4096", true);
    let disk = open(&spec(&path));
    disk.resize(12 << 20).unwrap();
    let new = disk.create_snapshot("ours").unwrap();
    disk.apply_snapshot("before").unwrap();
    disk.delete_snapshot(&new.id).unwrap();
    disk.resize(4 << 20).unwrap();
    let image = fs::read(&path).unwrap();
    assert!(header(&image).has_lazy_refcounts() && !is_dirty(&image));
    disk.close().unwrap();
    qemu::assert_clean(&path);
    // The other way round: QEMU finds its wish as it was, and goes on.
    kill_qemu(&path, &["write -q -P 4 0 1M"]);
    assert!(is_dirty(&fs::read(&path).unwrap()));
    open(&spec(&path)).close().unwrap();
    qemu::assert_clean(&path);
}

#[test]
fn edge_12_and_40_bitmaps_that_were_in_use_do_not_keep_a_dirty_image_from_being_opened() {
    let (_dir, path) = left_dirty_after("cluster_size=65536", |path| {
        qemu::img(&["bitmap", "--add", text(path), "one"]);
    });
    let content = qemu::content(&path);
    open(&spec(&path)).close().unwrap();
    let image = fs::read(&path).unwrap();
    assert!(!is_dirty(&image));
    assert_eq!(ours(&path, Repair::None).unwrap().0.corruptions, 0);
    assert!(qemu::content(&path) == content);
}

const IMAGE: &str = "/disk.qcow2";

/// Opens the disk for writing, step by step as long as `steps` last; whether that was enough.
fn open_for(world: &World, steps: u64) -> bool {
    let queue = Queue::new(world.driver().unwrap());
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: "/".into(),
        ..OpenPolicy::host()
    };
    let opened: Arc<Mutex<bool>> = Arc::default();
    let task = {
        let (queue, opened) = (queue.clone(), opened.clone());
        async move {
            let disk = Disk::open_on(&queue, &spec(Path::new(IMAGE)), &policy).await.unwrap();
            disk.forget();
            *opened.lock() = true;
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
    *opened.lock()
}

/// What is wrong with the counts of an image.
fn miscounted(image: &[u8]) -> usize {
    let world = World::orderly();
    world.put(Path::new(IMAGE), image.to_vec());
    let queue = Queue::new(world.driver().unwrap());
    let file = world.open(Path::new(IMAGE), crate::io::OpenMode::default()).unwrap();
    let wrong: Arc<Mutex<usize>> = Arc::default();
    let task = {
        let (queue, wrong) = (queue.clone(), wrong.clone());
        async move {
            let sink = Box::new(move |message| {
                let counts = matches!(message, Message::Found(f) if f.kind != FindingKind::Leak);
                *wrong.lock() += usize::from(counts);
            });
            let mut checker = Checker::open(&queue, file, Path::new(IMAGE), sink).await?;
            checker.run(Repair::None).await
        }
    };
    crate::disk::block_on(&queue, task).unwrap();
    *wrong.lock()
}

/// The process dies after so many steps of the opening, its successor with the power after so many others. The bit may be gone
/// only from an image whose counts are right.
fn die_and_cut(image: &[u8], seed: u64, steps: [u64; 2], skipped: Option<Barrier>) -> Result<bool, String> {
    let world = World::new(seed);
    world.put(Path::new(IMAGE), image.to_vec());
    world.skip_barrier(skipped);
    open_for(&world, steps[0]);
    world.kill_process();
    let over = open_for(&world, steps[1]);
    world.cut_power();
    let left = world.content(Path::new(IMAGE)).unwrap();
    if !is_dirty(&left) && miscounted(&left) > 0 {
        return Err(format!("after {steps:?} steps (seed {seed}) the image is called clean, and is not"));
    }
    Ok(over)
}

#[test]
fn edge_12_a_death_and_a_power_cut_while_references_are_counted_never_leave_stale_counts_without_the_bit() {
    let mut rng = dice("dirty");
    for (options, snapshot) in [("cluster_size=65536", false), ("cluster_size=4096", true)] {
        let (_dir, path) = left_dirty(options, snapshot);
        let image = fs::read(&path).unwrap();
        let mut overs = 0;
        for _ in 0..150 {
            let steps = [rng.below(60), rng.below(60)];
            overs += u64::from(die_and_cut(&image, rng.next_u64(), steps, None).unwrap());
        }
        assert!(overs > 10 && overs < 145, "{options}: {overs} of 150 got to the end");
    }
}

/// Whether the process can die after so many steps with all counts right, as far as its successor sees, under the bit.
fn dies_before_the_bit_goes(image: &[u8], seed: u64, steps: u64) -> bool {
    let world = World::new(seed);
    world.put(Path::new(IMAGE), image.to_vec());
    open_for(&world, steps);
    world.kill_process();
    let left = world.content(Path::new(IMAGE)).unwrap();
    is_dirty(&left) && miscounted(&left) == 0
}

#[test]
fn edge_12_the_bit_goes_only_behind_a_barrier() {
    let mut rng = dice("dirty barrier");
    let (_dir, path) = left_dirty("cluster_size=65536", true);
    ours(&path, Repair::All).unwrap();
    let mut image = fs::read(&path).unwrap();
    // Clusters that a snapshot shares count as if it did not: such counts are raised where they are. Those that were 0 would be
    // written anew, and the header names them only when they are durable.
    let at = header(&image).refcount_table_offset.get() as usize;
    let block = u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) as usize;
    let counts = image[block..block + 65536].as_chunks_mut::<2>().0;
    counts.iter_mut().filter(|count| **count == [0, 2]).for_each(|count| *count = [0, 1]);
    image[79] |= 1;
    assert!(miscounted(&image) > 0);
    for _ in 0..300 {
        let seed = rng.next_u64();
        let Some(first) = (0..80).find(|&steps| dies_before_the_bit_goes(&image, seed, steps)) else { continue };
        let second = |steps| die_and_cut(&image, seed, [first, steps], Some(Barrier::BeforeHeader));
        if (0..80).any(|steps| second(steps).is_err()) {
            return;
        }
    }
    panic!("the dirty bit goes without a barrier, and no harm is done");
}
