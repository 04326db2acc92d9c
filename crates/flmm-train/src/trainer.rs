//! The training loop.

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::{DType, Tensor, Var};
use flmm::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::checkpoint::{self, State};
use crate::folder::RunFolder;
use crate::log::Log;
use crate::optim::{AdamW, Gradients, Schedule, Vars, accumulate, gradients};
use crate::prefetch::{Prefetch, StopGuard};
use crate::samples::{Order, Samples};
use crate::settings::{Precision, RunOptions, TrainConfig};
use crate::task::{Metric, Task};
use crate::watch::{EachStep, Step, Watch};

/// candle walks the graph recursively; a thread's default stack would limit its depth.
const STACK: usize = 64 << 20;

/// Trains the tensors of an optimiser on a task.
pub struct Trainer<'a, T: Task> {
    task: &'a T,
    optimizer: AdamW,
    /// What the task was built from, where that is not the optimiser's own tensors but rounded copies of them.
    rounded: Option<Vars>,
    config: TrainConfig,
    /// The caller's own settings, kept and compared with those of a checkpoint.
    task_config: Value,
    options: RunOptions,
}

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
        let (vars, rounded) = match config.precision {
            Precision::F32 => (vars, None),
            Precision::Bf16 => {
                let copy = |(name, var): (&String, &Var)| {
                    Ok((name.clone(), Var::from_tensor(&var.as_detached_tensor().copy()?)?))
                };
                (vars.iter().map(copy).collect::<Result<Vars>>()?, Some(vars))
            }
        };
        let optimizer = AdamW::new(vars, config.optimizer)?.with_groups(config.groups.clone())?;
        let trainer = Self { task, optimizer, rounded, config, task_config, options };
        trainer.round()?;
        Ok(trainer)
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
        on_step: impl FnMut(&Step) -> ControlFlow<()>,
    ) -> Result<u64> {
        self.run_watched(samples, &mut EachStep(on_step))
    }

    /// As [`Trainer::run`], telling `watch` what is done.
    pub fn run_watched(&mut self, samples: &dyn Samples<T::Sample>, watch: &mut dyn Watch) -> Result<u64> {
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
        let folder = RunFolder::take(&self.options.dir)?;
        let mut pending = Default::default();
        if let Some(path) = checkpoint::latest(&folder.checkpoints)? {
            pending = checkpoint::load(&path, &mut self.optimizer, &identity)?.pending;
            self.round()?;
        }
        let mut log = Log::open(&self.options.dir, self.optimizer.steps(), pending)?;
        if let Some(text) = &self.options.config_text {
            flmm::atomic::write(self.options.dir.join("config.toml"), |to| to.write_all(text.as_bytes()))?;
        }

        let first = self.optimizer.steps();
        watch.begin(first, schedule.total, per_epoch);
        let bar = self.progress_bar(schedule.total, first);
        let batch_size = self.config.batch_size;
        let jobs = order.samples(first).take(schedule.total.saturating_sub(first) as usize * batch_size);
        let ahead = Prefetch::new(jobs, (self.options.prefetch + 1) * batch_size);
        std::thread::scope(|scope| {
            // However this ends, the threads that make samples end with it.
            let _stop = StopGuard(&ahead);
            let make = |(epoch, index)| samples.sample(index, epoch);
            let started = ahead.start(scope, self.options.loaders, STACK, make);
            started.map_err(|e| Error::io(&self.options.dir, e))?;

            let mut saved = Instant::now();
            let mut ended = false;
            while !ended && self.optimizer.steps() < schedule.total {
                let batch = (0..batch_size).map_while(|_| ahead.take()).collect::<Result<Vec<_>>>()?;
                let lr = schedule.lr(self.optimizer.steps());
                let (gradients, loss) = self.batch_gradients(&batch, &mut log)?;
                let info = self.optimizer.step(&gradients, lr)?;
                self.round()?;
                let step = self.optimizer.steps();
                log.add("loss", loss, 1.0);
                log.add("grad_norm", info.norm, 1.0);
                let epoch = (step - 1) / per_epoch;
                let report = Step { step, total: schedule.total, epoch, lr, loss, grad_norm: info.norm };
                let after = watch.after_step(&report)?;
                after.values.iter().for_each(|(name, value)| log.add(name, *value, 1.0));
                let due = step.is_multiple_of(self.options.log_every.max(1)) || !after.values.is_empty();
                if due || step == schedule.total {
                    watch.line(&log.line(step, epoch, lr)?)?;
                }
                bar.set_position(step);
                bar.set_message(format!("loss {loss:.4}"));
                ended = after.stop || step == schedule.total;
                if ended || saved.elapsed() >= self.options.checkpoint_every {
                    let state = State::new(step, per_epoch, identity.clone(), log.pending().clone());
                    checkpoint::save(&folder.checkpoints, &self.optimizer, &state, self.options.keep)?;
                    watch.saved(step);
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

    /// Gives the task's tensors the optimiser's values, rounded, where they are not the same tensors.
    fn round(&self) -> Result<()> {
        for (name, var) in self.rounded.iter().flatten() {
            let value = self.optimizer.vars()[name].as_detached_tensor();
            var.set(&value.to_dtype(DType::BF16)?.to_dtype(DType::F32)?)?;
        }
        Ok(())
    }

    /// The gradients of a batch and its loss. Samples are added in their order, whatever thread computed them.
    fn batch_gradients(&self, batch: &[T::Sample], log: &mut Log) -> Result<(Gradients, f64)> {
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
        let mut sum = Contribution { gradients: Gradients::new(), loss: 0.0, metrics: Vec::new() };
        self.task.in_parts(sample, &mut |losses| {
            let mut total: Option<Tensor> = None;
            for (term, share) in losses.terms.iter().zip(share).filter(|(_, share)| **share > 0.0) {
                let term = (term * *share)?;
                total = Some(match total {
                    Some(total) => (total + term)?,
                    None => term,
                });
            }
            sum.metrics.extend(losses.metrics);
            let Some(total) = total else { return Ok(()) };
            let store = total.backward()?;
            sum.loss += f64::from(total.to_scalar::<f32>()?);
            let vars = self.rounded.as_ref().unwrap_or(self.optimizer.vars());
            accumulate(&mut sum.gradients, &gradients(&store, vars), 1.0)
        })?;
        if self.rounded.is_some() {
            for gradient in sum.gradients.values_mut() {
                *gradient = gradient.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
            }
        }
        Ok(sum)
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
