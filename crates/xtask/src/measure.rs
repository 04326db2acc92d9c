//! Wall time, CPU time and peak memory of a command, from `/proc`.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Runs `command` (its output passes through) and prints one line to standard error.
pub(crate) fn run(command: &[String]) -> Result<()> {
    let Some((program, arguments)) = command.split_first() else { bail!("no command given") };
    let clock = Instant::now();
    let mut child =
        Command::new(program).args(arguments).spawn().with_context(|| format!("cannot run {program}"))?;
    let (mut peak, mut ticks) = (0, 0);
    let status = loop {
        let process = format!("/proc/{}", child.id());
        // Gone or unreadable near the end: what was read last stands.
        if let Ok(text) = std::fs::read_to_string(format!("{process}/status")) {
            peak = peak.max(high_water_kib(&text).unwrap_or(0));
        }
        if let Ok(text) = std::fs::read_to_string(format!("{process}/stat")) {
            ticks = ticks.max(cpu_ticks(&text).unwrap_or(0));
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // Linux counts a hundred ticks a second for programs, whatever the kernel was built with.
    eprintln!(
        "wall {:.1} s, cpu {:.1} s, peak memory {:.2} GiB",
        clock.elapsed().as_secs_f64(),
        ticks as f64 / 100.0,
        peak as f64 / f64::from(1 << 20)
    );
    if status.success() { Ok(()) } else { bail!("{program}: {status}") }
}

/// `VmHWM` of `/proc/PID/status`.
fn high_water_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// User and system time, fields 14 and 15 of `/proc/PID/stat`; the name in field 2 may hold spaces.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        assert_eq!(high_water_kib("Name:\tx\nVmHWM:\t  1234 kB\nVmRSS:\t 1 kB\n"), Some(1234));
        let stat = "7 (a b) c) R 1 1 1 0 -1 4 5 6 7 8 250 30 0 0 20 0 1 0 9";
        assert_eq!(cpu_ticks(stat), Some(280));
    }
}
