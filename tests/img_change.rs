//! The commands that change images, held against qemu-img: the same story is told by both, each in a directory of its own, and every
//! line that is said, every exit status, and the images at the end must be the same.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Runs a tool in a directory: its status, and what it said.
fn run(tool: &str, dir: &Path, words: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(tool);
    let output = command.arg0("qemu-img").args(words).current_dir(dir).env("LC_ALL", "C").env("TZ", "UTC").output();
    let output = output.unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

fn qemu(dir: &Path, words: &[&str]) -> String {
    let (status, said) = run("qemu-img", dir, words);
    assert_eq!(status, Some(0), "qemu-img {words:?}: {said}");
    said
}

fn io(dir: &Path, image: &str, commands: &[&str]) {
    let mut words = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| words.extend(["-c", command]));
    words.push(image);
    let output = Command::new("qemu-io").args(words).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// An image over another, one of version 2, one alone, and a raw disk.
fn prepare(dir: &Path) {
    qemu(dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
    qemu(dir, &["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2"]);
    qemu(dir, &["create", "-q", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", "top.qcow2", "80M"]);
    qemu(dir, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "32M"]);
    qemu(dir, &["create", "-q", "-f", "qcow2", "c.qcow2", "32M"]);
    qemu(dir, &["create", "-q", "-f", "raw", "r.raw", "10M"]);
    io(dir, "a.qcow2", &["write -P 5 1M 1M", "write -P 9 60M 4M"]);
    io(dir, "b.qcow2", &["write -P 6 1536k 3M", "write -z 60M 1M", "discard 62M 1M"]);
    io(dir, "top.qcow2", &["write -P 7 3M 1M", "write -P 8 70M 64k"]);
    io(dir, "old.qcow2", &["write -P 1 0 1M"]);
}

/// Dates, and the images' ages, are not the same twice.
fn timeless(said: &str) -> String {
    let is_date = |word: &str| word.len() == 10 && word.starts_with("20") && word.as_bytes().get(4) == Some(&b'-');
    let is_time = |word: &str| word.len() == 8 && word.as_bytes().get(2) == Some(&b':');
    let lines = said.lines().map(|line| {
        let words = line.split(' ').map(|word| if is_date(word) || is_time(word) { "*" } else { word });
        words.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Both tools tell the story; words are parted by spaces, and `''` is an empty one.
fn tell(story: &[&str], images: &[&str]) {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    prepare(theirs.path());
    prepare(ours.path());
    for line in story {
        let words: Vec<&str> = line.split(' ').map(|word| if word == "''" { "" } else { word }).collect();
        let (status, said) = run("qemu-img", theirs.path(), &words);
        let (our_status, we_said) = run(env!("CARGO_BIN_EXE_cowhand"), ours.path(), &words);
        assert_eq!(timeless(&we_said), timeless(&said), "{line}");
        assert_eq!(our_status, status, "{line}");
    }
    for image in images {
        let told = |dir: &Path| {
            let info = qemu(dir, &["info", "-f", "qcow2", "--output=json", image]);
            // What is taken of the host, and when, may differ.
            let varies = ["size\":", "file-length", "date-", "icount", "\"offset\""];
            let kept = |line: &&str| line.contains("virtual-size") || !varies.iter().any(|what| line.contains(what));
            // Behind what is said of the file itself.
            let (_, own) = info.split_once("\n    ],\n").unwrap_or(("", &info));
            own.lines().filter(kept).map(str::to_string).collect::<Vec<_>>()
        };
        assert_eq!(told(ours.path()), told(theirs.path()), "{image}");
        assert_eq!(run("qemu-img", ours.path(), &["check", "-q", "-f", "qcow2", image]).0, Some(0), "{image}");
        let (ours, theirs) = (ours.path().join(image), theirs.path().join(image));
        let same = ["compare", "-q", "-f", "qcow2", "-F", "qcow2", ours.to_str().unwrap(), theirs.to_str().unwrap()];
        assert_eq!(run("qemu-img", Path::new("/"), &same).0, Some(0), "{image}");
    }
}

#[test]
fn commit() {
    tell(
        &[
            "commit",
            "commit nope.qcow2",
            "commit a.qcow2",
            "commit -f raw r.raw",
            "commit -t foo b.qcow2",
            "commit -r x b.qcow2",
            "commit -b x top.qcow2",
            "commit -d top.qcow2",
            "commit top.qcow2",
            "commit -q top.qcow2",
            "commit -r 1G b.qcow2",
        ],
        &["a.qcow2", "b.qcow2", "top.qcow2"],
    );
}

#[test]
fn commit_to_a_deeper_image() {
    tell(&["commit -b a.qcow2 top.qcow2"], &["a.qcow2", "top.qcow2"]);
}

#[test]
fn rebase() {
    tell(
        &[
            "rebase b.qcow2",
            "rebase -b nope b.qcow2",
            "rebase -b nope -F qcow2 b.qcow2",
            "rebase -F foo -b a.qcow2 b.qcow2",
            "rebase -t foo -b a.qcow2 b.qcow2",
            "rebase -T foo -b a.qcow2 b.qcow2",
            "rebase -b a.qcow2 -F qcow2",
            "rebase -b a.qcow2 -F qcow2 x y",
            "rebase -u -b nope b.qcow2",
            "rebase -u -b nope -F foo b.qcow2",
            "rebase -u -b nope -F qcow2 b.qcow2",
            "rebase -b a.qcow2 -F qcow2 b.qcow2",
            "rebase -u -b a.qcow2 -F qcow2 b.qcow2",
            "rebase -f raw -b a.qcow2 -F qcow2 r.raw",
            "rebase -c -f raw -b '' r.raw",
            "rebase -b a.qcow2 -F qcow2 top.qcow2",
            "rebase -c -b old.qcow2 -F qcow2 b.qcow2",
            "rebase -b c.qcow2 -F qcow2 top.qcow2",
            "rebase -b '' top.qcow2",
            "rebase -b '' b.qcow2",
            "rebase -b r.raw -F raw c.qcow2",
        ],
        &["a.qcow2", "b.qcow2", "c.qcow2", "top.qcow2"],
    );
}

#[test]
fn resize() {
    tell(
        &[
            "resize c.qcow2",
            "resize 1G",
            "resize c.qcow2 abc",
            "resize nope 1M",
            "resize c.qcow2 64M",
            "resize -q c.qcow2 +1",
            "resize c.qcow2 +512",
            "resize c.qcow2 -512",
            "resize --shrink c.qcow2 -512",
            "resize --shrink c.qcow2 0",
            "resize c.qcow2 --shrink 48M",
            "resize c.qcow2 -1T",
            "resize --preallocation=foo c.qcow2 1G",
            "resize --preallocation=metadata --shrink c.qcow2 1M",
            "resize --preallocation=metadata c.qcow2 80M",
            "resize -f raw r.raw 1000",
            "resize -f raw --shrink r.raw 1000",
            "resize -f raw r.raw 20M",
            "resize -f raw --preallocation=metadata r.raw 30M",
            "resize b.qcow2 100M",
            "resize --shrink b.qcow2 61M",
            "resize b.qcow2 64M",
            "resize old.qcow2 40M",
        ],
        &["b.qcow2", "c.qcow2", "old.qcow2"],
    );
}

#[test]
fn snapshot() {
    tell(
        &[
            "snapshot",
            "snapshot a.qcow2 b",
            "snapshot nope",
            "snapshot a.qcow2",
            "snapshot -c s1 a.qcow2",
            "snapshot -c s1 a.qcow2",
            "snapshot -U -c x a.qcow2",
            "snapshot -a nope a.qcow2",
            "snapshot -d nope a.qcow2",
            "resize a.qcow2 65M",
            "snapshot -a s1 a.qcow2",
            "snapshot -d s1 a.qcow2",
            "snapshot -d 2 a.qcow2",
            "snapshot -a 2 a.qcow2",
            "snapshot -l -c x a.qcow2",
            "snapshot -c x -d y a.qcow2",
            "snapshot -f raw r.raw",
            "snapshot -f raw -c x r.raw",
            "snapshot -f raw -a x r.raw",
            "snapshot -f raw -d x r.raw",
        ],
        &["a.qcow2"],
    );
}

#[test]
fn bitmap() {
    tell(
        &[
            "bitmap",
            "bitmap a.qcow2 b",
            "bitmap --add a.qcow2",
            "bitmap --add a.qcow2 b c",
            "bitmap --add a.qcow2 b",
            "bitmap --add a.qcow2 b",
            "bitmap --remove a.qcow2 nope",
            "bitmap --clear a.qcow2 nope",
            "bitmap --enable a.qcow2 nope",
            "bitmap --disable a.qcow2 nope",
            "bitmap --merge nope a.qcow2 b",
            "bitmap --merge b a.qcow2 nope",
            "bitmap --add -g 100 a.qcow2 c",
            "bitmap --add -g x a.qcow2 c",
            "bitmap --add -g 4k a.qcow2 c",
            "bitmap --add --disable a.qcow2 d",
            "bitmap --remove --clear a.qcow2 d",
            "bitmap --add --merge b --merge c --disable a.qcow2 e",
            "bitmap --disable --clear --enable a.qcow2 c",
            "bitmap --merge b -b nope -F qcow2 a.qcow2 b",
            "bitmap --merge b -b c.qcow2 -F qcow2 a.qcow2 b",
            "bitmap --add c.qcow2 b",
            "bitmap --merge b -b c.qcow2 -F qcow2 a.qcow2 b",
            "bitmap --add b.qcow2 f",
            "bitmap --merge b -b a.qcow2 -F qcow2 b.qcow2 f",
            // Into the image below.
            "bitmap --merge f -b b.qcow2 -F qcow2 a.qcow2 b",
            "bitmap --add -b c.qcow2 a.qcow2 z",
            "bitmap -g 4k --clear a.qcow2 b",
            "bitmap --merge b -F qcow2 a.qcow2 b",
            // The largest bitmap that there can be, and another one.
            "create -q -f qcow2 -o cluster_size=2M huge.qcow2 2T",
            "bitmap --add -g 512 huge.qcow2 fine",
            "bitmap --add -g 2M huge.qcow2 coarse",
            "bitmap --add --disable -g 512 huge.qcow2 third",
            "bitmap --disable huge.qcow2 fine",
            "measure -O qcow2 huge.qcow2",
        ],
        &["a.qcow2", "c.qcow2", "huge.qcow2"],
    );
}

#[test]
fn amend() {
    tell(
        &[
            "amend",
            "amend c.qcow2",
            "amend -o size=1",
            "amend nope -o size=1M",
            "amend -o help -f qcow2",
            "amend -f raw -o size=1 r.raw",
            "amend -t foo -o size=1M c.qcow2",
            "amend -o compat=0.10,refcount_bits=8 c.qcow2",
            "amend -o refcount_bits=8 c.qcow2",
            "amend -o compat=0.10 c.qcow2",
            "amend -o refcount_bits=7 c.qcow2",
            "amend -o refcount_bits=x c.qcow2",
            "amend -o lazy_refcounts=on,compat=0.10 c.qcow2",
            "amend -o lazy_refcounts=maybe c.qcow2",
            "amend -o compat=0.42 c.qcow2",
            "amend -o cluster_size=4k c.qcow2",
            "amend -o compression_type=zstd c.qcow2",
            "amend -o preallocation=full c.qcow2",
            "amend -o foo=full c.qcow2",
            "amend -o backing_file=x c.qcow2",
            "amend -o backing_fmt=x c.qcow2",
            "amend -o encrypt.state=active c.qcow2",
            "amend -o data_file=x c.qcow2",
            "amend -o data_file_raw=on c.qcow2",
            "amend -o size=48M c.qcow2",
            "amend -o size=33000001 c.qcow2",
            "amend -o size=xx c.qcow2",
            "amend -o size=-1 c.qcow2",
            "amend -o compat=1.1 old.qcow2",
            "amend -o lazy_refcounts=on old.qcow2",
            "amend -o refcount_bits=64 old.qcow2",
            "amend -o compat=0.10,refcount_bits=16 b.qcow2",
            "amend -o compat=v2,refcount_bits=16 c.qcow2",
            // The size that a snapshot has, again.
            "create -q -f qcow2 d.qcow2 32M",
            "snapshot -c s d.qcow2",
            "resize d.qcow2 64M",
            "amend -o compat=0.10 d.qcow2",
            "amend -o compat=0.10,size=32M d.qcow2",
        ],
        &["b.qcow2", "c.qcow2", "old.qcow2", "d.qcow2"],
    );
}

#[test]
fn amend_key_slots() {
    let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let secrets: Vec<String> = (0..3).map(|i| format!("secret,id=s{i},data=hunter{i}")).collect();
    let objects: Vec<&str> = secrets.iter().flat_map(|secret| ["--object", secret.as_str()]).collect();
    let create = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    let mut words = vec!["create", "-q", "-f", "qcow2"];
    words.extend(&objects);
    words.extend(["-o", create, "luks.qcow2", "1M"]);
    qemu(theirs.path(), &words);
    std::fs::copy(theirs.path().join("luks.qcow2"), ours.path().join("luks.qcow2")).unwrap();
    let story = [
        ("s0", "encrypt.state=active", ""),
        ("s0", "encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=9", ""),
        ("s0", "encrypt.state=active,encrypt.new-secret=s1,encrypt.old-secret=s0", ""),
        ("s1", "encrypt.state=active,encrypt.new-secret=s1", ""),
        ("s0", "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10", ""),
        ("s1", "encrypt.state=active,encrypt.new-secret=s2,encrypt.iter-time=10,encrypt.keyslot=5", ""),
        ("s1", "encrypt.state=active,encrypt.new-secret=s2,encrypt.iter-time=10,encrypt.keyslot=5", ""),
        ("s1", "encrypt.state=inactive", ""),
        ("s1", "encrypt.state=inactive,encrypt.new-secret=s1,encrypt.keyslot=1", ""),
        ("s1", "encrypt.state=inactive,encrypt.keyslot=5,encrypt.old-secret=s1", ""),
        ("s1", "encrypt.state=inactive,encrypt.old-secret=s0", ""),
        ("s1", "encrypt.state=inactive,encrypt.old-secret=s0", ""),
        ("s0", "size=2M", ""),
        ("s1", "encrypt.state=inactive,encrypt.keyslot=3", ""),
        ("s1", "encrypt.state=inactive,encrypt.keyslot=5", ""),
        ("s1", "encrypt.state=inactive,encrypt.keyslot=1", ""),
        ("s1", "encrypt.state=inactive,encrypt.old-secret=s1", ""),
        ("s1", "encrypt.state=active,encrypt.new-secret=s2,encrypt.iter-time=10,encrypt.keyslot=1", "--force"),
        ("s2", "encrypt.state=inactive,encrypt.keyslot=1", "--force"),
        ("s2", "size=2M", ""),
    ];
    for (key, options, force) in story {
        let image = format!("driver=qcow2,encrypt.key-secret={key},file.filename=luks.qcow2");
        let mut words = vec!["amend"];
        words.extend(&objects);
        words.extend((!force.is_empty()).then_some(force));
        words.extend(["-o", options, "--image-opts", &image]);
        let (status, said) = run("qemu-img", theirs.path(), &words);
        let (our_status, we_said) = run(env!("CARGO_BIN_EXE_cowhand"), ours.path(), &words);
        // Of a long name QEMU says something else.
        let plain = |said: &str| said.replace(&image, "IMAGE");
        assert_eq!(plain(&we_said), plain(&said), "{key} {options}");
        assert_eq!(our_status, status, "{key} {options}");
    }
}
