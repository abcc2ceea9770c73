//! Another header in the place of one in use: another version, backing file, refcount width.
//!
//! As in [`super::switch`], what lies behind the first sector is laid where the old header has nothing, and then the first sector is
//! switched. Here the name of the backing file may move, too.
//!
//! Not here: making each step durable before the next.

use super::Header;
use super::switch::{HeaderSwitch, Laid, NAME_OFFSET_AT, SECTOR};
use crate::error::FormatError;

/// Bytes of the mark that ends the extensions.
const MARK: usize = 8;

impl Header {
    /// How this header takes the place of `old`, with which the image's first cluster, `area`, begins now. They may differ in
    /// everything but the cluster size.
    ///
    /// # Errors
    /// There is no room that a power cut could not tear; a field has a value that parsing would refuse.
    pub fn replace(&self, old: &Header, area: &[u8]) -> Result<HeaderSwitch, FormatError> {
        let switch = self.replace_once(old, area)?;
        Ok(self.name_features(switch, |old, area| self.replace_once(old, area)))
    }

    fn replace_once(&self, old: &Header, area: &[u8]) -> Result<HeaderSwitch, FormatError> {
        let size = 1usize << self.cluster_bits.bits();
        let mut bytes = area.to_vec();
        bytes.resize(size, 0);
        let laid = old.laid_in(bytes);
        let mut full = FormatError::HeaderFull { needed: 0, available: size as u64 };
        for mut wanted in self.arrangements() {
            wanted.header_length = wanted.encoded_header_length();
            let encoded = match wanted.encode() {
                Ok(encoded) => encoded,
                Err(e @ FormatError::HeaderFull { .. }) => {
                    full = e;
                    continue;
                }
                Err(e) => return Err(e),
            };
            // Fields past the first sector have no other place.
            let far = old.header_length.max(wanted.header_length) as usize > SECTOR;
            if far && old.header_length != wanted.header_length {
                continue;
            }
            for new in wanted.places(&laid, &encoded) {
                // Only version 3 has a bit that takes the bitmaps out of use.
                let plain = old.version >= 3 && wanted.version >= 3;
                let steps = if plain { laid.steps_to(&new) } else { laid.without_bitmaps().steps_to(&new) };
                if let Some(steps) = steps {
                    return Ok(HeaderSwitch { steps, header: wanted, area: new.bytes });
                }
            }
        }
        Err(full)
    }

    /// This header over `old`, with the backing file's name at each place that may do.
    fn places(&self, old: &Laid, encoded: &[u8]) -> Vec<Laid> {
        let name = self.backing_name.as_deref().unwrap_or_default();
        let chain: usize = self.extensions.iter().map(|e| e.encoded_len()).sum();
        let behind = self.header_length as usize + chain + MARK;
        let size = old.bytes.len();
        let mut places = vec![behind];
        if !name.is_empty() {
            places.push(behind.max(old.chain.1).max(old.name.1).next_multiple_of(8));
            places.push(size.saturating_sub(name.len()) & !7);
        }
        let fits = |at: &usize| *at >= behind && *at + name.len() <= size;
        let lay = |at: usize| {
            let mut bytes = old.bytes.clone();
            bytes.get_mut(..behind)?.copy_from_slice(encoded.get(..behind)?);
            if !name.is_empty() {
                bytes.get_mut(at..at + name.len())?.copy_from_slice(name);
                bytes.get_mut(NAME_OFFSET_AT..NAME_OFFSET_AT + 8)?.copy_from_slice(&(at as u64).to_be_bytes());
            }
            Some(self.laid_in(bytes))
        };
        places.into_iter().filter(fits).filter_map(lay).collect()
    }
}

#[cfg(test)]
#[path = "replace_test.rs"]
mod tests;
