//! `cowhand io` called as `qemu-io`, beside QEMU's own on copies of the same images: what is printed is the same but for times, and
//! so are the exit status and what the images hold in the end. Without QEMU's tools the tests fail.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Two directories with the same images, one for each of the tools.
struct Stand {
    _dir: tempfile::TempDir,
    /// Where, and with which program.
    sides: [(PathBuf, PathBuf); 2],
}

const QCOW2: [&str; 6] = ["plain.qcow2", "over.qcow2", "old.qcow2", "sub.qcow2", "small.qcow2", "deep.qcow2"];

fn qemu(tool: &str, dir: &Path, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).current_dir(dir).env("LC_ALL", "C").output();
    let output = output.expect("QEMU's tools are there: these tests hold cowhand against them (Debian: qemu-utils)");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{tool} {args:?}: {said}");
    said
}

impl Stand {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ours = dir.path().join("qemu-io");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_cowhand"), &ours).unwrap();
        let sides = ["theirs", "ours"].map(|name| dir.path().join(name));
        for side in &sides {
            std::fs::create_dir(side).unwrap();
            let create = |args: &[&str]| qemu("qemu-img", side, &[&["create", "-q", "-f"], args].concat());
            let base: Vec<u8> = (0..1_u32 << 20).map(|i| (i / 777) as u8).collect();
            std::fs::write(side.join("base.raw"), base).unwrap();
            std::fs::write(side.join("odd.raw"), [1; 1000]).unwrap();
            std::fs::write(side.join("pattern"), b"hello").unwrap();
            create(&["qcow2", "plain.qcow2", "1M"]);
            create(&["qcow2", "-b", "base.raw", "-F", "raw", "over.qcow2"]);
            create(&["qcow2", "-o", "compat=0.10", "old.qcow2", "1M"]);
            create(&["qcow2", "-o", "extended_l2=on", "-b", "base.raw", "-F", "raw", "sub.qcow2", "1M"]);
            create(&["qcow2", "-o", "cluster_size=512", "small.qcow2", "300k"]);
            // Between the topmost image and the raw one: data, zeros and nothing, in parts of the topmost one's clusters.
            create(&["qcow2", "-o", "cluster_size=4k", "-b", "base.raw", "-F", "raw", "mid.qcow2", "1M"]);
            let parts =
                ["write -q -P 1 40k 100k", "write -q -z 200k 444k", "write -q -P 2 260k 4k", "write -q -z 812k 24k"];
            qemu(
                "qemu-io",
                side,
                &["-f", "qcow2", "-c", parts[0], "-c", parts[1], "-c", parts[2], "-c", parts[3], "mid.qcow2"],
            );
            create(&["qcow2", "-o", "cluster_size=16k", "-b", "mid.qcow2", "-F", "qcow2", "deep.qcow2", "1234k"]);
        }
        let [theirs, ours_dir] = sides;
        Self { _dir: dir, sides: [(theirs, "qemu-io".into()), (ours_dir, ours)] }
    }

    /// Runs both, and gives what they said (both outputs in the order in which they came) with their statuses.
    fn both(&self, args: &[&str], input: &str) -> [(Option<i32>, String); 2] {
        self.sides.each_ref().map(|(dir, program)| {
            // One pipe for both outputs, so that their order shows.
            let mut child = Command::new("sh")
                .args(["-c", "exec \"$0\" \"$@\" 2>&1"])
                .arg(program)
                .args(args)
                .current_dir(dir)
                .env("LC_ALL", "C")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // A program that ends before it has read everything is no failure of the test.
            let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
            let output = child.wait_with_output().unwrap();
            (output.status.code(), without_times(&String::from_utf8_lossy(&output.stdout)))
        })
    }

    fn same(&self, args: &[&str], input: &str) {
        let [theirs, ours] = self.both(args, input);
        let first = theirs.1.lines().zip(ours.1.lines()).find(|(theirs, ours)| theirs != ours);
        assert_eq!(
            ours, theirs,
            "left: ours, right: QEMU's; {args:?} {input:?}; the first lines that differ: {first:?}"
        );
    }

    /// Runs commands, each of them in a run of its own.
    fn each(&self, image: &[&str], commands: &[&str]) {
        commands.iter().for_each(|command| self.same(&[image, &["-c", command]].concat(), ""));
    }

    /// Runs commands in one run.
    fn all(&self, image: &[&str], commands: &[&str]) {
        let mut args = image.to_vec();
        commands.iter().for_each(|command| args.extend(["-c", command]));
        self.same(&args, "");
    }

    /// The images hold the same, and ours are sound.
    fn compare(&self) {
        let [(theirs, _), (ours, _)] = &self.sides;
        for name in QCOW2 {
            let other = theirs.join(name);
            qemu("qemu-img", ours, &["check", "-f", "qcow2", name]);
            qemu("qemu-img", ours, &["compare", "-f", "qcow2", "-F", "qcow2", name, other.to_str().unwrap()]);
        }
        let read = |dir: &PathBuf| std::fs::read(dir.join("odd.raw")).unwrap();
        assert!(read(theirs) == read(ours), "odd.raw");
    }
}

/// Blanks what differs from run to run: how long it took.
fn without_times(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let words: Vec<_> = line.split(',').collect();
        match line.split_once(" ops; ") {
            Some((start, rest)) if rest.ends_with("ops/sec)") => writeln!(out, "{start} ops; T"),
            _ if words.len() == 5 && words[1] == "1" && words[2].contains(':') => writeln!(out, "{},1,T", words[0]),
            _ => writeln!(out, "{line}"),
        }
        .unwrap();
    }
    out
}

const PLAIN: &[&str] = &["-f", "qcow2", "plain.qcow2"];
const OVER: &[&str] = &["-f", "qcow2", "over.qcow2"];
const ODD: &[&str] = &["-f", "raw", "odd.raw"];

#[test]
fn wrong_commands_are_answered_in_qemus_words() {
    let stand = Stand::new();
    #[rustfmt::skip]
    stand.each(PLAIN, &[
        "write -x 0 1", "write 0", "write 0 1k 2", "write -P 0 1k", "write a 1k", "write 0 1x", "write 0 8E", "write -1 5",
        "write -P 300 0 1k", "write -P 0x 0 1k", "write 0 4G", "read 0 4G", "read 1M 1", "write 1M 1", "write 1048575 2",
        "write -b -z 0 1k", "write -f -c 0 1k", "write -n 0 1k", "write -u 0 1k", "write -z -P 1 0 1k", "write -c 100 1k",
        "write -b 0 1", "write -s nowhere 0 1k", "write -s /dev/null 0 1k", "write -c 0 1k", "write -- -1 5", "write -P",
        "read -l 5 0 1k", "read -P 3 -l 5 -s 1020 0 1k", "read -P 3 -s 1025 0 1k", "read -P 3 -s x 0 1k", "read -b 1 1k",
        "writev 0 2G 2G", "writev 0 1G 1G", "readv 0 4G", "writev 0 x", "writev 0", "readv -P 1 0", "readv -P 400 0 1",
        "write -z 0 3G", "write -zn 0 3G", "discard 0 3G", "discard 1M 1k", "discard -x 0 1", "discard 0",
        "discard 0 1 2", "discard x 1", "discard 0 x", "length 1", "sleep -5", "sleep x", "sleep", "flush -x", "aio_flush 1",
        "aio_read", "aio_read 0", "aio_read -v", "aio_write -x 0 1", "aio_read x 5", "aio_read 0 x", "aio_write -z 0 x",
        "aio_read -P 555 0 1", "aio_read -i 0 1", "aio_write -i 0 1", "aio_write -z 0 4k 4k", "aio_write -u 0 4k",
        "alloc", "alloc x", "alloc 0 x", "alloc 0 1 2", "map 1", "truncate", "truncate x", "truncate -m none 3M", "truncate -x 1M",
        "foo", "help foo", "help a b", "wait_break", "break a b", "resume x", "remove_break x", "sigraise", "sigraise x",
        "zone_report 0 1", "zone_open x 1", "zone_close 0 x", "zone_append 0 1", "zone_append 0 512 512", "open", "open -x",
        "open other", "reopen -x", "reopen foo", "reopen -r -w", "reopen -c foo", "reopen -o foo=bar",
        "reopen -o lazy-refcounts=42", "reopen -r -o read-only=on", "reopen -c writeback -o cache.direct=on", "", "q", "quit x",
        "reopen -o node-name=a", "reopen -o file.node-name=a", "reopen -o file.driver=qcow2", "reopen -o file.driver=file",
        "reopen -o driver=raw", "reopen -o driver=qcow2", "reopen -o cache-size=1M,l2-cache-size=2M", "reopen -o cache-size=1x",
        "reopen -o cache-size=1M,refcount-cache-size=2M", "reopen -o cache-size=1M,l2-cache-size=1k,refcount-cache-size=1k",
        "reopen -o l2-cache-entry-size=33k", "reopen -o l2-cache-entry-size=4k", "reopen -o refcount-cache-size=256T",
        "reopen -o overlap-check=all,overlap-check.template=none", "reopen -o overlap-check.template=x", "reopen -o overlap-check=x",
        "reopen -o overlap-check.active-l1=off", "reopen -o overlap-check.active-l1=x", "reopen -o cache-clean-interval=-1",
        "reopen -o cache-clean-interval=x", "reopen -o pass-discard-other=x", "reopen -o pass-discard-other=on",
    ]);
    stand.each(
        OVER,
        &["reopen -o backing.driver=raw", "reopen -o backing.driver=file", "reopen -o backing.node-name=a"],
    );
    stand.all(&[], &["open -o driver=qcow2,node-name=a plain.qcow2", "reopen -o node-name=a", "reopen -o node-name=b"]);
    stand.all(&[], &["open -o driver=qcow2,cache-size=0 plain.qcow2", "read 0 1k"]);
    stand.all(
        PLAIN,
        &["reopen -o cache-size=1M", "reopen -o l2-cache-size=512k", "reopen -o refcount-cache-size=2M", "read 0 1k"],
    );
    stand.all(
        &[&["-r"], PLAIN].concat(),
        &["write 0 1k", "discard 0 1k", "truncate 1k", "writev 0 1k", "aio_write 0 1k", "zone_open 0 1", "flush"],
    );
    stand.compare();
}

#[test]
fn what_cannot_be_opened_is_said_in_qemus_words() {
    let stand = Stand::new();
    #[rustfmt::skip]
    let lines = [
        "read 0 1", "close", "open nowhere", "open -t foo plain.qcow2", "open -d foo plain.qcow2", "open -i foo plain.qcow2",
        "open a b", "open -o driver=foo plain.qcow2", "open -o driver=qcow2,lazy-refcounts=foo plain.qcow2",
        "open -o driver=qcow2,foo=on plain.qcow2", "open -o", "open -t writeback -k -o driver=qcow2 plain.qcow2",
    ];
    stand.each(&[], &lines);
    #[rustfmt::skip]
    let runs: [&[&str]; 14] = [
        &["nowhere"], &["-f", "foo", "plain.qcow2"], &["-t", "foo", "plain.qcow2"], &["-d", "foo", "plain.qcow2"],
        &["-i", "foo", "plain.qcow2"], &["--image-opts", "-f", "raw", "a"], &["--image-opts", "driver=qcow2,foo=on,file.filename=plain.qcow2"],
        &["--object", "foo"], &["-k", "-f", "qcow2", "plain.qcow2"], &["-U", "-f", "qcow2", "plain.qcow2"],
        &["-rC", "-f", "qcow2", "plain.qcow2"], &["foo:bar"], &["--image-opts", "driver=qcow2,file.filename=plain.qcow2", "-c", "length"],
        &["json:{\"driver\":\"qcow2\",\"file\":{\"filename\":\"plain.qcow2\"}}", "-c", "length"],
    ];
    runs.iter().for_each(|run| stand.same(run, ""));
}

#[test]
fn a_disk_may_lie_in_what_stands_in_a_files_place() {
    let stand = Stand::new();
    #[rustfmt::skip]
    let use_it = ["info", "length", "read -P 0 3k 1k", "write -P 7 1k 3k", "write -z 2k 1k", "write 60k 8k", "read -v 1000 100",
        "truncate 128k", "flush", "map"];
    for node in [
        "driver=raw,offset=64k,size=64k base.raw",
        "driver=raw,size=64k,file.driver=file base.raw",
        "driver=raw,offset=65k,file.driver=raw,file.offset=1k base.raw",
        "driver=file,filename=base.raw",
        "driver=qcow2,file.driver=raw,file.size=640k,file.file.filename=over.qcow2",
        "driver=qcow2,file.driver=raw,file.file.driver=file over.qcow2",
        "driver=qcow2,backing.driver=raw over.qcow2",
        "driver=qcow2,file.align=4k,file.max-transfer=8k blkdebug::plain.qcow2",
        "driver=raw,file.align=512,file.opt-write-zero=1k,file.max-write-zero=1k blkdebug::base.raw",
        "driver=raw,file.inject-error.0.event=read_aio,file.inject-error.0.once=on blkdebug::base.raw",
        "driver=qcow2,file.inject-error.0.event=write_aio,file.inject-error.0.errno=28,file.inject-error.0.once=on \
         blkdebug::plain.qcow2",
        "driver=qcow2,file.inject-error.0.event=none,file.inject-error.0.iotype=read,file.inject-error.0.sector=0 blkdebug::plain.qcow2",
    ] {
        let lines: Vec<_> = std::iter::once(format!("open -o {node}")).chain(use_it.map(String::from)).collect();
        stand.all(&[], &lines.iter().map(String::as_str).collect::<Vec<_>>());
    }
    // What another image shows has the size that it has.
    let over =
        "open -o driver=blkdebug,image.driver=qcow2,align=512,opt-discard=3k,max-discard=6k blkdebug::over.qcow2";
    stand.all(
        &[],
        &[
            over,
            "write -P 7 1k 3k",
            "discard 100 70k",
            "write -z 50k 30k",
            "read -v 1000 100",
            "map",
            "alloc 65500 100",
        ],
    );
    let nothing = "open -o driver=null-co,size=64k,read-zeroes=on";
    stand.all(&[], &[nothing, "info", "length", "read -v 1000 20", "write 0 64k", "write 60k 8k", "flush", "close"]);
    #[rustfmt::skip]
    let lines = [
        "open -o driver=raw,offset=2M base.raw", "open -o driver=raw,size=2M base.raw", "open -o driver=raw,size=1000 base.raw",
        "open -o driver=raw,offset=x base.raw",
        "open -o driver=null-co,foo=on", "open -o driver=file,filename=.", "open -o driver=file,filename=/dev/null",
        "open -r -o driver=host_device,filename=.", "open -o driver=host_device,filename=base.raw", "open -o driver=qcow2,file.driver=foo",
        "open -o driver=raw,file.driver=qcow2,file.file.filename=base.raw", "open -o driver=raw,file.align=3 blkdebug::base.raw",
        "open -o driver=raw,file.align=512,file.max-transfer=1000 blkdebug::base.raw", "open blkdebug:base.raw",
        "open -o driver=raw,file.inject-error.0.event=foo blkdebug::base.raw", "open -o driver=raw,file.foo=on blkdebug::base.raw",
        "open -o driver=raw,file.inject-error.0.once=on blkdebug::base.raw", "open -o driver=raw blkdebug:nowhere:base.raw",
        "open -o driver=raw,file.set-state.0.event=none,file.set-state.0.foo=1 blkdebug::base.raw",
        "open -o driver=raw,file.inject-error.0.event=none,file.inject-error.0.errno=x blkdebug::base.raw",
    ];
    stand.each(&[], &lines);
}

#[test]
fn numbers_are_read_and_shown_as_qemu_does() {
    let stand = Stand::new();
    let numbers = "1 0x10 0X10 010 1k 1K 1.5k 1.5 0x10k 0x1.5 1e3 1e 1E +1 1B 1b 1kk 1kB .5k 5.k 1.0 0.1k 1.25M 7P 8191P 8192P \
                   9223372036854775807 9223372036854775808 18446744073709551616 7.99999E 0x 0xg 1_0 inf nan 1T 00x1 0b1 1, \
                   0.0000000000000000001k 0.999999999999999999999k 0x8000000000000000 -5 -- -0 1.0625k 1.1875k 3.3333M - . k \
                   0.4999999999k 1.1G 99999.9k";
    let commands: Vec<_> = numbers.split(' ').map(|number| format!("alloc {number}")).collect();
    commands.iter().for_each(|command| stand.each(PLAIN, &[command]));
}

#[test]
fn commands_come_from_standard_input_too() {
    let stand = Stand::new();
    for input in ["length\nwrite 0 1k\nfoo\nquit\nlength\n", "length\nlength", "", "\n\n  \nread -v 0 20\n\n"] {
        stand.same(PLAIN, input);
    }
    stand.compare();
}

#[test]
fn requests_report_what_they_did() {
    let stand = Stand::new();
    #[rustfmt::skip]
    stand.all(PLAIN, &[
        "write 0 0", "read -P 0 0 0", "writev 0 1 2 3", "read -v 0 20", "readv -v 0 6 6", "write -C 0 512", "read -C 0 64k", "w 5 5",
        "read -qv 0 16", "write -P3 -q 0 1k", "read -P 4 100 7", "read -P 4 -s 3 -l 9 -q 100 90", "write -s pattern 500k 13", "r -v 500k 14",
        "write -c 64k 192k", "write -c 64k 64k", "write -f 7 7", "write -z 3 1000", "write -pz 66k 1", "map", "length", "info", "i", "alloc 0 2M",
    ]);
    stand.all(
        &["-f", "qcow2", "old.qcow2"],
        &["write 64k 64k", "write -z 64k 64k", "map", "write -zn 128k 64k", "write -z 5 9", "map", "info"],
    );
    stand.all(PLAIN, &["write -z 700k 10", "map", "write -zu 800k 64k", "alloc 700k 200k", "map"]);
    let large = "read -v 0 5000";
    stand.all(
        ODD,
        &[
            "length",
            "read -v 990 34",
            "write 999 10",
            "map",
            "info",
            "alloc 0 1k",
            large,
            "write x 1",
            "write -z 5 500",
        ],
    );
    stand.all(&[&["-n", "-m"], PLAIN].concat(), &["write -P 9 1 1k", "read -v 0 40"]);
    stand.all(&[&["-s"], OVER].concat(), &["write 5 10", "read -v 0 20", "map"]);
    stand.all(OVER, &["map", "read -v 770 20"]);
    stand.all(&[&["-C"], OVER].concat(), &["read -q 300k 10", "map"]);
    stand.all(
        PLAIN,
        &[
            "aio_write -P 5 0 4k",
            "aio_flush",
            "aio_read -v 4090 20",
            "aio_flush",
            "aio_read -P 4 0 5",
            "aio_write 5M 1",
            "close",
        ],
    );
    stand.all(
        PLAIN,
        &[
            "close",
            "open -r -o driver=qcow2 plain.qcow2",
            "write 0 1",
            "reopen -w",
            "write 0 1",
            "reopen -r",
            "write 0 1",
        ],
    );
    stand.compare();
}

/// A xorshift generator.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len() as u64) as usize]
    }
}

/// A command that is likely, but not sure, to succeed on a disk of about `size` bytes. Compressed writes are left out: whether there is
/// something that they would replace depends on how zeros were written there before, in which the two differ.
fn random_command(dice: &mut Dice, size: u64) -> String {
    let unit = [1, 512, 4096, 65536][dice.below(4) as usize];
    let offset = dice.below(size / unit + 1) * unit;
    let len = dice.below(size / unit / 4 + 2) * unit;
    let pattern = dice.below(256);
    let flags = dice.of(&["", "-q ", "-C ", "-f "]);
    match dice.below(10) {
        0 => format!("write -z {flags}{}{offset} {len}", dice.of(&["", "-u "])),
        1 | 2 => format!("write {flags}-P {pattern} {offset} {len}"),
        3 => format!("writev {flags}-P {pattern} {offset} {len} {} 7", dice.below(700)),
        4 => format!("read -v {offset} {}", len.min(600)),
        5 => format!("readv -v {offset} {} {}", dice.below(300), dice.below(300)),
        6 => format!("read -P {pattern} {offset} {len}"),
        7 => format!("discard {offset} {len}"),
        8 => "length".into(),
        _ => format!("aio_write -P {pattern} {offset} {len}"),
    }
}

#[test]
fn random_scripts_do_the_same_as_in_qemu() {
    let seed = std::env::var("COWHAND_IO_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64 | 1
    });
    println!("COWHAND_IO_SEED={seed}");
    let mut dice = Dice(seed);
    let stand = Stand::new();
    for _ in 0..15 {
        for image in QCOW2 {
            let size = if image == "small.qcow2" { 300 << 10 } else { 1 << 20 };
            let commands: Vec<_> = (0..12).map(|_| random_command(&mut dice, size)).collect();
            let mut args = vec!["-f", "qcow2", image];
            for command in &commands {
                args.extend(["-c", command]);
                if command.starts_with("aio") {
                    args.extend(["-c", "aio_flush"]);
                }
            }
            stand.same(&args, "");
        }
    }
    stand.compare();
}

/// What an image's entries say, each with the offset from which on: the depth, and whether it is data or zeros. Where it lies, and
/// which data is a hole in the file, is each tool's own.
fn entries(dir: &Path, image: &str) -> Vec<(String, String)> {
    let map = qemu("qemu-img", dir, &["map", "--output=json", "-f", "qcow2", image]);
    let mut entries: Vec<(String, String)> = Vec::new();
    for line in map.lines() {
        let value = |key: &str| {
            let (_, rest) = line.split_once(&format!("\"{key}\": ")).unwrap();
            rest.split([',', '}']).next().unwrap().to_owned()
        };
        let says = format!("depth {}, present {}, data {}", value("depth"), value("present"), value("data"));
        if entries.last().is_none_or(|(_, last)| *last != says) {
            entries.push((value("start"), says));
        }
    }
    entries
}

#[test]
fn zeros_and_discards_leave_the_entries_that_they_leave_in_qemu() {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let stand = Stand::new();
    for image in ["plain.qcow2", "over.qcow2", "sub.qcow2", "small.qcow2", "deep.qcow2"] {
        for round in 0..12 {
            let mut args = vec!["-f".to_owned(), "qcow2".into(), image.into()];
            for _ in 0..8 {
                let unit = [512, 1024, 4096, 16384, 65536][dice.below(5) as usize];
                let sectors = if image == "small.qcow2" { 300 << 10 } else { 1 << 20 } / unit;
                let (offset, len) = (dice.below(sectors), 1 + dice.below(9));
                let (offset, len) = (offset * unit, len.min(sectors - offset) * unit);
                // A refused one leaves nothing half done only within the smallest unit.
                if dice.below(4) == 0 && image != "small.qcow2" {
                    let start = offset & !2047;
                    let from = dice.below(4) * 512;
                    let count = (1 + dice.below(4)) * 512;
                    args.extend(["-c".into(), format!("write -z -n {} {}", start + from, count.min(2048 - from))]);
                }
                let verb = dice.of(&["write -P 7", "write -z", "write -z", "write -z -u", "discard"]);
                args.extend(["-c".into(), format!("{verb} {offset} {len}")]);
            }
            stand.same(&args.iter().map(String::as_str).collect::<Vec<_>>(), "");
            let [theirs, ours] = stand.sides.each_ref().map(|(dir, _)| entries(dir, image));
            assert_eq!(ours, theirs, "{image}, round {round}: left: ours, right: QEMU's; {args:?}");
        }
    }
    stand.compare();
}

#[test]
fn the_vm_state_is_kept_where_qemu_keeps_it() {
    let stand = Stand::new();
    for image in QCOW2 {
        let args = ["-f", "qcow2", image];
        #[rustfmt::skip]
        stand.all(&args, &[
            "write -P 3 64k 64k", "read -P 0 -b 0 4k", "write -b -P 1 0 64k", "write -b -P 2 5M 512", "write -bC 5120k 512",
            "write -b -s pattern 64k 512", "read -P 1 -b 0 64k", "read -bv 64k 512", "read -P 0 -b 4M 1M", "read -P 0xcd -b 5M 512",
            "read -b 7E 512", "write -b 100 512", "write -b 0 100", "read -P 3 64k 64k", "write -b 0 0", "length",
        ]);
        // Each has what the other wrote, and snapshots keep it.
        let [(theirs, qemu_io), (ours, cowhand)] = &stand.sides;
        let read = |program: &PathBuf, dir: &PathBuf, pattern: &str| {
            let command = format!("read -q -P {pattern} -b 0 64k");
            let args = ["-f", "qcow2", "-c", &command, "-c", "read -q -P 0xcd -b 5M 512", image];
            let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
            assert!(output.status.success() && output.stdout.is_empty(), "{image}: {output:?}");
        };
        read(cowhand, theirs, "1");
        read(qemu_io, ours, "1");
        qemu("qemu-img", ours, &["snapshot", "-c", "one", image]);
        stand.all(&args, &["write -qb -P 9 0 64k", "read -P 9 -b 0 64k"]);
        read(qemu_io, ours, "9");
        qemu("qemu-img", ours, &["snapshot", "-a", "one", image]);
        read(cowhand, ours, "1");
    }
    stand.each(PLAIN, &["write -b 7E 512"]);
    stand.each(ODD, &["write -b 0 512", "read -b 0 512"]);
    stand.each(&["-r", "-f", "qcow2", "plain.qcow2"], &["write -b 0 512", "read -P 0xcd -b 5M 512"]);
    for (dir, _) in &stand.sides {
        for name in QCOW2 {
            qemu("qemu-img", dir, &["check", "-f", "qcow2", name]);
        }
    }
}

#[test]
fn a_disk_that_is_raw_by_a_guess_does_not_become_an_image() {
    let stand = Stand::new();
    let mut vdi = [0; 512];
    vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
    for (dir, _) in &stand.sides {
        std::fs::write(dir.join("qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
        std::fs::write(dir.join("vdi"), vdi).unwrap();
        std::fs::write(dir.join("tail"), b"I\xfb\0\0\0\x03").unwrap();
        std::fs::write(dir.join("head"), b"QF").unwrap();
    }
    #[rustfmt::skip]
    let writes = [
        "write -s qcow2 0 512", "write -s qcow2 0 8", "write -s vdi 0 4k", "write -s vdi 0 68", "write 0 512", "write -P 3 7 1000",
        "write -s qcow2 512 512", "write -z 0 600", "discard 0 512", "writev -P 81 0 100 1000", "aio_write -P 5 3 5",
        "write -s head 0 2", "write -s tail 2 6", "write -s qcow2 0 8", "read -v 0 80",
    ];
    stand.all(&["base.raw"], &writes);
    stand.each(&["base.raw"], &["write -s qcow2 0 512", "reopen -c writethrough", "read -v 0 80"]);
    stand.all(&["base.raw"], &["reopen -c writethrough", "write -s qcow2 0 512"]);
    stand.all(&["-s", "base.raw"], &["read 0 512"]);
    stand.all(&["-r", "base.raw"], &["read 0 512"]);
    stand.all(&["--image-opts", "file.filename=base.raw"], &["write -s qcow2 0 512"]);
    stand.all(&[], &["open base.raw", "write -s qcow2 0 512", "write -s qcow2 4k 512"]);
    let read = |(dir, _): &(PathBuf, PathBuf)| std::fs::read(dir.join("base.raw")).unwrap();
    assert!(read(&stand.sides[0]) == read(&stand.sides[1]));
    // Who says that it is raw may write anything.
    stand.all(&["-f", "raw", "base.raw"], &["write -s qcow2 0 512"]);
    assert_eq!(read(&stand.sides[1])[..4], *b"QFI\xfb");
}

#[test]
fn what_is_written_through_the_filter_is_compressed_whole_clusters_each() {
    let stand = Stand::new();
    let options = "driver=compress,file.driver=qcow2,file.file.filename=over.qcow2";
    // In the middle of clusters and of sectors, over several of them, and at the disk's end.
    let writes = ["write -P 1 17k 200k", "write -P 2 400001 777", "write -P 3 1020k 4k", "read -v 384k 20k"];
    let words: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
    stand.same(&[&["--image-opts", options], &words[..]].concat(), "");
    // A cluster that is there as data is refused, and keeps what it has.
    stand.same(&["-f", "qcow2", "-c", "write -P 4 512k 64k", "over.qcow2"], "");
    stand.same(&["--image-opts", options, "-c", "write -P 5 512k 64k", "-c", "read -P 4 512k 64k"], "");
    let [theirs, ours] = stand.sides.each_ref().map(|(dir, _)| {
        qemu("qemu-img", dir, &["check", "-f", "qcow2", "over.qcow2"]);
        let map = qemu("qemu-img", dir, &["map", "-f", "qcow2", "--output=json", "over.qcow2"]);
        let compressed = map.lines().filter(|line| line.contains("\"compressed\": true"));
        compressed.map(str::to_string).collect::<Vec<_>>()
    });
    assert!(theirs.len() >= 3, "{theirs:?}");
    assert_eq!(theirs, ours);
}

#[test]
fn info_tells_of_bitmaps_and_encryption() {
    let stand = Stand::new();
    let [(theirs, _), (ours, _)] = &stand.sides;
    let secret = "secret,id=key,data=abc";
    qemu("qemu-img", theirs, &["create", "-q", "-f", "qcow2", "marked.qcow2", "64M"]);
    qemu("qemu-img", theirs, &["bitmap", "--add", "marked.qcow2", "one"]);
    qemu("qemu-img", theirs, &["bitmap", "--add", "--disable", "-g", "128k", "marked.qcow2", "two"]);
    let luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,extended_l2=on,compression_type=zstd";
    let create = ["create", "-q", "--object", secret, "-f", "qcow2", "-o", luks, "secret.qcow2", "4M"];
    qemu("qemu-img", theirs, &create);
    for name in ["marked.qcow2", "secret.qcow2"] {
        std::fs::copy(theirs.join(name), ours.join(name)).unwrap();
    }
    stand.all(&["-r", "-f", "qcow2", "marked.qcow2"], &["info"]);
    let options = "driver=qcow2,encrypt.key-secret=key,file.filename=secret.qcow2";
    stand.all(&["--object", secret, "--image-opts", options], &["info"]);
}
