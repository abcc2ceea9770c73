//! A process that writes through the engine is killed at random moments, over and over: the image is never corrupt, and holds
//! everything that a completed flush covered.
//!
//! The victim is this test binary again, told to run [`victim`] alone. It writes a journal into a pipe (its standard input, so
//! that nothing else is in the way): each request before it is submitted, each answer when it has come. The pipe outlives it, and
//! the model plays the journal over.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize};
use std::time::{Duration, Instant};

use super::guest::{Guest, Moment, policy};
use super::image::{Base, Made, Shape, make};
use super::model::{Kind, Model};
use super::{dice, qemu};
use crate::disk::Disk;
use crate::io::host::Engine;
use crate::io::sim::Rng;
use crate::io::{LockMasks, OpenMode};
use crate::spec::{DiskSpec, Format};
use crate::sync::{Arc, Mutex, Ordering};

/// How often the victim is killed, all images together.
const KILLS: usize = 200;

/// Tells the victim its image, engine, cluster size in sectors, seed, and the last request's number.
const ORDERS: &str = "COWHAND_ORACLE_VICTIM";

/// One entry of the journal: what happens (a request's kind, or how it ended), its number, its range.
const RECORD: usize = 24;
const OK: u8 = 0xf0;
const FAILED: u8 = 0xf1;

fn encode(moment: Moment) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    let (what, op, first, count) = match moment {
        Moment::Begins { op, kind, first, count } => (kind as u8, op, first, count),
        Moment::Ended { op, ok } => (if ok { OK } else { FAILED }, op, 0, 0),
    };
    record[0] = what;
    record[4..8].copy_from_slice(&op.to_le_bytes());
    record[8..16].copy_from_slice(&first.to_le_bytes());
    record[16..].copy_from_slice(&count.to_le_bytes());
    record
}

fn decode(record: &[u8]) -> Moment {
    let op = u32::from_le_bytes(record[4..8].try_into().unwrap());
    let number = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap());
    match record[0] {
        OK => Moment::Ended { op, ok: true },
        FAILED => Moment::Ended { op, ok: false },
        kind => Moment::Begins { op, kind: Kind::ALL[usize::from(kind)], first: number(8), count: number(16) },
    }
}

/// The process that is killed: it plays a guest until then.
#[test]
#[ignore = "not a test: what the kill test kills"]
fn victim() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    let [path, engine, cluster, seed, op] = orders.split('\n').collect::<Vec<_>>().try_into().unwrap();
    let engine = if engine == "threads" { Engine::Threads } else { Engine::Auto };
    let disk = Disk::open(&DiskSpec::new(Path::new(path), Format::Qcow2), &policy(engine)).unwrap();
    // It only sees to it that requests do not overlap: nobody here knows what the disk holds, so reads are not compared.
    let model = Mutex::new(Model::of_unknown(disk.size()));
    let ops = AtomicU32::new(op.parse().unwrap());
    let journal = |moment| {
        let written = rustix::io::write(rustix::stdio::stdin(), &encode(moment)).unwrap();
        assert_eq!(written, RECORD, "a pipe takes a short record whole");
    };
    let cluster = cluster.parse().unwrap();
    let guest = Guest {
        disk: &disk,
        model: &model,
        ops: &ops,
        requests: 1 << 40,
        queues: 2,
        depth: 12,
        cluster,
        compresses: true,
        journal: &journal,
    };
    guest.play(&mut Rng::new(seed.parse().unwrap()));
}

/// An image, what it may hold, and the last request that was sent to it.
struct Scene {
    dir: tempfile::TempDir,
    made: Made,
    shape: Shape,
    engine: Engine,
    model: Model,
    op: u32,
}

impl Scene {
    fn new(shape: Shape, engine: Engine, rng: &mut Rng) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = make(dir.path(), &shape, rng);
        let model = Model::new(qemu::content(&made.path));
        Self { dir, made, shape, engine, model, op: 0 }
    }

    /// One life and death. How many requests were answered, and how many of them were flushes.
    fn round(&mut self, rng: &mut Rng) -> Result<(usize, usize), String> {
        let journal = self.live_and_die(rng);
        let (mut answers, mut flushes) = (0, 0);
        let (mut flushing, mut compressing) = (BTreeSet::new(), BTreeSet::new());
        for record in journal.chunks_exact(RECORD) {
            match decode(record) {
                Moment::Begins { op, kind, first, count } => {
                    self.op = self.op.max(op);
                    if kind == Kind::Flush {
                        flushing.insert(op);
                    }
                    if kind == Kind::Compress {
                        compressing.insert(op);
                    }
                    self.model.begin(op, kind, first..first + count);
                }
                Moment::Ended { op, ok } => {
                    answers += 1;
                    flushes += usize::from(flushing.contains(&op));
                    // What was read is not in the journal.
                    self.model.end(op, ok, &[])?;
                    // Compressed writes are refused where there is something already.
                    assert!(ok || compressing.contains(&op), "request {op} failed");
                }
            }
        }
        self.wait_for_locks();
        let ended = qemu::run("qemu-img", &["check", "-f", "qcow2", qemu::text(&self.made.path)]);
        if !matches!(ended.status, 0 | 3) {
            return Err(format!("qemu-img check: {}: {}", ended.status, ended.said));
        }
        self.model.survive(&qemu::content(&self.made.path))?;
        if let Some(snapshot) = &self.made.snapshot
            && qemu::content_with(&self.made.path, &["-l", super::image::SNAPSHOT]) != *snapshot
        {
            return Err("the internal snapshot has changed".into());
        }
        Ok((answers, flushes))
    }

    /// Starts the victim, kills it, and gives what it wrote into its journal.
    fn live_and_die(&self, rng: &mut Rng) -> Vec<u8> {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let engine = if self.engine == Engine::Threads { "threads" } else { "auto" };
        let path = qemu::text(&self.made.path);
        let orders = format!("{path}\n{engine}\n{}\n{}\n{}", self.shape.cluster / 512, rng.next_u64(), self.op);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["oracle::kill_test::victim", "--exact", "--ignored"])
            .env(ORDERS, orders)
            .stdin(Stdio::from(writer))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let heard = Arc::new(AtomicUsize::new(0));
        let journal = std::thread::spawn({
            let heard = heard.clone();
            move || {
                let (mut journal, mut record) = (Vec::new(), [0; RECORD]);
                while reader.read_exact(&mut record).is_ok() {
                    journal.extend(record);
                    heard.fetch_add(1, Ordering::SeqCst);
                }
                journal
            }
        });
        // After so many entries, not after so much time: a busy machine gets as much done. Then a little later, at any moment.
        let enough = 1 + (rng.below(600) >> rng.below(4)) as usize;
        let until = Instant::now() + Duration::from_secs(20);
        while heard.load(Ordering::SeqCst) < enough && !journal.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(100));
        }
        std::thread::sleep(Duration::from_micros(rng.below(5000) >> rng.below(8)));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        let journal = journal.join().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let killed = output.status.signal() == Some(libc::SIGKILL);
        assert!(killed, "the victim died of itself: {}", String::from_utf8_lossy(&said));
        assert!(journal.len() >= enough * RECORD, "the victim hung after {} entries", journal.len() / RECORD);
        journal
    }

    /// The kernel ends a dead process's requests, and gives its locks back, a little after the process is gone.
    fn wait_for_locks(&self) {
        let image = policy(Engine::Auto).storage.open(&self.made.path, OpenMode::default()).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while let Err(e) = image.lock(LockMasks::READ) {
            assert!(Instant::now() < until, "the dead process still holds the image: {e:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        image.unlock();
    }
}

#[test]
fn a_killed_writer_leaves_a_sound_image_with_all_that_was_flushed() {
    let mut rng = dice("kills");
    let overlay = |cluster| Shape { base: Base::Qcow2(90), ..Shape::new(cluster) };
    let shapes = [
        (Shape { refcount_bits: 1, ..overlay(512) }, Engine::Auto),
        (overlay(4096), Engine::Threads),
        (overlay(65536), Engine::Auto),
        (Shape { compressed: true, base: Base::Raw(60), ..Shape::new(65536) }, Engine::Auto),
        (Shape { snapshot: true, ..overlay(4096) }, Engine::Auto),
        (Shape { version: 2, ..Shape::new(512) }, Engine::Threads),
    ];
    let mut scenes: Vec<Scene> =
        shapes.into_iter().map(|(shape, engine)| Scene::new(shape, engine, &mut rng)).collect();
    let (mut answers, mut flushes) = (0, 0);
    for round in 0..KILLS {
        let at = round % scenes.len();
        let seed = rng.next_u64();
        match scenes[at].round(&mut Rng::new(seed)) {
            Ok((answered, flushed)) => {
                answers += answered;
                flushes += flushed;
            }
            Err(what) => {
                let scene = scenes.swap_remove(at);
                let kept = scene.dir.keep();
                panic!(
                    "round {round}, seed {seed}, {:?}: {what}; the image is kept in {}",
                    scene.shape,
                    kept.display()
                );
            }
        }
    }
    println!("{KILLS} kills, {answers} answers, {flushes} flushes");
    assert!(answers > KILLS * 10 && flushes > KILLS / 2, "too little happened: {answers} answers, {flushes} flushes");
}
