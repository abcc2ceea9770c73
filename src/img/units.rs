//! Sizes as QEMU reads and shows them.

/// Why a size cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// It is none.
    Malformed,
    /// It is over 2^63 - 1.
    TooLarge,
}

/// A size in bytes: `1024`, `0x400`, `1k`, `1.5G`, with B, K, M, G, T, P or E for powers of 1024; without a suffix it counts in
/// `unit` bytes.
pub(crate) fn parse_size(text: &str, unit: u64) -> Result<u64, SizeError> {
    let text = text.trim_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    let value = if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // A suffix would be a digit, or could be taken for one.
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(SizeError::Malformed);
        }
        let value = u128::from_str_radix(digits, 16).map_err(|_| SizeError::TooLarge)?;
        value.checked_mul(unit.into()).ok_or(SizeError::TooLarge)?
    } else {
        decimal(text, unit)?
    };
    u64::try_from(value).ok().filter(|&v| v <= i64::MAX as u64).ok_or(SizeError::TooLarge)
}

fn decimal(text: &str, unit: u64) -> Result<u128, SizeError> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let multiplier = match suffix {
        "" => u128::from(unit),
        "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return Err(SizeError::Malformed),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits_only = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    // Of a byte there are no parts.
    let in_bytes = multiplier == 1 && fraction.bytes().any(|digit| digit != b'0');
    if (whole.is_empty() && fraction.is_empty()) || !digits_only(fraction) || in_bytes {
        return Err(SizeError::Malformed);
    }
    let whole = if whole.is_empty() { "0" } else { whole };
    let whole: u128 = whole.parse().map_err(|_| SizeError::TooLarge)?;
    // As many digits as matter: beyond them nothing is as large as a byte.
    let digits = &fraction[..fraction.len().min(18)];
    let part: u128 = if digits.is_empty() { 0 } else { digits.parse().map_err(|_| SizeError::Malformed)? };
    let scale = 10u128.pow(digits.len() as u32);
    let part = (part * multiplier + scale / 2) / scale;
    whole.checked_mul(multiplier).and_then(|bytes| bytes.checked_add(part)).ok_or(SizeError::TooLarge)
}

/// A size for people, as QEMU writes it: three digits, in the unit below which it would be over 1000.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // 1000 of a unit are shown in the next one: 0.977 KiB rather than 1000 B.
    let mut index = 0;
    while index + 1 < UNITS.len() && bytes as f64 / 2f64.powi(10 * index as i32) >= 1000.0 {
        index += 1;
    }
    format!("{} {}B", three_digits(bytes as f64 / 2f64.powi(10 * index as i32)), UNITS[index])
}

/// C's `%0.3g`, for numbers from 0 to 9999.
pub(crate) fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    // The exponent after rounding to three digits.
    let scientific = format!("{value:.2e}");
    let exponent: i32 = scientific.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
    if !(-4..3).contains(&exponent) {
        let (digits, _) = scientific.split_once('e').unwrap_or((&scientific, ""));
        let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let text = format!("{value:.*}", (2 - exponent).max(0) as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

#[cfg(test)]
#[path = "units_test.rs"]
mod tests;
