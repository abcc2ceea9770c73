//! An image, an export of it, and a client.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cowhand_block::bytes::{ByteRequest, Memory};
use cowhand_block::check::{CheckOptions, Repair, check};
use cowhand_block::io::host::Host;
use cowhand_block::io::{Buffer, Storage};
use cowhand_block::{Disk, DiskSpec, Format, OpenPolicy, Preallocation, create_image};
use cowhand_qcow2::CreateParams;
use cowhand_vhost_user_blk::{Export, ExportHandle, ExportOptions, SocketSource, Wake};
use cowhand_vhost_user_client::front_end::{FEATURES_ALL, PROTOCOL_ALL};
use cowhand_vhost_user_client::message::{blk, feature};
use cowhand_vhost_user_client::{Ask, Done, FrontEnd, Guest, Inflight, Queue, Wire};

/// Bytes of the disk.
pub const DISK: u64 = 16 << 20;
/// What the base has at an offset: a sector's bytes are all the same, and never zero.
pub fn base_byte(offset: u64) -> u8 {
    (offset / 512 % 251 + 1) as u8
}
/// How much of the base holds data; the rest are zeros.
pub const BASE_DATA: u64 = 4 << 20;
/// Where the guest's memory begins that holds the queues; below lies 1 MiB at 0, and nothing between.
pub const HIGH: u64 = 4 << 30;
/// Bytes of guest memory for each queue.
pub const QUEUE_ROOM: u64 = 2 << 20;
/// Entries of each ring.
pub const RING: u16 = 128;
/// Buffers of each queue, and the bytes of each.
pub const SLOTS: (usize, u64) = (32, 32 << 10);

/// A base and an overlay in a directory.
pub struct World {
    dir: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let this = Self { dir };
        let storage: Arc<dyn Storage> = Arc::new(Host::default());
        let make = |path: &Path, params: &CreateParams| {
            create_image(&storage, path, params, Preallocation::Off).unwrap();
        };
        make(&this.base(), &CreateParams::new(DISK));
        let disk = Disk::open(&DiskSpec::new(&this.base(), Format::Qcow2), &OpenPolicy::host()).unwrap();
        let data: Vec<u8> = (0..BASE_DATA).map(base_byte).collect();
        let memory = Memory::new(Buffer::from_bytes(&data));
        run(&disk, ByteRequest::Write { offset: 0, memory, durable: true });
        disk.close().unwrap();
        let mut params = CreateParams::new(DISK);
        params.backing = Some((b"base.qcow2".to_vec(), "qcow2".into()));
        make(&this.image(), &params);
        this
    }

    pub fn base(&self) -> PathBuf {
        self.dir.path().join("base.qcow2")
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("disk.qcow2")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn spec(&self) -> DiskSpec {
        DiskSpec { serial: "cow-4711".into(), ..DiskSpec::new(&self.image(), Format::Qcow2) }
    }

    pub fn serve(&self) -> Served {
        self.serve_at("socket", self.spec())
    }

    pub fn serve_at(&self, socket: &str, spec: DiskSpec) -> Served {
        let socket = self.path(socket);
        let options = ExportOptions {
            id: "vda".into(),
            socket: SocketSource::Path(socket.clone()),
            queues: 4,
            once: false,
            poll_max: Duration::from_micros(50),
        };
        let export = Export::new(spec, OpenPolicy::host(), options).unwrap();
        let handle = export.start(Wake::new().unwrap()).unwrap();
        Served { handle: Some(handle), socket }
    }

    /// Nothing is wrong with the image, and nothing leaks; nobody has it open.
    pub fn check(&self) {
        for path in [self.base(), self.image()] {
            let options = CheckOptions { repair: Repair::None, lock: true };
            let policy = OpenPolicy { lock_patience: Duration::from_secs(5), ..OpenPolicy::host() };
            let spec = DiskSpec::new(&path, Format::Qcow2);
            let report = check(&spec, &options, &policy, |message| println!("{message:?}")).unwrap();
            assert!(report.is_clean(), "{}: {report:?}", path.display());
        }
    }

    /// What the disk has; nobody else has it open.
    pub fn content(&self) -> Vec<u8> {
        let policy = OpenPolicy { lock_patience: Duration::from_secs(5), ..OpenPolicy::host() };
        let disk = Disk::open(&DiskSpec { readonly: true, ..self.spec() }, &policy).unwrap();
        let memory = Memory::new(Buffer::zeroed(usize::try_from(disk.size()).unwrap()));
        let memory = run(&disk, ByteRequest::Read { offset: 0, memory }).unwrap();
        disk.close().unwrap();
        memory.into_buffer().to_vec()
    }

    /// Whether nobody holds the image's locks.
    pub fn is_unlocked(&self) -> bool {
        match Disk::open(&DiskSpec::new(&self.image(), Format::Qcow2), &OpenPolicy::host()) {
            Ok(disk) => {
                disk.close().unwrap();
                true
            }
            Err(error) => {
                assert!(error.to_string().contains("lock"), "{error}");
                false
            }
        }
    }
}

fn run(disk: &Arc<Disk>, request: ByteRequest) -> Option<Memory> {
    let (result, memory) = disk.byte_queue().unwrap().run(request);
    result.unwrap();
    memory
}

/// An export that runs until it is dropped.
pub struct Served {
    handle: Option<ExportHandle>,
    pub socket: PathBuf,
}

impl Served {
    pub fn handle(&self) -> &ExportHandle {
        self.handle.as_ref().unwrap()
    }

    /// Ends it, and says that nothing was wrong.
    pub fn stop(mut self) {
        let handle = self.handle.take().unwrap();
        handle.stop();
        handle.join().unwrap();
    }

    pub fn wire(&self) -> Wire {
        Wire::connect(&self.socket).unwrap()
    }

    pub fn connect(&self) -> FrontEnd {
        FrontEnd::connect(&self.socket).unwrap()
    }

    /// A front-end that agrees on these features.
    pub fn agree(&self, features: u64, protocol: u64) -> FrontEnd {
        FrontEnd::agree(self.wire(), features, protocol).unwrap()
    }

    /// As [`connect`](Self::connect), if it takes anybody.
    pub fn agree_or_not(&self) -> std::io::Result<FrontEnd> {
        FrontEnd::agree(Wire::connect(&self.socket)?, FEATURES_ALL, PROTOCOL_ALL)
    }

    /// It lives, and serves another front-end.
    pub fn still_serves(&self) {
        let mut client = Client::connect(self, 1);
        assert_eq!(client.queues[0].run(&Ask::Read(DISK - 512, 512)).unwrap().status, blk::S_OK);
        client.stop();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            handle.stop();
            drop(handle.join());
        }
    }
}

/// What a client asks for besides the number of its queues.
#[derive(Clone, Copy)]
pub struct Wanted {
    pub features: u64,
    pub protocol: u64,
    /// Whether it keeps records for the back-end.
    pub inflight: bool,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { features: FEATURES_ALL, protocol: PROTOCOL_ALL, inflight: true }
    }
}

/// A front-end with a guest whose queues run.
pub struct Client {
    pub front_end: FrontEnd,
    pub guest: Arc<Guest>,
    pub queues: Vec<Queue>,
    pub inflight: Option<Inflight>,
}

pub fn guest(queues: u16) -> Arc<Guest> {
    Arc::new(Guest::new(&[(0, 1 << 20), (HIGH, QUEUE_ROOM * u64::from(queues))]).unwrap())
}

pub fn queue(guest: &Arc<Guest>, index: u16, event_idx: bool) -> Queue {
    let mut queue = Queue::new(guest, index, RING, HIGH + QUEUE_ROOM * u64::from(index), SLOTS).unwrap();
    queue.ring.event_idx = event_idx;
    queue
}

impl Client {
    pub fn connect(served: &Served, queues: u16) -> Self {
        Self::with(served, queues, Wanted::default())
    }

    pub fn with(served: &Served, queues: u16, wanted: Wanted) -> Self {
        let front_end = served.agree(wanted.features, wanted.protocol);
        let event_idx = front_end.features & feature::EVENT_IDX != 0;
        let guest = guest(queues);
        let inflight = wanted.inflight.then(|| front_end.get_inflight(queues, RING).unwrap());
        let queues = (0..queues).map(|index| queue(&guest, index, event_idx)).collect();
        let this = Self { front_end, guest, queues, inflight };
        this.begin();
        this
    }

    /// Tells a back-end everything, from the rings' used indices on.
    fn begin(&self) {
        if let Some(inflight) = &self.inflight {
            self.front_end.set_inflight(inflight).unwrap();
        }
        self.front_end.set_memory(&self.guest).unwrap();
        for queue in &self.queues {
            let base = queue.ring.used_index().unwrap();
            self.front_end.start(&self.guest, &queue.ring, base).unwrap();
        }
    }

    /// Goes on with another back-end, or the same one after a restart.
    pub fn reconnect(&mut self, socket: &Path) {
        self.front_end.wire.close();
        let wire = Wire::connect_soon(socket, Duration::from_secs(10)).unwrap();
        let (features, protocol) = (self.front_end.features, self.front_end.protocol);
        self.front_end = FrontEnd::agree(wire, features, protocol).unwrap();
        self.begin();
    }

    /// Asks the first queue, and sees that it is done.
    pub fn ok(&mut self, ask: &Ask) -> Done {
        let done = self.queues[0].run(ask).unwrap();
        assert_eq!(done.status, blk::S_OK, "{ask:?}");
        done
    }

    /// The status of what is asked.
    pub fn status(&mut self, ask: &Ask) -> u8 {
        self.queues[0].run(ask).unwrap().status
    }

    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.ok(&Ask::Read(offset, len)).data
    }

    /// Stops all rings; gives the bases.
    pub fn stop(&self) -> Vec<u16> {
        self.queues.iter().map(|queue| self.front_end.stop(queue.ring.index).unwrap()).collect()
    }
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Random numbers that a seed repeats.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
