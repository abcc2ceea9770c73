use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cowhand_block::{DiskSpec, Format, OpenPolicy};
use cowhand_vhost_user_blk::{Export, ExportOptions, SocketSource, Wake};

use super::{Connection, Waiting, load};
use crate::clock::ProcessClock;
use crate::drive::{Count, DriveArgs, Target};
use crate::load::{Ask, LoadArgs, Pattern};

const SIZE: u64 = 8 << 20;

fn args(pattern: Pattern, write: bool) -> DriveArgs {
    let load = LoadArgs {
        pattern,
        write,
        block: 4096,
        unit: 65536,
        flush_every: Some(16),
        requests: None,
        span: None,
        seed: 3,
    };
    DriveArgs { load, depth: 8, queues: 2, seconds: 30.0, warm_up: 0.0, touch: None }
}

/// Serves the image while `client` runs with the socket's name.
fn with_server(image: &Path, format: Format, client: impl FnOnce(&str)) {
    let socket = image.with_extension("socket");
    let options = ExportOptions {
        id: "disk".into(),
        socket: SocketSource::Path(socket.clone()),
        queues: 2,
        once: false,
        poll_max: Duration::from_micros(100),
    };
    let export = Export::new(DiskSpec::new(image, format), OpenPolicy::host(), options).unwrap();
    let export = export.start(Wake::new().unwrap()).unwrap();
    client(socket.to_str().unwrap());
    export.stop();
    export.join().unwrap();
}

fn one(queue: &mut impl Target, ask: Ask) {
    let mut done = Vec::new();
    queue.submit(0, ask).unwrap();
    queue.complete(&mut done).unwrap();
    assert_eq!(done, [0]);
}

#[test]
fn what_a_client_writes_is_in_the_file_and_what_it_reads_was() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    let before: Vec<u8> = (0..SIZE).map(|at| (at / 4096) as u8 ^ at as u8).collect();
    fs::write(&image, &before).unwrap();
    let mut written = Vec::new();
    with_server(&image, Format::Raw, |socket| {
        let mut connection = Connection::open(socket, &args(Pattern::Random, true), Waiting::Interrupt, true).unwrap();
        assert_eq!(connection.size, SIZE);
        let [first, second] = &mut connection.queues[..] else { panic!("two queues") };
        written = first.arena.read(0);
        one(first, Ask::Write(12 * 4096));
        one(first, Ask::Flush);
        one(second, Ask::Read(12 * 4096));
        assert_eq!(second.arena.read(0), written, "the other queue sees it");
        one(second, Ask::Read(77 * 4096));
        assert_eq!(second.arena.read(0), before[77 * 4096..78 * 4096]);
    });
    let after = fs::read(&image).unwrap();
    assert_eq!(after[12 * 4096..13 * 4096], written);
    assert_eq!((&after[..12 * 4096], &after[13 * 4096..]), (&before[..12 * 4096], &before[13 * 4096..]));
}

#[test]
fn a_request_beyond_the_disk_fails_and_the_client_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    fs::write(&image, vec![0; SIZE as usize]).unwrap();
    with_server(&image, Format::Raw, |socket| {
        let mut connection = Connection::open(socket, &args(Pattern::Random, false), Waiting::Interrupt, true).unwrap();
        let queue = &mut connection.queues[0];
        queue.submit(0, Ask::Read(SIZE)).unwrap();
        assert!(queue.complete(&mut Vec::new()).is_err());
    });
}

#[test]
fn a_scattered_load_over_two_queues_writes_every_cluster_of_a_sound_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let name = image.to_str().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new("qemu-img").args(args).output().expect("qemu-img (Debian: apt install qemu-utils)");
        assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["create", "-q", "-f", "qcow2", name, "8M"]);
    for (wait, inflight) in [(Waiting::Poll, true), (Waiting::Interrupt, false), (Waiting::Interrupt, true)] {
        with_server(&image, Format::Qcow2, |socket| {
            let args = args(Pattern::Scatter, true);
            let mut connection = Connection::open(socket, &args, wait, inflight).unwrap();
            let measured = load(&mut connection, ProcessClock::own(), &args).unwrap();
            assert_eq!(measured.count, Count { requests: 128, flushes: 8 });
        });
    }
    // Status 0 only when nothing is wrong, and nothing leaked.
    let check = run(&["check", "-f", "qcow2", "--output=json", name]);
    assert!(check.contains("\"allocated-clusters\": 128"), "{check}");
}
