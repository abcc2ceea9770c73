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
