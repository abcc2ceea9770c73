use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use cowhand_vhost_user_client::guest::memory_file;
use cowhand_vhost_user_client::message::{flag, protocol, request};
use cowhand_vhost_user_client::{Reply, Wire};

use super::Relay;

const OFFERED: u64 = protocol::MQ | protocol::REPLY_ACK | protocol::INFLIGHT_SHMFD;

/// A server that says yes to everything; gives what it was sent, in order.
fn serve(listener: &UnixListener, offered: u64) -> Vec<Reply> {
    let wire = Wire::over(listener.accept().unwrap().0).unwrap();
    let mut heard = Vec::new();
    while let Ok(message) = wire.receive() {
        let reply = |payload: &[u8]| wire.send(message.request, flag::VERSION | flag::REPLY, payload, &[]).unwrap();
        match message.request {
            request::GET_PROTOCOL_FEATURES => reply(&offered.to_le_bytes()),
            request::GET_INFLIGHT_FD => {
                let mut payload = [4096u64, 0].map(u64::to_le_bytes).concat();
                payload.extend(&message.payload[16..24]);
                let file = memory_file(4096).unwrap();
                wire.send(message.request, flag::VERSION | flag::REPLY, &payload, &[file.as_fd()]).unwrap();
            }
            _ if message.flags & flag::NEED_REPLY != 0 => reply(&0u64.to_le_bytes()),
            _ => {}
        }
        heard.push(message);
    }
    heard
}

/// What virtio-driver says: it knows nothing of requests in flight.
fn set_up(socket: &Path) {
    let wire = Wire::connect(socket).unwrap();
    wire.call(request::GET_PROTOCOL_FEATURES, flag::VERSION, &[], &[]).unwrap();
    let wanted = protocol::MQ | protocol::REPLY_ACK;
    wire.send(request::SET_PROTOCOL_FEATURES, flag::VERSION, &wanted.to_le_bytes(), &[]).unwrap();
    for ring in [0u32, 1] {
        let payload = [ring, 256].map(u32::to_le_bytes).concat();
        wire.call(request::SET_VRING_NUM, flag::VERSION | flag::NEED_REPLY, &payload, &[]).unwrap();
    }
}

/// What a server hears that offers these protocol features.
fn heard(offered: u64) -> Vec<Reply> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("server.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || serve(&listener, offered));
    let relay = Relay::new(&socket, 2).unwrap();
    set_up(&relay.socket);
    server.join().unwrap()
}

#[test]
fn memory_for_requests_in_flight_is_asked_for_and_given_before_the_first_ring() {
    let heard = heard(OFFERED);
    let order: Vec<u32> = heard.iter().map(|message| message.request).collect();
    assert_eq!(
        order,
        [
            request::GET_PROTOCOL_FEATURES,
            request::SET_PROTOCOL_FEATURES,
            request::GET_INFLIGHT_FD,
            request::SET_INFLIGHT_FD,
            request::SET_VRING_NUM,
            request::SET_VRING_NUM,
        ]
    );
    assert_eq!(heard[1].u64().unwrap(), OFFERED);
    assert_eq!(heard[2].payload[16..20], [2, 0, 0, 1], "two queues of 256 entries");
    assert_eq!(heard[3].files.len(), 1);
}

#[test]
fn a_server_that_does_not_offer_it_is_not_asked() {
    let heard = heard(protocol::MQ | protocol::REPLY_ACK);
    let order: Vec<u32> = heard.iter().map(|message| message.request).collect();
    let plain = [request::GET_PROTOCOL_FEATURES, request::SET_PROTOCOL_FEATURES, request::SET_VRING_NUM];
    assert_eq!(order, [&plain[..], &[request::SET_VRING_NUM]].concat());
    assert_eq!(heard[1].u64().unwrap(), protocol::MQ | protocol::REPLY_ACK);
}
