//! Bytes as text.

/// `bytes` in hexadecimal, two lower-case digits each.
pub fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_has_two_digits() {
        assert_eq!(super::hex([0, 0x0a, 0xff]), "000aff");
        assert_eq!(super::hex([]), "");
    }
}
