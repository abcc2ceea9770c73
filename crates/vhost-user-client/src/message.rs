//! The numbers of vhost-user.rst and of virtio 1.2 that a front-end needs.

/// Requests of a front-end (section "Front-end message types").
pub mod request {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    /// A number that nothing has.
    pub const UNKNOWN: u32 = 4711;
}

/// Requests of a back-end (section "Back-end message types").
pub mod back_end_request {
    /// The configuration space is to be read again.
    pub const CONFIG_CHANGE_MSG: u32 = 2;
}

/// Flags of a header.
pub mod flag {
    /// The only version.
    pub const VERSION: u32 = 1;
    /// It is a reply.
    pub const REPLY: u32 = 1 << 2;
    /// A reply is asked for.
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// Bits of the protocol features.
pub mod protocol {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// Bits of the features: of virtio, of its block device, and those that are between the two ends of the socket.
pub mod feature {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Flags of SET_VRING_ADDR: writes to the used ring are logged.
pub const VRING_F_LOG: u32 = 1;
/// In SET_VRING_KICK, CALL and ERR: no descriptor comes with it.
pub const NO_DESCRIPTOR: u64 = 1 << 8;

/// Types of a virtio-blk request (virtio 1.2, sect. 5.2.6), and its status.
pub mod blk {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const S_OK: u8 = 0;
    pub const S_IOERR: u8 = 1;
    pub const S_UNSUPP: u8 = 2;
    /// What the status byte holds until the device writes it.
    pub const S_UNWRITTEN: u8 = 0xee;
    /// Bytes of a sector.
    pub const SECTOR: u64 = 512;
}
