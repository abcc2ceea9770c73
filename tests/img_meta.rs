//! `cowhand img` under the name of qemu-img, held against qemu-img itself: what `info`, `check` and `create` say, word for word, of the
//! same images and the same arguments, and what they make.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// What a command did.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    status: Option<i32>,
    said: String,
    complained: String,
}

fn run(mut command: Command, dir: &Path, args: &[&str]) -> Ended {
    let output = command.args(args).current_dir(dir).stdin(Stdio::null()).env("LC_ALL", "C").output().unwrap();
    Ended {
        status: output.status.code(),
        said: String::from_utf8_lossy(&output.stdout).into_owned(),
        complained: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn ours(dir: &Path, args: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowhand"));
    command.arg0("qemu-img");
    run(command, dir, args)
}

fn theirs(dir: &Path, args: &[&str]) -> Ended {
    // The tests hold cowhand against QEMU (Debian: apt install qemu-utils).
    run(Command::new("qemu-img"), dir, args)
}

fn make(dir: &Path, args: &[&str]) {
    let ended = theirs(dir, args);
    assert_eq!(ended.status, Some(0), "{args:?}: {ended:?}");
}

fn write(dir: &Path, image: &str, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| args.extend(["-c", *command]));
    args.push(image);
    assert_eq!(run(Command::new("qemu-io"), dir, &args).status, Some(0), "{args:?}");
}

const SECRET: &str = "secret,id=s,data=correct horse";

/// Images of many sorts.
fn images(dir: &Path) -> Vec<&'static str> {
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    make(dir, &["create", "-q", "-f", "qcow2", "base.qcow2", "10M"]);
    make(dir, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "over.qcow2"]);
    for name in ["one", "two words"] {
        make(dir, &["snapshot", "-c", name, "over.qcow2"]);
    }
    make(dir, &["bitmap", "--add", "over.qcow2", "first"]);
    make(dir, &["bitmap", "--add", "--disable", "-g", "4096", "over.qcow2", "second"]);
    write(dir, "over.qcow2", &["write 1M 3M", "write -z 5M 1M"]);
    make(dir, &["create", "-q", "-f", "qcow2", "--object", SECRET, "-o", luks, "luks.qcow2", "1M"]);
    let cbc = format!(
        "{luks},encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,\
         encrypt.hash-alg=sha1,backing_file=base.qcow2,backing_fmt=qcow2"
    );
    make(dir, &["create", "-q", "-f", "qcow2", "--object", SECRET, "-o", &cbc, "cbc.qcow2"]);
    let aes = "encrypt.format=aes,encrypt.key-secret=s";
    make(dir, &["create", "-q", "-f", "qcow2", "--object", SECRET, "-o", aes, "aes.qcow2", "1M"]);
    let data = "data_file=data.raw,data_file_raw=on,extended_l2=on,compression_type=zstd,lazy_refcounts=on";
    make(dir, &["create", "-q", "-f", "qcow2", "-o", data, "data.qcow2", "3G"]);
    make(dir, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1000k"]);
    let narrow = "refcount_bits=1,cluster_size=512";
    make(dir, &["create", "-q", "-f", "qcow2", "-o", narrow, "narrow.qcow2", "999k"]);
    fs::create_dir(dir.join("sub")).unwrap();
    make(dir, &["create", "-q", "-f", "qcow2", "-u", "-b", "../base.qcow2", "-F", "qcow2", "sub/up.qcow2", "1M"]);
    fs::write(dir.join("raw"), [7; 1000]).unwrap();
    make(dir, &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "full.qcow2", "100M"]);
    // Compressed clusters, and some that lie out of order.
    write(dir, "base.qcow2", &["write -c 0 64k", "write 4M 64k", "write -c 2M 64k", "write 1M 128k"]);
    vec![
        "base.qcow2",
        "over.qcow2",
        "luks.qcow2",
        "cbc.qcow2",
        "aes.qcow2",
        "data.qcow2",
        "old.qcow2",
        "narrow.qcow2",
        "sub/up.qcow2",
        "raw",
        "full.qcow2",
    ]
}

fn assert_same(dir: &Path, args: &[&str]) {
    assert_eq!(ours(dir, args), theirs(dir, args), "{args:?}");
}

#[test]
fn info_says_what_qemu_img_says() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for image in images(dir) {
        for options in [&[][..], &["--output=json"], &["-U", "--backing-chain"], &["--backing-chain", "--output=json"]]
        {
            assert_same(dir, &[&["info"], options, &[image]].concat());
        }
    }
    let absolute = dir.join("over.qcow2");
    assert_same(dir, &["info", absolute.to_str().unwrap()]);
    assert_same(dir, &["info", "-f", "raw", "over.qcow2"]);
    make(dir, &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "file:a:b.qcow2"]);
    for name in ["file:over.qcow2", "file:a:b.qcow2", "./a:b.qcow2"] {
        assert_same(dir, &["info", name]);
        assert_same(dir, &["info", "--output=json", name]);
    }
    assert_same(dir, &["info", "--image-opts", "driver=qcow2,file.filename=over.qcow2"]);
    assert_same(dir, &["info", r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"over.qcow2"}}"#]);
    // What has a secret is looked at without it.
    let nodes = [
        "driver=qcow2,file.filename=luks.qcow2,encrypt.key-secret=s",
        "driver=qcow2,file.driver=file,file.filename=over.qcow2,discard=unmap",
        "driver=null-co",
        "driver=file,filename=raw",
        "driver=host_device,filename=raw",
        "driver=raw,file.filename=raw,size=1M",
        "driver=raw,file.filename=raw,size=1000",
        "driver=raw,file.filename=raw,offset=1001",
    ];
    for node in nodes {
        assert_same(dir, &["info", "--image-opts", node]);
    }
    for wrong in [&["nothing"][..], &["-f", "nope", "raw"], &["-f", "qcow2", "raw"]] {
        assert_same(dir, &[&["info"], wrong].concat());
    }
}

#[test]
fn check_says_what_qemu_img_says_of_sound_images() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for image in images(dir) {
        for options in [&[][..], &["--output=json"], &["-q"], &["-r", "all"], &["-U", "-T", "none"]] {
            // To repair it QEMU opens it for writing, and then takes the bitmaps that it has loaded for leaks (and warns of a
            // raw image). Encrypted images it checks only with their secret.
            let is_qemus_alone = ["over.qcow2", "raw"].contains(&image) && options.contains(&"-r");
            if !is_qemus_alone && !["luks.qcow2", "cbc.qcow2", "aes.qcow2"].contains(&image) {
                assert_same(dir, &[&["check"], options, &[image]].concat());
            }
        }
    }
    for wrong in [&["nothing"][..], &["-f", "qcow2", "raw"], &["-T", "odd", "raw"]] {
        assert_same(dir, &[&["check"], wrong].concat());
    }
}

/// Writes big-endian numbers of 16 bits over a file.
fn put(dir: &Path, image: &str, at: usize, numbers: &[u16]) {
    let path = dir.join(image);
    let mut bytes = fs::read(&path).unwrap();
    let written: Vec<u8> = numbers.iter().flat_map(|number| number.to_be_bytes()).collect();
    bytes[at..at + written.len()].copy_from_slice(&written);
    fs::write(&path, bytes).unwrap();
}

#[test]
fn check_and_repair_say_what_qemu_img_says_of_damage() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir, &["create", "-q", "-f", "qcow2", "disk", "10M"]);
    write(dir, "disk", &["write 0 640k"]);
    // The first refcount block is the third cluster; the first L2 table the fifth, with the guest's data behind it.
    let (block, l2) = (2 << 16, 4 << 16);
    let leak = |at: usize, counts: &'static [u16]| (block + 2 * at, counts);
    for (what, damage) in [
        ("leaks", vec![leak(20, &[1, 2, 1])]),
        ("too low and too high", vec![leak(7, &[2, 3])]),
        ("a flag that is missing", vec![(l2 + 8, &[0][..])]),
        ("a flag too many", vec![leak(7, &[2])]),
        ("in use and free", vec![leak(7, &[0])]),
        ("two entries for one cluster", vec![(l2 + 8, &[0x8000, 0, 5, 0][..])]),
        ("a place for later that is not aligned", vec![(l2 + 6, &[0x0201][..])]),
        ("an entry that is not aligned", vec![(l2 + 6, &[0x0200][..])]),
        ("reserved bits", vec![(l2 + 6, &[0x0002][..])]),
        ("an entry past the end", vec![(l2 + 2, &[0x00ff][..])]),
    ] {
        let damaged = |name: &str| {
            fs::copy(dir.join("disk"), dir.join(name)).unwrap();
            damage.iter().for_each(|(at, numbers)| put(dir, name, *at, numbers));
        };
        damaged("bad");
        assert_same(dir, &["check", "bad"]);
        assert_same(dir, &["check", "--output=json", "bad"]);
        for repair in ["leaks", "all"] {
            damaged("bad");
            let us = ours(dir, &["check", "-r", repair, "bad"]);
            damaged("bad");
            let them = theirs(dir, &["check", "-r", repair, "bad"]);
            // What is lost for good QEMU empties or leaves, and says so in its way. It frees no leaks where it would have to
            // write the refcounts anew.
            let lost = ["an entry that is not aligned", "reserved bits", "an entry past the end"];
            if lost.contains(&what) || (what == "in use and free" && repair == "leaks") {
                continue;
            }
            // Flags go before anything is freed; QEMU does it the other way round. And it says twice what stays.
            let in_any_order = |ended: Ended| {
                let mut lines: Vec<_> = ended.complained.lines().map(str::to_string).collect();
                lines.sort();
                lines.dedup();
                (ended.status, ended.said, lines)
            };
            assert_eq!(in_any_order(us), in_any_order(them), "{what}, -r {repair}");
        }
    }
}

#[test]
fn check_and_repair_say_what_qemu_img_says_of_snapshot_tables() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir, &["create", "-q", "-f", "qcow2", "disk", "10M"]);
    write(dir, "disk", &["write 0 640k"]);
    make(dir, &["snapshot", "-c", "first", "disk"]);
    make(dir, &["snapshot", "-c", "other", "disk"]);
    let bytes = fs::read(dir.join("disk")).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    // Fixed part, extra data, an ID of one letter and a name of five.
    let second = table + (40 + 24 + 6_usize).next_multiple_of(8);
    for (what, extra_len) in
        [("no disk size", [0, 8]), ("none", [0, 0]), ("too much", [0, 1025]), ("far too much", [1, 0])]
    {
        let damaged = |name: &str| {
            fs::copy(dir.join("disk"), dir.join(name)).unwrap();
            put(dir, name, second + 36, &extra_len);
        };
        damaged("bad");
        for args in [&["info", "bad"][..], &["check", "bad"], &["check", "-r", "leaks", "bad"]] {
            // Where it is open the strings are what the extra data was.
            if args[0] == "check" || what.ends_with("too much") {
                let (us, them) = (ours(dir, args), theirs(dir, args));
                assert_eq!((us.status, us.complained), (them.status, them.complained), "{what}: {args:?}");
            }
        }
        let us = ours(dir, &["check", "-r", "all", "bad"]);
        assert_eq!(theirs(dir, &["check", "-q", "bad"]).status, Some(0), "{what}");
        damaged("bad");
        let them = theirs(dir, &["check", "-r", "all", "bad"]);
        assert_eq!((us.status, us.complained), (them.status, them.complained), "{what}");
    }
}

#[test]
fn create_says_what_qemu_img_says_and_makes_what_it_makes() {
    let sets: &[&[&str]] = &[
        &["-f", "qcow2", "new", "1M"],
        &["-f", "raw", "new", "1000"],
        &["new", "1.5k"],
        &["-f", "qcow2", "-o", "size=64k", "new"],
        &["-f", "qcow2", "new", "0"],
        &["-q", "-f", "qcow2", "new", "10T"],
        &["-f", "qcow2", "-o", "compat=0.10", "new", "1G"],
        &["-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "new", "100M"],
        &["-f", "qcow2", "-o", "cluster_size=2M", "-o", "refcount_bits=1", "new", "100M"],
        &["-f", "qcow2", "-o", "lazy_refcounts=on,compression_type=zstd,extended_l2=on", "new", "100M"],
        &["-f", "qcow2", "-o", "preallocation=metadata", "new", "100M"],
        &["-f", "qcow2", "-o", "preallocation=falloc,cluster_size=4k", "new", "10M"],
        &["-f", "qcow2", "-o", "preallocation=full", "new", "10M"],
        &["-f", "raw", "-o", "preallocation=falloc", "new", "10M"],
        &["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new"],
        &["-f", "qcow2", "-b", "raw", "-F", "raw", "new"],
        &["-f", "qcow2", "-u", "-b", "nothing", "-F", "raw", "new", "5M"],
        &[
            "-f",
            "qcow2",
            "-o",
            "backing_file=base.qcow2,backing_fmt=qcow2,extended_l2=on,preallocation=metadata",
            "new",
        ],
        &["-f", "qcow2", "-o", "data_file=new.data", "new", "5M"],
        &["-f", "qcow2", "-o", "data_file=new.data,data_file_raw=on,preallocation=full", "new", "5M"],
    ];
    let made = |tool: fn(&Path, &[&str]) -> Ended, args: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), &["create", "-q", "-f", "qcow2", "base.qcow2", "10M"]);
        fs::write(dir.path().join("raw"), [7; 1000]).unwrap();
        fs::write(dir.path().join("new"), b"what was there before").unwrap();
        let ended = tool(dir.path(), &[&["create"], args].concat());
        (dir, ended)
    };
    for args in sets {
        let (our_dir, us) = made(ours, args);
        let (their_dir, them) = made(theirs, args);
        assert_eq!(us, them, "{args:?}");
        if args.contains(&"-u") {
            continue;
        }
        let (our_dir, their_dir) = (our_dir.path(), their_dir.path());
        let format = if args.contains(&"qcow2") { "qcow2" } else { "raw" };
        // All that an image says of itself, and its length; how much space it takes depends on the file system.
        let told = |dir| {
            let info = theirs(dir, &["info", "--output=json", "-f", format, "new"]);
            assert_eq!(info.status, Some(0), "{args:?}: {info:?}");
            let lines = info.said.lines().filter(|line| !line.contains("actual-size"));
            lines.map(str::to_string).collect::<Vec<_>>()
        };
        assert_eq!(told(our_dir), told(their_dir), "{args:?}");
        if format == "qcow2" {
            let check = theirs(our_dir, &["check", "-f", "qcow2", "new"]);
            assert_eq!(check.status, Some(0), "{args:?}: {check:?}");
        }
        let other = their_dir.join("new");
        let compare = ["compare", "-f", format, "-F", format, "new", other.to_str().unwrap()];
        assert_eq!(theirs(our_dir, &compare).status, Some(0), "{args:?}");
    }
}

#[test]
fn wrong_arguments_of_create_are_refused_as_by_qemu_img_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir, &["create", "-q", "-f", "qcow2", "base", "1M"]);
    let battery: &[&[&str]] = &[
        &["-f", "qcow2", "-b", "base", "new"],
        &["-f", "qcow2", "-b", "base", "-F", "nope", "new"],
        &["-f", "qcow2", "-b", "nothing", "-F", "raw", "new"],
        &["-f", "qcow2", "-b", "nothing", "new"],
        &["-f", "qcow2", "-b", "nothing", "-u", "-F", "raw", "new"],
        &["-f", "qcow2", "-b", "nothing", "-u", "new", "1M"],
        &["-f", "qcow2", "-F", "raw", "new", "1M"],
        &["-f", "qcow2", "-b", "new", "new", "1M"],
        &["-f", "qcow2", "-b", "", "new", "1M"],
        &["-f", "raw", "-b", "b", "new", "1M"],
        &["-f", "raw", "-F", "b", "new", "1M"],
        &["-f", "raw", "-o", "cluster_size=4k", "new", "1M"],
        &["-f", "qcow2", "new"],
        &["-f", "qcow2", "-o", "size=1M", "new", "2M"],
        &["-f", "qcow2", "new", "1X"],
        &["-f", "qcow2", "new", "--", "-5"],
        &["-f", "qcow2", "new", "--", "-1k"],
        &["-f", "qcow2", "-o", "size=-1k", "new"],
        &["-f", "qcow2", "-o", "size=-1024", "new"],
        &["-f", "qcow2", "new", "16E"],
        &["-f", "qcow2", "new", "512P"],
        &["-f", "qcow2", "-o", "cluster_size=512", "new", "512T"],
        &["-f", "qcow2", "-o", "cluster_size=1234", "new", "1M"],
        &["-f", "qcow2", "-o", "cluster_size=4M", "new", "1M"],
        &["-f", "qcow2", "-o", "cluster_size=foo", "new", "1M"],
        &["-f", "qcow2", "-o", "cluster_size=99E", "new", "1M"],
        &["-f", "qcow2", "-o", "cluster_size", "new", "1M"],
        &["-f", "qcow2", "-o", "cluster_size=8k,extended_l2=on", "new", "1M"],
        &["-f", "qcow2", "-o", "extended_l2=on,compat=0.10", "new", "1M"],
        &["-f", "qcow2", "-o", "compat=0.42", "new", "1M"],
        &["-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=on", "new", "1M"],
        &["-f", "qcow2", "-o", "compat=v2,refcount_bits=8", "new", "1M"],
        &["-f", "qcow2", "-o", "refcount_bits=7", "new", "1M"],
        &["-f", "qcow2", "-o", "refcount_bits=128", "new", "1M"],
        &["-f", "qcow2", "-o", "refcount_bits=-1", "new", "1M"],
        &["-f", "qcow2", "-o", "refcount_bits=foo", "new", "1M"],
        &["-f", "qcow2", "-o", "preallocation=foo", "new", "1M"],
        &["-f", "qcow2", "-o", "lazy_refcounts=maybe", "new", "1M"],
        &["-f", "qcow2", "-o", "foo=bar", "new", "1M"],
        &["-f", "qcow2", "-o", ",foo", "new", "1M"],
        &["-f", "qcow2", "-o", "compression_type=foo", "new", "1M"],
        &["-f", "qcow2", "-o", "compression_type=zstd,compat=0.10", "new", "1M"],
        &["-f", "qcow2", "-o", "data_file_raw=on", "new", "1M"],
        &["-f", "qcow2", "-o", "data_file=d,compat=0.10", "new", "1M"],
        &["-f", "qcow2", "-o", "data_file=d,data_file_raw=on", "-b", "base", "-F", "qcow2", "new", "1M"],
        &["-f", "qcow2", "-o", "preallocation=full", "-b", "base", "-F", "qcow2", "new", "1M"],
        &["-f", "qcow2", "-o", "encryption=on", "new", "1M"],
        &["-f", "qcow2", "-o", "encrypt.format=foo", "new", "1M"],
        &["-f", "qcow2", "-o", "encrypt.format=luks", "new", "1M"],
        &["-f", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=no", "new", "1M"],
        &["-f", "qcow2", "--object", SECRET, "-o", "encrypt.key-secret=s", "new", "1M"],
        &[
            "-f",
            "qcow2",
            "--object",
            SECRET,
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=foo",
            "new",
            "1M",
        ],
        &["-f", "nope", "new", "1M"],
        &["-f", "qcow2", "nowhere/new", "1M"],
    ];
    for args in battery {
        let args = [&["create"], *args].concat();
        let precious = b"what was there before";
        fs::write(dir.join("new"), precious).unwrap();
        let us = ours(dir, &args);
        assert_eq!(us.status, Some(1), "{args:?}: {us:?}");
        assert_eq!(fs::read(dir.join("new")).unwrap(), precious, "{args:?}");
        assert!(!dir.join("d").exists(), "{args:?}");
        assert_eq!(us, theirs(dir, &args), "{args:?}");
        let _ = fs::remove_file(dir.join("d"));
    }
    for args in [&["-f", "qcow2"][..], &["-f", "raw"], &["-f", "nope"], &["-f", "qcow2", "new"], &["-f", "raw", "new"]]
    {
        assert_same(dir, &[&["create", "-o", "help"], args].concat());
    }
}

#[test]
fn what_cannot_be_done_is_refused_in_the_words_of_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make(dir, &["create", "-q", "-f", "qcow2", "one.qcow2", "1M"]);
    make(dir, &["create", "-q", "-f", "raw", "one.raw", "1M"]);
    std::fs::create_dir(dir.join("dir")).unwrap();
    let refused: [&[&str]; 14] = [
        &[],
        &["foo"],
        &["info"],
        &["info", "one.qcow2", "one.raw"],
        &["info", "--output=xml", "one.qcow2"],
        &["info", "--object", "secret,id=x", "one.qcow2"],
        &["check"],
        &["check", "-r", "foo", "one.qcow2"],
        &["map", "--output=xml", "one.qcow2"],
        &["measure", "--output=xml", "one.qcow2"],
        &["create", "-f", "qcow2", "dir", "1M"],
        &["create", "-f", "qcow2", "-b", "missing", "-F", "qcow2", "new.qcow2"],
        &["resize", "-f", "qcow2", "one.qcow2", "1E"],
        &["convert", "-f", "raw", "-O", "qcow2", "--bitmaps", "one.raw", "new.qcow2"],
    ];
    for words in refused {
        assert_same(dir, words);
    }
}

#[test]
fn encrypted_images_that_are_made_here_open_there() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let secret = "secret,id=s,data=correct horse";
    for (at, options) in [
        "",
        ",encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
        ",encrypt.cipher-alg=aes-192,encrypt.hash-alg=sha512,cluster_size=4k",
        ",encrypt.ivgen-alg=plain,encrypt.hash-alg=sha1,extended_l2=on",
        ",preallocation=metadata",
        ",preallocation=full,extended_l2=on",
        ",compat=0.10",
        ",data_file=data",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("disk{at}");
        let options = format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10{options}");
        let args = ["create", "-f", "qcow2", "--object", secret, "-o", &options, &name, "2M"];
        let us = ours(dir, &args);
        assert_eq!(us.status, Some(0), "{options}: {us:?}");
        let opened = format!("driver=qcow2,file.filename={name},encrypt.key-secret=s");
        // A new disk reads as zeros, however it was made.
        let commands = ["-c", "read -P 0 0 2M", "-c", "write -P 5 300k 700k", "-c", "read -P 5 300k 700k"];
        let args = [&["--object", secret, "--image-opts"], &commands[..], &[&opened]].concat();
        let io = run(Command::new("qemu-io"), dir, &args);
        assert!(io.status == Some(0) && !io.said.contains("failed"), "{options}: {io:?}");
        let check = theirs(dir, &["check", "--object", secret, "--image-opts", &opened]);
        assert_eq!(check.status, Some(0), "{options}: {check:?}");
        assert_same(dir, &["info", &name]);
        let wrong = ["--object", "secret,id=s,data=wrong horse", "--image-opts", "-c", "read 0 512", &opened];
        assert_ne!(run(Command::new("qemu-io"), dir, &wrong).status, Some(0), "{options}");
    }
}

#[test]
fn as_cowhand_img_formats_are_guessed_only_where_that_is_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    images(dir);
    let cowhand = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowhand"));
        command.arg("img");
        run(command, dir, args)
    };
    for command in ["info", "check"] {
        let ended = cowhand(&[command, "over.qcow2"]);
        assert_eq!(ended.status, Some(0), "{ended:?}");
        assert_eq!(ended.said, theirs(dir, &[command, "over.qcow2"]).said);
    }
    // The chain leaves the image's own directory.
    let refused = cowhand(&["info", "--backing-chain", "sub/up.qcow2"]);
    assert_eq!(refused.status, Some(1));
    assert!(refused.complained.contains("--allow-dir"), "{refused:?}");
    assert_eq!(cowhand(&["info", "--backing-chain", "--allow-dir", ".", "sub/up.qcow2"]).status, Some(0));
}

#[test]
fn the_file_system_is_asked_for_what_qemu_img_asks() {
    // The second knows nothing of it, on nearly every host.
    for place in [std::env::temp_dir(), "/dev/shm".into()] {
        let Ok(dir) = tempfile::tempdir_in(place) else { continue };
        for format in ["qcow2", "raw"] {
            for options in [
                "nocow=on",
                "extent_size_hint=2M,nocow=on",
                "extent_size_hint=64k",
                "extent_size_hint=0",
                "extent_size_hint=5G",
                "extent_size_hint=x",
                "nocow=maybe",
                "nocow=off,extent_size_hint=1000",
            ] {
                let args = ["create", "-f", format, "-o", options, "disk", "1M"];
                let flags = || {
                    let file = fs::File::open(dir.path().join("disk")).ok()?;
                    rustix::fs::ioctl_getflags(&file).ok()
                };
                let (here, our_flags) = (ours(dir.path(), &args), flags());
                let _ = fs::remove_file(dir.path().join("disk"));
                let (there, their_flags) = (theirs(dir.path(), &args), flags());
                let _ = fs::remove_file(dir.path().join("disk"));
                assert_eq!(here, there, "{args:?} in {}", dir.path().display());
                if here.status == Some(0) {
                    assert_eq!(our_flags, their_flags, "{args:?}");
                }
            }
        }
    }
}
