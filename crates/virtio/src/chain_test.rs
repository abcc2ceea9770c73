use super::*;

const SPANS: [Span; 3] = [
    Span { addr: GuestAddress(0x100), len: 10 },
    Span { addr: GuestAddress(0x200), len: 20 },
    Span { addr: GuestAddress(u64::MAX - 4), len: 100 },
];

#[test]
fn part_cuts_at_both_ends() {
    let parts: Vec<_> = part(&SPANS, 5, 10).collect();

    assert_eq!(parts, [Span { addr: GuestAddress(0x105), len: 5 }, Span { addr: GuestAddress(0x200), len: 5 }]);
}

#[test]
fn part_beyond_the_end_is_what_is_there() {
    assert_eq!(part(&SPANS, 130, 1).count(), 0);
    assert_eq!(part(&SPANS, 0, u64::MAX).map(|span| u64::from(span.len)).sum::<u64>(), 130);
}

#[test]
fn part_of_a_span_that_wraps_stays_at_the_top() {
    let parts: Vec<_> = part(&SPANS, 40, 1).collect();

    assert_eq!(parts, [Span { addr: GuestAddress(u64::MAX), len: 1 }]);
}
