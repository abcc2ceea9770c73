//! Front-ends that do what they must not: an error to that connection, and no harm to the process, the image or another export.

use std::os::fd::{AsFd, BorrowedFd};

use std::time::{Duration, Instant};

use cowhand_vhost_user_client::guest::memory_file;
use cowhand_vhost_user_client::message::{blk, feature, flag, protocol, request};
use cowhand_vhost_user_client::{Ask, Bell, FrontEnd, Region, Wire};

use crate::world::{Client, HIGH, QUEUE_ROOM, Served, World, base_byte, guest, queue};

pub const SOON: Duration = Duration::from_secs(5);

/// Two exports; after what is done to the first both serve, and the image is sound.
pub fn with_neighbour(what: impl FnOnce(&World, &Served)) {
    let (world, neighbour) = (World::new(), World::new());
    let (served, beside) = (world.serve(), neighbour.serve());
    let mut client = Client::connect(&beside, 1);
    client.ok(&Ask::Write(0, vec![1; 4096]));
    what(&world, &served);
    assert_eq!(client.read(0, 4096), [1; 4096]);
    served.still_serves();
    client.stop();
    served.stop();
    beside.stop();
    world.check();
    neighbour.check();
}

/// What is wrong with it, its regions, and the descriptors that go with them.
type Table<'a> = (&'static str, Vec<[u64; 4]>, Vec<BorrowedFd<'a>>);

fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let count = (regions.len() as u64).to_le_bytes().to_vec();
    [count, regions.concat().iter().flat_map(|word| word.to_le_bytes()).collect()].concat()
}

#[test]
fn memory_tables_that_cannot_be_end_the_connection() {
    with_neighbour(|world, served| {
        let file = memory_file(1 << 20).unwrap();
        let fd = file.as_fd();
        let (pipe, _other) = std::io::pipe().unwrap();
        let directory = std::fs::File::open(world.path(".")).unwrap();
        let read_only = std::fs::File::open(world.base()).unwrap();
        let mib = 1 << 20;
        // Guest address, length, the front-end's address, offset in the file.
        let good = [0, mib, 0x1000_0000, 0];
        let cases: Vec<Table<'_>> = vec![
            ("overlapping", vec![good, [mib - 4096, mib, 0x2000_0000, 0]], vec![fd, fd]),
            ("the same twice", vec![good, good], vec![fd, fd]),
            ("of no length", vec![[0, 0, 0x1000_0000, 0]], vec![fd]),
            ("longer than its file", vec![[0, mib + 4096, 0x1000_0000, 0]], vec![fd]),
            ("behind its file", vec![[0, mib, 0x1000_0000, 4096]], vec![fd]),
            ("far behind its file", vec![[0, mib, 0x1000_0000, u64::MAX - 4095]], vec![fd]),
            ("wrapping in the guest", vec![[u64::MAX - 4095, mib, 0x1000_0000, 0]], vec![fd]),
            ("wrapping in the front-end", vec![[0, mib, u64::MAX - 4095, 0]], vec![fd]),
            ("of all lengths", vec![[0, u64::MAX, 0, 0]], vec![fd]),
            ("huge", vec![[0, 1 << 62, 0x1000_0000, 0]], vec![fd]),
            ("at an odd offset", vec![[0, 4096, 0x1000_0000, 511]], vec![fd]),
            ("in a pipe", vec![good], vec![pipe.as_fd()]),
            ("in a directory", vec![good], vec![directory.as_fd()]),
            ("in a file that may be read", vec![[0, 4096, 0x1000_0000, 0]], vec![read_only.as_fd()]),
            ("without its descriptor", vec![good], vec![]),
            ("with one too few", vec![good, [2 * mib, mib, 0x2000_0000, 0]], vec![fd]),
            ("with one too many", vec![good], vec![fd, fd]),
            ("none, with a descriptor", vec![], vec![fd]),
            ("too many", vec![good; 33], vec![fd; 33]),
        ];
        for (what, regions, files) in &cases {
            let front_end = served.connect();
            let set = front_end.tell(request::SET_MEM_TABLE, &table(regions), files);
            assert!(set.is_err(), "{what}");
            assert!(front_end.wire.is_closed_within(SOON), "{what}");
        }
        for (what, regions, files) in &cases {
            let (Some(region), true) = (regions.first(), regions.len() == 1) else { continue };
            let front_end = served.connect();
            let payload = [vec![0; 8], region.iter().flat_map(|word| word.to_le_bytes()).collect()].concat();
            assert!(front_end.tell(request::ADD_MEM_REG, &payload, files).is_err(), "added: {what}");
            assert!(front_end.wire.is_closed_within(SOON), "added: {what}");
        }
        // Added over another one, twice, and taken away though it is not there.
        let region = Region::new(HIGH, 0x1000_0000, mib).unwrap();
        let front_end = served.connect();
        front_end.add_region(&region).unwrap();
        assert!(front_end.add_region(&region).is_err());
        assert!(served.connect().remove_region(&region).is_err());
        // A count that is not the payload's.
        for count in [0, 2, 7, u32::MAX] {
            let mut payload = table(&[good]);
            payload[..4].copy_from_slice(&u32::to_le_bytes(count));
            assert!(served.connect().tell(request::SET_MEM_TABLE, &payload, &[fd]).is_err(), "count {count}");
        }
    });
}

#[test]
fn rings_that_cannot_be_end_the_connection() {
    with_neighbour(|_, served| {
        for size in [0, 3, 100, 65535, 65536, 1 << 20, u32::MAX] {
            assert!(served.connect().set_ring(request::SET_VRING_NUM, 0, size).is_err(), "{size} entries");
        }
        for base in [65536, u32::MAX] {
            assert!(served.connect().set_ring(request::SET_VRING_BASE, 0, base).is_err(), "base {base}");
        }
        for index in [4, 255, 256, u32::MAX] {
            assert!(served.connect().set_ring(request::SET_VRING_NUM, index, 128).is_err(), "ring {index}");
            assert!(served.connect().set_ring(request::SET_VRING_BASE, index, 0).is_err(), "ring {index}");
            assert!(served.connect().set_ring(request::SET_VRING_ENABLE, index, 1).is_err(), "ring {index}");
            let base = [index, 0].map(u32::to_le_bytes).concat();
            assert!(served.connect().ask(request::GET_VRING_BASE, &base).is_err(), "ring {index}");
        }
        let bell = Bell::new().unwrap();
        for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            assert!(served.connect().set_bell(request, 4, Some(bell.as_fd())).is_err());
            assert!(served.connect().tell(request, &0u64.to_le_bytes(), &[]).is_err(), "no descriptor");
            let two = [bell.as_fd(), bell.as_fd()];
            assert!(served.connect().tell(request, &0u64.to_le_bytes(), &two).is_err(), "two descriptors");
        }
        for value in [2, u32::MAX] {
            assert!(served.connect().set_ring(request::SET_VRING_ENABLE, 0, value).is_err(), "enabled {value}");
        }
    });
}

/// Starts a ring at these places, given as the front-end's addresses.
fn start_at(served: &Served, [descriptors, used, available]: [u64; 3]) -> std::io::Result<()> {
    let front_end = served.connect();
    let guest = guest(1);
    front_end.set_memory(&guest)?;
    front_end.set_ring(request::SET_VRING_NUM, 0, 128)?;
    let mut payload = [0; 8].to_vec();
    payload.extend([descriptors, used, available, 0].map(u64::to_le_bytes).concat());
    front_end.tell(request::SET_VRING_ADDR, &payload, &[])?;
    front_end.set_bell(request::SET_VRING_KICK, 0, Some(Bell::new()?.as_fd()))?;
    front_end.set_ring(request::SET_VRING_ENABLE, 0, 1)
}

#[test]
fn rings_outside_of_memory_or_unaligned_end_the_connection() {
    with_neighbour(|_, served| {
        let memory = guest(1);
        let (start, end) = (memory.user(HIGH).unwrap(), memory.user(HIGH + QUEUE_ROOM - 1).unwrap() + 1);
        let good = [start, start + 8192, start + 4096];
        start_at(served, good).unwrap();
        let low = memory.user(0).unwrap();
        for bad in [0, HIGH, end, u64::MAX, u64::MAX - 15, end - 16, low + (1 << 20) - 64, 1 << 40] {
            for part in 0..3 {
                let mut places = good;
                places[part] = bad;
                assert!(start_at(served, places).is_err(), "part {part} at {bad:#x}");
            }
        }
        for (part, by) in [(0, 8), (0, 1), (1, 2), (1, 1), (2, 1)] {
            let mut places = good;
            places[part] += by;
            assert!(start_at(served, places).is_err(), "part {part} {by} bytes off");
        }
    });
}

#[test]
fn messages_out_of_order_do_no_harm() {
    with_neighbour(|world, served| {
        let guest = guest(1);
        let queue = queue(&guest, 0, true);
        // A kick before all else: nothing runs, nothing ends.
        let front_end = FrontEnd { wire: served.wire(), features: 0, protocol: 0 };
        front_end.set_bell(request::SET_VRING_KICK, 0, Some(queue.ring.kick.as_fd())).unwrap();
        front_end.set_bell(request::SET_VRING_CALL, 0, Some(queue.ring.call.as_fd())).unwrap();
        front_end.get_u64(request::GET_FEATURES).unwrap();
        assert!(world.is_unlocked());
        drop(front_end);
        // Enabled before features; protocol messages before they are agreed on.
        let front_end = FrontEnd { wire: served.wire(), features: 0, protocol: 0 };
        front_end.set_ring(request::SET_VRING_ENABLE, 0, 1).unwrap();
        assert!(front_end.wire.is_closed_within(SOON));
        for request in [
            request::GET_CONFIG,
            request::GET_QUEUE_NUM,
            request::GET_INFLIGHT_FD,
            request::GET_MAX_MEM_SLOTS,
            request::RESET_DEVICE,
            request::SET_LOG_BASE,
        ] {
            let wire = served.wire();
            wire.send(request, flag::VERSION, &[0; 24], &[]).unwrap();
            assert!(wire.is_closed_within(SOON), "request {request}");
        }
        // A ring without memory, or addresses.
        let front_end = served.connect();
        assert!(front_end.start(&guest, &queue.ring, 0).is_err());
        let front_end = served.connect();
        front_end.set_bell(request::SET_VRING_KICK, 0, Some(queue.ring.kick.as_fd())).unwrap();
        front_end.set_ring(request::SET_VRING_ENABLE, 0, 1).unwrap();
        assert!(world.is_unlocked());
        drop(front_end);
        // What must not change while the ring runs; a base that is asked for twice.
        let mut client = Client::connect(served, 1);
        client.ok(&Ask::Flush);
        assert_eq!(client.front_end.stop(0).unwrap(), 1);
        assert_eq!(client.front_end.stop(0).unwrap(), 1);
        assert_eq!(client.front_end.stop(3).unwrap(), 0);
        drop(client);
        let change: [fn(&Client) -> std::io::Result<()>; 3] = [
            |client| client.front_end.set_ring(request::SET_VRING_NUM, 0, 64),
            |client| client.front_end.set_ring(request::SET_VRING_BASE, 0, 7),
            |client| client.front_end.set_bell(request::SET_VRING_KICK, 0, None),
        ];
        for change in change {
            let mut client = Client::connect(served, 1);
            client.ok(&Ask::Write(0, vec![2; 512]));
            assert!(change(&client).is_err());
        }
    });
}

#[test]
fn payloads_of_the_wrong_size_and_unknown_requests_end_the_connection() {
    with_neighbour(|_, served| {
        let sizes = [
            (1, 0),
            (2, 8),
            (3, 0),
            (5, 40),
            (8, 8),
            (9, 40),
            (10, 8),
            (11, 8),
            (12, 8),
            (15, 0),
            (16, 8),
            (17, 0),
            (18, 8),
        ];
        for (request, right) in sizes {
            for size in [0, 1, 4, 7, 8, 9, 12, 39, 40, 41, 256, 4096] {
                if size != right && !(request == 5 && size == 8) {
                    let front_end = served.connect();
                    front_end.wire.send(request, flag::VERSION | flag::NEED_REPLY, &vec![0; size], &[]).unwrap();
                    assert!(front_end.wire.is_closed_within(SOON), "request {request} with {size} bytes");
                }
            }
        }
        for request in
            [0, 7, 19, 20, 22, 23, 26, 27, 28, 29, 30, 33, 35, 39, 40, 41, 42, 43, 44, 99, request::UNKNOWN, u32::MAX]
        {
            let front_end = served.connect();
            front_end.wire.send(request, flag::VERSION, &[0; 8], &[]).unwrap();
            // Some have an answer that refuses; none leaves the connection in a state that we would not understand.
            let closed = front_end.wire.is_closed_within(Duration::from_millis(300));
            assert!(closed || [42, 43].contains(&request), "request {request}");
        }
        // Headers: no version, another one, a reply, a payload of which there is no end.
        for flags in [0, 2, 3, flag::VERSION | flag::REPLY, u32::MAX] {
            let wire = served.wire();
            wire.send(request::GET_FEATURES, flags, &[], &[]).unwrap();
            assert!(wire.is_closed_within(SOON), "flags {flags:#x}");
        }
        for size in [4097u32, 1 << 20, u32::MAX] {
            let wire = served.wire();
            wire.send_bytes(&[request::SET_CONFIG, flag::VERSION, size].map(u32::to_le_bytes).concat(), &[]).unwrap();
            assert!(wire.is_closed_within(SOON), "size {size}");
        }
        // Descriptors with what takes none, and as many as fit.
        let file = memory_file(4096).unwrap();
        for count in [1, 8, 64] {
            let front_end = served.connect();
            let sent = front_end.wire.send(request::GET_FEATURES, flag::VERSION, &[], &vec![file.as_fd(); count]);
            assert!(sent.is_err() || front_end.wire.is_closed_within(SOON), "{count} descriptors");
        }
    });
}

#[test]
fn configuration_that_is_not_there() {
    with_neighbour(|_, served| {
        for (offset, size) in [(256u32, 1u32), (255, 2), (u32::MAX, 1), (200, 257), (60, u32::MAX)] {
            let mut payload = [offset, size, 0].map(u32::to_le_bytes).concat();
            payload.extend(vec![0; size.min(300) as usize]);
            let front_end = served.connect();
            let refused = match front_end.ask(request::GET_CONFIG, &payload) {
                // Behind what there is lie zeros.
                Ok(reply) => reply.payload[12..].iter().all(|byte| *byte == 0),
                Err(_) => true,
            };
            assert!(refused, "{offset} {size}");
        }
    });
}

#[test]
fn a_hang_up_at_any_byte_of_a_message_is_a_hang_up() {
    with_neighbour(|_, served| {
        let guest = guest(1);
        let message = Wire::encode(
            request::SET_MEM_TABLE,
            flag::VERSION,
            &table(&guest.regions.iter().map(|r| [r.guest, r.len, r.user, r.offset]).collect::<Vec<_>>()),
        );
        let files: Vec<_> = guest.regions.iter().map(Region::fd).collect();
        for cut in (1..message.len()).step_by(7).chain([11, 12, 13, message.len() - 1]) {
            let front_end = served.connect();
            front_end.wire.send_bytes(&message[..cut], &files).unwrap();
        }
        // And under way to the next one, with requests in flight.
        for cut in [0, 5, 12, 20] {
            let mut client = Client::connect(served, 1);
            for n in 0..32u64 {
                client.queues[0].submit(&Ask::Write((64 + n) * 65536, vec![n as u8; 8192])).unwrap();
            }
            client.queues[0].ring.notify().unwrap();
            client.front_end.wire.send_bytes(&message[..cut], if cut > 0 { &files } else { &[] }).ok();
            drop(client);
        }
    });
}

#[test]
fn a_message_byte_by_byte_is_a_message() {
    with_neighbour(|_, served| {
        let front_end = served.connect();
        let guest = guest(1);
        let mut regions = guest.regions.iter();
        let (first, second) = (regions.next().unwrap(), regions.next().unwrap());
        let payload = table(&[first, second].map(|r| [r.guest, r.len, r.user, r.offset]));
        let message = Wire::encode(request::SET_MEM_TABLE, flag::VERSION | flag::NEED_REPLY, &payload);
        // Descriptors go with a header, which is whole: one that is not could not be read together with them.
        front_end.wire.send_bytes(&message[..12], &[first.fd(), second.fd()]).unwrap();
        for byte in message[12..].iter().chain(&Wire::encode(request::GET_FEATURES, 1, &[])) {
            front_end.wire.send_bytes(&[*byte], &[]).unwrap();
            std::thread::sleep(Duration::from_micros(300));
        }
        assert_eq!(front_end.wire.receive().unwrap().u64().unwrap(), 0);
        assert_eq!(front_end.wire.receive().unwrap().request, request::GET_FEATURES);
        let mut queue = queue(&guest, 0, true);
        front_end.start(&guest, &queue.ring, 0).unwrap();
        assert_eq!(queue.run(&Ask::Read(0, 512)).unwrap().data, [base_byte(0); 512]);
        // Several at once are several.
        let two = [Wire::encode(request::GET_FEATURES, 1, &[]), Wire::encode(request::GET_QUEUE_NUM, 1, &[])].concat();
        front_end.wire.send_bytes(&two, &[]).unwrap();
        assert_eq!(front_end.wire.receive().unwrap().request, request::GET_FEATURES);
        assert_eq!(front_end.wire.receive().unwrap().u64().unwrap(), 4);
    });
}

#[test]
fn who_sends_half_a_message_and_waits_keeps_nobody() {
    with_neighbour(|_, served| {
        let wire = served.wire();
        wire.send_bytes(&[1, 0, 0], &[]).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        // It is told to end meanwhile, and does.
        let began = Instant::now();
        assert!(served.handle().resize(crate::world::DISK).is_ok());
        assert!(began.elapsed() < Duration::from_secs(5));
        drop(wire);
    });
}

#[test]
fn who_never_reads_its_replies_is_let_go() {
    with_neighbour(|_, served| {
        let wire = served.wire();
        let message = Wire::encode(request::GET_FEATURES, flag::VERSION, &[]).repeat(64);
        wire.stream().set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut sent = 0;
        while wire.send_bytes(&message, &[]).is_ok() {
            sent += 1;
            assert!(sent < 100_000, "it is read without end");
        }
        // Not before its patience is over; other exports do not notice.
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match served.agree_or_not() {
                Ok(_) => break,
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    });
}

#[test]
fn dirty_logs_that_cannot_be_end_the_connection() {
    with_neighbour(|_, served| {
        let file = memory_file(8192).unwrap();
        for (len, offset) in [(0, 0), (8193, 0), (8192, 8), (u64::MAX, 0), (8, u64::MAX - 7), (8, 4), (1 << 60, 0)] {
            assert!(served.connect().set_log(&file, len, offset).is_err(), "{len} {offset}");
        }
        let front_end = served.connect();
        front_end.wire.send(request::SET_LOG_BASE, flag::VERSION, &[0; 16], &[]).unwrap();
        assert!(front_end.wire.is_closed_within(SOON));
    });
}

#[test]
fn a_channel_that_is_none_or_that_nobody_reads() {
    with_neighbour(|_, served| {
        let file = memory_file(8192).unwrap();
        assert!(served.connect().tell(request::SET_BACKEND_REQ_FD, &[], &[file.as_fd()]).is_err());
        assert!(served.connect().tell(request::SET_BACKEND_REQ_FD, &[], &[]).is_err());
        let mut client = Client::connect(served, 1);
        let channel = client.front_end.open_channel().unwrap();
        for n in 0..600u64 {
            served.handle().resize(crate::world::DISK + (n % 2) * 65536).unwrap();
        }
        client.ok(&Ask::Flush);
        // One that has gone is no reason to go, too.
        drop(channel);
        served.handle().resize(crate::world::DISK).unwrap();
        client.ok(&Ask::Flush);
    });
}

#[test]
fn memory_that_is_cut_off_under_us_is_only_that_front_ends_loss() {
    with_neighbour(|_, served| {
        cowhand_vhost_user_blk::sigbus::install().unwrap();
        for cut in [0, 1, 2] {
            let mut client = Client::connect(served, 1);
            client.ok(&Ask::Write(0, vec![1; 4096]));
            for n in 0..16u64 {
                client.queues[0].submit(&Ask::Write(n * 65536 + 512, vec![n as u8; 8192])).unwrap();
            }
            client.queues[0].ring.notify().unwrap();
            // All of it, all but the ring, or the low memory that nobody uses.
            let region = &client.guest.regions[usize::from(cut != 2)];
            let left = if cut == 1 { region.offset + 65536 } else { 0 };
            rustix::fs::ftruncate(&region.file, left).unwrap();
            client.queues[0].ring.kick.ring().unwrap();
            if cut == 2 {
                // Nobody has looked at it.
                client.front_end.stop(0).unwrap();
            } else {
                assert!(client.front_end.wire.is_closed_within(SOON));
            }
        }
        // A log that goes away.
        let mut client = Client::connect(served, 1);
        let file = memory_file(1 << 20).unwrap();
        client.front_end.set_log(&file, 1 << 20, 0).unwrap();
        let features = client.front_end.features | feature::LOG_ALL;
        client.front_end.set_features(features).unwrap();
        rustix::fs::ftruncate(&file, 0).unwrap();
        client.queues[0].submit(&Ask::Read(0, 4096)).unwrap();
        client.queues[0].ring.notify().unwrap();
        assert!(client.front_end.wire.is_closed_within(SOON));
    });
}

#[test]
fn many_connections_leave_nothing_behind() {
    let world = World::new();
    let served = world.serve();
    served.still_serves();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    // Other tests of this process have descriptors of their own: what must not be is one or more for each connection.
    let before = open();
    for n in 0..300 {
        if n % 3 == 0 {
            served.still_serves();
        } else {
            drop(served.agree(u64::MAX, protocol::CONFIG));
        }
    }
    assert!(open() < before + 250, "{before} descriptors, now {}", open());
    served.stop();
    world.check();
}

#[test]
fn guests_write_to_the_same_sectors_at_once_and_the_image_is_sound() {
    let world = World::new();
    let served = world.serve();
    let client = Client::connect(&served, 4);
    std::thread::scope(|scope| {
        for (mut queue, n) in client.queues.into_iter().zip(1u8..) {
            scope.spawn(move || {
                for round in 0..200u64 {
                    while queue.room() > 0 {
                        let offset = (round * 7 + queue.room() as u64) % 64 * 4096;
                        let ask = match queue.room() % 5 {
                            0 => Ask::Discard(offset / 65536 * 65536, 65536),
                            1 => Ask::WriteZeroes(offset, 8192, true),
                            2 => Ask::Flush,
                            _ => Ask::Write(offset, vec![n; 4096]),
                        };
                        queue.submit(&ask).unwrap();
                    }
                    queue.ring.notify().unwrap();
                    assert_eq!(queue.wait(Duration::from_secs(20)).unwrap().status, blk::S_OK);
                }
            });
        }
    });
    drop((client.front_end, client.guest));
    served.stop();
    world.check();
}
