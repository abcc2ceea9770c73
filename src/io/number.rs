//! Numbers as they are written and shown: sizes with a suffix, patterns, amounts for people.

/// The most that one request may name, in bytes.
pub(crate) const REQUEST_MAX: u64 = (1 << 31) - 512;

/// Why a word is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotASize {
    /// It is no number, or something follows it.
    Syntax,
    /// It does not fit 63 bits, or is negative.
    Range,
}

impl NotASize {
    /// What is said of the word.
    pub(crate) fn message(self, word: &str) -> String {
        match self {
            Self::Syntax => {
                format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {word}")
            }
            Self::Range => format!("Parsing error: argument too large -- {word}"),
        }
    }
}

/// Reads a size in bytes: hexadecimal, or decimal with a fraction and a suffix (B, K, M, G, T, P, E) if it has them.
///
/// # Errors
/// It is none.
pub(crate) fn size(word: &str) -> Result<u64, NotASize> {
    let text = word.trim_start();
    let (text, negative) = match text.as_bytes() {
        [b'-', ..] => (&text[1..], true),
        [b'+', ..] => (&text[1..], false),
        _ => (text, false),
    };
    let value = match text.get(..2) {
        Some("0x" | "0X") if text[2..].starts_with(|c: char| c.is_ascii_hexdigit()) => hexadecimal(&text[2..])?,
        _ => decimal(text)?,
    };
    if value > i64::MAX as u64 || negative {
        return Err(NotASize::Range);
    }
    Ok(value)
}

fn hexadecimal(digits: &str) -> Result<u64, NotASize> {
    if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(NotASize::Syntax);
    }
    u64::from_str_radix(digits, 16).map_err(|_| NotASize::Range)
}

fn decimal(text: &str) -> Result<u64, NotASize> {
    let end_of_digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(end_of_digits(text));
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(end_of_digits(rest)),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(NotASize::Syntax);
    }
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(NotASize::Syntax),
    };
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| NotASize::Range)? };
    let fraction: f64 = format!("0.{fraction}0").parse().map_err(|_| NotASize::Syntax)?;
    if shift == 0 && fraction != 0.0 {
        return Err(NotASize::Syntax);
    }
    let unit = 1_u64 << shift;
    let value = whole.checked_mul(unit).ok_or(NotASize::Range)?;
    // Less than a unit, or just that, if the fraction was rounded up.
    value.checked_add((fraction * unit as f64 + 0.5) as u64).ok_or(NotASize::Range)
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
