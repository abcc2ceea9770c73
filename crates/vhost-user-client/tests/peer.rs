//! The client against QEMU's back-end, which is not ours: what it does is what others understand.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only functions marked #[test] for tests; the helpers here are, too"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use cowhand_vhost_user_client::front_end::{FEATURES_ALL, PROTOCOL_ALL};
use cowhand_vhost_user_client::message::{blk, feature};
use cowhand_vhost_user_client::{Ask, FrontEnd, Guest, Queue, Wire};

/// A daemon with an image of 8 MiB; ended when it is dropped.
struct Daemon {
    child: Child,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, socket) = (dir.path().join("disk.qcow2"), dir.path().join("socket"));
        let words = ["create", "-q", "-f", "qcow2"];
        assert!(Command::new("qemu-img").args(words).arg(&image).arg("8M").status().unwrap().success());
        let child = Command::new("qemu-storage-daemon")
            .args([
                "--blockdev",
                &format!("driver=qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={}", image.display()),
            ])
            .args(["--export", &export(&socket)])
            .spawn()
            .unwrap();
        Self { child, socket, dir }
    }

    fn connect(&self) -> FrontEnd {
        let wire = Wire::connect_soon(&self.socket, Duration::from_secs(10)).unwrap();
        FrontEnd::agree(wire, FEATURES_ALL, PROTOCOL_ALL).unwrap()
    }
}

fn export(socket: &Path) -> String {
    let socket = socket.display();
    format!("type=vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path={socket}")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        assert!(self.dir.path().exists());
    }
}

fn serve(event_idx: bool, indirect: bool, pieces: u32) {
    let daemon = Daemon::start();
    let mut front_end = daemon.connect();
    if !event_idx {
        front_end.set_features(front_end.features & !feature::EVENT_IDX).unwrap();
    }
    assert_eq!(front_end.capacity().unwrap(), 8 << 20);
    let guest = Arc::new(Guest::new(&[(0, 1 << 20), (1 << 32, 4 << 20)]).unwrap());
    front_end.set_memory(&guest).unwrap();
    let mut queue = Queue::new(&guest, 0, 128, 1 << 32, (8, 64 << 10)).unwrap();
    queue.ring.event_idx = event_idx;
    queue.indirect = indirect;
    queue.pieces = pieces;
    front_end.start(&guest, &queue.ring, 0).unwrap();

    let written: Vec<u8> = (0..64 << 10).map(|n: u32| (n / 512 + 1) as u8).collect();
    assert_eq!(queue.run(&Ask::Write(1 << 20, written.clone())).unwrap().status, blk::S_OK);
    assert_eq!(queue.run(&Ask::Flush).unwrap().status, blk::S_OK);
    assert_eq!(queue.run(&Ask::WriteZeroes(1 << 20, 4096, false)).unwrap().status, blk::S_OK);
    assert_eq!(queue.run(&Ask::Discard(2 << 20, 64 << 10)).unwrap().status, blk::S_OK);
    let read = queue.run(&Ask::Read(1 << 20, 64 << 10)).unwrap();
    assert_eq!((read.status, &read.data[..4096], &read.data[4096..]), (blk::S_OK, &[0; 4096][..], &written[4096..]));
    assert_eq!(queue.run(&Ask::Other(99, 0, 0, Vec::new())).unwrap().status, blk::S_UNSUPP);
    assert_eq!(queue.run(&Ask::GetId).unwrap().status, blk::S_OK);
    assert_eq!(front_end.stop(0).unwrap(), 7);
    assert!(queue.ring.take().unwrap().is_none());
}

#[test]
fn qemus_back_end_serves_every_request_by_event_index() {
    serve(true, false, 1);
}

#[test]
fn qemus_back_end_serves_every_request_by_flags_and_indirect_tables() {
    serve(false, true, 3);
}
