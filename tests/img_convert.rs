//! `cowhand img` convert, dd, compare, measure, map and bench beside QEMU's own qemu-img, on the same images.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A directory in which both tools run.
struct Room(tempfile::TempDir);

/// How a command ended: its status and what it said, on either stream.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    status: Option<i32>,
    out: String,
    err: String,
}

impl Room {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn ended(&self, mut command: Command, words: &str) -> Ended {
        let done = command.args(words.split_whitespace()).current_dir(self.0.path()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ended { status: done.status.code(), out: text(done.stdout), err: text(done.stderr) }
    }

    fn qemu(&self, words: &str) -> Ended {
        self.ended(Command::new("qemu-img"), words)
    }

    fn ours(&self, words: &str) -> Ended {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowhand"));
        command.arg0("qemu-img");
        self.ended(command, words)
    }

    fn qemu_ok(&self, words: &str) -> String {
        let ended = self.qemu(words);
        assert_eq!(ended.status, Some(0), "qemu-img {words}: {}", ended.err);
        ended.out
    }

    fn ours_ok(&self, words: &str) -> String {
        let ended = self.ours(words);
        assert_eq!(ended.status, Some(0), "cowhand img {words}: {}{}", ended.out, ended.err);
        ended.out
    }

    /// Both say the same, and end alike.
    fn alike(&self, words: &str) {
        assert_eq!(self.ours(words), self.qemu(words), "{words}");
    }

    fn io(&self, words: &[&str]) {
        let done = Command::new("qemu-io").args(words).current_dir(self.0.path()).output().unwrap();
        assert!(done.status.success(), "qemu-io {words:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// A raw disk of 8 MiB: text, noise, zeros in places of all sizes, and a last sector with data.
    fn source(&self) {
        let mut bytes = vec![0u8; 8 << 20];
        let mut state = 1u32;
        for (index, byte) in bytes[..3 << 20].iter_mut().enumerate() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = match index >> 16 & 3 {
                0 => (state >> 24) as u8,
                1 => b'a' + (state >> 28) as u8,
                2 if index >> 12 & 1 == 0 => b'x',
                _ => 0,
            };
        }
        bytes[5 << 20..(5 << 20) + 512].fill(7);
        let end = bytes.len();
        bytes[end - 512..].fill(9);
        std::fs::write(self.path("s.raw"), &bytes).unwrap();
    }
}

/// Sets of options for a qcow2 target, each with what else convert is told.
const SETS: [(&str, &str); 18] = [
    ("", ""),
    ("", "-c"),
    ("", "-c -W -m 16"),
    ("", "-S 0"),
    ("", "-S 64k -m 1"),
    ("", "-t none -T none"),
    ("-o compat=0.10", ""),
    ("-o compat=0.10", "-c"),
    ("-o cluster_size=512", ""),
    ("-o cluster_size=4k", "-c"),
    ("-o cluster_size=2M", ""),
    ("-o cluster_size=2M,compression_type=zstd", "-c"),
    ("-o extended_l2=on", ""),
    ("-o extended_l2=on", "-c"),
    ("-o refcount_bits=1,lazy_refcounts=on", ""),
    ("-o data_file=d.data", ""),
    ("-o data_file=d.data,data_file_raw=on", ""),
    ("-o preallocation=full", ""),
];

#[test]
fn conversions_both_ways_hold_the_same_disk() {
    for (options, more) in SETS {
        let room = Room::new();
        room.source();
        room.ours_ok(&format!("convert -f raw -O qcow2 {options} {more} s.raw t.qcow2"));
        room.qemu_ok("check -q t.qcow2");
        room.qemu_ok("compare -f raw -F qcow2 s.raw t.qcow2");
        room.ours_ok("convert -f qcow2 -O raw t.qcow2 back.raw");
        assert!(
            std::fs::read(room.path("s.raw")).unwrap() == std::fs::read(room.path("back.raw")).unwrap(),
            "{options} {more}"
        );
        // What QEMU made.
        std::fs::remove_file(room.path("t.qcow2")).unwrap();
        let _ = std::fs::remove_file(room.path("d.data"));
        room.qemu_ok(&format!("convert -f raw -O qcow2 {options} {more} s.raw t.qcow2"));
        room.ours_ok("convert -f qcow2 -O raw t.qcow2 back.raw");
        assert!(
            std::fs::read(room.path("s.raw")).unwrap() == std::fs::read(room.path("back.raw")).unwrap(),
            "{options} {more}"
        );
    }
}

#[test]
fn only_what_differs_from_the_backing_file_is_copied() {
    let room = Room::new();
    room.source();
    room.qemu_ok("convert -f raw -O qcow2 s.raw base.qcow2");
    room.qemu_ok("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    room.io(&["-c", "write -P 3 1M 100k", "-c", "write -z 2M 64k", "top.qcow2"]);
    for more in ["", "-c", "-S 0"] {
        room.ours_ok(&format!("convert {more} -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 copy.qcow2"));
        room.qemu_ok("check -q copy.qcow2");
        room.qemu_ok("compare top.qcow2 copy.qcow2");
        let map = room.qemu_ok("map --output=json copy.qcow2");
        let own = map.lines().filter(|line| line.contains("\"depth\": 0") && line.contains("\"data\": true")).count();
        assert!((1..=2).contains(&own), "{more}: {map}");
    }
}

#[test]
fn snapshots_bitmaps_and_several_sources_are_copied() {
    let room = Room::new();
    room.source();
    room.qemu_ok("convert -f raw -O qcow2 s.raw a.qcow2");
    room.qemu_ok("snapshot -c then a.qcow2");
    room.io(&["-c", "write -P 1 0 2M", "a.qcow2"]);
    for which in ["then", "1", "snapshot.name=then", "snapshot.id=1,snapshot.name=then"] {
        room.ours_ok(&format!("convert -l {which} -O raw a.qcow2 then.raw"));
        room.qemu_ok("compare -f raw -F raw s.raw then.raw");
    }
    room.ours_ok("convert -O qcow2 a.qcow2 a.qcow2 both.qcow2");
    room.qemu_ok("convert -O raw a.qcow2 a.qcow2 both.raw");
    room.qemu_ok("compare both.qcow2 both.raw");

    room.qemu_ok("bitmap --add -g 64k a.qcow2 on");
    room.qemu_ok("bitmap --add --disable a.qcow2 off");
    room.io(&["-c", "write -P 1 1M 100k", "a.qcow2"]);
    room.ours_ok("convert --bitmaps -O qcow2 a.qcow2 copy.qcow2");
    room.qemu_ok("check -q copy.qcow2");
    let bitmaps = |name: &str| {
        let info: serde_json::Value =
            serde_json::from_str(&room.qemu_ok(&format!("info --output=json {name}"))).unwrap();
        info["format-specific"]["data"]["bitmaps"].clone()
    };
    assert_eq!(bitmaps("a.qcow2"), bitmaps("copy.qcow2"));
}

/// Images of all sorts, and what is said of them.
fn images(room: &Room) -> Vec<&'static str> {
    room.source();
    for (name, options) in [
        ("plain", "-o cluster_size=64k"),
        ("small", "-o cluster_size=512"),
        ("packed", "-c"),
        ("old", "-o compat=0.10"),
        ("sub", "-o extended_l2=on"),
        ("ready", "-o preallocation=metadata"),
        ("elsewhere", "-o data_file=e.data"),
    ] {
        room.qemu_ok(&format!("convert -f raw -O qcow2 {options} s.raw {name}.qcow2"));
    }
    room.qemu_ok("create -q -f qcow2 -b plain.qcow2 -F qcow2 top.qcow2 12M");
    room.io(&["-c", "write -P 3 1M 100k", "-c", "write -z 2M 64k", "-c", "write 9M 64k", "top.qcow2"]);
    vec![
        "s.raw",
        "plain.qcow2",
        "small.qcow2",
        "packed.qcow2",
        "old.qcow2",
        "sub.qcow2",
        "ready.qcow2",
        "elsewhere.qcow2",
        "top.qcow2",
    ]
}

#[test]
fn maps_are_qemus() {
    let room = Room::new();
    for image in images(&room) {
        room.alike(&format!("map --output=json {image}"));
        room.alike(&format!("map --output=json --start-offset=1000k --max-length=3M {image}"));
        if image != "packed.qcow2" {
            room.alike(&format!("map {image}"));
        }
    }
    let packed = room.ours("map packed.qcow2");
    assert_eq!((packed.status, packed.err), (Some(1), room.qemu("map packed.qcow2").err));
}

#[test]
fn measures_are_qemus() {
    let room = Room::new();
    let images = images(&room);
    for options in
        ["", "-o cluster_size=512", "-o cluster_size=2M,refcount_bits=64", "-o extended_l2=on", "-o preallocation=full"]
    {
        for size in ["0", "1", "1M", "3G", "100G", "2T"] {
            room.alike(&format!("measure -O qcow2 {options} --size {size}"));
        }
        for image in &images {
            room.alike(&format!("measure -O qcow2 --output=json {options} {image}"));
        }
    }
    room.alike("measure -O raw --size 1000");
    room.alike("measure -O raw top.qcow2");
    let luks = "-o encrypt.format=luks,encrypt.key-secret=s --object secret,id=s,data=x";
    room.alike(&format!("measure -O qcow2 {luks} --size 1G"));
}

#[test]
fn comparisons_end_and_speak_as_qemus() {
    let room = Room::new();
    let images = images(&room);
    for image in &images {
        room.alike(&format!("compare plain.qcow2 {image}"));
        room.alike(&format!("compare {image} packed.qcow2"));
    }
    room.io(&["-c", "write -P 1 4M 512", "old.qcow2"]);
    for words in [
        "plain.qcow2 old.qcow2",
        "-q plain.qcow2 old.qcow2",
        "-s plain.qcow2 top.qcow2",
        "-s plain.qcow2 plain.qcow2",
        "-s plain.qcow2 old.qcow2",
        "-f raw -F qcow2 s.raw plain.qcow2",
        "plain.qcow2 nonexistent",
        "nonexistent plain.qcow2",
        "-T foo plain.qcow2 old.qcow2",
        "-f foo plain.qcow2 old.qcow2",
        "-U plain.qcow2 old.qcow2",
    ] {
        room.alike(&format!("compare {words}"));
    }
}

#[test]
fn wrong_words_are_answered_as_by_qemu() {
    let room = Room::new();
    images(&room);
    for words in [
        "convert",
        "convert plain.qcow2",
        "convert -O foo plain.qcow2 t",
        "convert -c -O raw plain.qcow2 t",
        "convert -c -C plain.qcow2 t",
        "convert -C -S 4k plain.qcow2 t",
        "convert --salvage -C plain.qcow2 t",
        "convert -n -o size=3 plain.qcow2 t",
        "convert --target-is-zero plain.qcow2 t",
        "convert -m 0 plain.qcow2 t",
        "convert -m 17 plain.qcow2 t",
        "convert -S x plain.qcow2 t",
        "convert -r x plain.qcow2 t",
        "convert -l foo plain.qcow2 t",
        "convert -l snapshot.foo=1 plain.qcow2 t",
        "convert -B plain.qcow2 -O qcow2 top.qcow2 t",
        "convert -B plain.qcow2 -F qcow2 -O raw top.qcow2 t",
        "convert -B plain.qcow2 -F qcow2 -O qcow2 plain.qcow2 top.qcow2 t",
        "convert --skip-broken-bitmaps plain.qcow2 t",
        "convert --bitmaps -O raw plain.qcow2 t",
        "convert -t foo plain.qcow2 t",
        "convert -T foo plain.qcow2 t",
        "convert nonexistent t",
        "convert -n -O raw plain.qcow2 nonexistent",
        "convert -n -O qcow2 top.qcow2 small.qcow2",
        "convert -O qcow2 -o foo=1 plain.qcow2 t",
        "convert --image-opts -f raw plain.qcow2 t",
        "convert --target-image-opts plain.qcow2 driver=raw,file.filename=t",
        "convert -c -O qcow2 -o preallocation=full plain.qcow2 t",
        "convert -c -O qcow2 -o data_file=t.data plain.qcow2 t",
        "dd",
        "dd if=s.raw",
        "dd of=t",
        "dd if=s.raw of=t bs=0",
        "dd if=s.raw of=t bs=x",
        "dd if=s.raw of=t count=x",
        "dd if=s.raw of=t skip=-1",
        "dd if=s.raw of=t seek=1",
        "dd -O foo if=s.raw of=t",
        "map -f foo plain.qcow2",
        "map -s x plain.qcow2",
        "measure",
        "measure --size 1G plain.qcow2",
        "measure --size x",
        "measure -O foo --size 1",
        "measure -O qcow2 -o foo=1 --size 1",
        "measure -O qcow2 -o cluster_size=1000 --size 1",
        "measure -f qcow2 --size 1",
        "bench -c 0 s.raw",
        "bench -c x s.raw",
        "bench -d 0 s.raw",
        "bench -i foo s.raw",
        "bench -t foo s.raw",
        "bench --flush-interval 2 s.raw",
        "bench -w --flush-interval 3 -d 5 s.raw",
        "bench --pattern 300 s.raw",
    ] {
        let ours = room.ours(words);
        assert!(!room.path("t").exists(), "{words} left a target");
        assert_eq!(ours, room.qemu(words), "{words}");
        let _ = std::fs::remove_file(room.path("t"));
    }
}

#[test]
fn parts_of_disks_are_copied_as_by_dd() {
    let room = Room::new();
    room.source();
    for words in
        ["bs=512", "bs=1M count=3", "bs=1000 count=7 skip=3", "skip=16383", "bs=64k skip=1000", "count=0", "bs=3M"]
    {
        for format in ["raw", "qcow2"] {
            room.qemu_ok(&format!("dd -f raw -O {format} {words} if=s.raw of=theirs"));
            room.ours_ok(&format!("dd -f raw -O {format} {words} if=s.raw of=ours"));
            room.qemu_ok(&format!("compare -s -f {format} -F {format} ours ours"));
            let same = room.qemu(&format!("compare -f {format} -F {format} theirs ours"));
            assert_eq!((same.status, same.out.as_str()), (Some(0), "Images are identical.\n"), "{words}");
        }
    }
}

#[test]
fn a_target_that_holds_something_is_overwritten_as_a_disk() {
    let room = Room::new();
    room.source();
    for (make, format) in [("create -q -f qcow2 t 10M", "qcow2"), ("create -q -f raw t 10M", "raw")] {
        room.qemu_ok(make);
        room.io(&["-f", format, "-c", "write -P 8 0 10M", "t"]);
        room.ours_ok(&format!("convert -n -f raw -O {format} s.raw t"));
        let found = room.qemu(&format!("compare -f raw -F {format} s.raw t"));
        // Behind the copy the target is as it was.
        assert_eq!(
            found.out,
            format!("Warning: Image size mismatch!\nContent mismatch at offset {}!\n", 8 * MIB),
            "{format}"
        );
    }
}

/// Spoils the first compressed cluster of an image: the second of [`Room::source`], as noise is not compressed.
fn spoil(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    let entries = bytes.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().unwrap()));
    // Behind the header no other structure of so small an image has such bits.
    let place = entries.skip(8192).find(|entry| entry >> 62 == 1).unwrap() & ((1 << 54) - 1);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0xff; 16], place).unwrap();
}

#[test]
fn what_cannot_be_read_ends_a_copy_and_removes_its_target_unless_it_is_salvaged() {
    let room = Room::new();
    room.source();
    room.qemu_ok("convert -c -f raw -O qcow2 s.raw bad.qcow2");
    spoil(&room.path("bad.qcow2"));
    let ended = room.ours("convert -O qcow2 bad.qcow2 t");
    assert_eq!(ended.status, Some(1));
    assert_eq!(ended.err, "qemu-img: error while reading at byte 0: Input/output error\n");
    assert!(!room.path("t").exists());

    let ended = room.ours("convert --salvage -O raw bad.qcow2 t");
    assert_eq!(ended.status, Some(0), "{}", ended.err);
    assert_eq!(ended.err.lines().count(), 128);
    assert!(
        ended.err.starts_with("qemu-img: warning: error while reading offset 65536: Input/output error\n"),
        "{}",
        ended.err
    );
    let (ours, source) = (std::fs::read(room.path("t")).unwrap(), std::fs::read(room.path("s.raw")).unwrap());
    assert!(ours[65536..131_072].iter().all(|&byte| byte == 0));
    assert!(ours[..65536] == source[..65536] && ours[131_072..] == source[131_072..]);
}

#[test]
fn a_copy_that_is_killed_leaves_nothing_that_looks_whole() {
    for (format, more) in [("qcow2", ""), ("qcow2", "-c"), ("qcow2", "-o compat=0.10"), ("raw", "")] {
        for pause in [100, 250, 400] {
            let room = Room::new();
            room.source();
            // Some six seconds, so that the signal comes amid the copy.
            let words = format!("convert -r 600k -f raw -O {format} {more} s.raw t");
            let mut command = Command::new(env!("CARGO_BIN_EXE_cowhand"));
            command.arg0("qemu-img").args(words.split_whitespace()).current_dir(room.0.path());
            let mut child = command.stdout(Stdio::null()).spawn().unwrap();
            let mut left = 500;
            while !room.path("t").exists() {
                std::thread::sleep(Duration::from_millis(10));
                left -= 1;
                assert!(left > 0, "no target");
            }
            std::thread::sleep(Duration::from_millis(pause));
            child.kill().unwrap();
            assert!(!child.wait().unwrap().success());
            if format == "raw" {
                assert!(std::fs::metadata(room.path("t")).unwrap().len() < 8 * MIB, "a raw file looks whole");
            } else {
                for words in ["info -f qcow2 t", "compare -f raw -F qcow2 s.raw t", "convert -f qcow2 -O raw t u"] {
                    assert_ne!(room.qemu(words).status, Some(0), "QEMU takes what was killed for an image: {words}");
                    let ours = room.ours(words);
                    assert_ne!(ours.status, Some(0), "{words}");
                }
            }
            // Doing it again is all that is needed.
            room.ours_ok(&format!("convert -f raw -O {format} {more} s.raw t"));
            room.qemu_ok(&format!("compare -f raw -F {format} s.raw t"));
        }
    }
}

#[test]
fn the_host_copies_where_it_can() {
    let room = Room::new();
    room.source();
    room.ours_ok("convert -C -f raw -O raw s.raw t");
    room.qemu_ok("compare -f raw -F raw s.raw t");
    room.ours_ok("convert -C -f raw -O qcow2 s.raw t2");
    room.qemu_ok("compare -f raw -F qcow2 s.raw t2");
}

#[test]
fn progress_and_benchmarks_are_shown() {
    let room = Room::new();
    room.source();
    let shown = room.ours_ok("convert -p -f raw -O raw s.raw t");
    assert!(shown.starts_with("    (0.00/100%)\r") && shown.ends_with("    (100.00/100%)\r\n"), "{shown:?}");
    assert_eq!(room.ours_ok("convert -p -q -f raw -O raw s.raw t"), "");
    for words in ["-c 100 -d 4 -f raw s.raw", "-w -c 100 -d 4 -s 1000 -S 3000 --flush-interval 10 -f raw s.raw"] {
        let ours = room.ours_ok(&format!("bench {words}"));
        let qemu = room.qemu_ok(&format!("bench {words}"));
        let lines =
            |text: &str| text.lines().filter(|line| !line.starts_with("Run completed")).collect::<Vec<_>>().join("\n");
        assert_eq!(lines(&ours), lines(&qemu));
        assert!(ours.lines().last().is_some_and(|line| line.starts_with("Run completed in ")), "{ours}");
    }
}

#[test]
fn as_cowhand_img_formats_are_not_guessed() {
    let room = Room::new();
    room.source();
    let words = "img convert -O qcow2 s.raw t";
    let refused = room.ended(Command::new(env!("CARGO_BIN_EXE_cowhand")), words);
    assert_eq!(refused.status, Some(1));
    assert!(refused.err.contains("--probe") && !room.path("t").exists(), "{}", refused.err);
}

/// What a target is told to have from its backing file it must get when it has none; and over what it had before, zeros are written.
#[test]
fn an_existing_target_without_a_backing_file_gets_everything() {
    let room = Room::new();
    room.qemu_ok("create -q -f qcow2 base.qcow2 1M");
    room.io(&["-f", "qcow2", "-c", "write -P 1 0 128k", "base.qcow2"]);
    room.qemu_ok("create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2");
    room.io(&["-f", "qcow2", "-c", "write -P 2 64k 64k", "over.qcow2"]);
    room.qemu_ok("create -q -f qcow2 there.qcow2 1M");
    room.io(&["-f", "qcow2", "-c", "write -P 3 256k 64k", "there.qcow2"]);
    room.ours_ok("convert -n -B base.qcow2 -O qcow2 over.qcow2 there.qcow2");
    assert_eq!(room.qemu("compare over.qcow2 there.qcow2").status, Some(0));
}

#[test]
fn an_existing_target_says_itself_what_is_zero() {
    let room = Room::new();
    room.qemu_ok("create -q -f qcow2 empty.qcow2 64M");
    for compat in ["0.10", "1.1"] {
        let maps = ["ours", "qemu"].map(|who| {
            room.qemu_ok(&format!("create -q -f qcow2 -o compat={compat} {who}.qcow2 64M"));
            let words = format!("convert -n -O qcow2 empty.qcow2 {who}.qcow2");
            let ended = if who == "ours" { room.ours(&words) } else { room.qemu(&words) };
            assert_eq!(ended.status, Some(0), "{}", ended.err);
            room.qemu_ok(&format!("map --output=json {who}.qcow2"))
        });
        assert_eq!(maps[0], maps[1], "compat={compat}");
    }
}

#[test]
fn a_target_that_is_a_file_of_the_source_is_refused_and_keeps_its_bytes() {
    let room = Room::new();
    room.source();
    room.qemu_ok("convert -f raw -O qcow2 s.raw base.qcow2");
    room.qemu_ok("create -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    std::os::unix::fs::symlink("base.qcow2", room.path("link.qcow2")).unwrap();
    let before = std::fs::read(room.path("base.qcow2")).unwrap();
    // Without locks (-U) nothing else would say so; and a lock of the same program's may be given back before the file is made.
    for words in [
        "convert -f qcow2 -O raw top.qcow2 base.qcow2",
        "convert -U -f qcow2 -O raw top.qcow2 base.qcow2",
        "convert -U -f qcow2 -O qcow2 base.qcow2 link.qcow2",
        "dd -U -f qcow2 -O raw if=top.qcow2 of=link.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 link.qcow2",
        "create -f qcow2 -b top.qcow2 -F qcow2 link.qcow2",
    ] {
        let ended = room.ours(words);

        assert_eq!(ended.status, Some(1), "{words}: {ended:?}");
        assert!(
            !ended.err.is_empty() && std::fs::read(room.path("base.qcow2")).unwrap() == before,
            "{words}: {ended:?}"
        );
    }
}

#[test]
fn a_file_below_an_image_inside_of_the_source_is_no_target() {
    let room = Room::new();
    room.qemu_ok("create -q -f qcow2 inner 1M");
    room.qemu_ok("convert -f raw -O qcow2 inner base");
    room.qemu_ok("create -q -f qcow2 -F qcow2 -b base top");
    let before = std::fs::read(room.path("base")).unwrap();
    // Without locks, which would say it too.
    for source in [
        "driver=qcow2,file.driver=qcow2,file.file.filename=top",
        "driver=qcow2,file.driver=raw,file.offset=0,file.file.driver=qcow2,file.file.file.filename=top",
    ] {
        room.ours_ok(&format!("convert -U --image-opts -O raw {source} copy"));
        let ended = room.ours(&format!("convert -U --image-opts -O raw {source} base"));
        assert!(ended.err.contains("it is a file of the source"), "{}", ended.err);
        assert_eq!(ended.status, Some(1));
        assert!(std::fs::read(room.path("base")).unwrap() == before);
    }
}
