//! What the code under test may allocate at once. libFuzzer's own limit counts all of the process, its corpus too, and says nothing of
//! one input.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The most bytes that may be allocated at any moment.
const LIMIT: usize = 64 << 20;

struct Bounded;

static LIVE: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

// SAFETY: the system's allocator does all of it; here it is only counted.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size() > LIMIT {
            // Room for who reports it. libFuzzer keeps the input.
            LIVE.store(0, Ordering::Relaxed);
            eprintln!("more than {LIMIT} bytes in use, the last {} asked for at once", layout.size());
            std::process::abort();
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(place, layout) }
    }
}
