//! A whole training: models and data opened, trained, looked at, and the head written.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flmm::Result;
use flmm::lmm::OpenOptions;
use flmm_data::ImageStore;
use serde_json::Value;

use crate::config::{Config, Mode};
use crate::head::{self, HeadTask};
use crate::mixture::{DataConfig, EmptyNarratives, Expressions, Mixture};
use crate::observed::Observed;
use crate::onlook::Watched;
use crate::optim::Vars;
use crate::samples::Samples;
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
    watch.stage("opening the model");
    let images = ImageStore::open(data)?;
    let start = Start::open(config, models)?;
    watch.stage("reading the annotations");
    let seed = config.train.seed;
    let mixture = Mixture::open(data, "train", &config.data, seed)?;
    for (dataset, len) in mixture.parts() {
        watch.note(&format!("{}: {len} samples", dataset.name()));
    }
    let unseen = unseen(config, data, watch)?;
    let seen = Observed { grounder: &start.grounder, mixture: &mixture, images: &images };
    let unseen =
        unseen.as_ref().map(|(images, mixture)| Observed { grounder: &start.grounder, mixture, images });
    let validation = unseen.as_ref().map(|observed| {
        let masks = config.mode == Mode::Head;
        Validation::new(observed, &config.validation, out, config.head.phrases_at_once, masks)
    });
    let identity = start.identity(config, &mixture)?;
    let (trainable, mut vars) = head::trainable(&start.sizes, &start.tensors)?;
    let selector_of = |name: &str| name.starts_with("keyword_selector.");
    let (steps, skipped, watched) = match config.mode {
        Mode::Head => {
            if config.head.selector.is_none() {
                vars.retain(|name, _| !selector_of(name));
            }
            let task = HeadTask::new(trainable, config.head)?;
            let samples = Tolerant::new(&seen, out, config.data.max_broken, seed)?;
            let mut watched = Watched::new(watch, validation.as_ref(), task.head(), &samples, config, out);
            let steps = train(&task, &vars, config, identity, &samples, out, &mut watched)?;
            (steps, samples.skipped(), watched.found())
        }
        Mode::Selector => {
            vars.retain(|name, _| selector_of(name));
            let task = SelectorTask::of(&trainable, config.head.selector.unwrap_or_default())?;
            let samples = Tolerant::new(&seen, out, config.data.max_broken, seed)?;
            let mut watched = Watched::new(watch, validation.as_ref(), &trainable, &samples, config, out);
            let steps = train(&task, &vars, config, identity, &samples, out, &mut watched)?;
            (steps, samples.skipped(), watched.found())
        }
    };
    let total = config.train.epochs * mixture.len().div_ceil(config.train.batch_size) as u64;
    let (began, metrics) = watched;
    let folder = out.join(HEAD);
    let head = match steps == total {
        // A run that was finished before keeps its head.
        true if began == total && folder.is_dir() => Some(folder),
        true => Some(start.finish(config, models, &vars, &metrics, out)?),
        false => None,
    };
    Ok(Outcome { steps, total, head, skipped })
}

/// Runs the trainer; the tensors of `vars` are trained in place. Gives the steps taken.
fn train<T: Task>(
    task: &T,
    vars: &Vars,
    config: &Config,
    identity: Value,
    samples: &dyn Samples<T::Sample>,
    out: &Path,
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
    let mut trainer = Trainer::new(task, vars.clone(), config.train.clone(), identity, options)?;
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
