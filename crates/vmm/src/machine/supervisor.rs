//! The control thread's event loop: signals, the console's input, the time, and what the guest reports.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::{Config, Machine, MachineError};
use crate::console::SerialConfig;
use crate::console::input::EscapeFilter;
use crate::console::terminal::RawTerminal;
use crate::control::Exit;
use crate::signals::{AT_ONCE, SignalEvents};

/// How long a kernel that said it panicked may take to say the rest.
const PANIC_GRACE: Duration = Duration::from_secs(5);
/// The most that is read from the console at once, bytes: the port holds no more.
const INPUT_CHUNK: usize = 64;

/// What is the same for every machine that a reset brings: the person, the signals, the time.
pub(super) struct Frontend {
    signals: SignalEvents,
    deadline: Option<TimerFd>,
    input: Option<Input>,
    /// Polite signals so far.
    asked: u32,
    // Last, so that the terminal is put back after everything else ended.
    _terminal: Option<RawTerminal>,
}

/// The console's input.
struct Input {
    escape: EscapeFilter,
    /// Typed and not yet taken by the port: at most one byte more than [`INPUT_CHUNK`].
    pending: Vec<u8>,
    /// Whether standard input can be waited for; a regular file cannot, and is always ready.
    pollable: bool,
    /// Whether it is waited for at the moment.
    polled: bool,
}

impl Frontend {
    /// Prepares terminal and timer; the time runs from here.
    pub(super) fn new(config: &Config, signals: SignalEvents) -> Result<Self, MachineError> {
        let deadline = config.timeout.map(timer).transpose()?;
        let stdio = config.serial == SerialConfig::Stdio;
        let terminal = if stdio { RawTerminal::enter().map_err(MachineError::system("terminal"))? } else { None };
        let input = stdio.then(|| Input {
            escape: EscapeFilter::default(),
            pending: Vec::new(),
            pollable: true,
            polled: false,
        });
        Ok(Self { signals, deadline, input, asked: 0, _terminal: terminal })
    }

    /// Runs `machine` to its end.
    pub(super) fn supervise(&mut self, mut machine: Machine) -> Result<Exit, MachineError> {
        let events = |e: event_manager::Error| MachineError::system("event loop")(io::Error::other(e));
        let control = machine.control().clone();
        let vcpus = machine.start()?;
        let supervisor = Supervisor { frontend: self, machine: &machine, grace: None };
        let mut manager = EventManager::new().map_err(events)?;
        manager.add_subscriber(supervisor);
        while !control.stopping() {
            match manager.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(events(e)),
            }
        }
        drop(vcpus);
        control.exit().ok_or_else(|| MachineError::system("event loop")(io::Error::other("no reason to end")))
    }
}

fn timer(after: Duration) -> Result<TimerFd, MachineError> {
    let error = |e: vmm_sys_util::errno::Error| MachineError::system("timer")(e.into());
    let mut timer = TimerFd::new().map_err(error)?;
    // Zero would disarm it.
    timer.reset(after.max(Duration::from_nanos(1)), None).map_err(error)?;
    Ok(timer)
}

struct Supervisor<'a> {
    frontend: &'a mut Frontend,
    machine: &'a Machine,
    grace: Option<TimerFd>,
}

/// What an event is about.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Source {
    Control,
    Signals,
    Deadline,
    Grace,
    Input,
    RoomForInput,
}

impl MutEventSubscriber for Supervisor<'_> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.watch(ops, self.machine.control().as_raw_fd(), Source::Control);
        self.watch(ops, self.frontend.signals.as_raw_fd(), Source::Signals);
        if let Some(deadline) = &self.frontend.deadline {
            self.watch(ops, deadline.as_raw_fd(), Source::Deadline);
        }
        if self.frontend.input.is_some() {
            self.watch(ops, self.machine.platform().serial.room_event().as_raw_fd(), Source::RoomForInput);
            if let Some(input) = &mut self.frontend.input {
                input.polled = false;
            }
            self.pump_input(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            data if data == Source::Control as u32 => self.control_event(ops),
            data if data == Source::Signals as u32 => self.signal_event(),
            data if data == Source::Deadline as u32 => self.machine.control().end(Exit::Timeout),
            data if data == Source::Grace as u32 => self.grace_event(ops),
            data if data == Source::Input as u32 => self.read_input(ops),
            _ => {
                // The counter says nothing but that there is room.
                let _ = self.machine.platform().serial.room_event().read();
                self.pump_input(ops);
            }
        }
    }
}

impl Supervisor<'_> {
    fn watch(&self, ops: &mut EventOps<'_>, fd: RawFd, source: Source) {
        if let Err(e) = ops.add(Events::with_data_raw(fd, source as u32, EventSet::IN)) {
            self.machine.control().end(Exit::Failed(format!("event loop: {e}")));
        }
    }

    fn control_event(&mut self, ops: &mut EventOps<'_>) {
        let control = self.machine.control();
        control.acknowledge();
        if control.panic_unfinished() && self.grace.is_none() {
            match timer(PANIC_GRACE) {
                Ok(grace) => {
                    self.watch(ops, grace.as_raw_fd(), Source::Grace);
                    self.grace = Some(grace);
                }
                Err(_) => control.end(Exit::Panic),
            }
        }
    }

    fn grace_event(&mut self, ops: &mut EventOps<'_>) {
        if self.machine.control().panic_unfinished() {
            self.machine.control().end(Exit::Panic);
        } else if let Some(grace) = self.grace.take() {
            // A crash kernel runs now.
            remove(ops, grace.as_raw_fd());
        }
    }

    fn signal_event(&mut self) {
        let control = self.machine.control();
        while let Some(signal) = self.frontend.signals.next() {
            if signal == AT_ONCE {
                control.end(Exit::Stopped("by SIGQUIT"));
                continue;
            }
            self.frontend.asked += 1;
            if self.frontend.asked > 1 {
                control.end(Exit::Stopped("by a second signal before the guest had powered off"));
            } else if let Err(e) = self.machine.platform().press_power_button() {
                control.end(Exit::Failed(format!("power button: {e}")));
            } else {
                tracing::info!("asked the guest to power off; a second signal stops it");
            }
        }
    }

    /// Brings typed bytes to the port while it has room, and waits for more only then.
    fn pump_input(&mut self, ops: &mut EventOps<'_>) {
        let serial = &self.machine.platform().serial;
        let Some(input) = &mut self.frontend.input else { return };
        let count = input.pending.len().min(serial.room());
        if count > 0 {
            serial.type_in(&input.pending[..count]);
            input.pending.drain(..count);
        }
        let want = input.pending.is_empty() && serial.room() > 0;
        if !input.pollable {
            if want {
                self.read_input(ops);
            }
            return;
        }
        if want && !input.polled {
            let events = Events::with_data_raw(libc::STDIN_FILENO, Source::Input as u32, EventSet::IN);
            match ops.add(events) {
                Ok(()) => input.polled = true,
                // A regular file, or /dev/null: there is nothing to wait for.
                Err(_) => {
                    input.pollable = false;
                    self.read_input(ops);
                }
            }
        } else if !want && input.polled {
            input.polled = false;
            remove(ops, libc::STDIN_FILENO);
        }
    }

    /// Reads what was typed.
    fn read_input(&mut self, ops: &mut EventOps<'_>) {
        let Some(input) = &mut self.frontend.input else { return };
        let mut typed = [0; INPUT_CHUNK];
        match rustix::io::read(rustix::stdio::stdin(), &mut typed) {
            Ok(0) | Err(rustix::io::Errno::IO | rustix::io::Errno::BADF) => {
                // The end of the input, or of the terminal: the guest goes on without.
                if input.polled {
                    remove(ops, libc::STDIN_FILENO);
                }
                self.frontend.input = None;
            }
            Ok(count) => {
                let typed = input.escape.filter(&typed[..count]);
                input.pending.extend(typed.bytes);
                if typed.quit {
                    self.machine.control().end(Exit::Quit);
                }
                self.pump_input(ops);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(e) => {
                tracing::warn!("standard input: {e}; the guest goes on without");
                if input.polled {
                    remove(ops, libc::STDIN_FILENO);
                }
                self.frontend.input = None;
            }
        }
    }
}

/// Stops waiting for `fd`.
fn remove(ops: &mut EventOps<'_>, fd: RawFd) {
    if let Err(e) = ops.remove(Events::empty_raw(fd)) {
        tracing::debug!("event loop: {e}");
    }
}
