//! What cannot be served: one line that says what is wrong, the fitting status, and nothing left behind.

use std::os::fd::AsRawFd;

use crate::program::{COWHAND, Place, run};

/// Runs it and expects `status`, one line that contains `text`, and no socket.
fn expect(place: &Place, words: &[&str], status: i32, text: &str) {
    let (code, printed, said) = run(COWHAND.as_ref(), &[&["vhost-user-blk"], words].concat());
    assert_eq!(code, Some(status), "{words:?}: {said}");
    assert_eq!((said.lines().count(), printed.as_str()), (1, ""), "{words:?}: {said}");
    assert!(said.starts_with("cowhand: ") && said.contains(text), "{words:?}: {said}");
    assert!(!place.path("socket").exists(), "{words:?} leaves a socket");
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let place = Place::new();
    place.image("disk.qcow2", "1M");
    let (socket, disk) = (place.name("socket"), place.name("disk.qcow2"));
    let image = format!("path={disk},format=qcow2");
    let with_socket = format!("{image},socket={socket}");
    let (no_socket, no_number) = (format!("{image},socket="), format!("{image},socket=fd:x"));
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "no disk"),
        (vec!["--socket-path", &socket], "no disk"),
        (vec!["--image", &image], "no socket"),
        (vec!["--socket-path", &socket, "--fd", "3", "--image", &image], "--fd"),
        (vec!["--socket-path", &socket, "--image", &image, "--image", &image], "--image"),
        (vec!["--socket-path", &socket, "--image", &with_socket], "socket="),
        (vec!["--image", &with_socket, "--image", &with_socket], "one socket"),
        (vec!["--fd", "x", "--image", &image], "--fd"),
        (vec!["--fd", "-1", "--image", &image], "-1"),
        (vec!["--socket-path", &socket, "--image", "path=x"], "format"),
        (vec!["--socket-path", &socket, "--image", "format=qcow2"], "path"),
        (vec!["--socket-path", &socket, "--image", &disk], "key=value"),
        (vec!["--socket-path", &socket, "--blk-file", &disk, "--image", &image], "--image"),
        (vec!["--socket-path", &socket, "--image", &image, "--num-queues", "x"], "--num-queues"),
        (vec!["--socket-path", &socket, "--image", &image, "--num-queues", "65536"], "--num-queues"),
        (vec!["--socket-path", &socket, "--image", &image, "--poll-max", "soon"], "--poll-max"),
        (vec!["--socket-path", &socket, "--image", &image, "--nonsense"], "--nonsense"),
        (vec!["--socket-path", &socket, "--image", &image, "extra"], "extra"),
        (vec!["--image", &no_socket], "socket"),
        (vec!["--image", &no_number], "socket"),
    ];
    for (words, text) in cases {
        expect(&place, &words, 2, text);
    }
}

#[test]
fn numbers_of_queues_that_cannot_be_offered() {
    let place = Place::new();
    place.image("disk.qcow2", "1M");
    let (socket, image) = (place.name("socket"), format!("path={},format=qcow2", place.name("disk.qcow2")));
    for queues in ["0", "257", "65535"] {
        let (code, _, said) = run(
            COWHAND.as_ref(),
            &["vhost-user-blk", "--socket-path", &socket, "--image", &image, "--num-queues", queues],
        );
        assert!(matches!(code, Some(1 | 2)), "{said}");
        assert!(said.contains("queues") && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn disks_that_cannot_be_served_are_named_before_anybody_connects() {
    let place = Place::new();
    let socket = place.name("socket");
    place.image("base.qcow2", "1M");
    place.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"]);
    std::fs::remove_file(place.path("base.qcow2")).unwrap();
    std::fs::write(place.path("text"), "no image").unwrap();
    std::fs::write(place.path("odd.raw"), vec![0; 513]).unwrap();
    std::fs::create_dir(place.path("directory")).unwrap();
    for (name, format) in [
        ("missing.qcow2", "qcow2"),
        ("text", "qcow2"),
        ("directory", "raw"),
        ("overlay.qcow2", "qcow2"),
        ("missing.raw", "raw"),
    ] {
        let image = format!("path={},format={format}", place.name(name));
        let text = if name == "overlay.qcow2" { "base.qcow2" } else { name };
        expect(&place, &["--socket-path", &socket, "--image", &image], 1, text);
    }
}

#[test]
fn sockets_that_cannot_be_made_or_taken_are_named() {
    let place = Place::new();
    place.image("disk.qcow2", "1M");
    let image = format!("path={},format=qcow2", place.name("disk.qcow2"));
    let long = place.name(&"x".repeat(200));
    for path in ["/nonexistent/socket", "/proc/socket", &long, "/"] {
        expect(&place, &["--socket-path", path, "--image", &image], 1, path);
    }
    let file = std::fs::File::open(place.path("disk.qcow2")).unwrap();
    let file = rustix::io::dup(&file).unwrap();
    let tcp = rustix::io::dup(std::net::TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let number = |raw: i32| raw.to_string();
    for (descriptor, text) in [
        (number(file.as_raw_fd()), "descriptor"),
        (number(tcp.as_raw_fd()), "Unix socket"),
        ("999".to_owned(), "descriptor 999"),
        ("0".to_owned(), "descriptor 0"),
        ("2".to_owned(), "descriptor 2"),
    ] {
        expect(&place, &["--fd", &descriptor, "--image", &image], 1, text);
    }
}

#[test]
fn a_disk_that_names_a_socket_is_none_for_a_guest_of_our_own() {
    let place = Place::new();
    place.image("disk.qcow2", "1M");
    let image = format!("path={},format=qcow2,socket=x", place.name("disk.qcow2"));
    let (code, _, said) = run(COWHAND.as_ref(), &["run", "--kernel", "/nonexistent", "--disk", &image]);
    assert!(matches!(code, Some(1 | 2)), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}
