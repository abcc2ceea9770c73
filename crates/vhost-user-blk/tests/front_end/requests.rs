//! Every request type, by every way in which a ring can be driven, and what is refused.

use std::time::Duration;

use cowhand_vhost_user_client::front_end::FEATURES_ALL;
use cowhand_vhost_user_client::message::{blk, feature};
use cowhand_vhost_user_client::{Ask, Descriptor};

use crate::world::{BASE_DATA, Client, DISK, Dice, SLOTS, Wanted, World, base_byte, guest, queue};

const K: u64 = 1 << 10;

/// Every request type, with a result that can be seen.
fn every_type(wanted: Wanted, indirect: bool, pieces: u32) {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::with(&served, 1, wanted);
    client.queues[0].indirect = indirect;
    client.queues[0].pieces = pieces;

    // From the base, across clusters, and nothing.
    let from_base: Vec<u8> = (60 * K..76 * K).map(base_byte).collect();
    let done = client.ok(&Ask::Read(60 * K, 16 << 10));
    assert_eq!((done.len, done.data), ((16 << 10) + 1, from_base));
    assert!(client.read(BASE_DATA, 4096).iter().all(|byte| *byte == 0));
    // A write that copies, one that does not, one to a mapped cluster.
    let written: Vec<u8> = (0..8 * K).map(|n| (n / 512 + 100) as u8).collect();
    for offset in [62 * K, BASE_DATA + 128 * K, 62 * K + 512] {
        assert_eq!(client.ok(&Ask::Write(offset, written.clone())).len, 1);
        assert_eq!(client.read(offset, 8 << 10), written);
    }
    assert_eq!(client.read(62 * K - 512, 512), [base_byte(62 * K - 512); 512]);
    assert_eq!(client.ok(&Ask::Flush).len, 1);
    // Zeros over data of the base, with and without unmapping; a discard of a whole cluster.
    for unmap in [false, true] {
        client.ok(&Ask::WriteZeroes(128 * K, 64 * K, unmap));
        client.ok(&Ask::WriteZeroes(256 * K + 512, 1024, unmap));
    }
    client.ok(&Ask::Discard(320 * K, 64 * K));
    assert!(client.read(128 * K, 32 << 10).iter().all(|byte| *byte == 0));
    let edges = client.read(256 * K, 2048);
    assert_eq!((&edges[..512], edges[512], edges[1535]), (&[base_byte(256 * K); 512][..], 0, 0));
    assert_eq!(edges[1536], base_byte(256 * K + 1536));
    // What was discarded reads as zeros in an overlay: the base must not show through.
    assert!(client.read(320 * K, 32 << 10).iter().all(|byte| *byte == 0));

    let id = client.ok(&Ask::GetId);
    assert_eq!((id.len, &id.data[..9]), (21, &b"cow-4711\0"[..]));

    for kind in [2, 3, 5, 7, 10, 12, 14, 15, 99, u32::MAX] {
        assert_eq!(client.status(&Ask::Other(kind, 0, 0, Vec::new())), blk::S_UNSUPP, "type {kind}");
    }
    client.stop();
    served.stop();
    world.check();
    assert_eq!(world.content()[62 * 1024 + 512..][..8 << 10], written);
}

#[test]
fn every_request_type_by_event_index() {
    every_type(Wanted::default(), false, 1);
}

#[test]
fn every_request_type_in_indirect_tables_and_many_pieces() {
    every_type(Wanted::default(), true, 7);
}

#[test]
fn every_request_type_without_event_index_and_in_pieces() {
    every_type(Wanted { features: FEATURES_ALL & !feature::EVENT_IDX, ..Wanted::default() }, false, 3);
}

#[test]
fn every_request_type_without_in_flight_records() {
    every_type(Wanted { inflight: false, ..Wanted::default() }, false, 1);
}

#[test]
fn every_request_type_without_protocol_features() {
    let features = FEATURES_ALL & !feature::PROTOCOL_FEATURES;
    every_type(Wanted { features, protocol: 0, inflight: false }, false, 1);
}

#[test]
fn requests_that_cannot_be_get_a_status_and_the_ring_goes_on() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let sectors = DISK / 512;
    let range = |sector: u64, count: u32, flags: u32| {
        [sector.to_le_bytes().to_vec(), count.to_le_bytes().to_vec(), flags.to_le_bytes().to_vec()].concat()
    };
    let refused = [
        Ask::Read(DISK, 512),
        Ask::Read(DISK - 512, 1024),
        Ask::Read(u64::MAX - 511, 512),
        Ask::Other(blk::IN, u64::MAX, 512, Vec::new()),
        Ask::Other(blk::IN, 0, 511, Vec::new()),
        Ask::Other(blk::IN, 0, 512, vec![0; 512]),
        Ask::Other(blk::OUT, 0, 512, vec![0; 512]),
        Ask::Write(DISK, vec![1; 512]),
        Ask::Write(DISK - 512, vec![1; 1024]),
        Ask::Other(blk::OUT, 0, 0, vec![1; 513]),
        Ask::Discard(DISK, 512),
        Ask::Discard(DISK - 512, 1024),
        Ask::WriteZeroes(DISK - 512, 1024, true),
        Ask::Other(blk::DISCARD, 0, 0, Vec::new()),
        Ask::Other(blk::DISCARD, 0, 0, vec![0; 15]),
        Ask::Other(blk::WRITE_ZEROES, 0, 0, vec![0; 17]),
        Ask::Other(blk::DISCARD, 0, 0, range(u64::MAX, 1, 0)),
        Ask::Other(blk::DISCARD, 0, 0, range(sectors - 1, u32::MAX, 0)),
        // A good one before a bad one: neither is done.
        Ask::Other(blk::WRITE_ZEROES, 0, 0, [range(0, 8, 0), range(sectors, 1, 0)].concat()),
        Ask::Other(blk::DISCARD, 0, 0, range(0, 1, 0).repeat(33)),
    ];
    for ask in refused {
        assert_eq!(client.status(&ask), blk::S_IOERR, "{ask:?}");
    }
    // Flags that a discard does not have, or nobody.
    for ask in [Ask::Other(blk::DISCARD, 0, 0, range(0, 8, 1)), Ask::Other(blk::WRITE_ZEROES, 0, 0, range(0, 8, 2))] {
        assert_eq!(client.status(&ask), blk::S_UNSUPP, "{ask:?}");
    }
    assert_eq!(client.read(0, 4096), (0..4096).map(base_byte).collect::<Vec<_>>());
    client.ok(&Ask::Other(blk::DISCARD, 0, 0, range(8, 8, 0).repeat(32)));
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn data_outside_of_memory_fails_the_request_alone() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let queue = &mut client.queues[0];
    let (header, status) = (queue.header_at(0), queue.status_at(0));
    let data = [(2 << 20, 4096), ((1 << 20) - 512, 1024), (u64::MAX - 4095, 4096), (1 << 40, 512)];
    for (at, len) in data {
        for write in [false, true] {
            client.guest.put(header, &u32::from(write).to_le_bytes()).unwrap();
            client.guest.put(status, &[blk::S_UNWRITTEN]).unwrap();
            let data = if write { Descriptor::read(at, len) } else { Descriptor::written(at, len) };
            let head =
                queue.ring.lay_out(&[Descriptor::read(header, 16), data, Descriptor::written(status, 1)]).unwrap();
            queue.ring.offer(head).unwrap();
            queue.ring.notify().unwrap();
            assert_eq!(queue.ring.wait(Duration::from_secs(20)).unwrap().0, head);
            assert_eq!(client.guest.bytes(status, 1).unwrap(), [blk::S_IOERR], "{at:#x}");
        }
    }
    client.read(0, 512);
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn a_read_only_disk_refuses_what_would_change_it() {
    let world = World::new();
    let served = world.serve_at("socket", cowhand_block::DiskSpec { readonly: true, ..world.spec() });
    let mut client = Client::connect(&served, 1);
    assert_ne!(client.front_end.features & feature::RO, 0);
    assert_eq!(client.front_end.features & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(client.status(&Ask::Write(0, vec![1; 512])), blk::S_IOERR);
    assert_eq!(client.status(&Ask::Discard(0, 512)), blk::S_UNSUPP);
    assert_eq!(client.status(&Ask::WriteZeroes(0, 512, true)), blk::S_UNSUPP);
    client.ok(&Ask::Flush);
    assert_eq!(client.read(512, 512), [base_byte(512); 512]);
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn queues_serve_side_by_side() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 4);
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let stripe = DISK / 4;
    std::thread::scope(|scope| {
        for (mut queue, n) in client.queues.drain(..).zip(0u64..) {
            scope.spawn(move || {
                let mut dice = Dice::new(seed + n);
                // What each 4 KiB of the queue's own quarter of the disk holds.
                let mut blocks = vec![None; (stripe / 4096) as usize];
                let mut under_way = vec![None; SLOTS.0];
                for step in 0..3000u64 {
                    while queue.room() > 0 && step < 2900 {
                        let block = dice.below(stripe / 4096);
                        if under_way.contains(&Some((block, true))) || under_way.contains(&Some((block, false))) {
                            break;
                        }
                        let offset = n * stripe + block * 4096;
                        let write = dice.below(2) == 0;
                        let ask = if write {
                            let byte = (dice.next() | 1) as u8;
                            blocks[block as usize] = Some(byte);
                            Ask::Write(offset, vec![byte; 4096])
                        } else {
                            Ask::Read(offset, 4096)
                        };
                        let slot = queue.submit(&ask).unwrap();
                        under_way[slot] = Some((block, write));
                    }
                    if queue.ring.under_way() == 0 {
                        break;
                    }
                    queue.ring.notify().unwrap();
                    let done = queue.wait(Duration::from_secs(20)).unwrap();
                    assert_eq!(done.status, blk::S_OK);
                    let (block, write) = under_way[done.slot].take().unwrap();
                    if !write {
                        let offset = n * stripe + block * 4096;
                        let old = if offset < BASE_DATA { base_byte(offset) } else { 0 };
                        assert_eq!(done.data[0], blocks[block as usize].unwrap_or(old), "block {block}, seed {seed}");
                    }
                }
            });
        }
    });
    // Whoever comes next, with rings of its own.
    drop(client);
    served.still_serves();
    served.stop();
    world.check();
}

#[test]
fn a_ring_goes_on_where_it_stopped() {
    let world = World::new();
    let served = world.serve();
    let front_end = served.connect();
    let guest = guest(1);
    front_end.set_memory(&guest).unwrap();
    let mut queue = queue(&guest, 0, true);
    // Around the end of all indices, stopped after each request.
    let mut base = 65530u16;
    queue.ring.begin_at(base).unwrap();
    for n in 0..12u64 {
        front_end.start(&guest, &queue.ring, base).unwrap();
        assert_eq!(queue.run(&Ask::Write(n * 65536, vec![n as u8 + 1; 512])).unwrap().status, blk::S_OK);
        // What waits while it is stopped is done when it is started.
        base = front_end.stop(0).unwrap();
        assert_eq!(base, 65531u16.wrapping_add(2 * n as u16));
        queue.submit(&Ask::Read(n * 65536, 512)).unwrap();
        front_end.start(&guest, &queue.ring, base).unwrap();
        assert_eq!(queue.wait(Duration::from_secs(20)).unwrap().data, vec![n as u8 + 1; 512]);
        base = front_end.stop(0).unwrap();
    }
    // Disabled it takes nothing either; enabled it goes on.
    front_end.start(&guest, &queue.ring, base).unwrap();
    front_end.set_ring(cowhand_vhost_user_client::message::request::SET_VRING_ENABLE, 0, 0).unwrap();
    queue.submit(&Ask::Read(0, 512)).unwrap();
    queue.ring.notify().unwrap();
    assert_eq!(queue.wait(Duration::from_millis(100)).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    front_end.set_ring(cowhand_vhost_user_client::message::request::SET_VRING_ENABLE, 0, 1).unwrap();
    assert_eq!(queue.wait(Duration::from_secs(20)).unwrap().data, [1; 512]);
    drop(front_end);
    served.stop();
    world.check();
}
