//! Damaged images: what our check says, held against `qemu-img check`; what is left after our repair, likewise; and the guest's
//! data, which a repair must not change.
//!
//! `COWHAND_REPAIR_ROUNDS=n` damages more images than the few of every run.

use std::fs;
use std::path::{Path, PathBuf};

use cowhand_qcow2::{Header, Snapshot};

use super::check_test::{Theirs, ours, theirs};
use super::dice;
use super::image::{SNAPSHOT, Shape, make};
use super::qemu::{self, text};
use crate::check::{CheckReport, FindingKind, Message, Repair};
use crate::io::sim::Rng;

/// An image to be damaged, with the places of its metadata.
pub(super) struct Victim {
    pub(super) bytes: Vec<u8>,
    pub(super) header: Header,
    snapshot: bool,
    /// Tables of 8-byte entries: where, and how many bytes.
    l1s: Vec<(usize, usize)>,
    pub(super) l2s: Vec<(usize, usize)>,
    pub(super) refcount_table: (usize, usize),
    pub(super) refcount_blocks: Vec<(usize, usize)>,
    /// The bitmap directory and the bitmap tables.
    bitmaps: Vec<(usize, usize)>,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Where the image has been cut off there is nothing to be damaged.
fn put(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

fn flip(bytes: &mut [u8], at: usize, bits: u8) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= bits;
    }
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Victim {
    pub(super) fn new(shape: &Shape, rng: &mut Rng) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = make(dir.path(), shape, rng);
        if shape.version > 2 {
            let image = text(&made.path);
            qemu::img(&["bitmap", "--add", "-g", "512", image, "one"]);
            qemu::img(&["bitmap", "--add", "--disable", "-g", "512", image, "two"]);
            qemu::io(&made.path, &["write -q 0 64k".into()]);
        }
        let bytes = fs::read(&made.path).unwrap();
        let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
        let geometry = header.geometry();
        let cluster = geometry.cluster_bits.size() as usize;
        let mut l1s = vec![(header.l1_table_offset.get() as usize, header.l1_size as usize * 8)];
        let snapshots = &bytes[header.snapshots_offset.get() as usize..];
        let (snapshots, _) = Snapshot::parse_table(snapshots, header.snapshot_count, &geometry).unwrap();
        l1s.extend(snapshots.iter().map(|s| (s.l1_table_offset.get() as usize, s.l1_size as usize * 8)));
        let named = |tables: &[(usize, usize)]| -> Vec<(usize, usize)> {
            let entries = tables.iter().flat_map(|&(at, len)| (at..at + len).step_by(8));
            let offsets = entries.map(|at| (number(&bytes, at) & OFFSET) as usize).filter(|&offset| offset != 0);
            let mut offsets: Vec<_> = offsets.map(|offset| (offset, cluster)).collect();
            offsets.sort_unstable();
            offsets.dedup();
            offsets
        };
        let table_len = header.refcount_table_clusters as usize * cluster;
        let refcount_table = (header.refcount_table_offset.get() as usize, table_len);
        let mut bitmaps = Vec::new();
        if let Some(extension) = header.bitmaps_extension().unwrap() {
            let (at, len) = (extension.directory_offset.get() as usize, extension.directory_size as usize);
            bitmaps.push((at, len));
            let entries = &bytes[at..at + len];
            let entries = cowhand_qcow2::DirectoryEntry::parse_directory(entries, extension.nb_bitmaps, &geometry);
            let tables = entries.unwrap();
            bitmaps.extend(tables.iter().map(|t| (t.table_offset.get() as usize, t.table_size as usize * 8)));
        }
        let (l2s, refcount_blocks) = (named(&l1s), named(&[refcount_table]));
        Self { snapshot: shape.snapshot, l1s, l2s, refcount_table, refcount_blocks, bitmaps, header, bytes }
    }

    /// Where a bitmap's bits lie.
    pub(super) fn bitmap_cluster(&self) -> Option<u64> {
        let tables = self.bitmaps.iter().skip(1);
        let mut entries = tables.flat_map(|&(at, len)| (at..at + len).step_by(8));
        entries.find_map(|at| Some(number(&self.bytes, at)).filter(|&entry| entry > 1))
    }

    /// The place of an entry of one of the tables, preferably one that is in use.
    fn entry(&self, tables: &[(usize, usize)], rng: &mut Rng) -> usize {
        let (at, len) = tables[rng.below(tables.len() as u64) as usize];
        let used: Vec<_> = (at..at + len).step_by(8).filter(|&at| number(&self.bytes, at) != 0).collect();
        match used.is_empty() || rng.one_in(10) {
            true => at + 8 * rng.below(len as u64 / 8) as usize,
            false => used[rng.below(used.len() as u64) as usize],
        }
    }

    /// Damages an entry of a table in one of many ways.
    fn damage_entry(&self, image: &mut [u8], tables: &[(usize, usize)], rng: &mut Rng) -> String {
        let at = self.entry(tables, rng);
        let old = number(&self.bytes, at);
        let cluster = self.header.cluster_bits.size();
        let end = self.bytes.len() as u64 / cluster;
        let metadata = [&self.l1s, &self.l2s, &self.refcount_blocks, &self.bitmaps].map(|tables| tables.first());
        let metadata: Vec<_> = metadata.into_iter().flatten().map(|&(at, _)| at as u64).collect();
        let new = match rng.below(8) {
            0 => 0,
            1 => old ^ 1 << 63,
            2 => old ^ 1 << rng.below(64),
            3 => number(&self.bytes, self.entry(tables, rng)),
            4 => old & !OFFSET | (rng.below(end) * cluster),
            5 => old & !OFFSET | (rng.below(end) * cluster),
            6 => old & !OFFSET | metadata[rng.below(metadata.len() as u64) as usize],
            _ => old & !OFFSET | ((end + rng.below(20)) * cluster),
        };
        put(image, at, new);
        format!("entry at {at:#x}: {old:#x} becomes {new:#x}")
    }

    /// Damages something in one of many ways.
    pub(super) fn damage(&self, image: &mut Vec<u8>, rng: &mut Rng) -> String {
        match rng.below(20) {
            0..=7 => self.damage_entry(image, &self.l2s, rng),
            8..=9 => self.damage_entry(image, &self.l1s, rng),
            10 => self.damage_entry(image, &[self.refcount_table], rng),
            11 if !self.bitmaps.is_empty() => self.damage_entry(image, &self.bitmaps, rng),
            12 if !self.bitmaps.is_empty() => {
                let (at, len) = self.bitmaps[0];
                let at = at + rng.below(len as u64) as usize;
                flip(image, at, 1 << rng.below(8));
                format!("bitmap directory, byte {at:#x}")
            }
            13 if self.snapshot => {
                let at = self.header.snapshots_offset.get() as usize + rng.below(60) as usize;
                flip(image, at, 1 << rng.below(8));
                format!("snapshot table, byte {at:#x}")
            }
            14 => {
                let clusters = 1 + rng.below(4) * self.header.cluster_bits.size();
                image.truncate(image.len() - (clusters as usize).min(image.len() / 4));
                format!("cut to {:#x}", image.len())
            }
            _ => {
                let (at, _) = self.refcount_blocks[rng.below(self.refcount_blocks.len() as u64) as usize];
                let bytes = (self.bytes.len() as u64 / self.header.cluster_bits.size()
                    * u64::from(self.header.refcount_bits()))
                .div_ceil(8);
                let at = at + rng.below(bytes.min(self.header.cluster_bits.size())) as usize;
                let bits = rng.below(4) as u8;
                flip(image, at, bits);
                format!("refcount byte at {at:#x}, flipped by {bits}")
            }
        }
    }
}

/// What QEMU reads of an image (and of its snapshot); none if it cannot.
fn content(path: &Path, snapshot: bool) -> Option<Vec<u8>> {
    let raw = path.with_extension("raw");
    let from = format!("snapshot.name={SNAPSHOT}");
    let options: &[&str] = if snapshot { &["-l", &from] } else { &[] };
    let args = [&["convert", "-f", "qcow2", "-O", "raw"], options, &[text(path), text(&raw)]].concat();
    let ended = qemu::run("qemu-img", &args);
    let bytes = (ended.status == 0).then(|| fs::read(&raw).unwrap());
    let _ = fs::remove_file(&raw);
    bytes
}

/// Findings that QEMU's check does not look for.
fn is_ours_alone(message: &Message) -> bool {
    let (Message::Found(finding) | Message::Left(finding)) = message else { return true };
    match finding.kind {
        FindingKind::Overlap | FindingKind::Leak => true,
        FindingKind::Bitmap => finding.text.contains("padding"),
        // The zero bit where there is none: version 2, extended L2 entries.
        FindingKind::Entry => {
            finding.text.starts_with("found l2 entry with reserved bits set: ")
                && finding.text.ends_with(['1', '3', '5', '7', '9', 'b', 'd', 'f'])
        }
        _ => false,
    }
}

/// What was said, shortened.
pub(super) fn lines(messages: &[Message]) -> String {
    let line = |message: &Message| match message {
        Message::Found(finding) => format!("{finding}"),
        other => format!("{other:?}"),
    };
    messages.iter().map(line).take(40).collect::<Vec<_>>().join("\n")
}

struct Trial {
    path: PathBuf,
    what: String,
}

impl Trial {
    fn check(&self, repair: Repair) -> (CheckReport, Vec<Message>) {
        match ours(&self.path, repair) {
            Ok(report) => report,
            Err(e) => panic!("{}: {e}", self.what),
        }
    }

    fn theirs(&self) -> Theirs {
        theirs(&self.path, &["-f", "qcow2"])
    }

    /// Our verdict and QEMU's are the same. Whether both can make anything of the image.
    fn compare_verdicts(&self) -> Option<Theirs> {
        let theirs = self.theirs();
        let ours = match ours(&self.path, Repair::None) {
            Ok(ours) => ours,
            Err(e) => {
                assert_eq!(theirs.status, 1, "{}: we say {e}, they {theirs:?}", self.what);
                return None;
            }
        };
        let (report, messages) = ours;
        // Bitmaps with flags or data that only the format's description knows are refused by QEMU.
        let finds_bitmap = |m: &Message| matches!(m, Message::Found(f) if f.kind == FindingKind::Bitmap);
        if theirs.status == 1 && theirs.said.contains("itmap") && !messages.iter().any(finds_bitmap) {
            return None;
        }
        let corrupt = theirs.corruptions > 0 || theirs.status == 1;
        let told = report.corruptions > 0 && (corrupt || !messages.iter().all(is_ours_alone));
        assert_eq!(told, corrupt, "{}: corruptions: we {}, they {theirs:?}", self.what, lines(&messages));
        // What lies in one place with other refcounts we do not read, and QEMU does.
        let by_refcounts = |m: &Message| {
            matches!(m, Message::Found(f) if f.kind == FindingKind::RefcountStructure
                || (f.kind == FindingKind::Overlap && f.text.contains("refcounts")))
        };
        if theirs.status != 1 && report.unreadable == 0 && !messages.iter().any(by_refcounts) {
            assert_eq!(
                report.leaks > 0,
                theirs.leaks > 0,
                "{}: leaks: we {}, they {theirs:?}",
                self.what,
                lines(&messages)
            );
        }
        Some(theirs)
    }
}

fn rounds(usual: u64) -> u64 {
    std::env::var("COWHAND_REPAIR_ROUNDS").map_or(usual, |rounds| rounds.parse().unwrap())
}

fn damage_and_repair(shape: &Shape, times: u64) {
    let mut rng = dice("repair");
    let mut made = Rng::new(rng.next_u64());
    let victim = Victim::new(shape, &mut made);
    for round in 0..rounds(times) {
        let mut rng = Rng::new(rng.next_u64());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let mut image = victim.bytes.clone();
        let damages = 1 + rng.below(3);
        let what: Vec<_> = (0..damages).map(|_| victim.damage(&mut image, &mut rng)).collect();
        fs::write(&path, &image).unwrap();
        let trial = Trial { path, what: format!("round {round}: {}", what.join("; ")) };
        try_repair(&trial, victim.snapshot);
    }
}

fn try_repair(trial: &Trial, snapshot: bool) {
    let Some(before) = trial.compare_verdicts() else { return };
    let contents = || [content(&trial.path, false), if snapshot { content(&trial.path, true) } else { None }];
    let data = contents();
    let copy = trial.path.with_extension("copy");
    fs::copy(&trial.path, &copy).unwrap();
    theirs(&copy, &["-f", "qcow2", "-r", "all"]);
    let their_repair = theirs(&copy, &["-f", "qcow2"]);
    let (report, messages) = trial.check(Repair::All);
    let after = trial.theirs();
    let all = || format!("{}:\n{}\nbefore {before:?}, after {after:?}", trial.what, lines(&messages));
    if report.is_clean() {
        assert_eq!(after.status, 0, "we call it clean: {}", all());
    }
    if before.status != 1 {
        assert!(after.status != 1 && after.corruptions <= before.corruptions, "worse: {}", all());
    }
    if their_repair.status == 0 {
        // An entry that means nothing QEMU empties, or frees what it may have referred to.
        let guess = [FindingKind::Entry, FindingKind::Outside, FindingKind::Snapshot];
        let guessed =
            report.unreadable > 0 || messages.iter().any(|m| matches!(m, Message::Found(f) if guess.contains(&f.kind)));
        assert!(report.is_clean() || guessed, "QEMU repairs it: {}", all());
    }
    for (before, after) in data.iter().zip(contents()) {
        if let Some(before) = before {
            assert!(after.as_ref() == Some(before), "the data changed: {}", all());
        }
    }
    // A second repair finds nothing that the first could have repaired. (It may free what the first would not.)
    let again = trial.check(Repair::All).0;
    if report.unreadable > 0 {
        return;
    }
    assert_eq!(again.corruptions, report.corruptions, "{}", all());
    // The flags follow the counts.
    assert!(again.corruptions_fixed == 0 || again.leaks_fixed > 0, "{again:?}: {}", all());
    assert!(again.leaks <= report.leaks, "{}", all());
}

#[test]
fn damaged_images_are_found_and_repaired_as_qemu_does_or_better() {
    damage_and_repair(&Shape { snapshot: true, ..Shape::new(4096) }, 8);
}

#[test]
fn damaged_small_clusters() {
    damage_and_repair(&Shape { snapshot: true, refcount_bits: 8, ..Shape::new(512) }, 5);
}

#[test]
fn damaged_compressed_images() {
    damage_and_repair(&Shape { compressed: true, ..Shape::new(4096) }, 5);
}

#[test]
fn damaged_images_with_narrow_refcounts() {
    damage_and_repair(&Shape { refcount_bits: 1, ..Shape::new(4096) }, 5);
}

#[test]
fn damaged_images_of_version_2() {
    damage_and_repair(&Shape { version: 2, ..Shape::new(4096) }, 5);
}

#[test]
fn damaged_images_with_extended_l2_entries() {
    damage_and_repair(&Shape { options: &["extended_l2=on"], snapshot: true, ..Shape::new(1 << 14) }, 5);
}

/// The image with this done to it: the refcounts are gone, and are there again after a repair.
fn assert_rebuilt(shape: &Shape, destroy: impl FnOnce(&Victim, &mut Vec<u8>)) {
    let mut rng = dice("rebuild");
    let victim = Victim::new(shape, &mut rng);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    fs::write(&path, &victim.bytes).unwrap();
    let data = [content(&path, false), if shape.snapshot { content(&path, true) } else { None }];
    let mut image = victim.bytes.clone();
    destroy(&victim, &mut image);
    fs::write(&path, &image).unwrap();
    let trial = Trial { path, what: format!("{shape:?}") };
    assert!(trial.check(Repair::None).0.corruptions > 0);
    assert!(fs::read(&trial.path).unwrap() == image, "a check changed the image");
    assert!(trial.check(Repair::Leaks).0.corruptions > 0);
    let (report, messages) = trial.check(Repair::All);
    assert!(report.is_clean() && report.corruptions_fixed > 0, "{}", lines(&messages));
    let after = trial.theirs();
    assert_eq!(after.status, 0, "{after:?}");
    let again = [content(&trial.path, false), if shape.snapshot { content(&trial.path, true) } else { None }];
    assert!(data == again && data[0].is_some());
}

fn shapes() -> impl Iterator<Item = Shape> {
    let widths = [1, 8, 64].map(|refcount_bits| Shape { refcount_bits, ..Shape::new(512) });
    let others = [
        Shape { snapshot: true, ..Shape::new(65536) },
        Shape { compressed: true, snapshot: true, ..Shape::new(4096) },
        Shape { options: &["extended_l2=on"], ..Shape::new(1 << 14) },
    ];
    widths.into_iter().chain(others)
}

#[test]
fn refcounts_are_rebuilt_when_the_table_is_zero() {
    for shape in shapes() {
        assert_rebuilt(&shape, |victim, image| {
            let (at, len) = victim.refcount_table;
            image[at..at + len].fill(0);
        });
    }
}

#[test]
fn refcounts_are_raised_when_the_blocks_are_zero() {
    for shape in shapes() {
        assert_rebuilt(&shape, |victim, image| {
            for &(at, len) in &victim.refcount_blocks {
                image[at..at + len].fill(0);
            }
        });
    }
}

#[test]
fn refcounts_are_rebuilt_when_the_header_does_not_say_where_they_are() {
    for bytes in [[0u8; 12], [0xff; 12]] {
        assert_rebuilt(&Shape { snapshot: true, ..Shape::new(4096) }, |_, image| image[48..60].copy_from_slice(&bytes));
    }
}

#[test]
fn refcounts_are_rebuilt_when_they_share_their_place() {
    // A block that two entries name; one that lies where the L1 table is; a table that lies where an L2 table is.
    assert_rebuilt(&Shape { refcount_bits: 64, ..Shape::new(512) }, |victim, image| {
        let (at, _) = victim.refcount_table;
        image.copy_within(at..at + 8, at + 8);
    });
    assert_rebuilt(&Shape::new(4096), |victim, image| {
        put(image, victim.refcount_table.0, victim.header.l1_table_offset.get());
    });
    assert_rebuilt(&Shape::new(4096), |victim, image| put(image, 48, victim.l2s[0].0 as u64));
}

/// A damaged entry keeps all counts, but not those that were never counts.
#[test]
fn what_lies_where_a_refcount_block_is_said_to_be_is_not_taken_for_counts() {
    let mut rng = dice("no block");
    let victim = Victim::new(&Shape { snapshot: true, ..Shape::new(4096) }, &mut rng);
    let end = victim.bytes.len() as u64 / 4096;
    for past in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let mut image = victim.bytes.clone();
        put(&mut image, victim.refcount_table.0, victim.l2s[0].0 as u64);
        let entry = victim.entry(&victim.l2s[1..], &mut rng);
        put(&mut image, entry, (1 << 63) | ((end + past) * 4096));
        image.truncate(image.len() - 1);
        fs::write(&path, &image).unwrap();
        let trial = Trial { path, what: format!("an entry {past} clusters past the end") };
        try_repair(&trial, true);
        assert_eq!(trial.theirs().leaks, 0, "{}", trial.what);
    }
}

#[test]
fn a_dirty_and_a_corrupt_image_are_sound_again() {
    for flag in [1u8, 2, 3] {
        assert_rebuilt(&Shape::new(4096), |victim, image| {
            image[79] |= flag;
            image[victim.refcount_blocks[0].0 + 1] = 0;
        });
    }
    // Nothing else is wrong: only the flag goes.
    let dir = tempfile::tempdir().unwrap();
    let made = make(dir.path(), &Shape::new(4096), &mut dice("flag"));
    let sound = fs::read(&made.path).unwrap();
    let mut image = sound.clone();
    image[79] |= 3;
    fs::write(&made.path, &image).unwrap();
    assert!(ours(&made.path, Repair::None).unwrap().0.is_clean());
    assert!(fs::read(&made.path).unwrap() == image);
    ours(&made.path, Repair::Leaks).unwrap();
    assert!(fs::read(&made.path).unwrap() == sound);
}

#[test]
fn leaks_alone_are_freed_and_nothing_else_is_touched() {
    let mut rng = dice("leaks");
    let victim = Victim::new(&Shape::new(4096), &mut rng);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let mut image = victim.bytes.clone();
    // Two clusters behind the last one are counted, and one in use is not.
    let (at, _) = victim.refcount_blocks[0];
    let last = victim.bytes.len().div_ceil(4096);
    image.resize((last + 2) * 4096, 0);
    image[at + last * 2 + 1] = 1;
    image[at + last * 2 + 3] = 1;
    image[at + 2 * 2 + 1] = 0;
    fs::write(&path, &image).unwrap();
    let (report, _) = ours(&path, Repair::Leaks).unwrap();
    assert_eq!((report.leaks_fixed, report.leaks, report.corruptions_fixed), (2, 0, 0));
    assert!(report.corruptions > 0);
    image[at + last * 2 + 1] = 0;
    image[at + last * 2 + 3] = 0;
    assert!(fs::read(&path).unwrap() == image);
}

#[test]
fn a_damaged_entry_keeps_what_it_may_have_named_from_being_freed() {
    let mut rng = dice("hidden");
    let victim = Victim::new(&Shape::new(4096), &mut rng);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let mut image = victim.bytes.clone();
    let at = victim.entry(&victim.l1s[..1], &mut rng);
    let old = number(&image, at);
    put(&mut image, at, old | 0x200);
    fs::write(&path, &image).unwrap();
    for repair in [Repair::Leaks, Repair::All] {
        let (report, _) = ours(&path, repair).unwrap();
        assert!(report.leaks_fixed == 0 && report.unreadable > 0 && report.corruptions > 0, "{report:?}");
    }
    // So it can be put right by hand.
    let mut image = fs::read(&path).unwrap();
    put(&mut image, at, old);
    fs::write(&path, &image).unwrap();
    let (report, messages) = ours(&path, Repair::All).unwrap();
    assert!(report.is_clean(), "{}", lines(&messages));
    assert_eq!(theirs(&path, &["-f", "qcow2"]).status, 0);
    fs::write(path.with_extension("sound"), &victim.bytes).unwrap();
    assert!(content(&path, false) == content(&path.with_extension("sound"), false));
}

#[test]
fn edge_42_encrypted_data_is_not_moved_but_an_l2_table_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let secret = ["--object", "secret,id=key,data=secret"];
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    qemu::img(&[&["create", "-q", "-f", "qcow2"], &secret[..], &["-o", options, text(&path), "20M"]].concat());
    let opened = format!("driver=qcow2,file.filename={},encrypt.key-secret=key", path.display());
    qemu::succeed("qemu-io", &[&secret[..], &["--image-opts", "-c", "write -q 0 1M", &opened]].concat());
    let mut image = fs::read(&path).unwrap();
    // Guest data where the L1 table lies.
    let l1 = number(&image, 40);
    let l2 = number(&image, l1 as usize) & OFFSET;
    put(&mut image, l2 as usize, l1);
    fs::write(&path, &image).unwrap();
    let (report, messages) = ours(&path, Repair::All).unwrap();
    assert!(report.corruptions > 0, "{}", lines(&messages));
    assert_eq!(number(&fs::read(&path).unwrap(), l2 as usize) & OFFSET, l1);
    // From under an L2 table nothing has to move but the table.
    let mut image = fs::read(&path).unwrap();
    put(&mut image, l2 as usize, l2);
    fs::write(&path, &image).unwrap();
    let (report, messages) = ours(&path, Repair::All).unwrap();
    assert!(report.is_clean(), "{}", lines(&messages));
    let image = fs::read(&path).unwrap();
    let moved = number(&image, l1 as usize) & OFFSET;
    assert!(moved != l2 && number(&image, moved as usize) & OFFSET == l2);
}
