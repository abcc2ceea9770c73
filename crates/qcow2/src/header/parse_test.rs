//! Sharp edges of the header, each on bytes that differ in just that from a good one.

use crate::samples_test::Sample;
use crate::*;

const FILE_LEN: u64 = 0x40000;

/// The header cluster of a good version 3 image of 1 GiB with 64 KiB clusters, changed by `change`.
fn v3(change: impl FnOnce(&mut [u8])) -> Result<Header, FormatError> {
    let mut bytes = Sample::load("default").first_cluster();
    change(&mut bytes);
    Header::parse(&bytes, FILE_LEN)
}

/// The same in version 2, of 1 MiB with a backing file.
fn v2(change: impl FnOnce(&mut [u8])) -> Result<Header, FormatError> {
    let mut bytes = Sample::load("v2_backing").first_cluster();
    change(&mut bytes);
    Header::parse(&bytes, FILE_LEN)
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Replaces the extensions of a version 3 header, which begin at byte 112.
fn put_extensions(bytes: &mut [u8], extensions: &[u8]) {
    bytes[112..].fill(0);
    bytes[112..112 + extensions.len()].copy_from_slice(extensions);
}

/// The name of the field that an error is about.
fn field(error: FormatError) -> &'static str {
    match error {
        FormatError::TooShort { field, .. }
        | FormatError::OutOfRange { field, .. }
        | FormatError::Misaligned { field, .. }
        | FormatError::ReservedBits { field, .. }
        | FormatError::OutsideFile { field, .. }
        | FormatError::InsideHeader { field, .. }
        | FormatError::UnknownValue { field, .. }
        | FormatError::Inconsistent { field, .. } => field.name(),
        other => panic!("{other:?} names no field"),
    }
}

#[test]
fn foreign_and_short_files_are_refused() {
    assert!(!Header::probe(b"QFI") && !Header::probe(b"\x7fELF"));
    assert_eq!(Header::parse(&[0; 512], 512), Err(FormatError::NotQcow2));
    assert_eq!(Header::parse(&[], 0), Err(FormatError::NotQcow2));
    let bytes = Sample::load("default").first_cluster();
    for len in 4..104 {
        let error = Header::parse(&bytes[..len], len as u64).unwrap_err();
        assert_eq!(field(error), "header", "{len}");
    }
    assert_eq!(field(Header::parse(&bytes[..512], FILE_LEN).unwrap_err()), "header");
    assert_eq!(Header::needed_len(&bytes[..512]), Ok(65536));
}

#[test]
fn truncated_file_is_said_to_be_truncated() {
    let bytes = Sample::load("default").first_cluster();
    for len in [65536, 0x10000, 0x20000, 0x30000] {
        let error = Header::parse(&bytes, len).unwrap_err();
        assert!(matches!(error, FormatError::OutsideFile { .. }), "{len}: {error}");
        assert!(error.to_string().contains("truncated"), "{error}");
    }
    Header::parse(&bytes, 0x30001).unwrap();
}

#[test]
fn edge_01_versions_other_than_2_and_3_are_refused() {
    for version in [0, 1, 4, u32::MAX] {
        assert_eq!(v3(|b| put32(b, 4, version)), Err(FormatError::UnsupportedVersion { version }));
    }
}

#[test]
fn edge_01_version_2_has_no_features_and_16_bit_refcounts() {
    let header = v2(|_| ()).unwrap();
    assert_eq!((header.version, header.header_length, header.refcount_order), (2, 72, 4));
    assert!(header.incompatible.is_empty() && header.compatible.is_empty() && header.autoclear.is_empty());
    assert_eq!(header.backing_format(), Some("raw"));
}

#[test]
fn edge_02_header_length_is_at_least_104_and_within_the_cluster() {
    for len in [0, 72, 103, 65537, u32::MAX] {
        assert_eq!(field(v3(|b| put32(b, 100, len)).unwrap_err()), "header_length", "{len}");
    }
}

#[test]
fn edge_02_header_length_that_is_no_multiple_of_8_is_read_and_written_as_one() {
    let unaligned = |b: &mut [u8]| {
        put_extensions(b, &[]);
        put32(b, 100, 109);
        b[105..109].copy_from_slice(b"abcd");
        // The chain begins right after the header, aligned or not.
        b[109..120].copy_from_slice(b"\xe2\x79\x2a\xca\x00\x00\x00\x03raw");
    };
    let header = v3(unaligned).unwrap();
    assert_eq!((header.header_length, header.unknown_fields.as_slice()), (109, &b"abcd"[..]));
    assert_eq!(header.backing_format(), Some("raw"));
    let encoded = header.encode().unwrap();
    assert_eq!(encoded[100..104], 112u32.to_be_bytes());
    assert_eq!(&encoded[105..112], b"abcd\0\0\0");
}

#[test]
fn edge_02_unknown_fields_and_extensions_survive_a_rewrite() {
    let strange = |b: &mut [u8]| {
        b[112..].fill(0);
        put32(b, 100, 128);
        b[105..128].copy_from_slice(&[0xa5; 23]);
        b[128..147].copy_from_slice(b"\x12\x34\x56\x78\x00\x00\x00\x0bunheard of\0");
    };
    let mut header = v3(strange).unwrap();
    header.set_backing(Some(b"base"), Some("qcow2"));
    header.l1_size += 1;
    let mut encoded = header.encode().unwrap();
    encoded.resize(65536, 0);
    let again = Header::parse(&encoded, FILE_LEN).unwrap();
    assert_eq!(again, header);
    assert_eq!(again.unknown_fields, [0xa5; 23]);
    assert_eq!(again.extension(ExtensionKind::Unknown(0x1234_5678)), Some(&b"unheard of\0"[..]));
}

#[test]
fn edge_03_unknown_incompatible_bits_are_refused_by_the_names_in_the_image() {
    let error = v3(|b| {
        put64(b, 72, 1 << 63 | 1 << 40 | 1);
        let mut table = b"\x68\x03\xf8\x57\x00\x00\x00\x60\x00\x3f".to_vec();
        // A name of all 46 bytes, without a NUL; then one for the same bit of another mask.
        table.extend_from_slice(&[b'x'; 46]);
        table.extend_from_slice(b"\x01\x28not this");
        put_extensions(b, &table);
    });
    let FormatError::UnknownFeatures { bits, names } = error.unwrap_err() else { panic!("other error") };
    assert_eq!(bits, 1 << 63 | 1 << 40);
    assert_eq!(names, format!("{}, Unknown incompatible feature: 10000000000", "x".repeat(46)));
}

#[test]
fn edge_03_feature_names_from_the_image_do_not_reach_the_terminal_raw() {
    let error = v3(|b| {
        put64(b, 72, 1 << 63);
        put_extensions(b, b"\x68\x03\xf8\x57\x00\x00\x00\x30\x00\x3f\x1b[2J\nroot# ");
    });
    let message = error.unwrap_err().to_string();
    assert!(!message.contains(['\x1b', '\n']), "{message:?}");
}

#[test]
fn edge_03_unknown_incompatible_bits_are_refused_whatever_else_is_wrong() {
    let error = v3(|b| {
        put64(b, 72, 1 << 5);
        put32(b, 36, u32::MAX);
        put_extensions(b, b"\x68\x03\xf8\x57\xff\xff\xff\xff");
    });
    assert!(matches!(error, Err(FormatError::UnknownFeatures { bits: 32, .. })), "{error:?}");
}

#[test]
fn edge_03_unknown_compatible_and_autoclear_bits_are_kept() {
    let header = v3(|b| {
        put64(b, 80, 1 << 62);
        put64(b, 88, 1 << 61);
    });
    let header = header.unwrap();
    assert_eq!(header.compatible.bits(), 1 << 62);
    assert_eq!(header.autoclear.unknown().bits(), 1 << 61);
    let encoded = header.encode().unwrap();
    assert_eq!(encoded[80..96], [(1u64 << 62).to_be_bytes(), (1u64 << 61).to_be_bytes()].concat());
}

#[test]
fn edge_04_compression_type_agrees_with_its_feature_bit() {
    let zstd = v3(|b| {
        put64(b, 72, 8);
        b[104] = 1;
    });
    assert_eq!(zstd.unwrap().compression, Compression::Zstd);
    for (bit, kind) in [(8, 0), (0, 1), (8, 2), (0, 2)] {
        let error = v3(|b| {
            put64(b, 72, bit);
            b[104] = kind;
        });
        assert_eq!(field(error.unwrap_err()), "compression_type", "{bit} {kind}");
    }
}

#[test]
fn edge_04_compression_type_does_not_exist_in_a_header_of_104_bytes() {
    // What stands at byte 104 is the first extension then.
    let short = |b: &mut [u8]| {
        put32(b, 100, 104);
        b[104..120].copy_from_slice(b"\xe2\x79\x2a\xca\x00\x00\x00\x05qcow2\0\0\0");
        b[120..].fill(0);
    };
    let header = v3(short).unwrap();
    assert_eq!((header.compression, header.backing_format()), (Compression::Zlib, Some("qcow2")));
    assert_eq!(header.encode().unwrap()[100..104], 104u32.to_be_bytes());
    let flagged = v3(|b| {
        short(b);
        put64(b, 72, 8);
    });
    assert_eq!(field(flagged.unwrap_err()), "compression_type");
}

#[test]
fn edge_05_extensions_end_at_the_backing_name() {
    let header = v3(|b| {
        // No end marker: the name stands where it would be.
        put_extensions(b, b"\xe2\x79\x2a\xca\x00\x00\x00\x03raw\xff\xff\xff\xff\xffname");
        put64(b, 8, 128);
        put32(b, 16, 4);
    });
    let header = header.unwrap();
    assert_eq!((header.backing_format(), header.backing_name.as_deref()), (Some("raw"), Some(&b"name"[..])));
    assert_eq!(header.extensions.len(), 1);
}

#[test]
fn edge_05_extension_past_the_backing_name_or_the_cluster_is_refused() {
    let past_name = v3(|b| {
        put_extensions(b, b"\xe2\x79\x2a\xca\x00\x00\x00\x09raw\0\0\0\0\0name");
        put64(b, 8, 128);
        put32(b, 16, 4);
    });
    assert_eq!(field(past_name.unwrap_err()), "backing format extension");
    for len in [65417u32, 0x7fff_ffff, u32::MAX - 7, u32::MAX] {
        let error = v3(|b| put32(b, 116, len)).unwrap_err();
        assert_eq!(field(error.clone()), "feature name table extension", "{len}");
        assert_eq!(error.offset(), Some(112));
    }
}

#[test]
fn edge_05_known_extension_twice_is_refused() {
    let error = v3(|b| put_extensions(b, b"DATA\x00\x00\x00\x01a\0\0\0\0\0\0\0DATA\x00\x00\x00\x01b"));
    assert_eq!(field(error.unwrap_err()), "external data file name extension");
}

#[test]
fn edge_05_of_two_backing_formats_the_last_one_holds() {
    let twice = b"\xe2\x79\x2a\xca\x00\x00\x00\x05qcow2\0\0\0\xe2\x79\x2a\xca\x00\x00\x00\x03raw\0\0\0\0\0";
    let mut header = v3(|b| put_extensions(b, twice)).unwrap();
    assert_eq!(header.backing_format(), Some("raw"));
    header.set_backing(Some(b"base"), Some("qcow2"));
    let formats = header.extensions.iter().filter(|e| e.kind == ExtensionKind::BackingFormat);
    assert_eq!((formats.count(), header.backing_format()), (1, Some("qcow2")));
}

#[test]
fn edge_03_feature_name_without_its_padding_is_read() {
    let table = [&b"\0\x3fa"[..], &[0; 45], b"\0\x3dlast one"].concat();
    let names: Vec<_> = FeatureName::parse_table(&table).map(|feature| (feature.bit, feature.name)).collect();
    assert_eq!(names, [(63, "a".to_string()), (61, "last one".to_string())]);
    // One that is cut in the middle of its head names nothing.
    assert_eq!(FeatureName::parse_table(b"\0").count(), 0);
}

#[test]
fn edge_05_backing_format_too_long_or_no_utf8_is_refused() {
    let long = v3(|b| put_extensions(b, b"\xe2\x79\x2a\xca\x00\x00\x00\x10qqqqqqqqqqqqqqqq"));
    assert_eq!(field(long.unwrap_err()), "backing format extension");
    let garbage = v3(|b| put_extensions(b, b"\xe2\x79\x2a\xca\x00\x00\x00\x02\xff\xfe"));
    assert_eq!(field(garbage.unwrap_err()), "backing format extension");
}

#[test]
fn edge_06_backing_name_of_1023_bytes_is_the_longest() {
    let named = |len: u32, at: u64| {
        v3(move |b| {
            put64(b, 8, at);
            put32(b, 16, len);
            let at = usize::try_from(at).unwrap_or(usize::MAX).min(b.len());
            let end = at.saturating_add(len as usize).min(b.len());
            b[at..end].fill(b'n');
        })
    };
    assert_eq!(named(1023, 4096).unwrap().backing_name, Some(vec![b'n'; 1023]));
    assert_eq!(field(named(1024, 4096).unwrap_err()), "backing_file_size");
    assert_eq!(field(named(u32::MAX, 4096).unwrap_err()), "backing_file_size");
}

#[test]
fn edge_06_backing_name_lies_in_the_first_cluster_after_the_header() {
    for at in [1, 111, 65536 - 9, 65536, u64::MAX - 9, u64::MAX] {
        let error = v3(|b| {
            put64(b, 8, at);
            put32(b, 16, 10);
        });
        assert_eq!(field(error.unwrap_err()), "backing_file_offset", "{at}");
    }
    let last = v3(|b| {
        put64(b, 8, 65526);
        put32(b, 16, 10);
    });
    assert_eq!(last.unwrap().backing_name.unwrap().len(), 10);
}

#[test]
fn edge_06_backing_name_length_is_undefined_without_a_backing_file() {
    assert_eq!(v3(|b| put32(b, 16, u32::MAX)).unwrap().backing_name, None);
    assert_eq!(v3(|b| put64(b, 8, 4096)).unwrap().backing_name, None);
}

#[test]
fn edge_07_refcount_order_is_at_most_6() {
    assert_eq!(v3(|b| put32(b, 96, 6)).unwrap().refcount_bits(), 64);
    for order in [7, 32, 64, u32::MAX] {
        assert_eq!(field(v3(|b| put32(b, 96, order)).unwrap_err()), "refcount_order", "{order}");
    }
}

#[test]
fn edge_08_cluster_bits_are_9_to_21() {
    for bits in [0, 8, 22, 32, 64, u32::MAX] {
        assert_eq!(field(v3(|b| put32(b, 20, bits)).unwrap_err()), "cluster_bits", "{bits}");
    }
}

#[test]
fn edge_08_l1_table_of_32_mib_is_the_largest() {
    let entries = 4 << 20;
    let roomy = |b: &mut [u8], entries| {
        put32(b, 36, entries);
        Header::parse(b, 1 << 40)
    };
    let mut bytes = Sample::load("default").first_cluster();
    assert_eq!(roomy(&mut bytes, entries).unwrap().l1_size, entries);
    assert_eq!(field(roomy(&mut bytes, entries + 1).unwrap_err()), "l1_size");
    assert_eq!(field(roomy(&mut bytes, u32::MAX).unwrap_err()), "l1_size");
}

#[test]
fn edge_08_refcount_table_of_8_mib_is_the_largest() {
    let clusters = |n| {
        let mut bytes = Sample::load("default").first_cluster();
        put32(&mut bytes, 56, n);
        Header::parse(&bytes, 1 << 40)
    };
    assert_eq!(clusters(128).unwrap().refcount_table_clusters, 128);
    assert_eq!(field(clusters(129).unwrap_err()), "refcount_table_clusters");
    assert_eq!(field(clusters(u32::MAX).unwrap_err()), "refcount_table_clusters");
}

#[test]
fn edge_08_snapshots_are_at_most_65536_and_in_the_file() {
    let snapshots = |count, at| {
        let mut bytes = Sample::load("default").first_cluster();
        put32(&mut bytes, 60, count);
        put64(&mut bytes, 64, at);
        Header::parse(&bytes, 0x60_0000)
    };
    assert_eq!(snapshots(65536, 0x40000).unwrap().snapshot_count, 65536);
    assert_eq!(field(snapshots(65537, 0x40000).unwrap_err()), "nb_snapshots");
    for at in [0, 0x8000, 0x60_0000, 1 << 56, u64::MAX << 16] {
        assert_eq!(field(snapshots(1, at).unwrap_err()), "snapshots_offset", "{at:#x}");
    }
}

#[test]
fn edge_08_table_offsets_are_aligned_below_2_56_in_the_file_and_not_the_header() {
    for (name, at) in [("l1_table_offset", 40), ("refcount_table_offset", 48)] {
        for offset in [0, 512, 0x10200, 0x40000, 1 << 55, 1 << 56, 1 << 63, u64::MAX, u64::MAX << 16] {
            assert_eq!(field(v3(|b| put64(b, at, offset)).unwrap_err()), name, "{offset:#x}");
        }
    }
}

#[test]
fn edge_09_refcount_table_may_be_empty_only_for_a_check() {
    let mut bytes = Sample::load("default").first_cluster();
    put32(&mut bytes, 56, 0);
    assert_eq!(field(Header::parse(&bytes, FILE_LEN).unwrap_err()), "refcount_table_clusters");
    let header = Header::parse_for_check(&bytes, FILE_LEN).unwrap();
    assert_eq!(field(header.refcount_table_problem(FILE_LEN).unwrap()), "refcount_table_clusters");
    assert_eq!(v3(|_| ()).unwrap().refcount_table_problem(FILE_LEN), None);
}

#[test]
fn edge_09_l1_table_covers_the_size_and_may_be_larger() {
    // 512 MiB to an entry.
    assert_eq!(v3(|b| put32(b, 36, 1)), Err(FormatError::L1TooSmall { l1_size: 1, needed: 2, size: 1 << 30 }));
    assert_eq!(v3(|b| put32(b, 36, 100)).unwrap().l1_entries_needed(), 2);
    assert_eq!(
        v3(|b| put64(b, 24, (1 << 30) + 1)),
        Err(FormatError::L1TooSmall { l1_size: 2, needed: 3, size: (1 << 30) + 1 })
    );
    assert!(matches!(v3(|b| put64(b, 24, u64::MAX)), Err(FormatError::L1TooSmall { .. })));
}

#[test]
fn edge_10_size_need_not_be_a_multiple_of_anything() {
    assert_eq!(v3(|b| put64(b, 24, 12345)).unwrap().size, 12345);
    assert_eq!(CreateParams::new(12345).header().unwrap().size, 12800);
    assert!(CreateParams::new(u64::MAX).header().is_err());
}

#[test]
fn edge_11_extended_l2_needs_clusters_of_16_kib() {
    let sized = |bits| {
        let mut bytes = Sample::load("extended_l2").first_cluster();
        put32(&mut bytes, 20, bits);
        put64(&mut bytes, 24, 1 << 20);
        Header::parse(&bytes, 1 << 40)
    };
    assert_eq!(sized(14).unwrap().l2_entries(), 1024);
    assert_eq!(field(sized(13).unwrap_err()), "cluster_bits");
}

#[test]
fn edge_12_dirty_and_corrupt_images_parse() {
    let header = v3(|b| put64(b, 72, 3)).unwrap();
    assert!(header.incompatible.contains(Incompatible::DIRTY | Incompatible::CORRUPT));
}

#[test]
fn edge_13_encrypted_images_parse_and_say_so() {
    assert_eq!(v3(|b| put32(b, 32, 1)).unwrap().crypt_method, CryptMethod::Aes);
    assert_eq!(Sample::load("luks").header().crypt_method, CryptMethod::Luks);
    assert_eq!(field(v3(|b| put32(b, 32, 3)).unwrap_err()), "crypt_method");
}

#[test]
fn edge_13_luks_and_its_header_extension_come_together() {
    assert_eq!(field(v3(|b| put32(b, 32, 2)).unwrap_err()), "crypt_method");
    let pointer = |offset: u64, len: u64| {
        v3(|b| {
            put32(b, 32, 2);
            put_extensions(b, b"\x05\x37\xbe\x77\x00\x00\x00\x10");
            put64(b, 120, offset);
            put64(b, 128, len);
        })
    };
    let luks = pointer(0x40000, 4096).unwrap().luks_extension().unwrap();
    assert_eq!(luks, Some(LuksExtension { offset: HostOffset::new(0x40000), len: 4096 }));
    for (offset, len) in [(0, 4096), (0x40200, 4096), (1 << 56, 4096), (0x40000, 591), (0x40000, u64::MAX)] {
        assert!(pointer(offset, len).is_err(), "{offset:#x} {len}");
    }
    let without_luks =
        v3(|b| put_extensions(b, b"\x05\x37\xbe\x77\x00\x00\x00\x10\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\x10\0"));
    assert_eq!(field(without_luks.unwrap_err()), "crypt_method");
}

#[test]
fn edge_40_bitmaps_without_the_autoclear_bit_are_inconsistent_but_kept() {
    let mut bytes = Sample::load("bitmaps").first_cluster();
    assert!(Header::parse(&bytes, FILE_LEN).unwrap().bitmaps_extension().unwrap().is_some());
    put64(&mut bytes, 88, 0);
    let header = Header::parse(&bytes, FILE_LEN).unwrap();
    assert_eq!(header.bitmaps_extension(), Ok(None));
    assert!(header.extension(ExtensionKind::Bitmaps).is_some());
    let bit_alone = v3(|b| put64(b, 88, 1));
    assert_eq!(field(bit_alone.unwrap_err()), "autoclear_features");
}

#[test]
fn edge_08_bitmaps_extension_is_bounded() {
    let bitmaps = |count: u32, reserved: u32, size: u64, offset: u64| {
        v3(|b| {
            put64(b, 88, 1);
            put_extensions(b, b"\x23\x85\x28\x75\x00\x00\x00\x18");
            put32(b, 120, count);
            put32(b, 124, reserved);
            put64(b, 128, size);
            put64(b, 136, offset);
        })
    };
    bitmaps(65535, 0, 65535 * 32, 0x40000).unwrap();
    for (count, reserved, size, offset) in [
        (0, 0, 32, 0x40000),
        (65536, 0, 65536 * 32, 0x40000),
        (1, 1, 32, 0x40000),
        (1, 0, 31, 0x40000),
        (1, 0, u64::MAX, 0x40000),
        (1, 0, 32, 0),
        (1, 0, 32, 0x40008),
        (1, 0, 32, 1 << 56),
    ] {
        assert!(bitmaps(count, reserved, size, offset).is_err(), "{count} {reserved} {size} {offset:#x}");
    }
    assert!(
        v3(|b| {
            put64(b, 88, 1);
            put_extensions(b, b"\x23\x85\x28\x75\x00\x00\x00\x08\0\0\0\x01\0\0\0\0");
        })
        .is_err()
    );
}

#[test]
fn edge_41_raw_data_file_excludes_a_backing_file_and_needs_a_data_file() {
    assert_eq!(field(v3(|b| put64(b, 88, 2)).unwrap_err()), "autoclear_features");
    let raw = |backing: bool| {
        v3(move |b| {
            put64(b, 72, 4);
            put64(b, 88, 2);
            put64(b, 8, if backing { 4096 } else { 0 });
            put32(b, 16, 4);
        })
    };
    assert!(raw(false).unwrap().is_data_file_raw());
    assert_eq!(field(raw(true).unwrap_err()), "backing_file_offset");
}

#[test]
fn data_file_excludes_internal_snapshots() {
    let error = v3(|b| {
        put64(b, 72, 4);
        put32(b, 60, 1);
        put64(b, 64, 0x30000);
    });
    assert_eq!(field(error.unwrap_err()), "nb_snapshots");
}

#[test]
fn edge_56_data_file_without_a_name_parses() {
    let header = v3(|b| put64(b, 72, 4)).unwrap();
    assert!(header.has_data_file());
    assert_eq!(header.external_data_file_name(), None);
}
