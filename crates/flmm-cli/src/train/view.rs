//! What is shown while a run goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flmm_train::config::{Config, Mode};
use flmm_train::{After, Step, Watch};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::talk::{Spinner, Talk};

/// Time between lines where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(20);

/// A bar with the newest averages below it, or a line now and then.
pub(super) struct View<'a> {
    talk: &'a Talk,
    bar: ProgressBar,
    /// What is shown before there is a bar.
    spinner: Option<Spinner>,
    stop: Arc<AtomicBool>,
    epochs: u64,
    batch_size: usize,
    per_epoch: u64,
    total: u64,
    /// Step and time of the last line of the log, for the rate.
    last: (u64, Instant),
    /// When the run began in this process, and after which step.
    first: (u64, Instant),
    told: Option<Instant>,
    selector_only: bool,
}

impl<'a> View<'a> {
    pub(super) fn new(config: &Config, stop: Arc<AtomicBool>, talk: &'a Talk) -> Self {
        let now = Instant::now();
        Self {
            talk,
            bar: ProgressBar::hidden(),
            spinner: None,
            stop,
            epochs: config.train.epochs,
            batch_size: config.train.batch_size,
            per_epoch: 1,
            total: 0,
            last: (0, now),
            first: (0, now),
            told: None,
            selector_only: config.mode == Mode::Selector,
        }
    }

    /// Removes what is shown.
    pub(super) fn clear(&mut self) {
        self.spinner = None;
        self.bar.finish_and_clear();
    }

    /// `loss 0.812 · coarse 0.210 + 0.351 · refined 0.104 + 0.147 · selector 0.081 · aIoU 41.2 → 63.0 %`
    fn averages(&self, line: &Map<String, Value>) -> String {
        let value = |name: &str| line.get(name).and_then(Value::as_f64);
        let mut text = format!("loss {:.4}", value("loss").unwrap_or(f64::NAN));
        let pair = |bce: &str, dice: &str| Some(format!("{:.3} + {:.3}", value(bce)?, value(dice)?));
        if let Some(coarse) = pair("loss_mask", "loss_dice") {
            text += &format!(" · coarse {coarse}");
        }
        if let Some(refined) = pair("sam_loss_mask", "sam_loss_dice") {
            text += &format!(" · refined {refined}");
        }
        if let (Some(loss), false) = (value("selector_loss"), self.selector_only) {
            text += &format!(" · selector {loss:.3}");
        }
        match (value("aiou"), value("sam_aiou")) {
            (Some(coarse), Some(refined)) => {
                text += &format!(" · aIoU {:.1} → {:.1} %", 100.0 * coarse, 100.0 * refined);
            }
            (Some(coarse), None) => text += &format!(" · aIoU {:.1} %", 100.0 * coarse),
            _ => {}
        }
        text
    }

    /// `2.31 samples/s · 4.2 GB · ETA 3h 12m`
    fn pace(&self, step: u64) -> String {
        let (from, since) = self.last;
        let rate = (step - from) as f64 * self.batch_size as f64 / since.elapsed().as_secs_f64().max(1e-9);
        let mut text = format!("{rate:.2} samples/s");
        if let Some(bytes) = resident_memory() {
            text += &format!(" · {:.1} GB", bytes as f64 / 1e9);
        }
        let (from, since) = self.first;
        if step > from {
            let each = since.elapsed().as_secs_f64() / (step - from) as f64;
            // A run of more epochs than time has seconds has none.
            if let Ok(left) = Duration::try_from_secs_f64(each * (self.total.saturating_sub(step)) as f64) {
                text += &format!(" · ETA {}", indicatif::HumanDuration(left));
            }
        }
        text
    }
}

impl Watch for View<'_> {
    fn stage(&mut self, what: &'static str) {
        match self.total {
            0 => self.spinner = Some(self.talk.during(what)),
            _ => self.bar.set_message(what),
        }
    }

    fn begin(&mut self, step: u64, total: u64, per_epoch: u64) {
        crate::memory::keep();
        self.spinner = None;
        (self.total, self.per_epoch) = (total, per_epoch.max(1));
        (self.last, self.first) = ((step, Instant::now()), (step, Instant::now()));
        match step {
            0 => self.talk.note(format_args!("{total} steps, {per_epoch} an epoch")),
            _ => self.talk.note(format_args!("going on after step {step} of {total}")),
        }
        let bar = self.talk.bar(total);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {eta}\n{msg}") {
            bar.set_style(style);
        }
        bar.set_position(step);
        bar.reset_eta();
        self.bar = bar;
    }

    fn after_step(&mut self, step: &Step) -> flmm::Result<After> {
        self.bar.set_position(step.step);
        self.bar.set_prefix(format!("epoch {}/{}", step.epoch + 1, self.epochs));
        Ok(After { stop: self.stop.load(Ordering::SeqCst), values: Vec::new() })
    }

    fn line(&mut self, line: &Map<String, Value>) -> flmm::Result<()> {
        let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
        let (averages, pace) = (self.averages(line), self.pace(step));
        self.last = (step, Instant::now());
        self.bar.set_message(format!("{averages}\n{pace}"));
        let validated: Vec<String> = line
            .iter()
            .filter_map(|(name, value)| {
                Some(format!("{} {:.4}", name.strip_prefix("val_")?, value.as_f64()?))
            })
            .collect();
        if !validated.is_empty() {
            self.note(&format!("step {step}, unseen samples: {}", validated.join(" · ")));
        }
        let due = self.told.is_none_or(|told| told.elapsed() >= BETWEEN_LINES) || step == self.total;
        if self.bar.is_hidden() && due {
            self.told = Some(Instant::now());
            let epoch = (step.max(1) - 1) / self.per_epoch + 1;
            self.talk.note(format_args!(
                "step {step}/{} · epoch {epoch}/{} · {averages} · {pace}",
                self.total, self.epochs
            ));
        }
        Ok(())
    }

    fn saved(&mut self, step: u64) {
        self.bar.suspend(|| self.talk.detail(format_args!("checkpoint after step {step}")));
    }

    fn note(&mut self, text: &str) {
        let bar = self.spinner.as_ref().and_then(Spinner::bar).unwrap_or(self.bar.clone());
        bar.suspend(|| self.talk.note(text));
    }
}

/// Bytes of memory in use, where the system tells.
fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}
