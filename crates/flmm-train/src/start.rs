//! What a run begins with, and what it ends with: models opened, a head made, the finished head written.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use flmm::grounder::{GroundingHead, HeadSizes};
use flmm::lmm;
use flmm::sam::{Sam, read_checkpoint};
use flmm::weights::{Params, load_checkpoint, save_safetensors};
use flmm::{Error, Grounder, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::config::{Config, Mode};
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
    pub(crate) grounder: Grounder,
    pub(crate) sizes: HeadSizes,
    /// All tensors of the head.
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Digest of SAM's frozen part.
    sam: String,
}

impl Start {
    pub(crate) fn open(config: &Config, models: &Models) -> Result<Self> {
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
    pub(crate) fn identity(&self, config: &Config, mixture: &Mixture) -> Result<Value> {
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
