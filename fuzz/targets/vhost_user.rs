//! A front-end that does whatever the bytes say, against an export of a small overlay: nothing panics or hangs, and when it has gone the
//! image checks clean.

#![no_main]

mod memory;

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cowhand_block::check::{CheckOptions, Repair, check};
use cowhand_block::io::Storage;
use cowhand_block::io::host::Host;
use cowhand_block::{DiskSpec, Format, OpenPolicy, Preallocation, create_image};
use cowhand_qcow2::CreateParams;
use cowhand_vhost_user_blk::{Export, ExportHandle, ExportOptions, SocketSource, Wake, sigbus};
use cowhand_vhost_user_client::nonsense::play;
use libfuzzer_sys::fuzz_target;

/// Lives as long as the process.
struct World {
    dir: tempfile::TempDir,
    export: ExportHandle,
}

static WORLD: OnceLock<World> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let world = WORLD.get_or_init(prepare);
    play(&world.dir.path().join("socket"), data).expect("the export serves whoever comes");
    assert!(!world.export.is_finished());
    // It lets go of the image when it has seen that the front-end has gone.
    let policy = OpenPolicy { lock_patience: Duration::from_secs(5), ..OpenPolicy::host() };
    let options = CheckOptions { repair: Repair::None, lock: true };
    let report = check(&spec(world.dir.path()), &options, &policy, |_| {}).expect("the image can be checked");
    assert!(report.is_clean(), "{report:?}");
});

fn spec(dir: &Path) -> DiskSpec {
    DiskSpec::new(&dir.join("disk.qcow2"), Format::Qcow2)
}

fn prepare() -> World {
    sigbus::install().expect("a signal handler");
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    let storage: Arc<dyn Storage> = Arc::new(Host::default());
    let size = 128 << 10;
    let create = |name: &str, params: &CreateParams| {
        create_image(&storage, &dir.path().join(name), params, Preallocation::Off).expect("an image");
    };
    create("base.qcow2", &CreateParams::new(size));
    let mut params = CreateParams::new(size);
    params.backing = Some((b"base.qcow2".to_vec(), "qcow2".into()));
    create("disk.qcow2", &params);
    let options = ExportOptions {
        id: "fuzz".into(),
        socket: SocketSource::Path(dir.path().join("socket")),
        queues: 3,
        once: false,
        poll_max: Duration::ZERO,
    };
    let export = Export::new(spec(dir.path()), OpenPolicy::host(), options).expect("an export");
    let export = export.start(Wake::new().expect("an eventfd")).expect("a thread");
    World { dir, export }
}
