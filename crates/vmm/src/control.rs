//! How a running machine is told to end: by whom, why, and once.
//!
//! vCPU threads and devices report what the guest did; the first report that ends the machine wins, wakes the control
//! thread, and makes every vCPU thread leave its loop. Not here: what is done then (see [`crate::machine`]).
//!
//! Locks: one, innermost, held for the exchange of a value.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Why the machine ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The guest cannot go on: a triple fault, or KVM cannot run it. Says what happened.
    Crash(String),
    /// The time that the machine was given ran out.
    Timeout,
    /// The person at the console ended the machine.
    Quit,
    /// The machine was stopped from outside before the guest had ended; says how.
    Stopped(&'static str),
    /// The VMM itself failed.
    Failed(String),
}

/// The machine's end, shared by everything that can bring it about.
pub struct Control {
    stop: AtomicBool,
    panicked: AtomicBool,
    unfinished: AtomicBool,
    exit: Mutex<Option<Exit>>,
    event: EventFd,
}

impl Control {
    /// A machine that has no reason to end yet.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            unfinished: AtomicBool::new(false),
            exit: Mutex::new(None),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Ends the machine. The first reason counts; after a reported panic, what the guest does of itself is the panic's end.
    pub fn end(&self, exit: Exit) {
        let exit = match exit {
            Exit::PowerOff | Exit::Reset | Exit::Crash(_) if self.panicked() => Exit::Panic,
            exit => exit,
        };
        self.lock().get_or_insert(exit);
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// The guest's kernel said that it panicked; it may have more to say before it stops.
    pub fn report_panic(&self) {
        self.panicked.store(true, Ordering::Release);
        self.unfinished.store(true, Ordering::Release);
        self.wake();
    }

    /// The guest's kernel panicked and boots its crash kernel, which shall have the time that it takes.
    pub fn report_crash_kernel(&self) {
        self.panicked.store(true, Ordering::Release);
        self.unfinished.store(false, Ordering::Release);
    }

    /// Whether a kernel that panicked should by now come to its end.
    #[must_use]
    pub fn panic_unfinished(&self) -> bool {
        self.unfinished.load(Ordering::Acquire)
    }

    /// Whether the guest's kernel said that it panicked.
    #[must_use]
    pub fn panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }

    /// Whether every thread of the machine should leave its loop.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Why the machine ends, when it does.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.lock().clone()
    }

    /// Takes back the wake-ups so far.
    pub fn acknowledge(&self) {
        // Nothing to read is as good as something read.
        let _ = self.event.read();
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the control thread is awake.
        let _ = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Exit>> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Control {
    /// Readable when something was reported.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "control_test.rs"]
mod tests;
