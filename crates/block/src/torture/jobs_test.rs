//! Jobs on whole disks, cut short by the power or by faults at any step: the images are sound, the overlay shows what it showed, and the
//! same job, begun again, comes to its end.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::{ClusterBits, CreateParams, ExtensionKind, Header};

use super::{BASE, Defect, IMAGE, check, make, panic_text, text};
use crate::chain::OpenPolicy;
use crate::disk::Disk;
use crate::io::sim::{Faults, Rng, World};
use crate::io::{Barrier, Buffer, Storage};
use crate::jobs::amend::{AmendOptions, amend_on};
use crate::jobs::commit::{CommitOptions, commit_on, open_both};
use crate::jobs::rebase::{NewBacking, rebase_on};
use crate::mutation::Mutation;
use crate::queue::Queue;
use crate::request::{Request, RequestQueue, Wait};
use crate::spec::{DiskSpec, Format};
use crate::sync::Arc;

const OTHER: &str = "/other.img";

/// How many seeds each job is played with.
const SEEDS: u64 = 500;

/// The most steps that a job is left to go.
const STEPS: [u64; 4] = [10, 40, 120, 400];

#[derive(Clone, Debug)]
enum Job {
    Commit,
    /// Over another image, or over none.
    Rebase(bool, bool),
    Amend(AmendOptions),
}

struct Play {
    world: World,
    rng: Rng,
    job: Job,
    /// What the overlay shows.
    shown: Vec<u8>,
    base_format: Format,
    /// The header has the names of features, and there is room for them whatever comes.
    named: bool,
}

fn policy(world: &World) -> OpenPolicy {
    OpenPolicy {
        storage: Arc::new(world.clone()),
        allow_dirs: vec!["/".into()],
        probe: false,
        temp_dir: "/".into(),
        ..OpenPolicy::host()
    }
}

pub(super) fn open(world: &World, path: &str, format: Format, readonly: bool) -> Result<Arc<Disk>, String> {
    let spec = DiskSpec { readonly, metadata_cache: Some(1), ..DiskSpec::new(Path::new(path), format) };
    Disk::open(&spec, &policy(world)).map_err(text)
}

/// Writes, zeroes and discards at random, and closes.
pub(super) fn scribble(world: &World, rng: &mut Rng, path: &str, format: Format, requests: u64) -> Result<(), String> {
    let disk = open(world, path, format, false)?;
    let mut queue = disk.queue().map_err(text)?;
    let sectors = disk.size() / 512;
    for _ in 0..requests {
        let first = rng.below(sectors);
        let longest = if rng.one_in(4) { 300 } else { 20 };
        let count = 1 + rng.below((sectors - first).min(longest));
        let byte = rng.below(256) as u8;
        let buffer = Buffer::from_bytes(&vec![byte; count as usize * 512]);
        let (offset, len) = (first * 512, count * 512);
        let request = match rng.below(6) {
            0 => Request::WriteZeroes { offset, len, unmap: rng.one_in(2) },
            1 => Request::Discard { offset, len },
            _ => Request::Write { offset, data: vec![buffer.seg(0, buffer.len())] },
        };
        queue.submit(0, request);
        while queue.in_flight() > 0 {
            world.step();
            queue.wait(Wait::Poll, &mut Vec::new()).map_err(text)?;
        }
    }
    drop(queue);
    disk.close().map_err(text)
}

pub(super) fn read(world: &World, path: &str, format: Format) -> Result<Vec<u8>, String> {
    let disk = open(world, path, format, true)?;
    let mut queue = disk.queue().map_err(text)?;
    let buffer = Buffer::zeroed(disk.size() as usize);
    queue.submit(0, Request::Read { offset: 0, data: vec![buffer.seg(0, buffer.len())] });
    let mut events = Vec::new();
    while queue.in_flight() > 0 {
        world.step();
        queue.wait(Wait::Poll, &mut events).map_err(text)?;
    }
    for event in events {
        if let crate::request::Event::Done { result, .. } = event {
            result.map_err(text)?;
        }
    }
    Ok(buffer.to_vec())
}

pub(super) fn params(rng: &mut Rng, sectors: u64) -> CreateParams {
    let bits = [9, 10, 12, 14, 16][rng.below(5) as usize];
    let version = if rng.one_in(4) { 2 } else { 3 };
    CreateParams {
        version,
        cluster_bits: ClusterBits::new(bits).unwrap(),
        refcount_order: if version == 2 { 4 } else { 3 + rng.below(4) as u32 },
        extended_l2: version == 3 && bits >= 14 && rng.one_in(2),
        ..CreateParams::new(sectors * 512)
    }
}

/// A base, raw or qcow2, at that path.
pub(super) fn make_base(world: &World, rng: &mut Rng, path: &str, sectors: u64) -> Result<Format, String> {
    if rng.one_in(2) {
        let content = (0..sectors).flat_map(|i| [if i % 7 == 0 { 0 } else { i as u8 }; 512]).collect();
        world.put(Path::new(path), content);
        return Ok(Format::Raw);
    }
    let params = params(rng, sectors);
    make(world, Path::new(path), &params)?;
    scribble(world, rng, path, Format::Qcow2, 15)?;
    Ok(Format::Qcow2)
}

impl Play {
    fn new(world: World, mut rng: Rng, job: impl Fn(&mut Rng) -> Job) -> Result<Self, String> {
        let sectors = 40 + rng.below(1500);
        let base_sectors = 1 + rng.below(sectors * 3 / 2);
        let base_format = make_base(&world, &mut rng, BASE, base_sectors)?;
        let mut params = params(&mut rng, sectors);
        let lonely = rng.one_in(8);
        let job = match job(&mut rng) {
            Job::Rebase(_, compress) if lonely => Job::Rebase(true, compress),
            job => job,
        };
        if !lonely || matches!(job, Job::Commit) {
            params.backing = Some((BASE.as_bytes().to_vec(), base_format.name().into()));
        }
        make(&world, Path::new(IMAGE), &params)?;
        scribble(&world, &mut rng, IMAGE, Format::Qcow2, 20)?;
        if rng.one_in(3) {
            let disk = open(&world, IMAGE, Format::Qcow2, false)?;
            disk.create_snapshot("one").map_err(text)?;
            disk.close().map_err(text)?;
            scribble(&world, &mut rng, IMAGE, Format::Qcow2, 10)?;
        }
        let shown = read(&world, IMAGE, Format::Qcow2)?;
        let named = params.version >= 3 && params.cluster_bits.bits() >= 12;
        Ok(Self { world, rng, job, shown, base_format, named })
    }

    /// Runs the job for so many steps at most, and for few more once it makes what a new header names durable if `near_header` says
    /// so: how it ended, if it did.
    fn go(
        &mut self,
        steps: u64,
        near_header: bool,
        defect: Option<Defect>,
        faults: Faults,
    ) -> Result<Option<Result<(), String>>, String> {
        let queue = Queue::new(self.world.driver().map_err(text)?);
        let result = Rc::new(RefCell::new(None));
        let mut disks = Vec::new();
        let quiet = || Box::new(|_, _| {});
        let (inner, slot) = (queue.clone(), result.clone());
        match self.job.clone() {
            Job::Commit => {
                let spec = DiskSpec { metadata_cache: Some(1), ..DiskSpec::new(Path::new(IMAGE), Format::Qcow2) };
                let (top, base, empty) =
                    open_both(&spec, &policy(&self.world), &CommitOptions::default()).map_err(text)?;
                disks.extend([base.clone(), top.clone()]);
                queue.spawn(async move {
                    let ended = commit_on(&inner, &top, &base, empty, quiet()).await;
                    *slot.borrow_mut() = Some(ended);
                });
            }
            Job::Rebase(other, compress) => {
                let top = open(&self.world, IMAGE, Format::Qcow2, false)?;
                let format = if self.world.content(Path::new(OTHER)).is_some_and(|b| Header::probe(&b)) {
                    Format::Qcow2
                } else {
                    Format::Raw
                };
                let new = other.then(|| open(&self.world, OTHER, format, true)).transpose()?;
                let backing = match other {
                    true => NewBacking { name: Some(OTHER.into()), format: Some(format.name().into()) },
                    false => NewBacking::default(),
                };
                disks.push(top.clone());
                disks.extend(new.clone());
                queue.spawn(async move {
                    let ended = rebase_on(&inner, &top, new.as_ref(), &backing, compress, quiet()).await;
                    *slot.borrow_mut() = Some(ended);
                });
            }
            Job::Amend(options) => {
                let top = open(&self.world, IMAGE, Format::Qcow2, false)?;
                disks.push(top.clone());
                queue.spawn(async move {
                    let ended = amend_on(&inner, &top, &options, quiet()).await;
                    *slot.borrow_mut() = Some(ended);
                });
            }
        }
        self.world.set_faults(faults);
        Defect::switch(defect, &self.world);
        let mut left = steps;
        let flushes = |world: &World| world.flushes(Barrier::BeforeHeader);
        let (before, mut near_header) = (flushes(&self.world), near_header);
        while left > 0 && queue.live_tasks() > 0 {
            queue.turn(false, &mut Vec::new()).map_err(text)?;
            self.world.step();
            left -= 1;
            if near_header && flushes(&self.world) > before {
                near_header = false;
                left = left.min(self.rng.below(16));
            }
        }
        self.world.set_faults(Faults::default());
        let ended = result.borrow_mut().take();
        if ended.is_none() || faults.io > 0 || defect.is_some() {
            Defect::switch(None, &self.world);
            self.world.cut_power();
            disks.iter().for_each(|disk| disk.forget());
            queue.shut_down();
        } else {
            for disk in disks {
                disk.close().map_err(text)?;
            }
        }
        Ok(ended.map(|ended| ended.map_err(text)))
    }

    /// The images are sound, and the overlay shows what it showed.
    fn inspect(&self) -> Result<(), String> {
        let image = self.world.content(Path::new(IMAGE)).ok_or("the image is gone")?;
        check::check(&image).map_err(|e| format!("the overlay: {e}"))?;
        if self.base_format == Format::Qcow2 {
            let base = self.world.content(Path::new(BASE)).ok_or("the base is gone")?;
            check::check(&base).map_err(|e| format!("the base: {e}"))?;
        }
        let shown = read(&self.world, IMAGE, Format::Qcow2)?;
        let size = shown.len().min(self.shown.len());
        let differs = (0..size / 512).find(|i| shown[i * 512..][..512] != self.shown[i * 512..][..512]);
        match differs {
            Some(sector) => {
                Err(format!("sector {sector} shows {}, not {}", shown[sector * 512], self.shown[sector * 512]))
            }
            None => Ok(()),
        }
    }

    /// The job has done what it was to do.
    fn is_done(&self) -> Result<(), String> {
        let image = self.world.content(Path::new(IMAGE)).ok_or("the image is gone")?;
        let header = Header::parse(&image, image.len() as u64).map_err(text)?;
        match &self.job {
            Job::Commit => {
                let below = read(&self.world, BASE, self.base_format)?;
                if below.get(..self.shown.len()) != Some(&self.shown[..]) {
                    return Err("what was committed is not below".into());
                }
            }
            Job::Rebase(other, _) => {
                if header.backing_name.as_deref() != other.then_some(OTHER.as_bytes()) {
                    return Err(format!("the header names {:?}", header.backing_name));
                }
                if self.named && header.extension(ExtensionKind::FeatureNames).is_none() {
                    return Err("the names of features are gone".into());
                }
            }
            Job::Amend(options) => {
                let right = options.version.is_none_or(|version| version == header.version)
                    && options.refcount_order.is_none_or(|order| order == header.refcount_order);
                if !right {
                    return Err(format!("version {}, refcount order {}", header.version, header.refcount_order));
                }
            }
        }
        Ok(())
    }
}

fn play(seed: u64, job: impl Fn(&mut Rng) -> Job, defect: Option<Defect>) -> Result<bool, String> {
    let mut rng = Rng::new(seed);
    let world = World::new(rng.next_u64());
    let mut play = Play::new(world.clone(), rng, job)?;
    if matches!(play.job, Job::Rebase(true, _)) {
        let sectors = 1 + play.rng.below(2000);
        make_base(&world, &mut play.rng, OTHER, sectors)?;
    }
    let faults = match play.rng.one_in(3) && defect.is_none() {
        true => Faults { io: 150, no_space: 100, flush: 30, short: 10, slow: 0 },
        false => Faults { short: 20, ..Faults::default() },
    };
    // Short jobs are over soon.
    let most = STEPS[play.rng.below(STEPS.len() as u64) as usize];
    let steps = if play.rng.one_in(4) { u64::MAX } else { play.rng.below(most) };
    let near_header = play.rng.one_in(2);
    let ended = play.go(steps, near_header, defect, faults)?;
    play.inspect().map_err(|e| format!("{:?}, {ended:?}: {e}", play.job))?;
    let refused = |e: &str| e.contains("Cannot ") || e.contains("No space left in the file header");
    match &ended {
        Some(Ok(())) => play.is_done()?,
        // They may be away for a moment.
        _ => play.named = false,
    }
    match &ended {
        Some(Err(e)) if faults.io == 0 && !refused(e) => return Err(format!("{:?} fails: {e}", play.job)),
        _ => {}
    }
    if !ended.as_ref().is_some_and(|ended| ended.as_ref().is_err_and(|e| refused(e))) {
        match play.go(u64::MAX, false, None, Faults::default())? {
            Some(Ok(())) => {
                play.is_done().map_err(|e| format!("{:?}, done again: {e}", play.job))?;
                play.inspect().map_err(|e| format!("{:?}, done again: {e}", play.job))?;
            }
            Some(Err(e)) if refused(&e) => {}
            other => return Err(format!("{:?}, begun again: {other:?}", play.job)),
        }
    }
    Ok(!matches!(ended, Some(Ok(()))))
}

fn play_caught(seed: u64, job: impl Fn(&mut Rng) -> Job, defect: Option<Defect>) -> Result<bool, String> {
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| play(seed, job, defect)));
    Mutation::switch(None);
    let played = played.unwrap_or_else(|panic| Err(panic_text(&*panic)));
    played.map_err(|e| format!("seed {seed}: {e}"))
}

fn commits(_: &mut Rng) -> Job {
    Job::Commit
}

fn rebases(rng: &mut Rng) -> Job {
    Job::Rebase(rng.one_in(2), rng.one_in(3))
}

fn amends(rng: &mut Rng) -> Job {
    let none = AmendOptions::default();
    Job::Amend(match rng.below(4) {
        0 => AmendOptions { version: Some(2), refcount_order: Some(4), ..none },
        1 => AmendOptions { version: Some(3), ..none },
        _ => AmendOptions { version: Some(3), refcount_order: Some(2 + rng.below(5) as u32), ..none },
    })
}

fn play_many(job: fn(&mut Rng) -> Job) {
    let seeds = 0..SEEDS;
    let played: Vec<_> = seeds.map(|seed| play_caught(seed, job, None)).collect();
    let failed: Vec<_> = played.iter().filter_map(|played| played.as_ref().err()).take(5).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let cut = played.iter().filter(|played| matches!(played, Ok(true))).count();
    println!("{cut} of {} were cut short", played.len());
    assert!(cut > played.len() / 4);
}

#[test]
fn a_commit_that_is_cut_short_loses_nothing_and_is_done_again() {
    play_many(commits);
}

#[test]
fn a_rebase_that_is_cut_short_changes_nothing_and_is_done_again() {
    play_many(rebases);
}

#[test]
fn an_amendment_that_is_cut_short_changes_nothing_and_is_done_again() {
    play_many(amends);
}

/// Whether some seed notices.
fn is_noticed(job: fn(&mut Rng) -> Job, defect: Defect) -> bool {
    (0..2000).any(|seed| play_caught(seed, job, Some(defect)).is_err())
}

#[test]
fn without_the_flush_of_the_image_below_a_commit_loses_data() {
    assert!(is_noticed(commits, Defect::NoBarrier(Barrier::Data)));
}

#[test]
fn without_the_barrier_before_the_header_a_rebase_or_an_amendment_is_torn() {
    assert!(is_noticed(amends, Defect::NoBarrier(Barrier::NewRefTable)));
    assert!(is_noticed(commits, Defect::NoBarrier(Barrier::BeforeHeader)));
    assert!(is_noticed(rebases, Defect::NoBarrier(Barrier::BeforeMapping)));
    assert!(is_noticed(rebases, Defect::NoBarrier(Barrier::BeforeHeader)));
}
