//! The dirty log: pages that were written, all of them, and no others.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use cowhand_vhost_user_client::guest::memory_file;
use cowhand_vhost_user_client::message::{blk, feature, request};
use cowhand_vhost_user_client::{Ask, Descriptor, FrontEnd, Guest, Region};

use crate::world::{BASE_DATA, Client, HIGH, QUEUE_ROOM, World, wait_until};

const PAGE: u64 = 4096;
/// A log of all of the memory that clients have here: 8 GiB.
const LOG: u64 = (8 << 30) / PAGE / 8;
const OFFSET: u64 = 8192;

struct Log(std::fs::File);

impl Log {
    /// Tells the back-end of a new log, of which it knows `len` bytes.
    fn set(front_end: &FrontEnd, len: u64) -> Self {
        let file = memory_file(OFFSET + LOG).unwrap();
        front_end.set_log(&file, len, OFFSET).unwrap();
        Self(file)
    }

    /// The pages since it was looked at last.
    fn pages(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; LOG as usize];
        self.0.read_exact_at(&mut bytes, OFFSET).unwrap();
        self.0.write_all_at(&vec![0; LOG as usize], OFFSET).unwrap();
        let mut before = [0; OFFSET as usize];
        self.0.read_exact_at(&mut before, 0).unwrap();
        assert!(before.iter().all(|byte| *byte == 0), "the file's first bytes are not the log's");
        let bits = bytes
            .iter()
            .zip(0u64..)
            .flat_map(|(byte, n)| (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| n * 8 + bit));
        bits.map(|page| page * PAGE).collect()
    }
}

/// A client that has told of a log, and of its first ring's place in it.
fn logged(served: &crate::world::Served) -> (Client, Log) {
    let mut client = Client::connect(served, 1);
    let log = Log::set(&client.front_end, LOG);
    let features = client.front_end.features;
    client.front_end.set_features(features | feature::LOG_ALL).unwrap();
    let ring = &client.queues[0].ring;
    client.front_end.set_addresses(&client.guest, ring, Some(ring.at.used)).unwrap();
    log.pages();
    (client, log)
}

#[test]
fn just_what_was_written_is_in_the_log() {
    let world = World::new();
    let served = world.serve();
    let (mut client, log) = logged(&served);
    let queue = &client.queues[0];
    // The slot that is used each time: the last one that was given back.
    let (data, status, used) = (queue.data_at(0), queue.status_at(0), queue.ring.at.used);
    let expect = |log: &Log, pages: &[u64], what: &str| {
        assert_eq!(log.pages(), pages.iter().copied().collect(), "{what}");
    };

    client.read(0, 4096);
    expect(&log, &[used, data, status], "a read from the base");
    client.read(BASE_DATA, 512);
    expect(&log, &[used, data, status], "a read of nothing");
    client.ok(&Ask::Write(0, vec![1; 8192]));
    expect(&log, &[used, status], "a write that allocates");
    client.ok(&Ask::Write(0, vec![1; 8192]));
    expect(&log, &[used, status], "a write");
    client.read(0, 8192);
    expect(&log, &[used, data, data + PAGE, status], "a read of the overlay");
    client.read(512, 32 << 10);
    let all: Vec<u64> = (0..8).map(|n| data + n * PAGE).chain([used, status]).collect();
    expect(&log, &all, "a large read");
    client.ok(&Ask::Flush);
    expect(&log, &[used, status], "a flush");
    client.ok(&Ask::Discard(0, 65536));
    expect(&log, &[used, status], "a discard");
    client.ok(&Ask::GetId);
    expect(&log, &[used, data, status], "the disk's name");
    assert_eq!(client.status(&Ask::Other(77, 0, 0, Vec::new())), blk::S_UNSUPP);
    expect(&log, &[used, status], "an unknown request");
    // Nobody has written the data of a read that is refused, but who logs it loses nothing.
    assert_eq!(client.status(&Ask::Read(u64::MAX - 511, 512)), blk::S_IOERR);
    let pages = log.pages();
    assert!(pages.contains(&used) && pages.contains(&status) && pages.len() <= 3, "{pages:x?}");
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn a_page_that_was_taken_out_of_the_log_comes_back_when_it_is_written_again() {
    let world = World::new();
    let served = world.serve();
    let (mut client, log) = logged(&served);
    let data = client.queues[0].data_at(0);
    for _ in 0..50 {
        client.read(0, 4096);
        assert!(log.pages().contains(&data));
    }
    client.stop();
}

#[test]
fn the_used_ring_is_logged_where_the_front_end_says_or_not_at_all() {
    let world = World::new();
    let served = world.serve();
    let (mut client, log) = logged(&served);
    let (ring, status) = (&client.queues[0].ring, client.queues[0].status_at(0));
    let used = ring.at.used;
    // Somewhere else than where it is.
    client.front_end.set_addresses(&client.guest, ring, Some(0x5000)).unwrap();
    log.pages();
    client.ok(&Ask::Flush);
    assert_eq!(log.pages(), [0x5000, status].into());
    client.front_end.set_addresses(&client.guest, &client.queues[0].ring, None).unwrap();
    log.pages();
    client.ok(&Ask::Flush);
    assert_eq!(log.pages(), [status].into());
    // Outside of all logs, where it even wraps around.
    for place in [1 << 40, u64::MAX - 16, !0] {
        client.front_end.set_addresses(&client.guest, &client.queues[0].ring, Some(place)).unwrap();
        client.ok(&Ask::Flush);
        assert_eq!(log.pages(), [status].into());
    }
    client.front_end.set_addresses(&client.guest, &client.queues[0].ring, Some(used)).unwrap();
    client.ok(&Ask::Flush);
    assert_eq!(log.pages(), [status, used].into());
    client.stop();
}

#[test]
fn nothing_is_logged_when_logging_is_over() {
    let world = World::new();
    let served = world.serve();
    let (mut client, log) = logged(&served);
    client.read(0, 512);
    assert!(!log.pages().is_empty());
    let features = client.front_end.features & !feature::LOG_ALL;
    client.front_end.set_features(features).unwrap();
    client.front_end.set_addresses(&client.guest, &client.queues[0].ring, None).unwrap();
    log.pages();
    client.read(0, 512);
    assert!(log.pages().is_empty());
    // And again, as when a migration is begun anew; with another log.
    let log = Log::set(&client.front_end, LOG);
    client.front_end.set_features(features | feature::LOG_ALL).unwrap();
    log.pages();
    client.read(0, 512);
    assert!(log.pages().contains(&client.queues[0].data_at(0)));
    client.stop();
}

#[test]
fn a_log_without_the_feature_stays_empty() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let log = Log::set(&client.front_end, LOG);
    client.read(0, 512);
    assert!(log.pages().is_empty());
    client.stop();
}

#[test]
fn memory_that_comes_after_the_log_is_logged_too() {
    let world = World::new();
    let served = world.serve();
    let (mut client, log) = logged(&served);
    let place = HIGH + QUEUE_ROOM + (1 << 30);
    let more = Guest::of(vec![Region::new(place, 0x7000_0000_0000, 64 << 10).unwrap()]).unwrap();
    client.front_end.add_region(&more.regions[0]).unwrap();
    log.pages();
    let queue = &mut client.queues[0];
    let (header, status) = (queue.header_at(0), queue.status_at(0));
    client.guest.put(header, &[0; 16]).unwrap();
    let chain =
        [Descriptor::read(header, 16), Descriptor::written(place + 4096 + 512, 4096), Descriptor::written(status, 1)];
    let head = queue.ring.lay_out(&chain).unwrap();
    queue.ring.offer(head).unwrap();
    queue.ring.notify().unwrap();
    queue.ring.wait(Duration::from_secs(20)).unwrap();
    assert_eq!(log.pages(), [queue.ring.at.used, status, place + 4096, place + 8192].into());
    client.stop();
}

#[test]
fn a_log_that_is_too_short_takes_what_it_has_room_for() {
    let world = World::new();
    let served = world.serve();
    let (mut client, _) = logged(&served);
    // Just up to the page of the first slot's data.
    let data = client.queues[0].data_at(0);
    let log = Log::set(&client.front_end, (data / PAGE + 1).div_ceil(8));
    log.pages();
    client.read(0, 32 << 10);
    let pages = log.pages();
    assert!(pages.contains(&data) && pages.iter().all(|page| *page < data + 8 * PAGE), "{pages:x?}");
    client.stop();
}

#[test]
fn a_ring_that_is_started_again_marks_what_it_wrote_before() {
    let world = World::new();
    let served = world.serve();
    let (client, log) = logged(&served);
    let used = client.queues[0].ring.at.used;
    client.stop();
    log.pages();
    client.front_end.start(&client.guest, &client.queues[0].ring, 0).unwrap();
    client.front_end.set_addresses(&client.guest, &client.queues[0].ring, Some(used)).unwrap();
    wait_until("the ring's mark", || log.pages().contains(&used));
    client.front_end.set_ring(request::SET_VRING_ENABLE, 0, 0).unwrap();
}
