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
