//! Readers of cached slices beside one who fills and changes them, under a model checker.

use shuttle::thread;

use super::*;
use crate::sync::{Arc, model_of};

/// Readers look for slices of one set while they make room for each other.
fn refills() {
    // One set of eight ways, a slice more than it has room for, one entry each.
    let cache = Arc::new(SliceCache::new(1, false, 1000, 1));
    let fill = |cache: &SliceCache, slice: u64| {
        assert!(cache.fill(Slice(slice), |_| Stored { entry: 100 + slice, ..Stored::default() }, |_| false));
    };
    (0..8).for_each(|slice| fill(&cache, slice));
    let reader = || {
        let cache = cache.clone();
        thread::spawn(move || {
            for slice in [0, 1, 2] {
                if let Some(found) = cache.get(Slice(slice), 0) {
                    assert_eq!(found.entry, 100 + slice, "the entry of another slice");
                }
            }
        })
    };
    let readers = [reader(), reader()];
    (8..12).for_each(|slice| fill(&cache, slice));
    readers.into_iter().for_each(|reader| reader.join().unwrap());
}

/// Readers look at extended entries while they change.
fn pairs() {
    let cache = Arc::new(SliceCache::new(1, true, 8, 1 << 20));
    let both = |n: u64| Stored { entry: n, bitmap: SubclusterBitmap::from_raw(!n) };
    assert!(cache.fill(Slice(3), |_| both(0), |_| false));
    let reader = || {
        let cache = cache.clone();
        thread::spawn(move || {
            for _ in 0..3 {
                if let Some(seen) = cache.get(Slice(3), 0) {
                    assert_eq!(seen.bitmap.raw(), !seen.entry, "half of a change");
                }
            }
        })
    };
    let readers = [reader(), reader()];
    (1..4).for_each(|n| assert!(cache.store(Slice(3), 0, both(n))));
    readers.into_iter().for_each(|reader| reader.join().unwrap());
}

#[test]
fn a_reader_never_gets_another_slices_entry() {
    model_of(refills).holds().fails_with(Mutation::TagLookedAtOnce);
}

#[test]
fn a_reader_never_gets_half_of_an_extended_entry() {
    model_of(pairs).holds().fails_with(Mutation::PairChangedInTheOpen);
}
