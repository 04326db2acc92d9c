//! Values that no run could use, refused before anything is opened.

use std::fmt::Display;

use super::{Config, Mode};
use crate::mixture::EmptyNarratives;

/// A key, and what is wrong with its value.
type Fault = (&'static str, String);

fn within(key: &'static str, value: impl Display, inside: bool, expected: &str) -> Result<(), Fault> {
    if inside { Ok(()) } else { Err((key, format!("is {value}, expected {expected}"))) }
}

fn positive(key: &'static str, value: f64) -> Result<(), Fault> {
    within(key, value, value > 0.0 && value.is_finite(), "a number above 0")
}

fn factor(key: &'static str, value: f64) -> Result<(), Fault> {
    within(key, value, value >= 0.0 && value.is_finite(), "a number from 0")
}

fn share(key: &'static str, value: f64) -> Result<(), Fault> {
    within(key, value, (0.0..=1.0).contains(&value), "a number from 0 to 1")
}

fn decay(key: &'static str, value: f64) -> Result<(), Fault> {
    within(key, value, (0.0..1.0).contains(&value), "a number from 0 and below 1")
}

fn count(key: &'static str, value: u64) -> Result<(), Fault> {
    if value > 0 { Ok(()) } else { Err((key, "is 0, expected 1 or more".to_owned())) }
}

/// A number that memory is taken by, bounded so that no allocation overflows.
fn size(key: &'static str, value: usize, most: usize) -> Result<(), Fault> {
    within(key, value, (1..=most).contains(&value), &format!("1 to {most}"))
}

/// The first key whose value is out of range, and why.
pub(super) fn check(config: &Config) -> Result<(), Fault> {
    let Config { data, head, train, validation, run, .. } = config;
    count("train.epochs", train.epochs)?;
    size("train.batch_size", train.batch_size, 1 << 16)?;
    positive("train.learning_rate", train.learning_rate)?;
    share("train.warmup_ratio", train.warmup_ratio)?;
    let adamw = &train.optimizer;
    decay("train.optimizer.beta1", adamw.beta1)?;
    decay("train.optimizer.beta2", adamw.beta2)?;
    positive("train.optimizer.eps", adamw.eps)?;
    factor("train.optimizer.weight_decay", adamw.weight_decay)?;
    within("train.optimizer.max_norm", adamw.max_norm, adamw.max_norm > 0.0, "a number above 0, or inf")?;
    for group in &train.groups {
        factor("train.groups.learning_rate", group.learning_rate)?;
        factor("train.groups.weight_decay", group.weight_decay)?;
    }
    size("head.base_channels", head.base_channels, 1 << 10)?;
    count("head.phrases_at_once", head.phrases_at_once as u64)?;
    count("head.maps", head.maps.map_or(1, |maps| maps as u64))?;
    factor("head.losses.coarse_bce", head.losses.coarse_bce)?;
    factor("head.losses.coarse_dice", head.losses.coarse_dice)?;
    factor("head.losses.refined_bce", head.losses.refined_bce)?;
    factor("head.losses.refined_dice", head.losses.refined_dice)?;
    if let Some(selector) = &head.selector {
        positive("head.selector.pos_weight", selector.pos_weight)?;
        let rate = selector.positive_rate;
        let key = "head.selector.positive_rate";
        within(key, rate, rate > 0.0 && rate < 1.0, "a number above 0 and below 1")?;
    }
    share("data.max_broken", data.max_broken)?;
    count("data.limit", data.limit.map_or(1, |limit| limit as u64))?;
    if data.datasets.is_empty() {
        return Err(("data.datasets", "is empty: name at least one".to_owned()));
    }
    if data.empty_narratives == EmptyNarratives::Keep && config.mode != Mode::Selector {
        let what = "is `keep`, which only `mode = \"selector\"` can use";
        return Err(("data.empty_narratives", what.to_owned()));
    }
    if validation.every > 0 {
        count("validation.samples", validation.samples as u64)?;
    }
    positive("run.checkpoint_minutes", run.checkpoint_minutes)?;
    count("run.keep_checkpoints", run.keep_checkpoints as u64)?;
    count("run.log_every", run.log_every)?;
    count("run.workers", run.workers as u64)?;
    count("run.loaders", run.loaders as u64)
}
