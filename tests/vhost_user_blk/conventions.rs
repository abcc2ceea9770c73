//! What vhost-user.rst asks of a back-end as a program (section "Back-end program conventions"), and what ends it.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use cowhand_vhost_user_client::front_end::PROTOCOL_ALL;
use cowhand_vhost_user_client::message::blk;
use cowhand_vhost_user_client::{Ask, FrontEnd, Wire};

use rustix::process::Signal;

use crate::program::{COWHAND, Client, PATIENCE, Place, Program, called, run};

fn written(client: &mut Client, byte: u8) {
    assert_eq!(client.queue.run(&Ask::Write(1 << 20, vec![byte; 4096])).unwrap().status, blk::S_OK);
}

fn reads(client: &mut Client, byte: u8) {
    assert_eq!(client.queue.run(&Ask::Read(1 << 20, 4096)).unwrap().data, [byte; 4096]);
}

#[test]
fn capabilities_are_printed() {
    let place = Place::new();
    let link = called(&place, "cowhand-vhost-user-blk");
    for (program, words) in [
        (COWHAND.as_ref(), vec!["vhost-user-blk", "--print-capabilities"]),
        (link.as_os_str(), vec!["--print-capabilities"]),
    ] {
        let (status, printed, said) = run(program, &words);
        assert_eq!((status, said.as_str()), (Some(0), ""));
        let json: serde_json::Value = serde_json::from_str(&printed).unwrap();
        assert_eq!(json["type"], "block");
        assert_eq!(json["features"], serde_json::json!(["read-only", "blk-file"]));
    }
}

#[test]
fn its_description_names_what_there_is() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/vhost-user/50-cowhand.json");
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(json["type"], "block");
    assert!(json["binary"].as_str().unwrap().ends_with("/cowhand-vhost-user-blk"), "{json}");
}

#[test]
fn termination_leaves_the_image_flushed_and_unlocked_and_no_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let place = Place::new();
        place.image("disk.qcow2", "16M");
        let (socket, image) = (place.path("socket"), place.name("disk.qcow2"));
        let words = ["--socket-path", &place.name("socket"), "--image", &format!("path={image},format=qcow2")];
        let mut program = Program::start(&place, &words);
        let mut client = Client::connect(&socket, PROTOCOL_ALL);
        assert!(std::fs::symlink_metadata(&socket).unwrap().file_type().is_socket());
        written(&mut client, 7);
        // With requests under way.
        for n in 0..32u64 {
            client.queue.submit(&Ask::Write((2 << 20) + n * 4096, vec![8; 4096])).unwrap();
        }
        client.queue.ring.notify().unwrap();
        program.signal(signal);
        assert_eq!(program.wait(), Some(0));
        assert_eq!(program.said(), "");
        assert!(!socket.exists());
        assert!(client.front_end.wire.is_closed_within(PATIENCE));
        place.check("disk.qcow2");
        // What had come back is there, and what had been taken has come back.
        while client.queue.take().unwrap().is_some() {}
        let words = ["--socket-path", &place.name("socket"), "--image", &format!("path={image},format=qcow2")];
        let program = Program::start(&place, &words);
        client.reconnect(&socket);
        while client.queue.ring.under_way() > 0 {
            assert_eq!(client.queue.wait(PATIENCE).unwrap().status, blk::S_OK);
        }
        reads(&mut client, 7);
        for n in 0..32u64 {
            assert_eq!(client.queue.run(&Ask::Read((2 << 20) + n * 4096, 512)).unwrap().data, [8; 512]);
        }
        program.end();
        place.check("disk.qcow2");
    }
}

#[test]
fn called_by_its_own_name_it_serves() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let link = called(&place, "cowhand-vhost-user-blk");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let program =
        Program::start_as(&place, link.as_os_str(), &["--socket-path", &place.name("socket"), "--image", &image]);
    let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
    written(&mut client, 3);
    program.end();
    place.check("disk.qcow2");
}

#[test]
fn a_raw_file_by_the_conventions_options_read_only_or_not() {
    let place = Place::new();
    std::fs::write(place.path("disk.raw"), vec![5; 2 << 20]).unwrap();
    let (socket, disk) = (place.name("socket"), place.name("disk.raw"));
    for read_only in [false, true] {
        let mut words = vec!["--socket-path", &socket, "--blk-file", &disk];
        words.extend(read_only.then_some("--read-only"));
        let program = Program::start(&place, &words);
        let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
        reads(&mut client, 5);
        let expected = if read_only { blk::S_IOERR } else { blk::S_OK };
        assert_eq!(client.queue.run(&Ask::Write(0, vec![6; 512])).unwrap().status, expected);
        program.end();
    }
    assert_eq!(std::fs::read(place.path("disk.raw")).unwrap()[..1024], [[6; 512], [5; 512]].concat());
}

#[test]
fn a_listening_descriptor_is_served_on_again_and_again() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let listener = UnixListener::bind(place.path("socket")).unwrap();
    // Without close-on-exec.
    let passed = rustix::io::dup(&listener).unwrap();
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let mut program = Program::start(&place, &["--fd", &passed.as_raw_fd().to_string(), "--image", &image]);
    drop(passed);
    for byte in 1..4 {
        let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
        written(&mut client, byte);
        reads(&mut client, byte);
    }
    program.terminate();
    assert_eq!(program.wait(), Some(0));
    // It is not ours to remove: whoever made it starts the next one on it.
    assert!(place.path("socket").exists());
    place.check("disk.qcow2");
}

#[test]
fn a_connected_descriptor_is_served_once() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let passed = rustix::io::dup(&theirs).unwrap();
    drop(theirs);
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let mut program = Program::start(&place, &["--fd", &passed.as_raw_fd().to_string(), "--image", &image]);
    drop(passed);
    let mut client = Client::over(Wire::over(ours).unwrap(), PROTOCOL_ALL);
    written(&mut client, 9);
    drop(client);
    assert_eq!(program.wait(), Some(0), "{}", program.said());
    place.check("disk.qcow2");
}

#[test]
fn once_means_one_front_end() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let mut program = Program::start(&place, &["--once", "--socket-path", &place.name("socket"), "--image", &image]);
    let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
    written(&mut client, 9);
    assert!(program.is_running());
    drop(client);
    assert_eq!(program.wait(), Some(0), "{}", program.said());
    assert!(!place.path("socket").exists());
    place.check("disk.qcow2");
}

#[test]
fn a_socket_that_was_left_is_replaced_and_one_in_use_is_not() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let socket = place.name("socket");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let words = ["--socket-path", &socket, "--image", &image];
    let first = Program::start(&place, &words);
    let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
    written(&mut client, 1);
    // In use.
    let (status, _, said) = run(COWHAND.as_ref(), &[&["vhost-user-blk"], &words[..]].concat());
    assert_eq!(status, Some(1), "{said}");
    assert!(said.starts_with(&format!("cowhand: {socket}: another process listens there")), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    reads(&mut client, 1);
    // Left behind.
    first.kill();
    assert!(place.path("socket").exists());
    let second = Program::start(&place, &words);
    client.reconnect(&place.path("socket"));
    reads(&mut client, 1);
    second.end();
    // Something that is no socket is nobody's to remove.
    std::fs::write(place.path("socket"), "mine").unwrap();
    let (status, _, said) = run(COWHAND.as_ref(), &[&["vhost-user-blk"], &words[..]].concat());
    assert_eq!((status, said.lines().count()), (Some(1), 1), "{said}");
    assert_eq!(std::fs::read(place.path("socket")).unwrap(), b"mine");
}

#[test]
fn a_socket_that_somebody_else_has_put_there_stays() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let program = Program::start(&place, &["--socket-path", &place.name("socket"), "--image", &image]);
    drop(Client::connect(&place.path("socket"), PROTOCOL_ALL));
    std::fs::remove_file(place.path("socket")).unwrap();
    let _theirs = UnixListener::bind(place.path("socket")).unwrap();
    program.end();
    assert!(place.path("socket").exists());
}

#[test]
fn a_second_front_end_is_turned_away_and_said_so() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let mut program = Program::start(&place, &["--socket-path", &place.name("socket"), "--image", &image]);
    let mut client = Client::connect(&place.path("socket"), PROTOCOL_ALL);
    assert!(Wire::connect(&place.path("socket")).unwrap().is_closed_within(PATIENCE));
    written(&mut client, 1);
    program.terminate();
    assert_eq!(program.wait(), Some(0));
    assert!(program.said().contains("turned away"), "{}", program.said());
}

#[test]
fn several_disks_each_on_its_socket() {
    let place = Place::new();
    place.image("base.qcow2", "16M");
    let mut words = vec!["--num-queues".to_owned(), "2".to_owned()];
    for n in 0..3 {
        let name = format!("disk{n}.qcow2");
        place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &name]);
        let (path, socket) = (place.name(&name), place.name(&format!("socket{n}")));
        let queues = if n == 2 { ",queues=3" } else { "" };
        words.extend(["--image".to_owned(), format!("path={path},format=qcow2,socket={socket}{queues}")]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let program = Program::start(&place, &words);
    let mut clients: Vec<_> =
        (0..3).map(|n| Client::connect(&place.path(&format!("socket{n}")), PROTOCOL_ALL)).collect();
    for (client, byte) in clients.iter_mut().zip(1..) {
        written(client, byte);
    }
    for (client, byte) in clients.iter_mut().zip(1..) {
        reads(client, byte);
        let queues = client.front_end.get_u64(cowhand_vhost_user_client::message::request::GET_QUEUE_NUM).unwrap();
        assert_eq!(queues, if byte == 3 { 3 } else { 2 });
    }
    program.end();
    for n in 0..3 {
        place.check(&format!("disk{n}.qcow2"));
    }
    place.check("base.qcow2");
}

#[test]
fn a_front_end_that_misbehaves_ends_its_connection_and_not_the_program() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let mut program = Program::start(&place, &["--socket-path", &place.name("socket"), "--image", &image]);
    let socket = place.path("socket");
    for cut in [false, true] {
        let mut client = Client::connect(&socket, PROTOCOL_ALL);
        written(&mut client, 4);
        if cut {
            // All of its memory goes, under requests.
            for n in 0..32u64 {
                client.queue.submit(&Ask::Write((2 << 20) + n * 66000 / 512 * 512, vec![8; 8192])).unwrap();
            }
            client.queue.ring.notify().unwrap();
            rustix::fs::ftruncate(client.guest.regions[0].fd(), 0).unwrap();
            let _ = client.queue.ring.kick.ring();
        } else {
            client.front_end.wire.send(4711, 1, &[1, 2, 3], &[]).unwrap();
        }
        assert!(client.front_end.wire.is_closed_within(PATIENCE));
    }
    assert!(program.is_running(), "{}", program.said());
    let mut client = Client::connect(&socket, PROTOCOL_ALL);
    reads(&mut client, 4);
    program.terminate();
    assert_eq!(program.wait(), Some(0), "{}", program.said());
    let said = program.said();
    assert_eq!(said.lines().filter(|line| line.contains("the front-end is disconnected")).count(), 2, "{said}");
    place.check("disk.qcow2");
}

#[test]
fn what_waits_in_the_socket_is_no_reason_to_end_late() {
    let place = Place::new();
    place.image("disk.qcow2", "16M");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let mut program = Program::start(&place, &["--socket-path", &place.name("socket"), "--image", &image]);
    let front_end =
        FrontEnd::agree(Wire::connect_soon(&place.path("socket"), PATIENCE).unwrap(), !0, PROTOCOL_ALL).unwrap();
    front_end.wire.send_bytes(&[1, 0], &[]).unwrap();
    let began = Instant::now();
    program.terminate();
    assert_eq!(program.wait(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(5));
    drop(front_end);
}
