//! Messages to the front-end (section "Back-end message types"): so far the one that says that the configuration has changed.
//!
//! This layer is here because `vhost` 0.18 has no such message, and its `Backend` hides the socket on which it would go. So the socket's
//! descriptor is taken a second time while its message (SET_BACKEND_REQ_FD) still waits to be handled (`connection` looks ahead).
//! When `vhost` grows the message this room can go.

use std::os::fd::OwnedFd;

use rustix::net::{SendFlags, send};

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// The version of a header, in its flags; no reply is asked for, so that a front-end that gives none cannot hold us up.
const VERSION_1: u32 = 1;

/// The way to the front-end, once it has opened one.
#[derive(Debug, Default)]
pub(crate) struct FrontEnd {
    socket: Option<OwnedFd>,
}

impl FrontEnd {
    /// From now on messages go there.
    pub(crate) fn set_socket(&mut self, socket: OwnedFd) {
        self.socket = Some(socket);
    }

    /// Tells the front-end to read the configuration space again. Without a way to it nothing happens: it then has to look by itself.
    pub(crate) fn config_changed(&self) {
        let Some(socket) = &self.socket else { return };
        let [request, flags] = [CONFIG_CHANGE, VERSION_1].map(u32::to_ne_bytes);
        let mut message = [0; 12];
        // The header's third field, the size of the payload, stays 0.
        message[..4].copy_from_slice(&request);
        message[4..8].copy_from_slice(&flags);
        match send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => tracing::debug!("the front-end was told of a new configuration"),
            Err(error) => tracing::warn!("the front-end cannot be told of a new configuration: {error}"),
        }
    }
}
