//! The program killed by SIGKILL under a guest that writes, and started again: nothing that was acknowledged is lost, flushed or not;
//! every request comes back, once; and the image is whole.
//!
//! The guest writes into an overlay, mostly where nothing is allocated yet, with 32 requests in flight. `SEED` repeats its choices.

use std::time::{Duration, Instant};

use cowhand_vhost_user_client::front_end::PROTOCOL_ALL;
use cowhand_vhost_user_client::message::{blk, protocol};
use cowhand_vhost_user_client::{Ask, Done};

use crate::program::{Client, PATIENCE, Place, Program};

const BLOCK: u64 = 4096;
/// Blocks of the disk, and those of them of which the base has data.
const BLOCKS: u64 = 256 << 10;
const BASE: u64 = 4 << 10;
/// Blocks that the guest writes: spread over the disk, so that most lie in clusters of their own.
const WRITTEN: u64 = 24 << 10;
const CLUSTER: u64 = 16;

/// Random numbers that a seed repeats.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// What a block holds: a number, all over. 0 is zeros.
fn filled(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat((BLOCK / 8) as usize)
}

fn number(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

/// A request: from which block on, how many, and what they hold afterwards.
#[derive(Clone, Debug)]
struct Change {
    first: u64,
    count: u64,
    /// The first block's number; the others' follow it. None: zeros.
    number: Option<u64>,
}

impl Change {
    fn blocks(&self) -> impl Iterator<Item = (u64, u64)> {
        let number = self.number;
        (0..self.count)
            .map(move |n| (n, number.map_or(0, |number| number + n)))
            .zip(self.first..)
            .map(|((_, it), at)| (at, it))
    }
}

/// The guest: what each block holds as far as it was told, and what it has asked for.
struct Writer {
    dice: Dice,
    client: Client,
    holds: Vec<u64>,
    under_way: Vec<Option<Change>>,
    next: u64,
    acknowledged: u64,
}

impl Writer {
    fn new(seed: u64, client: Client) -> Self {
        let holds = (0..BLOCKS).map(|block| if block < BASE { base(block) } else { 0 }).collect();
        Self { dice: Dice(seed | 1), client, holds, under_way: vec![None; 32], next: 1 << 32, acknowledged: 0 }
    }

    /// A change that touches nothing that is under way.
    fn change(&mut self) -> Option<Change> {
        // In a prime's steps, so that neighbours are far apart; some of it again and again.
        let place = self.dice.below(WRITTEN);
        let block = place * 7919 % BLOCKS;
        let change = if self.dice.below(12) == 0 {
            Change { first: block / CLUSTER * CLUSTER, count: CLUSTER, number: None }
        } else {
            let count = 1 + self.dice.below(4).min(BLOCKS - block - 1);
            self.next += count;
            Change { first: block, count, number: Some(self.next) }
        };
        let overlaps =
            |other: &Change| other.first < change.first + change.count && change.first < other.first + other.count;
        (!self.under_way.iter().flatten().any(overlaps)).then_some(change)
    }

    fn fill(&mut self) {
        while self.client.queue.room() > 0 {
            if self.dice.below(40) == 0 {
                self.client.queue.submit(&Ask::Flush).unwrap();
                continue;
            }
            let Some(change) = self.change() else { continue };
            let ask = match change.number {
                None => Ask::WriteZeroes(change.first * BLOCK, change.count * BLOCK, true),
                Some(_) => Ask::Write(change.first * BLOCK, change.blocks().flat_map(|(_, it)| filled(it)).collect()),
            };
            let slot = self.client.queue.submit(&ask).unwrap();
            self.under_way[slot] = Some(change);
        }
        self.client.queue.ring.notify().unwrap();
    }

    fn done(&mut self, done: &Done) {
        assert_eq!(done.status, blk::S_OK, "{:?}", self.under_way[done.slot]);
        self.acknowledged += 1;
        for (block, number) in self.under_way[done.slot].take().iter().flat_map(Change::blocks) {
            self.holds[block as usize] = number;
        }
    }

    /// Takes what has come back, and asks for more, for so long.
    fn work(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.fill();
            if let Ok(done) = self.client.queue.wait(Duration::from_millis(1)) {
                self.done(&done);
            }
            while let Some(done) = self.client.queue.take().unwrap() {
                self.done(&done);
            }
        }
    }

    /// Waits for all that is under way.
    fn finish(&mut self) {
        while self.client.queue.ring.under_way() > 0 {
            let done = self.client.queue.wait(PATIENCE).unwrap();
            self.done(&done);
        }
    }

    /// Reads the whole disk; `may` says what a block may hold besides what it should.
    fn verify(&mut self, seed: u64, may: impl Fn(u64, u64) -> bool) {
        for first in (0..BLOCKS).step_by(CLUSTER as usize) {
            let done = self.client.queue.run(&Ask::Read(first * BLOCK, (CLUSTER * BLOCK) as u32)).unwrap();
            assert_eq!(done.status, blk::S_OK);
            for (block, at) in done.data.chunks_exact(BLOCK as usize).zip(first..) {
                let (found, expected) = (number(block), self.holds[at as usize]);
                if block != filled(expected) {
                    assert!(may(at, found), "block {at} holds {found:#x}, not {expected:#x}; seed {seed}");
                    self.holds[at as usize] = found;
                }
            }
        }
    }
}

fn base(block: u64) -> u64 {
    block + 1
}

fn seed() -> u64 {
    let seed =
        std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()));
    println!("SEED={seed}");
    seed
}

/// A full base below an empty overlay.
fn prepare() -> Place {
    let place = Place::new();
    let data: Vec<u8> = (0..BASE).flat_map(|block| filled(base(block))).collect();
    std::fs::write(place.path("base.raw"), data).unwrap();
    place.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"]);
    let size = (BLOCKS * BLOCK).to_string();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2", &size]);
    place
}

fn start(place: &Place) -> Program {
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    Program::start(place, &["--socket-path", &place.name("socket"), "--image", &image])
}

#[test]
fn killed_twenty_times_under_load_nothing_acknowledged_is_lost() {
    let seed = seed();
    let place = prepare();
    let mut program = start(&place);
    let mut writer = Writer::new(seed, Client::connect(&place.path("socket"), PROTOCOL_ALL));
    let (mut in_flight, mut grown) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let before = std::fs::metadata(place.path("disk.qcow2")).unwrap().len();
        let time = Duration::from_millis(5 + writer.dice.below(60));
        writer.work(time);
        writer.fill();
        program.kill();
        in_flight.push(writer.client.queue.ring.under_way());
        grown.push(std::fs::metadata(place.path("disk.qcow2")).unwrap().len() > before);
        program = start(&place);
        writer.client.reconnect(&place.path("socket"));
    }
    println!("in flight at each kill: {in_flight:?}; {} acknowledged", writer.acknowledged);
    // There was something to lose.
    assert!(in_flight.iter().all(|count| *count > 16), "{in_flight:?}");
    assert!(grown.iter().filter(|grown| **grown).count() > 10, "{grown:?}");
    writer.finish();
    writer.verify(seed, |_, _| false);
    program.end();
    place.check("disk.qcow2");
    place.check("base.qcow2");
    // Another program sees the same.
    let program = start(&place);
    writer.client.reconnect(&place.path("socket"));
    writer.verify(seed, |_, _| false);
    program.end();
    place.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "seen.raw"]);
    let seen = std::fs::File::open(place.path("seen.raw")).unwrap();
    for block in (0..BLOCKS).step_by(97) {
        let mut bytes = vec![0; BLOCK as usize];
        std::os::unix::fs::FileExt::read_exact_at(&seen, &mut bytes, block * BLOCK).unwrap();
        assert_eq!(number(&bytes), writer.holds[block as usize], "block {block} as qemu-img sees it; seed {seed}");
    }
}

#[test]
fn killed_without_in_flight_records_nothing_acknowledged_is_lost() {
    let seed = seed();
    let place = prepare();
    let protocol = PROTOCOL_ALL & !protocol::INFLIGHT_SHMFD;
    let mut program = start(&place);
    let mut writer = Writer::new(seed, Client::connect(&place.path("socket"), protocol));
    for _ in 0..8 {
        let time = Duration::from_millis(20 + writer.dice.below(80));
        writer.work(time);
        writer.fill();
        program.kill();
        // What has come back counts; the rest may have been done, or not, each block by itself.
        while let Some(done) = writer.client.queue.take().unwrap() {
            writer.done(&done);
        }
        let lost: Vec<_> = writer.under_way.iter_mut().filter_map(Option::take).collect();
        program = start(&place);
        // A front-end that knows nothing of the one before.
        writer.client = Client::connect(&place.path("socket"), protocol);
        writer.verify(seed, |block, found| lost.iter().flat_map(Change::blocks).any(|it| it == (block, found)));
    }
    assert!(writer.acknowledged > 100, "{}", writer.acknowledged);
    writer.finish();
    writer.verify(seed, |_, _| false);
    program.end();
    // Clusters that a killed process had taken may leak; nothing else is wrong.
    let repaired = place.qemu_img(&["check", "-r", "leaks", "-f", "qcow2", "disk.qcow2"]);
    assert!(!repaired.contains("ERROR"), "{repaired}");
    place.check("disk.qcow2");
}

#[test]
fn an_image_that_another_program_has_changed_meanwhile_is_refused() {
    let place = prepare();
    let program = start(&place);
    let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
    for n in 0..64u64 {
        assert_eq!(client.queue.run(&Ask::Write((BASE + n * 64) * BLOCK, filled(n + 1))).unwrap().status, blk::S_OK);
    }
    program.kill();
    // It takes the same clusters, for something else.
    let mut words = vec!["-f".to_owned(), "qcow2".to_owned()];
    for n in 0..64 {
        words.extend(["-c".to_owned(), format!("write -q -P 0x5a {} 64k", (BASE * BLOCK) + (200 << 20) + n * 65536)]);
    }
    words.push(place.name("disk.qcow2"));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    wait_for_lock(|| std::process::Command::new("qemu-io").args(&words).output().unwrap());
    let before = std::fs::read(place.path("disk.qcow2")).unwrap();
    let mut program = start(&place);
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client.reconnect(&place.path("socket"))));
    assert!(refused.is_err());
    assert!(program.is_running());
    assert!(std::fs::read(place.path("disk.qcow2")).unwrap() == before, "the image was changed");
    // A new guest is served.
    let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
    let read = client.queue.run(&Ask::Read(BASE * BLOCK + (200 << 20), 512)).unwrap();
    assert_eq!(read.data, [0x5a; 512]);
    program.terminate();
    assert_eq!(program.wait(), Some(0));
    assert!(program.said().contains("changed"), "{}", program.said());
}

fn wait_for_lock(run: impl Fn() -> std::process::Output) {
    let until = Instant::now() + PATIENCE;
    loop {
        let output = run();
        if output.status.success() {
            return;
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("lock") && Instant::now() < until, "{said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
