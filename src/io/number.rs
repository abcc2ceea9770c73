//! Numbers as they are written and shown: patterns, amounts for people, and what is said of words that are no sizes.

use cowhand_block::size::SizeError;

/// The most that one request may name, in bytes.
pub(crate) const REQUEST_MAX: u64 = (1 << 31) - 512;

/// What is said of a word that is no size.
pub(crate) fn no_size(word: &str, error: SizeError) -> String {
    match error {
        SizeError::Malformed => {
            format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {word}")
        }
        SizeError::TooLarge => format!("Parsing error: argument too large -- {word}"),
    }
}

/// Reads a whole number as C's `strtol` does with base 0: octal after a 0, hexadecimal after 0x.
pub(crate) fn integer(word: &str) -> Option<i64> {
    let text = word.trim_start();
    let (digits, negative) = match text.strip_prefix('-') {
        Some(rest) => (rest, true),
        None => (text.strip_prefix('+').unwrap_or(text), false),
    };
    if digits.starts_with(['-', '+']) {
        return None;
    }
    let value = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => i64::from_str_radix(Some(digits).filter(|digits| !digits.starts_with(['-', '+']))?, 16),
        None if digits.len() > 1 && digits.starts_with('0') => i64::from_str_radix(&digits[1..], 8),
        None => digits.parse(),
    };
    value.ok().map(|value| if negative { -value } else { value })
}

/// Reads the value of a byte.
pub(crate) fn pattern(word: &str) -> Option<u8> {
    integer(word).and_then(|value| value.try_into().ok())
}

/// Shows an amount of bytes for people: `64 KiB`, `1.500 KiB`.
pub(crate) fn amount(value: f64) -> String {
    const UNITS: [(u32, &str); 6] =
        [(60, " EiB"), (50, " PiB"), (40, " TiB"), (30, " GiB"), (20, " MiB"), (10, " KiB")];
    let unit = UNITS.iter().find(|(shift, _)| value >= (1_u64 << shift) as f64);
    let (mut text, suffix) = match unit {
        Some((shift, suffix)) => (format!("{:.3}", value / (1_u64 << shift) as f64), *suffix),
        None => (float(value), " bytes"),
    };
    if let Some(end) = text.find(".000") {
        text.truncate(end);
    }
    text + suffix
}

/// A number with six places, as C shows it.
fn float(value: f64) -> String {
    if value.is_finite() {
        return format!("{value:.6}");
    }
    match (value.is_nan(), value < 0.0) {
        (true, _) => "-nan".into(),
        (false, true) => "-inf".into(),
        (false, false) => "inf".into(),
    }
}

#[cfg(test)]
#[path = "number_test.rs"]
mod tests;
