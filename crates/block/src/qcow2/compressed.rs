//! Reading compressed clusters: each is decoded once, however many wait for it, and kept for a while.
//!
//! A cluster that is asked for alone is decoded by the queue's own thread, where handing it over would cost more than it saves;
//! several go to the pool that computes, side by side. So does a large one, so that no image can hold a queue's thread for long: what
//! is decoded there is one cluster of at most [`INLINE_BYTES`], from hardly more bytes than that.
//!
//! Memory: each cluster that is being decoded takes its size for what comes out, and at most twice that for what goes in; a queue
//! decodes a bounded number at once.
//!
//! Locks: the cache's, held only to look and to put.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use cowhand_qcow2::{CompressedRange, HostOffset};

use super::{Image, codec};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::queue::Queue;
use crate::sync::{Arc, Mutex, enlist};

/// About how many bytes of decoded clusters an image keeps.
const KEPT_BYTES: u64 = 1 << 20;

/// The largest cluster that a queue's thread decodes itself: that takes it about a tenth of a millisecond, twice what the way to the
/// pool and back does.
const INLINE_BYTES: u64 = 64 << 10;

/// Decoded clusters, most recently used last, by where their compressed bytes lie; and those that are being decoded.
#[derive(Default)]
pub(super) struct DecodedCache(Mutex<Decoded>);

#[derive(Default)]
struct Decoded {
    entries: VecDeque<(CompressedRange, Arc<Buffer>)>,
    decoding: Vec<(CompressedRange, Arc<Decoding>)>,
}

/// A cluster that is being decoded.
#[derive(Default)]
struct Decoding(Mutex<Progress>);

#[derive(Default)]
struct Progress {
    /// Nobody decodes it any more.
    over: bool,
    /// None as well if that failed.
    decoded: Option<Arc<Buffer>>,
    waiting: Vec<Waker>,
}

/// What a look into the cache says.
enum Found<'a> {
    Decoded(Arc<Buffer>),
    /// Somebody else decodes it.
    Coming(Arc<Decoding>),
    /// Who asked is to decode it.
    Task(Decoder<'a>),
}

/// Who decodes a cluster holds this; those who wait hear of its end.
struct Decoder<'a> {
    cache: &'a DecodedCache,
    range: CompressedRange,
    decoding: Arc<Decoding>,
}

impl DecodedCache {
    fn find(&self, range: CompressedRange) -> Found<'_> {
        let mut cache = self.0.lock();
        if let Some(at) = cache.entries.iter().position(|(key, _)| *key == range)
            && let Some(entry) = cache.entries.remove(at)
        {
            let found = entry.1.clone();
            cache.entries.push_back(entry);
            return Found::Decoded(found);
        }
        if let Some((_, decoding)) = cache.decoding.iter().find(|(key, _)| *key == range) {
            return Found::Coming(decoding.clone());
        }
        let decoding = Arc::<Decoding>::default();
        cache.decoding.push((range, decoding.clone()));
        Found::Task(Decoder { cache: self, range, decoding })
    }

    /// Another cluster comes to lie at `host`: what was decoded from there is no longer what lies there. All requests that could
    /// still read the old one have ended.
    pub(super) fn forget(&self, host: HostOffset) {
        self.0.lock().entries.retain(|(range, _)| range.host != host);
    }
}

impl Decoder<'_> {
    fn succeed(&self, decoded: &Arc<Buffer>) {
        let keep = (KEPT_BYTES / decoded.len().max(1) as u64).max(1) as usize;
        let mut cache = self.cache.0.lock();
        while cache.entries.len() >= keep {
            cache.entries.pop_front();
        }
        cache.entries.push_back((self.range, decoded.clone()));
        drop(cache);
        self.decoding.0.lock().decoded = Some(decoded.clone());
    }
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        self.cache.0.lock().decoding.retain(|(_, decoding)| !Arc::ptr_eq(decoding, &self.decoding));
        let waiting = {
            let mut progress = self.decoding.0.lock();
            progress.over = true;
            std::mem::take(&mut progress.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Decoding {
    /// Waits for who decodes it; None if he failed, or was given up.
    async fn end(&self) -> Option<Arc<Buffer>> {
        poll_fn(|cx| {
            let mut progress = self.0.lock();
            if progress.over {
                return Poll::Ready(progress.decoded.clone());
            }
            enlist(&mut progress.waiting, cx.waker());
            Poll::Pending
        })
        .await
    }
}

impl Image {
    /// A compressed cluster's content.
    pub(super) async fn decoded(&self, queue: &Rc<Queue>, range: CompressedRange) -> Result<Arc<Buffer>> {
        loop {
            match self.decoded.find(range) {
                Found::Decoded(found) => return Ok(found),
                Found::Coming(decoding) => {
                    if let Some(found) = decoding.end().await {
                        return Ok(found);
                    }
                }
                Found::Task(decoder) => {
                    let decoded = Arc::new(self.decode(queue, range).await?);
                    decoder.succeed(&decoded);
                    return Ok(decoded);
                }
            }
        }
    }

    async fn decode(&self, queue: &Rc<Queue>, range: CompressedRange) -> Result<Buffer> {
        let place = range.host.get();
        let error = |e| self.io_error("cannot read a compressed cluster", place, e);
        // The last sector may lie past the end of the file: it reads as zeros, which no decoder looks at. (Sharp edge 25.)
        let read = || queue.read_buffer(&self.file, place, range.len as usize);
        // Another image in the file's place takes permits for its own clusters, and would wait for ours for ever.
        let early = if self.file.layer().is_some() { Some(read().await.map_err(error)?) } else { None };
        let _permit = queue.permit().await;
        let bytes = match early {
            Some(bytes) => bytes,
            None => read().await.map_err(error)?,
        };
        let compression = self.header.lock().header.compression;
        let size = self.cluster_size();
        let work = move || {
            let mut decoded = Buffer::zeroed(size as usize);
            codec::decode(compression, &bytes, &mut decoded).map(|()| decoded)
        };
        let inline = queue.is_quiet() && size <= INLINE_BYTES && range.len <= size + 512;
        let decoded = if inline { work() } else { queue.compute(work).await.map_err(error)? };
        decoded.map_err(|what| {
            let message = format!("the image is damaged: a compressed cluster cannot be decoded: {what}");
            Error::new(ErrorKind::Corrupt, message).at_path(&self.path).at_offset(place)
        })
    }
}

#[cfg(test)]
#[path = "compressed_test.rs"]
mod tests;
