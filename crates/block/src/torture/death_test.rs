//! Seeds whose processes die under a guest that lives on ([`super::death`]), and that some notice each mistake.

use super::*;
use crate::journal::Survival;

/// Plays a seed in which writes survive the process by a journal, mostly a small one, or without one.
pub(super) fn run_death(seed: u64, defect: Option<Defect>, trace: bool) -> (Result<(), String>, Vec<String>) {
    run_case(seed, (defect, None), trace, |case| mortal(seed, case))
}

fn mortal(seed: u64, case: &mut Case) {
    let mut rng = Rng::new(!seed);
    case.survives = match rng.below(8) {
        0 | 1 => Survives::Synchronous,
        2 => Survives::Journal(4096),
        3 => Survives::Journal(2 + rng.below(6) as usize),
        _ => Survives::Journal(40),
    };
    case.data_file = case.version == 3 && rng.one_in(6);
    // Shared by hand with a snapshot that no table names: its references would be taken for leaks.
    (case.snapshot, case.filled) = (false, if case.snapshot { 0 } else { case.filled });
}

#[test]
fn no_seed_loses_what_was_acknowledged() {
    let players = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let play = |player| {
        let seeds = (player..1000).step_by(players as usize);
        let failure = |seed| Some(format!("seed {seed}: {}", run_death(seed, None, false).0.err()?));
        seeds.filter_map(failure).take(5).collect::<Vec<_>>()
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let players: Vec<_> = (0..players).map(|player| scope.spawn(move || play(player))).collect();
        players.into_iter().flat_map(|player| player.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Finds a seed below `within` that notices.
fn bites(defect: Defect, within: u64) {
    let fails = |seed, defect| run_death(seed, defect, false).0.err();
    let found = (0..within).find(|&seed| fails(seed, Some(defect)).is_some() && fails(seed, None).is_none());
    println!("{defect:?}: noticed by seed {found:?}: {:?}", found.and_then(|seed| fails(seed, Some(defect))));
    assert!(found.is_some(), "{within} seeds do not notice {defect:?}");
}

/// A test for each mutation, with the seeds that it may take.
macro_rules! noticed {
    ($($name:ident: $mutation:ident, $within:expr;)*) => {$(
        #[test]
        fn $name() {
            bites(Defect::Mutation(Mutation::$mutation), $within);
        }
    )*};
}

noticed! {
    record_after_the_acknowledgement_is_noticed: RecordAfterAcknowledgement, 100;
    tail_advanced_early_is_noticed: TailAdvancedEarly, 500;
    replay_without_refcounts_is_noticed: ReplayWithoutRefcounts, 100;
    named_cluster_that_is_given_out_is_noticed: NamedGivenOut, 1000;
    answer_before_the_mapping_is_noticed: AnswerBeforeMapping, 100;
}

/// Without a journal: a write into a new cluster waits for a commit, and another one finds the cluster meanwhile. If that one is answered
/// before the process dies its data is there.
fn write_beside_one_that_waits(seed: u64, mistake: Option<Mutation>) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let world = World::new(rng.next_u64());
    let path = Path::new(IMAGE);
    make(&world, path, &CreateParams::new(4 << 20))?;
    let policy = OpenPolicy {
        storage: Arc::new(world.clone()),
        survival: Survival::Synchronous,
        allow_dirs: vec!["/".into()],
        ..OpenPolicy::host()
    };
    let disk = Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy).map_err(text)?;
    let mut queue = disk.queue().map_err(text)?;
    let buffer = Buffer::from_bytes(&[7; 512]);
    let write = |offset| Request::Write { offset, data: vec![buffer.seg(0, 512)] };
    Mutation::switch(mistake);
    queue.submit(0, write(0));
    let first = 1 + rng.below(12);
    let all = first + 1 + rng.below(6);
    let mut answered = Vec::new();
    for step in 0..all {
        if step == first {
            queue.submit(1, write(4096));
        }
        world.step();
        queue.wait(Wait::Poll, &mut answered).map_err(text)?;
    }
    Mutation::switch(None);
    world.kill_process();
    disk.forget();
    drop((queue, disk));
    let disk = Disk::open(&DiskSpec::new(path, Format::Qcow2), &policy).map_err(text)?;
    let mut queue = disk.queue().map_err(text)?;
    let found = Buffer::zeroed(8192);
    queue.submit(2, Request::Read { offset: 0, data: vec![found.seg(0, 8192)] });
    while queue.in_flight() > 0 {
        world.step();
        queue.wait(Wait::Poll, &mut Vec::new()).map_err(text)?;
    }
    for event in answered {
        let Event::Done { tag, result, .. } = event else { continue };
        result.map_err(text)?;
        if found[tag as usize * 4096] != 7 {
            return Err(format!("seed {seed}: write {tag} was acknowledged, and is lost"));
        }
    }
    Ok(())
}

#[test]
fn place_that_is_not_in_the_file_yet_is_waited_for() {
    (0..500).for_each(|seed| write_beside_one_that_waits(seed, None).unwrap());
    let notices = |seed| write_beside_one_that_waits(seed, Some(Mutation::UnsettledPlaceWritten)).is_err();
    assert!((0..500).any(notices));
}

#[test]
fn most_seeds_replay_what_was_noted() {
    let mut all = (0, 0);
    for seed in 0..100 {
        let mut rng = Rng::new(seed);
        let mut case = Case::of(&mut rng, None);
        mortal(seed, &mut case);
        let mut play = Play::new(World::new(rng.next_u64()), rng, case);
        play.create().unwrap();
        (0..4).for_each(|_| play.life().unwrap());
        all = (all.0 + play.replays.0, all.1 + play.replays.1);
    }
    println!("{} deaths, {} changes", all.0, all.1);
    assert!(all.0 > 60 && all.1 > 400, "{all:?}");
}
