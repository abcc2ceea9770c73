//! Sizes as QEMU reads them, on command lines and in node options.

/// Why a word is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// It is no number, or something follows it.
    Malformed,
    /// It is over 2^63 - 1, or negative.
    TooLarge,
}

/// Reads a size in bytes: hexadecimal, or decimal with a fraction and a suffix (B, or K, M, G, T, P, E for powers of 1024) if it has
/// them. Without a suffix it counts in `unit` bytes.
///
/// # Errors
/// It is none, or too large.
pub fn parse_size(word: &str, unit: u64) -> Result<u64, SizeError> {
    let text = word.trim_start();
    if let Some(number) = text.strip_prefix('-') {
        // Below 0 a number is one only without a fraction and a suffix.
        let whole = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        return Err(if whole { SizeError::TooLarge } else { SizeError::Malformed });
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let value = match text.get(..2) {
        Some("0x" | "0X") if text[2..].starts_with(|c: char| c.is_ascii_hexdigit()) => hexadecimal(&text[2..], unit)?,
        _ => decimal(text, unit)?,
    };
    if value > i64::MAX as u64 { Err(SizeError::TooLarge) } else { Ok(value) }
}

fn hexadecimal(digits: &str, unit: u64) -> Result<u64, SizeError> {
    // A suffix would be a digit, or could be taken for one.
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(SizeError::Malformed);
    }
    let value = u64::from_str_radix(digits, 16).map_err(|_| SizeError::TooLarge)?;
    value.checked_mul(unit).ok_or(SizeError::TooLarge)
}

fn decimal(text: &str, unit: u64) -> Result<u64, SizeError> {
    let end_of_digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(end_of_digits(text));
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(end_of_digits(rest)),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Malformed);
    }
    let unit = match suffix {
        "" => unit,
        "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return Err(SizeError::Malformed),
    };
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| SizeError::TooLarge)? };
    let fraction: f64 = format!("0.{fraction}0").parse().map_err(|_| SizeError::Malformed)?;
    // Of a byte there are no parts.
    if unit == 1 && fraction != 0.0 {
        return Err(SizeError::Malformed);
    }
    let value = whole.checked_mul(unit).ok_or(SizeError::TooLarge)?;
    // Less than a unit, or just that, if the fraction was rounded up.
    value.checked_add((fraction * unit as f64 + 0.5) as u64).ok_or(SizeError::TooLarge)
}

#[cfg(test)]
#[path = "size_test.rs"]
mod tests;
