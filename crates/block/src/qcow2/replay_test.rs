use std::sync::atomic::{AtomicU64, Ordering};

use cowhand_qcow2::{CompressedRange, CreateParams, HostOffset};

use super::*;
use crate::chain::OpenPolicy;
use crate::disk::{Disk, block_on};
use crate::io::sim::{Rng, World};
use crate::io::{Buffer, Storage};
use crate::journal::{Journal, SharedWords, Survival};
use crate::node::Node;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;
use crate::torture::assert_unleaked;
use crate::{Preallocation, create_image};

const IMAGE: &str = "/disk.qcow2";
const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;

fn words() -> SharedWords {
    Arc::new((0..16 + 64 * 4).map(|_| AtomicU64::new(0)).collect::<Vec<_>>())
}

fn copy(words: &SharedWords) -> SharedWords {
    let copies = (**words).as_ref().iter().map(|word| AtomicU64::new(word.load(Ordering::SeqCst)));
    Arc::new(copies.collect::<Vec<_>>())
}

fn policy(world: &World, words: &SharedWords) -> OpenPolicy {
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: vec!["/".into()],
        temp_dir: "/".into(),
        survival: Survival::Journal(words.clone()),
        ..OpenPolicy::host()
    }
}

fn spec() -> DiskSpec {
    DiskSpec::new(Path::new(IMAGE), Format::Qcow2)
}

fn open(world: &World, words: &SharedWords) -> Result<Arc<Disk>> {
    Disk::open(&spec(), &policy(world, words))
}

fn ask(disk: &Arc<Disk>, request: Request) {
    let mut queue = disk.queue().unwrap();
    queue.submit(0, request);
    let mut events = Vec::new();
    queue.wait(Wait::Block, &mut events).unwrap();
    assert!(matches!(events.pop(), Some(Event::Done { result: Ok(()), .. })));
}

fn write(disk: &Arc<Disk>, cluster: u64, byte: u8) {
    let buffer = Buffer::from_bytes(&[byte; CLUSTER as usize]);
    ask(disk, Request::Write { offset: cluster * CLUSTER, data: vec![buffer.seg(0, buffer.len())] });
}

fn compress(disk: &Arc<Disk>, cluster: u64, byte: u8) {
    let buffer = Buffer::from_bytes(&[byte; CLUSTER as usize]);
    ask(disk, Request::WriteCompressed { offset: cluster * CLUSTER, data: vec![buffer.seg(0, buffer.len())] });
}

/// The byte that fills a cluster.
fn read(disk: &Arc<Disk>, cluster: u64) -> u8 {
    let buffer = Buffer::from_bytes(&[0xee; CLUSTER as usize]);
    ask(disk, Request::Read { offset: cluster * CLUSTER, data: vec![buffer.seg(0, buffer.len())] });
    assert!(buffer.iter().all(|byte| *byte == buffer[0]));
    buffer[0]
}

/// The process dies.
fn die(world: &World, disk: Arc<Disk>) {
    disk.forget();
    drop(disk);
    world.kill_process();
}

fn world_of(params: &CreateParams) -> World {
    let world = World::orderly();
    let storage: Arc<dyn Storage> = Arc::new(world.clone());
    create_image(&storage, Path::new(IMAGE), params, Preallocation::Off).unwrap();
    world
}

/// A world with an image of which cluster 0 holds data and cluster 1 compressed data.
fn world() -> World {
    let world = world_of(&CreateParams::new(64 << 20));
    let disk = open(&world, &words()).unwrap();
    write(&disk, 0, 1);
    compress(&disk, 1, 2);
    disk.close().unwrap();
    world
}

fn content(world: &World) -> Vec<u8> {
    world.content(Path::new(IMAGE)).unwrap()
}

/// The entry of a cluster in the image's file.
fn entry(world: &World, cluster: u64) -> u64 {
    let (image, bits) = (content(world), |value: u64| value & 0x00ff_ffff_ffff_fe00);
    let number = |at: u64| u64::from_be_bytes(image[at as usize..at as usize + 8].try_into().unwrap());
    number(bits(number(bits(number(40)))) + cluster * 8)
}

/// Words of a process that died when it had noted these records.
fn left_by(world: &World, records: &[Record]) -> SharedWords {
    let words = words();
    let journal = Journal::new(&words, Path::new(IMAGE)).unwrap();
    journal.start(world.open(Path::new(IMAGE), Default::default()).unwrap().traits().identity);
    journal.ring().append(records);
    words
}

fn end(world: &World) -> u64 {
    (content(world).len() as u64).div_ceil(CLUSTER) * CLUSTER
}

#[track_caller]
fn refused(world: &World, words: &SharedWords, what: &str) {
    let before = content(world);
    let error = open(world, words).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains(what), "{error}");
    assert_eq!(content(world), before, "{what}: the image was written to");
}

#[test]
fn what_was_acknowledged_is_there_and_nothing_leaks() {
    for params in [
        CreateParams::new(64 << 20),
        CreateParams { version: 2, ..CreateParams::new(64 << 20) },
        CreateParams { extended_l2: true, ..CreateParams::new(64 << 20) },
        CreateParams { data_file: Some(b"data".to_vec()), ..CreateParams::new(64 << 20) },
        CreateParams { data_file: Some(b"data".to_vec()), data_file_raw: true, ..CreateParams::new(64 << 20) },
    ] {
        let (world, words) = (world_of(&params), words());
        let packs = params.data_file.is_none();
        let disk = open(&world, &words).unwrap();
        (0..8).for_each(|cluster| write(&disk, cluster, 1));
        ask(&disk, Request::Flush);
        (4..12).for_each(|cluster| write(&disk, cluster, 2));
        ask(&disk, Request::Discard { offset: 0, len: 2 * CLUSTER });
        ask(&disk, Request::WriteZeroes { offset: 5 * CLUSTER, len: CLUSTER, unmap: true });
        if packs {
            compress(&disk, 20, 5);
            compress(&disk, 21, 6);
        }
        die(&world, disk);
        let disk = open(&world, &words).unwrap();
        let found: Vec<u8> = (0..12).map(|cluster| read(&disk, cluster)).collect();
        assert_eq!(found, [0, 0, 1, 1, 2, 0, 2, 2, 2, 2, 2, 2], "{params:?}");
        assert!(!packs || (read(&disk, 20), read(&disk, 21)) == (5, 6));
        disk.close().unwrap();
        assert_unleaked(&content(&world));
    }
}

#[test]
fn second_replay_of_the_same_records_changes_nothing() {
    let (world, words) = (world(), words());
    let disk = open(&world, &words).unwrap();
    write(&disk, 0, 7);
    write(&disk, 9, 8);
    compress(&disk, 10, 9);
    ask(&disk, Request::Discard { offset: CLUSTER, len: CLUSTER });
    die(&world, disk);
    let again = copy(&words);
    die(&world, open(&world, &words).unwrap());
    let once = content(&world);
    let disk = open(&world, &again).unwrap();
    assert_eq!([0, 1, 9, 10].map(|cluster| read(&disk, cluster)), [7, 0, 8, 9]);
    disk.close().unwrap();
    assert!(content(&world) == once);
    assert_unleaked(&once);
}

#[test]
fn what_leaked_without_a_record_is_freed() {
    let (world, words) = (world(), words());
    let disk = open(&world, &words).unwrap();
    let queue = Queue::new(world.driver().unwrap());
    let (inner, node) = (queue.clone(), disk.node());
    block_on(&queue, async move {
        let Node::Qcow2(image) = &*node else { panic!("a qcow2 image") };
        image.allocate(&inner, 3).await?;
        image.commit(&inner, crate::qcow2::commit::Until::Durable).await
    })
    .unwrap();
    die(&world, disk);
    open(&world, &words).unwrap().close().unwrap();
    assert_unleaked(&content(&world));
}

#[test]
fn journal_that_is_full_makes_room_by_commits() {
    let (world, words) = (world(), words());
    let disk = open(&world, &words).unwrap();
    // Twice as many as there is room for, none beside another.
    (0..128).for_each(|i| write(&disk, 2 + i * 2, i as u8));
    die(&world, disk);
    let disk = open(&world, &words).unwrap();
    (0..128).for_each(|i| assert_eq!(read(&disk, 2 + i * 2), i as u8));
}

#[test]
fn closed_disk_leaves_nothing_to_replay() {
    let (world, words) = (world(), words());
    let disk = open(&world, &words).unwrap();
    write(&disk, 3, 3);
    disk.close().unwrap();
    assert!(Journal::new(&words, Path::new(IMAGE)).unwrap().left(Path::new(IMAGE)).unwrap().is_none());
    // Another image may have them.
    world.put(Path::new("/other"), vec![0; 4096]);
    let other = DiskSpec::new(Path::new("/other"), Format::Raw);
    assert!(Disk::open(&other, &policy(&world, &words)).is_ok());
}

#[test]
fn memory_of_another_image_is_refused() {
    let (world, words) = (world(), words());
    die(&world, open(&world, &words).unwrap());
    world.put(Path::new(IMAGE), content(&world));
    refused(&world, &words, "belongs to another image");
    world.put(Path::new("/raw"), vec![0; 4096]);
    let raw = DiskSpec::new(Path::new("/raw"), Format::Raw);
    let error = Disk::open(&raw, &policy(&world, &words)).map(drop).unwrap_err();
    assert!(error.to_string().contains("belongs to another image"), "{error}");
}

#[test]
fn disk_that_would_not_show_what_was_left_is_refused() {
    let (world, words) = (world(), words());
    die(&world, open(&world, &words).unwrap());
    for (spec, what) in [
        (DiskSpec { readonly: true, ..spec() }, "without readonly=on"),
        (DiskSpec { ephemeral: true, ..spec() }, "throw-away overlay"),
    ] {
        let error = Disk::open(&spec, &policy(&world, &words)).map(drop).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn raw_disk_has_no_records() {
    let world = world();
    world.put(Path::new(IMAGE), vec![0; 1 << 20]);
    let words = left_by(&world, &[[0, 1, 0, 0]]);
    let raw = DiskSpec::new(Path::new(IMAGE), Format::Raw);
    let error = Disk::open(&raw, &policy(&world, &words)).map(drop).unwrap_err();
    assert!(error.to_string().contains("a raw disk needs no records"), "{error}");
    assert!(Disk::open(&raw, &policy(&world, &left_by(&world, &[]))).is_ok());
}

#[test]
fn records_that_do_not_fit_the_image_are_refused_and_nothing_is_written() {
    let world = world();
    let (data, packed) = (entry(&world, 0), entry(&world, 1));
    let packed_cluster = packed & 0x3fff_ffff_ffff & !(CLUSTER - 1);
    // A cluster that nothing uses, in the file.
    let disk = open(&world, &words()).unwrap();
    write(&disk, 5, 5);
    disk.close().unwrap();
    let free = entry(&world, 5) & !COPIED;
    let disk = open(&world, &words()).unwrap();
    ask(&disk, Request::Discard { offset: 5 * CLUSTER, len: CLUSTER });
    disk.close().unwrap();
    assert!(free + CLUSTER <= end(&world));
    let compressed = |host: u64, len: u64| {
        let geometry = cowhand_qcow2::Header::parse(&content(&world), end(&world)).unwrap().geometry();
        Stored::compressed(&geometry, CompressedRange { host: HostOffset::new(host), len }).unwrap().entry
    };
    let in_use = "a cluster is in use";
    let wrongs: Vec<(&str, Vec<Record>)> = vec![
        ("past the end of the disk", vec![[1 << 40, 1, 0, 0]]),
        ("breaks the format's rules", vec![[9, 1, COPIED | 0x50200, 0]]),
        // Header, tables, refcounts, and another cluster's data.
        (in_use, vec![[9, 1, COPIED | CLUSTER, 0]]),
        (in_use, vec![[9, 1, COPIED | (2 * CLUSTER), 0]]),
        (in_use, vec![[9, 1, COPIED | (3 * CLUSTER), 0]]),
        (in_use, vec![[9, 1, data, 0]]),
        (in_use, vec![[9, 1, COPIED | packed_cluster, 0]]),
        (in_use, vec![[9, 1, data | 1, 0]]),
        // Its own place, and in the same run another's.
        (in_use, vec![[0, 2, data - CLUSTER, 0]]),
        ("past the end of the file", vec![[9, 1, COPIED | end(&world), 0]]),
        ("past the end of the file", vec![[9, 1, COPIED | 1 << 50, 0]]),
        ("past the end of the file", vec![[9, 1, compressed(end(&world), 512), 0]]),
        ("named twice", vec![[9, 1, COPIED | free, 0], [10, 1, COPIED | free, 0]]),
        ("named twice", vec![[9, 1, COPIED | free, 0], [10, 1, compressed(free, 512), 0]]),
        // Into data that is not compressed.
        (in_use, vec![[9, 1, compressed(data & !COPIED, 512), 0]]),
        (in_use, vec![[9, 1, compressed(CLUSTER, 512), 0]]),
    ];
    for (what, records) in wrongs {
        println!("{what}: {records:x?}");
        refused(&world, &left_by(&world, &records), what);
    }
    // And what would fit.
    let fits = [[9, 1, COPIED | free, 0], [10, 1, packed, 0], [0, 1, data, 0]];
    open(&world, &left_by(&world, &fits)).unwrap().close().unwrap();
    assert_unleaked(&content(&world));
}

#[test]
fn flag_of_a_shared_cluster_is_not_believed() {
    let world = world();
    let disk = open(&world, &words()).unwrap();
    disk.create_snapshot("a").unwrap();
    disk.close().unwrap();
    let shared = entry(&world, 0);
    assert_eq!(shared & COPIED, 0);
    // It would let the guest write into the snapshot.
    let zeroed = left_by(&world, &[[0, 1, shared | COPIED | 1, 0]]);
    let disk = open(&world, &zeroed).unwrap();
    assert_eq!(read(&disk, 0), 0);
    write(&disk, 0, 9);
    disk.apply_snapshot("a").unwrap();
    assert_eq!(read(&disk, 0), 1);
}

#[test]
fn image_that_another_program_left_open_is_refused() {
    let world = world();
    let mut image = content(&world);
    image[79] |= 1;
    world.put(Path::new(IMAGE), image);
    refused(&world, &left_by(&world, &[[9, 1, 0, 0]]), "it was opened, and not closed");
    // Without records there is nothing that could be lost.
    assert!(open(&world, &left_by(&world, &[])).is_ok());
}

#[test]
fn image_whose_counts_are_wrong_is_refused() {
    let world = world();
    let mut image = content(&world);
    let cluster = (entry(&world, 0) & !COPIED) / CLUSTER;
    let block = 2 * CLUSTER as usize + cluster as usize * 2;
    image[block..block + 2].fill(0);
    world.put(Path::new(IMAGE), image);
    refused(&world, &left_by(&world, &[[9, 1, 1, 0]]), "not counted");
}

#[test]
fn what_was_counted_past_the_end_of_the_file_and_never_used_is_freed() {
    let world = world();
    let disk = open(&world, &words()).unwrap();
    write(&disk, 5, 5);
    disk.close().unwrap();
    let mut image = content(&world);
    let (last, behind) = ((entry(&world, 5) & !COPIED) / CLUSTER, end(&world) / CLUSTER);
    let count = |cluster: u64| 2 * CLUSTER as usize + cluster as usize * 2;
    image[count(behind)..][..2].copy_from_slice(&1u16.to_be_bytes());
    world.put(Path::new(IMAGE), image);
    let disk = open(&world, &left_by(&world, &[])).unwrap();
    die(&world, disk);
    let image = content(&world);
    assert_eq!((image[count(last) + 1], image[count(behind) + 1]), (1, 0));
}

/// A process that died has left this record, and a cluster that is counted and nothing refers to.
fn world_with_a_leak(record: Record) -> (World, SharedWords) {
    let world = world();
    let mut image = content(&world);
    let block = 2 * CLUSTER as usize + (end(&world) / CLUSTER) as usize * 2;
    image[block..block + 2].copy_from_slice(&1u16.to_be_bytes());
    image.resize(image.len().next_multiple_of(CLUSTER as usize) + CLUSTER as usize, 0);
    world.put(Path::new(IMAGE), image);
    let words = left_by(&world, &[record]);
    (world, words)
}

#[test]
fn nothing_is_freed_before_the_records_are_known_to_fit() {
    let strange = [9, 1, COPIED | CLUSTER, 0];
    let (world, words) = world_with_a_leak(strange);
    refused(&world, &words, "in use");
    Mutation::switch(Some(Mutation::LeaksBeforeReplay));
    let before = content(&world);
    let opened = open(&world, &words).is_ok();
    Mutation::switch(None);
    assert!(!opened && content(&world) != before, "the mistake makes no difference");
    let (world, words) = world_with_a_leak([9, 1, 1, 0]);
    open(&world, &words).unwrap().close().unwrap();
    assert_unleaked(&content(&world));
}

#[test]
fn last_record_of_a_cluster_counts() {
    let world = world();
    let disk = open(&world, &words()).unwrap();
    let node = disk.node();
    let Node::Qcow2(image) = &*node else { panic!("a qcow2 image") };
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut expected = BTreeMap::new();
        let records: Vec<Record> = (0..1 + rng.below(30))
            .map(|i| {
                let (first, count) = (rng.below(60), 1 + rng.below(20));
                let record = [first, count, COPIED | ((100 + i * 50) * CLUSTER), 0];
                expected.extend((0..count).map(|at| (first + at, record[2] + at * CLUSTER)));
                record
            })
            .collect();
        let latest = image.latest(&records).unwrap();
        let found: Vec<_> =
            latest.iter().flat_map(|run| (0..run.count).map(|i| (run.first + i, run.entry(i).entry))).collect();
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "seed {seed}");
    }
}
