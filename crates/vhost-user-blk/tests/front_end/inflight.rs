//! The memory that the front-end keeps for the back-end: across restarts, and when it is not what it was. (That it does its work when a
//! process is killed is seen with the program itself: tests/vhost_user_blk.)

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use cowhand_vhost_user_client::message::request;
use cowhand_vhost_user_client::{Ask, Inflight};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::world::{Client, Dice, RING, World};

#[test]
fn the_memory_is_larger_than_its_records_and_cannot_be_shortened() {
    let world = World::new();
    let served = world.serve();
    let front_end = served.connect();
    for (queues, size) in [(1, 4), (4, 128), (4, 32768), (1, 1)] {
        let inflight = front_end.get_inflight(queues, size).unwrap();
        assert!(inflight.len >= u64::from(queues) * (16 + 16 * u64::from(size)));
        assert_eq!(inflight.offset, 0);
        assert!(ftruncate(&inflight.file, 0).is_err());
    }
}

#[test]
fn numbers_that_no_ring_has_are_refused() {
    let world = World::new();
    let served = world.serve();
    for (queues, size) in [(5, 128), (u16::MAX, 128), (1, 32769), (1, u16::MAX)] {
        assert!(served.connect().get_inflight(queues, size).is_err(), "{queues} {size}");
    }
    served.still_serves();
}

#[test]
fn a_clean_restart_finds_nothing_left_to_do() {
    let world = World::new();
    let mut served = world.serve();
    let mut client = Client::connect(&served, 2);
    for round in 0..5u64 {
        client.ok(&Ask::Write(round * 65536, vec![round as u8 + 1; 4096]));
        served.stop();
        world.check();
        served = world.serve();
        client.reconnect(&served.socket);
        for before in 0..=round {
            assert_eq!(client.read(before * 65536, 4096), [before as u8 + 1; 4096]);
        }
    }
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn a_front_end_that_disconnects_under_load_comes_back_to_all_of_it() {
    let world = World::new();
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    let mut dice = Dice::new(7);
    for round in 0..10u64 {
        let mut asked = vec![None; 32];
        for _ in 0..32 {
            let block = dice.below(16) * 256 + round * 16 + dice.below(16);
            if asked.contains(&Some(block)) {
                continue;
            }
            let slot = client.queues[0].submit(&Ask::Write(block * 4096, vec![round as u8 + 1; 4096])).unwrap();
            asked[slot] = Some(block);
        }
        client.queues[0].ring.notify().unwrap();
        // Nothing is lost, and nothing comes twice (the ring says so).
        client.reconnect(&served.socket);
        while client.queues[0].ring.under_way() > 0 {
            assert_eq!(client.queues[0].wait(Duration::from_secs(20)).unwrap().status, 0);
        }
        for block in asked.into_iter().flatten() {
            assert_eq!(client.read(block * 4096, 4096), [round as u8 + 1; 4096]);
        }
    }
    client.stop();
    served.stop();
    world.check();
}

/// A memory like what the back-end made, but with these bytes, and sealed or not.
fn forged(like: &Inflight, len: u64, sealed: bool) -> Inflight {
    let file = memfd_create(c"forged", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, len).unwrap();
    if sealed {
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    }
    Inflight { len: like.len, offset: like.offset, queues: like.queues, queue_size: like.queue_size, file: file.into() }
}

#[test]
fn memory_that_is_not_the_back_ends_is_refused() {
    let world = World::new();
    let served = world.serve();
    let real = served.connect().get_inflight(2, RING).unwrap();
    let whole = |real: &Inflight| forged(real, real.len, true);
    let forgeries = [
        ("unsealed", forged(&real, real.len, false)),
        ("short", forged(&real, real.len - 4096, true)),
        ("empty", forged(&real, 0, true)),
        ("said to be shorter", Inflight { len: real.len - 4096, ..whole(&real) }),
        ("said to be empty", Inflight { len: 0, ..whole(&real) }),
        ("said to be longer", Inflight { len: u64::MAX, ..whole(&real) }),
        ("behind its end", Inflight { offset: 4096, ..whole(&real) }),
        ("unaligned", Inflight { offset: 4, ..forged(&real, real.len + 4096, true) }),
        ("behind all ends", Inflight { offset: u64::MAX - 7, ..whole(&real) }),
        ("for more rings", Inflight { queues: 5, ..whole(&real) }),
        ("for no rings", Inflight { queues: 0, ..whole(&real) }),
        ("for huge rings", Inflight { queue_size: u16::MAX, ..whole(&real) }),
    ];
    for (what, forgery) in forgeries {
        let front_end = served.connect();
        assert!(front_end.set_inflight(&forgery).is_err(), "{what}");
        assert!(front_end.wire.is_closed_within(Duration::from_secs(5)), "{what}");
    }
    // A file that cannot be mapped, and no file.
    let front_end = served.connect();
    let directory = std::fs::File::open(world.path(".")).unwrap();
    assert!(front_end.set_inflight(&Inflight { file: directory, ..whole(&real) }).is_err());
    assert!(served.connect().tell(request::SET_INFLIGHT_FD, &real.encode(), &[]).is_err());
    let two = [real.file.as_fd(), real.file.as_fd()];
    assert!(served.connect().tell(request::SET_INFLIGHT_FD, &real.encode(), &two).is_err());
    served.still_serves();
    served.stop();
    world.check();
}

#[test]
fn memory_of_another_image_is_refused_and_that_image_stays_as_it_is() {
    let (world, other) = (World::new(), World::new());
    let served = world.serve();
    let mut client = Client::connect(&served, 1);
    client.ok(&Ask::Write(0, vec![1; 4096]));
    let before = other.content();
    // Not stopped: the journal is live, as after a death.
    let elsewhere = other.serve();
    let front_end = elsewhere.connect();
    front_end.set_inflight(client.inflight.as_ref().unwrap()).unwrap();
    front_end.set_memory(&client.guest).unwrap();
    assert!(front_end.start(&client.guest, &client.queues[0].ring, 1).is_err());
    drop(front_end);
    elsewhere.still_serves();
    elsewhere.stop();
    other.check();
    assert!(other.content() == before);
    client.stop();
    served.stop();
    world.check();
}

#[test]
fn rings_of_another_size_or_number_than_their_records_are_refused() {
    let world = World::new();
    let served = world.serve();
    let guest = crate::world::guest(2);
    let start = |queues: u16, size: u16, index: u16| {
        let front_end = served.connect();
        front_end.set_inflight(&front_end.get_inflight(queues, size).unwrap()).unwrap();
        front_end.set_memory(&guest).unwrap();
        let queue = crate::world::queue(&guest, index, true);
        front_end.start(&guest, &queue.ring, 0)
    };
    start(1, RING, 0).unwrap();
    assert!(start(1, RING / 2, 0).is_err());
    assert!(start(1, RING, 1).is_err());
    served.still_serves();
    served.stop();
    world.check();
}

/// Records and journal are scribbled upon while nobody runs; a back-end takes them or refuses them, and the image is sound
/// afterwards. What was acknowledged *and flushed* is there unless the journal, which anybody can forge, says something else that is
/// sound: what is certain is that nothing breaks.
#[test]
fn scribbled_memory_harms_neither_the_process_nor_the_image() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(11);
    let mut dice = Dice::new(seed);
    for round in 0..60 {
        let world = World::new();
        let served = world.serve();
        let mut client = Client::connect(&served, 1);
        for n in 0..8u64 {
            client.ok(&Ask::Write(n * 65536, vec![n as u8 + 1; 4096]));
        }
        // A copy of the memory of a back-end that is alive is what one that was killed leaves.
        let live = client.inflight.as_ref().unwrap();
        let mut bytes = vec![0; live.len as usize];
        live.file.read_exact_at(&mut bytes, 0).unwrap();
        client.stop();
        served.stop();

        let used: Vec<usize> = (0..bytes.len() / 8).filter(|n| bytes[n * 8..][..8] != [0; 8]).collect();
        for _ in 0..=dice.below(6) {
            // Where something is, or beside it.
            let at = (used[dice.below(used.len() as u64) as usize] + dice.below(3) as usize) * 8;
            let mut word = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            match dice.below(4) {
                0 => word = dice.next(),
                1 => word = dice.below(200),
                2 => word ^= 1 << dice.below(64),
                _ => word = word.wrapping_add(dice.below(3)).wrapping_sub(1),
            }
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let scribbled = forged(live, live.len, true);
        scribbled.file.write_all_at(&bytes, 0).unwrap();

        let served = world.serve();
        let front_end = served.connect();
        if front_end.set_inflight(&scribbled).is_ok() {
            front_end.set_memory(&client.guest).unwrap();
            if front_end.start(&client.guest, &client.queues[0].ring, 0).is_ok() {
                // Chains that the records name may be done again: the ring then holds heads that the driver does not know.
                let _ = client.queues[0].run(&Ask::Read(0, 512));
            }
        }
        drop(front_end);
        served.still_serves();
        served.stop();
        println!("round {round} of seed {seed}");
        world.check();
    }
}
