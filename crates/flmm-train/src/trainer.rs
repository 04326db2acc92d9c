//! The training loop.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use flmm::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{self, State};
use crate::distributed::{Communicator, Single, gather};
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
    communicator: &'a dyn Communicator,
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
        Ok(Self { task, optimizer, config, task_config, options, communicator: &Single })
    }

    /// Shares the work with other ranks: each takes every `world`-th sample of a batch, and all take the same steps.
    /// Rank 0 alone writes checkpoints and logs, and the others take its tensors when the run begins.
    ///
    /// # Errors
    /// [`Error::Request`] unless the batch can be shared out evenly.
    pub fn with_communicator(mut self, communicator: &'a dyn Communicator) -> Result<Self> {
        let (batch, world) = (self.config.batch_size, communicator.world());
        if !batch.is_multiple_of(world) {
            return Err(Error::request(
                format!("a batch of {batch} samples cannot be shared out to {world} ranks"),
                format!("set `batch_size`, which counts the samples of all ranks, to a multiple of {world}"),
            ));
        }
        self.communicator = communicator;
        Ok(self)
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
        let writes = self.communicator.rank() == 0;
        let begun = if writes { self.begin(&checkpoints, &identity) } else { Ok(Log::silent()) };
        let mut log = self.begin_together(begun, &identity)?;

        let first = self.optimizer.steps();
        let bar = self.progress_bar(schedule.total, first);
        let prefetch = self.options.prefetch;
        let (rank, world) = (self.communicator.rank(), self.communicator.world());
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel::<Result<Batch<T::Sample>>>(prefetch);
            let steps = schedule.total.saturating_sub(first) as usize;
            let load = move || {
                for (epoch, indices) in order.batches(first).take(steps) {
                    let batch = indices.into_iter().skip(rank).step_by(world);
                    let batch = batch.map(|index| samples.sample(index, epoch)).collect();
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
                let (gradients, loss) = self.batch_gradients(batch, &mut log)?;
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
                let stops = gather(self.communicator, Ok(on_step(&report).is_break()))?;
                ended = stops.contains(&true) || step == schedule.total;
                if writes && (ended || saved.elapsed() >= self.options.checkpoint_every) {
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

    /// Continues from the newest checkpoint, if there is one, and opens the log.
    fn begin(&mut self, checkpoints: &Path, identity: &Value) -> Result<Log> {
        std::fs::create_dir_all(checkpoints).map_err(|e| Error::io(checkpoints, e))?;
        let mut pending = Default::default();
        if let Some(path) = checkpoint::latest(checkpoints)? {
            pending = checkpoint::load(&path, &mut self.optimizer, identity)?.pending;
        }
        let log = Log::open(&self.options.dir, self.optimizer.steps(), pending)?;
        log.write_config(identity)?;
        Ok(log)
    }

    /// Makes sure that all ranks train the same thing, and gives them rank 0's tensors.
    fn begin_together(&mut self, begun: Result<Log>, identity: &Value) -> Result<Log> {
        if self.communicator.world() == 1 {
            return begun;
        }
        let (log, told) = match begun {
            Ok(log) => (Some(log), Ok((self.optimizer.steps(), identity.to_string()))),
            Err(error) => (None, Err(error)),
        };
        let all = gather(self.communicator, told)?;
        let steps = all[0].0;
        let same = all.iter().position(|(_, other)| *other != all[0].1);
        if let Some(rank) = same {
            return Err(Error::request(
                format!("rank {rank} trains something else than rank 0:\n{}\n{}", all[rank].1, all[0].1),
                "start all ranks with the same configuration and the same data",
            ));
        }
        self.optimizer.overwrite(steps, |values| {
            // A sum in which all but one are zero is a broadcast of numbers.
            if self.communicator.rank() != 0 {
                values.fill(0.0);
            }
            self.communicator.all_reduce_sum(values)
        })?;
        Ok(log.unwrap_or_else(Log::silent))
    }

    /// The gradients of a batch and its loss, over all ranks; `batch` is this rank's share. Samples are added in their
    /// order, whatever thread computed them.
    fn batch_gradients(&self, batch: Result<Batch<T::Sample>>, log: &mut Log) -> Result<(Gradients, f64)> {
        let own = batch.map(|batch| {
            let weights: Vec<Vec<f64>> = batch.iter().map(|sample| self.task.weights(sample)).collect();
            (batch, weights)
        });
        let (batch, told) = match own {
            Ok((batch, weights)) => (batch, Ok(weights)),
            Err(error) => (Vec::new(), Err(error)),
        };
        let all = gather(self.communicator, told)?;
        let weights = &all[self.communicator.rank()];
        let terms = all.iter().flatten().map(Vec::len).max().unwrap_or(0);
        let total =
            |term: usize| all.iter().flatten().map(|w| w.get(term).copied().unwrap_or(0.0)).sum::<f64>();
        let totals: Vec<f64> = (0..terms).map(total).collect();
        let shares: Vec<Vec<f64>> = weights
            .iter()
            .map(|w| {
                w.iter().zip(&totals).map(|(w, total)| if *total > 0.0 { w / total } else { 0.0 }).collect()
            })
            .collect();

        let own = self.contributions(&batch, &shares).and_then(|parts| {
            let (mut sum, mut loss, mut metrics) = (Gradients::new(), 0.0, Vec::new());
            for part in parts {
                accumulate(&mut sum, &part.gradients, 1.0)?;
                loss += part.loss;
                metrics.extend(part.metrics.iter().map(|m| (m.name.to_owned(), m.value, m.weight)));
            }
            Ok((sum, (loss, metrics)))
        });
        let (sum, told) = match own {
            Ok((sum, told)) => (sum, Ok(told)),
            Err(error) => (Gradients::new(), Err(error)),
        };
        let mut loss = 0.0;
        for (part, metrics) in gather(self.communicator, told)? {
            loss += part;
            metrics.iter().for_each(|(name, value, weight)| log.add(name, *value, *weight));
        }
        Ok((self.summed(sum)?, loss))
    }

    /// The sum of all ranks' gradients.
    fn summed(&self, own: Gradients) -> Result<Gradients> {
        if self.communicator.world() == 1 {
            return Ok(own);
        }
        // One call for all tensors. Which of them have a gradient may differ from rank to rank.
        let mut flat = Vec::new();
        for (name, var) in self.optimizer.vars() {
            match own.get(name) {
                Some(gradient) => flat.extend(gradient.flatten_all()?.to_vec1::<f32>()?),
                None => flat.resize(flat.len() + var.elem_count(), 0.0),
            }
        }
        self.communicator.all_reduce_sum(&mut flat)?;
        let (mut sum, mut rest) = (Gradients::new(), &flat[..]);
        for (name, var) in self.optimizer.vars() {
            let (values, behind) = rest.split_at(var.elem_count());
            sum.insert(name.clone(), Tensor::from_slice(values, var.shape(), var.device())?);
            rest = behind;
        }
        Ok(sum)
    }

    /// What every sample of `batch` contributes, in their order.
    fn contributions(&self, batch: &Batch<T::Sample>, shares: &[Vec<f64>]) -> Result<Vec<Contribution>> {
        let workers = self.options.workers.clamp(1, batch.len().max(1));
        let mut parts: Vec<Option<Result<Contribution>>> = Vec::new();
        if workers == 1 {
            parts.extend(batch.iter().zip(shares).map(|(sample, share)| Some(self.contribution(sample, share))));
        } else {
            parts.resize_with(batch.len(), || None);
            std::thread::scope(|scope| -> Result<()> {
                let mut handles = Vec::new();
                for worker in 0..workers {
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
        parts.into_iter().flatten().collect()
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
        if !self.options.progress || self.communicator.rank() != 0 {
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
