//! Images made by QEMU (testdata/, by its `make`) parse to what `qemu-img info` says of them, and are written back
//! byte for byte.

use crate::*;

/// A sample: what qemu-img says, and pieces of the image by offset.
pub(crate) struct Sample {
    facts: Vec<(String, String)>,
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Sample {
    pub(crate) fn load(name: &str) -> Self {
        let path = format!("{}/testdata/{name}.hex", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let mut sample = Self { facts: Vec::new(), pieces: Vec::new() };
        for line in text.lines() {
            if let Some(fact) = line.strip_prefix("# ") {
                let (key, value) = fact.split_once(':').unwrap();
                sample.facts.push((key.to_owned(), value.trim().to_owned()));
            } else if let Some(offset) = line.strip_prefix("@0x") {
                sample.pieces.push((u64::from_str_radix(offset, 16).unwrap(), Vec::new()));
            } else {
                let digits = (0..line.len()).step_by(2).map(|at| u8::from_str_radix(&line[at..at + 2], 16).unwrap());
                sample.pieces.last_mut().unwrap().1.extend(digits);
            }
        }
        sample
    }

    fn fact(&self, key: &str) -> &str {
        &self.facts.iter().find(|(k, _)| k == key).unwrap_or_else(|| panic!("no {key}")).1
    }

    fn facts_named(&self, prefix: &str) -> Vec<(String, String)> {
        let named = self.facts.iter().filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_owned(), v.clone())));
        named.collect()
    }

    fn number(&self, key: &str) -> u64 {
        self.fact(key).parse().unwrap()
    }

    /// `len` bytes at `offset`, zeros where the sample has left them out.
    pub(crate) fn bytes(&self, offset: HostOffset, len: u64) -> Vec<u8> {
        let piece = self.pieces.iter().find(|(at, _)| *at == offset.get()).expect("a piece at this offset");
        let mut bytes = piece.1.clone();
        bytes.resize(len as usize, 0);
        bytes
    }

    pub(crate) fn first_cluster(&self) -> Vec<u8> {
        self.bytes(HostOffset::new(0), self.number("cluster-size"))
    }

    pub(crate) fn header(&self) -> Header {
        Header::parse(&self.first_cluster(), self.number("file-length")).unwrap()
    }
}

const ALL: [&str; 19] = [
    "default",
    "empty",
    "v2_backing",
    "v3_backing",
    "clusters_512",
    "clusters_512_backing",
    "clusters_2m_zstd",
    "extended_l2",
    "refcount_1_bit",
    "refcount_64_bits",
    "data_file",
    "data_file_raw",
    "luks",
    "aes",
    "entries",
    "entries_extended",
    "entries_compressed",
    "snapshots",
    "bitmaps",
];

#[test]
fn qemu_headers_parse_to_what_qemu_img_info_says() {
    for name in ALL {
        let sample = Sample::load(name);
        let h = sample.header();
        let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap_or_default().to_vec()).unwrap();
        let flag = |key| sample.fact(key) == "true";
        assert_eq!(h.size, sample.number("virtual-size"), "{name}");
        assert_eq!(h.cluster_bits.size(), sample.number("cluster-size"), "{name}");
        assert_eq!(if h.version == 2 { "0.10" } else { "1.1" }, sample.fact("compat"), "{name}");
        assert_eq!(u64::from(h.refcount_bits()), sample.number("refcount-bits"), "{name}");
        let compression = if h.compression == Compression::Zstd { "zstd" } else { "zlib" };
        assert_eq!(compression, sample.fact("compression-type"), "{name}");
        assert_eq!(h.incompatible.contains(Incompatible::CORRUPT), flag("corrupt"), "{name}");
        assert_eq!(h.incompatible.contains(Incompatible::DIRTY), flag("dirty"), "{name}");
        assert_eq!(h.has_lazy_refcounts(), flag("lazy-refcounts"), "{name}");
        assert_eq!(h.is_extended_l2(), flag("extended-l2"), "{name}");
        assert_eq!(h.has_data_file(), !sample.fact("data-file").is_empty(), "{name}");
        assert_eq!(text(h.external_data_file_name()), sample.fact("data-file"), "{name}");
        assert_eq!(h.is_data_file_raw(), flag("data-file-raw"), "{name}");
        assert_eq!(text(h.backing_name.as_deref()), sample.fact("backing-filename"), "{name}");
        assert_eq!(h.backing_format().unwrap_or_default(), sample.fact("backing-filename-format"), "{name}");
        let crypt = match h.crypt_method {
            CryptMethod::None => "",
            CryptMethod::Aes => "aes",
            CryptMethod::Luks => "luks",
        };
        assert_eq!(crypt, sample.fact("encrypt"), "{name}");
        assert_eq!(h.luks_extension().unwrap().is_some(), crypt == "luks", "{name}");
        assert_eq!(h.snapshot_count as usize, sample.facts_named("snapshot ").len(), "{name}");
        let bitmaps = h.bitmaps_extension().unwrap().map_or(0, |b| b.nb_bitmaps as usize);
        assert_eq!(bitmaps, sample.facts_named("bitmap ").len(), "{name}");
    }
}

#[test]
fn qemu_headers_are_written_back_byte_for_byte() {
    for name in ALL {
        let sample = Sample::load(name);
        let mut encoded = sample.header().encode().unwrap();
        assert_eq!(encoded.len() % 512, 0, "{name}");
        encoded.resize(sample.first_cluster().len(), 0);
        assert!(encoded == sample.first_cluster(), "{name}");
    }
}

#[test]
fn new_headers_are_qemus_byte_for_byte() {
    let m = 1 << 20;
    let v2 = CreateParams { version: 2, ..CreateParams::new(m) };
    let backed = CreateParams { backing: Some((b"base.raw".to_vec(), "raw".into())), ..CreateParams::new(m) };
    let bits = |bits| ClusterBits::new(bits).unwrap();
    let cases = [
        ("default", CreateParams::new(1 << 30)),
        ("empty", CreateParams::new(0)),
        ("v2_backing", CreateParams { backing: backed.backing.clone(), ..v2 }),
        ("v3_backing", backed.clone()),
        ("clusters_512", CreateParams { cluster_bits: bits(9), ..CreateParams::new(m) }),
        ("clusters_512_backing", CreateParams { cluster_bits: bits(9), ..backed }),
        (
            "clusters_2m_zstd",
            CreateParams {
                cluster_bits: bits(21),
                compression: Compression::Zstd,
                lazy_refcounts: true,
                ..CreateParams::new(10 << 40)
            },
        ),
        ("extended_l2", CreateParams { cluster_bits: bits(17), extended_l2: true, ..CreateParams::new(8 << 30) }),
        ("refcount_1_bit", CreateParams { refcount_order: 0, ..CreateParams::new(m) }),
        ("refcount_64_bits", CreateParams { refcount_order: 6, ..CreateParams::new(m) }),
        ("data_file", CreateParams { data_file: Some(b"d.raw".to_vec()), ..CreateParams::new(m) }),
        (
            "data_file_raw",
            CreateParams { data_file: Some(b"e.raw".to_vec()), data_file_raw: true, ..CreateParams::new(m) },
        ),
        ("luks", CreateParams::new(m)),
    ];
    for (name, params) in cases {
        let theirs = Sample::load(name).header();
        let mut ours = params.header().unwrap();
        assert_eq!(ours.l1_size, theirs.l1_size, "{name}");
        ours.set_luks(theirs.luks_extension().unwrap());
        ours.l1_table_offset = theirs.l1_table_offset;
        ours.refcount_table_offset = theirs.refcount_table_offset;
        ours.refcount_table_clusters = theirs.refcount_table_clusters;
        assert_eq!(ours, theirs, "{name}");
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().unwrap())).collect()
}

/// The L2 table of a sample with one, and its geometry.
fn l2_table(sample: &Sample) -> (Vec<u64>, Geometry) {
    let header = sample.header();
    let geometry = header.geometry();
    let l1 = words(&sample.bytes(header.l1_table_offset, u64::from(header.l1_size) * 8));
    assert!(L1Entry::from_raw(l1[0]).copied());
    let table = L1Entry::from_raw(l1[0]).offset(&geometry).unwrap().unwrap();
    (words(&sample.bytes(table, geometry.cluster_bits.size())), geometry)
}

#[test]
fn qemu_l2_entries_decode_to_what_was_written() {
    let (l2, geometry) = l2_table(&Sample::load("entries"));
    let host = |at| HostOffset::new(at);
    let decode = |index: usize| L2Entry::from_raw(l2[index]).decode(&geometry).unwrap();
    assert_eq!(decode(0), L2Kind::Data { host: host(0x50000), copied: true });
    assert_eq!(decode(1), L2Kind::Unallocated);
    assert_eq!(decode(2), L2Kind::Zero { host: Some(host(0x60000)), copied: true });
    assert_eq!(decode(5), L2Kind::Zero { host: None, copied: false });
    assert_eq!(L2Entry::data(host(0x50000), true).unwrap().raw(), l2[0]);
    assert_eq!(L2Entry::zero(Some(host(0x60000)), true).unwrap().raw(), l2[2]);
    assert_eq!(L2Entry::zero(None, false).unwrap().raw(), l2[5]);
}

#[test]
fn qemu_extended_l2_entries_decode_to_what_was_written() {
    let (l2, geometry) = l2_table(&Sample::load("entries_extended"));
    let decode = |index: usize| {
        let kind = L2Entry::from_raw(l2[index * 2]).decode(&geometry).unwrap();
        let bitmap = SubclusterBitmap::from_raw(l2[index * 2 + 1]);
        bitmap.validate(&kind).unwrap();
        (kind, bitmap)
    };
    let data = |at| L2Kind::Data { host: HostOffset::new(at), copied: true };
    assert_eq!(decode(0), (data(0x50000), SubclusterBitmap::ALL_ALLOCATED));
    assert_eq!(decode(1), (L2Kind::Unallocated, SubclusterBitmap::NONE));
    assert_eq!(decode(2), (data(0x60000), SubclusterBitmap::ALL_ZERO));
    assert_eq!(decode(5), (L2Kind::Unallocated, SubclusterBitmap::ALL_ZERO));
}

#[test]
fn qemu_compressed_entries_decode_and_encode() {
    let (l2, geometry) = l2_table(&Sample::load("entries_compressed"));
    let mut end = 0;
    for raw in &l2[..2] {
        let L2Kind::Compressed(range) = L2Entry::from_raw(*raw).decode(&geometry).unwrap() else {
            panic!("{raw:#x} is compressed")
        };
        assert!(range.host.get() >= 0x50000 && range.end() <= 0x60000);
        // The first one ends inside the sector in which the second begins: neighbours share it.
        assert!(end == 0 || range.host.get() < end);
        end = range.end();
        assert_eq!(L2Entry::compressed(range, &geometry).unwrap().raw(), *raw);
    }
}

#[test]
fn qemu_refcounts_read_as_the_references_that_there_are() {
    let sample = Sample::load("entries_compressed");
    let (header, geometry) = (sample.header(), sample.header().geometry());
    let table = words(&sample.bytes(header.refcount_table_offset, 8));
    let block = RefTableEntry::from_raw(table[0]).offset(&geometry).unwrap().unwrap();
    let block = sample.bytes(block, geometry.cluster_bits.size());
    let counts: Vec<u64> = (0..8).map(|i| refcount::get(header.refcount_order, &block, i).unwrap()).collect();
    assert_eq!(counts, [1, 1, 1, 1, 1, 2, 1, 0]);
}

#[test]
fn qemu_snapshot_table_parses_and_is_written_back() {
    let sample = Sample::load("snapshots");
    let (header, geometry) = (sample.header(), sample.header().geometry());
    let bytes = sample.bytes(header.snapshots_offset, 4096);
    let (table, len) = Snapshot::parse_table(&bytes, header.snapshot_count, &geometry).unwrap();
    let text = |s: &Snapshot| {
        let (id, name) = (String::from_utf8(s.id.clone()).unwrap(), String::from_utf8(s.name.clone()).unwrap());
        (id, format!("{name} {} {} {}", s.date_sec, s.date_nsec, s.vm_state_size))
    };
    assert_eq!(table.iter().map(text).collect::<Vec<_>>(), sample.facts_named("snapshot "));
    assert_eq!(table.iter().map(|s| s.disk_size).collect::<Vec<_>>(), [Some(1 << 20), Some(2 << 20)]);
    assert_eq!(Snapshot::encode_table(&table, &geometry).unwrap(), &bytes[..len]);
}

#[test]
fn qemu_bitmap_directory_parses_and_is_written_back() {
    let sample = Sample::load("bitmaps");
    let (header, geometry) = (sample.header(), sample.header().geometry());
    let extension = header.bitmaps_extension().unwrap().unwrap();
    let bytes = sample.bytes(extension.directory_offset, extension.directory_size);
    let directory = DirectoryEntry::parse_directory(&bytes, extension.nb_bitmaps, &geometry).unwrap();
    let text = |b: &DirectoryEntry| {
        let auto = if b.flags.contains(BitmapFlags::AUTO) { "auto" } else { "" };
        (String::from_utf8(b.name.clone()).unwrap(), format!("{} {auto}", 1 << b.granularity_bits).trim().to_owned())
    };
    assert_eq!(directory.iter().map(text).collect::<Vec<_>>(), sample.facts_named("bitmap "));
    let mut encoded = Vec::new();
    directory.iter().for_each(|b| b.encode(&geometry, &mut encoded).unwrap());
    assert_eq!(encoded, bytes);

    let tables = directory.iter().map(|b| {
        let raw = words(&sample.bytes(b.table_offset, u64::from(b.table_size) * 8));
        BitmapTableEntry::decode(raw[0], &geometry).unwrap()
    });
    let tables: Vec<_> = tables.collect();
    assert_eq!(tables, [BitmapTableEntry::Cluster(HostOffset::new(0x90000)), BitmapTableEntry::AllZeros]);
}
