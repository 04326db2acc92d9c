//! The most memory that this process has held.

/// `VmHWM` in bytes; `None` where there is no such file.
pub(super) fn peak() -> Option<u64> {
    parse(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Begins anew: from here on [`peak`] tells the most memory held since. Says whether that worked.
pub(super) fn reset() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn parse(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_high_water_mark_is_found() {
        assert_eq!(parse("Name:\tx\nVmHWM:\t  1234 kB\nVmRSS:\t 1 kB\n"), Some(1234 << 10));
        assert_eq!(parse("VmRSS:\t 1 kB\n"), None);
    }
}
