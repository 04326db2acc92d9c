//! The log of a run: `metrics.jsonl`, one line of averages every few steps.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use flmm::{Error, Result};
use serde_json::{Map, Value};

/// Averages values and appends them to `metrics.jsonl`.
pub(crate) struct Log {
    path: PathBuf,
    /// None for ranks that write no log.
    file: Option<File>,
    /// Σ weight · value and Σ weight since the last line.
    pending: BTreeMap<String, (f64, f64)>,
    since: Instant,
}

impl Log {
    /// Continues the log in `dir` after `step` steps: lines of later steps, which a resumed run writes again, are
    /// dropped.
    pub(crate) fn open(dir: &Path, step: u64, pending: BTreeMap<String, (f64, f64)>) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        let old = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let step_of = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64();
        let kept: Vec<&str> = old.lines().filter(|line| step_of(line).is_some_and(|at| at <= step)).collect();
        flmm::atomic::write(&path, |writer| kept.iter().try_for_each(|line| writeln!(writer, "{line}")))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file: Some(file), pending, since: Instant::now() })
    }

    /// A log that is not written.
    pub(crate) fn silent() -> Self {
        Self { path: PathBuf::new(), file: None, pending: BTreeMap::new(), since: Instant::now() }
    }

    /// Adds `value` to the average of `name`.
    pub(crate) fn add(&mut self, name: &str, value: f64, weight: f64) {
        let (sum, weights) = self.pending.entry(name.to_owned()).or_default();
        *sum += value * weight;
        *weights += weight;
    }

    /// Writes the averages since the last line, and gives them.
    pub(crate) fn line(&mut self, step: u64, epoch: u64, lr: f64) -> Result<Map<String, Value>> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.insert("epoch".into(), epoch.into());
        line.insert("lr".into(), lr.into());
        for (name, (sum, weight)) in std::mem::take(&mut self.pending) {
            if weight > 0.0 {
                line.insert(name, (sum / weight).into());
            }
        }
        line.insert("seconds".into(), self.since.elapsed().as_secs_f64().into());
        self.since = Instant::now();
        let mut text = serde_json::to_string(&line).map_err(|e| Error::io(&self.path, e.into()))?;
        text.push('\n');
        // In one piece: a line is there or not, whenever the process is killed.
        if let Some(file) = &mut self.file {
            file.write_all(text.as_bytes()).map_err(|e| Error::io(&self.path, e))?;
        }
        Ok(line)
    }

    /// What has been added since the last line.
    pub(crate) fn pending(&self) -> &BTreeMap<String, (f64, f64)> {
        &self.pending
    }
}
