//! A vhost-user-blk front-end and driver for tests: what a VMM and its guest do, and what they must not do.
//!
//! It shares no code with the back-end: messages are put together here, byte by byte, as QEMU's docs/interop/vhost-user.rst has them, so
//! that what both sides would get wrong alike shows. Nothing is hidden: who wants to send nonsense has [`Wire`], and who wants a ring
//! full of it has [`Ring`] and the [`Guest`]'s memory.
//!
//! - [`message`] has the numbers; [`wire`] carries messages; [`front_end`] makes them of what is wanted;
//! - [`nonsense`] plays what bytes say, for fuzzing;
//! - [`guest`] is the guest's memory; [`ring`] the driver's side of a split virtqueue; [`disk`] the requests of virtio-blk.

pub mod bell;
pub mod disk;
pub mod front_end;
pub mod guest;
pub mod message;
pub mod nonsense;
pub mod ring;
pub mod wire;

pub use bell::Bell;
pub use disk::{Ask, Done, Queue};
pub use front_end::{FrontEnd, Inflight};
pub use guest::{Guest, Region};
pub use ring::{Descriptor, Ring};
pub use wire::{Reply, Wire};
