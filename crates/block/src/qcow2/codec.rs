//! The two codecs of compressed clusters: zlib (which is raw deflate) and zstd.
//!
//! Not here: where compressed clusters lie, and which thread does the work ([`super::compressed`], [`super::compress`]).

use std::cell::RefCell;
use std::io::Read;

use cowhand_qcow2::Compression;
use flate2::{Compress, FlushCompress, Status};
use zstd::stream::raw::{self, Operation as _};

use crate::io::Buffer;

/// The base-two logarithm of the farthest that deflate may reach back: QEMU's, and all that some readers take. (Sharp edge 24.)
const WINDOW_BITS: u8 = 12;

/// What gives images of the size that QEMU's have: zlib-rs takes shortcuts at zlib's default, 6, that make them 3 % larger.
const ZLIB_LEVEL: u32 = 7;

/// zstd's own default, as QEMU's.
const ZSTD_LEVEL: i32 = 3;

/// Decodes exactly `out.len()` bytes; what the input holds beyond is ignored, so that no input costs more than one cluster.
pub(super) fn decode(compression: Compression, input: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    DECODERS.with_borrow_mut(|decoders| match compression {
        Compression::Zlib => decoders.zlib(input, out),
        Compression::Zstd => decoders.zstd(input, out),
    })
}

/// Encodes `input`, a cluster: a buffer that begins with what came of it, and how many bytes that is. None if they are not fewer.
pub(super) fn encode(compression: Compression, input: &[u8]) -> Option<(Buffer, usize)> {
    // Room for what grows, too: deflate never makes nine bits of eight, and little else. An encoder that ran out of room is not to be
    // trusted with another cluster (zlib-rs 0.6 keeps what it could not hand out).
    let mut out = Buffer::zeroed(input.len() + input.len() / 4 + 512);
    let len = ENCODERS.with_borrow_mut(|encoders| match compression {
        Compression::Zlib => encoders.zlib(input, &mut out),
        Compression::Zstd => encoders.zstd(input, &mut out),
    })?;
    (len < input.len()).then_some((out, len))
}

thread_local! {
    static DECODERS: RefCell<Decoders> = RefCell::default();
    static ENCODERS: RefCell<Encoders> = RefCell::default();
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

/// A thread's encoders, made once: each has tables of some hundred kilobytes.
#[derive(Default)]
struct Encoders {
    zlib: Option<Compress>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Encoders {
    fn zlib(&mut self, input: &[u8], out: &mut [u8]) -> Option<usize> {
        let level = flate2::Compression::new(ZLIB_LEVEL);
        let encoder = self.zlib.get_or_insert_with(|| Compress::new_with_window_bits(level, false, WINDOW_BITS));
        encoder.reset();
        let ended = encoder.compress(input, out, FlushCompress::Finish);
        let len = encoder.total_out() as usize;
        if !matches!(ended, Ok(Status::StreamEnd)) {
            self.zlib = None;
            return None;
        }
        Some(len)
    }

    /// One frame that says how long its content is, without a checksum: what QEMU writes.
    fn zstd(&mut self, input: &[u8], out: &mut [u8]) -> Option<usize> {
        let encoder = match &mut self.zstd {
            Some(encoder) => encoder,
            none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
        };
        encoder.compress_to_buffer(input, out).ok()
    }
}

#[cfg(test)]
#[path = "codec_test.rs"]
mod tests;
