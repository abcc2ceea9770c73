//! The locks for tasks under a model checker, and how a model is run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;

use shuttle::future::block_on;
use shuttle::thread;

use super::*;

/// Schedules of each sort that a model is run under.
const SCHEDULES: usize = 15_000;

/// A model: a few threads, and what must hold between them.
#[derive(Clone, Copy)]
pub(crate) struct Model(fn());

pub(crate) fn model_of(model: fn()) -> Model {
    Model(model)
}

impl Model {
    /// It holds, whatever the order: at random, and with few preemptions, which finds what needs a long way undisturbed.
    pub(crate) fn holds(self) -> Self {
        shuttle::check_random(self.0, SCHEDULES);
        shuttle::check_pct(self.0, SCHEDULES, 3);
        self
    }

    /// With this mistake it does not.
    pub(crate) fn fails_with(self, mutation: Mutation) -> Self {
        Mutation::switch(Some(mutation));
        let ended = catch_unwind(AssertUnwindSafe(|| self.holds()));
        Mutation::switch(None);
        assert!(ended.is_err(), "{SCHEDULES} schedules do not notice {mutation:?}");
        self
    }
}

/// Asks for the lock, and thinks better of it.
fn give_up(lock: &AsyncMutex) {
    block_on(async {
        let mut asking = pin!(lock.lock());
        poll_fn(|cx| {
            let _ = asking.as_mut().poll(cx);
            Poll::Ready(())
        })
        .await;
    });
}

fn mutex() {
    let (lock, holders) = (Arc::new(AsyncMutex::default()), Arc::new(AtomicUsize::new(0)));
    let holder = || {
        let (lock, holders) = (lock.clone(), holders.clone());
        thread::spawn(move || {
            block_on(async {
                let _held = lock.lock().await;
                assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold it");
                holders.fetch_sub(1, Ordering::SeqCst);
            });
        })
    };
    let threads = [holder(), holder(), holder()];
    give_up(&lock);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn ranges() {
    let locks = Arc::new(RangeLocks::default());
    let clusters: Arc<[AtomicUsize; 4]> = Arc::default();
    let writer = |range: Range<u64>| {
        let (locks, clusters) = (locks.clone(), clusters.clone());
        thread::spawn(move || {
            block_on(async {
                let _held = locks.lock(range.clone()).await;
                let mine = || clusters[range.start as usize..range.end as usize].iter();
                mine().for_each(|cluster| assert_eq!(cluster.fetch_add(1, Ordering::SeqCst), 0, "two write to one"));
                mine().for_each(|cluster| assert_eq!(cluster.fetch_sub(1, Ordering::SeqCst), 1));
            });
        })
    };
    let threads = [writer(0..2), writer(1..4), writer(3..4), writer(0..1)];
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_lock_has_one_holder_and_a_waiter_that_gives_up_takes_no_wakeup_along() {
    model_of(mutex).holds().fails_with(Mutation::OneWaiterWoken);
}

#[test]
fn ranges_that_overlap_have_one_writer_and_none_waits_for_ever() {
    model_of(ranges).holds().fails_with(Mutation::RangesComparedByStart);
}
