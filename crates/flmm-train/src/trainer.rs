//! The training loop.

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::{DType, Tensor, Var};
use flmm::{Error, Result};
use serde_json::{Value, json};

use crate::checkpoint::{self, State};
use crate::distributed::{Communicator, Single, gather, together};
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
    communicator: &'a dyn Communicator,
}

/// What one sample contributed, or several.
#[derive(Default)]
struct Contribution {
    gradients: Gradients,
    /// Its share of the batch's loss.
    loss: f64,
    metrics: Vec<Metric>,
}

impl Contribution {
    fn add(&mut self, other: Self) -> Result<()> {
        self.loss += other.loss;
        self.metrics.extend(other.metrics);
        accumulate(&mut self.gradients, &other.gradients, 1.0)
    }
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
        let communicator = &Single;
        let trainer = Self { task, optimizer, rounded, config, task_config, options, communicator };
        trainer.round()?;
        Ok(trainer)
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
        on_step: impl FnMut(&Step) -> ControlFlow<()>,
    ) -> Result<u64> {
        self.run_watched(samples, &mut EachStep(on_step))
    }

    /// As [`Trainer::run`], telling `watch` what is done.
    pub fn run_watched(&mut self, samples: &dyn Samples<T::Sample>, watch: &mut dyn Watch) -> Result<u64> {
        let order = Order { len: samples.len(), batch_size: self.config.batch_size, seed: self.config.seed };
        let per_epoch = order.steps_per_epoch();
        let schedule = Schedule::epochs(
            self.config.learning_rate,
            per_epoch,
            self.config.epochs,
            self.config.warmup_ratio,
        );
        let identity = json!({ "train": self.config, "task": self.task_config, "samples": samples.len() });
        let writes = self.communicator.rank() == 0;
        let begun = match (samples.is_empty(), writes) {
            (true, _) => {
                Err(Error::request("there are no training samples", "check the data folder and the split"))
            }
            (false, true) => self.begin(&identity).map(Some),
            (false, false) => Ok(None),
        };
        let (folder, mut log) = self.begin_together(begun, &identity)?;

        let first = self.optimizer.steps();
        watch.begin(first, schedule.total, per_epoch);
        let batch_size = self.config.batch_size;
        let (rank, world) = (self.communicator.rank(), self.communicator.world());
        let left = usize::try_from(schedule.total.saturating_sub(first)).unwrap_or(usize::MAX);
        let jobs = order.samples(first).take(left.saturating_mul(batch_size));
        let share = batch_size / world;
        let window = self.options.prefetch.saturating_add(1).saturating_mul(share);
        let ahead = Prefetch::new(jobs.skip(rank).step_by(world), window);
        std::thread::scope(|scope| {
            // However this ends, the threads that make samples end with it.
            let _stop = StopGuard(&ahead);
            let make = |(epoch, index)| samples.sample(index, epoch);
            let started = ahead.start(scope, self.options.loaders, STACK, make);
            together(self.communicator, started.map_err(|e| Error::io(&self.options.dir, e)))?;

            let mut saved = Instant::now();
            let mut ended = false;
            while !ended && self.optimizer.steps() < schedule.total {
                let batch = (0..share).map_while(|_| ahead.take()).collect::<Result<Vec<_>>>();
                let lr = schedule.lr(self.optimizer.steps());
                let (gradients, loss) = self.batch_gradients(batch, &mut log)?;
                let info = self.optimizer.step(&gradients, lr)?;
                self.round()?;
                let step = self.optimizer.steps();
                log.add("loss", loss, 1.0);
                log.add("grad_norm", info.norm, 1.0);
                let epoch = (step - 1) / per_epoch;
                let report = Step { step, total: schedule.total, epoch, lr, loss, grad_norm: info.norm };
                let after = together(self.communicator, watch.after_step(&report))?;
                let stops = gather(self.communicator, Ok(after.stop))?;
                after.values.iter().for_each(|(name, value)| log.add(name, *value, 1.0));
                ended = stops.contains(&true) || step == schedule.total;
                let written = (|| {
                    let due = step.is_multiple_of(self.options.log_every.max(1)) || !after.values.is_empty();
                    if due || step == schedule.total {
                        watch.line(&log.line(step, epoch, lr)?)?;
                    }
                    let due = ended || saved.elapsed() >= self.options.checkpoint_every;
                    if let (Some(folder), true) = (&folder, due) {
                        let state = State::new(step, per_epoch, identity.clone(), log.pending().clone());
                        let about = self.options.head_json.as_ref();
                        checkpoint::save(
                            &folder.checkpoints,
                            &self.optimizer,
                            &state,
                            about,
                            self.options.keep,
                        )?;
                        watch.saved(step);
                        saved = Instant::now();
                    }
                    Ok(())
                })();
                together(self.communicator, written)?;
            }
            Ok(self.optimizer.steps())
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

    /// Takes the run's folder, continues from the newest checkpoint in it, if there is one, and opens the log.
    fn begin(&mut self, identity: &Value) -> Result<(RunFolder, Log)> {
        let folder = RunFolder::take(&self.options.dir)?;
        let mut pending = Default::default();
        if let Some(path) = checkpoint::latest(&folder.checkpoints)? {
            pending = checkpoint::load(&path, &mut self.optimizer, identity)?.pending;
            self.round()?;
        }
        let log = Log::open(&self.options.dir, self.optimizer.steps(), pending)?;
        if let Some(text) = &self.options.config_text {
            flmm::atomic::write(self.options.dir.join("config.toml"), |to| to.write_all(text.as_bytes()))?;
        }
        Ok((folder, log))
    }

    /// Makes sure that all ranks train the same thing, and gives them rank 0's tensors.
    fn begin_together(
        &mut self,
        begun: Result<Option<(RunFolder, Log)>>,
        identity: &Value,
    ) -> Result<(Option<RunFolder>, Log)> {
        let (own, told) = match begun {
            Ok(own) => (own, Ok((self.optimizer.steps(), identity.to_string()))),
            Err(error) => (None, Err(error)),
        };
        let all = gather(self.communicator, told)?;
        if let Some(rank) = all.iter().position(|(_, other)| *other != all[0].1) {
            return Err(Error::request(
                format!("rank {rank} trains something else than rank 0:\n{}\n{}", all[rank].1, all[0].1),
                "start all ranks with the same configuration and the same data",
            ));
        }
        if all.len() > 1 {
            let (communicator, steps) = (self.communicator, all[0].0);
            self.optimizer.overwrite(steps, |values| {
                // A sum in which all but one are zero is a broadcast of numbers.
                if communicator.rank() != 0 {
                    values.fill(0.0);
                }
                communicator.all_reduce_sum(values)
            })?;
            self.round()?;
        }
        Ok(match own {
            Some((folder, log)) => (Some(folder), log),
            None => (None, Log::silent()),
        })
    }

    /// The gradients of a batch and its loss, over all ranks; `batch` is this rank's share. Samples are added in their
    /// order, whatever thread computed them.
    fn batch_gradients(&self, batch: Result<Vec<T::Sample>>, log: &mut Log) -> Result<(Gradients, f64)> {
        let (batch, told) = match batch {
            Ok(batch) => {
                let weights: Vec<Vec<f64>> = batch.iter().map(|sample| self.task.weights(sample)).collect();
                (batch, Ok(weights))
            }
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

        let own = self.contribution_of(&batch, &shares).map(|part| {
            // As bits: JSON knows neither infinity nor the last digit.
            let told = |m: &Metric| (m.name.to_owned(), m.value.to_bits(), m.weight.to_bits());
            let metrics = part.metrics.iter().map(told).collect::<Vec<_>>();
            (part.gradients, (f64::to_bits(part.loss), metrics))
        });
        let (sum, told) = match own {
            Ok((sum, told)) => (sum, Ok(told)),
            Err(error) => (Gradients::new(), Err(error)),
        };
        let mut loss = 0.0;
        for (part, metrics) in gather(self.communicator, told)? {
            loss += f64::from_bits(part);
            for (name, value, weight) in &metrics {
                log.add(name, f64::from_bits(*value), f64::from_bits(*weight));
            }
        }
        Ok((self.summed(sum)?, loss))
    }

    /// The sum of all ranks' gradients.
    fn summed(&self, own: Gradients) -> Result<Gradients> {
        if self.communicator.world() == 1 {
            return Ok(own);
        }
        // One call for all tensors. Which of them have a gradient may differ from rank to rank.
        let flat = self.optimizer.vars().iter().map(|(name, var)| match own.get(name) {
            Some(gradient) => gradient.to_dtype(DType::F32)?.flatten_all(),
            None => Tensor::zeros(var.elem_count(), DType::F32, var.device()),
        });
        let flat = Tensor::cat(&flat.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let flat = self.communicator.all_reduce_tensor(&flat)?;
        let (mut sum, mut from) = (Gradients::new(), 0);
        for (name, var) in self.optimizer.vars() {
            let gradient = flat.narrow(0, from, var.elem_count())?.reshape(var.shape())?;
            sum.insert(name.clone(), gradient);
            from += var.elem_count();
        }
        Ok(sum)
    }

    /// What the samples of `batch` contribute together, added in their order. No more than one per worker is kept.
    fn contribution_of(&self, batch: &[T::Sample], shares: &[Vec<f64>]) -> Result<Contribution> {
        let mut sum = Contribution::default();
        let one = |i: usize| self.contribution(&batch[i], &shares[i]);
        let workers = self.options.workers.min(batch.len());
        if workers <= 1 {
            (0..batch.len()).try_for_each(|i| sum.add(one(i)?))?;
            return Ok(sum);
        }
        let parts = Prefetch::new(0..batch.len(), workers);
        std::thread::scope(|scope| {
            let _stop = StopGuard(&parts);
            let started = parts.start(scope, workers, STACK, one);
            started.map_err(|e| Error::io(&self.options.dir, e))?;
            while let Some(part) = parts.take() {
                sum.add(part?)?;
            }
            Ok(sum)
        })
    }

    fn contribution(&self, sample: &T::Sample, share: &[f64]) -> Result<Contribution> {
        let mut sum = Contribution::default();
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
}
