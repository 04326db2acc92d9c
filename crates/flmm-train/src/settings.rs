//! What a run is told: what decides its result, and what does not.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::optim::{AdamWConfig, ParamGroup};

/// Numbers that the head is trained in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Weights, gradients and all that is computed from them in f32, as in evaluation.
    #[default]
    F32,
    /// Closer to the published training: weights are rounded to bf16 for every pass, and so are gradients; the
    /// optimiser keeps f32 copies. What lies between is still computed in f32.
    Bf16,
}

/// What decides the result of a run. Kept in every checkpoint; the defaults are the paper's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of the order of samples.
    pub seed: u64,
    /// Passes over the samples.
    pub epochs: u64,
    /// Samples per step (the paper: 8 devices with one each).
    pub batch_size: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Part of the run in which the learning rate rises.
    pub warmup_ratio: f64,
    /// Numbers that the head is trained in.
    pub precision: Precision,
    /// The optimiser.
    pub optimizer: AdamWConfig,
    /// Tensors that are trained differently from the rest.
    pub groups: Vec<ParamGroup>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            epochs: 8,
            batch_size: 8,
            learning_rate: 1e-4,
            warmup_ratio: 0.03,
            precision: Precision::default(),
            optimizer: AdamWConfig::default(),
            groups: Vec::new(),
        }
    }
}

/// What does not change the result of a run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run's folder: `config.toml`, `metrics.jsonl`, `checkpoints/`.
    pub dir: PathBuf,
    /// Content of `config.toml`, written when the run is known to fit its checkpoint.
    pub config_text: Option<String>,
    /// Content of `head.json` in every checkpoint, where what is trained is a whole head.
    pub head_json: Option<Value>,
    /// Time between checkpoints; one is written at the end in any case.
    pub checkpoint_every: Duration,
    /// How many checkpoints are kept.
    pub keep: usize,
    /// Steps between lines of the log.
    pub log_every: u64,
    /// Threads that compute gradients, one sample at a time each.
    pub workers: usize,
    /// Threads that make samples.
    pub loaders: usize,
    /// Batches that are read ahead.
    pub prefetch: usize,
}

impl RunOptions {
    /// The usual options for a run in `dir`: a checkpoint every five minutes, one worker.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            config_text: None,
            checkpoint_every: Duration::from_secs(300),
            keep: 1,
            log_every: 10,
            workers: 1,
            loaders: 1,
            prefetch: 1,
            head_json: None,
        }
    }
}
