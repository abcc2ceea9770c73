use super::*;
use crate::error::ErrorKind;

const PATH: &str = "/disk.qcow2";

/// A journal with room for `capacity - 1` records, and its words.
fn journal(capacity: usize) -> (Journal, SharedWords) {
    let words: SharedWords = Arc::new((0..HEADER + capacity * RECORD).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
    (Journal::new(&words, Path::new(PATH)).unwrap(), words)
}

fn left(words: &SharedWords) -> Result<Option<Left>> {
    Journal::new(words, Path::new(PATH))?.left(Path::new(PATH))
}

fn set(words: &SharedWords, at: usize, value: u64) {
    (**words).as_ref()[at].store(value, Ordering::SeqCst);
}

fn records(from: u64, count: u64) -> Vec<Record> {
    (from..from + count).map(|i| [i, i + 1, i + 2, i + 3]).collect()
}

#[test]
fn new_words_have_nothing_left() {
    assert_eq!(left(&journal(8).1).unwrap(), None);
}

#[test]
fn what_was_noted_is_left_in_order_around_the_end() {
    let (journal, words) = journal(8);
    journal.start((1, 2));
    let mut ring = journal.ring();
    for round in 0..20 {
        assert_eq!(ring.room(), 4 + 3 * usize::from(round == 0));
        ring.append(&records(round * 3, 3));
        let mark = ring.mark();
        if round == 0 {
            continue;
        }
        let found = left(&words).unwrap().unwrap();
        assert_eq!(found.records, records((round - 1) * 3, 6));
        // All but those of this round.
        ring.forget((mark + 8 - 3) % 8);
    }
}

#[test]
fn ring_that_is_empty_begins_at_the_start_again() {
    let (journal, words) = journal(8);
    journal.start((1, 2));
    let mut ring = journal.ring();
    ring.append(&records(5, 3));
    ring.forget(ring.mark());
    ring.append(&records(9, 1));
    assert_eq!((*words).as_ref()[HEADER].load(Ordering::SeqCst), 9);
    assert_eq!(left(&words).unwrap().unwrap().records, records(9, 1));
}

#[test]
fn closed_disk_leaves_nothing() {
    let (journal, words) = journal(8);
    journal.start((1, 2));
    journal.ring().append(&records(0, 2));
    journal.end();
    assert_eq!(left(&words).unwrap(), None);
}

#[test]
fn announced_file_and_the_one_before_may_be_the_topmost_until_it_is_switched_to() {
    let (journal, words) = journal(8);
    let holds = |identity| left(&words).unwrap().unwrap().check(identity, Path::new(PATH)).is_ok();
    let all = || [(1, 1), (2, 2), (3, 3)].map(holds);
    journal.start((1, 1));
    assert_eq!(all(), [true, false, false]);
    journal.announce((2, 2));
    assert_eq!(all(), [true, true, false]);
    journal.switch((2, 2));
    assert_eq!(all(), [false, true, false]);
    journal.announce((3, 3));
    assert_eq!(all(), [false, true, true]);
    // It came to nothing, and the next one is another.
    journal.announce((1, 1));
    assert_eq!(all(), [true, true, false]);
}

#[test]
fn words_that_are_no_journal_of_ours_are_refused() {
    let wrongs: [(usize, u64, &str); 5] = [
        (0, MAGIC + 1, "holds something else"),
        (CAPACITY, 9, "is damaged"),
        (STATE, 4, "is damaged"),
        (POSITION, 8, "is damaged"),
        (POSITION, 8 << 32, "is damaged"),
    ];
    for (at, value, what) in wrongs {
        let (journal, words) = journal(8);
        journal.start((1, 2));
        set(&words, at, value);
        let error = left(&words).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains(what), "{at} {value}: {error}");
    }
}

#[test]
fn too_few_words_are_refused() {
    let words: SharedWords = Arc::new((0..HEADER + RECORD).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
    assert!(Journal::new(&words, Path::new(PATH)).is_err_and(|e| e.to_string().contains("too small")));
}
