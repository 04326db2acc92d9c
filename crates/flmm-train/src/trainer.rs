//! The training loop.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use flmm::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{self, State};
use crate::log::Log;
use crate::optim::{AdamW, AdamWConfig, Gradients, Schedule, Vars, accumulate, gradients};
use crate::samples::{Order, Samples};
use crate::task::{Metric, Task};

/// candle walks the graph recursively; a thread's default stack would limit its depth.
const STACK: usize = 64 << 20;

/// What decides the result of a run. Kept in every checkpoint; the defaults are the paper's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
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
    /// The optimiser.
    pub optimizer: AdamWConfig,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            epochs: 8,
            batch_size: 8,
            learning_rate: 1e-4,
            warmup_ratio: 0.03,
            optimizer: AdamWConfig::default(),
        }
    }
}

/// What does not change the result of a run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run's folder: `config.json`, `metrics.jsonl`, `checkpoints/`.
    pub dir: PathBuf,
    /// Time between checkpoints; one is written at the end in any case.
    pub checkpoint_every: Duration,
    /// How many checkpoints are kept.
    pub keep: usize,
    /// Steps between lines of the log.
    pub log_every: u64,
    /// Threads that compute gradients, one sample at a time each.
    pub workers: usize,
    /// Batches that are read ahead.
    pub prefetch: usize,
    /// Whether to draw a progress bar on standard error.
    pub progress: bool,
}

impl RunOptions {
    /// The usual options for a run in `dir`: a checkpoint every five minutes, one worker, no progress bar.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            checkpoint_every: Duration::from_secs(300),
            keep: 1,
            log_every: 10,
            workers: 1,
            prefetch: 1,
            progress: false,
        }
    }
}

/// One step that was taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Its number, from 1.
    pub step: u64,
    /// All steps of the run.
    pub total: u64,
    /// The learning rate it used.
    pub lr: f64,
    /// The loss of its batch.
    pub loss: f64,
    /// The global norm of its gradients before clipping.
    pub grad_norm: f64,
}

/// Trains the tensors of an optimiser on a task.
pub struct Trainer<'a, T: Task> {
    task: &'a T,
    optimizer: AdamW,
    config: TrainConfig,
    /// The caller's own settings, kept and compared with those of a checkpoint.
    task_config: Value,
    options: RunOptions,
}

/// A batch: its epoch and samples.
type Batch<S> = Vec<S>;

/// What one sample contributed.
struct Contribution {
    gradients: Gradients,
    /// Its share of the batch's loss.
    loss: f64,
    metrics: Vec<Metric>,
}

impl<'a, T: Task> Trainer<'a, T> {
    /// A trainer of `vars`, which `task` was built from.
    ///
    /// `task_config` describes everything else that decides the result (model, losses, data): a checkpoint with
    /// another one is refused.
    pub fn new(
        task: &'a T,
        vars: Vars,
        config: TrainConfig,
        task_config: Value,
        options: RunOptions,
    ) -> Result<Self> {
        if config.batch_size == 0 || config.epochs == 0 {
            return Err(Error::request(
                "a run needs at least one epoch and one sample per step",
                "set `epochs` and `batch_size` to 1 or more",
            ));
        }
        let optimizer = AdamW::new(vars, config.optimizer)?;
        Ok(Self { task, optimizer, config, task_config, options })
    }

    /// The optimiser with the trained tensors.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Trains on `samples` to the end of the last epoch, from the newest checkpoint in the run's folder if there
    /// is one. A resumed run gives the same tensors, bit for bit, as one that was never interrupted.
    ///
    /// `on_step` is called after every step; when it breaks, a checkpoint is written and the run ends early.
    /// Returns the number of steps taken since the run began.
    ///
    /// # Errors
    /// The first error of a sample, of the task or of the optimiser (non-finite gradients); the last checkpoint
    /// stays. [`Error::Config`] if the checkpoint belongs to another configuration.
    pub fn run(
        &mut self,
        samples: &dyn Samples<T::Sample>,
        mut on_step: impl FnMut(&Step) -> ControlFlow<()>,
    ) -> Result<u64> {
        if samples.is_empty() {
            return Err(Error::request(
                "there are no training samples",
                "check the data folder and the split",
            ));
        }
        let order = Order { len: samples.len(), batch_size: self.config.batch_size, seed: self.config.seed };
        let per_epoch = order.steps_per_epoch();
        let schedule = Schedule::epochs(
            self.config.learning_rate,
            per_epoch,
            self.config.epochs,
            self.config.warmup_ratio,
        );
        let identity = json!({ "train": self.config, "task": self.task_config, "samples": samples.len() });
        let checkpoints = self.options.dir.join("checkpoints");
        std::fs::create_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
        let mut pending = Default::default();
        if let Some(path) = checkpoint::latest(&checkpoints)? {
            pending = checkpoint::load(&path, &mut self.optimizer, &identity)?.pending;
        }
        let mut log = Log::open(&self.options.dir, self.optimizer.steps(), pending)?;
        log.write_config(&identity)?;

        let first = self.optimizer.steps();
        let bar = self.progress_bar(schedule.total, first);
        let prefetch = self.options.prefetch;
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel::<Result<Batch<T::Sample>>>(prefetch);
            let steps = schedule.total.saturating_sub(first) as usize;
            let load = move || {
                for (epoch, indices) in order.batches(first).take(steps) {
                    let batch = indices.into_iter().map(|index| samples.sample(index, epoch)).collect();
                    // The receiver is gone when the run has ended early.
                    if sender.send(batch).is_err() {
                        break;
                    }
                }
            };
            let loader = std::thread::Builder::new().name("samples".into()).stack_size(STACK);
            loader.spawn_scoped(scope, load).map_err(|e| Error::io(&self.options.dir, e))?;

            let mut saved = Instant::now();
            let mut ended = false;
            while !ended && self.optimizer.steps() < schedule.total {
                let Ok(batch) = receiver.recv() else { break };
                let lr = schedule.lr(self.optimizer.steps());
                let (gradients, loss) = self.batch_gradients(&batch?, &mut log)?;
                let info = self.optimizer.step(&gradients, lr)?;
                let step = self.optimizer.steps();
                log.add("loss", loss, 1.0);
                log.add("grad_norm", info.norm, 1.0);
                if step.is_multiple_of(self.options.log_every.max(1)) || step == schedule.total {
                    log.line(step, (step - 1) / per_epoch, lr)?;
                }
                bar.set_position(step);
                bar.set_message(format!("loss {loss:.4}"));
                let report = Step { step, total: schedule.total, lr, loss, grad_norm: info.norm };
                ended = on_step(&report).is_break() || step == schedule.total;
                if ended || saved.elapsed() >= self.options.checkpoint_every {
                    let state = State::new(step, per_epoch, identity.clone(), log.pending().clone());
                    checkpoint::save(&checkpoints, &self.optimizer, &state, self.options.keep)?;
                    saved = Instant::now();
                }
            }
            Ok(())
        })
        .map(|()| {
            bar.finish_and_clear();
            self.optimizer.steps()
        })
    }

    /// The gradients of a batch and its loss. Samples are added in their order, whatever thread computed them.
    fn batch_gradients(&self, batch: &Batch<T::Sample>, log: &mut Log) -> Result<(Gradients, f64)> {
        let weights: Vec<Vec<f64>> = batch.iter().map(|sample| self.task.weights(sample)).collect();
        let terms = weights.iter().map(Vec::len).max().unwrap_or(0);
        let total = |term: usize| weights.iter().map(|w| w.get(term).copied().unwrap_or(0.0)).sum::<f64>();
        let totals: Vec<f64> = (0..terms).map(total).collect();
        let shares: Vec<Vec<f64>> = weights
            .iter()
            .map(|w| {
                w.iter().zip(&totals).map(|(w, total)| if *total > 0.0 { w / total } else { 0.0 }).collect()
            })
            .collect();

        let workers = self.options.workers.clamp(1, batch.len().max(1));
        let mut parts: Vec<Option<Result<Contribution>>> = Vec::new();
        if workers == 1 {
            parts.extend(
                batch.iter().zip(&shares).map(|(sample, share)| Some(self.contribution(sample, share))),
            );
        } else {
            parts.resize_with(batch.len(), || None);
            std::thread::scope(|scope| -> Result<()> {
                let mut handles = Vec::new();
                for worker in 0..workers {
                    let shares = &shares;
                    let work = move || {
                        let own = (worker..batch.len()).step_by(workers);
                        own.map(|i| (i, self.contribution(&batch[i], &shares[i]))).collect::<Vec<_>>()
                    };
                    let thread = std::thread::Builder::new().stack_size(STACK);
                    let handle =
                        thread.spawn_scoped(scope, work).map_err(|e| Error::io(&self.options.dir, e))?;
                    handles.push(handle);
                }
                for handle in handles {
                    let done = handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    for (i, part) in done {
                        parts[i] = Some(part);
                    }
                }
                Ok(())
            })?;
        }
        let (mut sum, mut loss) = (Gradients::new(), 0.0);
        for part in parts.into_iter().flatten() {
            let part = part?;
            accumulate(&mut sum, &part.gradients, 1.0)?;
            loss += part.loss;
            part.metrics.iter().for_each(|metric| log.add(metric.name, metric.value, metric.weight));
        }
        Ok((sum, loss))
    }

    fn contribution(&self, sample: &T::Sample, share: &[f64]) -> Result<Contribution> {
        let losses = self.task.losses(sample)?;
        let mut total: Option<Tensor> = None;
        for (term, share) in losses.terms.iter().zip(share).filter(|(_, share)| **share > 0.0) {
            let term = (term * *share)?;
            total = Some(match total {
                Some(total) => (total + term)?,
                None => term,
            });
        }
        let metrics = losses.metrics;
        let Some(total) = total else {
            return Ok(Contribution { gradients: Gradients::new(), loss: 0.0, metrics });
        };
        let store = total.backward()?;
        let loss = f64::from(total.to_scalar::<f32>()?);
        Ok(Contribution { gradients: gradients(&store, self.optimizer.vars()), loss, metrics })
    }

    fn progress_bar(&self, total: u64, first: u64) -> ProgressBar {
        if !self.options.progress {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} [{elapsed} < {eta}]");
        let bar = ProgressBar::new(total).with_position(first);
        match style {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }
}
