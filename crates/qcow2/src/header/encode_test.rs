//! Writing headers: what is refused, what one sector's change keeps, and that nothing is lost on the way.

use proptest::prelude::*;

use crate::samples_test::Sample;
use crate::*;

fn backed() -> Header {
    Sample::load("v3_backing").header()
}

#[test]
fn edge_06_long_backing_name_is_refused_on_writing() {
    let mut header = backed();
    header.set_backing(Some(&[b'n'; 1023]), Some("raw"));
    header.encode().unwrap();
    header.set_backing(Some(&[b'n'; 1024]), Some("raw"));
    assert!(matches!(header.encode(), Err(FormatError::OutOfRange { value: 1024, .. })));
}

#[test]
fn header_that_does_not_fit_the_cluster_is_refused() {
    let small = CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(1 << 20) };
    // 112 of the header, 16 of the format, 8 of the end marker.
    let fits = CreateParams { backing: Some((vec![b'n'; 376], "raw".into())), ..small.clone() };
    assert_eq!(fits.header().unwrap().encode().unwrap().len(), 512);
    let too_long = CreateParams { backing: Some((vec![b'n'; 377], "raw".into())), ..small };
    assert_eq!(too_long.header(), Err(FormatError::HeaderFull { needed: 513, available: 512 }));
}

#[test]
fn version_2_with_what_only_version_3_has_is_refused() {
    let v2 = || CreateParams { version: 2, ..CreateParams::new(1 << 20) };
    v2().header().unwrap();
    for wrong in [
        CreateParams { lazy_refcounts: true, ..v2() },
        CreateParams { extended_l2: true, ..v2() },
        CreateParams { compression: Compression::Zstd, ..v2() },
        CreateParams { data_file: Some(b"d".to_vec()), ..v2() },
        CreateParams { refcount_order: 3, ..v2() },
        CreateParams { version: 4, ..v2() },
    ] {
        assert!(wrong.header().is_err(), "{wrong:?}");
    }
}

#[test]
fn contradicting_create_options_are_refused() {
    let v3 = || CreateParams::new(1 << 20);
    for wrong in [
        CreateParams { data_file_raw: true, ..v3() },
        CreateParams {
            data_file: Some(b"d".to_vec()),
            data_file_raw: true,
            backing: Some((b"b".to_vec(), "raw".into())),
            ..v3()
        },
        CreateParams { extended_l2: true, cluster_bits: ClusterBits::new(13).unwrap(), ..v3() },
        CreateParams { refcount_order: 7, ..v3() },
        CreateParams { backing: Some((b"b".to_vec(), "a format with a long name".into())), ..v3() },
        CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new((128 << 30) + 1) },
    ] {
        assert!(wrong.header().is_err(), "{wrong:?}");
    }
    CreateParams { cluster_bits: ClusterBits::new(9).unwrap(), ..CreateParams::new(128 << 30) }.header().unwrap();
}

#[test]
fn set_backing_replaces_and_removes_name_and_format() {
    let mut header = backed();
    header.set_backing(Some(b"other"), Some("qcow2"));
    assert_eq!((header.backing_name.as_deref(), header.backing_format()), (Some(&b"other"[..]), Some("qcow2")));
    header.set_backing(None, Some("qcow2"));
    assert_eq!((header.backing_name.as_deref(), header.backing_format()), (None, None));
    assert_eq!(header.extensions.len(), 1);
}

#[test]
fn edge_54_one_sector_changes_l1_offset_and_size_together() {
    let sample = Sample::load("v3_backing");
    let mut header = sample.header();
    header.l1_size = 7;
    header.l1_table_offset = HostOffset::new(0x50000);
    let sector = header.encode_fixed(&sample.first_cluster()[..512]).unwrap();
    assert_eq!(sector.len(), 512);
    let mut cluster = sample.first_cluster();
    cluster[..512].copy_from_slice(&sector);
    assert_eq!(Header::parse(&cluster, 0x60000).unwrap(), header);
}

#[test]
fn edge_57_one_sector_change_leaves_a_foreign_layout_alone() {
    // The backing name far from where encode() would put it, and bytes between that belong to no one.
    let mut cluster = Sample::load("v3_backing").first_cluster();
    let name_at = 40000;
    cluster[8..16].copy_from_slice(&(name_at as u64).to_be_bytes());
    cluster[name_at..name_at + 8].copy_from_slice(b"away.raw");
    cluster[505..512].copy_from_slice(b"whatever"[..7].try_into().unwrap());
    let mut header = Header::parse(&cluster, 0x40000).unwrap();
    assert_eq!(header.backing_name.as_deref(), Some(&b"away.raw"[..]));
    header.incompatible.insert(Incompatible::DIRTY);
    let sector = header.encode_fixed(&cluster[..512]).unwrap();
    assert_eq!(sector[79], 1);
    let changed = cluster[..512].iter().zip(&sector).filter(|(old, new)| old != new).count();
    assert_eq!(changed, 1);
}

#[test]
fn edge_57_one_sector_change_refuses_what_takes_more() {
    let sector = &Sample::load("v3_backing").first_cluster()[..512];
    let changes: [fn(&mut Header); 7] = [
        |h| h.set_backing(None, None),
        |h| h.set_backing(Some(b"longer than before"), Some("raw")),
        |h| h.refcount_order = 3,
        |h| h.header_length = 120,
        |h| h.incompatible.insert(Incompatible::DATA_FILE),
        |h| h.cluster_bits = ClusterBits::new(12).unwrap(),
        |h| {
            h.compression = Compression::Zstd;
            h.incompatible.insert(Incompatible::COMPRESSION);
        },
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut header = backed();
        change(&mut header);
        assert!(header.encode_fixed(sector).is_err(), "{i}");
    }
    assert!(backed().encode_fixed(&sector[..100]).is_err());
    assert!(backed().encode_fixed(&[0; 512]).is_err());
}

fn bytes(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), len)
}

fn params() -> impl Strategy<Value = CreateParams> {
    let backing = proptest::option::of((bytes(1..200), "[a-z0-9]{1,15}"));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let data_file = proptest::option::of(bytes(1..100));
    (9u32..=21, 0u32..=6, 0u64..1 << 37, backing, data_file, flags).prop_map(
        |(bits, order, size, backing, data_file, f)| CreateParams {
            version: 3,
            cluster_bits: ClusterBits::new(bits).unwrap(),
            refcount_order: order,
            size,
            backing,
            data_file,
            data_file_raw: false,
            compression: if f.0 { Compression::Zstd } else { Compression::Zlib },
            extended_l2: f.1 && bits >= 14,
            lazy_refcounts: f.2,
        },
    )
}

proptest! {
    #[test]
    fn headers_round_trip(
        params in params(),
        unknown_fields in bytes(0..40),
        unknown_extension in proptest::option::of((1u32..1000, bytes(0..40))),
        autoclear in any::<u64>(),
    ) {
        let mut header = match params.header() {
            Ok(header) => header,
            Err(FormatError::HeaderFull { .. }) => return Ok(()),
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };
        let size = header.cluster_bits.size();
        header.refcount_table_offset = HostOffset::new(size);
        header.refcount_table_clusters = 1;
        header.l1_table_offset = HostOffset::new(3 * size);
        // Neither of the two known bits, which ask for more.
        header.autoclear = Autoclear::from_bits_retain(autoclear & !3);
        header.unknown_fields = unknown_fields;
        header.unknown_fields.resize(header.unknown_fields.len().next_multiple_of(8) + 7, 0);
        header.header_length = 105 + u32::try_from(header.unknown_fields.len()).unwrap();
        if let Some((kind, data)) = unknown_extension {
            header.extensions.push(Extension { kind: ExtensionKind::Unknown(kind), data });
        }
        let mut encoded = match header.encode() {
            Err(FormatError::HeaderFull { .. }) => return Ok(()),
            other => other.unwrap(),
        };
        encoded.resize(usize::try_from(size).unwrap(), 0);
        prop_assert_eq!(Header::parse(&encoded, 1 << 50), Ok(header));
    }
}

/// A small generator, so that a seed is all it takes to run a failing case again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Overwrites something: a byte, a field with an interesting number, or a run.
fn mutate(random: &mut Random, bytes: &mut [u8]) {
    let interesting =
        [0, 1, 7, 8, 9, 21, 104, 511, 512, 1023, 1 << 16, 1 << 31, u64::from(u32::MAX), 1 << 56, 1 << 63, u64::MAX];
    for _ in 0..=random.below(4) {
        // Mostly where the fields and the extensions are.
        let end = if random.below(4) == 0 { bytes.len() } else { bytes.len().min(160) };
        let at = random.below(end);
        let value = interesting[random.below(interesting.len())].to_be_bytes();
        match random.below(4) {
            0 => bytes[at] = random.next().to_be_bytes()[0],
            1 => bytes[at & !3..].iter_mut().zip(&value[4..]).for_each(|(to, from)| *to = *from),
            2 => bytes[at & !7..].iter_mut().zip(&value).for_each(|(to, from)| *to = *from),
            _ => bytes[at..].iter_mut().take(16).for_each(|to| *to = random.next().to_be_bytes()[0]),
        }
    }
}

#[test]
fn hundred_thousand_hostile_headers_neither_panic_nor_change_on_rewriting() {
    let seed = match std::env::var("COWHAND_SEED") {
        Ok(seed) => seed.parse().expect("COWHAND_SEED is a number"),
        Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
    };
    println!("run it again with COWHAND_SEED={seed}");
    let mut random = Random(seed);
    let names = ["default", "v2_backing", "v3_backing", "clusters_512_backing", "luks", "data_file", "bitmaps"];
    // Extensions and names lie at the front; a shorter cluster makes for more cases in a second.
    let starts = names.map(|name| {
        let mut bytes = Sample::load(name).first_cluster();
        bytes.truncate(4096);
        bytes
    });
    let mut accepted = 0;
    for round in 0..100_000 {
        let mut bytes = starts[random.below(starts.len())].clone();
        if round % 10 == 0 {
            bytes[4..].iter_mut().for_each(|b| *b = random.next().to_be_bytes()[0]);
        } else {
            mutate(&mut random, &mut bytes);
        }
        // Of a file of this length it is the whole; of a longer one it is the first cluster if that is so small.
        let file_len = if random.below(2) == 0 { bytes.len() as u64 } else { 1 << 40 };
        if let Ok(size) = Header::needed_len(&bytes)
            && file_len > bytes.len() as u64
        {
            bytes.resize(size, 0);
        }
        let Ok(header) = Header::parse(&bytes, file_len) else { continue };
        accepted += 1;
        let mut encoded = match header.encode() {
            Err(FormatError::HeaderFull { .. }) => continue,
            other => other.unwrap_or_else(|e| panic!("{header:?} was accepted, but not written: {e}")),
        };
        encoded.resize(bytes.len(), 0);
        let again = Header::parse(&encoded, file_len).unwrap();
        // Rounding header_length up makes new fields, of zeros.
        let mut expected = Header { header_length: again.header_length, ..header };
        expected.unknown_fields.resize(again.unknown_fields.len(), 0);
        assert_eq!(again, expected);
    }
    println!("{accepted} accepted");
    assert!(accepted > 1000, "only {accepted} were accepted: the mutations are too wild to show anything");
}
