//! LUKS headers: whatever the bytes, parsing and unlocking end without a panic, and what is accepted is written back as
//! it was.
//!
//! The input is the area that a header extension points to.

#![no_main]

mod memory;

use cowhand_qcow2::luks::Header;
use cowhand_qcow2::{HostOffset, LuksError, LuksExtension};
use libfuzzer_sys::fuzz_target;

/// More than this is as good for finding mistakes, and only slower.
const ITERATIONS: u32 = 4;

fuzz_target!(|data: &[u8]| {
    // As if the key material were there, past the input's end.
    let area = LuksExtension { offset: HostOffset::new(0x10000), len: 4 << 20 };
    let Ok(header) = Header::parse(data, area) else { return };
    assert_eq!(header.encode(), data[..Header::LEN]);
    assert!(header.unlock_len() <= area.len);
    let _ = format!("{header:?}");

    let slow = header.slots().iter().any(|slot| slot.active && slot.iterations > ITERATIONS);
    if slow || header.digest_iterations() > ITERATIONS {
        return;
    }
    let mut area = data.to_vec();
    area.resize(header.unlock_len() as usize, 0x55);
    let error = header.unlock(&area, b"secret").expect_err("nobody guesses the digest");
    assert!(matches!(error, LuksError::NoSlotOpens | LuksError::NoActiveSlot), "{error}");
    // Key material that is not there.
    let _ = header.unlock(data, b"secret");
});
