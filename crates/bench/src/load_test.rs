use std::collections::HashSet;

use super::{Ask, Load, LoadArgs, Pattern};

const UNIT: u64 = 65536;

fn args(pattern: Pattern, write: bool) -> LoadArgs {
    LoadArgs { pattern, write, block: 4096, unit: UNIT, flush_every: None, requests: None, span: None, seed: 7 }
}

fn offset(ask: Ask) -> u64 {
    match ask {
        Ask::Read(offset) | Ask::Write(offset) => offset,
        Ask::Flush => panic!("a flush has no offset"),
    }
}

#[test]
fn random_reads_stay_inside_and_repeat_with_the_seed() {
    let size = 100 * UNIT + 512;
    let first: Vec<_> = Load::new(&args(Pattern::Random, false), size, 0, 1).unwrap().take(5000).collect();
    let again: Vec<_> = Load::new(&args(Pattern::Random, false), size, 0, 1).unwrap().take(5000).collect();
    let other: Vec<_> = Load::new(&args(Pattern::Random, false), size, 1, 2).unwrap().take(5000).collect();
    assert_eq!(first, again);
    assert_ne!(first, other);
    assert!(first.iter().all(|ask| offset(*ask).is_multiple_of(4096) && offset(*ask) + 4096 <= size));
    assert!(first.iter().map(|ask| offset(*ask) / UNIT).collect::<HashSet<_>>().len() == 100);
}

#[test]
fn scatter_uses_each_unit_once_over_all_queues() {
    let size = 999 * UNIT;
    let queues = (0..2).map(|queue| Load::new(&args(Pattern::Scatter, true), size, queue, 2).unwrap());
    let units: Vec<u64> = queues.flatten().map(|ask| offset(ask) / UNIT).collect();
    assert_eq!(units.len(), 999);
    assert_eq!(units.iter().collect::<HashSet<_>>().len(), 999);
    assert!(units.windows(2).any(|pair| pair[0] > pair[1]), "not in order");
}

#[test]
fn sequential_goes_round_in_each_queue_s_part() {
    let size = 8 * 4096;
    let second = Load::new(&args(Pattern::Sequential, false), size, 1, 2).unwrap();
    let blocks: Vec<u64> = second.take(6).map(|ask| offset(ask) / 4096).collect();
    assert_eq!(blocks, [4, 5, 6, 7, 4, 5]);
}

#[test]
fn a_flush_follows_each_so_many_writes_the_last_ones_too() {
    let args = LoadArgs { flush_every: Some(4), requests: Some(8), ..args(Pattern::Scatter, true) };
    let asks: Vec<_> = Load::new(&args, 100 * UNIT, 0, 1).unwrap().collect();
    let flushes: Vec<usize> =
        asks.iter().enumerate().filter(|(_, ask)| **ask == Ask::Flush).map(|(at, _)| at).collect();
    assert_eq!((asks.len(), flushes), (10, vec![4, 9]));
}

#[test]
fn touch_reads_at_each_stride_once() {
    let offsets: Vec<u64> = Load::touch(4096, 3 * UNIT, UNIT).map(offset).collect();
    assert_eq!(offsets, [0, UNIT, 2 * UNIT]);
    assert_eq!(Load::touch(4096, 3 * UNIT + 512, UNIT).count(), 3);
}

#[test]
fn a_load_that_does_not_fit_is_refused() {
    assert!(Load::new(&args(Pattern::Scatter, true), UNIT, 0, 2).is_err());
    assert!(Load::new(&LoadArgs { block: 1000, ..args(Pattern::Random, false) }, UNIT, 0, 1).is_err());
    assert!(Load::new(&LoadArgs { unit: 6144, ..args(Pattern::Scatter, false) }, UNIT, 0, 1).is_err());
}

#[test]
fn a_span_is_all_that_a_load_uses_of_a_larger_disk() {
    let spanned = |pattern| LoadArgs { span: Some(10 * UNIT), ..args(pattern, true) };
    let random: Vec<_> = Load::new(&spanned(Pattern::Random), 100 * UNIT, 0, 1).unwrap().take(5000).collect();
    let units: HashSet<u64> = random.iter().map(|ask| offset(*ask) / UNIT).collect();
    assert_eq!(units, (0..10).collect());
    assert_eq!(Load::new(&spanned(Pattern::Scatter), 100 * UNIT, 0, 1).unwrap().count(), 10);
    assert_eq!(Load::new(&spanned(Pattern::Scatter), 5 * UNIT, 0, 1).unwrap().count(), 5, "a smaller disk");
}
