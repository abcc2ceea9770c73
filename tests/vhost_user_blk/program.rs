//! The program, its images, and a guest.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cowhand_vhost_user_client::front_end::FEATURES_ALL;
use cowhand_vhost_user_client::{FrontEnd, Guest, Inflight, Queue, Wire};
use rustix::process::Signal;

pub const COWHAND: &str = env!("CARGO_BIN_EXE_cowhand");
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
const RING: u16 = 128;

/// A directory with images.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn name(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Runs qemu-img in it; what it prints comes back.
    pub fn qemu_img(&self, words: &[&str]) -> String {
        let output = Command::new("qemu-img").args(words).current_dir(self.0.path()).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "qemu-img {words:?}: {said}");
        said
    }

    pub fn image(&self, name: &str, size: &str) {
        self.qemu_img(&["create", "-q", "-f", "qcow2", name, size]);
    }

    /// Nothing is wrong with the image, no leak either, and nobody has it open.
    pub fn check(&self, name: &str) {
        let said = self.qemu_img(&["check", "-f", "qcow2", name]);
        assert!(said.contains("No errors were found"), "{said}");
    }
}

/// The program, running; killed when it is dropped.
pub struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts it with these words; `place` takes its messages.
    pub fn start(place: &Place, words: &[&str]) -> Self {
        Self::start_as(place, COWHAND.as_ref(), &[&["vhost-user-blk"], words].concat())
    }

    pub fn start_as(place: &Place, program: &OsStr, words: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let log = place.path(&format!("log-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        let file = File::create(&log).unwrap();
        let mut command = Command::new(program);
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        Self { child: command.spawn().unwrap(), log }
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Waits for its end; gives its status.
    pub fn wait(&mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "it does not end: {}", self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Has it end as it should: status 0, and nothing said.
    pub fn end(mut self) {
        self.terminate();
        assert_eq!(self.wait(), Some(0), "{}", self.said());
        assert_eq!(self.said(), "");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest with one queue.
pub struct Client {
    pub front_end: FrontEnd,
    pub guest: Arc<Guest>,
    pub queue: Queue,
    pub inflight: Option<Inflight>,
}

impl Client {
    pub fn connect(socket: &Path, protocol: u64) -> Self {
        Self::over(Wire::connect_soon(socket, PATIENCE).unwrap(), protocol)
    }

    pub fn over(wire: Wire, protocol: u64) -> Self {
        let front_end = FrontEnd::agree(wire, FEATURES_ALL, protocol).unwrap();
        let slots = (32, 64 << 10);
        let guest = Arc::new(Guest::new(&[(0, Queue::bytes(RING, slots.0, slots.1))]).unwrap());
        let mut queue = Queue::new(&guest, 0, RING, 0, slots).unwrap();
        queue.ring.event_idx = true;
        let keeps = front_end.protocol & cowhand_vhost_user_client::message::protocol::INFLIGHT_SHMFD != 0;
        let inflight = keeps.then(|| front_end.get_inflight(1, RING).unwrap());
        let this = Self { front_end, guest, queue, inflight };
        this.begin();
        this
    }

    fn begin(&self) {
        if let Some(inflight) = &self.inflight {
            self.front_end.set_inflight(inflight).unwrap();
        }
        self.front_end.set_memory(&self.guest).unwrap();
        self.front_end.start(&self.guest, &self.queue.ring, self.queue.ring.used_index().unwrap()).unwrap();
    }

    pub fn reconnect(&mut self, socket: &Path) {
        self.front_end.wire.close();
        let wire = Wire::connect_soon(socket, PATIENCE).unwrap();
        self.front_end = FrontEnd::agree(wire, self.front_end.features, self.front_end.protocol).unwrap();
        self.begin();
    }
}

/// A link to the program by another name.
pub fn called(place: &Place, name: &str) -> PathBuf {
    let link = place.path(name);
    std::os::unix::fs::symlink(COWHAND, &link).unwrap();
    link
}

/// Runs it to its end, which comes soon; gives status, what it printed and what it said.
pub fn run(program: &OsStr, words: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let until = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}
