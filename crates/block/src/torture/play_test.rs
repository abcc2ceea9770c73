//! Playing seeds: the few thousand of every run of the tests, and what `tools/sim` does.
//!
//! `COWHAND_SIM_FROM` and `COWHAND_SIM_SEEDS` say which seeds [`many`] plays, and `COWHAND_SIM_PROGRESS` the file that it
//! keeps its count in; `COWHAND_SIM_SEED` is the one that [`replay`] shows.

use std::fs;

use super::*;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|n| n.parse().unwrap_or_else(|e| panic!("{variable}={n}: {e}")))
}

/// What `tools/sim` plays: every fourth seed lets the process die under a guest that lives on.
fn shown(seed: u64, trace: bool) -> (Result<(), String>, Vec<String>) {
    if seed % 4 == 3 { death_tests::run_death(seed, None, trace) } else { run_traced(seed, None, None, trace) }
}

/// Seeds that every run of the tests plays.
const SEEDS: u64 = 4000;

#[test]
fn no_seed_finds_corruption_or_lost_data() {
    let players = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let play = |player| {
        let seeds = (player..SEEDS).step_by(players as usize);
        seeds.filter_map(|seed| run(seed, None, None).err()).take(5).collect::<Vec<_>>()
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let players: Vec<_> = (0..players).map(|player| scope.spawn(move || play(player))).collect();
        players.into_iter().flat_map(|player| player.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
#[ignore = "for tools/sim: plays the seeds that the environment names"]
fn many() {
    let (from, count) = (number("COWHAND_SIM_FROM").unwrap(), number("COWHAND_SIM_SEEDS").unwrap());
    let progress = std::env::var_os("COWHAND_SIM_PROGRESS");
    for played in 0..count {
        let seed = from.wrapping_add(played);
        if let Err(what) = shown(seed, false).0.map_err(|what| format!("seed {seed}: {what}")) {
            println!("FAILED {what}");
            panic!("{what}");
        }
        if let Some(path) = &progress
            && (played % 16 == 15 || played + 1 == count)
        {
            fs::write(path, format!("{}\n", played + 1)).unwrap();
        }
    }
}

#[test]
#[ignore = "for tools/sim: shows step by step what one seed does"]
fn replay() {
    let seed = number("COWHAND_SIM_SEED").unwrap();
    let (result, trace) = shown(seed, true);
    println!("{}", trace.join("\n"));
    if let Err(what) = result {
        println!("FAILED seed {seed}: {what}");
        panic!("{what}");
    }
}
