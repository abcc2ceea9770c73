//! Compressed clusters: read, decoded once, and kept for a while.
//!
//! Locks: the cache's, held only to look and to put.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::Read;
use std::rc::Rc;

use cowhand_qcow2::{CompressedRange, Compression};
use zstd::stream::raw::{self, Operation as _};

use super::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::queue::Queue;
use crate::sync::{Arc, Mutex};

/// About how many bytes of decoded clusters an image keeps.
const KEPT_BYTES: u64 = 1 << 20;

/// Decoded clusters, most recently used last, by where their compressed bytes lie.
#[derive(Default)]
pub(super) struct DecodedCache {
    entries: Mutex<VecDeque<(CompressedRange, Arc<Buffer>)>>,
}

impl DecodedCache {
    fn get(&self, range: CompressedRange) -> Option<Arc<Buffer>> {
        let mut entries = self.entries.lock();
        let at = entries.iter().position(|(key, _)| *key == range)?;
        let entry = entries.remove(at)?;
        let found = entry.1.clone();
        entries.push_back(entry);
        Some(found)
    }

    fn put(&self, range: CompressedRange, decoded: Arc<Buffer>) {
        let keep = (KEPT_BYTES / decoded.len().max(1) as u64).max(1) as usize;
        let mut entries = self.entries.lock();
        while entries.len() >= keep {
            entries.pop_front();
        }
        entries.push_back((range, decoded));
    }
}

impl Image {
    /// A compressed cluster's content.
    pub(super) async fn decoded(&self, queue: &Rc<Queue>, range: CompressedRange) -> Result<Arc<Buffer>> {
        if let Some(found) = self.decoded.get(range) {
            return Ok(found);
        }
        let place = range.host.get();
        // The last sector may lie past the end of the file: it reads as zeros, which no decoder looks at. (Sharp edge 25.)
        let read = queue.read_buffer(&self.file, place, range.len as usize).await;
        let bytes = read.map_err(|e| self.io_error("cannot read a compressed cluster", place, e))?;
        let compression = self.header.lock().header.compression;
        let mut decoded = Buffer::zeroed(self.cluster_size() as usize);
        decode(compression, &bytes, &mut decoded).map_err(|what| {
            let message = format!("the image is damaged: a compressed cluster cannot be decoded: {what}");
            Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(place)
        })?;
        let decoded = Arc::new(decoded);
        self.decoded.put(range, decoded.clone());
        Ok(decoded)
    }
}

/// Decodes exactly `out.len()` bytes; what the input holds beyond is ignored, so that no input costs more than one cluster.
fn decode(compression: Compression, input: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    DECODERS.with_borrow_mut(|decoders| match compression {
        Compression::Zlib => decoders.zlib(input, out),
        Compression::Zstd => decoders.zstd(input, out),
    })
}

thread_local! {
    static DECODERS: RefCell<Decoders> = RefCell::default();
}

/// A thread's decoders, made once: setting one up takes a good part of what decoding a cluster does.
#[derive(Default)]
struct Decoders {
    zlib: Option<libdeflater::Decompressor>,
    zstd: Option<raw::Decoder<'static>>,
}

impl Decoders {
    fn zlib(&mut self, input: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
        let decoder = self.zlib.get_or_insert_with(libdeflater::Decompressor::new);
        if decoder.deflate_decompress(input, out) == Ok(out.len()) {
            return Ok(());
        }
        // It takes only streams that end with the cluster. Those that go on are fine (sharp edge 24), and rare.
        flate2::read::DeflateDecoder::new(input).read_exact(out).map_err(|e| e.to_string())
    }

    fn zstd(&mut self, input: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
        let text = |e: std::io::Error| e.to_string();
        let decoder = match &mut self.zstd {
            Some(decoder) => decoder,
            none => none.insert(raw::Decoder::new().map_err(text)?),
        };
        decoder.reinit().map_err(text)?;
        // The window never needs to be larger than the cluster; a frame that asks for more is refused before memory is taken.
        let window = (usize::BITS - (out.len().max(1024) - 1).leading_zeros()).max(10);
        decoder.set_parameter(raw::DParameter::WindowLogMax(window)).map_err(text)?;
        let (mut input, mut out) = (raw::InBuffer::around(input), raw::OutBuffer::around(out));
        while out.pos() < out.capacity() {
            let before = (input.pos(), out.pos());
            decoder.run(&mut input, &mut out).map_err(text)?;
            if (input.pos(), out.pos()) == before {
                return Err("the data ends before the cluster does".into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "compressed_test.rs"]
mod tests;
