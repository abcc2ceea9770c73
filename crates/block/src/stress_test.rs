//! Several threads, each with a queue of its own, on one disk on the real host: what the simulator's one thread cannot show.

use std::path::Path;
use std::time::{Duration, Instant};

use cowhand_qcow2::{ClusterBits, CreateParams};

use crate::chain::OpenPolicy;
use crate::disk::{Disk, DiskQueue, block_on};
use crate::io::host::{Engine, Host};
use crate::io::sim::Rng;
use crate::io::{Buffer, Storage};
use crate::qcow2::create;
use crate::queue::Queue;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::{Arc, AtomicU64, Ordering};

/// How many threads there are, but for a test that wants many.
pub(super) const THREADS: u64 = 3;
pub(super) const SECTORS: u64 = 24 << 11;
const DEPTH: usize = 8;
/// Sectors of a group, which is one thread's.
pub(super) const GROUP: u64 = 5;

struct Flying {
    buffer: Buffer,
    first: u64,
    sectors: Vec<u64>,
    write: Option<u64>,
    read: bool,
}

/// The sector is being written.
pub(super) const BUSY: u64 = u64::MAX;

/// What the players write down for others.
pub(super) struct Board {
    /// The tag that each sector has, or [`BUSY`].
    tags: Vec<AtomicU64>,
    /// The last tag that each thread has begun to write.
    begun: Vec<AtomicU64>,
}

impl Board {
    pub(super) fn new(threads: u64) -> Self {
        let ones = |n| (0..n).map(|_| AtomicU64::new(1)).collect();
        Self { tags: ones(SECTORS), begun: ones(threads) }
    }

    pub(super) fn tags(&self) -> Vec<u64> {
        self.tags.iter().map(|tag| tag.load(Ordering::SeqCst)).collect()
    }

    pub(super) fn begun(&self) -> Vec<u64> {
        self.begun.iter().map(|tag| tag.load(Ordering::SeqCst)).collect()
    }
}

/// A sector's content: its number and a tag all over (tag 0: zeros).
pub(super) fn bytes_of(sector: u64, tag: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    if tag != 0 {
        let word = tag << 32 | sector;
        bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word.to_le_bytes()));
    }
    bytes
}

/// Plays on the sectors that are this thread's own: every `threads`-th group of five, so that threads meet in every cluster.
pub(super) struct Player {
    queue: DiskQueue,
    rng: Rng,
    thread: u64,
    threads: u64,
    tags: Vec<u64>,
    busy: Vec<bool>,
    flying: Vec<Option<Flying>>,
    next_tag: u64,
    board: Arc<Board>,
}

impl Player {
    pub(super) fn new(disk: &Arc<Disk>, thread: u64, board: &Arc<Board>) -> Self {
        Self {
            queue: disk.queue().unwrap(),
            rng: Rng::new(thread),
            thread,
            threads: board.begun.len() as u64,
            tags: vec![1; SECTORS as usize],
            busy: vec![false; SECTORS as usize],
            flying: (0..DEPTH).map(|_| None).collect(),
            next_tag: 1,
            board: board.clone(),
        }
    }

    fn submit(&mut self, slot: usize) {
        if self.rng.one_in(200) {
            self.queue.submit(slot as u64, Request::Flush);
            let buffer = Buffer::zeroed(0);
            self.flying[slot] = Some(Flying { buffer, first: 0, sectors: Vec::new(), write: None, read: false });
            return;
        }
        let groups = SECTORS / GROUP / self.threads;
        let first = (self.rng.below(groups) * self.threads + self.thread) * GROUP;
        let count = 1 + self.rng.below(GROUP);
        let sectors: Vec<u64> = (first..first + count).collect();
        if sectors.iter().any(|&s| self.busy[s as usize]) {
            return;
        }
        sectors.iter().for_each(|&s| self.busy[s as usize] = true);
        let (offset, len) = (first * 512, count * 512);
        let mut flying = Flying { buffer: Buffer::zeroed(len as usize), first, sectors, write: None, read: false };
        let request = match self.rng.below(8) {
            0 => {
                flying.write = Some(0);
                Request::WriteZeroes { offset, len, unmap: self.rng.one_in(2) }
            }
            1..=4 => {
                self.next_tag += 1;
                flying.write = Some(self.next_tag);
                self.board.begun[self.thread as usize].store(self.next_tag, Ordering::SeqCst);
                for (i, chunk) in flying.buffer.chunks_exact_mut(512).enumerate() {
                    chunk.copy_from_slice(&bytes_of(first + i as u64, self.next_tag));
                }
                Request::Write { offset, data: vec![flying.buffer.seg(0, len as usize)] }
            }
            _ => {
                flying.read = true;
                Request::Read { offset, data: vec![flying.buffer.seg(0, len as usize)] }
            }
        };
        if flying.write.is_some() {
            flying.sectors.iter().for_each(|&s| self.board.tags[s as usize].store(BUSY, Ordering::SeqCst));
        }
        self.flying[slot] = Some(flying);
        self.queue.submit(slot as u64, request);
    }

    fn done(&mut self, event: Event) {
        let Event::Done { tag, result, .. } = event else { panic!("{event:?}") };
        result.unwrap();
        let flying = self.flying[tag as usize].take().unwrap();
        for &sector in &flying.sectors {
            self.busy[sector as usize] = false;
            if let Some(tag) = flying.write {
                self.tags[sector as usize] = tag;
                self.board.tags[sector as usize].store(tag, Ordering::SeqCst);
            }
            if flying.read {
                let at = (sector - flying.first) as usize * 512;
                let expected = bytes_of(sector, self.tags[sector as usize]);
                assert!(flying.buffer[at..at + 512] == expected, "thread {} sector {sector}", self.thread);
            }
        }
    }

    pub(super) fn play(mut self, time: Duration) -> Vec<u64> {
        let end = Instant::now() + time;
        let mut events = Vec::new();
        while Instant::now() < end || self.queue.in_flight() > 0 {
            for slot in 0..DEPTH {
                if self.flying[slot].is_none() && Instant::now() < end {
                    self.submit(slot);
                }
            }
            if self.queue.in_flight() > 0 {
                self.queue.wait(Wait::Block, &mut events).unwrap();
            }
            std::mem::take(&mut events).into_iter().for_each(|event| self.done(event));
        }
        self.tags
    }
}

/// Snapshots come and go, and the disk's end moves, while others use its beginning.
fn change(disk: &Arc<Disk>, time: Duration) {
    let end = Instant::now() + time;
    let mut rng = Rng::new(7);
    let mut taken = Vec::new();
    let mut changes = 0;
    while Instant::now() < end {
        match rng.below(4) {
            0 if !taken.is_empty() => {
                let id: String = taken.swap_remove(rng.below(taken.len() as u64) as usize);
                disk.delete_snapshot(&id).unwrap();
            }
            1 => disk.resize((SECTORS + rng.below(4 * SECTORS)) * 512).unwrap(),
            _ if taken.len() < 4 => taken.push(disk.create_snapshot("now").unwrap().id),
            _ => {}
        }
        changes += 1;
        std::thread::sleep(Duration::from_millis(rng.below(30)));
    }
    assert!(changes > 3, "{changes} changes");
    disk.resize(SECTORS * 512).unwrap();
}

fn stress(engine: Engine, cluster_bits: u32, metadata_cache: Option<u64>, time: Duration) {
    stress_with(engine, cluster_bits, metadata_cache, time, THREADS, false);
}

fn stress_with(
    engine: Engine,
    cluster_bits: u32,
    metadata_cache: Option<u64>,
    time: Duration,
    threads: u64,
    changes: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let (base, image) = (dir.path().join("base.img"), dir.path().join("disk.qcow2"));
    let content: Vec<u8> = (0..SECTORS).flat_map(|sector| bytes_of(sector, 1)).collect();
    std::fs::write(&base, content).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(Host::new(engine));
    let queue = Queue::new(storage.driver().unwrap());
    let params = CreateParams {
        cluster_bits: ClusterBits::new(cluster_bits).unwrap(),
        backing: Some((b"base.img".to_vec(), "raw".into())),
        ..CreateParams::new(SECTORS * 512)
    };
    let task = {
        let (queue, file, image) = (queue.clone(), storage.create(&image).unwrap(), image.clone());
        async move { create::create(&queue, &file, &image, &params, false).await }
    };
    block_on(&queue, task).unwrap();
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
    let board = Arc::new(Board::new(threads));
    let tags: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let players: Vec<_> = (0..threads)
            .map(|thread| {
                let (disk, board) = (disk.clone(), board.clone());
                scope.spawn(move || Player::new(&disk, thread, &board).play(time))
            })
            .collect();
        if changes {
            change(&disk, time);
        }
        players.into_iter().map(|player| player.join().unwrap()).collect()
    });
    disk.close().unwrap();
    drop(disk);
    crate::torture::assert_sound(&std::fs::read(&image).unwrap());
    let disk = open(&image);
    let mut queue = disk.queue().unwrap();
    let buffer = Buffer::zeroed(SECTORS as usize * 512);
    queue.submit(0, Request::Read { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
    queue.wait(Wait::Block, &mut Vec::new()).unwrap();
    for (sector, found) in (0..SECTORS).zip(buffer.chunks_exact(512)) {
        let tag = tags[(sector / GROUP % threads) as usize][sector as usize];
        assert!(found == bytes_of(sector, tag), "sector {sector} at the end");
    }
}

#[test]
fn threads_on_io_uring_lose_nothing() {
    stress(Engine::Auto, 16, None, Duration::from_secs(2));
}

#[test]
fn threads_on_io_uring_with_a_tiny_cache_lose_nothing() {
    stress(Engine::Auto, 12, Some(1), Duration::from_secs(3));
}

#[test]
fn threads_on_thread_pools_lose_nothing() {
    stress(Engine::Threads, 12, None, Duration::from_secs(2));
}

#[test]
fn threads_with_small_clusters_and_a_tiny_cache_lose_nothing() {
    stress(Engine::Threads, 9, Some(1), Duration::from_secs(3));
}

#[test]
fn threads_lose_nothing_while_snapshots_come_and_go_and_the_size_changes() {
    stress_with(Engine::Auto, 16, None, Duration::from_secs(3), THREADS, true);
    stress_with(Engine::Threads, 12, Some(1), Duration::from_secs(3), THREADS, true);
}

#[test]
fn edge_46_eight_queues_lose_nothing_on_an_overlay_that_is_warm() {
    stress_with(Engine::Auto, 16, None, Duration::from_secs(4), 8, false);
}
