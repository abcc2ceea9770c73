use super::*;

fn set_ones(granules: &Granules) -> Vec<u64> {
    let one = |at: &u64| granules.has_all(&(*at..*at + 1));
    (0..granules.count()).filter(one).collect()
}

#[test]
fn a_range_sets_every_granule_that_it_touches_and_no_other() {
    for (bytes, expected) in [
        (0..1, 0..1),
        (1023..1025, 0..2),
        (1024..2048, 1..2),
        (0..200_000, 0..196),
        (65_000..66_000, 63..65),
        (5..5, 0..0),
    ] {
        let granules = Granules::new(200_000, 1024).unwrap();
        granules.set(&bytes);
        assert_eq!(set_ones(&granules), expected.clone().collect::<Vec<_>>(), "{bytes:?}");
        granules.clear_granules(&expected);
        assert_eq!(granules.set_count(), 0);
    }
}

#[test]
fn what_lies_past_the_end_is_left_out() {
    let granules = Granules::new(5000, 1024).unwrap();
    granules.set(&(4096..1 << 40));
    granules.set(&(5000..6000));
    assert_eq!((granules.count(), set_ones(&granules)), (5, vec![4]));
    assert_eq!(granules.bytes(&(4..5)), 4096..5000);
}

#[test]
fn runs_are_found_in_order_and_bounded() {
    let granules = Granules::new(300 << 9, 512).unwrap();
    granules.set_granules(&(60..200));
    assert_eq!(granules.run(&(0..300), true, 100), Some(60..160));
    assert_eq!(granules.run(&(190..300), true, 100), Some(190..200));
    assert_eq!(granules.run(&(200..300), true, 100), None);
    assert_eq!(granules.run(&(60..300), false, 1000), Some(200..300));
    assert_eq!(granules.run(&(0..60), false, 7), Some(0..7));
    assert_eq!(granules.run(&(61..199), false, 7), None);
}

#[test]
fn a_disk_that_grows_has_its_new_part_set_and_one_that_shrinks_forgets_the_rest() {
    let granules = Granules::new(10_000, 1024).unwrap();
    granules.set(&(0..1));
    let grown = granules.resized(13_000);
    // The granule in which the old end lies is partly new.
    assert_eq!(set_ones(&grown), [0, 9, 10, 11, 12]);
    let shrunk = grown.resized(9300);
    assert_eq!((set_ones(&shrunk), shrunk.set_count()), (vec![0, 9], 2));
    assert_eq!(set_ones(&shrunk.resized(10_000)), [0, 9]);
}

#[test]
fn a_granularity_that_makes_no_sense_is_refused() {
    for (size, granularity) in [(1 << 20, 256), (1 << 20, 1000), (1 << 20, 0), (1 << 60, 512)] {
        assert_eq!(Granules::new(size, granularity).err().unwrap().kind(), ErrorKind::Invalid);
    }
}
