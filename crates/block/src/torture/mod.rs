//! The engine under the simulator: a seed plays a guest with several queues, snapshots, overlays, copies and changes of the size, faults,
//! power cuts and process deaths, and a model says what each sector may hold.
//!
//! [`run`] plays one seed; the tests beside it play many, and show that the simulator bites: with any one barrier taken out, or any
//! one [`Mutation`] made, some seed fails.

mod bitmaps;
mod check;
mod death;
mod follow;
mod freeze;
mod model;
mod over;
mod whole;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use cowhand_qcow2::{ClusterBits, Compression, CreateParams};

use self::death::Survives;
use self::follow::{Copier, Mirror};
use self::freeze::Frozen;
use self::model::Model;
use self::whole::{Changing, Taken};
use crate::chain::OpenPolicy;
use crate::disk::{Disk, DiskQueue, block_on};
use crate::io::sim::{Faults, Rng, World};
use crate::io::{Barrier, Buffer, Storage};
use crate::journal::SharedWords;
use crate::mutation::Mutation;
use crate::qcow2::create;
use crate::queue::Queue;
use crate::request::{Event, Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

/// Panics if an image is not sound.
pub(crate) fn assert_sound(image: &[u8]) {
    check::check(image).unwrap();
}

/// Panics if an image is not sound, or clusters of it are counted that nothing refers to.
pub(crate) fn assert_unleaked(image: &[u8]) {
    assert_eq!(check::leaks(image), Ok(0));
}

const IMAGE: &str = "/disk.qcow2";
const BASE: &str = "/base.img";
const DATA: &str = "/data.img";

/// What is wrong with the engine while a guest plays, to see whether a seed notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Defect {
    /// These flushes do nothing.
    NoBarrier(Barrier),
    /// The engine makes this mistake.
    Mutation(Mutation),
}

impl Defect {
    /// From now on that is wrong, or (None) nothing.
    fn switch(defect: Option<Self>, world: &World) {
        world.skip_barrier(match defect {
            Some(Self::NoBarrier(barrier)) => Some(barrier),
            _ => None,
        });
        Mutation::switch(match defect {
            Some(Self::Mutation(mutation)) => Some(mutation),
            _ => None,
        });
    }
}

/// What lies below the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    None,
    Raw,
    Qcow2,
}

/// What one seed plays.
#[derive(Clone, Debug)]
struct Case {
    cluster_bits: u32,
    version: u32,
    refcount_order: u32,
    extended_l2: bool,
    compression: Compression,
    sectors: u64,
    base: Base,
    queues: usize,
    tiny_cache: bool,
    /// Sectors written at the start, so that little more makes the refcount table grow.
    filled: u64,
    /// What was written at the start is shared with an internal snapshot.
    snapshot: bool,
    /// Guest data lies in a file of its own.
    data_file: bool,
    /// What is discarded keeps its place.
    no_unref: bool,
    /// Snapshots are taken, gone back to and deleted, and the size changes.
    changes: bool,
    /// Requests overlap that are in flight together.
    overlaps: bool,
    faults: Faults,
    defect: Option<Defect>,
    /// What is to survive when the process dies.
    survives: Survives,
    /// Lives end with the power, soon after a flush for this reason.
    focus: Option<Barrier>,
}

impl Case {
    fn of(rng: &mut Rng, focus: Option<Barrier>) -> Self {
        let growth = focus == Some(Barrier::NewRefTable);
        let cluster_bits = if growth { 9 } else { [9, 10, 12, 14, 16][rng.below(5) as usize] };
        let switches = matches!(focus, Some(Barrier::BeforeHeader | Barrier::Header));
        let version = if rng.one_in(4) && !growth { 2 } else { 3 };
        let clusters = match cluster_bits {
            9 => 1 + rng.below(6000),
            10 => 1 + rng.below(2000),
            12 => 1 + rng.below(600),
            14 => 1 + rng.below(100),
            _ => 1 + rng.below(24),
        };
        let crowded = cluster_bits == 9 && version == 3 && (growth || rng.one_in(3));
        let clusters = if crowded { 7000 + rng.below(500) } else { clusters };
        let sectors = (clusters << (cluster_bits - 9)) + rng.below(1 << (cluster_bits - 9));
        let slow = if rng.one_in(3) { 10 } else { 0 };
        let faults = if rng.one_in(3) {
            Faults { io: 60, no_space: 40, short: 10, flush: if rng.one_in(3) { 20 } else { 0 }, slow }
        } else {
            Faults { short: if rng.one_in(4) { 8 } else { 0 }, slow, ..Faults::default() }
        };
        let refcount_order = match version {
            2 => 4,
            // A table of one 512-byte cluster names 64 blocks of 64 counts: 2 MiB.
            _ if crowded => 6,
            _ => rng.below(7) as u32,
        };
        let extended_l2 = version == 3 && cluster_bits >= 14 && rng.one_in(2);
        let snapshot = !crowded && refcount_order > 0 && rng.one_in(3);
        Self {
            cluster_bits,
            version,
            refcount_order,
            extended_l2,
            compression: if version == 3 && rng.one_in(3) { Compression::Zstd } else { Compression::Zlib },
            filled: match (crowded, snapshot) {
                (true, _) if growth => 3900 + rng.below(80),
                (true, _) => 3850 + rng.below(100),
                (_, true) => 1 + rng.below(sectors.min(2000)),
                _ => 0,
            },
            snapshot,
            changes: switches || (focus.is_none() && rng.one_in(2)),
            sectors,
            base: [Base::None, Base::Raw, Base::Qcow2][rng.below(3) as usize],
            queues: 1 + rng.below(3) as usize,
            tiny_cache: rng.one_in(2),
            overlaps: rng.one_in(3),
            faults,
            no_unref: version == 3 && rng.one_in(4),
            data_file: false,
            defect: None,
            survives: Survives::Flushed,
            focus,
        }
    }
}

/// A request in flight.
struct Flying {
    op: u64,
    /// For a read, where the bytes arrive; for a write, where they come from.
    buffer: Buffer,
    request: model::Kind,
}

struct Play {
    world: World,
    rng: Rng,
    case: Case,
    model: Model,
    frozen: Frozen,
    /// The disk's file.
    image: PathBuf,
    /// Files that the disk has left behind, each below the next, and their bytes then.
    below: Vec<(PathBuf, Vec<u8>)>,
    /// In this life the disk is being copied.
    copier: Option<Copier>,
    mirror: Option<Mirror>,
    /// Copies that came to their end, and mirrors that were held against the disk.
    copies: (u32, u32),
    /// What the mirror had at a quiet end.
    mirrored: Option<Vec<Option<u32>>>,
    /// What the backing file holds, by sector.
    base: Vec<u32>,
    /// The image's own snapshots.
    taken: Vec<Taken>,
    /// In this life a change has failed, so that the file does not tell what a power cut would leave.
    uncertain: bool,
    /// The journal, which outlives the process.
    words: SharedWords,
    /// Ends after which a journal was replayed, and changes that were noted in it.
    replays: (u32, u64),
    /// Compressed clusters that the ends of lives have found.
    compressed: u64,
    ops: u64,
}

impl Play {
    fn new(world: World, rng: Rng, case: Case) -> Self {
        Self {
            world,
            model: Model::new(case.sectors),
            frozen: Frozen::default(),
            image: PathBuf::from(IMAGE),
            below: Vec::new(),
            copier: None,
            mirror: None,
            copies: (0, 0),
            mirrored: None,
            base: Vec::new(),
            taken: Vec::new(),
            uncertain: false,
            words: death::words(&case),
            replays: (0, 0),
            compressed: 0,
            rng,
            case,
            ops: 0,
        }
    }
}

/// Plays a seed. The error says what went wrong.
fn run(seed: u64, defect: Option<Defect>, focus: Option<Barrier>) -> Result<(), String> {
    run_traced(seed, defect, focus, false).0.map_err(|what| format!("seed {seed}: {what}"))
}

/// The same, with a line for each thing that happened if `trace` says so.
fn run_traced(
    seed: u64,
    defect: Option<Defect>,
    focus: Option<Barrier>,
    trace: bool,
) -> (Result<(), String>, Vec<String>) {
    run_case(seed, (defect, focus), trace, |_| {})
}

/// The same of a seed whose case is changed in some way.
fn run_case(
    seed: u64,
    (defect, focus): (Option<Defect>, Option<Barrier>),
    trace: bool,
    change: impl FnOnce(&mut Case),
) -> (Result<(), String>, Vec<String>) {
    let mut rng = Rng::new(seed);
    let mut case = Case::of(&mut rng, focus);
    case.defect = defect;
    change(&mut case);
    let world = World::new(rng.next_u64());
    if trace {
        world.start_trace();
        world.note(|| format!("{case:?}"));
    }
    let mut play = Play::new(world.clone(), rng, case);
    // An assertion of the engine that fails is a finding like any other.
    let result = catch_unwind(AssertUnwindSafe(|| {
        play.create()?;
        (0..4).try_for_each(|_| play.life())
    }));
    Defect::switch(None, &world);
    (result.unwrap_or_else(|panic| Err(panic_text(&*panic))), world.trace())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a word"))
}

fn make(world: &World, path: &Path, params: &CreateParams) -> Result<(), String> {
    let file = world.create(path).map_err(text)?;
    let queue = Queue::new(world.driver().map_err(text)?);
    let task = {
        let (queue, path, params) = (queue.clone(), path.to_path_buf(), params.clone());
        async move { create::create(&queue, &file, &path, &params, false).await }
    };
    block_on(&queue, task).map_err(text)?;
    world.sync_dir(Path::new("/")).map_err(text)
}

impl Play {
    fn params(&self) -> CreateParams {
        CreateParams {
            version: self.case.version,
            cluster_bits: ClusterBits::new(self.case.cluster_bits).unwrap(),
            refcount_order: self.case.refcount_order,
            extended_l2: self.case.extended_l2,
            compression: self.case.compression,
            data_file: self.case.data_file.then(|| DATA.as_bytes().to_vec()),
            ..CreateParams::new(self.case.sectors * 512)
        }
    }

    fn create(&mut self) -> Result<(), String> {
        let mut params = self.params();
        if self.case.base != Base::None {
            // Shorter or longer than the overlay.
            let sectors = 1 + self.rng.below(self.case.sectors * 5 / 4);
            self.make_base(sectors)?;
            let format = if self.case.base == Base::Raw { "raw" } else { "qcow2" };
            params.backing = Some((BASE.as_bytes().to_vec(), format.into()));
        }
        if self.case.data_file {
            self.world.put(Path::new(DATA), Vec::new());
        }
        make(&self.world, Path::new(IMAGE), &params)?;
        if self.case.filled > 0 {
            let mut content = Vec::new();
            for sector in 0..self.case.filled {
                let tag = self.model.next_tag();
                content.extend(model::sector_bytes(sector, tag));
                self.model.set_initial(sector, tag);
            }
            self.fill(IMAGE, &content)?;
        }
        if self.case.snapshot {
            let mut image = self.world.content(Path::new(IMAGE)).ok_or("the image is gone")?;
            self.frozen = freeze::freeze(&mut image).unwrap_or_default();
            self.world.put(Path::new(IMAGE), image);
        }
        Ok(())
    }

    /// Writes an image from its start, and closes it.
    fn fill(&self, image: &str, content: &[u8]) -> Result<(), String> {
        let spec = DiskSpec::new(Path::new(image), Format::Qcow2);
        let disk = Disk::open(&spec, &self.policy()).map_err(text)?;
        let mut queue = disk.queue().map_err(text)?;
        let buffer = Buffer::from_bytes(content);
        queue.submit(0, Request::Write { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
        let mut events = Vec::new();
        while queue.in_flight() > 0 {
            self.world.step();
            queue.wait(Wait::Poll, &mut events).map_err(text)?;
        }
        drop(queue);
        disk.close().map_err(text)
    }

    fn make_base(&mut self, sectors: u64) -> Result<(), String> {
        let mut content = Vec::new();
        for sector in 0..sectors {
            let tag = if self.rng.one_in(3) { 0 } else { self.model.next_tag() };
            content.extend(model::sector_bytes(sector, tag));
            self.model.set_initial(sector, tag);
            self.base.push(tag);
        }
        if self.case.base == Base::Raw {
            self.world.put(Path::new(BASE), content);
            return Ok(());
        }
        let params = CreateParams { cluster_bits: ClusterBits::new(12).unwrap(), ..CreateParams::new(sectors * 512) };
        make(&self.world, Path::new(BASE), &params)?;
        self.fill(BASE, &content)
    }

    fn policy(&self) -> OpenPolicy {
        OpenPolicy {
            storage: Arc::new(self.world.clone()),
            allow_dirs: vec![PathBuf::from("/")],
            probe: false,
            temp_dir: PathBuf::from("/"),
            ..OpenPolicy::host()
        }
    }

    /// Opens the disk, plays a guest, ends in some way, and looks at what is left.
    fn life(&mut self) -> Result<(), String> {
        let mut spec = DiskSpec::new(&self.image, Format::Qcow2);
        spec.discard_no_unref = self.case.no_unref;
        if self.case.tiny_cache {
            spec.metadata_cache = Some(1);
        }
        let disk = Disk::open(&spec, &self.life_policy()).map_err(text)?;
        self.world.note(|| "a life begins".into());
        if self.case.changes && self.rng.one_in(3) {
            self.mirror = Some(Mirror::new(&disk, 512 << self.rng.below(8))?);
        }
        self.world.set_faults(self.case.faults);
        Defect::switch(self.case.defect, &self.world);
        let mut queues: Vec<(DiskQueue, Vec<Flying>)> = Vec::new();
        for _ in 0..self.case.queues {
            queues.push((disk.queue().map_err(text)?, Vec::new()));
        }
        let failed_before = self.world.failed_flushes();
        let mut left = self.rng.below(600);
        let seen = self.focused_flushes();
        let mut changing: Option<Changing> = None;
        self.uncertain = false;
        while left > 0 {
            self.act(&mut queues)?;
            self.follow()?;
            changing = match changing {
                Some(changing) => self.go_on(changing, &disk)?,
                None if self.case.changes && !self.uncertain && self.rng.one_in(40) => Some(self.begin_change(&disk)?),
                None => None,
            };
            left -= 1;
            if self.focused_flushes() > seen {
                // A larger table is switched to some operations later.
                let more = if self.case.focus == Some(Barrier::NewRefTable) { 24 } else { 8 };
                left = left.min(self.rng.below(more));
            }
        }
        // After a failed flush the kernel shows pages as written that are not; only this process knows. Its death would hide
        // that from its successor, which no program can help: such a life ends with the power.
        // A change that failed, or is not over, leaves open what a power cut would leave: so there is one.
        let failed = self.world.failed_flushes() > failed_before || self.uncertain;
        let quiet = changing.is_some() && self.rng.one_in(4);
        let end = if failed || self.case.focus.is_some() || (changing.is_some() && !quiet && !self.is_replayed()) {
            1
        } else if quiet {
            0
        } else {
            self.rng.below(3)
        };
        let mut durable = end == 1;
        let over = changing.as_ref().filter(|_| end != 0).and_then(|changing| changing.over.clone());
        if end == 0 {
            // A quiet end: everything is answered, then closed.
            self.world.set_faults(Faults::default());
            while let Some(still) = changing.take() {
                changing = self.go_on(still, &disk)?;
                self.settle(&mut queues)?;
            }
            while queues.iter().any(|(_, flying)| !flying.is_empty()) {
                self.settle(&mut queues)?;
            }
            drop(queues);
            self.end_copies()?;
            let closed = disk.close();
            if closed.is_ok() && !self.uncertain {
                self.model.flushed(u64::MAX);
                self.world.kill_process();
            } else {
                self.cut_power();
            }
            durable = true;
        } else {
            self.world.set_faults(Faults::default());
            Defect::switch(None, &self.world);
            if end == 1 {
                self.cut_power()
            } else {
                self.world.kill_process()
            }
            disk.forget();
            changing.into_iter().for_each(Changing::abandon);
            drop(queues);
            (self.copier, self.mirror) = (None, None);
        }
        self.world.set_faults(Faults::default());
        Defect::switch(None, &self.world);
        if let Some(over) = over {
            self.settle_overlay(&over, durable, end == 2)?;
        }
        if end == 2 && self.case.survives != Survives::Flushed {
            durable = self.survive_death(&spec)?;
        }
        self.inspect(durable)
    }

    fn focused_flushes(&self) -> u64 {
        self.case.focus.map_or(0, |barrier| self.world.flushes(barrier))
    }

    /// One thing happens: a request, an operation's end, or a queue looks.
    fn act(&mut self, queues: &mut [(DiskQueue, Vec<Flying>)]) -> Result<(), String> {
        let at = self.rng.below(queues.len() as u64) as usize;
        match self.rng.below(10) {
            0..=2 if queues[at].1.len() < 8 => {
                self.submit(&mut queues[at]);
                Ok(())
            }
            0..=6 => {
                self.world.step();
                Ok(())
            }
            _ => self.look(&mut queues[at]),
        }
    }

    fn settle(&mut self, queues: &mut [(DiskQueue, Vec<Flying>)]) -> Result<(), String> {
        self.world.step();
        self.follow()?;
        for queue in queues {
            self.look(queue)?;
        }
        Ok(())
    }

    fn submit(&mut self, queue: &mut (DiskQueue, Vec<Flying>)) {
        let kind = match self.rng.below(20) {
            0..=6 => model::Kind::Write,
            7..=8 => model::Kind::Compress,
            9..=12 => model::Kind::Read,
            13..=14 => model::Kind::Discard,
            15..=16 => model::Kind::Zero,
            _ => model::Kind::Flush,
        };
        let cluster = 1u64 << (self.case.cluster_bits - 9);
        let size = self.model.size();
        let longest = if self.rng.one_in(8) { size } else { cluster * 3 };
        let first = self.rng.below(size);
        let count = 1 + self.rng.below(longest.min(size - first));
        let mut range = first..first + count;
        if kind == model::Kind::Compress {
            range = first - first % cluster..(first + count).next_multiple_of(cluster).min(size);
        }
        let rude = self.case.overlaps && self.rng.one_in(4);
        if rude && let Some(other) = self.model.in_flight(&mut self.rng) {
            // All of the clusters that it touches.
            range = other.start / cluster * cluster..other.end.next_multiple_of(cluster).min(size);
        }
        if kind != model::Kind::Flush && !rude && self.model.is_busy(&range) {
            return;
        }
        let (first, count) = (range.start, range.end - range.start);
        let (offset, len) = (first * 512, count * 512);
        self.ops += 1;
        let op = self.ops;
        let buffer = Buffer::from_bytes(&self.model.begin(op, kind, range));
        let data = || vec![buffer.seg(0, buffer.len())];
        let request = match kind {
            model::Kind::Write => Request::Write { offset, data: data() },
            model::Kind::Compress => Request::WriteCompressed { offset, data: data() },
            model::Kind::Read => Request::Read { offset, data: data() },
            model::Kind::Discard => Request::Discard { offset, len },
            model::Kind::Zero => Request::WriteZeroes { offset, len, unmap: self.rng.one_in(2) },
            model::Kind::Flush => Request::Flush,
        };
        self.world.note(|| format!("op {op}: {kind:?} sectors {first}+{count}"));
        queue.0.submit(op, request);
        queue.1.push(Flying { op, buffer, request: kind });
    }

    fn look(&mut self, queue: &mut (DiskQueue, Vec<Flying>)) -> Result<(), String> {
        let mut events = Vec::new();
        queue.0.wait(Wait::Poll, &mut events).map_err(text)?;
        for event in events {
            let Event::Done { tag, result, .. } = event else { continue };
            let at = queue.1.iter().position(|f| f.op == tag).ok_or("a request was answered twice")?;
            let flying = queue.1.swap_remove(at);
            self.world.note(|| format!("op {tag} done: {result:?}"));
            self.model.end(tag, flying.request, result.is_ok(), &flying.buffer)?;
            if flying.request == model::Kind::Read && result.is_ok() {
                self.world.note(|| format!("model: op {tag} read what it may"));
            }
        }
        Ok(())
    }

    /// After an end: the image is sound, and every sector holds what it may.
    fn inspect(&mut self, durable: bool) -> Result<(), String> {
        let image = self.world.content(&self.image).ok_or("the image is gone")?;
        let sound = check::check_shared(&image, &self.frozen.clusters);
        self.compressed += sound.map_err(|e| format!("after the end: {e}"))?;
        self.frozen.check(&image).map_err(|e| format!("after the end: {e}"))?;
        self.inspect_snapshots(&image).map_err(|e| format!("after the end: {e}"))?;
        self.inspect_below()?;
        let buffer = self.read_back(&self.image)?;
        self.check_mirror(&buffer)?;
        self.model.survive(&buffer, durable)?;
        let (sectors, snapshots) = (self.model.size(), self.taken.len());
        self.world.note(|| {
            format!("model: the image is sound; {sectors} sectors and {snapshots} snapshots hold what they may")
        });
        Ok(())
    }
}

#[cfg(test)]
#[path = "torture_test.rs"]
mod tests;

#[cfg(test)]
#[path = "fault_test.rs"]
mod fault_tests;

#[cfg(test)]
#[path = "defect_test.rs"]
mod defect_tests;

#[cfg(test)]
#[path = "death_test.rs"]
mod death_tests;

#[cfg(test)]
#[path = "play_test.rs"]
mod play_tests;

#[cfg(test)]
#[path = "jobs_test.rs"]
mod jobs_tests;

#[cfg(test)]
#[path = "vm_state_test.rs"]
mod vm_state_tests;

#[cfg(test)]
#[path = "snapshot_repair_test.rs"]
mod snapshot_repair_tests;
