//! A whole training: models and data opened, trained, looked at, and the head written.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flmm::Result;
use flmm::lmm::OpenOptions;
use flmm_data::{ImageStore, Part};
use serde_json::Value;

use crate::cache::CachedSamples;
use crate::config::{Config, Mode};
use crate::distributed::{Communicator, Single};
use crate::features::{Both, FeatureOptions, PROBES};
use crate::frozen::Seen;
use crate::head::{self, HeadSample, HeadTask};
use crate::mixture::{DataConfig, EmptyNarratives, Expressions, Mixture};
use crate::observed::Observed;
use crate::onlook::Watched;
use crate::optim::Vars;
use crate::samples::Samples;
use crate::selection::chosen_maps;
use crate::selector::SelectorTask;
use crate::settings::RunOptions;
use crate::start::{HEAD, Start};
use crate::task::Task;
use crate::tolerant::Tolerant;
use crate::trainer::Trainer;
use crate::validation::Validation;
use crate::watch::Watch;

/// The models a run is made with.
#[derive(Debug, Clone)]
pub struct Models {
    /// What to call the LMM in `head.json`.
    pub name: String,
    /// The LMM: a Hugging Face folder.
    pub lmm: PathBuf,
    /// SAM: a checkpoint, or a folder with one.
    pub sam: PathBuf,
    /// A head to begin from; needed to train the keyword selector alone.
    pub head: Option<PathBuf>,
    /// Type and device of the LMM.
    pub options: OpenOptions,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Steps taken since it began.
    pub steps: u64,
    /// Steps it has in all.
    pub total: u64,
    /// The finished head; `None` if the run was stopped early.
    pub head: Option<PathBuf>,
    /// Samples that could not be used.
    pub skipped: usize,
}

/// Trains as `config` says on the datasets below `data`, in the folder `out`, from the newest checkpoint there.
///
/// `out` gets `config.toml`, `metrics.jsonl`, `skipped.jsonl`, `checkpoints/`, `validation/`, `tensorboard/` and at the
/// end `head/`, which `flmm chat --head` takes.
///
/// # Errors
/// What opening models and data gives; as [`Trainer::run`]; [`flmm::Error::Request`] when too many samples are broken.
pub fn run(
    config: &Config,
    models: &Models,
    data: &Path,
    out: &Path,
    watch: &mut dyn Watch,
) -> Result<Outcome> {
    run_with(config, models, data, out, &Extras::default(), watch)
}

/// What a run may be given besides its configuration; nothing of it changes the result but by rounding.
pub struct Extras<'a> {
    /// A cache of what the frozen models see.
    pub features: Option<FeatureOptions>,
    /// The ranks that share the work.
    pub communicator: &'a dyn Communicator,
}

impl Default for Extras<'_> {
    fn default() -> Self {
        Self { features: None, communicator: &Single }
    }
}

/// As [`run`], with a feature cache and with several ranks.
///
/// Only rank 0 validates and writes the head; the others list the samples they skip in `out/rank-R`.
pub fn run_with(
    config: &Config,
    models: &Models,
    data: &Path,
    out: &Path,
    extras: &Extras<'_>,
    watch: &mut dyn Watch,
) -> Result<Outcome> {
    let config = &config.clone().consistent();
    let (rank, world) = (extras.communicator.rank(), extras.communicator.world());
    watch.stage("opening the model");
    let images = ImageStore::open(data)?;
    let seed = config.train.seed;
    let mixture = Mixture::open(data, "train", &config.data, seed)?;
    let start = Start::open(config, models, |frozen| {
        let seen = Seen { frozen, mixture: &mixture, images: &images };
        chosen_maps(config.head.maps, &seen, out)
    })?;
    for (dataset, len) in mixture.parts() {
        watch.note(&format!("{}: {len} samples", dataset.name()));
    }
    let unseen = if rank == 0 { unseen(config, data, watch)? } else { None };
    let seen = Seen { frozen: &start.frozen, mixture: &mixture, images: &images };
    let part = Part { index: rank, count: world };
    let features = extras.features.as_ref();
    let cache = features.map(|features| features.open(config, &start.frozen, &mixture, part)).transpose()?;
    let cached = cache.as_ref().map(|cache| CachedSamples::new(cache, &seen));
    if let Some(cached) = &cached {
        let estimate = cached.estimate(part, PROBES)?;
        watch.note(&estimate.to_string());
    }
    let unseen = match &unseen {
        Some((images, mixture)) => Some(Observed { grounder: start.frozen.grounder()?, mixture, images }),
        None => None,
    };
    let validation = unseen.as_ref().map(|observed| {
        let masks = config.mode == Mode::Head;
        Validation::new(observed, &config.validation, out, config.head.phrases_at_once, masks)
    });
    let identity = start.identity(config, &mixture)?;
    // What is not the run's but a rank's.
    let own = if rank == 0 { out.to_owned() } else { out.join(format!("rank-{rank}")) };
    std::fs::create_dir_all(&own).map_err(|e| flmm::Error::io(&own, e))?;
    let (trainable, mut vars) = head::trainable_as(&start.frozen.sizes, &start.settings, &start.tensors)?;
    let selector_of = |name: &str| name.starts_with("keyword_selector.");
    let (steps, skipped, watched) = match config.mode {
        Mode::Head => {
            if config.head.selector.is_none() {
                vars.retain(|name, _| !selector_of(name));
            }
            let task = HeadTask::new(trainable, config.head)?;
            let inner: &dyn Samples<HeadSample> = match &cached {
                Some(cached) => cached,
                None => &seen,
            };
            let samples = Tolerant::new(inner, &own, config.data.max_broken, seed)?;
            let news = Both { samples: &samples, cache: cache.as_ref() };
            let mut watched = Watched::new(watch, validation.as_ref(), task.head(), &news, config, &own);
            let steps = train(&task, &vars, config, identity, &samples, out, extras, &mut watched)?;
            (steps, samples.skipped(), watched.found())
        }
        Mode::Selector => {
            vars.retain(|name, _| selector_of(name));
            let task = SelectorTask::of(&trainable, config.head.selector.unwrap_or_default())?;
            let samples = Tolerant::new(&seen, &own, config.data.max_broken, seed)?;
            let mut watched = Watched::new(watch, validation.as_ref(), &trainable, &samples, config, &own);
            let steps = train(&task, &vars, config, identity, &samples, out, extras, &mut watched)?;
            (steps, samples.skipped(), watched.found())
        }
    };
    let total = config.train.epochs * mixture.len().div_ceil(config.train.batch_size) as u64;
    let (began, metrics) = watched;
    let folder = out.join(HEAD);
    let head = match steps == total {
        // A run that was finished before keeps its head.
        true if rank != 0 || (began == total && folder.is_dir()) => Some(folder),
        true => Some(start.finish(config, models, &vars, &metrics, out)?),
        false => None,
    };
    Ok(Outcome { steps, total, head, skipped })
}

/// Runs the trainer; the tensors of `vars` are trained in place. Gives the steps taken.
#[allow(clippy::too_many_arguments, reason = "one call per mode, everything used once")]
fn train<T: Task>(
    task: &T,
    vars: &Vars,
    config: &Config,
    identity: Value,
    samples: &dyn Samples<T::Sample>,
    out: &Path,
    extras: &Extras<'_>,
    watch: &mut dyn Watch,
) -> Result<u64> {
    let options = RunOptions {
        config_text: Some(config.to_toml()?),
        checkpoint_every: Duration::from_secs_f64(config.run.checkpoint_minutes.min(1e6) * 60.0),
        keep: config.run.keep_checkpoints,
        log_every: config.run.log_every,
        workers: config.run.workers,
        loaders: config.run.loaders,
        prefetch: config.run.prefetch,
        ..RunOptions::new(out)
    };
    let trainer = Trainer::new(task, vars.clone(), config.train.clone(), identity, options)?;
    let mut trainer = trainer.with_communicator(extras.communicator)?;
    let steps = trainer.run_watched(samples, watch)?;
    // Where the task computes with rounded copies, the optimiser's own tensors are the result.
    for (name, var) in vars {
        var.set(&trainer.optimizer().vars()[name].as_detached_tensor().copy()?)?;
    }
    Ok(steps)
}

/// Pictures and samples for validation, if there are any.
fn unseen(config: &Config, data: &Path, watch: &mut dyn Watch) -> Result<Option<(ImageStore, Mixture)>> {
    if config.validation.every == 0 {
        return Ok(None);
    }
    let root = config.validation.data.as_deref().unwrap_or(data);
    let unseen = DataConfig {
        datasets: config.data.datasets.clone(),
        expressions: Expressions::First,
        empty_narratives: EmptyNarratives::Drop,
        ..DataConfig::default()
    };
    match Mixture::open(root, "val", &unseen, config.train.seed) {
        Ok(mixture) => Ok(Some((ImageStore::open(root)?, mixture))),
        // Asked for by name, it must be there; by default it is a courtesy.
        Err(error) if config.validation.data.is_some() => Err(error),
        Err(error) => {
            watch.note(&format!("no validation: {error}"));
            Ok(None)
        }
    }
}
