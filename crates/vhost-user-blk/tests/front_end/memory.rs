//! The guest's memory: regions that come and go while rings run.

use std::sync::Arc;
use std::time::Duration;

use cowhand_vhost_user_client::message::{blk, request};
use cowhand_vhost_user_client::{Ask, Descriptor, Guest, Queue, Region};

use crate::world::{Client, HIGH, QUEUE_ROOM, RING, SLOTS, World, base_byte};

/// Reads the disk's first sectors to `at` of the guest's memory; gives the status.
fn read_to(client: &mut Client, at: u64, len: u32) -> u8 {
    let queue = &mut client.queues[0];
    let (header, status) = (queue.header_at(0), queue.status_at(0));
    client.guest.put(header, &[0; 16]).unwrap();
    client.guest.put(status, &[blk::S_UNWRITTEN]).unwrap();
    let chain = [Descriptor::read(header, 16), Descriptor::written(at, len), Descriptor::written(status, 1)];
    let head = queue.ring.lay_out(&chain).unwrap();
    queue.ring.offer(head).unwrap();
    queue.ring.notify().unwrap();
    assert_eq!(queue.ring.wait(Duration::from_secs(20)).unwrap().0, head);
    client.guest.bytes(status, 1).unwrap()[0]
}

fn sectors(len: u64) -> Vec<u8> {
    (0..len).map(base_byte).collect()
}

#[test]
fn memory_comes_and_goes_while_rings_run() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let place = 16 << 30;
    for round in 0..3u64 {
        let more = Guest::of(vec![Region::at(place, 0x7000_0000_0000, 64 << 10, round * 4096).unwrap()]).unwrap();
        assert_eq!(read_to(&mut client, place, 4096), blk::S_IOERR);
        client.front_end.add_region(&more.regions[0]).unwrap();
        assert_eq!(read_to(&mut client, place + 60 * 1024, 4096), blk::S_OK);
        assert_eq!(more.bytes(place + 60 * 1024, 4096).unwrap(), sectors(4096));
        assert_eq!(read_to(&mut client, place + 62 * 1024, 4096), blk::S_IOERR);
        client.front_end.remove_region(&more.regions[0]).unwrap();
    }
    assert_eq!(read_to(&mut client, place, 4096), blk::S_IOERR);
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn data_across_regions_is_read_into_both() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let next = HIGH + QUEUE_ROOM;
    let more = Guest::of(vec![Region::new(next, 0x7000_0000_0000, 64 << 10).unwrap()]).unwrap();
    client.front_end.add_region(&more.regions[0]).unwrap();
    assert_eq!(read_to(&mut client, next - 2048, 4096), blk::S_OK);
    assert_eq!(client.guest.bytes(next - 2048, 2048).unwrap(), sectors(2048));
    assert_eq!(more.bytes(next, 2048).unwrap(), sectors(4096)[2048..]);
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn memory_slots_one_by_one_up_to_the_last() {
    let world = World::new();
    let served = world.serve();
    let client = Client::connect(&served, 1);
    let slots = client.front_end.get_u64(request::GET_MAX_MEM_SLOTS).unwrap();
    let region = |n: u64| Region::new((64 << 30) + n * 65536, 0x7000_0000_0000 + n * 65536, 4096).unwrap();
    // The table has two already. Rings stopped: each change would stop and start them.
    let base = client.stop()[0];
    for n in 2..slots {
        client.front_end.add_region(&region(n)).unwrap();
    }
    client.front_end.start(&client.guest, &client.queues[0].ring, base).unwrap();
    assert!(client.front_end.add_region(&region(slots)).is_err());
    drop(client);
    served.still_serves();
    served.stop();
    world.check();
}

#[test]
fn the_whole_memory_is_replaced_while_a_ring_runs() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    for _ in 0..5 {
        client.ok(&Ask::Write(8192, vec![5; 4096]));
        client.front_end.set_memory(&client.guest).unwrap();
        assert_eq!(client.read(8192, 4096), [5; 4096]);
    }
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn memory_that_a_running_ring_lies_in_is_not_taken_away_unharmed() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    client.ok(&Ask::Write(8192, vec![5; 4096]));
    // The ring cannot go on: an error to this connection.
    let removed = client.front_end.remove_region(&client.guest.regions[1]);
    assert!(removed.is_err() || client.front_end.wire.is_closed_within(Duration::from_secs(5)));
    drop(client);
    served.still_serves();
    served.stop();
    world.check();
}

#[test]
fn memory_may_come_after_the_addresses() {
    let world = World::new();
    let served = world.serve();
    let front_end = served.connect();
    let guest = Arc::new(Guest::new(&[(HIGH, QUEUE_ROOM)]).unwrap());
    let mut queue = Queue::new(&guest, 0, RING, HIGH, SLOTS).unwrap();
    queue.ring.event_idx = true;
    front_end.set_ring(request::SET_VRING_NUM, 0, RING.into()).unwrap();
    front_end.set_addresses(&guest, &queue.ring, None).unwrap();
    front_end.set_memory(&guest).unwrap();
    front_end.start(&guest, &queue.ring, 0).unwrap();
    assert_eq!(queue.run(&Ask::Read(0, 512)).unwrap().data, sectors(512));
    drop(front_end);
    served.stop();
    world.check();
}
