use std::sync::mpsc;
use std::time::Duration;

use cowhand_qcow2::CreateParams;

use super::*;
use crate::io::host::Engine;
use crate::io::host::Host;
use crate::io::{Buffer, OpenMode};
use crate::qcow2::create;

/// An empty image on the host.
fn image(dir: &tempfile::TempDir, engine: Engine) -> Arc<Disk> {
    let path = dir.path().join("disk.qcow2");
    let storage: Arc<dyn Storage> = Arc::new(Host::new(engine));
    let file = match storage.create(&path) {
        Ok(file) => file,
        Err(_) => storage.open(&path, OpenMode { write: true, direct: false }).unwrap(),
    };
    let queue = Queue::new(storage.blocking_driver().unwrap());
    let (task_queue, task_path) = (queue.clone(), path.clone());
    let params = CreateParams::new(64 << 20);
    let task = async move { create::create(&task_queue, &file, &task_path, &params, false).await };
    block_on(&queue, task).unwrap();
    let policy = OpenPolicy { storage, ..OpenPolicy::host() };
    Disk::open(&DiskSpec::new(&path, Format::Qcow2), &policy).unwrap()
}

/// Runs `test` on a thread of its own: one that sleeps for ever fails instead of hanging the run.
fn within_seconds(test: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        done.send(()).unwrap();
    });
    if finished.recv_timeout(Duration::from_secs(30)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("the queue sleeps though its request is done");
    }
    thread.join().unwrap();
}

#[test]
fn a_blocking_wait_does_not_sleep_on_a_request_that_needs_no_io() {
    for engine in [Engine::Auto, Engine::Threads] {
        within_seconds(move || {
            let dir = tempfile::tempdir().unwrap();
            let disk = image(&dir, engine);
            let mut queue = disk.queue().unwrap();
            let buffer = Buffer::from_bytes(&[0xee; 4096]);
            queue.submit(7, Request::Read { offset: 1 << 20, data: vec![buffer.seg(0, 4096)] });
            let mut events = Vec::new();
            queue.wait(Wait::Block, &mut events).unwrap();
            assert!(matches!(events[..], [Event::Done { tag: 7, result: Ok(()), .. }]));
            assert!(buffer.iter().all(|&byte| byte == 0));
        });
    }
}
