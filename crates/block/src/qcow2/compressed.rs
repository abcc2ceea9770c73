//! Compressed clusters: read, decoded once, and kept for a while.
//!
//! Locks: the cache's, held only to look and to put.

use std::collections::VecDeque;
use std::io::Read;
use std::rc::Rc;

use cowhand_qcow2::{CompressedRange, Compression};

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
    let result = match compression {
        Compression::Zlib => flate2::read::DeflateDecoder::new(input).read_exact(out),
        Compression::Zstd => {
            // The window never needs to be larger than the cluster; a frame that asks for more is refused before memory is taken.
            let window = (usize::BITS - (out.len().max(1024) - 1).leading_zeros()).max(10);
            zstd::stream::read::Decoder::with_buffer(input).and_then(|mut decoder| {
                decoder.window_log_max(window)?;
                decoder.read_exact(out)
            })
        }
    };
    result.map_err(|e| e.to_string())
}

#[cfg(test)]
#[path = "compressed_test.rs"]
mod tests;
