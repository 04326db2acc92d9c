//! What every training stage shares: a folder with a checkpoint and a log, a progress bar, the step schedule.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::store::Store;

/// How often the checkpoint is written.
const SAVE_EVERY: Duration = Duration::from_secs(150);

/// A stage under way.
pub(crate) struct Run {
    checkpoint: PathBuf,
    log: File,
    curves: PathBuf,
    bar: ProgressBar,
    steps: usize,
    first: usize,
    started: Instant,
    saved: Instant,
    loss: f64,
}

impl Run {
    /// Opens `folder`, restores its checkpoint into `store` if there is one.
    pub(crate) fn open(folder: &Path, steps: usize, store: &mut Store) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let checkpoint = folder.join("checkpoint.safetensors");
        if checkpoint.exists() {
            store.restore(&checkpoint)?;
            eprintln!("resuming {} at step {}", folder.display(), store.step);
        }
        let bar = bar(steps as u64)?;
        bar.set_position(store.step as u64);
        let log = File::options().create(true).append(true).open(folder.join("log.txt"))?;
        let now = Instant::now();
        let (curves, first) = (folder.join("curves.jsonl"), store.step);
        Ok(Self { checkpoint, log, curves, bar, steps, first, started: now, saved: now, loss: f64::NAN })
    }

    /// Notes a finished step and writes the checkpoint when it is time.
    pub(crate) fn stepped(&mut self, store: &Store, loss: f64, note: &str) -> Result<()> {
        self.loss = if self.loss.is_nan() { loss } else { 0.98 * self.loss + 0.02 * loss };
        self.bar.set_position(store.step as u64);
        self.bar.set_message(format!("loss {:.3}", self.loss));
        if store.step.is_multiple_of(25) {
            let rate = (store.step - self.first) as f64 / self.started.elapsed().as_secs_f64();
            writeln!(self.log, "step {} loss {:.4} steps/s {rate:.2} {note}", store.step, self.loss)?;
        }
        if self.saved.elapsed() > SAVE_EVERY || store.step >= self.steps {
            store.save(&self.checkpoint)?;
            self.saved = Instant::now();
        }
        Ok(())
    }

    /// Appends a line to `curves.jsonl`. A step that is evaluated again after a resume is there again.
    pub(crate) fn curve(&self, point: &serde_json::Value) -> Result<()> {
        let mut file = File::options().create(true).append(true).open(&self.curves)?;
        Ok(writeln!(file, "{point}")?)
    }

    /// Writes the checkpoint now.
    pub(crate) fn save(&mut self, store: &Store) -> Result<()> {
        self.saved = Instant::now();
        store.save(&self.checkpoint)
    }

    /// Writes an evaluation to the log and above the bar.
    pub(crate) fn report(&mut self, step: usize, line: &str) -> Result<()> {
        writeln!(self.log, "eval {step} {line}")?;
        self.bar.suspend(|| eprintln!("step {step}: {line}"));
        Ok(())
    }
}

/// A bar of `steps` steps with a message behind it.
pub(crate) fn bar(steps: u64) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{pos}/{len} {wide_bar} {eta} {msg}")?;
    Ok(ProgressBar::new(steps).with_style(style))
}

/// Learning rate: warm-up over 100 steps, constant, cosine to a twentieth over the last `decay` share of `steps`.
pub(crate) fn rate(peak: f64, step: usize, steps: usize, decay: f64) -> f64 {
    let warm = ((step + 1) as f64 / 100.0).min(1.0);
    let from = (steps as f64 * (1.0 - decay)) as usize;
    let progress = (step.saturating_sub(from) as f64 / (steps - from).max(1) as f64).min(1.0);
    peak * warm * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
}
