use super::*;

#[test]
fn counts_of_all_sizes_are_kept() {
    let mut refs = References::default();
    let mut expected = BTreeMap::new();
    let mut number = 1u64;
    for _ in 0..20_000 {
        // Some chunks sparse, some dense, some counts large.
        number = number.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let cluster = match number >> 61 {
            0 => number >> 8 & 0xff_ffff,
            1 => (number >> 8 & 0xff_ffff) << 20,
            _ => number >> 8 & 0xfff,
        };
        let times = if number & 0xff == 0 { 5000 } else { 1 + (number >> 40 & 3) };
        refs.add(cluster, times, Class::Data);
        *expected.entry(cluster).or_insert(0u64) += times;
    }
    for (&cluster, &count) in &expected {
        assert_eq!(refs.count(cluster), count);
    }
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(cluster) = refs.next_used(from) {
        found.push(cluster);
        from = cluster + 1;
    }
    assert!(found.iter().eq(expected.keys()));
    assert_eq!(refs.highest(), *expected.values().max().unwrap());
    assert!(refs.overlaps().next().is_none());
}

#[test]
fn ranges_are_cheap_and_can_be_changed() {
    let mut refs = References::default();
    refs.add_range(10..10 + (1 << 30), Class::Fixed);
    assert!(refs.bytes() < 16 << 20, "{}", refs.bytes());
    assert_eq!((refs.count(9), refs.count(10), refs.count(9 + (1 << 30)), refs.count(10 + (1 << 30))), (0, 1, 1, 0));
    refs.add(1 << 20, 1, Class::Data);
    assert_eq!((refs.count(1 << 20), refs.count((1 << 20) + 1)), (2, 1));
    let overlaps: Vec<_> = refs.overlaps().collect();
    assert!(matches!(overlaps[..], [(at, o)] if at == 1 << 20 && o.has(Class::Fixed) && o.has(Class::Data)));
}

#[test]
fn scattered_references_cost_little() {
    let mut refs = References::default();
    for cluster in 0..1_000_000u64 {
        refs.add(cluster << 20, 1, Class::Data);
    }
    assert!(refs.bytes() < 64 << 20, "{}", refs.bytes());
}

#[test]
fn an_l2_table_is_found_and_counted_whatever_else_lies_there() {
    let mut refs = References::default();
    refs.add(7, 3, Class::L2);
    refs.add(7, 2, Class::Data);
    refs.add(8, 1, Class::Fixed);
    refs.add(8, 4, Class::L2);
    refs.add(9, 1, Class::Data);
    refs.add(9, 1, Class::Data);
    refs.add(10, 1, Class::Bitmap);
    refs.add(10, 1, Class::Bitmap);
    assert_eq!((refs.l2_count(7), refs.l2_count(8)), (3, 4));
    assert_eq!((refs.count(7), refs.count(8)), (5, 5));
    assert_eq!((refs.next_l2(0), refs.next_l2(8), refs.next_l2(9)), (Some(7), Some(8), None));
    let clusters: Vec<_> = refs.overlaps().map(|(cluster, _)| cluster).collect();
    assert_eq!(clusters, [7, 8, 10]);
}

#[test]
fn marks_do_not_disturb_counts() {
    let mut refs = References::default();
    refs.add(5, 1, Class::L2);
    assert!(refs.visit(5) && !refs.visit(5));
    assert!(!refs.is_stored_one(5), "nothing is known of it yet");
    refs.know_stored();
    refs.set_stored_one(5, true);
    refs.add(5, 3000, Class::L2);
    assert!(refs.is_stored_one(5) && refs.count(5) == 3001);
    refs.set_stored_one(5, false);
    assert!(!refs.is_stored_one(5) && !refs.visit(5) && refs.count(5) == 3001);
}

#[test]
fn runs_of_data_cost_a_bit_each_and_count_like_single_ones() {
    let (mut runs, mut singles) = (References::default(), References::default());
    let mut number = 1u64;
    for _ in 0..400 {
        number = number.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (start, len) = (number >> 40 & 0xffff, number >> 20 & if number >> 60 == 0 { 0x3fff } else { 0xff });
        runs.add_data(start..start + len);
        (start..start + len).for_each(|cluster| singles.add(cluster, 1, Class::Data));
        if number >> 58 == 3 {
            runs.add(start, 1, Class::L2);
            singles.add(start, 1, Class::L2);
        }
        for chunk in (0..0x14000).step_by(CHUNK) {
            if let (Some(one), Some(other)) = (runs.ones(chunk), singles.ones(chunk)) {
                assert_eq!(one, other);
            }
        }
    }
    for cluster in 0..0x14000 {
        assert_eq!(runs.slot(cluster), singles.slot(cluster), "{cluster}");
        assert_eq!(runs.next_used(cluster), singles.next_used(cluster));
    }
    assert_eq!(runs.highest(), singles.highest());
    let mut much = References::default();
    (0..1 << 24).step_by(1000).for_each(|start| much.add_data(start..start + 1000));
    assert!(much.bytes() < 3 << 20, "{}", much.bytes());
}

#[test]
fn of_runs_it_is_known_whether_all_are_counted_once() {
    let mut refs = References::default();
    refs.add_data(10..20_000);
    assert!(!refs.are_stored_one(10..20_000), "nothing is known yet");
    refs.know_stored();
    assert!(refs.are_stored_one(10..20_000) && !refs.are_stored_one(9..11) && !refs.are_stored_one(19_999..20_001));
    refs.set_stored_one(6000, false);
    assert!(!refs.are_stored_one(10..20_000) && refs.are_stored_one(6001..20_000) && refs.are_stored_one(10..6000));
    refs.set_stored_one(6000, true);
    refs.add(100, 1, Class::Data);
    // What the image says has not changed by that.
    assert!(refs.are_stored_one(10..20_000) && refs.count(100) == 2);
    refs.set_stored_one(100, false);
    assert!(!refs.is_stored_one(100));
    refs.add(30_000, 1, Class::Data);
    assert!(!refs.is_stored_one(30_000), "of new clusters nothing is known");
}
