//! Sizes as people write them: `10G`, `512MiB`, `4096`.

use std::fmt;

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParseSizeError {
    /// No number where one is needed.
    NoNumber(String),
    /// The unit is not one of B, K, M, G, T, P (with or without `B`/`iB`).
    UnknownUnit(String),
    /// More than 2^64 - 1 bytes.
    TooLarge(String),
    /// A fraction that is not a whole number of bytes.
    NotWhole(String),
}

impl fmt::Display for ParseSizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HELP: &str = "write a size like 10G, 512MiB, 1.5T or 4096 (bytes)";
        match self {
            Self::NoNumber(text) => write!(f, "'{text}' is not a size: {HELP}"),
            Self::UnknownUnit(text) => write!(f, "'{text}' has an unknown unit: {HELP}"),
            Self::TooLarge(text) => write!(f, "'{text}' is larger than 2^64 bytes"),
            Self::NotWhole(text) => write!(f, "'{text}' is not a whole number of bytes"),
        }
    }
}

impl std::error::Error for ParseSizeError {}

/// Bytes of `text`. Units are powers of 1024 whether written `G`, `GB` or `GiB`, in any case, as
/// QEMU's tools take them; a decimal fraction is allowed before a unit.
///
/// # Errors
/// [`ParseSizeError`], with the text and what would be right.
pub fn parse_size(text: &str) -> Result<u64, ParseSizeError> {
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ if number.is_empty() => return Err(ParseSizeError::NoNumber(text.into())),
        _ => return Err(ParseSizeError::UnknownUnit(text.into())),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits_only = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits_only(fraction) || number.ends_with('.') {
        return Err(ParseSizeError::NoNumber(text.into()));
    }
    let too_large = || ParseSizeError::TooLarge(text.into());
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let mut bytes = whole.checked_mul(1 << shift).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        let scale = 10u128.checked_pow(fraction.len() as u32).ok_or_else(too_large)?;
        let part: u128 = fraction.parse().map_err(|_| too_large())?;
        let part = part.checked_mul(1 << shift).ok_or_else(too_large)?;
        if !part.is_multiple_of(scale) {
            return Err(ParseSizeError::NotWhole(text.into()));
        }
        bytes = bytes.checked_add(part / scale).ok_or_else(too_large)?;
    }
    u64::try_from(bytes).map_err(|_| too_large())
}

/// `bytes` for people: the largest unit that leaves at least 1, with at most two decimals.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(5) as usize;
    let scale = 1u64 << (unit * 10);
    if bytes.is_multiple_of(scale) {
        format!("{} {}", bytes / scale, UNITS[unit])
    } else {
        format!("{:.2} {}", bytes as f64 / scale as f64, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("0", 0),
            ("1k", 1024),
            ("512MiB", 512 << 20),
            ("10G", 10 << 30),
            ("10 GiB", 10 << 30),
            ("1.5T", 3 << 39),
            ("16P", 16 << 50),
            (" 2mb ", 2 << 20),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bad_sizes_are_refused() {
        for text in ["", "G", "-1G", "1.G", ".5G", "1..5G", "1e9", "ten", "1.5.1G", "0x10"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert!(matches!(parse_size("5X"), Err(ParseSizeError::UnknownUnit(_))));
        assert!(matches!(parse_size("99999999P"), Err(ParseSizeError::TooLarge(_))));
        assert!(matches!(parse_size(&"9".repeat(60)), Err(ParseSizeError::TooLarge(_))));
        assert!(matches!(parse_size("0.3"), Err(ParseSizeError::NotWhole(_))));
        let long_fraction = format!("1.{}G", "1".repeat(60));
        assert!(matches!(parse_size(&long_fraction), Err(ParseSizeError::TooLarge(_))));
    }

    #[test]
    fn sizes_print_short() {
        assert_eq!(format_size(0), "0 B");
        assert_eq!(format_size(1536), "1.50 KiB");
        assert_eq!(format_size(10 << 30), "10 GiB");
        assert_eq!(format_size(u64::MAX), "16384.00 PiB");
    }
}
