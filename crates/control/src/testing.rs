//! Disks that are none, a server for them, and a client that sends whatever it is told to: for the tests of this crate.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::api::{Disk, Error, ErrorKind, Layer, Resize};
use crate::disks::Disks;
use crate::server::{Limits, Listening, Server};

/// Two disks: `vda`, and `b/ö 1`, which is not open.
pub(crate) struct Fake {
    disks: Mutex<Vec<Disk>>,
    /// Everything fails, with this.
    pub fails: Mutex<Option<Error>>,
    /// A resize waits while this is so.
    pub busy: AtomicBool,
}

impl Default for Fake {
    fn default() -> Self {
        let layer = |path: &str, format: &str| Layer { path: path.into(), format: format.into(), size: 1 << 30 };
        let vda = Disk {
            id: "vda".into(),
            size: 1 << 30,
            read_only: false,
            connected: true,
            open: true,
            chain: Some(vec![layer("/images/overlay.qcow2", "qcow2"), layer("/images/base", "raw")]),
        };
        let other = Disk { id: "b/ö 1".into(), connected: false, open: false, chain: None, ..vda.clone() };
        Self { disks: Mutex::new(vec![vda, other]), fails: Mutex::default(), busy: AtomicBool::new(false) }
    }
}

impl Fake {
    fn failure(&self) -> Result<(), Error> {
        self.fails.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

impl Disks for Fake {
    fn list(&self) -> Result<Vec<Disk>, Error> {
        self.failure()?;
        Ok(self.disks.lock().unwrap().clone())
    }

    fn one(&self, id: &str) -> Result<Disk, Error> {
        self.failure()?;
        let disk = self.disks.lock().unwrap().iter().find(|disk| disk.id == id).cloned();
        disk.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no disk {id}")))
    }

    fn resize(&self, id: &str, resize: &Resize) -> Result<Disk, Error> {
        self.one(id)?;
        while self.busy.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut disks = self.disks.lock().unwrap();
        let disk = disks.iter_mut().find(|disk| disk.id == id).unwrap();
        if resize.size < disk.size && !resize.shrink {
            return Err(Error::new(ErrorKind::Refused, "smaller"));
        }
        disk.size = resize.size;
        Ok(disk.clone())
    }
}

/// A server on a socket of its own.
pub(crate) struct World {
    pub disks: Arc<Fake>,
    pub path: PathBuf,
    pub server: Option<Server>,
    pub dir: tempfile::TempDir,
}

impl World {
    pub(crate) fn new(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let disks = Arc::new(Fake::default());
        let server = Server::start(Listening::new(&path).unwrap(), disks.clone(), limits).unwrap();
        Self { disks, path, server: Some(server), dir }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends it, and gives what comes until the server closes.
    pub(crate) fn raw(&self, request: &str) -> String {
        let mut stream = self.connect();
        // A server that has heard enough may close before it has all.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    /// The status, the head and the body of the answer to one request.
    pub(crate) fn ask(&self, method: &str, target: &str, body: &str) -> (u16, String, String) {
        let length = body.len();
        let answer = self.raw(&format!(
            "{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{method} {target}: {answer:?}"));
        (head.split(' ').nth(1).unwrap().parse().unwrap(), head.into(), body.into())
    }
}
