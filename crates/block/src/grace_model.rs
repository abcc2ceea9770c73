//! The epochs and the gate under a model checker: [`shuttle`] picks which thread goes on at each lock and atomic.

use shuttle::future::block_on;
use shuttle::thread;

use super::*;
use crate::sync::model_of;
use crate::sync::{Arc, AtomicUsize};

/// Requests look a place up and use it, while it is taken out of the mapping and used again.
fn reuse() {
    let grace = Arc::new(Grace::default());
    let (mapped, reused) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let request = |queue| {
        let (grace, mapped, reused) = (grace.clone(), mapped.clone(), reused.clone());
        thread::spawn(move || {
            for _ in 0..2 {
                let Some(ticket) = grace.enter(queue, false) else { panic!("the gate is open") };
                if mapped.load(Ordering::SeqCst) {
                    thread::yield_now();
                    assert!(!reused.load(Ordering::SeqCst), "a request uses what belongs to another");
                }
                grace.leave(ticket);
            }
        })
    };
    let requests = [request(0), request(1)];
    // Some other cluster's epoch passes before.
    grace.passed(0);
    mapped.store(false, Ordering::SeqCst);
    let stamp = grace.stamp();
    for _ in 0..4 {
        if grace.passed(stamp) {
            reused.store(true, Ordering::SeqCst);
            break;
        }
        thread::yield_now();
    }
    requests.into_iter().for_each(|request| request.join().unwrap());
    assert!(grace.passed(stamp), "nobody is left, and it does not pass");
}

/// Requests come and go while the disk changes as a whole, twice.
fn gate() {
    let grace = Arc::new(Grace::default());
    let (inside, changes) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let request = |queue, flush| {
        let (grace, inside, changes) = (grace.clone(), inside.clone(), changes.clone());
        thread::spawn(move || {
            let ticket = loop {
                if let Some(ticket) = grace.enter(queue, flush) {
                    break ticket;
                }
                assert!(block_on(grace.opened()));
            };
            inside.fetch_add(1, Ordering::SeqCst);
            assert_eq!(changes.load(Ordering::SeqCst), 0, "a request goes on beside a change");
            inside.fetch_sub(1, Ordering::SeqCst);
            grace.leave(ticket);
        })
    };
    let requests = [request(0, false), request(1, false), request(1, true)];
    for _ in 0..2 {
        let mut closed = block_on(grace.close());
        closed.begin();
        changes.fetch_add(1, Ordering::SeqCst);
        assert_eq!(inside.load(Ordering::SeqCst), 0, "a change goes on beside a request");
        changes.fetch_sub(1, Ordering::SeqCst);
        closed.finish();
    }
    requests.into_iter().for_each(|request| request.join().unwrap());
}

#[test]
fn nothing_is_used_again_while_a_request_of_its_time_runs() {
    model_of(reuse).holds().fails_with(Mutation::OneEpochIsEnough);
}

#[test]
fn no_request_runs_beside_a_change_and_none_waits_for_ever() {
    model_of(gate).holds().fails_with(Mutation::EnterLooksOnce).fails_with(Mutation::LeaveTellsNobody);
}
