use super::*;

fn stored(entry: u64) -> Stored {
    Stored { entry, ..Stored::default() }
}

fn filled(cache: &SliceCache, slice: u64) -> bool {
    cache.fill(Slice(slice), |i| stored(slice * 1000 + i as u64), |_| false)
}

#[test]
fn get_after_fill_gives_the_entry() {
    let cache = SliceCache::new(16, false, 100, 1 << 20);
    assert!(filled(&cache, 7));
    assert_eq!(cache.get(Slice(7), 3), Some(stored(7003)));
    assert_eq!(cache.get(Slice(8), 3), None);
}

#[test]
fn fill_of_a_full_set_replaces_one_that_may_go() {
    let cache = SliceCache::new(16, false, 1000, 1);
    for slice in 0..8 {
        assert!(filled(&cache, slice));
    }
    assert!(cache.fill(Slice(50), |_| stored(1), |holder| holder != Slice(5)));
    assert!(!cache.contains(Slice(5)));
    assert_eq!((0..8).filter(|&s| cache.contains(Slice(s))).count(), 7);
}

#[test]
fn fill_of_a_set_whose_slices_must_stay_says_no() {
    let cache = SliceCache::new(16, false, 1000, 1);
    for slice in 0..8 {
        assert!(filled(&cache, slice));
    }
    assert!(!cache.fill(Slice(50), |_| stored(1), |_| true));
    assert!(!cache.contains(Slice(50)));
}

#[test]
fn default_budget_covers_every_slice() {
    let cache = SliceCache::new(512, false, 1001, 1 << 30);
    for slice in 0..1001 {
        assert!(filled(&cache, slice));
    }
    assert!((0..1001).all(|s| cache.contains(Slice(s))));
}

#[test]
fn readers_beside_refills_never_see_another_slices_entry() {
    let cache = SliceCache::new(8, false, 1 << 20, 1);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for round in 0..200_000u64 {
                    let slice = round % 20;
                    if let Some(entry) = cache.get(Slice(slice), (round % 8) as usize) {
                        assert_eq!(entry.entry, slice * 1000 + round % 8);
                    }
                }
            });
        }
        for round in 0..20_000 {
            assert!(filled(&cache, round % 20));
        }
    });
}

#[test]
fn readers_of_extended_entries_never_see_half_of_a_change() {
    let cache = SliceCache::new(8, true, 100, 1 << 20);
    let both = |n: u64| Stored { entry: n, bitmap: SubclusterBitmap::from_raw(!n) };
    assert!(cache.fill(Slice(3), |_| both(0), |_| false));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for round in 0..200_000 {
                    if let Some(seen) = cache.get(Slice(3), round % 8) {
                        assert_eq!(seen.bitmap.raw(), !seen.entry);
                    }
                }
            });
        }
        for n in 0..100_000 {
            assert!(cache.store(Slice(3), n as usize % 8, both(n)));
        }
    });
}
