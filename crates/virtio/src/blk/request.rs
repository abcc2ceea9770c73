//! One request: from a descriptor chain to what the engine is asked, or to the status that it fails with (sect. 5.2.6).
//!
//! Header, data and status may be cut into descriptors in any way. Nothing here touches the engine or the rings.

use cowhand_block::Request;
use cowhand_block::io::IoSeg;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions};

use super::SECTOR;
use super::settings::BlockSettings;
use crate::chain::{Chain, Span, part};

/// Bytes of the header: type, reserved, sector.
const HEADER_LEN: u64 = 16;
/// Bytes of one range of a discard or a write-zeroes request.
const RANGE_LEN: u64 = 16;
const RANGE_UNMAP: u32 = 1;
/// The most ranges in one request.
pub(super) const MAX_RANGES: u32 = 32;

/// The status byte of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure(pub u8);

const IOERR: Failure = Failure(VIRTIO_BLK_S_IOERR as u8);
const UNSUPP: Failure = Failure(VIRTIO_BLK_S_UNSUPP as u8);

/// What a chain asks for.
#[derive(Debug)]
pub(super) enum Parsed {
    /// One or several engine requests, which are in the list of requests that was passed.
    Submit {
        /// Whether they write, so that without a write cache a flush has to follow.
        writes: bool,
    },
    /// Done already, with so many bytes written before the status.
    Done {
        /// Bytes of data.
        len: u32,
    },
}

/// What requests are judged by.
pub(super) struct Context<'a> {
    pub memory: &'a GuestMemoryMmap,
    /// The disk's size in bytes.
    pub size: u64,
    pub read_only: bool,
    /// The most bytes of one discard or write-zeroes range.
    pub max_discard: u64,
    pub settings: &'a BlockSettings,
}

impl Context<'_> {
    /// Takes a chain with a status byte apart. Engine requests are appended to `requests` (empty before), their segment lists
    /// are taken from `pool`.
    ///
    /// # Safety
    /// The guest memory behind [`Context::memory`] stays mapped until the engine has completed the requests, or its queue
    /// has been dropped.
    pub(super) unsafe fn parse(
        &self,
        chain: &Chain,
        requests: &mut Vec<Request>,
        pool: &mut Vec<Vec<IoSeg>>,
    ) -> Result<Parsed, Failure> {
        if chain.fault().is_some() {
            return Err(IOERR);
        }
        let mut header = [0; HEADER_LEN as usize];
        if !chain.read(self.memory, 0, &mut header).map_err(|_| IOERR)? {
            return Err(IOERR);
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN if chain.readable_len() == HEADER_LEN => {
                // The status byte is the last of what may be written.
                let len = chain.writable_len() - 1;
                let offset = self.offset(sector, len)?;
                if len == 0 {
                    return Ok(Parsed::Done { len: 0 });
                }
                let parts = part(chain.writable(), 0, len);
                // SAFETY: the caller keeps guest memory mapped for as long as the request lives.
                let data = unsafe { self.segments(parts, Permissions::Write, pool) }?;
                requests.push(Request::Read { offset, data });
                Ok(Parsed::Submit { writes: false })
            }
            VIRTIO_BLK_T_OUT if chain.writable_len() == 1 => {
                let len = chain.readable_len() - HEADER_LEN;
                let offset = self.offset(sector, len)?;
                if self.read_only {
                    return Err(IOERR);
                }
                if len == 0 {
                    return Ok(Parsed::Done { len: 0 });
                }
                let parts = part(chain.readable(), HEADER_LEN, len);
                // SAFETY: as above.
                let data = unsafe { self.segments(parts, Permissions::Read, pool) }?;
                requests.push(Request::Write { offset, data });
                Ok(Parsed::Submit { writes: true })
            }
            // The data of a read or a write lies in the wrong direction.
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(IOERR),
            VIRTIO_BLK_T_FLUSH => {
                requests.push(Request::Flush);
                Ok(Parsed::Submit { writes: false })
            }
            VIRTIO_BLK_T_GET_ID => {
                let room = (chain.writable_len() - 1).min(self.settings.id().len() as u64) as usize;
                let len = chain.write(self.memory, 0, &self.settings.id()[..room]).map_err(|_| IOERR)?;
                Ok(Parsed::Done { len: len as u32 })
            }
            VIRTIO_BLK_T_DISCARD if self.settings.discard() => self.ranges(chain, requests, false),
            VIRTIO_BLK_T_WRITE_ZEROES if self.settings.discard() => self.ranges(chain, requests, true),
            _ => Err(UNSUPP),
        }
    }

    /// The byte offset of `len` bytes at `sector`: whole sectors, inside the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(IOERR)?;
        let end = offset.checked_add(len).ok_or(IOERR)?;
        let capacity = self.size / SECTOR * SECTOR;
        if end <= capacity && len.is_multiple_of(SECTOR) { Ok(offset) } else { Err(IOERR) }
    }

    /// The ranges of a discard or a write-zeroes request: all are judged before any is asked for.
    fn ranges(&self, chain: &Chain, requests: &mut Vec<Request>, zero: bool) -> Result<Parsed, Failure> {
        let bytes = chain.readable_len() - HEADER_LEN;
        let count = bytes / RANGE_LEN;
        if self.read_only || !bytes.is_multiple_of(RANGE_LEN) || !(1..=u64::from(MAX_RANGES)).contains(&count) {
            return Err(IOERR);
        }
        for n in 0..count {
            match self.range(chain, HEADER_LEN + n * RANGE_LEN, zero) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => {}
                Err(failure) => {
                    requests.clear();
                    return Err(failure);
                }
            }
        }
        Ok(if requests.is_empty() { Parsed::Done { len: 0 } } else { Parsed::Submit { writes: zero } })
    }

    /// One range: sector, number of sectors, flags. An empty one asks for nothing.
    fn range(&self, chain: &Chain, at: u64, zero: bool) -> Result<Option<Request>, Failure> {
        let mut range = [0; RANGE_LEN as usize];
        if !chain.read(self.memory, at, &mut range).map_err(|_| IOERR)? {
            return Err(IOERR);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // Unmap is a flag of write-zeroes alone (sect. 5.2.6.2).
        if flags & !(if zero { RANGE_UNMAP } else { 0 }) != 0 {
            return Err(UNSUPP);
        }
        let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR;
        let offset = self.offset(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), len)?;
        if len > self.max_discard {
            return Err(IOERR);
        }
        let request = if zero {
            Request::WriteZeroes { offset, len, unmap: flags & RANGE_UNMAP != 0 }
        } else {
            Request::Discard { offset, len }
        };
        Ok((len > 0).then_some(request))
    }

    /// Guest memory as the engine takes it; fails when a part is not in memory, or there are too many of them.
    ///
    /// # Safety
    /// As for [`parse`](Self::parse).
    unsafe fn segments(
        &self,
        parts: impl Iterator<Item = Span>,
        access: Permissions,
        pool: &mut Vec<Vec<IoSeg>>,
    ) -> Result<Vec<IoSeg>, Failure> {
        let mut data = pool.pop().unwrap_or_default();
        for span in parts {
            let Ok(slices) = self.memory.get_slices(span.addr, span.len as usize, access) else {
                return Err(give_back(data, pool));
            };
            for slice in slices {
                let Ok(slice) = slice else {
                    return Err(give_back(data, pool));
                };
                let guard = slice.ptr_guard_mut();
                // SAFETY: the slice is guest memory, mapped readable and writable for `len` bytes; the caller keeps it mapped as
                // long as the request lives, and Rust references to guest memory are never made.
                data.push(unsafe { IoSeg::new(guard.as_ptr(), guard.len()) });
            }
        }
        Ok(data)
    }
}

fn give_back(mut data: Vec<IoSeg>, pool: &mut Vec<Vec<IoSeg>>) -> Failure {
    data.clear();
    pool.push(data);
    IOERR
}
