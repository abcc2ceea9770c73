//! The VM state, written beside the disk and cut short by the power or by faults at any step: the image is sound, the disk shows what it
//! showed, the rest of the VM state is what it was, and a snapshot brings its own back.

use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use cowhand_qcow2::CreateParams;

use super::jobs_tests::{make_base, open, params, read, scribble};
use super::{BASE, Defect, IMAGE, check, make, panic_text, text};
use crate::disk::Disk;
use crate::error::Result as BlockResult;
use crate::io::sim::{Faults, Rng, World};
use crate::io::{Barrier, Buffer, Storage};
use crate::mutation::Mutation;
use crate::queue::Queue;
use crate::spec::Format;
use crate::sync::Arc;

/// How much of the VM state is looked at, in sectors.
const SECTORS: u64 = 2000;

enum What {
    Read,
    Write,
}

/// Reads or writes a piece of the VM state, for so many steps at most; then the process ends. How it ended, if it did.
fn go(
    world: &World,
    disk: &Arc<Disk>,
    what: What,
    at: u64,
    buffer: &Arc<Buffer>,
    steps: u64,
) -> Option<BlockResult<()>> {
    let queue = Queue::new(world.driver().unwrap());
    let ended = Rc::new(RefCell::new(None));
    let (disk, inner, slot, buffer) = (disk.clone(), queue.clone(), ended.clone(), buffer.clone());
    queue.spawn(async move {
        let data = [buffer.seg(0, buffer.len())];
        let result = match what {
            What::Read => disk.read_vm_state_on(&inner, at, &data).await,
            What::Write => disk.write_vm_state_on(&inner, at, &data).await,
        };
        *slot.borrow_mut() = Some(result);
    });
    for _ in 0..steps {
        if queue.live_tasks() == 0 {
            break;
        }
        queue.turn(false, &mut Vec::new()).unwrap();
        world.step();
    }
    let ended = ended.borrow_mut().take();
    if ended.is_none() {
        world.cut_power();
    }
    queue.shut_down();
    ended
}

fn read_all(world: &World) -> Result<Vec<u8>, String> {
    let disk = open(world, IMAGE, Format::Qcow2, true)?;
    let buffer = Arc::new(Buffer::from_bytes(&vec![0xee; SECTORS as usize * 512]));
    go(world, &disk, What::Read, 0, &buffer, u64::MAX).ok_or("the read does not end")?.map_err(text)?;
    Ok(buffer.to_vec())
}

/// A piece of the VM state, and what is written there.
fn piece(rng: &mut Rng) -> (Range<usize>, Arc<Buffer>) {
    let first = rng.below(SECTORS);
    let count = 1 + rng.below((SECTORS - first).min(200));
    let bytes = first as usize * 512..(first + count) as usize * 512;
    (bytes.clone(), Arc::new(Buffer::from_bytes(&vec![1 + rng.below(250) as u8; bytes.len()])))
}

/// Plays a seed; whether the write was cut short.
fn play(seed: u64, defect: Option<Defect>) -> Result<bool, String> {
    let mut rng = Rng::new(seed);
    let world = World::new(rng.next_u64());
    let sectors = 40 + rng.below(1500);
    let base_sectors = 1 + rng.below(sectors * 3);
    let mut params: CreateParams = params(&mut rng, sectors);
    if rng.one_in(2) {
        let format = make_base(&world, &mut rng, BASE, base_sectors)?;
        params.backing = Some((BASE.as_bytes().to_vec(), format.name().into()));
    }
    make(&world, Path::new(IMAGE), &params)?;
    scribble(&world, &mut rng, IMAGE, Format::Qcow2, 10)?;
    let shown = read(&world, IMAGE, Format::Qcow2)?;
    let mut state = vec![0; SECTORS as usize * 512];
    let disk = open(&world, IMAGE, Format::Qcow2, false)?;
    for _ in 0..rng.below(4) {
        let (bytes, data) = piece(&mut rng);
        go(&world, &disk, What::Write, bytes.start as u64, &data, u64::MAX).ok_or("no end")?.map_err(text)?;
        state[bytes].copy_from_slice(&data);
    }
    let snapshot = rng.one_in(2);
    if snapshot {
        disk.create_snapshot("one").map_err(text)?;
    }
    let kept = state.clone();
    let (bytes, data) = piece(&mut rng);
    let faults = match rng.one_in(3) && defect.is_none() {
        true => Faults { io: 60, no_space: 60, flush: 20, short: 10, slow: 0 },
        false => Faults { short: 20, ..Faults::default() },
    };
    let steps = if rng.one_in(4) { u64::MAX } else { rng.below(60) };
    world.set_faults(faults);
    Defect::switch(defect, &world);
    let ended = go(&world, &disk, What::Write, bytes.start as u64, &data, steps);
    Defect::switch(None, &world);
    world.set_faults(Faults::default());
    match &ended {
        // It is durable, whatever comes.
        Some(Ok(())) => state[bytes.clone()].copy_from_slice(&data),
        Some(Err(e)) if faults.io == 0 => return Err(format!("the write fails: {e}")),
        _ => {}
    }
    if ended.is_some() {
        world.cut_power();
    }
    disk.forget();
    let inspect = |state: &[u8]| {
        check::check(&world.content(Path::new(IMAGE)).ok_or("the image is gone")?)?;
        if read(&world, IMAGE, Format::Qcow2)? != shown {
            return Err("the disk shows something else".to_string());
        }
        let found = read_all(&world)?;
        let wrong = (0..SECTORS as usize).map(|i| i * 512..(i + 1) * 512).find(|sector| {
            let new = !matches!(ended, Some(Ok(()))) && bytes.contains(&sector.start);
            let mut either = [(&state[sector.clone()], true), (&data[..512], new)].into_iter();
            !either.any(|(expected, possible)| possible && found[sector.clone()] == *expected)
        });
        wrong.map_or(Ok(()), |sector| Err(format!("byte {} of the VM state is {}", sector.start, found[sector.start])))
    };
    inspect(&state).map_err(|e| format!("{ended:?}: {e}"))?;
    if snapshot {
        let disk = open(&world, IMAGE, Format::Qcow2, false)?;
        disk.apply_snapshot("one").map_err(text)?;
        disk.close().map_err(text)?;
        if read_all(&world)? != kept {
            return Err("the snapshot's VM state is another one".into());
        }
    }
    Ok(!matches!(ended, Some(Ok(()))))
}

fn play_caught(seed: u64, defect: Option<Defect>) -> Result<bool, String> {
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| play(seed, defect)));
    Mutation::switch(None);
    played.unwrap_or_else(|panic| Err(panic_text(&*panic))).map_err(|e| format!("seed {seed}: {e}"))
}

#[test]
fn a_vm_state_that_is_cut_short_harms_nothing_else() {
    let played: Vec<_> = (0..600).map(|seed| play_caught(seed, None)).collect();
    let failed: Vec<_> = played.iter().filter_map(|played| played.as_ref().err()).take(5).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let cut = played.iter().filter(|played| matches!(played, Ok(true))).count();
    assert!(cut > played.len() / 4, "{cut} of {}", played.len());
}

#[test]
fn without_the_barrier_before_the_header_a_longer_table_is_torn() {
    assert!((0..2000).any(|seed| play_caught(seed, Some(Defect::NoBarrier(Barrier::BeforeHeader))).is_err()));
}
