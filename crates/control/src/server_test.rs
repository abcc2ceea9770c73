use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::*;
use crate::api::{Error, ErrorKind, Resize};
use crate::client::{Client, ClientError};
use crate::testing::World;

const QUICK: Limits = Limits { connections: 4, patience: Duration::from_millis(300) };

fn resize(size: u64) -> Resize {
    Resize { size, shrink: false }
}

#[test]
fn a_client_lists_shows_and_resizes() {
    let world = World::new(Limits::default());
    let client = Client::new(&world.path);
    assert_eq!(client.disks().unwrap().len(), 2);
    assert_eq!(client.disk("b/ö 1").unwrap().id, "b/ö 1");
    assert_eq!(client.resize("vda", &resize(3 << 30)).unwrap().size, 3 << 30);
    assert_eq!(client.disk("vda").unwrap().size, 3 << 30);
    let refused = client.resize("vda", &resize(1)).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(Error { kind: ErrorKind::Refused, .. })), "{refused}");
    let nobody = Client::new(&world.dir.path().join("none")).disks().unwrap_err().to_string();
    assert!(nobody.ends_with("is cowhand running with --api-socket?"), "{nobody}");
}

#[test]
fn a_client_says_so_when_something_else_answers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let answers = [
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "is not cowhand (status 200 OK)"),
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "is not cowhand (status 404 Not Found)"),
        ("SSH-2.0-x\r\n", ""),
        ("", ""),
    ];
    for (answer, message) in answers {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 1000]);
                stream.write_all(answer.as_bytes()).unwrap();
            });
            let said = Client::new(&path).disks().unwrap_err().to_string();
            assert!(said.contains(message) && said.lines().count() == 1, "{said}");
        });
    }
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_server() {
    let mut world = World::new(Limits::default());
    let meta = fs::symlink_metadata(&world.path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let in_use = Listening::new(&world.path).unwrap_err().to_string();
    assert!(in_use.contains("another process listens there"), "{in_use}");
    world.server = None;
    assert!(!world.path.exists());
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_a_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Listening::new(&path).unwrap());
    fs::write(&path, "precious").unwrap();
    let refused = Listening::new(&path).unwrap_err().to_string();
    assert!(refused.contains("cannot listen there"), "{refused}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    // One that another process has put there meanwhile stays.
    fs::remove_file(&path).unwrap();
    let ours = Listening::new(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let theirs = UnixListener::bind(&path).unwrap();
    drop(ours);
    assert!(UnixStream::connect(&path).is_ok());
    drop(theirs);
}

#[test]
fn requests_that_are_pipelined_are_answered_in_their_order() {
    let world = World::new(Limits::default());
    let resize = "POST /v1/disks/vda/resize HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n{\"size\":2147483648}";
    let show = "GET /v1/disks/vda HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET /v1/disks/vdx HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let answers = world.raw(&format!("{show}{resize}{show}{last}"));
    let said: Vec<_> = answers.split("HTTP/1.1 ").skip(1).collect();
    let [before, resized, after, none] = said[..] else { panic!("{answers}") };
    assert!(before.starts_with("200") && before.contains("\"size\":1073741824,\"read_only\""), "{before}");
    assert!(resized.starts_with("200") && resized.contains("\"size\":2147483648,\"read_only\""), "{resized}");
    assert!(after.starts_with("200") && after.contains("\"size\":2147483648,\"read_only\""), "{after}");
    assert!(none.starts_with("404"), "{none}");
}

#[test]
fn a_client_that_has_closed_its_side_is_still_answered() {
    let world = World::new(Limits::default());
    let mut stream = world.connect();
    stream.write_all(b"GET /v1/disks/vda HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
}

#[test]
fn what_is_too_large_is_not_read() {
    let world = World::new(Limits::default());
    let (status, _, body) = world.ask("POST", "/v1/disks/vda/resize", &" ".repeat((64 << 10) + 1));
    assert_eq!(status, 413, "{body}");
    assert!(body.contains("\"kind\":\"too-large\""), "{body}");
    let (status, ..) =
        world.ask("POST", "/v1/disks/vda/resize", &format!("{}{}", " ".repeat(65000), r#"{"size":1073741824}"#));
    assert_eq!(status, 200);
    // A length that is only announced, and one that is not.
    let head = "POST /v1/disks/vda/resize HTTP/1.1\r\nHost: x\r\n";
    let announced = world.raw(&format!("{head}Content-Length: 1000000000000\r\n\r\n"));
    assert!(announced.starts_with("HTTP/1.1 413"), "{announced}");
    let chunk = format!("4000\r\n{}\r\n", " ".repeat(0x4000));
    let chunked = world.raw(&format!("{head}Transfer-Encoding: chunked\r\n\r\n{}", chunk.repeat(5)));
    assert!(chunked.starts_with("HTTP/1.1 413"), "{chunked}");
    let long = world.raw(&format!("GET /v1/disks HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(100_000)));
    assert!(long.starts_with("HTTP/1.1 431"), "{long}");
    let many = world.raw(&format!("GET /v1/disks HTTP/1.1\r\n{}\r\n", "X: x\r\n".repeat(1000)));
    assert!(many.starts_with("HTTP/1.1 431"), "{many}");
}

#[test]
fn what_is_not_http_is_refused() {
    let world = World::new(Limits::default());
    for nonsense in ["\0\0\0\0\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "{\"size\":1}\r\n\r\n"] {
        let answer = world.raw(nonsense);
        assert!(answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 505"), "{nonsense:?}: {answer}");
    }
    assert!(Client::new(&world.path).disks().is_ok());
}

#[test]
fn a_client_that_is_slow_is_disconnected_whatever_it_is_slow_with() {
    let world = World::new(QUICK);
    let head = "POST /v1/disks/vda/resize HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n";
    let begun = Instant::now();
    for part in ["", "GET /v1/di", &head[..60], head, &format!("{head}{{\"size\":2147483648}}")[..head.len() + 18]] {
        let answer = world.raw(part);
        assert_eq!(answer, "", "{part:?}");
    }
    // Drop by drop is no better.
    let mut stream = world.connect();
    let dropping = Instant::now();
    while stream.write_all(b"X").is_ok() {
        assert!(dropping.elapsed() < Duration::from_secs(10), "a request may take for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Nor is one that asks and asks, and does not read.
    let mut stream = world.connect();
    stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let error = loop {
        if let Err(error) = stream.write_all(b"GET /v1/disks HTTP/1.1\r\nHost: x\r\n\r\n") {
            break error;
        }
    };
    assert!(matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{error}");
    assert!(begun.elapsed() >= 5 * QUICK.patience);
    assert!(Client::new(&world.path).disks().is_ok());
}

#[test]
fn silent_clients_hold_nobody_up_for_long() {
    let world = World::new(QUICK);
    let silent: Vec<_> = (0..20).map(|_| world.connect()).collect();
    assert!(Client::new(&world.path).disks().is_ok());
    drop(silent);
}

#[test]
fn what_takes_long_holds_up_nobody_else_and_is_waited_for() {
    let world = World::new(QUICK);
    world.disks.busy.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| Client::new(&world.path).resize("vda", &resize(2 << 30)));
        std::thread::sleep(3 * QUICK.patience);
        assert!(Client::new(&world.path).disks().is_ok());
        assert!(!slow.is_finished());
        world.disks.busy.store(false, Ordering::SeqCst);
        assert_eq!(slow.join().unwrap().unwrap().size, 2 << 30);
    });
}

#[test]
fn a_server_that_ends_lets_requests_end_but_waits_for_no_one() {
    let mut world = World::new(Limits::default());
    world.disks.busy.store(true, Ordering::SeqCst);
    let idle = world.connect();
    let mut under_way = world.connect();
    let request = "POST /v1/disks/vda/resize HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n{\"size\":2147483648}";
    under_way.write_all(request.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let disks = world.disks.clone();
    let helper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        disks.busy.store(false, Ordering::SeqCst);
    });
    let begun = Instant::now();
    world.server = None;
    assert!(begun.elapsed() < Duration::from_secs(2), "it has waited for one that says nothing");
    helper.join().unwrap();
    let mut answer = String::new();
    under_way.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(idle);
    // One that is stuck is given up.
    let mut world = World::new(Limits::default());
    world.disks.busy.store(true, Ordering::SeqCst);
    let mut stuck = world.connect();
    stuck.write_all(request.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    world.server = None;
    assert!(begun.elapsed() < 3 * GRACE);
    world.disks.busy.store(false, Ordering::SeqCst);
}
