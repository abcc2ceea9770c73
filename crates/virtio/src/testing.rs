//! Test support: the driver's side of a queue, and interrupts that are counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{ActiveQueue, Interrupt, Memory};

pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Two regions with a hole between them: 1 MiB at 0, 1 MiB at 4 MiB.
pub const HOLE: u64 = 1 << 20;
pub const HIGH: u64 = 4 << 20;
pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x4000;
pub const USED: u64 = 0x5000;

#[derive(Default)]
pub struct Interrupts {
    pub queue: AtomicU32,
    pub config: AtomicU32,
    pub needs_reset: AtomicBool,
}

impl Interrupts {
    pub fn signals(&self) -> u32 {
        self.queue.load(Ordering::SeqCst)
    }

    pub fn broken(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }
}

impl Interrupt for Interrupts {
    fn signal_queue(&self, _queue: u16) {
        self.queue.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}

impl Clone for Driver {
    fn clone(&self) -> Self {
        let kick = self.kick.try_clone().unwrap();
        Self { memory: self.memory.clone(), mem: self.mem.clone(), kick, ..*self }
    }
}

/// A driver with one queue of `size` entries.
pub struct Driver {
    pub memory: Memory,
    pub mem: Arc<GuestMemoryMmap>,
    pub kick: EventFd,
    size: u16,
    next_desc: u16,
    avail: u16,
    seen: u16,
}

impl Driver {
    pub fn new(size: u16) -> Self {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(HIGH), 1 << 20)];
        let memory = Memory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let mem = memory.memory().into_inner();
        Self { memory, mem, kick: EventFd::new(EFD_NONBLOCK).unwrap(), size, next_desc: 0, avail: 0, seen: 0 }
    }

    pub fn queue(&self, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(DESC as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        ActiveQueue { index: 0, queue, kick: self.kick.try_clone().unwrap() }
    }

    /// The queue with both indices at `index`, where the rings begin then too.
    pub fn queue_at(&mut self, index: u16, event_idx: bool) -> ActiveQueue {
        let mut active = self.queue(event_idx);
        active.queue.set_next_avail(index);
        active.queue.set_next_used(index);
        self.mem.store(index, GuestAddress(USED + 2), Ordering::SeqCst).unwrap();
        self.seen = index;
        self.set_avail(index);
        active
    }

    /// Takes the rings as they stand in memory: nothing that was used before is seen.
    pub fn go_on_from_rings(&mut self) {
        self.seen = self.used_idx();
        self.avail = self.mem.load(GuestAddress(AVAIL + 2), Ordering::SeqCst).unwrap();
    }

    pub fn descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + u64::from(index) * 16);
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.mem.write_slice(&raw, at).unwrap();
    }

    /// Puts a descriptor into the queue's own table.
    pub fn raw(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.descriptor(DESC, index, addr, len, flags, next);
    }

    /// Lays out a chain of (address, length, flags); gives its head.
    pub fn chain(&mut self, descriptors: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_desc;
        for (n, &(addr, len, flags)) in descriptors.iter().enumerate() {
            let index = self.next_desc;
            self.next_desc = (self.next_desc + 1) % self.size;
            let more = if n + 1 < descriptors.len() { NEXT } else { 0 };
            self.raw(index, addr, len, flags | more, self.next_desc);
        }
        head
    }

    /// Makes a chain available; nobody is told.
    pub fn offer(&mut self, head: u16) {
        let slot = AVAIL + 4 + u64::from(self.avail % self.size) * 2;
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    pub fn set_avail(&mut self, index: u16) {
        self.avail = index;
        self.mem.store(index, GuestAddress(AVAIL + 2), Ordering::SeqCst).unwrap();
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.mem.write_obj(flags, GuestAddress(AVAIL)).unwrap();
    }

    /// Event index: interrupt after this entry of the used ring.
    pub fn set_used_event(&self, index: u16) {
        self.mem.write_obj(index, GuestAddress(AVAIL + 4 + u64::from(self.size) * 2)).unwrap();
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    pub fn used_idx(&self) -> u16 {
        self.mem.load(GuestAddress(USED + 2), Ordering::SeqCst).unwrap()
    }

    /// The next entry of the used ring: head and length; waits for it.
    pub fn used(&mut self) -> (u32, u32) {
        wait_until("a used buffer", || self.used_idx() != self.seen);
        let at = USED + 4 + u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        (self.mem.read_obj(GuestAddress(at)).unwrap(), self.mem.read_obj(GuestAddress(at + 4)).unwrap())
    }

    /// Offers a chain, kicks, and waits for its end; gives the length.
    pub fn run(&mut self, descriptors: &[(u64, u32, u16)]) -> u32 {
        let head = self.chain(descriptors);
        self.offer(head);
        self.kick();
        let (used, len) = self.used();
        assert_eq!(used, u32::from(head));
        len
    }

    pub fn byte(&self, at: u64) -> u8 {
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    pub fn put(&self, at: u64, data: &[u8]) {
        self.mem.write_slice(data, GuestAddress(at)).unwrap();
    }
}

/// Memory as it is shared with a front-end.
pub struct Area(pub Box<[AtomicU64]>);

impl AsRef<[AtomicU64]> for Area {
    fn as_ref(&self) -> &[AtomicU64] {
        &self.0
    }
}

pub type Words = Arc<Area>;

/// Memory of so many words, all zero.
pub fn words(len: usize) -> Words {
    Arc::new(Area((0..len).map(|_| AtomicU64::new(0)).collect()))
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Counts the allocations of each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Allocations of the calling thread so far.
pub fn allocations() -> u64 {
    ALLOCATIONS.get()
}

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is the system allocator's condition.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
