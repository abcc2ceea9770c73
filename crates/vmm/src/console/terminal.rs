//! The person's terminal in raw mode while the guest has it, and back as it was on every way out.
//!
//! Ways out: the guard's drop (returns, errors, unwinding panics), and a handler for the signals that kill the process where
//! it stands (aborting panics, crashes). Only SIGKILL leaves the terminal raw.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};
use vmm_sys_util::signal::register_signal_handler;

/// The terminal's state before it was changed, for the handler of deadly signals.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
/// Signals that end the process without unwinding.
const DEADLY: [libc::c_int; 5] = [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// Standard input in raw mode, until dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Puts standard input into raw mode; gives nothing when it is no terminal, or one that is not ours at the moment (a
    /// background job that touches the terminal would be stopped).
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) || tcgetpgrp(stdin).ok() != Some(rustix::process::getpgrp()) {
            return Ok(None);
        }
        let before = tcgetattr(stdin)?;
        save_for_handler(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Without ISIG, Ctrl-C and Ctrl-Z are the guest's.
        raw.local_modes.remove(LocalModes::ISIG);
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        // Output processing stays, so that the VMM's own messages keep their line ends.
        raw.output_modes = before.output_modes;
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // There is nobody left to tell when the terminal is gone.
        let _ = tcsetattr(rustix::stdio::stdin().as_fd(), OptionalActions::Now, &self.before);
    }
}

fn save_for_handler(stdin: BorrowedFd<'_>) -> io::Result<()> {
    let mut before = std::mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the pointer is to one termios, which tcgetattr fills or leaves alone.
    if unsafe { libc::tcgetattr(stdin.as_raw_fd(), before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: tcgetattr succeeded, so it filled the struct.
    let before = unsafe { before.assume_init() };
    if BEFORE.set(before).is_ok() {
        for signal in DEADLY {
            register_signal_handler(signal, restore_and_die)?;
        }
    }
    Ok(())
}

extern "C" fn restore_and_die(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(before) = BEFORE.get() {
        // SAFETY: tcsetattr is async-signal-safe and reads one termios, which lives as long as the process.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, before) };
    }
    // SAFETY: signal(2) is async-signal-safe; the default action of these signals is to end the process.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: raise(3) is async-signal-safe.
    unsafe { libc::raise(signal) };
}
