//! Repairs of snapshot tables, cut short by the power or by faults at any step: the table is the one that was there, what a cut leaves
//! of it, or the one that is written anew; what the repair keeps holds what it held; and the repair, begun again, comes to its end.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::{CreateParams, Geometry, Header, RefTableEntry, Snapshot, limits, refcount};

use super::check::Look;
use super::jobs_tests::{open, params, read, scribble};
use super::{Defect, IMAGE, check, make, panic_text, text};
use crate::check::Repair;
use crate::io::sim::{Faults, Rng, World};
use crate::io::{Barrier, OpenMode, Storage};
use crate::mutation::Mutation;
use crate::qcow2::check::Checker;
use crate::queue::Queue;
use crate::spec::Format;

/// Where the header says how many snapshots there are, and where their table is.
const COUNT_AT: usize = 60;
const TABLE_AT: usize = 64;

/// What is wrong with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    /// Entries that lack something, or have too much extra data.
    Entries,
    /// More snapshots than there may be.
    Many,
    /// More bytes than there may be.
    Long,
}

/// An entry as it is written, whatever it lacks.
#[derive(Clone)]
struct Raw {
    snapshot: Snapshot,
    extra: Vec<u8>,
}

impl Raw {
    fn encode(&self, out: &mut Vec<u8>) {
        let s = &self.snapshot;
        let start = out.len();
        out.extend(s.l1_table_offset.get().to_be_bytes());
        out.extend(s.l1_size.to_be_bytes());
        out.extend((s.id.len() as u16).to_be_bytes());
        out.extend((s.name.len() as u16).to_be_bytes());
        out.extend(s.date_sec.to_be_bytes());
        out.extend(s.date_nsec.to_be_bytes());
        out.extend(s.vm_clock_nsec.to_be_bytes());
        out.extend((s.vm_state_size as u32).to_be_bytes());
        out.extend((self.extra.len() as u32).to_be_bytes());
        [&self.extra, &s.id, &s.name].into_iter().for_each(|bytes| out.extend(bytes));
        out.resize(start + (out.len() - start).next_multiple_of(8), 0);
    }

    /// Extra data of that length.
    fn with_extra(snapshot: Snapshot, len: usize, rng: &mut Rng) -> Self {
        let numbers = [snapshot.vm_state_size, snapshot.disk_size.unwrap_or(512), snapshot.icount.unwrap_or(0)];
        let mut extra: Vec<u8> = numbers.into_iter().flat_map(u64::to_be_bytes).collect();
        extra.resize_with(len, || rng.below(256) as u8);
        Self { snapshot, extra }
    }

    fn has_excess(&self) -> bool {
        self.extra.len() > limits::SNAPSHOT_EXTRA_DATA_MAX as usize
    }

    /// The entry without what is too much: what may be known of it, and what is kept.
    fn bounded(&self) -> Self {
        let most = self.extra.len().min(limits::SNAPSHOT_EXTRA_DATA_MAX as usize);
        Self { extra: self.extra[..most].to_vec(), ..self.clone() }
    }

    /// How it reads.
    fn parsed(&self, geometry: &Geometry) -> Snapshot {
        let mut bytes = Vec::new();
        self.bounded().encode(&mut bytes);
        Snapshot::parse(&bytes, geometry).unwrap().0
    }
}

fn table(entries: &[Raw]) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.iter().for_each(|entry| entry.encode(&mut bytes));
    bytes
}

fn number(image: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
}

/// The header says so.
fn name_table(image: &mut [u8], count: u32, place: u64) {
    image[COUNT_AT..COUNT_AT + 4].copy_from_slice(&count.to_be_bytes());
    image[TABLE_AT..TABLE_AT + 8].copy_from_slice(&place.to_be_bytes());
}

/// Lays bytes behind the image, and counts them once. Where; none if a refcount block is missing for that.
fn lay(image: &mut Vec<u8>, bytes: &[u8]) -> Option<u64> {
    let header = Header::parse(image, image.len() as u64).unwrap();
    let geometry = header.geometry();
    let bits = geometry.cluster_bits;
    let first = bits.clusters_for(image.len() as u64);
    let clusters = first..first + bits.clusters_for(bytes.len() as u64);
    let per_block = geometry.refcount_block_entries();
    let entries = u64::from(header.refcount_table_clusters) * bits.size() / 8;
    image.resize((clusters.end << bits.bits()) as usize, 0);
    for cluster in clusters {
        let index = cluster / per_block;
        if index >= entries {
            return None;
        }
        let entry = number(image, (header.refcount_table_offset.get() + index * 8) as usize);
        let block = RefTableEntry::from_raw(entry).offset(&geometry).unwrap()?.get() as usize;
        let counts = &mut image[block..block + bits.size() as usize];
        refcount::set(geometry.refcount_order, counts, (cluster % per_block) as usize, 1).unwrap();
    }
    let start = (first << bits.bits()) as usize;
    image[start..start + bytes.len()].copy_from_slice(bytes);
    Some(start as u64)
}

/// Lets the image go on to where its last refcount block counts few clusters more, if that is near.
fn fill_block(image: &mut Vec<u8>, short_of: u64) {
    let geometry = Header::parse(image, image.len() as u64).unwrap().geometry();
    let (bits, per_block) = (geometry.cluster_bits, geometry.refcount_block_entries());
    let left = per_block - bits.clusters_for(image.len() as u64) % per_block;
    let filling = left.saturating_sub(short_of) << bits.bits();
    if filling < 1 << 20 {
        lay(image, &vec![0xff; filling as usize]);
    }
}

/// The sectors of a snapshot that the image has.
fn sectors(look: &Look, snapshot: &Snapshot, size: u64) -> Result<Vec<Option<[u8; 512]>>, String> {
    (0..size / 512).map(|sector| look.sector(snapshot, sector)).collect()
}

struct Play {
    world: World,
    rng: Rng,
    image: Vec<u8>,
    /// Where the damaged table is, and its entries.
    place: u64,
    entries: Vec<Raw>,
    /// How many of them the repair keeps.
    kept: usize,
    geometry: Geometry,
    size: u64,
    /// The steps with which flushes were over.
    moments: Vec<u64>,
    /// What the disk shows, and what its snapshots hold.
    shown: Vec<u8>,
    held: Vec<Vec<Option<[u8; 512]>>>,
}

impl Play {
    /// None where there is no room for such a table.
    fn new(world: World, mut rng: Rng, damage: Damage) -> Result<Option<Self>, String> {
        let size = (40 + rng.below(if damage == Damage::Entries { 600 } else { 100 })) * 512;
        let params = match damage {
            Damage::Entries => params(&mut rng, size / 512),
            // Large enough for one refcount block to count all.
            _ => CreateParams {
                cluster_bits: cowhand_qcow2::ClusterBits::new(14 + rng.below(3) as u32).unwrap(),
                version: 2 + rng.below(2) as u32,
                ..CreateParams::new(size)
            },
        };
        make(&world, Path::new(IMAGE), &params)?;
        let real = 1 + rng.below(4);
        for index in 0..real {
            scribble(&world, &mut rng, IMAGE, Format::Qcow2, 6)?;
            let disk = open(&world, IMAGE, Format::Qcow2, false)?;
            disk.create_snapshot(&format!("snapshot {index}")).map_err(text)?;
            disk.close().map_err(text)?;
        }
        scribble(&world, &mut rng, IMAGE, Format::Qcow2, 6)?;
        let shown = read(&world, IMAGE, Format::Qcow2)?;
        let mut image = world.content(Path::new(IMAGE)).ok_or("the image is gone")?;
        let (geometry, mut taken, held) = {
            let look = Look::new(&image)?;
            let taken = look.snapshots()?;
            let held: Result<Vec<_>, _> = taken.iter().map(|taken| sectors(&look, taken, size)).collect();
            (look.header.geometry(), taken, held?)
        };
        let last = if damage != Damage::Entries && real > 1 { taken.pop() } else { None };
        let mut entries: Vec<Raw> = Vec::new();
        for snapshot in taken {
            let len = match rng.below(4) {
                _ if damage == Damage::Long => 24,
                0 => 24,
                1 => [0, 8][rng.below(2) as usize],
                2 => 1025 + rng.below(4000),
                _ => 1025,
            };
            entries.push(Raw::with_extra(snapshot, len as usize, &mut rng));
        }
        let name = if damage == Damage::Long { vec![b'n'; 65535] } else { Vec::new() };
        let (count, kept) = match damage {
            Damage::Entries => (entries.len(), entries.len()),
            Damage::Many => {
                (limits::SNAPSHOTS_MAX as usize + rng.below(40) as usize + 1, limits::SNAPSHOTS_MAX as usize)
            }
            // Of 65608 bytes each.
            Damage::Long => (1040, limits::SNAPSHOT_TABLE_BYTES_MAX as usize / 65608),
        };
        let whole = Raw { snapshot: Snapshot::default(), extra: vec![0; 24] };
        let lacks = rng.one_in(2) && damage == Damage::Many;
        while entries.len() < count - usize::from(last.is_some()) {
            let id = (1000 + entries.len()).to_string().into_bytes();
            let extra = if lacks && entries.len().is_multiple_of(7) { Vec::new() } else { whole.extra.clone() };
            entries.push(Raw { snapshot: Snapshot { id, name: name.clone(), ..Snapshot::default() }, extra });
        }
        entries.extend(last.map(|last| Raw::with_extra(last, 24, &mut rng)));
        let bytes = table(&entries);
        let kept = match damage {
            // To the byte: those at the start are shorter.
            Damage::Long => {
                let mut len = 0;
                let lens = entries.iter().map(|entry| table(std::slice::from_ref(entry)).len() as u64);
                lens.take_while(|entry| {
                    len += entry;
                    len <= limits::SNAPSHOT_TABLE_BYTES_MAX
                })
                .count()
            }
            _ => kept,
        };
        // The old table is a leak now.
        let Some(place) = lay(&mut image, &bytes) else { return Ok(None) };
        if rng.one_in(2) {
            fill_block(&mut image, rng.below(3));
        }
        name_table(&mut image, entries.len() as u32, place);
        world.put(Path::new(IMAGE), image.clone());
        Ok(Some(Self { world, rng, image, place, entries, kept, geometry, size, moments: Vec::new(), shown, held }))
    }

    /// Repairs for so many steps at most, until the power is cut: how it ended, if it did.
    fn go(&mut self, steps: u64, defect: Option<Defect>, faults: Faults) -> Option<Result<(), String>> {
        let queue = Queue::new(self.world.driver().unwrap());
        let file = self.world.open(Path::new(IMAGE), OpenMode { write: true, ..OpenMode::default() }).unwrap();
        let ended = Rc::new(RefCell::new(None));
        let (inner, slot) = (queue.clone(), ended.clone());
        self.world.set_faults(faults);
        Defect::switch(defect, &self.world);
        queue.spawn(async move {
            let repair = async {
                let mut checker =
                    Checker::open(&inner, file, Path::new(IMAGE), Box::new(|_| {})).await.map_err(text)?;
                checker.run(Repair::All).await.map_err(text)
            };
            let report = repair.await;
            *slot.borrow_mut() = Some(report.and_then(|report| match report.is_clean() {
                true => Ok(()),
                false => Err(format!("not repaired: {report:?}")),
            }));
        });
        let flushes = |world: &World| Barrier::ALL.iter().map(|&barrier| world.flushes(barrier)).sum::<u64>();
        let mut seen = flushes(&self.world);
        for step in 0..steps {
            queue.turn(false, &mut Vec::new()).unwrap();
            if queue.live_tasks() == 0 {
                break;
            }
            self.world.step();
            if flushes(&self.world) > seen {
                seen = flushes(&self.world);
                self.moments.push(step);
            }
        }
        self.world.set_faults(Faults::default());
        Defect::switch(None, &self.world);
        self.world.cut_power();
        queue.shut_down();
        ended.take()
    }

    /// What the repair keeps, as it reads before the table is written anew, and after.
    fn keeps(&self, anew: bool) -> Vec<Snapshot> {
        let kept = self.entries[..self.kept].iter().map(|entry| entry.parsed(&self.geometry));
        let complete = |mut snapshot: Snapshot| {
            if anew {
                snapshot.disk_size = snapshot.disk_size.or(Some(self.size));
                snapshot.icount = snapshot.icount.or(Some(u64::MAX));
            }
            snapshot
        };
        kept.map(complete).collect()
    }

    /// Whether the table must be written anew.
    fn is_written_anew(&self) -> bool {
        let lacks = |entry: &Raw| self.geometry.version >= 3 && entry.extra.len() < 16;
        self.entries[..self.kept].iter().any(|entry| entry.has_excess() || lacks(entry))
    }

    /// The table is the one or the other, all that is kept holds what it held, and what is in use is counted. Whether all is done.
    fn inspect(&self) -> Result<bool, String> {
        let mut image = self.world.content(Path::new(IMAGE)).ok_or("the image is gone")?;
        let count = u32::from_be_bytes(image[COUNT_AT..COUNT_AT + 4].try_into().map_err(text)?) as usize;
        let place = number(&image, TABLE_AT);
        let is_old = place == self.place;
        let is_cut = count == self.kept;
        if !(is_cut || is_old && count == self.entries.len()) {
            return Err(format!("{count} snapshots at {place:#x}"));
        }
        if !is_cut && image.get(..self.image.len()) != Some(&self.image[..]) {
            return Err("the table is not cut, but something has changed".into());
        }
        if is_old {
            let bytes = self.place as usize..self.image.len();
            let whole = table(&self.entries).len();
            if image.get(bytes.clone()).and_then(|b| b.get(..whole)) != self.image[bytes].get(..whole) {
                return Err("the table has changed in its place".into());
            }
            // As anybody can read it: without what is too much.
            let bounded: Vec<Raw> = self.entries[..self.kept].iter().map(Raw::bounded).collect();
            let bounded = table(&bounded);
            image[place as usize..place as usize + bounded.len()].copy_from_slice(&bounded);
            name_table(&mut image, self.kept as u32, place);
        }
        check::check(&image)?;
        let look = Look::new(&image)?;
        let snapshots = look.snapshots()?;
        let expected = self.keeps(!is_old);
        if let Some(index) = (0..self.kept).find(|&i| snapshots.get(i) != expected.get(i)) {
            return Err(format!("snapshot {index} is {:?}, not {:?}", snapshots.get(index), expected[index]));
        }
        for (index, (snapshot, held)) in snapshots.iter().zip(&self.held).enumerate() {
            if snapshot.l1_size > 0 && sectors(&look, snapshot, self.size)? != *held {
                return Err(format!("snapshot {index} holds something else"));
            }
        }
        let world = World::orderly();
        world.put(Path::new(IMAGE), image.clone());
        if read(&world, IMAGE, Format::Qcow2)? != self.shown {
            return Err("the disk shows something else".into());
        }
        Ok(is_cut && is_old != self.is_written_anew())
    }
}

/// The steps with which flushes are over, if all goes well.
fn moments(seed: u64, damage: Damage) -> Result<Vec<u64>, String> {
    let mut rng = Rng::new(seed);
    let world = World::new(rng.next_u64());
    let Some(mut play) = Play::new(world, rng, damage)? else { return Ok(Vec::new()) };
    play.go(u64::MAX, None, Faults::default());
    Ok(play.moments)
}

/// Plays a seed; whether the repair was cut short, and whether refcounts were written anew. None if there was nothing to play.
fn play(seed: u64, damage: Damage, defect: Option<Defect>) -> Result<Option<(bool, bool)>, String> {
    let mut rng = Rng::new(seed);
    let world = World::new(rng.next_u64());
    let Some(mut play) = Play::new(world.clone(), rng, damage)? else { return Ok(None) };
    play.inspect().map_err(|e| format!("before: {e}"))?;
    let faults = match play.rng.one_in(3) && defect.is_none() {
        true => Faults { io: 100, no_space: 60, flush: 20, short: 10, slow: 0 },
        false => Faults { short: 20, ..Faults::default() },
    };
    let steps = match play.rng.below(6) {
        0 => u64::MAX,
        1 => play.rng.below(400),
        // When there is most that is not durable: shortly before a flush, or after it if that does nothing.
        _ => {
            let moments = moments(seed, damage)?;
            let moment = moments.get(play.rng.below(moments.len().max(1) as u64) as usize).copied().unwrap_or_default();
            (moment + play.rng.below(12)).saturating_sub(6)
        }
    };
    let rebuilds = world.flushes(Barrier::NewRefTable);
    let ended = play.go(steps, defect, faults);
    let done = play.inspect().map_err(|e| format!("{ended:?}: {e}"))?;
    match &ended {
        Some(Ok(())) if !done => return Err("it is over, and not done".into()),
        Some(Err(e)) if faults.io == 0 => return Err(format!("the repair fails: {e}")),
        _ => {}
    }
    match play.go(u64::MAX, None, Faults::default()) {
        Some(Ok(())) => {}
        other => return Err(format!("{ended:?}, begun again: {other:?}")),
    }
    let rebuilt = world.flushes(Barrier::NewRefTable) > rebuilds;
    match play.inspect().map_err(|e| format!("{ended:?}, done again: {e}"))? {
        true => Ok(Some((!matches!(ended, Some(Ok(()))), rebuilt))),
        false => Err(format!("{ended:?}, begun again: it is over, and not done")),
    }
}

fn play_caught(seed: u64, damage: Damage, defect: Option<Defect>) -> Result<Option<(bool, bool)>, String> {
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| play(seed, damage, defect)));
    Mutation::switch(None);
    played.unwrap_or_else(|panic| Err(panic_text(&*panic))).map_err(|e| format!("seed {seed}: {e}"))
}

/// Plays so many seeds: how many were played, cut short, and had their refcounts written anew.
fn play_many(seeds: u64, damage: Damage) -> (usize, usize, usize) {
    let played: Vec<_> = (0..seeds).map(|seed| play_caught(seed, damage, None)).collect();
    let failed: Vec<_> = played.iter().filter_map(|played| played.as_ref().err()).take(5).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let played: Vec<_> = played.into_iter().filter_map(|played| played.ok().flatten()).collect();
    let cut = played.iter().filter(|(cut, _)| *cut).count();
    let rebuilt = played.iter().filter(|(_, rebuilt)| *rebuilt).count();
    println!("{damage:?}: {} played, {cut} cut short, {rebuilt} with new refcounts", played.len());
    (played.len(), cut, rebuilt)
}

/// The first seed that notices.
fn noticed_by(seeds: u64, damage: Damage, barrier: Barrier) -> Option<u64> {
    let defect = Some(Defect::NoBarrier(barrier));
    let found =
        (0..seeds).find(|&seed| play_caught(seed, damage, defect).is_err() && play_caught(seed, damage, None).is_ok());
    println!("{damage:?} without {barrier:?}: noticed by seed {found:?}");
    found
}

#[test]
fn a_snapshot_table_that_is_being_completed_is_the_old_one_or_the_new_one() {
    let (played, cut, rebuilt) = play_many(500, Damage::Entries);
    assert!(played > 250 && cut > played / 4 && rebuilt > 5, "{played}, {cut}, {rebuilt}");
}

#[test]
fn a_cut_of_too_many_snapshots_is_whole_or_none() {
    let (played, cut, _) = play_many(12, Damage::Many);
    assert!(played > 8 && cut > 3, "{played}, {cut}");
}

#[test]
fn a_cut_of_too_long_a_snapshot_table_is_whole_or_none() {
    let (played, ..) = play_many(2, Damage::Long);
    assert!(played > 0);
}

#[test]
fn without_the_barrier_before_the_header_a_completed_snapshot_table_is_torn() {
    assert!(noticed_by(1000, Damage::Entries, Barrier::BeforeHeader).is_some());
}
