use std::task::{Context, Wake};

use super::*;
use crate::sync::{Arc, AtomicUsize};

#[test]
fn stamp_without_requests_passes_at_once() {
    let grace = Grace::default();
    assert!(grace.passed(grace.stamp()));
}

#[test]
fn stamp_waits_for_a_request_that_began_before() {
    let grace = Grace::default();
    let ticket = grace.enter(3, false).unwrap();
    let stamp = grace.stamp();
    assert!(!grace.passed(stamp));
    grace.leave(ticket);
    assert!(grace.passed(stamp));
}

#[test]
fn stamp_does_not_wait_for_ever_while_new_requests_come() {
    let grace = Grace::default();
    let mut ticket = grace.enter(0, false).unwrap();
    let stamp = grace.stamp();
    let mut rounds = 0;
    while !grace.passed(stamp) {
        let next = grace.enter(0, false).unwrap();
        grace.leave(ticket);
        ticket = next;
        rounds += 1;
        assert!(rounds < 5);
    }
    grace.leave(ticket);
}

#[test]
fn stamp_does_not_wait_for_a_flush() {
    let grace = Grace::default();
    let ticket = grace.enter(0, true).unwrap();
    assert!(grace.passed(grace.stamp()));
    grace.leave(ticket);
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Polls once; whether it is over.
fn poll<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>, woken: &Arc<Woken>) -> Option<T> {
    match future.as_mut().poll(&mut Context::from_waker(&woken.clone().into())) {
        Poll::Ready(ended) => Some(ended),
        Poll::Pending => None,
    }
}

#[test]
fn closing_waits_for_requests_and_flushes_and_turns_new_ones_away() {
    let (grace, woken) = (Grace::default(), Arc::new(Woken::default()));
    let request = grace.enter(1, false).unwrap();
    let flush = grace.enter(2, true).unwrap();
    let mut closing = Box::pin(grace.close());
    assert!(poll(&mut closing, &woken).is_none());
    assert!(grace.enter(1, false).is_none() && grace.enter(1, true).is_none());
    grace.leave(request);
    assert!(poll(&mut closing, &woken).is_none());
    let before = woken.0.load(Ordering::SeqCst);
    grace.leave(flush);
    assert!(woken.0.load(Ordering::SeqCst) > before);
    let closed = poll(&mut closing, &woken).unwrap();
    let mut opened = Box::pin(grace.opened());
    assert!(poll(&mut opened, &woken).is_none());
    // Epochs pass behind a closed gate.
    assert!(grace.passed(grace.stamp()) && grace.enter(0, false).is_none());
    drop(closed);
    assert_eq!(poll(&mut opened, &woken), Some(true));
    assert!(grace.enter(0, false).is_some());
}

#[test]
fn change_that_is_cut_short_leaves_the_gate_closed_for_ever() {
    let (grace, woken) = (Grace::default(), Arc::new(Woken::default()));
    let mut opened = Box::pin(grace.opened());
    let mut closed = poll(&mut Box::pin(grace.close()), &woken).unwrap();
    closed.begin();
    assert!(poll(&mut opened, &woken).is_none());
    drop(closed);
    assert!(grace.is_broken() && grace.enter(0, false).is_none());
    assert_eq!(poll(&mut opened, &woken), Some(false));
}

#[test]
fn change_that_is_finished_opens_the_gate() {
    let (grace, woken) = (Grace::default(), Arc::new(Woken::default()));
    let mut closed = poll(&mut Box::pin(grace.close()), &woken).unwrap();
    closed.begin();
    closed.finish();
    assert!(!grace.is_broken() && grace.enter(0, false).is_some());
}
