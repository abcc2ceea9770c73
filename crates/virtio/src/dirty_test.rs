use super::*;
use crate::testing::{Words, words};

const PAGE: u64 = 4096;

fn log(bytes: u64) -> (Words, PageLog) {
    let memory = words(4);
    (memory.clone(), PageLog::new(memory, bytes))
}

/// The pages that are marked.
fn pages(memory: &Words) -> Vec<u64> {
    let bytes: Vec<u8> = memory.0.iter().flat_map(|word| word.load(Ordering::SeqCst).to_ne_bytes()).collect();
    (0..bytes.len() as u64 * 8).filter(|page| bytes[(page / 8) as usize] & 1 << (page % 8) != 0).collect()
}

#[test]
fn mark_sets_the_bits_of_exactly_the_pages_that_it_touches() {
    for (at, len, first, last) in [
        (0, 1, 0, 0),
        (PAGE - 1, 1, 0, 0),
        (PAGE - 1, 2, 0, 1),
        (5 * PAGE, PAGE, 5, 5),
        (63 * PAGE + 7, PAGE, 63, 64),
        (3 * PAGE, 200 * PAGE, 3, 202),
        (64 * PAGE, 64 * PAGE, 64, 127),
        (0, 256 * PAGE, 0, 255),
    ] {
        let (memory, log) = log(32);
        log.mark(GuestAddress(at), len);
        assert_eq!(pages(&memory), (first..=last).collect::<Vec<_>>(), "{at:#x}+{len:#x}");
    }
}

#[test]
fn mark_keeps_what_is_marked() {
    let (memory, log) = log(32);
    log.mark(GuestAddress(PAGE), 1);
    log.mark(GuestAddress(3 * PAGE), 1);
    log.mark(GuestAddress(3 * PAGE), 1);
    assert_eq!(pages(&memory), [1, 3]);

    memory.0[0].swap(0, Ordering::SeqCst);
    log.mark(GuestAddress(3 * PAGE), 1);
    assert_eq!(pages(&memory), [3]);
}

#[test]
fn pages_beyond_the_log_are_ignored() {
    let (memory, log) = log(10);
    log.mark(GuestAddress(80 * PAGE), PAGE);
    log.mark(GuestAddress(u64::MAX), 1);
    log.mark(GuestAddress(u64::MAX), u64::MAX);
    log.mark(GuestAddress(0), 0);
    assert!(pages(&memory).is_empty());
    log.mark(GuestAddress(78 * PAGE), u64::MAX);
    assert_eq!(pages(&memory), [78, 79]);
}

#[test]
fn log_is_no_longer_than_its_memory_and_may_be_empty() {
    let (memory, long) = log(u64::MAX);
    long.mark(GuestAddress(0), u64::MAX);
    assert_eq!(pages(&memory).len(), 256);
    let (memory, none) = log(0);
    none.mark(GuestAddress(0), u64::MAX);
    PageLog::new(words(0), 8).mark(GuestAddress(0), 1);
    assert!(pages(&memory).is_empty());
}

#[test]
fn no_page_written_escapes_a_front_end_that_takes_bits_meanwhile() {
    let (memory, log) = log(32);
    let page = std::sync::atomic::AtomicU64::new(0);
    let mut seen = 0;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for n in 1..=200_000 {
                page.store(n, Ordering::Relaxed);
                log.mark(GuestAddress(70 * PAGE), 1);
            }
        });
        loop {
            let ended = writer.is_finished();
            if memory.0[1].swap(0, Ordering::AcqRel) & 1 << 6 != 0 {
                seen = page.load(Ordering::Relaxed);
            }
            if ended {
                break;
            }
        }
    });
    assert_eq!(seen, 200_000);
}
