use std::path::Path;

use super::*;
use crate::io::sim::World;
use crate::io::{Buffer, Storage};
use crate::testing::Stuck;

/// Lives as long as a task.
struct Owned(Rc<Cell<bool>>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

#[test]
fn shut_down_ends_the_operations_before_the_tasks_that_own_their_memory() {
    let world = World::orderly();
    let file = world.create(Path::new("/file")).unwrap();
    let (alive, lived) = (Rc::new(Cell::new(true)), Rc::new(Cell::new(None)));
    let queue = Queue::new(Box::new(Stuck::new({
        let (alive, lived) = (alive.clone(), lived.clone());
        move || lived.set(Some(alive.get()))
    })));
    queue.spawn({
        let (queue, owned) = (queue.clone(), Owned(alive));
        async move {
            let buffer = Buffer::zeroed(512);
            let _ = queue.read(&file, 0, vec![buffer.seg(0, 512)]).await;
            drop((buffer, owned));
        }
    });
    queue.turn(false, &mut Vec::new()).unwrap();
    queue.shut_down();
    assert_eq!(lived.get(), Some(true));
    assert_eq!(queue.live_tasks(), 0);
    assert!(queue.turn(false, &mut Vec::new()).is_err());
}

/// A read or write of two segments of 2048 bytes on a file of blocks of 512, and where it is resumed after each result, until it is
/// done.
fn resumed(write: bool, offset: u64, buffer: &Buffer, results: &[usize]) -> (Vec<(u64, u64)>, io::Result<()>) {
    let mut data = vec![buffer.seg(0, 2048), buffer.seg(2048, 2048)];
    let mut rest = Some(Rest::new(write, offset, &data));
    let mut places = Vec::new();
    for &moved in results {
        data = match short::resume(&mut rest, 512, Ok(moved), data) {
            Resumed::Done(result, whole) => {
                assert_eq!(whole.iter().map(IoSeg::len).collect::<Vec<_>>(), [2048, 2048]);
                return (places, result);
            }
            Resumed::Again(Op::Read { offset, data }) if !write => {
                places.push((offset, segs_len(&data)));
                data
            }
            Resumed::Again(Op::Write { offset, data }) if write => {
                places.push((offset, segs_len(&data)));
                data
            }
            Resumed::Again(op) => panic!("resumed as {op:?}"),
        };
    }
    panic!("not done after {places:?}");
}

#[test]
fn direct_io_that_came_back_short_goes_on_at_a_whole_block() {
    let buffer = Buffer::from_bytes(&[7; 4096]);
    for write in [false, true] {
        let (places, result) = resumed(write, 8192, &buffer, &[1000, 512 + 2048 + 100, 924 + 100]);
        result.unwrap();
        assert_eq!(places, [(8192 + 512, 3584), (8192 + 3072, 1024)]);
    }
    assert_eq!(buffer[..], [7; 4096]);
}

#[test]
fn a_direct_read_past_the_end_of_the_file_ends_in_zeros() {
    // Which ends inside the second block, then inside the first.
    for (results, place, end) in [([1000, 488], (512, 3584), 1000), ([488, 488], (0, 4096), 488)] {
        let buffer = Buffer::from_bytes(&[7; 4096]);
        let (places, result) = resumed(false, 0, &buffer, &results);
        result.unwrap();
        assert_eq!(places, [place]);
        assert!(buffer[..end].iter().all(|&b| b == 7) && buffer[end..].iter().all(|&b| b == 0));
    }
}

#[test]
fn a_block_that_came_back_short_once_is_read_again() {
    let buffer = Buffer::from_bytes(&[7; 4096]);
    let (places, result) = resumed(false, 0, &buffer, &[100, 200, 4096]);
    result.unwrap();
    assert_eq!(places, [(0, 4096); 2]);
    assert_eq!(buffer[..], [7; 4096]);
}

#[test]
fn a_direct_write_that_stays_inside_a_block_fails() {
    let buffer = Buffer::zeroed(4096);
    let (places, result) = resumed(true, 0, &buffer, &[512 + 8, 8]);
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::WriteZero);
    assert_eq!(places, [(512, 3584)]);
}

#[test]
fn a_task_that_gives_way_goes_on_at_the_next_turn() {
    let queue = Queue::new(World::orderly().driver().unwrap());
    let steps = Rc::new(Cell::new(0));
    queue.spawn({
        let (queue, steps) = (queue.clone(), steps.clone());
        async move {
            for step in 1..=3 {
                steps.set(step);
                queue.give_way().await;
            }
        }
    });
    for turn in 1..=4 {
        // It may not sleep, though nothing else would ever wake it.
        queue.turn(true, &mut Vec::new()).unwrap();
        assert_eq!(steps.get(), turn.min(3));
        assert_eq!(queue.live_tasks(), usize::from(turn < 4));
    }
}
