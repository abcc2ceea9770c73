//! Sizes as QEMU reads and shows them.

pub(crate) use cowhand_block::size::{SizeError, parse_size};

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
