//! Features, the configuration space, what the guest sets in it, and who may connect.

use std::time::Duration;

use cowhand_block::DiskSpec;
use cowhand_vhost_user_client::message::{back_end_request, feature, flag, protocol, request};
use cowhand_vhost_user_client::{Ask, FrontEnd, Wire};

use crate::world::{Client, DISK, Served, Wanted, World};

const WRITEBACK: u32 = 32;

fn u16_at(config: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(config[at..at + 2].try_into().unwrap())
}

fn u32_at(config: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(config[at..at + 4].try_into().unwrap())
}

#[test]
fn features_say_what_is_served() {
    let world = World::new();
    let served = world.serve();
    let front_end = served.connect();
    let offered = front_end.get_u64(request::GET_FEATURES).unwrap();
    let wanted = feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | feature::LOG_ALL
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | feature::PROTOCOL_FEATURES
        | feature::VERSION_1;
    assert_eq!(offered & wanted, wanted);
    assert_eq!(offered & feature::RO, 0);
    let offered = front_end.get_u64(request::GET_PROTOCOL_FEATURES).unwrap();
    assert_eq!(offered, cowhand_vhost_user_client::front_end::PROTOCOL_ALL);
    assert_eq!(front_end.get_u64(request::GET_QUEUE_NUM).unwrap(), 4);
    assert!(front_end.get_u64(request::GET_MAX_MEM_SLOTS).unwrap() >= 8);
}

#[test]
fn configuration_says_what_the_disk_is() {
    let world = World::new();
    let spec = DiskSpec { block_size: 4096, ..world.spec() };
    let served = world.serve_at("socket", spec);
    let front_end = served.connect();
    let config = front_end.config(0, 60).unwrap();
    assert_eq!(front_end.capacity().unwrap(), DISK);
    assert_eq!(u32_at(&config, 20), 4096, "the block size");
    assert!((1..=254).contains(&u32_at(&config, 12)), "segments");
    assert_eq!(config[32], 1, "writeback");
    assert_eq!(u16_at(&config, 34), 4, "queues");
    let (max_discard, granularity, max_zeroes) = (u32_at(&config, 36), u32_at(&config, 44), u32_at(&config, 48));
    assert_eq!(granularity, 128, "a cluster");
    assert!(max_discard >= granularity && max_discard % granularity == 0 && max_zeroes == max_discard);
    assert!(u32_at(&config, 40) > 0 && u32_at(&config, 52) > 0, "segments of discards and of zeros");
    assert_eq!(config[56], 1, "zeros may unmap");
    // Any part of it, and zeros behind it.
    assert_eq!(front_end.config(20, 4).unwrap(), 4096u32.to_le_bytes());
    assert_eq!(front_end.config(58, 198).unwrap(), [0; 198]);
    // What nobody may write stays.
    for (offset, len) in [(0, 8), (20, 4), (34, 2), (31, 2), (32, 4)] {
        front_end.set_config(offset, &vec![0; len]).unwrap();
    }
    front_end.set_config(WRITEBACK, &[2]).unwrap();
    assert_eq!(front_end.config(0, 60).unwrap(), config);
}

fn writeback(front_end: &FrontEnd) -> u8 {
    front_end.config(WRITEBACK, 1).unwrap()[0]
}

#[test]
fn writeback_is_what_the_guest_sets_until_a_reset() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    client.front_end.set_config(WRITEBACK, &[0]).unwrap();
    assert_eq!(writeback(&client.front_end), 0);
    client.ok(&Ask::Write(0, vec![1; 512]));

    // A migration begins and ends.
    let features = client.front_end.features;
    client.front_end.set_features(features | feature::LOG_ALL).unwrap();
    assert_eq!(writeback(&client.front_end), 0);
    client.front_end.set_features(features).unwrap();
    assert_eq!(writeback(&client.front_end), 0);

    // The back-end dies: front-ends do not tell the next one what the guest had set.
    served.stop();
    let served = world.serve();
    client.reconnect(&served.socket);
    assert_eq!(writeback(&client.front_end), 0);
    client.ok(&Ask::Write(512, vec![1; 512]));

    client.stop();
    client.front_end.tell(request::RESET_DEVICE, &[], &[]).unwrap();
    assert_eq!(writeback(&client.front_end), 1);
    client.front_end.set_features(features).unwrap();
    assert_eq!(writeback(&client.front_end), 1);
    drop(client);
    served.stop();
    world.check();
}

#[test]
fn a_reset_leaves_a_device_that_can_be_started_again() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::with(&served, 2, Wanted { inflight: false, ..Wanted::default() });
    client.ok(&Ask::Write(4096, vec![7; 4096]));
    client.front_end.tell(request::RESET_DEVICE, &[], &[]).unwrap();
    // No ring runs: the image is nobody's.
    assert!(world.is_unlocked());
    let features = client.front_end.features;
    client.front_end.set_features(features).unwrap();
    for queue in &mut client.queues {
        let base = queue.ring.used_index().unwrap();
        client.front_end.start(&client.guest, &queue.ring, base).unwrap();
    }
    assert_eq!(client.read(4096, 4096), [7; 4096]);
    drop(client);
    served.stop();
    world.check();
}

#[test]
fn without_flush_a_write_is_durable_by_itself() {
    let world = World::new();
    let served = world.serve();
    let features = !(feature::LOG_ALL | feature::FLUSH | feature::CONFIG_WCE);
    let mut client = Client::with(&served, 1, Wanted { features, ..Wanted::default() });
    assert_eq!(writeback(&client.front_end), 0);
    client.ok(&Ask::Write(0, vec![1; 512]));
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn features_that_are_not_offered_end_the_connection() {
    let world = World::new();
    let served = world.serve();
    for features in [1, 1 << 33, 1 << 40, u64::MAX] {
        let mut front_end = served.connect();
        assert!(front_end.set_features(features).is_err(), "{features:#x}");
        assert!(front_end.wire.is_closed_within(Duration::from_secs(5)));
    }
    for features in [1 << 8, 1 << 40, u64::MAX] {
        let front_end = served.connect();
        let set = front_end.tell(request::SET_PROTOCOL_FEATURES, &u64::to_le_bytes(features), &[]);
        assert!(set.is_err(), "{features:#x}");
    }
    served.still_serves();
}

#[test]
fn acknowledgements_come_only_when_agreed_on_and_asked_for() {
    let world = World::new();
    let served = world.serve();
    let quiet = served.agree(u64::MAX, protocol::CONFIG);
    // Asked for, not agreed on: the next thing that comes is the answer to the next question.
    quiet.wire.send(request::SET_OWNER, flag::VERSION | flag::NEED_REPLY, &[], &[]).unwrap();
    assert_eq!(quiet.capacity().unwrap(), DISK);
    drop(quiet);
    let front_end = served.connect();
    front_end.wire.send(request::SET_OWNER, flag::VERSION, &[], &[]).unwrap();
    assert_eq!(front_end.capacity().unwrap(), DISK);
    // A question that has an answer of its own is answered once.
    let reply = front_end.wire.call(request::GET_FEATURES, flag::VERSION | flag::NEED_REPLY, &[], &[]).unwrap();
    assert_eq!(reply.payload.len(), 8);
    assert_eq!(front_end.capacity().unwrap(), DISK);
}

#[test]
fn one_front_end_at_a_time() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let second = served.wire();
    assert!(second.is_closed_within(Duration::from_secs(5)));
    client.ok(&Ask::Write(0, vec![3; 512]));
    // It may come back at once.
    for _ in 0..20 {
        client.reconnect(&served.socket);
        assert_eq!(client.read(0, 512), [3; 512]);
    }
    drop(client);
    served.stop();
    world.check();
}

#[test]
fn the_disk_is_open_only_while_a_ring_runs() {
    let world = World::new();
    let served = world.serve();
    assert!(world.is_unlocked());
    let client = Client::connect(&served, 2);
    assert!(!world.is_unlocked());
    client.front_end.stop(0).unwrap();
    assert!(!world.is_unlocked());
    client.front_end.stop(1).unwrap();
    assert!(world.is_unlocked());
    drop(client);
    served.stop();
    world.check();
}

fn told_of_change(channel: &Wire) {
    let message = channel.receive().unwrap();
    assert_eq!((message.request, message.payload.len()), (back_end_request::CONFIG_CHANGE_MSG, 0));
    assert_eq!(message.flags & flag::NEED_REPLY, 0);
}

fn resize(served: &Served, client: &mut Client, channel: &Wire, size: u64) {
    served.handle().resize(size).unwrap();
    told_of_change(channel);
    assert_eq!(client.front_end.capacity().unwrap(), size);
    client.ok(&Ask::Write(size - 512, vec![9; 512]));
    assert_eq!(client.status(&Ask::Read(size, 512)), 1);
}

#[test]
fn the_guest_is_told_of_another_size() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let channel = client.front_end.open_channel().unwrap();
    resize(&served, &mut client, &channel, DISK * 2);
    resize(&served, &mut client, &channel, DISK * 3 / 2);
    // While nothing runs, too.
    client.stop();
    served.handle().resize(DISK).unwrap();
    told_of_change(&channel);
    assert_eq!(client.front_end.capacity().unwrap(), DISK);
    assert!(served.handle().resize(513).is_err());
    drop(client);
    served.handle().resize(DISK * 2).unwrap();
    assert_eq!(served.connect().capacity().unwrap(), DISK * 2);
    served.stop();
    world.check();
}

#[test]
fn another_size_that_was_given_elsewhere_is_told_when_the_disk_is_opened() {
    let world = World::new();
    let served = world.serve();
    let client = Client::connect(&served, 1);
    let channel = client.front_end.open_channel().unwrap();
    let base = client.stop()[0];
    let other = world.serve_at("other", world.spec());
    other.handle().resize(DISK * 2).unwrap();
    client.front_end.start(&client.guest, &client.queues[0].ring, base).unwrap();
    told_of_change(&channel);
    assert_eq!(client.front_end.capacity().unwrap(), DISK * 2);
    drop(client);
    served.stop();
    other.stop();
    world.check();
}
