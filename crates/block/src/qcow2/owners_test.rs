use super::*;
use crate::qcow2::layout::Part;

fn owners() -> Owners {
    let part = |what, clusters| Part { what, clusters, shared: false };
    let parts =
        vec![part(Structure::Header, 0..1), part(Structure::L2Table, 5..6), part(Structure::RefcountBlock, 6..8)];
    Owners::new(Arc::new(Layout::new(parts).unwrap()))
}

#[test]
fn a_structure_is_written_where_it_lies_or_where_nothing_lies_edge_43() {
    let mut owners = owners();
    owners.claim(Structure::Header, 0..1).unwrap();
    owners.claim(Structure::L2Table, 5..6).unwrap();
    owners.claim(Structure::L2Table, 20..21).unwrap();
    owners.claim(Structure::L2Table, 20..21).unwrap();
}

#[test]
fn a_structure_is_not_written_over_another_edge_43() {
    let mut owners = owners();
    owners.claim(Structure::RefcountTable, 20..22).unwrap();
    for (clusters, cluster, by) in
        [(0..1, 0, Structure::Header), (4..7, 6, Structure::RefcountBlock), (21..30, 21, Structure::RefcountTable)]
    {
        assert_eq!(owners.claim(Structure::L2Table, clusters), Err(Owned { cluster, by }));
    }
    // What failed has claimed nothing.
    assert_eq!(owners.metadata_in(&(22..100)), None);
    owners.claim(Structure::L1Table, 22..30).unwrap();
}

#[test]
fn what_was_given_out_belongs_to_nobody_not_even_to_another_of_its_sort_edge_43() {
    let mut owners = owners();
    assert!(owners.claim_new(Structure::L2Table, 5..6).is_err());
    owners.claim_new(Structure::L2Table, 9..10).unwrap();
    assert!(owners.claim_new(Structure::L2Table, 9..10).is_err());
    assert_eq!(owners.metadata_in(&(8..100)), Some(9));
    owners.release(9);
    owners.claim_new(Structure::RefcountTable, 9..10).unwrap();
}
