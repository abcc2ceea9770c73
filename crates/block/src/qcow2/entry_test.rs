use cowhand_qcow2::ClusterBits;

use super::*;

fn geometry() -> Geometry {
    let cluster_bits = ClusterBits::new(16).unwrap();
    Geometry { cluster_bits, version: 3, extended_l2: false, has_data_file: false, refcount_order: 4 }
}

#[test]
fn what_lies_below_is_kept_and_never_goes_into_the_file() {
    for below in [
        Below::Nothing,
        Below::At { layer: 1, place: 0 },
        Below::At { layer: 300, place: (1 << 56) - 1024 },
        Below::At { layer: LAYERS_MAX as u16, place: 512 },
        Below::Ask { layer: 1 },
        Below::Ask { layer: LAYERS_MAX as u16 },
    ] {
        let stored = Stored::below(below);
        assert_eq!(stored.decode(&geometry()).unwrap(), (L2Kind::Unallocated, below));
        assert_eq!(stored.on_disk(), Stored::default());
        assert!(!stored.is_unknown());
    }
}

#[test]
fn a_place_that_does_not_fit_has_to_be_asked_for() {
    for place in [(1 << 56) - 512, 1 << 56, 100, u64::MAX] {
        let stored = Stored::below(Below::At { layer: 2, place });
        assert_eq!(stored.decode(&geometry()).unwrap().1, Below::Ask { layer: 2 });
    }
}

#[test]
fn entries_of_the_file_stay_what_they_are() {
    let host = HostOffset::new(0x50000);
    for entry in [
        L2Entry::data(host, true).unwrap().raw(),
        L2Entry::zero(Some(host), false).unwrap().raw(),
        L2Entry::zero(None, false).unwrap().raw(),
        // Compressed: every bit below 62 has a meaning.
        1 << 62 | 0x3fff_ffff_ffff_ffff,
        0,
    ] {
        let stored = Stored { entry, ..Stored::default() };
        assert!(!stored.collides());
        assert_eq!(stored.on_disk(), stored);
    }
    assert!(Stored { entry: 1 << 63 | 0x50000 | 1 << 56, ..Stored::default() }.collides());
}

#[test]
fn entries_that_are_not_to_be_followed_stay_in_the_file_as_they_are() {
    let data = Stored::data(HostOffset::new(0x50000)).unwrap();
    for extended_l2 in [false, true] {
        let geometry = Geometry { extended_l2, ..geometry() };
        let size = geometry.l2_entry_size() as usize;
        for kept in [Stored::reserved(), Stored::misled()] {
            assert!(kept.decode(&geometry).is_err() && !kept.is_unknown());
            let part = TableBytes::new(&geometry, [data, kept, Stored::below(Below::Nothing), kept].into_iter());
            assert!(part.keeps_some() && part.len() == 4 * size);
            let mut table = vec![0xee; 4 * size];
            part.put_into(&mut table);
            assert_eq!(table[..8], data.entry.to_be_bytes());
            assert!(table[size..2 * size].iter().chain(&table[3 * size..]).all(|&byte| byte == 0xee));
            assert!(table[2 * size..3 * size].iter().all(|&byte| byte == 0));
        }
        assert!(!TableBytes::new(&geometry, [data].into_iter()).keeps_some());
    }
    // An entry of the file that looks like one is not followed either.
    assert!(Stored::reserved().collides() && Stored::misled().collides());
}
