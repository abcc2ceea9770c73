//! Headers: whatever the bytes, parsing ends without a panic, and what it accepts is written back as it was.
//!
//! The input is the start of an image; the rest of its first cluster is zeros.

#![no_main]

mod memory;

use cowhand_qcow2::{FormatError, Header};
use libfuzzer_sys::fuzz_target;

/// Far more than any table that a header can point to.
const FILE_LEN: u64 = 1 << 50;

fuzz_target!(|data: &[u8]| {
    // As the whole file, too short for what it claims.
    let _ = Header::parse(data, data.len() as u64);
    let _ = Header::parse_for_check(data, data.len() as u64);

    let Ok(cluster_size) = Header::needed_len(data) else { return };
    let mut cluster = data.to_vec();
    cluster.resize(cluster_size, 0);
    let Ok(header) = Header::parse(&cluster, FILE_LEN) else { return };
    let sector = header.encode_fixed(&cluster).expect("a parsed header goes back to where it came from");
    assert_eq!(Header::parse(&sector, FILE_LEN).as_ref(), Ok(&header));

    let mut encoded = match header.encode() {
        Err(FormatError::HeaderFull { .. }) => return,
        other => other.expect("a parsed header is written"),
    };
    encoded.resize(cluster_size, 0);
    let again = Header::parse(&encoded, FILE_LEN).expect("a written header is read");
    // Rounding header_length up to 8 makes new fields, of zeros.
    let mut expected = Header { header_length: again.header_length, ..header };
    expected.unknown_fields.resize(again.unknown_fields.len(), 0);
    assert_eq!(again, expected);
});
