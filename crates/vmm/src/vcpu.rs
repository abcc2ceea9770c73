//! A vCPU's thread: runs the guest, and hands its port and memory accesses to the buses.
//!
//! Not here: how a vCPU is set up (the architecture's) and what the machine does when one reports the guest's end.
//!
//! Locks: none of its own; bus devices take theirs.

use std::io;
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::control::{Control, Exit};

/// The buses that a vCPU's accesses go to.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O (x86).
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
}

/// A running vCPU thread.
pub struct VcpuThread {
    thread: Option<JoinHandle<()>>,
    done: Arc<AtomicBool>,
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Having interrupted KVM_RUN is all that the signal is for.
}

/// Prepares the process for [`VcpuThread::join`]: the signal that interrupts `KVM_RUN`.
///
/// # Errors
/// When the system refuses the handler.
pub fn prepare_process() -> io::Result<()> {
    Ok(register_signal_handler(SIGRTMIN(), kicked)?)
}

impl VcpuThread {
    /// Starts vCPU `index` on a thread of its own.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(index: u32, mut vcpu: VcpuFd, buses: Buses, control: Arc<Control>) -> io::Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        let finished = done.clone();
        let thread = Builder::new().name(format!("vcpu{index}")).stack_size(256 << 10).spawn(move || {
            while !control.stopping() {
                run_once(&mut vcpu, &buses, &control);
            }
            tracing::debug!("vCPU {index} stopped{}", place(&vcpu));
            finished.store(true, Ordering::Release);
        })?;
        Ok(Self { thread: Some(thread), done })
    }

    /// Waits for the thread after [`Control::end`], interrupting the guest until it notices.
    pub fn join(mut self) {
        let Some(thread) = self.thread.take() else { return };
        // The signal may arrive just before KVM_RUN is entered and be lost on it: so it is sent again until it is heeded.
        while !self.done.load(Ordering::Acquire) && !thread.is_finished() {
            if let Err(e) = thread.kill(SIGRTMIN()) {
                tracing::debug!("a vCPU thread cannot be signalled: {e}");
            }
            std::thread::park_timeout(std::time::Duration::from_micros(500));
        }
        if thread.join().is_err() {
            tracing::error!("a vCPU thread panicked");
        }
    }
}

/// Runs the guest until it needs something, and sees to it.
fn run_once(vcpu: &mut VcpuFd, buses: &Buses, control: &Control) {
    match vcpu.run() {
        Ok(VcpuExit::MmioRead(address, data)) => buses.mmio.read(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => buses.mmio.write(address, data),
        Ok(VcpuExit::IoIn(port, data)) => {
            let parts = (data.as_mut_ptr(), data.len());
            port_access(vcpu, parts, |unit| buses.pio.read(port.into(), unit));
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            let parts = (data.as_ptr().cast_mut(), data.len());
            port_access(vcpu, parts, |unit| buses.pio.write(port.into(), unit));
        }
        Ok(VcpuExit::Shutdown) => control.end(Exit::Crash(format!("triple fault{}", place(vcpu)))),
        Ok(VcpuExit::InternalError) => {
            let what = internal_error(vcpu);
            control.end(Exit::Crash(format!("{what}{}", place(vcpu))));
        }
        Ok(VcpuExit::FailEntry(reason, _)) => {
            control
                .end(Exit::Crash(format!("KVM cannot enter the guest (hardware reason {reason:#x}){}", place(vcpu))));
        }
        Ok(VcpuExit::SystemEvent(kind, _)) => control.end(system_event(kind)),
        // With an interrupt controller in the kernel, a halted vCPU waits in the kernel; the rest is a wake-up.
        Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        Ok(exit) => {
            let what = format!("KVM left the guest for a reason that cowhand does not know: {exit:?}");
            control.end(Exit::Crash(what));
        }
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
        Err(e) => control.end(Exit::Crash(format!("KVM_RUN failed: {}{}", io::Error::from(e), place(vcpu)))),
    }
}

/// Calls `access` for each unit of a port access; string instructions come as several units at once.
fn port_access(vcpu: &mut VcpuFd, (data, len): (*mut u8, usize), mut access: impl FnMut(&mut [u8])) {
    // SAFETY: the exit was KVM_EXIT_IO (the caller matched it), so `io` is the valid member of the union.
    let size = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.io.size };
    // SAFETY: `data` and `len` are the slice that kvm-ioctls made inside this vCPU's kvm_run mapping, which lives as long as
    // `vcpu`, borrowed here; nothing else refers to it, and the guest does not run meanwhile.
    let data = unsafe { slice::from_raw_parts_mut(data, len) };
    for unit in data.chunks_mut(usize::from(size.max(1))) {
        access(unit);
    }
}

/// KVM's system events (`KVM_SYSTEM_EVENT_*`).
fn system_event(kind: u32) -> Exit {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Exit::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => Exit::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Exit::Panic,
        kind => Exit::Crash(format!("KVM reports the unknown system event {kind}")),
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR (the caller matched it), so `internal` is the valid member of the union.
    let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let name = match suberror {
        1 => "it could not emulate an instruction",
        2 => "two exceptions at once",
        3 => "an exception while delivering an event",
        4 => "an exit that it did not expect",
        _ => "an unknown cause",
    };
    format!("KVM internal error {suberror}: {name}")
}

/// Where the guest was, for messages.
fn place(vcpu: &VcpuFd) -> String {
    crate::arch::instruction_pointer(vcpu).map_or_else(String::new, |ip| format!(" at {ip:#x}"))
}
