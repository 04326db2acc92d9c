//! A whole training: models and data opened, trained, looked at, and the head written.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flmm::Result;
use flmm::grounder::HeadSettings;
use flmm::lmm::OpenOptions;
use flmm_data::{ImageStore, Part};
use serde_json::{Value, json};

use crate::cache::{CachedSamples, FeatureCache};
use crate::checkpoint;
use crate::config::{Config, Mode};
use crate::distributed::{Communicator, Single, from_first, gather, together};
use crate::features::{Both, FeatureOptions, PROBES};
use crate::frozen::Frozen;
use crate::head::{self, HeadSample, HeadTask};
use crate::mixture::{DataConfig, DataRevision, EmptyNarratives, Expressions, Mixture};
use crate::observed::Observed;
use crate::onlook::{Found, Watched};
use crate::optim::Vars;
use crate::samples::{Order, Samples};
use crate::selection::{Basis, chosen_maps};
use crate::selector::SelectorTask;
use crate::settings::RunOptions;
use crate::start::{HEAD, Start, begun_with};
use crate::task::Task;
use crate::tolerant::{Tolerance, Tolerant, is_about_the_sample};
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
    /// SAM: a checkpoint, or a folder with one. Not needed for a head without a refiner.
    pub sam: Option<PathBuf>,
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
    /// Samples that could not be used, of all ranks.
    pub skipped: usize,
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

/// Trains as `config` says on the datasets below `data`, in the folder `out`, from the newest checkpoint there.
///
/// `out` gets `config.toml`, `metrics.jsonl`, `skipped.jsonl`, `checkpoints/`, `validation/`, `tensorboard/` and at the
/// end `head/`, which `flmm chat --head` takes. Of several ranks only rank 0 writes there; the others list the samples
/// they skip in `out/rank-R`.
///
/// # Errors
/// What opening models and data gives; as [`Trainer::run`]; [`flmm::Error::Request`] when `config` contradicts the head
/// to begin from, or too many samples are broken. All ranks end when one does.
pub fn run(
    config: &Config,
    models: &Models,
    data: &Path,
    out: &Path,
    extras: &Extras<'_>,
    watch: &mut dyn Watch,
) -> Result<Outcome> {
    watch.stage("opening the model");
    let opened = Run::open(config, models, data, out, extras, watch);
    together(extras.communicator, opened)?.train(watch)
}

/// A run with its data and what is known of its models.
struct Run<'a> {
    /// With all that follows from the head to begin from.
    config: Config,
    /// Of the head to begin from, if there is one.
    settings: Option<HeadSettings>,
    models: &'a Models,
    out: &'a Path,
    ranks: &'a dyn Communicator,
    frozen: Frozen,
    images: ImageStore,
    mixture: Mixture,
    revision: DataRevision,
    cache: Option<FeatureCache>,
    /// Pictures and samples for validation, if there are any.
    unseen: Option<(ImageStore, Mixture)>,
}

impl<'a> Run<'a> {
    fn open(
        config: &Config,
        models: &'a Models,
        data: &Path,
        out: &'a Path,
        extras: &Extras<'a>,
        watch: &mut dyn Watch,
    ) -> Result<Self> {
        let ranks = extras.communicator;
        let (config, settings) = begun_with(config, models)?;
        let images = ImageStore::open(data)?;
        let mixture = Mixture::open(data, "train", &config.data, config.train.seed)?;
        let frozen = Frozen::new(&config, models)?;
        for (dataset, len) in mixture.parts() {
            watch.note(&format!("{}: {len} samples", dataset.name()));
        }
        let revision = mixture.revision()?;
        let part = Part { index: ranks.rank(), count: ranks.world() };
        let open = |features: &FeatureOptions| features.open(&config, &frozen, &mixture, &revision, part);
        let cache = extras.features.as_ref().map(open).transpose()?;
        let unseen = if ranks.rank() == 0 { unseen(&config, data, watch)? } else { None };
        Ok(Self { config, settings, models, out, ranks, frozen, images, mixture, revision, cache, unseen })
    }

    fn train(&self, watch: &mut dyn Watch) -> Result<Outcome> {
        let Self { config, frozen, ranks, .. } = self;
        let (rank, world) = (ranks.rank(), ranks.world());
        let observed = Observed { frozen, mixture: &self.mixture, images: &self.images };
        let cached =
            self.cache.as_ref().map(|cache| CachedSamples::new(cache, &observed).on(frozen.device()));
        let samples: &dyn Samples<HeadSample> = match &cached {
            Some(cached) => cached,
            None => &observed,
        };
        if let Some(cached) = &cached {
            let part = Part { index: rank, count: world };
            let estimate = together(*ranks, cached.estimate(part, PROBES, is_about_the_sample))?;
            watch.note(&estimate.to_string());
            if self.unseen.is_none() && cached.missing(0).is_empty() {
                frozen.release();
            }
        }
        let settings = from_first(*ranks, || self.settings(samples))?;
        let start = Start::new(config, self.models, frozen, settings);
        let start = together(*ranks, start)?;

        let unseen = self.unseen.as_ref();
        let unseen = unseen.map(|(images, mixture)| Observed { frozen, mixture, images });
        let validation = unseen.as_ref().map(|observed| {
            let masks = config.mode == Mode::Head;
            Validation::new(observed, &config.validation, self.out, config.head.phrases_at_once, masks)
        });
        let validation = validation.as_ref().map(|validation| (validation, config.validation.every));
        let order =
            Order { len: self.mixture.len(), batch_size: config.train.batch_size, seed: config.train.seed };
        let taken = from_first(*ranks, || checkpoint::steps(&self.out.join("checkpoints")))?;
        let tolerance = Tolerance { max_share: config.data.max_broken, order, ranks: world, taken };
        let curves = self.out.join("tensorboard");
        let curves = (rank == 0).then_some(&*curves);

        let begun = self.own_folder().and_then(|own| {
            let (head, vars) = head::trainable_as(&frozen.sizes, &start.settings, &start.tensors)?;
            Ok((own, head, vars))
        });
        let (own, head, mut vars) = together(*ranks, begun)?;
        let of_selector = |name: &str| name.starts_with("keyword_selector.");
        let (steps, skipped, found) = match config.mode {
            Mode::Head => {
                if config.head.selector.is_none() {
                    vars.retain(|name, _| !of_selector(name));
                }
                let begun = HeadTask::new(head, config.head)
                    .and_then(|task| Ok((task, Tolerant::new(samples, &own, tolerance)?)));
                let (task, samples) = together(*ranks, begun)?;
                let news = Both { samples: &samples, cache: self.cache.as_ref() };
                let mut watched = Watched::new(watch, validation, task.head(), &news, curves);
                let steps = self.take_steps(&task, &vars, &start, &samples, &mut watched)?;
                (steps, samples.skipped(), watched.found())
            }
            Mode::Selector => {
                vars.retain(|name, _| of_selector(name));
                let begun = SelectorTask::of(&head, config.head.selector.unwrap_or_default())
                    .and_then(|task| Ok((task, Tolerant::new(&observed, &own, tolerance)?)));
                let (task, samples) = together(*ranks, begun)?;
                let mut watched = Watched::new(watch, validation, &head, &samples, curves);
                let steps = self.take_steps(&task, &vars, &start, &samples, &mut watched)?;
                (steps, samples.skipped(), watched.found())
            }
        };
        let skipped = gather(*ranks, Ok(skipped))?.into_iter().sum();
        let head = self.finished(&start, &vars, steps, &found)?;
        Ok(Outcome { steps, total: found.total, head, skipped })
    }

    /// Settings of the head: those of the one to begin from, or of the configuration, maps chosen by some of `samples`.
    fn settings(&self, samples: &dyn Samples<HeadSample>) -> Result<HeadSettings> {
        if let Some(settings) = &self.settings {
            return Ok(settings.clone());
        }
        let chosen = |count| {
            let basis = Basis {
                channels: self.frozen.sizes.channels,
                lmm: self.frozen.revision()?,
                data: json!(self.revision),
            };
            chosen_maps(count, &basis, samples, self.out)
        };
        let channels_used = self.config.head.maps.map(chosen).transpose()?;
        Ok(HeadSettings { channels_used, refiner: self.config.head.refiner.unwrap_or_default() })
    }

    /// The folder for what is not the run's but a rank's.
    fn own_folder(&self) -> Result<PathBuf> {
        let own = match self.ranks.rank() {
            0 => self.out.to_owned(),
            rank => self.out.join(format!("rank-{rank}")),
        };
        std::fs::create_dir_all(&own).map_err(|e| flmm::Error::io(&own, e))?;
        Ok(own)
    }

    /// Runs the trainer; the tensors of `vars` are trained in place. Gives the steps taken.
    fn take_steps<T: Task>(
        &self,
        task: &T,
        vars: &Vars,
        start: &Start,
        samples: &dyn Samples<T::Sample>,
        watch: &mut dyn Watch,
    ) -> Result<u64> {
        let run = &self.config.run;
        let trainer = || {
            let options = RunOptions {
                config_text: Some(self.config.to_toml()?),
                // The selector alone is no head.
                head_json: (self.config.mode == Mode::Head).then(|| self.description(start, vars, &[])),
                checkpoint_every: Duration::from_secs_f64(run.checkpoint_minutes.min(1e6) * 60.0),
                keep: run.keep_checkpoints,
                log_every: run.log_every,
                workers: run.workers,
                loaders: run.loaders,
                prefetch: run.prefetch,
                ..RunOptions::new(self.out)
            };
            let identity =
                start.identity(&self.config, self.models, &self.frozen, &self.mixture, &self.revision)?;
            Trainer::new(task, vars.clone(), self.config.train.clone(), identity, options)?
                .with_communicator(self.ranks)
        };
        let mut trainer = together(self.ranks, trainer())?;
        let steps = trainer.run_watched(samples, watch)?;
        // Where the task computes with rounded copies, the optimiser's own tensors are the result.
        for (name, var) in vars {
            var.set(&trainer.optimizer().vars()[name].as_detached_tensor().copy()?)?;
        }
        Ok(steps)
    }

    fn description(&self, start: &Start, vars: &Vars, metrics: &[(String, f64)]) -> Value {
        start.description(&self.config, self.models, &self.frozen, vars, metrics)
    }

    /// The head in its folder, if all steps were taken.
    fn finished(&self, start: &Start, vars: &Vars, steps: u64, found: &Found) -> Result<Option<PathBuf>> {
        let folder = self.out.join(HEAD);
        // A run that was finished before keeps its head.
        let kept = self.ranks.rank() != 0 || (found.began == found.total && folder.is_dir());
        Ok(match (steps == found.total, kept) {
            (true, true) => Some(folder),
            (true, false) => {
                Some(start.finish(vars, &self.description(start, vars, &found.values), self.out)?)
            }
            (false, _) => None,
        })
    }
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
    let open = || Ok((ImageStore::open(root)?, Mixture::open(root, "val", &unseen, config.train.seed)?));
    match open() {
        Ok(unseen) => Ok(Some(unseen)),
        // Asked for by name, it must be there; by default it is a courtesy.
        Err(error) if config.validation.data.is_some() => Err(error),
        Err(error) => {
            watch.note(&format!("no validation: {error}"));
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use flmm_data::world::{self, Level, Split};

    use super::*;
    use crate::cache::{MapValues, Values};

    struct Silent;
    impl Watch for Silent {}

    #[test]
    fn a_complete_cache_opens_no_model() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("w");
        world::write(&data, Split::Train, 2, 3, Level::One, &|_| {}).unwrap();
        let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny");
        let models = Models {
            name: "flmm-tiny".into(),
            lmm: bundle.join("lmm"),
            sam: Some(bundle.join("sam")),
            head: None,
            options: OpenOptions::new(DType::F32, &Device::Cpu),
        };
        // Maps are chosen by samples, and those of the cache will do.
        let text = "[model]\ndtype = 'f32'\n[head]\nbase_channels = 2\nmaps = 3\n[data]\ndatasets = ['png']\n\
                    limit = 2\n[train]\nepochs = 1\nbatch_size = 2\n";
        let config = Config::parse(text, Path::new("test.toml"), &[]).unwrap();
        let features =
            FeatureOptions { dir: dir.path().join("c"), values: Values::F32, maps: MapValues::Same };
        let extras = Extras { features: Some(features), ..Extras::default() };
        let outs = ["made", "read"].map(|out| dir.path().join(out));
        let heads = outs.each_ref().map(|out| {
            let run = Run::open(&config, &models, &data, out, &extras, &mut Silent).unwrap();
            let head = run.train(&mut Silent).unwrap().head.unwrap();
            assert_eq!(run.frozen.is_open(), out.ends_with("made"));
            std::fs::read(head.join("head.safetensors")).unwrap()
        });
        assert!(heads[0] == heads[1]);
    }

    #[test]
    fn a_cache_that_knows_what_is_broken_opens_no_model() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("w");
        world::write(&data, Split::Train, 2, 4, Level::One, &|_| {}).unwrap();
        let pictures = data.join("coco/train2017");
        let mut names: Vec<_> = std::fs::read_dir(&pictures).unwrap().map(|e| e.unwrap().path()).collect();
        names.sort();
        std::fs::remove_file(&names[1]).unwrap();
        let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny");
        let models = Models {
            name: "flmm-tiny".into(),
            lmm: bundle.join("lmm"),
            sam: Some(bundle.join("sam")),
            head: None,
            options: OpenOptions::new(DType::F32, &Device::Cpu),
        };
        let text = "[model]\ndtype = 'f32'\n[head]\nbase_channels = 2\n[data]\ndatasets = ['png']\n\
                    max_broken = 0.5\n[train]\nepochs = 2\nbatch_size = 2\n[run]\nloaders = 1\n";
        let config = Config::parse(text, Path::new("test.toml"), &[]).unwrap();
        let features =
            FeatureOptions { dir: dir.path().join("c"), values: Values::F32, maps: MapValues::Same };
        let extras = Extras { features: Some(features), ..Extras::default() };
        let [made, read] = ["made", "read"].map(|name| {
            let out = dir.path().join(name);
            let run = Run::open(&config, &models, &data, &out, &extras, &mut Silent).unwrap();
            let outcome = run.train(&mut Silent).unwrap();
            assert_eq!(run.frozen.is_open(), name == "made");
            let head = std::fs::read(outcome.head.unwrap().join("head.safetensors")).unwrap();
            let list = std::fs::read_to_string(out.join(crate::SKIPPED)).unwrap();
            // A picture may have several narratives; all of them are listed, and nothing else is.
            let missing = names[1].file_name().unwrap().to_str().unwrap();
            assert!(list.lines().all(|line| line.contains(missing)), "{list}");
            assert!(outcome.skipped > 0 && list.lines().count() == outcome.skipped, "{list}");
            (head, list)
        });
        assert!(made == read, "{} {}", made.1, read.1);
    }
}
