//! One run of the program: what is open, what is printed, what is under way.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Instant;

use cowhand_block::Disk;
use cowhand_block::bytes::{ByteQueue, ByteRequest, Memory};
use cowhand_block::options::NodeOptions;

use super::aio::Pending;
use super::open::{Aio, Setup};

/// A command failed, and has said why.
#[derive(Debug)]
pub(crate) struct Failed;

/// How a command ended.
pub(crate) type Outcome<T = ()> = Result<T, Failed>;

/// Standard output. As C does it, it is written in blocks unless it is a terminal: what goes to standard error comes first then.
pub(crate) struct Output {
    pending: Vec<u8>,
    terminal: bool,
}

/// The size of a block.
const BLOCK: usize = 4096;

impl Output {
    fn new() -> Self {
        Self { pending: Vec::new(), terminal: std::io::stdout().is_terminal() }
    }

    pub(crate) fn print(&mut self, text: &str) {
        self.pending.extend_from_slice(text.as_bytes());
        if self.terminal {
            return self.flush();
        }
        let whole = self.pending.len() - self.pending.len() % BLOCK;
        // A reader that went away is no reason to leave an image half written.
        let _ = std::io::stdout().write_all(&self.pending[..whole]);
        self.pending.drain(..whole);
    }

    pub(crate) fn flush(&mut self) {
        let mut stdout = std::io::stdout();
        let _ = stdout.write_all(&self.pending).and_then(|()| stdout.flush());
        self.pending.clear();
    }
}

/// What is open.
pub(crate) struct OpenDisk {
    pub(crate) disk: Arc<Disk>,
    pub(crate) queue: ByteQueue,
    pub(crate) aio: Aio,
    pub(crate) copy_on_read: bool,
    /// The options by which it was opened, if it was by any.
    pub(crate) options: NodeOptions,
}

/// The run.
pub(crate) struct Session {
    /// As the program is called in messages.
    pub(crate) program: &'static str,
    pub(crate) setup: Setup,
    pub(crate) out: Output,
    pub(crate) open: Option<OpenDisk>,
    /// Requests that nobody waits for yet, by their tags.
    pub(crate) pending: HashMap<u64, Pending>,
    pub(crate) next_tag: u64,
    /// Memory of requests does not begin at a block's boundary.
    pub(crate) misalign: bool,
    pub(crate) quit: bool,
}

impl Session {
    pub(crate) fn new(program: &'static str, setup: Setup, misalign: bool) -> Self {
        Self {
            program,
            setup,
            out: Output::new(),
            open: None,
            pending: HashMap::new(),
            next_tag: 0,
            misalign,
            quit: false,
        }
    }

    /// Prints a line.
    pub(crate) fn say(&mut self, line: &str) {
        self.out.print(line);
        self.out.print("\n");
    }

    /// Prints a line that says why the command fails.
    pub(crate) fn fail<T>(&mut self, line: &str) -> Outcome<T> {
        self.say(line);
        Err(Failed)
    }

    /// The same on standard error, in the program's name.
    pub(crate) fn error<T>(&self, line: &str) -> Outcome<T> {
        eprintln!("{}: {line}", self.program);
        Err(Failed)
    }

    /// The disk. Commands that need one are only run with one.
    pub(crate) fn disk(&mut self) -> Outcome<&mut OpenDisk> {
        self.open.as_mut().ok_or(Failed)
    }

    /// Serves one request; what it took, and its memory.
    pub(crate) fn run(&mut self, request: ByteRequest) -> Outcome<Served> {
        let open = self.disk()?;
        let started = Instant::now();
        let (result, memory) = open.queue.run(request);
        let time = started.elapsed();
        self.report_finished();
        Ok(Served { result, memory, time })
    }

    /// Waits for everything that is under way.
    pub(crate) fn drain(&mut self) {
        while let Some(open) = self.open.as_mut().filter(|open| open.queue.in_flight() > 0) {
            if let Err(error) = open.queue.wait() {
                eprintln!("{}: {error}", self.program);
                self.open = None;
                break;
            }
        }
        self.report_finished();
    }
}

/// A request that was served.
pub(crate) struct Served {
    pub(crate) result: cowhand_block::Result<()>,
    pub(crate) memory: Option<Memory>,
    pub(crate) time: std::time::Duration,
}
