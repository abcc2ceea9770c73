//! Sizes and times as they are written on the command line.

use std::time::Duration;

/// Reads a size: bytes, or a number with K, M, G or T (powers of 1024), `512M`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let wrong = || "expected a size such as 512M or 2G".to_string();
    let (number, shift) = match text.chars().last().ok_or_else(wrong)?.to_ascii_uppercase() {
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the size is too large".to_string())
}

/// Reads a time: seconds, or a number with us, ms, s, m or h, `60s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time such as 60s or 5m".to_string();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "us" => return Ok(Duration::from_micros(number)),
        "ms" => return Ok(Duration::from_millis(number)),
        "" | "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        _ => return Err(wrong()),
    };
    // What a kernel timer can hold, with room: 68 years.
    seconds.filter(|s| *s <= i32::MAX as u64).map(Duration::from_secs).ok_or_else(|| "the time is too long".to_string())
}

#[cfg(test)]
#[path = "quantity_test.rs"]
mod tests;
