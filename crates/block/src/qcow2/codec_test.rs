use std::io::Write;

use super::*;

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn decode_zlib_stops_after_one_cluster_of_output_edge_24() {
    let mut input = deflated(&[7u8; 100_000]);
    input.extend([0xee; 300]);
    let mut out = vec![0u8; 65536];
    decode(Compression::Zlib, &input, &mut out).unwrap();
    assert!(out.iter().all(|&b| b == 7));
}

#[test]
fn decode_zlib_with_a_window_beyond_4096_works_edge_24() {
    let mut content: Vec<u8> = (0..20_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let copy = content.clone();
    content.extend(copy);
    let mut out = vec![0u8; content.len()];
    decode(Compression::Zlib, &deflated(&content), &mut out).unwrap();
    assert_eq!(out, content);
}

#[test]
fn decode_short_input_returns_error() {
    let input = deflated(&[7u8; 1000]);
    let mut out = vec![0u8; 65536];
    assert!(decode(Compression::Zlib, &input, &mut out).is_err());
    assert!(decode(Compression::Zstd, &[1, 2, 3], &mut out).is_err());
}

#[test]
fn decode_zstd_bomb_stays_within_a_cluster_edge_27() {
    let input = zstd::stream::encode_all(&vec![0u8; 64 << 20][..], 1).unwrap();
    let mut out = vec![1u8; 65536];
    // Either the window is refused, or one cluster comes out; in no case more.
    let _ = decode(Compression::Zstd, &input, &mut out);
}

/// The token of a deflate stream that reaches back farthest, in bytes: a decoder that only looks.
fn farthest(stream: &[u8]) -> usize {
    let mut bits = Bits { stream, at: 0 };
    let (mut out, mut farthest) = (0usize, 0);
    loop {
        let last = bits.take(1) == 1;
        let (literals, distances) = match bits.take(2) {
            0 => {
                bits.at = bits.at.next_multiple_of(8);
                let len = bits.take(16);
                bits.at += 16 + 8 * len;
                out += len;
                if last {
                    return farthest;
                }
                continue;
            }
            1 => {
                let fixed: Vec<u8> = (0..288)
                    .map(|i| [8, 9, 7, 8][(i > 143) as usize + (i > 255) as usize + (i > 279) as usize])
                    .collect();
                (Code::new(&fixed), Code::new(&[5; 30]))
            }
            2 => bits.tables(),
            other => panic!("block type {other}"),
        };
        loop {
            let symbol = bits.symbol(&literals);
            match symbol {
                0..=255 => out += 1,
                256 => break,
                _ => {
                    let len = LENGTHS[symbol - 257] + bits.take(LENGTH_BITS[symbol - 257]);
                    let code = bits.symbol(&distances);
                    let extra = (code / 2).saturating_sub(1);
                    let base = if code < 4 { code + 1 } else { ((2 + code % 2) << extra) + 1 };
                    let distance = base + bits.take(extra);
                    assert!(distance <= out, "reaches back before the start");
                    farthest = farthest.max(distance);
                    out += len;
                }
            }
        }
        if last {
            return farthest;
        }
    }
}

const LENGTHS: [usize; 29] =
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const LENGTH_BITS: [usize; 29] =
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const LENGTH_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

struct Bits<'a> {
    stream: &'a [u8],
    at: usize,
}

/// A Huffman code: how many symbols have each length, and the symbols in order.
struct Code {
    counts: [usize; 16],
    symbols: Vec<usize>,
}

impl Code {
    fn new(lengths: &[u8]) -> Self {
        let mut counts = [0; 16];
        lengths.iter().for_each(|&len| counts[len as usize] += 1);
        let mut symbols: Vec<usize> = (0..lengths.len()).filter(|&i| lengths[i] > 0).collect();
        symbols.sort_by_key(|&i| lengths[i]);
        Self { counts, symbols }
    }
}

impl Bits<'_> {
    fn take(&mut self, count: usize) -> usize {
        (0..count).fold(0, |value, i| {
            let bit = self.stream[self.at / 8] >> (self.at % 8) & 1;
            self.at += 1;
            value | usize::from(bit) << i
        })
    }

    fn symbol(&mut self, code: &Code) -> usize {
        let (mut value, mut first, mut index) = (0, 0, 0);
        for len in 1..16 {
            value |= self.take(1);
            let count = code.counts[len];
            if value < first + count {
                return code.symbols[index + value - first];
            }
            index += count;
            first = (first + count) << 1;
            value <<= 1;
        }
        panic!("no such code");
    }

    fn tables(&mut self) -> (Code, Code) {
        let (literals, distances, codes) = (self.take(5) + 257, self.take(5) + 1, self.take(4) + 4);
        let mut lengths = [0; 19];
        LENGTH_ORDER.iter().take(codes).for_each(|&i| lengths[i] = self.take(3) as u8);
        let code = Code::new(&lengths);
        let mut lengths: Vec<u8> = Vec::new();
        while lengths.len() < literals + distances {
            let (value, times) = match self.symbol(&code) {
                16 => (*lengths.last().unwrap(), 3 + self.take(2)),
                17 => (0, 3 + self.take(3)),
                18 => (0, 11 + self.take(7)),
                len => (len as u8, 1),
            };
            lengths.extend(std::iter::repeat_n(value, times));
        }
        (Code::new(&lengths[..literals]), Code::new(&lengths[literals..]))
    }
}

fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed;
    let byte = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(byte).collect()
}

/// Clusters of several sorts, with much that comes again: soon, and farther back than any window.
fn clusters(size: usize) -> Vec<Vec<u8>> {
    let mut all = vec![vec![0; size], (0..size).map(|i| (i / 7) as u8).collect()];
    for distance in [100, 2000, 3834, 3835, 4095, 4096, 4097, 8000, 20_000, 32_768] {
        all.push(noise(distance as u32, distance).into_iter().cycle().take(size).collect());
    }
    let words = noise(9, 60 * 40);
    all.push((0..size).map(|i| words[(i / 40 * 7919 % 60) * 40 + i % 40]).collect());
    all
}

#[test]
fn encode_zlib_never_reaches_back_beyond_4096_edge_24() {
    // The looking decoder sees it where it is so.
    let far: Vec<u8> = clusters(65536).swap_remove(8);
    assert!(farthest(&deflated(&far)) > 4096);
    let mut reached = 0;
    for size in [512, 4096, 65536, 2 << 20] {
        for cluster in clusters(size) {
            let Some((out, len)) = encode(Compression::Zlib, &cluster) else { continue };
            reached = reached.max(farthest(&out[..len]));
        }
    }
    assert!((3000..=4096).contains(&reached), "{reached}");
}

#[test]
fn what_is_encoded_is_decoded_as_it_was_edge_24() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        for size in [512, 4096, 65536, 2 << 20] {
            for cluster in clusters(size) {
                let Some((out, len)) = encode(compression, &cluster) else { continue };
                let mut back = vec![1; size];
                decode(compression, &out[..len], &mut back).unwrap();
                assert!(back == cluster);
            }
        }
    }
}

#[test]
fn what_does_not_shrink_is_not_encoded_and_leaves_the_encoder_as_it_was() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        for size in [512, 65536, 2 << 20] {
            // Each that does not shrink is followed by one that does.
            for (i, cluster) in clusters(size).into_iter().enumerate() {
                assert!(encode(compression, &noise(i as u32, size)).is_none());
                let Some((out, len)) = encode(compression, &cluster) else { continue };
                let mut back = vec![1; size];
                decode(compression, &out[..len], &mut back).unwrap();
                assert!(back == cluster);
            }
        }
    }
}

#[test]
#[ignore = "a tool: COWHAND_SAMPLE=file shows how small and how fast (build with --release)"]
fn speed() {
    let sample = std::fs::read(std::env::var("COWHAND_SAMPLE").unwrap()).unwrap();
    for compression in [Compression::Zlib, Compression::Zstd] {
        let (begin, mut bytes) = (std::time::Instant::now(), 0);
        for cluster in sample.chunks_exact(65536) {
            bytes += encode(compression, cluster).map_or(65536, |(_, len)| len);
        }
        let speed = sample.len() as f64 / 1e6 / begin.elapsed().as_secs_f64();
        println!("{compression:?}: {} to {bytes} bytes, {speed:.0} MB/s on one processor", sample.len());
    }
}
