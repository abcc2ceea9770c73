use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::io::host::{Engine, Host};
use crate::io::{Driver, Storage};
use crate::testing::within_seconds;

fn tokens(driver: &mut dyn Driver, count: usize) -> Vec<u64> {
    let mut done = Vec::new();
    while done.len() < count {
        driver.wait(true, &mut done).unwrap();
    }
    let mut tokens: Vec<u64> = done.into_iter().map(|completion| completion.token).collect();
    tokens.sort_unstable();
    tokens
}

#[test]
fn work_is_done_on_threads_of_the_pool_and_wakes_the_queue() {
    for engine in [Engine::Auto, Engine::Threads] {
        within_seconds(move || {
            let host = Host::new(engine);
            let mut driver = host.driver().unwrap();
            let (said, heard) = mpsc::channel();
            for token in 0..3 {
                let said = said.clone();
                driver.compute(token, Box::new(move || said.send(std::thread::current().id()).unwrap()));
            }
            assert_eq!(tokens(&mut *driver, 3), [0, 1, 2]);
            let here = std::thread::current().id();
            assert!(heard.try_iter().all(|thread| thread != here));
            assert!(locked(&host.pool.shared.jobs).threads.len() <= host.pool.processors);
        });
    }
}

#[test]
fn what_finds_no_room_is_done_by_the_caller() {
    within_seconds(|| {
        let host = Host::new(Engine::Threads);
        let mut driver = host.driver().unwrap();
        let gate = Arc::new(Mutex::new(()));
        let held = locked(&gate);
        let (said, heard) = mpsc::channel();
        // As many as run and wait, and some more.
        let room = host.pool.processors * (WAITING + 1);
        for token in 0..room as u64 + 10 {
            let (gate, said, here) = (gate.clone(), said.clone(), std::thread::current().id());
            let work = move || {
                let mine = std::thread::current().id() == here;
                if !mine {
                    drop(locked(&gate));
                }
                said.send(mine).unwrap();
            };
            driver.compute(token, Box::new(work));
        }
        assert!(heard.try_iter().filter(|mine| *mine).count() >= 10);
        drop(held);
        assert_eq!(tokens(&mut *driver, room + 10).len(), room + 10);
    });
}

#[test]
fn the_threads_end_with_the_last_queue() {
    within_seconds(|| {
        let host = Host::new(Engine::Threads);
        let shared = Arc::downgrade(&host.pool.shared);
        let mut driver = host.driver().unwrap();
        driver.compute(7, Box::new(|| std::thread::sleep(Duration::from_millis(20))));
        drop(host);
        assert_eq!(tokens(&mut *driver, 1), [7]);
        drop(driver);
        assert!(shared.upgrade().is_none(), "a thread is left");
    });
}
