//! One disk with its socket: a thread that serves one front-end at a time.
//!
//! A front-end that disconnects can come back, and another one can come when it has gone; while one is connected, others are turned
//! away. The thread is told what to do from outside by an [`ExportHandle`].

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use cowhand_block::{DiskSpec, OpenPolicy};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::command::{Commands, ExportControl, Shrink};
use crate::connection::{Connection, Ended};
use crate::device::{Device, DeviceOptions};
use crate::served::Served;
use crate::socket::{Listener, Socket, SocketSource};
use crate::wake::Wake;

/// The queues that are offered unless it is said otherwise, as many as messages can name: a front-end takes what it wants, and one
/// that wants more than are offered (QEMU wants one for each vCPU) does without the disk.
pub const DEFAULT_QUEUES: u16 = 256;

/// How a disk is exported.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Its name in messages, and that of its threads.
    pub id: String,
    /// The socket.
    pub socket: SocketSource,
    /// The queues that are offered, from 1 to [`DEFAULT_QUEUES`].
    pub queues: u16,
    /// Whether the export ends when its first front-end has gone.
    pub once: bool,
    /// How long a queue's thread may look for work before it sleeps; zero: not at all.
    pub poll_max: Duration,
}

/// Why a disk cannot be exported, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The disk, as far as its images' headers tell.
    #[error(transparent)]
    Disk(#[from] cowhand_block::Error),
    /// The socket cannot be made.
    #[error("{}: cannot listen there: {error}", path.display())]
    Socket {
        /// Where it was to be.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Somebody listens there.
    #[error("{}: another process listens there; stop it, or choose another path", .0.display())]
    SocketInUse(PathBuf),
    /// A descriptor that is no socket to serve on.
    #[error("descriptor {number}: {error}; pass a Unix socket that listens, or that a front-end is connected to")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// What is wrong with it.
        error: io::Error,
    },
    /// The number of queues.
    #[error("{0} queues cannot be offered: from 1 to {DEFAULT_QUEUES}")]
    Queues(u16),
    /// The system has no room for what an export needs.
    #[error("cannot serve: {0}")]
    System(#[from] io::Error),
}

/// An export that runs.
pub struct ExportHandle {
    control: ExportControl,
    thread: JoinHandle<Result<(), ExportError>>,
}

impl ExportHandle {
    /// The way to steer it, for who outlives it or does not own it.
    #[must_use]
    pub fn control(&self) -> ExportControl {
        self.control.clone()
    }

    /// Asks the export to end: what is in flight completes, the disk is flushed and unlocked.
    pub fn stop(&self) {
        self.control.stop();
    }

    /// Changes the disk's size, in bytes; the guest is told of it. What is cut off is lost.
    ///
    /// # Errors
    /// The engine's; or the export has ended.
    pub fn resize(&self, bytes: u64) -> cowhand_block::Result<()> {
        self.control.resize(bytes, Shrink::Allowed)
    }

    /// Whether the export has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until the export has ended.
    ///
    /// # Errors
    /// Why it ended, if not because it was asked to.
    pub fn join(self) -> Result<(), ExportError> {
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("an export's thread has panicked").into()))
    }
}

/// A disk that is about to be served.
pub struct Export {
    options: ExportOptions,
    disk: Served,
    socket: Socket,
}

impl Export {
    /// Looks at the disk's headers, and makes the socket.
    ///
    /// # Errors
    /// What would keep the disk from being served, as far as it can be known now.
    pub fn new(spec: DiskSpec, policy: OpenPolicy, options: ExportOptions) -> Result<Self, ExportError> {
        if !(1..=DEFAULT_QUEUES).contains(&options.queues) {
            return Err(ExportError::Queues(options.queues));
        }
        let disk = Served::new(spec, policy)?;
        let socket = Socket::open(&options.socket)?;
        Ok(Self { options, disk, socket })
    }

    /// Serves on a thread of its own until told to stop. `ended` is rung when it has ended, for whatever reason.
    ///
    /// # Errors
    /// The system has no room.
    pub fn start(self, ended: Wake) -> Result<ExportHandle, ExportError> {
        let (control, commands) = ExportControl::new()?;
        let name = self.options.id.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let result = Serving { options: self.options, commands }.run(self.disk, self.socket);
            ended.ring();
            result
        })?;
        Ok(ExportHandle { control, thread })
    }
}

/// What comes after a front-end.
enum After {
    /// The end: we were told to stop.
    Stop,
    /// Whoever comes next.
    Wait,
    /// One that came while the other was going.
    Serve(UnixStream),
}

/// The export's thread.
struct Serving {
    options: ExportOptions,
    commands: Commands,
}

impl Serving {
    fn run(self, mut disk: Served, socket: Socket) -> Result<(), ExportError> {
        let listener = match socket {
            Socket::Connected(stream) => {
                let (mut disk, _) = self.serve(disk, stream, None)?;
                return Ok(disk.close()?);
            }
            Socket::Listening(listener) => listener,
        };
        let mut after = After::Wait;
        loop {
            let stream = match after {
                After::Stop => return Ok(disk.close()?),
                After::Serve(stream) => stream,
                After::Wait => match self.wait(&mut disk, &listener)? {
                    Some(stream) => stream,
                    None => return Ok(disk.close()?),
                },
            };
            tracing::info!("{}: a front-end has connected", self.options.id);
            (disk, after) = self.serve(disk, stream, Some(&listener))?;
            if self.options.once {
                return Ok(disk.close()?);
            }
        }
    }

    /// Waits for a front-end; none when told to stop.
    fn wait(&self, disk: &mut Served, listener: &Listener) -> Result<Option<UnixStream>, ExportError> {
        loop {
            poll_for(
                &mut [PollFd::new(&self.commands.wake, PollFlags::IN), PollFd::new(listener, PollFlags::IN)],
                None,
            )?;
            if self.commands.carry_out(disk) {
                return Ok(None);
            }
            if let Some(stream) = listener.accept()? {
                return Ok(Some(stream));
            }
        }
    }

    /// Serves a front-end until it goes, or until told to stop. Gives the disk back.
    fn serve(
        &self,
        disk: Served,
        stream: UnixStream,
        listener: Option<&Listener>,
    ) -> Result<(Served, After), ExportError> {
        let options =
            DeviceOptions { id: self.options.id.clone(), queues: self.options.queues, patience: self.options.poll_max };
        let device = Device::new(disk, options).map_err(|refusal| io::Error::other(refusal.0))?;
        let mut connection = match Connection::new(stream, device) {
            Ok(connection) => connection,
            Err(failed) => {
                let (error, disk) = *failed;
                tracing::warn!("{}: {error}", self.options.id);
                return Ok((disk, After::Wait));
            }
        };
        let after = self.talk(&mut connection, listener);
        // Whatever ended it: the disk is flushed and closed.
        let ended = connection.end().ok_or_else(|| io::Error::other("a connection that has ended is still in use"))?;
        let (disk, flushed) = ended;
        match (&after, flushed) {
            (_, Ok(())) => {}
            // Nobody else would tell of it.
            (Ok(After::Wait | After::Serve(_)), Err(error)) if !self.options.once => tracing::error!("{error}"),
            (_, Err(error)) => return Err(error.into()),
        }
        Ok((disk, after?))
    }

    fn talk(&self, connection: &mut Connection, listener: Option<&Listener>) -> Result<After, ExportError> {
        loop {
            // A part of a message would wake us again and again.
            let look_again = connection.look_again();
            let mut polled =
                vec![PollFd::new(&self.commands.wake, PollFlags::IN), PollFd::new(connection.lost(), PollFlags::IN)];
            polled.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
            if look_again.is_none() {
                polled.push(PollFd::new(&*connection, PollFlags::IN));
            }
            poll_for(&mut polled, look_again)?;
            if self.commands.carry_out(&mut *connection.device()) {
                return Ok(After::Stop);
            }
            if let Some(stream) = listener.map(Listener::accept).transpose()?.flatten() {
                if connection.is_hung_up() {
                    // The same front-end, most likely, that was quicker than we.
                    return Ok(After::Serve(stream));
                }
                tracing::warn!("{}: a second front-end is turned away", self.options.id);
            }
            if look_again.is_none() && !readable(connection)? {
                continue;
            }
            if let Err(ended) = connection.handle() {
                match ended {
                    Ended::Gone => tracing::info!("{}: {ended}", self.options.id),
                    Ended::Broken(_) => tracing::warn!("{}: {ended}", self.options.id),
                }
                return Ok(After::Wait);
            }
        }
    }
}

fn readable(connection: &Connection) -> io::Result<bool> {
    let mut polled = [PollFd::new(connection, PollFlags::IN), PollFd::new(connection.lost(), PollFlags::IN)];
    poll_for(&mut polled, Some(Duration::ZERO))?;
    Ok(polled.iter().any(|polled| !polled.revents().is_empty()))
}

fn poll_for(polled: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let timeout =
        timeout.map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) });
    match poll(polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
