use super::*;

const fn us(count: u64) -> Duration {
    Duration::from_micros(count)
}

#[test]
fn a_thread_sleeps_at_once_until_a_gap_was_short() {
    let mut patience = Patience::of(us(100));
    assert_eq!(patience.window(), Duration::ZERO);

    patience.learn(us(5000));
    assert_eq!(patience.window(), Duration::ZERO);

    patience.learn(us(40));
    assert_eq!(patience.window(), FIRST);
}

#[test]
fn short_gaps_beyond_the_window_widen_it_as_far_as_it_may() {
    let mut patience = Patience::of(us(50));
    let windows: Vec<_> = (0..5)
        .map(|_| {
            patience.learn(us(50));
            patience.window()
        })
        .collect();
    assert_eq!(windows, [us(10), us(20), us(40), us(50), us(50)]);

    patience.learn(us(30));
    assert_eq!(patience.window(), us(50), "a gap within the window changes nothing");
}

#[test]
fn one_long_gap_ends_the_looking() {
    let mut patience = Patience::of(us(100));
    (0..10).for_each(|_| patience.learn(us(90)));
    assert_eq!(patience.window(), us(100));

    patience.learn(us(101));
    assert_eq!(patience.window(), Duration::ZERO);
}

#[test]
fn where_nobody_may_look_nobody_does() {
    let mut patience = Patience::of(Duration::ZERO);
    patience.learn(us(1));
    assert_eq!(patience.window(), Duration::ZERO);
}
