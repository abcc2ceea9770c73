//! `cowhand ctl` and the control socket of `cowhand vhost-user-blk`: a disk is shown and gets another size, with and without a front-end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cowhand_vhost_user_client::front_end::{FEATURES_ALL, PROTOCOL_ALL};
use cowhand_vhost_user_client::message::blk;
use cowhand_vhost_user_client::{Ask, FrontEnd, Guest, Queue, Wire};

const MIB: u64 = 1 << 20;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
const PATIENCE: Duration = Duration::from_secs(30);

fn cowhand(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowhand"));
    command.args(args).current_dir(dir).stdin(Stdio::null()).output().unwrap()
}

/// A process that serves `vda`, a writable qcow2 image of 64 MiB with a backing file, and `fixed`, which is read-only.
struct World {
    dir: tempfile::TempDir,
    child: Child,
}

impl World {
    fn new(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for args in [
            &["create", "-q", "-f", "qcow2", "base", "32M"][..],
            &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "vda.qcow2", "64M"],
            &["create", "-q", "-f", "raw", "fixed", "1M"],
        ] {
            assert!(cowhand(dir.path(), &[&["img"], args].concat()).status.success());
        }
        let child = Command::new(env!("CARGO_BIN_EXE_cowhand"))
            .args(["vhost-user-blk", "--image", "path=vda.qcow2,format=qcow2,socket=vda.sock"])
            .args(["--image", "path=fixed,format=raw,id=fixed,readonly=on,socket=fixed.sock"])
            .args(options)
            .current_dir(dir.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let world = Self { dir, child };
        let until = Instant::now() + PATIENCE;
        let last = if options.contains(&"--api-socket") { "api" } else { "fixed.sock" };
        while !world.path(last).exists() {
            assert!(Instant::now() < until, "it does not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What `cowhand ctl … disk …` says; all must go well.
    fn disk(&self, args: &[&str]) -> String {
        let output = self.try_disk(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn try_disk(&self, args: &[&str]) -> Output {
        cowhand(self.dir.path(), &[&["ctl", "--api-socket", "api", "disk"], args].concat())
    }

    /// Expects status 1 and one line that contains this.
    fn refused(&self, args: &[&str], contains: &str) {
        let output = self.try_disk(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{args:?}: {said}");
        assert!(said.contains(contains), "{args:?}: {said}");
        assert!(output.stdout.is_empty());
    }

    fn size(&self, image: &str) -> u64 {
        let output = cowhand(self.dir.path(), &["img", "info", "-U", "--output=json", "-f", "qcow2", image]);
        let text = String::from_utf8(output.stdout).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value["virtual-size"].as_u64().unwrap()
    }

    fn connect(&self) -> FrontEnd {
        let wire = Wire::connect_soon(&self.path("vda.sock"), PATIENCE).unwrap();
        FrontEnd::agree(wire, FEATURES_ALL, PROTOCOL_ALL).unwrap()
    }

    fn raw(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.path("api")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // A server that has heard enough closes before it has all.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    /// Ends it with SIGTERM; it must end well, say nothing and leave sound images and no sockets.
    fn end(mut self) {
        let ended = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(ended.success());
        let begun = Instant::now();
        let status = self.child.wait().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10));
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!((status.code(), said.as_str()), (Some(0), ""));
        for socket in ["api", "vda.sock", "fixed.sock"] {
            assert!(!self.path(socket).exists(), "{socket} is left");
        }
        assert!(cowhand(self.dir.path(), &["img", "check", "-f", "qcow2", "vda.qcow2"]).status.success());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn post(target: &str, body: &str) -> String {
    let len = body.len();
    format!("POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}")
}

#[test]
fn a_disk_is_resized_while_no_front_end_is_there() {
    let world = World::new(&["--api-socket", "api"]);
    assert_eq!(fs::metadata(world.path("api")).unwrap().permissions().mode() & 0o777, 0o600);
    let list = world.disk(&["list"]);
    let expected = "\
DISK         SIZE  ACCESS     FRONT-END      IMAGES
vda        64 MiB  writable   not connected  closed
fixed       1 MiB  read-only  not connected  closed
";
    assert_eq!(list, expected);
    assert_eq!(world.disk(&["resize", "vda", "96M"]), "vda: 96 MiB (100663296 bytes)\n");
    assert_eq!(world.size("vda.qcow2"), 96 * MIB);
    let shown = world.disk(&["--json", "show", "vda"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let expected = serde_json::json!({
        "id": "vda", "size": 96 * MIB, "read_only": false, "connected": false, "open": false
    });
    assert_eq!(shown, expected);
    assert_eq!(world.connect().capacity().unwrap(), 96 * MIB);

    world.refused(&["resize", "vda", "64M"], "it would lose data");
    world.refused(&["resize", "vda", "100663297"], "vda.qcow2");
    world.refused(&["resize", "fixed", "2M"], "for reading only");
    world.refused(&["resize", "vdb", "2M"], "there is no disk vdb");
    world.refused(&["show", "../vda"], "there is no disk ../vda");
    assert_eq!(world.size("vda.qcow2"), 96 * MIB);
    assert_eq!(world.disk(&["resize", "vda", "64M", "--shrink"]), "vda: 64 MiB (67108864 bytes)\n");
    assert_eq!(world.size("vda.qcow2"), 64 * MIB);
    world.end();
}

#[test]
fn a_running_guest_sees_its_disks_new_size_at_once() {
    let world = World::new(&["--api-socket", "api"]);
    let front_end = world.connect();
    let channel = front_end.open_channel().unwrap();
    let guest = Arc::new(Guest::new(&[(0, 4 * MIB)]).unwrap());
    front_end.set_memory(&guest).unwrap();
    let inflight = front_end.get_inflight(1, 128).unwrap();
    front_end.set_inflight(&inflight).unwrap();
    let mut queue = Queue::new(&guest, 0, 128, 0, (8, 64 << 10)).unwrap();
    queue.ring.event_idx = true;
    front_end.start(&guest, &queue.ring, 0).unwrap();
    assert_eq!(queue.run(&Ask::Write(64 * MIB, vec![7; 512])).unwrap().status, blk::S_IOERR);

    let shown = world.disk(&["show", "vda"]);
    let expected = "\
disk:       vda
size:       64 MiB (67108864 bytes)
access:     writable
front-end:  connected
images:     open
  vda.qcow2 (qcow2, 64 MiB)
  base (qcow2, 32 MiB)
";
    assert_eq!(shown, expected);
    world.disk(&["resize", "vda", "128M"]);
    assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
    assert_eq!(front_end.capacity().unwrap(), 128 * MIB);
    assert_eq!(queue.run(&Ask::Write(128 * MIB - 512, vec![7; 512])).unwrap().status, blk::S_OK);
    world.refused(&["resize", "vda", "64M"], "it would lose data");
    world.disk(&["resize", "vda", "--shrink", "64M"]);
    assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
    assert_eq!(queue.run(&Ask::Read(64 * MIB, 512)).unwrap().status, blk::S_IOERR);

    // While the guest stands still, and when it goes on with what the front-end has kept.
    let base = front_end.stop(0).unwrap();
    assert!(world.disk(&["show", "vda"]).contains("images:     closed"));
    world.disk(&["resize", "vda", "256M"]);
    assert_eq!(channel.receive().unwrap().request, CONFIG_CHANGE);
    front_end.start(&guest, &queue.ring, base).unwrap();
    assert_eq!(queue.run(&Ask::Write(200 * MIB, vec![7; 512])).unwrap().status, blk::S_OK);
    drop(front_end);
    assert_eq!(world.size("vda.qcow2"), 256 * MIB);
    world.end();
}

#[test]
fn requests_of_other_clients_are_answered_whatever_one_of_them_does() {
    let world = World::new(&["--api-socket", "api"]);
    let mut half = UnixStream::connect(world.path("api")).unwrap();
    half.write_all(b"POST /v1/disks/vda/resize HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"size\":").unwrap();
    let long = world.raw(&format!("GET /v1/disks HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000)));
    assert!(long.starts_with("HTTP/1.1 431"), "{long}");
    let wrong = world.raw(&post("/v1/disks/vda/resize", r#"{"size":134217728,"force":true}"#));
    assert!(wrong.starts_with("HTTP/1.1 400") && wrong.contains("unknown field `force`"), "{wrong}");
    let smaller = world.raw(&post("/v1/disks/vda/resize", r#"{"size":512}"#));
    assert!(smaller.starts_with("HTTP/1.1 409") && smaller.contains(r#""kind":"refused""#), "{smaller}");
    let resize = post("/v1/disks/vda/resize", r#"{"size":134217728}"#);
    let piped = world.raw(&format!("GET /v1/disks/vda HTTP/1.1\r\nHost: x\r\n\r\n{resize}"));
    assert_eq!(piped.matches("HTTP/1.1 200 OK").count(), 2, "{piped}");
    assert!(piped.contains("67108864") && piped.contains("134217728"), "{piped}");
    // The end does not wait for who has not asked yet.
    world.end();
    drop(half);
}

#[test]
fn bad_arguments_are_a_line_and_status_2() {
    let dir = tempfile::tempdir().unwrap();
    let image = "path=x,format=raw";
    for (args, contains) in [
        (&["ctl", "disk", "list"][..], "--api-socket <PATH>"),
        (&["ctl", "--api-socket", "api", "disk", "resize", "vda"], "<SIZE>"),
        (&["ctl", "--api-socket", "api", "disk", "resize", "vda", "1X"], "expected a size such as 512M or 2G"),
        (&["ctl", "--api-socket", "api", "disk", "grow"], "'grow'"),
        (
            &["vhost-user-blk", "--image", image, "--socket-path", "s", "--api-socket", "s"],
            "--api-socket is a socket of its own",
        ),
    ] {
        let output = cowhand(dir.path(), args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{args:?}: {said}");
        assert!(said.contains(contains), "{args:?}: {said}");
    }
    let nobody = cowhand(dir.path(), &["ctl", "--api-socket", "api", "disk", "list"]);
    let said = String::from_utf8(nobody.stderr).unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(said.contains("is cowhand running with --api-socket?"), "{said}");
}

#[test]
fn the_api_costs_nothing_where_nobody_wants_it() {
    let world = World::new(&[]);
    let process = PathBuf::from(format!("/proc/{}", world.child.id()));
    let threads = fs::read_dir(process.join("task")).unwrap();
    let names = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).unwrap());
    let mut names: Vec<_> = names.map(|name| name.trim().to_string()).collect();
    names.sort();
    assert_eq!(names, ["cowhand", "fixed", "vda"]);
    world.end();
}
