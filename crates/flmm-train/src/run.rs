//! A whole training: models and data opened, trained, looked at, and the head written.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Tensor};
use flmm::grounder::{GroundingHead, HeadSizes};
use flmm::lmm::{self, OpenOptions};
use flmm::sam::{Sam, read_checkpoint};
use flmm::weights::{Params, load_checkpoint, save_safetensors};
use flmm::{Error, Grounder, Result};
use flmm_data::ImageStore;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::config::{Config, Mode};
use crate::head::{self, HeadTask};
use crate::mixture::{DataConfig, EmptyNarratives, Expressions, Mixture};
use crate::observed::Observed;
use crate::optim::Vars;
use crate::samples::Samples;
use crate::selector::{SelectorConfig, SelectorTask};
use crate::settings::RunOptions;
use crate::task::Task;
use crate::tensorboard::EventWriter;
use crate::tolerant::Tolerant;
use crate::trainer::Trainer;
use crate::validation::Validation;
use crate::watch::{After, Step, Watch};

const WRONG_START: &str = "begin from a head made for this LMM and this SAM, or from none";

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
/// What opening models and data gives; as [`Trainer::run`]; [`Error::Request`] when too many samples are broken.
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
    let (steps, skipped, metrics) = match config.mode {
        Mode::Head => {
            if config.head.selector.is_none() {
                vars.retain(|name, _| !selector_of(name));
            }
            let task = HeadTask::new(trainable, config.head)?;
            let mut watched = Watched::new(watch, validation.as_ref(), task.head(), config, out);
            let (steps, skipped) = train(&task, &vars, config, identity, &seen, out, &mut watched)?;
            (steps, skipped, watched.values)
        }
        Mode::Selector => {
            vars.retain(|name, _| selector_of(name));
            let task = SelectorTask::of(&trainable, config.head.selector.unwrap_or_default())?;
            let mut watched = Watched::new(watch, validation.as_ref(), &trainable, config, out);
            let (steps, skipped) = train(&task, &vars, config, identity, &seen, out, &mut watched)?;
            (steps, skipped, watched.values)
        }
    };
    let total = config.train.epochs * mixture.len().div_ceil(config.train.batch_size) as u64;
    let head = match steps == total {
        true => Some(start.finish(config, models, &vars, &metrics, out)?),
        false => None,
    };
    Ok(Outcome { steps, total, head, skipped })
}

/// Runs the trainer; the tensors of `vars` are trained in place. Gives the steps taken and the samples skipped.
fn train<T: Task>(
    task: &T,
    vars: &Vars,
    config: &Config,
    identity: Value,
    samples: &dyn Samples<T::Sample>,
    out: &Path,
    watch: &mut dyn Watch,
) -> Result<(u64, usize)> {
    let samples = Tolerant::new(samples, out, config.data.max_broken, config.train.seed)?;
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
    let steps = trainer.run_watched(&samples, watch)?;
    // Where the task computes with rounded copies, the optimiser's own tensors are the result.
    for (name, var) in vars {
        var.set(&trainer.optimizer().vars()[name].as_detached_tensor().copy()?)?;
    }
    Ok((steps, samples.skipped()))
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

/// What a run begins with.
struct Start {
    grounder: Grounder,
    sizes: HeadSizes,
    /// All tensors of the head.
    tensors: BTreeMap<String, Tensor>,
    /// Digest of SAM's frozen part.
    sam: String,
}

impl Start {
    fn open(config: &Config, models: &Models) -> Result<Self> {
        let device = &models.options.device;
        if config.mode == Mode::Selector && models.head.is_none() {
            return Err(Error::request(
                "training the keyword selector alone needs a head to train it for",
                "name one with --head",
            ));
        }
        let lmm = lmm::open_with(&models.lmm, &models.options)?;
        if let Some(wanted) = &config.model.lmm
            && wanted != lmm.spec().name
        {
            return Err(Error::request(
                format!(
                    "the configuration is for {wanted}, but `{}` is {}",
                    models.lmm.display(),
                    lmm.spec().name
                ),
                "choose the configuration of this LMM, or the LMM of this configuration",
            ));
        }
        let (sam_config, sam_tensors) = read_checkpoint(&models.sam, device)?;
        let sizes = HeadSizes {
            channels: lmm.spec().channels,
            layers: lmm.spec().layers,
            hidden_size: lmm.decoder().config().hidden_size,
            sam: sam_config,
        };
        let given = match &models.head {
            Some(path) => load_checkpoint(path, Some(DType::F32), device)?,
            None => HashMap::new(),
        };
        let width = given.get("mask_head.conv_seg.weight").and_then(|weight| weight.dims().get(1).copied());
        let base_channels = width.unwrap_or(config.head.base_channels);
        let keeps_selector = given.contains_key("keyword_selector.weight").then(SelectorConfig::default);
        let selector = config.head.selector.or(keeps_selector);
        let fresh =
            head::init(&sizes, base_channels, selector.as_ref(), Some(&sam_tensors), config.train.seed)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in fresh {
            tensors.insert(name, tensor.to_device(device)?);
        }
        if let Some(path) = &models.head {
            lay_over(path, &mut tensors, given)?;
        }
        let frozen = Params::new("the head to begin from", tensors.clone().into_iter().collect());
        let head = GroundingHead::from_params(&sizes, &frozen)?;
        frozen.finish(WRONG_START)?;
        let encoder = sam_tensors.iter().filter(|(name, _)| name.starts_with("image_encoder.neck."));
        let sam = digest(encoder.map(|(name, tensor)| (name.as_str(), tensor)).collect::<BTreeMap<_, _>>())?;
        let params = Params::new(&models.sam, sam_tensors);
        let encoder = Sam::load(&sizes.sam, &params)?;
        params.finish("give a SAM checkpoint")?;
        Ok(Self { grounder: Grounder::from_parts(lmm, encoder, head), sizes, tensors, sam })
    }

    /// What a checkpoint of this run must agree with: all that decides its result.
    fn identity(&self, config: &Config, mixture: &Mixture) -> Result<Value> {
        let lmm = self.grounder.lmm();
        let some: Vec<u32> = (0..lmm.decoder().config().vocab_size.min(64) as u32).collect();
        let embedded = lmm.decoder().embed(&some)?;
        let parts = mixture.parts().into_iter().map(|(dataset, len)| (dataset.name().to_owned(), json!(len)));
        Ok(json!({
            "mode": config.mode,
            "head": config.head,
            "data": {
                "expressions": config.data.expressions,
                "empty_narratives": config.data.empty_narratives,
                "narrative_instruction": config.data.narrative_instruction,
                "samples": parts.collect::<Map<_, _>>(),
            },
            "lmm": {
                "name": lmm.spec().name,
                "dtype": config.model.dtype,
                "channels": self.sizes.channels,
                "hidden_size": self.sizes.hidden_size,
                "weights": digest(BTreeMap::from([("embed", &embedded)]))?,
            },
            "sam": { "image_size": self.sizes.sam.image_size, "weights": self.sam },
            "start": digest(self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect())?,
        }))
    }

    /// Writes `out/head`, complete or not at all.
    fn finish(
        &self,
        config: &Config,
        models: &Models,
        vars: &Vars,
        metrics: &[(String, f64)],
        out: &Path,
    ) -> Result<PathBuf> {
        let parameters: usize = vars.values().map(|var| var.elem_count()).sum();
        let mut tensors = self.tensors.clone();
        tensors.extend(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())));
        let about = json!({
            "format": 1,
            "lmm": models.name,
            "channels": self.sizes.channels,
            "layers": self.sizes.layers,
            "hidden_size": self.sizes.hidden_size,
            "refiner": "sam",
            "merge": "mean",
            "keyword_selector": tensors.contains_key("keyword_selector.weight"),
            "parameters": parameters,
            "trained": { "mode": config.mode, "datasets": config.data.datasets, "epochs": config.train.epochs,
                "batch_size": config.train.batch_size, "learning_rate": config.train.learning_rate },
            "metrics": metrics.iter().map(|(name, value)| (name.clone(), json!(value))).collect::<Map<_, _>>(),
        });
        let (folder, temporary) = (out.join("head"), out.join(format!(".head.{}.tmp", std::process::id())));
        let io = |e| Error::io(&folder, e);
        std::fs::create_dir_all(&temporary).map_err(io)?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let written = save_safetensors(temporary.join("head.safetensors"), &tensors, &metadata)
            .and_then(|()| flmm::atomic::write(temporary.join("head.json"), |to| writeln!(to, "{about:#}")))
            .and_then(|()| {
                if folder.exists() {
                    std::fs::remove_dir_all(&folder).map_err(io)?;
                }
                std::fs::rename(&temporary, &folder).map_err(io)
            });
        if let Err(error) = written {
            // The first error is the one to tell.
            let _ = std::fs::remove_dir_all(&temporary);
            return Err(error);
        }
        Ok(folder)
    }
}

/// Lays the tensors of the head at `path` over fresh ones; what it lacks stays fresh.
fn lay_over(
    path: &Path,
    tensors: &mut BTreeMap<String, Tensor>,
    given: HashMap<String, Tensor>,
) -> Result<()> {
    let mut problems = Vec::new();
    for (name, tensor) in given {
        match tensors.get_mut(&name) {
            Some(fresh) if fresh.dims() == tensor.dims() => *fresh = tensor,
            Some(fresh) => {
                problems.push(format!(
                    "tensor `{name}`: expected {:?}, found {:?}",
                    fresh.dims(),
                    tensor.dims()
                ));
            }
            // Released heads may hold the frozen encoder too.
            None if name.starts_with("sam.model.image_encoder.") => {}
            None => problems.push(format!("unexpected tensor `{name}`")),
        }
    }
    problems.sort();
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::weights(path, problems.join("\n"), WRONG_START)),
    }
}

/// The first half of a SHA-256 over names and values.
fn digest(tensors: BTreeMap<&str, &Tensor>) -> Result<String> {
    let mut hash = Sha256::new();
    for (name, tensor) in tensors {
        hash.update(name.as_bytes());
        for value in tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()? {
            hash.update(value.to_le_bytes());
        }
    }
    Ok(hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

/// Adds validation and TensorBoard to what the caller watches.
struct Watched<'a> {
    inner: &'a mut (dyn Watch + 'a),
    validation: Option<&'a Validation<'a>>,
    head: &'a GroundingHead,
    every: u64,
    out: &'a Path,
    events: Option<EventWriter>,
    /// What the last validation found.
    values: Vec<(String, f64)>,
}

impl<'a> Watched<'a> {
    fn new(
        inner: &'a mut (dyn Watch + 'a),
        validation: Option<&'a Validation<'a>>,
        head: &'a GroundingHead,
        config: &Config,
        out: &'a Path,
    ) -> Self {
        let every = config.validation.every;
        Self { inner, validation, head, every, out, events: None, values: Vec::new() }
    }
}

impl Watch for Watched<'_> {
    fn stage(&mut self, what: &str) {
        self.inner.stage(what);
    }

    fn begin(&mut self, step: u64, total: u64, per_epoch: u64) {
        self.inner.begin(step, total, per_epoch);
        // Curves are a courtesy: a run does not fail for want of them.
        match EventWriter::create(&self.out.join("tensorboard"), step) {
            Ok(events) => self.events = Some(events),
            Err(error) => self.inner.note(&format!("no TensorBoard curves: {error}")),
        }
    }

    fn after_step(&mut self, step: &Step) -> Result<After> {
        let mut after = self.inner.after_step(step)?;
        let due = self.every > 0 && (step.step.is_multiple_of(self.every) || step.step == step.total);
        if let (true, Some(validation)) = (due, self.validation) {
            self.inner.stage("validating");
            let found = validation.look(self.head, step.step)?;
            if let Some(events) = &mut self.events {
                for (key, picture) in &found.pictures {
                    events.picture(step.step, key, picture)?;
                }
            }
            self.values.clone_from(&found.values);
            after.values.extend(found.values);
        }
        Ok(after)
    }

    fn line(&mut self, line: &Map<String, Value>) -> Result<()> {
        if let Some(events) = &mut self.events {
            let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
            let tag = |name: &str| match name.strip_prefix("val_") {
                Some(name) => format!("val/{name}"),
                None => format!("train/{name}"),
            };
            let named: Vec<(String, f64)> = line
                .iter()
                .filter(|(name, _)| *name != "step")
                .filter_map(|(name, value)| Some((tag(name), value.as_f64()?)))
                .collect();
            events.scalars(step, named.iter().map(|(name, value)| (name.as_str(), *value)))?;
        }
        self.inner.line(line)
    }

    fn saved(&mut self, step: u64) {
        self.inner.saved(step);
    }

    fn note(&mut self, text: &str) {
        self.inner.note(text);
    }
}
