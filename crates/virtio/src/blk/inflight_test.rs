use super::*;
use crate::testing::{Words, words};

const SIZE: u16 = 8;

fn queue(memory: &Words) -> InflightQueue {
    InflightQueue::new(memory.clone(), 0, SIZE).unwrap_or_else(|error| panic!("{error}"))
}

/// Records of memory in use, recovered at a used index.
fn recovered(memory: &Words, used_idx: u16) -> (InflightQueue, Vec<u16>) {
    let mut queue = queue(memory);
    let heads = queue.recover(used_idx).unwrap();
    (queue, heads)
}

/// What another process would find.
fn copy(memory: &Words) -> Words {
    let copied = words(memory.0.len());
    for (to, from) in copied.0.iter().zip(memory.0.iter()) {
        to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
    }
    copied
}

fn fail(memory: &Words, used_idx: u16) -> InflightError {
    match InflightQueue::new(memory.clone(), 0, SIZE) {
        Ok(mut queue) => queue.recover(used_idx).unwrap_err(),
        Err(error) => error,
    }
}

#[test]
fn layout_is_that_of_the_specification() {
    let memory = words(InflightQueue::words_for(SIZE));
    let (mut queue, _) = recovered(&memory, 0x1234);
    queue.taken(1);
    queue.taken(2);
    queue.used(1);
    queue.used(2);

    let bytes: Vec<u8> = memory.0.iter().flat_map(|word| word.load(Ordering::SeqCst).to_ne_bytes()).collect();

    // Features, version, number of descriptors, head of the last batch, used index.
    assert_eq!(bytes[..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 2, 0, 0x34, 0x12]);
    // In flight, padding, next, counter.
    assert_eq!(bytes[16..32], [0; 16]);
    assert_eq!(bytes[32..48], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[48..64], [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(InflightQueue::words_for(SIZE), 24);
    assert_eq!(InflightQueue::words_for(3), 8);
}

#[test]
fn memory_never_used_takes_the_rings_index_as_it_is() {
    let memory = words(InflightQueue::words_for(SIZE));
    let (queue, heads) = recovered(&memory, 5000);
    assert!(heads.is_empty());
    drop(queue);

    assert!(recovered(&memory, 5000).1.is_empty());
    assert_eq!(fail(&memory, 5009), InflightError::UsedIndex { recorded: 5000, ring: 5009, queue_size: SIZE });
}

#[test]
fn heads_come_back_in_the_order_in_which_they_were_taken() {
    let memory = words(InflightQueue::words_for(SIZE));
    let (mut queue, _) = recovered(&memory, 0);
    for head in [5, 0, 7, 3] {
        queue.taken(head);
    }
    queue.used(0);
    queue.published(1);

    let (mut queue, heads) = recovered(&memory, 1);
    assert_eq!(heads, [5, 7, 3]);

    // Those that are taken now come behind them, however often we die.
    queue.taken(0);
    queue.used(7);
    queue.published(2);
    queue.taken(7);
    let (mut queue, heads) = recovered(&memory, 2);
    assert_eq!(heads, [5, 3, 0, 7]);
    queue.taken(1);
    assert_eq!(recovered(&memory, 2).1, [5, 3, 0, 7, 1]);
}

#[test]
fn batch_that_the_ring_has_is_done_and_one_that_it_has_not_is_not() {
    let memory = words(InflightQueue::words_for(SIZE));
    let (mut queue, _) = recovered(&memory, u16::MAX - 1);
    (0..6).for_each(|head| queue.taken(head));
    queue.used(4);
    queue.published(u16::MAX);
    for head in [2, 0, 5] {
        queue.used(head);
    }

    // Killed before the index of the used ring was written, and after it: across the end of 16 bits.
    let before = copy(&memory);
    assert_eq!(recovered(&before, u16::MAX).1, [0, 1, 2, 3, 5]);
    assert_eq!(recovered(&memory, 2).1, [1, 3]);

    // And after it was seen once more.
    assert_eq!(recovered(&memory, 2).1, [1, 3]);
}

#[test]
fn killed_at_any_store_nothing_is_lost_and_nothing_done_twice() {
    // Each step of a worker that serves batches; after each, what a process that comes now would find.
    let memory = words(InflightQueue::words_for(SIZE));
    let (mut queue, _) = recovered(&memory, 0);
    let mut in_flight: Vec<u16> = Vec::new();
    let mut used_idx = 0u16;
    let check = |in_flight: &[u16], used_idx: u16| {
        assert_eq!(recovered(&copy(&memory), used_idx).1, in_flight, "used index {used_idx}");
    };
    for round in 0..70_000u32 {
        let look = round < 100 || round > 65_500 && round < 65_600;
        let head = (round % u32::from(SIZE)) as u16;
        if !in_flight.contains(&head) {
            queue.taken(head);
            in_flight.push(head);
        }
        if in_flight.len() < 5 {
            continue;
        }
        // Out of order, one to three at a time.
        let batch: Vec<u16> = (0..=round % 3).map(|n| in_flight[((round + n) % 4) as usize]).collect();
        for head in &batch {
            queue.used(*head);
            if look {
                check(&in_flight, used_idx);
            }
        }
        used_idx = used_idx.wrapping_add(batch.len() as u16);
        in_flight.retain(|head| !batch.contains(head));
        if look {
            check(&in_flight, used_idx);
        }
        queue.published(used_idx);
        if look {
            check(&in_flight, used_idx);
        }
    }
}

#[test]
fn clearing_a_batch_half_way_can_be_gone_on_from() {
    let memory = words(InflightQueue::words_for(SIZE));
    let (mut queue, _) = recovered(&memory, 0);
    (0..4).for_each(|head| queue.taken(head));
    (0..3).for_each(|head| queue.used(head));
    let before = copy(&memory);
    queue.published(3);

    // The records of the batch are cleared one by one; the links stay.
    for cleared in 0..=3 {
        let between = copy(&before);
        for head in 0..cleared {
            let at = HEADER_WORDS + RECORD_WORDS * head;
            between.0[at].store(memory.0[at].load(Ordering::SeqCst), Ordering::SeqCst);
        }
        assert_eq!(recovered(&between, 3).1, [3], "{cleared} of the batch are cleared");
    }
}

#[test]
fn areas_of_several_queues_lie_side_by_side() {
    let area = InflightQueue::words_for(SIZE);
    let memory = words(2 * area);
    let mut first = InflightQueue::new(memory.clone(), 0, SIZE).ok().unwrap();
    let mut second = InflightQueue::new(memory.clone(), area, SIZE).ok().unwrap();
    first.recover(0).unwrap();
    second.recover(9).unwrap();
    first.taken(7);
    second.taken(0);

    let mut second = InflightQueue::new(memory.clone(), area, SIZE).ok().unwrap();
    assert_eq!(second.recover(9).unwrap(), [0]);
    assert_eq!(recovered(&memory, 0).1, [7]);
}

#[test]
fn memory_too_small_or_of_another_layout_is_refused() {
    let area = InflightQueue::words_for(SIZE);
    for at in [1, area, usize::MAX] {
        let error = InflightQueue::new(words(area), at, SIZE).err().unwrap();
        assert!(matches!(error, InflightError::TooSmall { .. }), "{error}");
    }
    let memory = words(area);
    drop(recovered(&memory, 0));
    let other = InflightQueue::new(memory.clone(), 0, 4).err().unwrap();
    assert_eq!(other, InflightError::QueueSize { recorded: SIZE, queue_size: 4 });
    memory.0[0].store(2, Ordering::SeqCst);
    assert_eq!(fail(&memory, 0), InflightError::Features(2));
    memory.0[0].store(0, Ordering::SeqCst);
    memory.0[1].fetch_add(1, Ordering::SeqCst);
    assert_eq!(fail(&memory, 0), InflightError::Version(2));
}

#[test]
fn hostile_records_end_the_walk_and_never_name_a_head_beyond_the_queue() {
    let memory = words(InflightQueue::words_for(SIZE));
    drop(recovered(&memory, 0));
    // The last batch starts beyond the queue.
    memory.0[1].store(1 | 8 << 16 | 8 << 32, Ordering::SeqCst);
    assert_eq!(fail(&memory, 1), InflightError::Head { head: 8, queue_size: SIZE });
    // It goes round for ever.
    memory.0[1].store(1 | 8 << 16 | 3 << 32, Ordering::SeqCst);
    memory.0[HEADER_WORDS + 6].store(link(3) | IN_FLIGHT, Ordering::SeqCst);
    assert!(recovered(&copy(&memory), 8).1.is_empty());
    // It leaves the queue later.
    memory.0[HEADER_WORDS + 6].store(link(0xffff) | IN_FLIGHT, Ordering::SeqCst);
    assert_eq!(fail(&memory, 2), InflightError::Head { head: 0xffff, queue_size: SIZE });
}

#[test]
fn rubbish_gives_an_error_or_heads_of_the_queue() {
    let mut random = cowhand_block::io::sim::Rng::from_environment("SEED", "rubbish_in_records");
    for _ in 0..3000 {
        let memory = words(InflightQueue::words_for(SIZE));
        memory.0.iter().for_each(|word| word.store(random.next_u64(), Ordering::SeqCst));
        if random.below(8) > 0 {
            memory.0[0].store(0, Ordering::SeqCst);
            let header = 1 | u64::from(SIZE) << 16 | random.below(12) << 32 | random.below(4) << 48;
            memory.0[1].store(header, Ordering::SeqCst);
        }
        let Ok(mut queue) = InflightQueue::new(memory.clone(), 0, SIZE) else { continue };
        let Ok(heads) = queue.recover(random.below(14) as u16) else { continue };
        assert!(heads.len() <= SIZE.into() && heads.iter().all(|head| *head < SIZE));
        for _ in 0..20 {
            queue.taken(random.next_u64() as u16 % 10);
            queue.used(random.next_u64() as u16 % 10);
        }
        queue.published(random.next_u64() as u16);
        queue.taken(u16::MAX);
        queue.used(u16::MAX);
    }
}
