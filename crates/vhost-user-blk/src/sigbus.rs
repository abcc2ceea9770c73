//! What becomes of memory that a front-end takes away while we have it mapped: by shortening its file. To touch it then is a SIGBUS,
//! which would end the process, other exports and all.
//!
//! Whoever maps such memory has it [`Guarded`]. The handler, if it was [installed](install), puts zeros in its place from the address on
//! that was touched, and rings a bell: the front-end's connection ends. What its requests read and write meanwhile is its own loss. A SIGBUS
//! anywhere else does what it did before, and so does one that says that memory is broken: nobody has taken that away, and nobody
//! else knows what was in it.
//!
//! In the handler only that happens which may (signal-safety(7)): atomic loads, `mmap`, `write`, `sigaction`.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::wake::Wake;

/// The most mappings at one time: several exports, each with as many regions as a front-end may have.
const SLOTS: usize = 8192;
/// `si_code`: there is nothing at that address (any more).
const BUS_ADRERR: c_int = 2;

/// A mapping, for the handler. It is written with [`WRITING`] held; the handler takes what it reads for true when the version is even and
/// the same before and after.
struct Slot {
    version: AtomicUsize,
    start: AtomicUsize,
    /// 0: the slot is free.
    end: AtomicUsize,
    bell: AtomicI32,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        bell: AtomicI32::new(-1),
    }
}; SLOTS];
static WRITING: Mutex<()> = Mutex::new(());
/// Bytes of a page.
static PAGE: AtomicUsize = AtomicUsize::new(4096);
/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

impl Slot {
    fn set(&self, start: usize, end: usize, bell: c_int) {
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.bell.store(bell, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Start, end and bell. One that is just being written is not what the handler looks for: who touches memory keeps it.
    fn get(&self) -> Option<(usize, usize, c_int)> {
        let before = self.version.load(Ordering::Acquire);
        let (start, end) = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        let bell = self.bell.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let whole = before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before;
        (whole && end != 0).then_some((start, end, bell))
    }
}

/// A mapping that the handler knows, until this is dropped: which is before it is unmapped.
pub(crate) struct Guarded {
    slot: &'static Slot,
    /// Kept open as long as the handler may ring it.
    _bell: Wake,
}

impl Guarded {
    /// Guards `len` bytes from `start`, a page. `bell` is rung when the memory has gone.
    ///
    /// # Errors
    /// There are too many mappings.
    pub(crate) fn new(start: *const c_void, len: usize, bell: &Wake) -> io::Result<Self> {
        let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = TABLE.iter().find(|slot| slot.end.load(Ordering::Relaxed) == 0) else {
            return Err(io::Error::other(format!("more than {SLOTS} mappings of front-ends' memory")));
        };
        let start = start as usize;
        slot.set(start, start.saturating_add(len), bell.as_fd().as_raw_fd());
        Ok(Self { slot, _bell: bell.clone() })
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        self.slot.set(0, 0, -1);
    }
}

impl std::fmt::Debug for Guarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guarded({:x?})", self.slot.get())
    }
}

/// Has the process outlive the loss of a front-end's memory. More than once is the same as once.
///
/// # Errors
/// The system refuses.
pub fn install() -> io::Result<()> {
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    if BEFORE.get().is_some() {
        return Ok(());
    }
    PAGE.store(rustix::param::page_size(), Ordering::Relaxed);
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only the present action is asked for, and there is room for it.
    let asked = unsafe { libc::sigaction(libc::SIGBUS, null(), before.as_mut_ptr()) };
    if asked != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has filled it in; and all zeros would be an action, too.
    let mut action = *BEFORE.get_or_init(|| unsafe { before.assume_init() });
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does only what a handler may.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a whole siginfo.
    let info = unsafe { &*info };
    // SAFETY: for SIGBUS the address is one of its fields.
    let address = unsafe { info.si_addr() } as usize;
    // SAFETY: it asks for nothing.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: the place of the thread's errno, which is always there.
    let errno = unsafe { *place };
    if info.si_code != BUS_ADRERR || !put_zeros(address) {
        // Not ours: the instruction is tried again, and what was there before takes it. Installed is the handler only after BEFORE is.
        if let Some(before) = BEFORE.get() {
            // SAFETY: an action that the system has given.
            unsafe { libc::sigaction(libc::SIGBUS, before, null_mut()) };
        }
    }
    // SAFETY: as above.
    unsafe { *place = errno };
}

/// Puts zeros in the place of what a guarded mapping has lost. Whether there is one at `address`, and it was done.
fn put_zeros(address: usize) -> bool {
    let found = TABLE.iter().filter_map(Slot::get).find(|(start, end, _)| (*start..*end).contains(&address));
    let Some((start, end, bell)) = found else { return false };
    // All that lies behind it is gone as well. Where pages are huge only the whole mapping can be replaced.
    let page = address / PAGE.load(Ordering::Relaxed) * PAGE.load(Ordering::Relaxed);
    let done = zeros_at(page, end) || zeros_at(start, end);
    if done {
        let one = 1u64;
        // SAFETY: eight bytes that live; the eventfd is kept open by whoever guards the mapping. That it is full does not matter.
        unsafe { libc::write(bell, (&raw const one).cast(), size_of::<u64>()) };
    }
    done
}

/// Maps zeros over what was there.
fn zeros_at(start: usize, end: usize) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a part of a mapping that is guarded, so there until the caller's access has ended, and not looked at but as bytes that
    // anybody may change: that they change to zeros breaks no rule.
    let mapped = unsafe { libc::mmap(start as *mut c_void, end - start, access, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}
