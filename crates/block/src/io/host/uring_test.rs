use std::fs::OpenOptions;
use std::time::{Duration, Instant};

use super::*;
use crate::io::Buffer;
use crate::testing::within_seconds;

/// None on a host that refuses io_uring, where all other tests run on threads.
fn ring() -> Option<Uring> {
    Uring::new(&Arc::default()).inspect_err(|e| eprintln!("no io_uring on this host: {e}")).ok()
}

#[test]
fn a_ring_that_takes_nothing_any_more_fails_and_lets_go() {
    within_seconds(|| {
        let Some(mut queue) = ring() else { return };
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        // SAFETY: both are open. The ring's number now stands for a file that takes no submissions.
        assert!(unsafe { libc::dup2(null.as_raw_fd(), queue.ring.as_raw_fd()) } >= 0);
        let buffer = Buffer::zeroed(512);
        // More than fit the submission ring, more even than may be in flight.
        for token in 0..1000 {
            queue.submit(token, null.as_raw_fd(), Op::Read { offset: 0, data: vec![buffer.seg(0, 512)] });
        }
        let mut done = Vec::new();
        queue.wait(true, &mut done).unwrap_err();
        assert!(done.is_empty());
        assert_eq!(queue.taken(), 0);
        drop(queue);
    });
}

#[test]
fn more_than_fits_the_ring_is_carried_out() {
    let Some(mut queue) = ring() else { return };
    let zero = OpenOptions::new().read(true).open("/dev/zero").unwrap();
    let buffers: Vec<_> = (0..1000).map(|_| Buffer::from_bytes(&[7; 512])).collect();
    for (token, buffer) in buffers.iter().enumerate() {
        queue.submit(token as u64, zero.as_raw_fd(), Op::Read { offset: 0, data: vec![buffer.seg(0, 512)] });
    }
    let mut done = Vec::new();
    while done.len() < buffers.len() {
        queue.wait(true, &mut done).unwrap();
    }
    let mut tokens: Vec<_> = done.iter().map(|completion| completion.token).collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..1000));
    assert!(buffers.iter().all(|buffer| buffer[..] == [0; 512]));
    assert_eq!((queue.taken(), queue.in_flight), (0, 0));
}

#[test]
fn looking_without_sleeping_finds_what_was_signalled() {
    let Some(mut queue) = ring() else { return };
    let kick = Wake::new().unwrap();
    queue.watch(kick.0.as_raw_fd(), 5).unwrap();
    let mut done = Vec::new();
    queue.wait(false, &mut done).unwrap();
    assert!(!queue.has_news());
    kick.notify();
    let end = Instant::now() + Duration::from_secs(10);
    while !queue.has_news() {
        assert!(Instant::now() < end, "the signal does not show");
    }
    while done.is_empty() && Instant::now() < end {
        queue.wait(false, &mut done).unwrap();
    }
    assert!(matches!(done[..], [Completion { token: 5, result: Ok(_), .. }]), "{done:?}");
}

#[test]
fn cached_writes_are_done_at_once_but_not_while_the_disk_is_slow() {
    let Some(mut queue) = ring() else { return };
    let file = tempfile::tempfile().unwrap();
    let buffer = Buffer::from_bytes(&[5; 512]);
    let write = |offset| Op::Write { offset, data: vec![buffer.seg(0, 512)] };
    // Writing to a new file may itself be slow enough to count.
    while queue.done_inline.is_empty() {
        queue.submit_cached(1, file.as_raw_fd(), write(0));
    }
    assert_eq!(queue.done_inline[0].token, 1);
    queue.slow_until = Some(Instant::now() + Duration::from_secs(100));
    let inline = queue.done_inline.len();
    queue.submit_cached(2, file.as_raw_fd(), write(512));
    assert_eq!((queue.done_inline.len(), queue.in_flight > 0), (inline, true));
    let mut done = Vec::new();
    while queue.in_flight > 0 || !queue.done_inline.is_empty() {
        queue.wait(true, &mut done).unwrap();
    }
    assert!(done.iter().all(|completion| matches!(completion.result, Ok(512))));
    let mut found = [0; 1024];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 0).unwrap();
    assert_eq!(found, [5; 1024]);
}

#[test]
fn among_many_operations_writes_are_done_at_once_and_large_reads_go_to_the_ring() {
    let Some(mut queue) = ring() else { return };
    let file = tempfile::tempfile().unwrap();
    let len = BULK_READ as usize;
    let (written, read) = (Buffer::from_bytes(&vec![5; len]), Buffer::zeroed(len));
    // However slow writes are.
    queue.slow_until = Some(Instant::now() + Duration::from_secs(100));
    queue.submit_bulk(1, file.as_raw_fd(), Op::Write { offset: 512, data: vec![written.seg(0, len)] });
    assert!(matches!(queue.done_inline[..], [Completion { token: 1, result: Ok(n), .. }] if n == len));
    assert_eq!(file.metadata().unwrap().len(), 512 + len as u64);
    queue.submit_bulk(2, file.as_raw_fd(), Op::Read { offset: 512, data: vec![read.seg(0, len)] });
    assert_eq!(queue.in_flight, 1);
    let mut done = Vec::new();
    while queue.in_flight > 0 {
        queue.wait(true, &mut done).unwrap();
    }
    assert!(done.iter().all(|completion| matches!(completion.result, Ok(n) if n == len)), "{done:?}");
    assert!(read[..] == written[..]);
}
