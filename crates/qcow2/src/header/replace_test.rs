//! Every step of a replacement may be torn in units of sectors: what is there then must be the old header or the new one.

use proptest::prelude::*;

use crate::*;

type Backing = Option<(Vec<u8>, String)>;

/// What must be the one or the other: all but the names of features, which may be given up, and the order of extensions.
fn meaning(header: &Header) -> Header {
    let mut plain = header.clone();
    plain.extensions.retain(|e| e.kind != ExtensionKind::FeatureNames);
    plain.extensions.sort_by_key(|e| e.kind.raw());
    plain
}

fn header(version: u32, bits: u32, backing: Backing) -> Option<Header> {
    let params =
        CreateParams { version, cluster_bits: ClusterBits::new(bits).unwrap(), backing, ..CreateParams::new(1 << 30) };
    let mut header = params.header().ok()?;
    let size = header.cluster_bits.size();
    header.refcount_table_offset = HostOffset::new(size);
    header.refcount_table_clusters = 1;
    header.l1_table_offset = HostOffset::new(3 * size);
    Some(header)
}

/// Plays the steps, tearing each, and gives the header and the area after the last.
fn play(old: &Header, new: &Header, area: &[u8]) -> Result<(Header, Vec<u8>), FormatError> {
    let switch = new.replace(old, area)?;
    let mut area = area.to_vec();
    area.resize(switch.area.len(), 0);
    for step in &switch.steps {
        for subset in 0..1u32 << step.len().min(5) {
            let mut torn = area.clone();
            for (i, (at, bytes)) in step.iter().enumerate() {
                if subset >> (i % 5) & 1 == 1 {
                    torn[*at as usize..][..512].copy_from_slice(bytes);
                }
            }
            let found = meaning(&Header::parse(&torn, 1 << 50).unwrap());
            assert!(found == meaning(old) || found == meaning(&switch.header), "{found:?}");
        }
        for (at, bytes) in step {
            area[*at as usize..][..512].copy_from_slice(bytes);
        }
    }
    assert_eq!(area, switch.area);
    let found = Header::parse(&area, 1 << 50).unwrap();
    assert_eq!(found, switch.header);
    Ok((found, area))
}

fn area_of(header: &Header) -> Vec<u8> {
    let mut area = header.encode().unwrap();
    area.resize(1 << header.cluster_bits.bits(), 0);
    area
}

fn with_backing(header: &Header, backing: &Backing) -> Header {
    let mut new = header.clone();
    match backing {
        Some((name, format)) => new.set_backing(Some(name), Some(format)),
        None => new.set_backing(None, None),
    }
    new
}

#[test]
fn a_name_that_goes_is_one_write_of_the_first_sector() {
    let old = header(3, 16, Some((b"base.qcow2".to_vec(), "qcow2".into()))).unwrap();
    let switch = with_backing(&old, &None).replace(&old, &area_of(&old)).unwrap();
    assert_eq!(switch.steps.len(), 1);
    assert_eq!(switch.steps[0].iter().map(|write| write.0).collect::<Vec<_>>(), [0]);
    assert_eq!(Header::parse(&switch.area, 1 << 50).unwrap().backing_name, None);
}

#[test]
fn a_name_past_the_first_sector_is_not_written_over() {
    let old = header(3, 16, Some((vec![b'o'; 400], "raw".into()))).unwrap();
    let new = with_backing(&old, &Some((vec![b'n'; 500], "qcow2".into())));
    let switch = new.replace(&old, &area_of(&old)).unwrap();
    assert_eq!(switch.steps.len(), 2);
    play(&old, &new, &area_of(&old)).unwrap();
}

/// Whether there is a table of features' names.
fn is_named(header: &Header) -> bool {
    header.extension(ExtensionKind::FeatureNames).is_some()
}

#[test]
fn the_names_of_features_stay_where_they_fit_no_more_into_the_first_sector() {
    let old = header(3, 16, None).unwrap();
    assert!(is_named(&old));
    let named = with_backing(&old, &Some((b"/a/base.qcow2".to_vec(), "qcow2".into())));
    let (first, area) = play(&old, &named, &area_of(&old)).unwrap();
    assert!(is_named(&first));
    // Away and back, as both headers reach into the second sector.
    let other = with_backing(&first, &Some((b"other.raw".to_vec(), "raw".into())));
    let (second, area) = play(&first, &other, &area).unwrap();
    assert!(is_named(&second));
    let (third, _) = play(&second, &with_backing(&second, &None), &area).unwrap();
    assert!(is_named(&third));
    // A small cluster has no room for them.
    let small = header(3, 9, None).unwrap();
    let (small, _) =
        play(&small, &with_backing(&small, &Some((b"base".to_vec(), "raw".into()))), &area_of(&small)).unwrap();
    assert!(!is_named(&small));
}

#[test]
fn versions_change_both_ways() {
    let two = header(2, 16, Some((b"base".to_vec(), "raw".into()))).unwrap();
    let three = header(3, 16, Some((b"base".to_vec(), "raw".into()))).unwrap();
    let (up, area) = play(&two, &three, &area_of(&two)).unwrap();
    assert_eq!(up.version, 3);
    let (down, _) = play(&up, &two, &area).unwrap();
    assert_eq!(down, two);
}

#[test]
fn a_name_that_does_not_fit_is_refused() {
    let old = header(3, 9, None).unwrap();
    let new = with_backing(&old, &Some((vec![b'n'; 500], "raw".into())));
    assert!(matches!(new.replace(&old, &area_of(&old)), Err(FormatError::HeaderFull { .. })));
}

fn a_backing() -> impl Strategy<Value = Backing> {
    proptest::option::of((proptest::collection::vec(1u8..255, 1..700), "[a-z0-9]{1,15}"))
}

proptest! {
    #[test]
    fn edge_57_no_torn_step_loses_a_header(
        bits in 11u32..=16,
        first in a_backing(),
        then in proptest::collection::vec((a_backing(), 0u32..=6, any::<bool>()), 1..4),
        unknown in proptest::option::of((1u32..1000, proptest::collection::vec(any::<u8>(), 0..300))),
    ) {
        let Some(mut now) = header(3, bits, first) else { return Ok(()) };
        // Of a small cluster with long names, and of extensions that take several sectors, there may be no way.
        let roomy = bits >= 13 && unknown.is_none();
        if let Some((kind, data)) = unknown {
            now.extensions.push(Extension { kind: ExtensionKind::Unknown(kind), data });
        }
        let mut area = area_of(&now);
        for (backing, order, lazy) in then {
            let mut new = with_backing(&now, &backing);
            new.refcount_order = order;
            new.compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
            match play(&now, &new, &area) {
                Ok(played) => {
                    prop_assert!(!roomy || is_named(&played.0));
                    (now, area) = played;
                }
                Err(e) => prop_assert!(matches!(e, FormatError::HeaderFull { .. }) && !roomy, "{e}"),
            }
        }
    }
}
