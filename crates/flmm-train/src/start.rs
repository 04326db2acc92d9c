//! What a run begins with, and what it ends with: models opened, a head made, the finished head written.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use flmm::grounder::{HeadSettings, RefinerKind};
use flmm::weights::{load_checkpoint, save_safetensors};
use flmm::{Error, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::config::{Config, Mode};
use crate::frozen::{Frozen, sam_of};
use crate::head;
use crate::mixture::Mixture;
use crate::optim::Vars;
use crate::run::Models;
use crate::selector::SelectorConfig;

/// Name of the finished head in a run's folder.
pub(crate) const HEAD: &str = "head";

const WRONG_START: &str = "begin from a head made for this LMM and this SAM, or from none";

/// What a run begins with.
pub(crate) struct Start {
    /// The models that do not learn.
    pub(crate) frozen: Frozen,
    /// What of the head its tensors do not tell.
    pub(crate) settings: HeadSettings,
    /// All tensors of the head.
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Digest of SAM's frozen part.
    sam: String,
}

impl Start {
    /// `choose` gives the attention maps that the head looks at, if not all.
    pub(crate) fn open(
        config: &Config,
        models: &Models,
        choose: impl FnOnce(&Frozen) -> Result<Option<Vec<u32>>>,
    ) -> Result<Self> {
        let device = &models.options.device;
        if config.mode == Mode::Selector && models.head.is_none() {
            return Err(Error::request(
                "training the keyword selector alone needs a head to train it for",
                "name one with --head",
            ));
        }
        let refiner = config.head.refiner;
        let (sam_config, sam_tensors) = sam_of(models, refiner)?;
        let frozen = Frozen::new(models, sam_config, refiner)?;
        if let Some(wanted) = &config.model.lmm
            && wanted != frozen.spec.name
        {
            return Err(Error::request(
                format!(
                    "the configuration is for {wanted}, but `{}` is {}",
                    models.lmm.display(),
                    frozen.spec.name
                ),
                "choose the configuration of this LMM, or the LMM of this configuration",
            ));
        }
        let settings = HeadSettings { channels_used: choose(&frozen)?, refiner };
        let sizes = &frozen.sizes;
        let given = match &models.head {
            Some(path) => load_checkpoint(path, Some(DType::F32), device)?,
            None => HashMap::new(),
        };
        let width = given.get("mask_head.conv_seg.weight").and_then(|weight| weight.dims().get(1).copied());
        let base_channels = width.unwrap_or(config.head.base_channels);
        let keeps_selector = given.contains_key("keyword_selector.weight").then(SelectorConfig::default);
        let selector = config.head.selector.or(keeps_selector);
        let sam = (refiner == RefinerKind::Sam).then_some(&sam_tensors);
        let seed = config.train.seed;
        let fresh = head::init_as(sizes, &settings, base_channels, selector.as_ref(), sam, seed)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in fresh {
            tensors.insert(name, tensor.to_device(device)?);
        }
        if let Some(path) = &models.head {
            lay_over(path, &mut tensors, given)?;
        }
        let encoder = sam_tensors.iter().filter(|(name, _)| name.starts_with("image_encoder.neck."));
        let sam = digest(encoder.map(|(name, tensor)| (name.as_str(), tensor)).collect::<BTreeMap<_, _>>())?;
        Ok(Self { frozen, settings, tensors, sam })
    }

    /// What a checkpoint of this run must agree with: all that decides its result.
    pub(crate) fn identity(&self, config: &Config, mixture: &Mixture) -> Result<Value> {
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
                "name": self.frozen.spec.name,
                "dtype": config.model.dtype,
                "channels": self.frozen.sizes.channels,
                "channels_used": self.settings.channels_used,
                "hidden_size": self.frozen.sizes.hidden_size,
                "weights": self.frozen.revision()?,
            },
            "sam": { "image_size": self.frozen.sizes.sam.image_size, "weights": self.sam },
            "start": digest(self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect())?,
        }))
    }

    /// Writes `out/head`, complete or not at all.
    pub(crate) fn finish(
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
            "channels": self.frozen.sizes.channels,
            "channels_used": self.settings.channels_used,
            "layers": self.frozen.sizes.layers,
            "hidden_size": self.frozen.sizes.hidden_size,
            "refiner": self.settings.refiner,
            "merge": "mean",
            "keyword_selector": tensors.contains_key("keyword_selector.weight"),
            "parameters": parameters,
            "trained": { "mode": config.mode, "datasets": config.data.datasets, "epochs": config.train.epochs,
                "batch_size": config.train.batch_size, "learning_rate": config.train.learning_rate },
            "metrics": metrics.iter().map(|(name, value)| (name.clone(), json!(value))).collect::<Map<_, _>>(),
        });
        let (folder, temporary) = (out.join(HEAD), out.join(format!(".head.{}.tmp", std::process::id())));
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
