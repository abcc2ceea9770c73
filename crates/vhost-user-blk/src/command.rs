//! What an export is told and asked from outside, while its thread serves.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use cowhand_block::LayerInfo;

use crate::wake::Wake;

/// Whether a disk may become smaller, by which it loses what is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrink {
    /// It may.
    Allowed,
    /// A size below the present one is an error.
    Refused,
}

/// How an export is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// The disk's virtual size in bytes: what front-ends are told.
    pub size: u64,
    /// Whether the disk may not be written.
    pub read_only: bool,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// The disk's images, the topmost first, while they are open.
    pub layers: Option<Vec<LayerInfo>>,
}

pub(crate) enum Command {
    Stop,
    Status(Sender<ExportStatus>),
    Resize(u64, Shrink, Sender<cowhand_block::Result<()>>),
}

/// The way to steer an export; its copies are the same way. The export need not be there any more.
#[derive(Clone)]
pub struct ExportControl {
    commands: Sender<Command>,
    wake: Wake,
}

impl ExportControl {
    /// The way, and where it leads: to whoever hears the bell.
    pub(crate) fn new() -> io::Result<(Self, Commands)> {
        let (commands, received) = channel();
        let wake = Wake::new()?;
        Ok((Self { commands, wake: wake.clone() }, Commands { received, wake }))
    }

    fn tell(&self, command: Command) {
        // A thread that has ended hears nothing, and needs nothing.
        let _ = self.commands.send(command);
        self.wake.ring();
    }

    /// Asks the export to end.
    pub(crate) fn stop(&self) {
        self.tell(Command::Stop);
    }

    /// How the export is doing; none if it has ended. Waits while the export is busy: opens its disk, say, or changes its size.
    #[must_use]
    pub fn status(&self) -> Option<ExportStatus> {
        let (answer, answered) = channel();
        self.tell(Command::Status(answer));
        answered.recv().ok()
    }

    /// Changes the disk's size, in bytes; the guest is told of it.
    ///
    /// # Errors
    /// It would become smaller, and that is refused; the engine's; or the export has ended.
    pub fn resize(&self, bytes: u64, shrink: Shrink) -> cowhand_block::Result<()> {
        let (answer, answered) = channel();
        self.tell(Command::Resize(bytes, shrink, answer));
        let ended = || Err(cowhand_block::Error::io("the export has ended", io::ErrorKind::NotConnected.into()));
        answered.recv().unwrap_or_else(|_| ended())
    }
}

/// Who can do what is asked for.
pub(crate) trait Commanded {
    fn status(&self) -> ExportStatus;
    fn resize(&mut self, bytes: u64, shrink: Shrink) -> cowhand_block::Result<()>;
}

/// What was asked and is not done yet.
pub(crate) struct Commands {
    received: Receiver<Command>,
    /// Rung when there is something new.
    pub wake: Wake,
}

impl Commands {
    /// Does all that was asked for; says whether the export is to end.
    pub(crate) fn carry_out(&self, on: &mut impl Commanded) -> bool {
        self.wake.hear();
        while let Ok(command) = self.received.try_recv() {
            // Whoever asked may have gone meanwhile.
            match command {
                Command::Stop => return true,
                Command::Status(answer) => drop(answer.send(on.status())),
                Command::Resize(bytes, shrink, answer) => drop(answer.send(on.resize(bytes, shrink))),
            }
        }
        false
    }
}
