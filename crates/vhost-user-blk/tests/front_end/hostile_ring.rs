//! Rings that a driver fills with what it must not, and eventfds that are none: the ring breaks, or goes on without it; no harm to anything else.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use cowhand_vhost_user_client::message::{blk, request};
use cowhand_vhost_user_client::ring::{INDIRECT, NEXT, WRITE};
use cowhand_vhost_user_client::{Ask, Descriptor};

use crate::hostile::{SOON, with_neighbour};
use crate::world::{Client, HIGH, QUEUE_ROOM, RING, Served, Wanted};

/// Address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// Puts raw descriptors at the start of the table, makes `head` available, and sees what becomes of it: the ring breaks (which is
/// said by its error eventfd) or the chain comes back.
fn raw_chain(served: &Served, wanted: Wanted, descriptors: &[Raw], head: u16) -> Option<u32> {
    let mut client = Client::with(served, 1, wanted);
    let guest = client.guest.clone();
    let queue = &mut client.queues[0];
    guest.put(queue.status_at(0), &[blk::S_UNWRITTEN]).unwrap();
    for (&(at, len, flags, next), n) in descriptors.iter().zip(0..) {
        guest.put(queue.ring.descriptor(n), &Descriptor { at, len, flags }.encode(flags, next)).unwrap();
    }
    queue.ring.offer(head).unwrap();
    queue.ring.notify().unwrap();
    if head >= RING {
        // There is no way to give it back: it is as if it had not been there.
        assert_eq!(queue.run(&Ask::Read(0, 512)).unwrap().status, blk::S_OK);
        return None;
    }
    let until = Instant::now() + SOON;
    loop {
        if queue.ring.used_index().unwrap() != 0 {
            let entry = guest.bytes(queue.ring.at.used + 4, 8).unwrap();
            return Some(u32::from_le_bytes(entry[4..].try_into().unwrap()));
        }
        if queue.ring.err.wait(Duration::from_millis(1)).unwrap() {
            // The connection lives, and can stop the ring.
            client.front_end.stop(0).unwrap();
            return None;
        }
        assert!(Instant::now() < until, "nothing becomes of {descriptors:x?}");
    }
}

#[test]
fn chains_that_cannot_be() {
    with_neighbour(|_, served| {
        for wanted in [Wanted::default(), Wanted { inflight: false, ..Wanted::default() }] {
            let at = HIGH + QUEUE_ROOM - 8192;
            let cases: Vec<(&str, Vec<Raw>, u16)> = vec![
                ("a loop of one", vec![(at, 16, NEXT, 0)], 0),
                ("a loop of two", vec![(at, 16, NEXT, 1), (at, 512, NEXT | WRITE, 0)], 0),
                ("a link outside", vec![(at, 16, NEXT, RING)], 0),
                ("a link far outside", vec![(at, 16, NEXT, u16::MAX)], 0),
                ("a head outside", vec![], RING),
                ("a head far outside", vec![], u16::MAX),
                ("nothing", vec![(0, 0, 0, 0)], 0),
                ("only what is read", vec![(at, 16, NEXT, 1), (at, 512, 0, 0)], 0),
                ("only what is written", vec![(at, 16, WRITE, 0)], 0),
                ("written before read", vec![(at, 1, NEXT | WRITE, 1), (at, 16, 0, 0)], 0),
                ("half a header", vec![(at, 8, NEXT, 1), (at + 64, 1, WRITE, 0)], 0),
                ("a status outside", vec![(at, 16, NEXT, 1), (1 << 50, 1, WRITE, 0)], 0),
                ("a header outside", vec![(1 << 50, 16, NEXT, 1), (at + 64, 1, WRITE, 0)], 0),
                ("huge data", vec![(at, 16, NEXT, 1), (at, u32::MAX, NEXT | WRITE, 2), (at + 64, 1, WRITE, 0)], 0),
                ("a table outside", vec![(1 << 50, 32, INDIRECT, 0)], 0),
                ("an empty table", vec![(at, 0, INDIRECT, 0)], 0),
                ("an odd table", vec![(at, 33, INDIRECT, 0)], 0),
                ("a huge table", vec![(at, !15, INDIRECT, 0)], 0),
                ("a table that goes on", vec![(at, 32, INDIRECT | NEXT, 1), (at, 1, WRITE, 0)], 0),
                ("a table of tables", vec![(HIGH, 2048, INDIRECT, 0)], 0),
                ("unknown flags", vec![(at, 16, 0xfff8, 0)], 0),
            ];
            for (what, descriptors, head) in cases {
                println!("{what}: {:?}", raw_chain(served, wanted, &descriptors, head));
            }
        }
    });
}

#[test]
fn an_available_index_that_runs_away_breaks_the_ring_alone() {
    with_neighbour(|_, served| {
        for index in [RING + 1, 20_000, u16::MAX] {
            let mut client = Client::connect(served, 2);
            client.queues[0].ring.set_available(index).unwrap();
            client.queues[0].ring.kick.ring().unwrap();
            assert!(client.queues[0].ring.err.wait(SOON).unwrap(), "{index}");
            assert_eq!(client.queues[1].run(&Ask::Read(0, 512)).unwrap().status, blk::S_OK);
            client.stop();
        }
    });
}

#[test]
fn eventfds_that_are_none() {
    with_neighbour(|world, served| {
        let file = std::fs::File::create(world.path("file")).unwrap();
        let (reading, writing) = std::io::pipe().unwrap();
        let socket = served.wire();
        drop(socket);
        let others = [file.as_fd(), reading.as_fd(), writing.as_fd()];
        for other in others {
            for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
                let mut client = Client::connect(served, 1);
                let base = client.stop()[0];
                let (front_end, ring) = (&client.front_end, &client.queues[0].ring);
                let started = front_end.start(&client.guest, ring, base);
                started.unwrap();
                // Refused, or of no use: the export lives.
                let base = front_end.stop(0).unwrap();
                if front_end.set_bell(request, 0, Some(other)).is_ok() {
                    let _ = front_end.set_ring(request::SET_VRING_BASE, 0, base.into());
                    let _ = client.queues[0].submit(&Ask::Read(0, 512));
                    let _ = client.front_end.set_ring(request::SET_VRING_ENABLE, 0, 1);
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        let mut client = Client::connect(served, 1);
        client.ok(&Ask::Flush);
    });
}

#[test]
fn an_eventfd_that_is_full_or_blocks_keeps_nobody() {
    with_neighbour(|_, served| {
        let mut client = Client::connect(served, 1);
        let call = &client.queues[0].ring.call;
        let _ = call.heard();
        // Full, and made blocking again behind the back-end's back.
        rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let flags = rustix::fs::fcntl_getfl(call).unwrap();
        rustix::fs::fcntl_setfl(call, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
        client.queues[0].submit(&Ask::Read(0, 512)).unwrap();
        client.queues[0].ring.notify().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        // Heard at last, so that the test ends whatever happens.
        let heard = client.queues[0].ring.call.heard();
        assert!(heard);
        drop(client);
    });
}
