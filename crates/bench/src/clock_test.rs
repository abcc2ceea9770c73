use std::time::{Duration, Instant};

use super::ProcessClock;

fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

#[test]
fn own_time_passes_while_a_thread_works_and_stays_counted_after_its_end() {
    let before = ProcessClock::own().now().unwrap();
    std::thread::spawn(|| spin(Duration::from_millis(60))).join().unwrap();
    let after = ProcessClock::own().now().unwrap();
    assert!(after - before >= Duration::from_millis(10), "{:?}", after - before);
}

#[test]
fn another_process_is_read_by_its_id() {
    let id = i32::try_from(std::process::id()).unwrap();
    let by_id = ProcessClock::of(id).unwrap().now().unwrap();
    let own = ProcessClock::own().now().unwrap();
    assert!(by_id <= own && own - by_id < Duration::from_millis(500), "{by_id:?} {own:?}");
}

#[test]
fn a_process_that_is_not_there_is_an_error() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let id = i32::try_from(child.id()).unwrap();
    child.wait().unwrap();
    assert!(ProcessClock::of(id).is_err());
}
