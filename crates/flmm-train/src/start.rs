//! What a run begins with, and what it ends with: a head made or taken over, and the finished head written.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use flmm::grounder::{HeadSettings, RefinerKind};
use flmm::mask_head::UNetConfig;
use flmm::weights::{load_checkpoint, save_safetensors};
use flmm::{Error, Result};
use serde_json::{Map, Value, json};

use crate::config::{Config, Mode};
use crate::digest;
use crate::frozen::Frozen;
use crate::head;
use crate::mixture::{DataRevision, Mixture};
use crate::optim::Vars;
use crate::run::Models;
use crate::selector::SelectorConfig;

/// Name of the finished head in a run's folder.
pub(crate) const HEAD: &str = "head";
/// Name of its description.
pub(crate) const HEAD_JSON: &str = "head.json";
/// Name of its tensors.
pub(crate) const TENSORS: &str = "head.safetensors";

const WRONG_START: &str = "begin from a head made for this LMM and this SAM, or from none";

/// `config` with all that follows from the head to begin from, and that head's settings.
///
/// # Errors
/// [`Error::Config`] if its `head.json` cannot be read; [`Error::Request`] naming the key in which `config` contradicts
/// it, or if the keyword selector alone is to be trained and there is no head.
pub(crate) fn begun_with(config: &Config, models: &Models) -> Result<(Config, Option<HeadSettings>)> {
    let mut config = config.clone();
    if config.mode == Mode::Selector && models.head.is_none() {
        return Err(Error::request(
            "training the keyword selector alone needs a head to train it for",
            "name one with --head",
        ));
    }
    let given = models.head.as_deref().map(HeadSettings::read).transpose()?;
    if let (Some(given), Some(path)) = (&given, &models.head) {
        let conflict = |key: &str, wanted: String, found: String| {
            let what = format!("`{key}` is {wanted}, but the head in {} {found}", path.display());
            Err(Error::request(what, format!("leave `{key}` out, or begin from another head")))
        };
        if let Some(wanted) = config.head.refiner.filter(|wanted| *wanted != given.refiner) {
            let name = |kind| if kind == RefinerKind::Sam { "sam" } else { "none" };
            return conflict("head.refiner", name(wanted).into(), format!("has {}", name(given.refiner)));
        }
        match (config.head.maps, &given.channels_used) {
            (Some(wanted), None) => {
                return conflict("head.maps", wanted.to_string(), "looks at all attention maps".into());
            }
            (Some(wanted), Some(used)) if used.len() != wanted => {
                let found = format!("looks at {} attention maps", used.len());
                return conflict("head.maps", wanted.to_string(), found);
            }
            _ => {}
        }
        config.head.refiner = Some(given.refiner);
    }
    if *config.head.refiner.get_or_insert_default() == RefinerKind::None {
        // There are no refined masks, and so there are no losses of them.
        config.head.losses = config.head.losses.coarse_only();
    }
    Ok((config, given))
}

/// What a run begins with.
pub(crate) struct Start {
    /// What of the head its tensors do not tell.
    pub(crate) settings: HeadSettings,
    /// All tensors of the head.
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Start {
    /// The head with `settings` that `models` name, or a fresh one.
    pub(crate) fn new(
        config: &Config,
        models: &Models,
        frozen: &Frozen,
        settings: HeadSettings,
    ) -> Result<Self> {
        let device = &models.options.device;
        let given = match &models.head {
            Some(path) => load_checkpoint(path, Some(DType::F32), device)?,
            None => HashMap::new(),
        };
        let width = match &models.head {
            Some(path) => width_of(path, &given, settings.channels(frozen.sizes.channels)?)?,
            None => None,
        };
        let base_channels = width.unwrap_or(config.head.base_channels);
        let keeps_selector = given.contains_key("keyword_selector.weight").then(SelectorConfig::default);
        let selector = config.head.selector.or(keeps_selector);
        let sam = frozen.sam.as_ref().map(|sam| &sam.refiner);
        let seed = config.train.seed;
        let fresh = head::init_as(&frozen.sizes, &settings, base_channels, selector.as_ref(), sam, seed)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in fresh {
            tensors.insert(name, tensor.to_device(device)?);
        }
        if let Some(path) = &models.head {
            lay_over(path, &mut tensors, given)?;
        }
        Ok(Self { settings, tensors })
    }

    /// What a checkpoint of this run must agree with: all that decides its result.
    pub(crate) fn identity(
        &self,
        config: &Config,
        models: &Models,
        frozen: &Frozen,
        mixture: &Mixture,
        revision: &DataRevision,
    ) -> Result<Value> {
        let parts = mixture.parts().into_iter().map(|(dataset, len)| (dataset.name().to_owned(), json!(len)));
        Ok(json!({
            "mode": config.mode,
            "head": config.head,
            "data": {
                "expressions": config.data.expressions,
                "empty_narratives": config.data.empty_narratives,
                "narrative_instruction": config.data.narrative_instruction,
                "samples": parts.collect::<Map<_, _>>(),
                "revision": revision,
            },
            "lmm": {
                "name": frozen.spec.name,
                "dtype": models.options.numbers(),
                "channels": frozen.sizes.channels,
                "channels_used": self.settings.channels_used,
                "hidden_size": frozen.sizes.hidden_size,
                "weights": frozen.revision()?,
                "image_size": models.options.image_size,
                "vision_towers": frozen.towers()?,
            },
            "sam": {
                "image_size": frozen.sizes.sam.image_size,
                "weights": frozen.sam.as_ref().map(|sam| &sam.digest),
            },
            "start": digest::tensors(self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)))?,
        }))
    }

    /// What `head.json` says of a head with these `vars` in training and, if it is finished, with these `metrics`.
    pub(crate) fn description(
        &self,
        config: &Config,
        models: &Models,
        frozen: &Frozen,
        vars: &Vars,
        metrics: &[(String, f64)],
    ) -> Value {
        let parameters: usize = vars.values().map(|var| var.elem_count()).sum();
        json!({
            "format": 1,
            "lmm": models.name,
            "channels": frozen.sizes.channels,
            "channels_used": self.settings.channels_used,
            "layers": frozen.sizes.layers,
            "hidden_size": frozen.sizes.hidden_size,
            "refiner": self.settings.refiner,
            "merge": "mean",
            "keyword_selector": self.tensors.contains_key("keyword_selector.weight"),
            "parameters": parameters,
            "trained": { "mode": config.mode, "datasets": config.data.datasets, "epochs": config.train.epochs,
                "batch_size": config.train.batch_size, "learning_rate": config.train.learning_rate },
            "metrics": metrics.iter().map(|(name, value)| (name.clone(), json!(value))).collect::<Map<_, _>>(),
        })
    }

    /// Writes `out/head`, the tensors of which `vars` were trained, complete or not at all.
    pub(crate) fn finish(&self, vars: &Vars, description: &Value, out: &Path) -> Result<PathBuf> {
        let mut tensors = self.tensors.clone();
        tensors.extend(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())));
        let (folder, temporary) = (out.join(HEAD), out.join(format!(".head.{}.tmp", std::process::id())));
        let io = |e| Error::io(&folder, e);
        std::fs::create_dir_all(&temporary).map_err(io)?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let written = save_safetensors(temporary.join(TENSORS), &tensors, &metadata)
            .and_then(|()| {
                flmm::atomic::write(temporary.join(HEAD_JSON), |to| writeln!(to, "{description:#}"))
            })
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

/// Width of the U-Net in the head at `path`, if it has one for `in_channels` maps. It must be whole: fresh tensors of a
/// width that a few bytes claim could take any amount of memory.
fn width_of(path: &Path, given: &HashMap<String, Tensor>, in_channels: usize) -> Result<Option<usize>> {
    const LAST: &str = "mask_head.conv_seg.weight";
    let Some(last) = given.get(LAST) else { return Ok(None) };
    let wrong = |what: String| Err(Error::weights(path, what, WRONG_START));
    let base_channels = match *last.dims() {
        [1, width, 1, 1] if width > 0 => width,
        ref found => return wrong(format!("tensor `{LAST}`: expected [1, width, 1, 1], found {found:?}")),
    };
    let unet = UNetConfig { base_channels, ..UNetConfig::new(in_channels) };
    let problem = |(name, shape): (String, Vec<usize>)| match given.get(&format!("mask_head.{name}")) {
        Some(tensor) if tensor.dims() == shape => None,
        Some(tensor) => {
            Some(format!("tensor `mask_head.{name}`: expected {shape:?}, found {:?}", tensor.dims()))
        }
        None => Some(format!("tensor `mask_head.{name}`: expected {shape:?}, but it is missing")),
    };
    let problems: Vec<String> = unet.shapes().into_iter().filter_map(problem).collect();
    match problems.is_empty() {
        true => Ok(Some(base_channels)),
        false => wrong(problems.join("\n")),
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_claimed_width_is_checked_before_anything_of_it_is_made() {
        let unet = UNetConfig { base_channels: 2, ..UNetConfig::new(3) };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let whole: HashMap<String, Tensor> = unet
            .shapes()
            .into_iter()
            .map(|(name, shape)| (format!("mask_head.{name}"), zeros(&shape)))
            .collect();
        let path = Path::new("head.safetensors");
        assert_eq!(width_of(path, &HashMap::new(), 3).unwrap(), None);
        assert_eq!(width_of(path, &whole, 3).unwrap(), Some(2));
        // One tensor of 4 MB claims a U-Net of 10^14 numbers.
        let last = ("mask_head.conv_seg.weight".to_owned(), zeros(&[1, 1 << 20, 1, 1]));
        let alone = HashMap::from([last.clone()]);
        let mut beside = whole.clone();
        beside.extend([last]);
        for given in [alone, beside] {
            let error = width_of(path, &given, 3).unwrap_err();
            assert!(error.to_string().contains(": expected [1048576, 3, 3, 3], "), "{error}");
            assert!(error.hint().is_some());
        }
        // Other maps than head.json says, a missing tensor, and no width at all.
        assert!(
            width_of(path, &whole, 4).unwrap_err().to_string().contains("expected [2, 4, 3, 3], found [2, 3")
        );
        let mut less = whole.clone();
        less.remove("mask_head.conv_seg.bias");
        assert!(
            width_of(path, &less, 3).unwrap_err().to_string().contains("conv_seg.bias`: expected [1], but")
        );
        for shape in [&[1, 0, 1, 1][..], &[2], &[]] {
            let given = HashMap::from([("mask_head.conv_seg.weight".to_owned(), zeros(shape))]);
            assert!(width_of(path, &given, 3).unwrap_err().to_string().contains("[1, width, 1, 1]"));
        }
    }
}
