//! The server: one thread that listens, with tokio's runtime for one thread in it; what is asked for is done on threads beside it, which
//! come and go with the requests.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, watch};

use crate::conversation::converse;
use crate::disks::Disks;
use crate::socket::{ListenError, SocketFile, bind};

/// How long requests that are under way may take when the server ends.
const GRACE: Duration = Duration::from_secs(2);
/// After an accept that failed, for want of descriptors for instance.
const PAUSE: Duration = Duration::from_millis(100);

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; more wait.
    pub connections: u16,
    /// How long a client may take for a request, to read the answer to it, and between requests; then it is disconnected.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 32, patience: Duration::from_secs(10) }
    }
}

/// A socket that is made, and not served yet: what is wrong with it shows before anything is started.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    file: SocketFile,
}

impl Listening {
    /// Makes the socket, for its owner alone.
    ///
    /// # Errors
    /// It cannot be made, or somebody listens there.
    pub fn new(path: &Path) -> Result<Self, ListenError> {
        let (listener, file) = bind(path)?;
        Ok(Self { listener, file })
    }
}

/// A server that runs. It ends when this is dropped: no new request is taken then, and those under way have a moment.
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on a thread of its own.
    ///
    /// # Errors
    /// The system has no room.
    pub fn start(listening: Listening, disks: Arc<dyn Disks>, limits: Limits) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .thread_name("control-work")
            .max_blocking_threads(usize::from(limits.connections))
            .build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::from_std(listening.listener)?
        };
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new().name("control-api".into()).spawn(move || {
            run(runtime, listener, &disks, limits, stopped);
            drop(listening.file);
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Refused when the thread has ended, which is all right.
        let _ = self.stop.send(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("control API: its thread has panicked");
        }
    }
}

fn run(
    runtime: Runtime,
    listener: tokio::net::UnixListener,
    disks: &Arc<dyn Disks>,
    limits: Limits,
    mut stopped: watch::Receiver<bool>,
) {
    runtime.block_on(async move {
        let slots = Arc::new(Semaphore::new(limits.connections.into()));
        loop {
            let next = async {
                let slot = slots.clone().acquire_owned().await;
                (listener.accept().await, slot)
            };
            let (accepted, slot) = tokio::select! {
                next = next => next,
                _ = stopped.changed() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let conversation = converse(stream, disks.clone(), limits.patience, stopped.clone());
                    tokio::spawn(async move {
                        conversation.await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!("control API: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        drop(listener);
        // All slots are free when nobody is connected any more.
        let _ = tokio::time::timeout(GRACE, slots.acquire_many(limits.connections.into())).await;
    });
    // What is still at work must not hold up the end.
    runtime.shutdown_background();
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
