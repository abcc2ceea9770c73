//! Two exports on one image: a migration's source and its destination.

use std::time::{Duration, Instant};

use cowhand_vhost_user_client::Ask;

use crate::world::{Client, DISK, Served, World};

/// The guest moves: its memory is the same (as if copied), its rings start elsewhere at the bases at which they stopped.
fn migrate(client: &mut Client, to: &Served) {
    let bases = client.stop();
    for (queue, base) in client.queues.iter().zip(&bases) {
        assert_eq!(queue.ring.used_index().unwrap(), *base);
    }
    let front_end = to.connect();
    client.inflight = Some(front_end.get_inflight(client.queues.len() as u16, crate::world::RING).unwrap());
    drop(front_end);
    client.reconnect(&to.socket);
}

#[test]
fn a_guest_moves_there_and_back_again() {
    let world = World::new();
    let (source, destination) = (world.serve_at("source", world.spec()), world.serve_at("destination", world.spec()));
    let mut client = Client::connect(&source, 2);
    for round in 0..6u64 {
        let here = if round % 2 == 0 { &destination } else { &source };
        let byte = round as u8 + 1;
        // Allocating, overwriting, unflushed.
        client.ok(&Ask::Write(round * 65536, vec![byte; 65536 / 2]));
        client.ok(&Ask::Write(8 << 20, vec![byte; 4096]));
        migrate(&mut client, here);
        for before in 0..=round {
            assert_eq!(client.read(before * 65536, 4096), [before as u8 + 1; 4096], "round {round}");
        }
        assert_eq!(client.read(8 << 20, 4096), [byte; 4096]);
    }
    client.stop();
    assert!(world.is_unlocked());
    source.stop();
    destination.stop();
    world.check();
}

#[test]
fn a_size_that_changed_on_one_side_is_seen_on_the_other() {
    let world = World::new();
    let (source, destination) = (world.serve_at("source", world.spec()), world.serve_at("destination", world.spec()));
    let mut client = Client::connect(&source, 1);
    source.handle().resize(DISK * 2).unwrap();
    client.ok(&Ask::Write(DISK * 2 - 512, vec![4; 512]));
    migrate(&mut client, &destination);
    assert_eq!(client.front_end.capacity().unwrap(), DISK * 2);
    assert_eq!(client.read(DISK * 2 - 512, 512), [4; 512]);
    destination.handle().resize(DISK).unwrap();
    migrate(&mut client, &source);
    assert_eq!(client.front_end.capacity().unwrap(), DISK);
    assert_eq!(client.status(&Ask::Read(DISK, 512)), 1);
    client.stop();
    source.stop();
    destination.stop();
    world.check();
}

#[test]
fn a_destination_that_starts_early_waits_for_the_source() {
    let world = World::new();
    let (source, destination) = (world.serve_at("source", world.spec()), world.serve_at("destination", world.spec()));
    let mut here = Client::connect(&source, 1);
    here.ok(&Ask::Write(0, vec![4; 512]));
    let waited = std::thread::scope(|scope| {
        let early = scope.spawn(|| {
            let began = Instant::now();
            let mut there = Client::connect(&destination, 1);
            assert_eq!(there.read(0, 512), [4; 512]);
            there.stop();
            began.elapsed()
        });
        std::thread::sleep(Duration::from_millis(300));
        here.ok(&Ask::Write(0, vec![4; 512]));
        here.stop();
        early.join().unwrap()
    });
    assert!(waited >= Duration::from_millis(250), "{waited:?}");
    source.stop();
    destination.stop();
    world.check();
}

#[test]
fn a_source_that_does_not_let_go_keeps_the_image_and_the_destination_can_try_again() {
    let world = World::new();
    let (source, destination) = (world.serve_at("source", world.spec()), world.serve_at("destination", world.spec()));
    let mut here = Client::connect(&source, 1);
    here.ok(&Ask::Write(0, vec![4; 512]));
    let front_end = destination.connect();
    let guest = crate::world::guest(1);
    let mut queue = crate::world::queue(&guest, 0, true);
    front_end.set_memory(&guest).unwrap();
    let began = Instant::now();
    // The one that cannot have it is told so, and its connection ends.
    assert!(front_end.start(&guest, &queue.ring, 0).is_err());
    assert!(began.elapsed() > Duration::from_secs(2), "it waits");
    here.ok(&Ask::Write(512, vec![5; 512]));
    here.stop();
    let front_end = destination.connect();
    front_end.set_memory(&guest).unwrap();
    front_end.start(&guest, &queue.ring, 0).unwrap();
    assert_eq!(queue.run(&Ask::Read(512, 512)).unwrap().data, [5; 512]);
    drop((front_end, here));
    source.stop();
    destination.stop();
    world.check();
}
