//! Several threads use a disk that goes on in overlay after overlay and is copied: what the simulator's one thread cannot show.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowhand_qcow2::{ClusterBits, CreateParams};

use crate::chain::OpenPolicy;
use crate::disk::{Disk, DiskQueue};
use crate::io::host::{Engine, Host};
use crate::io::sim::Rng;
use crate::io::{Buffer, Storage};
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::stress_test::{BUSY, Board, GROUP, Player, SECTORS, THREADS, bytes_of};
use crate::sync::{Arc, AtomicBool, Ordering};
use crate::{CopyBeforeWrite, DirtyTracker, Overlay, OverlayOptions, OverlaySource, Preallocation, create_image};

const BYTES: u64 = SECTORS * 512;

fn read(queue: &mut DiskQueue, content: &mut [u8], at: u64, end: u64) {
    let buffer = Buffer::zeroed((end - at) as usize);
    queue.submit(0, Request::Read { offset: at, data: vec![buffer.seg(0, buffer.len())] });
    let mut events = Vec::new();
    while events.is_empty() {
        queue.wait(Wait::Block, &mut events).unwrap();
    }
    assert!(matches!(events[0], Event::Done { result: Ok(()), .. }), "{events:?}");
    content[at as usize..end as usize].copy_from_slice(&buffer);
}

/// Copies the disk as it is at one moment, and holds it against what the board says before and after that. Whether anything was
/// written while the copy was made.
fn copy(disk: &Arc<Disk>, board: &Board) -> bool {
    let before = board.tags();
    let copy: CopyBeforeWrite = disk.copy_before_write(None).unwrap();
    let (after, begun) = (board.tags(), board.begun());
    let mut content = vec![0xee; copy.size() as usize];
    let mut queue = disk.queue().unwrap();
    while let Some(range) = copy.next(1 << 20) {
        read(&mut queue, &mut content, range.start, range.end);
        copy.copied(&range);
    }
    assert!(copy.is_complete());
    copy.finish().unwrap();
    let mut settled = 0;
    for (sector, found) in (0..SECTORS).zip(content.chunks_exact(512)) {
        let (old, new) = (before[sector as usize], after[sector as usize]);
        if old != BUSY && old == new {
            settled += 1;
            assert!(found == bytes_of(sector, old), "sector {sector} of the copy");
        }
        let tag = found[..8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)) >> 32;
        assert!(found == bytes_of(sector, tag), "sector {sector} of the copy is mixed");
        let last = begun[(sector / GROUP % THREADS) as usize];
        assert!(tag <= last, "sector {sector} of the copy was written later: {tag} after {last}");
    }
    assert!(settled > SECTORS / 2, "{settled} sectors were sure");
    board.begun() != begun
}

/// Mirrors the disk until `stop`, and then until nothing is left.
fn mirror(disk: &Arc<Disk>, tracker: &DirtyTracker, stop: &AtomicBool) -> Vec<u8> {
    let mut content = vec![0xee; BYTES as usize];
    let mut queue = disk.queue().unwrap();
    loop {
        let stopped = stop.load(Ordering::SeqCst);
        match tracker.next(1 << 20) {
            Some(range) => read(&mut queue, &mut content, range.start, range.end),
            None if stopped => return content,
            None => std::thread::yield_now(),
        }
    }
}

/// The disk goes on in overlays.
fn go_on(disk: &Arc<Disk>, dir: &Path, time: Duration) -> Vec<PathBuf> {
    let end = Instant::now() + time;
    let mut rng = Rng::new(3);
    let mut paths = vec![dir.join("disk.qcow2")];
    while Instant::now() < end && paths.len() < 12 {
        let path = dir.join(format!("over{}.qcow2", paths.len()));
        let bits = [12, 14, 16, 9][paths.len() % 4];
        let options =
            OverlayOptions { cluster_bits: ClusterBits::new(bits).unwrap(), extended_l2: bits >= 14 && rng.one_in(2) };
        disk.snapshot_to(Overlay { path: path.clone(), source: OverlaySource::New(options) }).unwrap();
        paths.push(path);
        std::thread::sleep(Duration::from_millis(100 + rng.below(200)));
    }
    assert!(paths.len() > 3, "{paths:?}");
    paths
}

fn live(engine: Engine, metadata_cache: Option<u64>, time: Duration, overlays: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (base, image) = (dir.path().join("base.img"), dir.path().join("disk.qcow2"));
    let content: Vec<u8> = (0..SECTORS).flat_map(|sector| bytes_of(sector, 1)).collect();
    std::fs::write(&base, content).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(Host::new(engine));
    let params = CreateParams { backing: Some((b"base.img".to_vec(), "raw".into())), ..CreateParams::new(BYTES) };
    create_image(&storage, &image, &params, Preallocation::Off).unwrap();
    let policy = OpenPolicy {
        storage,
        allow_dirs: Vec::new(),
        probe: false,
        temp_dir: dir.path().to_path_buf(),
        ..OpenPolicy::host()
    };
    let open = |path: &Path| {
        let spec = DiskSpec { metadata_cache, ..DiskSpec::new(path, Format::Qcow2) };
        Disk::open(&spec, &policy).unwrap()
    };
    let disk = open(&image);
    let (board, stop) = (Arc::new(Board::new(THREADS)), AtomicBool::new(false));
    let tracker = disk.track_writes(None, true).unwrap();
    let (tags, mirrored, paths) = std::thread::scope(|scope| {
        let players: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (disk, board) = (disk.clone(), board.clone());
                scope.spawn(move || Player::new(&disk, thread, &board).play(time))
            })
            .collect();
        let mirror = scope.spawn(|| mirror(&disk, &tracker, &stop));
        let copies = scope.spawn(|| {
            let end = Instant::now() + time;
            let mut under_load = 0;
            while Instant::now() < end {
                under_load += u32::from(copy(&disk, &board));
            }
            assert!(under_load > 0, "no copy was made under load");
        });
        let paths = if overlays { go_on(&disk, dir.path(), time) } else { vec![image.clone()] };
        let tags: Vec<Vec<u64>> = players.into_iter().map(|player| player.join().unwrap()).collect();
        copies.join().unwrap();
        stop.store(true, Ordering::SeqCst);
        (tags, mirror.join().unwrap(), paths)
    });
    tracker.finish().unwrap();
    assert!(disk.hooks().is_none());
    disk.close().unwrap();
    drop(disk);
    paths.iter().for_each(|path| crate::torture::assert_sound(&std::fs::read(path).unwrap()));
    let disk = open(paths.last().unwrap());
    let mut content = vec![0; BYTES as usize];
    read(&mut disk.queue().unwrap(), &mut content, 0, BYTES);
    for (sector, found) in (0..SECTORS).zip(content.chunks_exact(512)) {
        let tag = tags[(sector / GROUP % THREADS) as usize][sector as usize];
        assert!(found == bytes_of(sector, tag), "sector {sector} at the end");
    }
    assert!(mirrored == content, "the mirror is not what the disk is");
}

#[test]
fn threads_lose_nothing_while_the_disk_goes_on_in_overlays_and_is_copied() {
    live(Engine::Auto, None, Duration::from_secs(3), true);
}

#[test]
fn threads_lose_nothing_with_a_tiny_cache_while_the_disk_goes_on_in_overlays_and_is_copied() {
    live(Engine::Threads, Some(1), Duration::from_secs(3), true);
}

#[test]
fn copies_under_load_are_what_the_disk_was_or_is() {
    live(Engine::Auto, None, Duration::from_secs(2), false);
}
