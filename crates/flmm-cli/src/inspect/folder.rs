//! `flmm inspect model PATH`: what a folder or file is, told by its headers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use flmm::convert::examine_head;
use flmm::hub::Hub;
use flmm::lmm::{self, REGISTRY};
use flmm::sam::{SamConfig, read_checkpoint};
use flmm::weights::{
    Findings, Params, Problem, TensorInfo, WeightFormat, checkpoint_files, outline, rehearse,
};
use serde_json::{Value, json};

use super::sizes::flatten;
use crate::failure::{Failure, Result};
use crate::fetch::{Named, named};
use crate::model::is_bundle;
use crate::talk::Talk;

/// Most names of a kind that are printed unless more is asked for.
const FEW: usize = 8;

pub(crate) fn run(path: &Path, as_json: bool, talk: &Talk) -> Result<()> {
    let path = match named(path)? {
        Named::Local(path) => path,
        Named::Repo(repo) => Hub::from_env()?.cached(&repo).ok_or_else(|| {
            Failure::usage(
                format!("`{repo}` is neither a folder nor a repository that was downloaded"),
                format!("check the path, or run `hf download {}`", repo.id()),
            )
        })?,
    };
    let parts = match is_bundle(&path) {
        true => ["lmm", "sam", "head"]
            .into_iter()
            .map(|part| path.join(part))
            .filter(|part| part.is_dir())
            .map(|part| Part::examine(&part))
            .collect::<Result<_>>()?,
        false => vec![Part::examine(&path)?],
    };
    if as_json {
        let facts: Vec<Value> = parts.iter().map(Part::json).collect();
        let whole = match facts.as_slice() {
            [one] => one.clone(),
            several => json!({ "kind": "bundle", "parts": several }),
        };
        return talk.print(&whole.to_string());
    }
    let texts: Vec<String> = parts.iter().map(|part| part.text(talk.verbose())).collect();
    talk.print(&texts.join("\n\n"))
}

/// A model or a part of one.
struct Part {
    facts: Value,
    tensors: Vec<TensorInfo>,
    problems: Vec<Problem>,
    unused: Vec<String>,
}

impl Part {
    fn examine(path: &Path) -> Result<Self> {
        let tensors = all_tensors(path)?;
        let has = |prefix: &str| tensors.iter().any(|info| info.name.starts_with(prefix));
        if path.is_dir()
            && let Ok(entry) = lmm::recognise(path)
        {
            return Ok(Self::lmm(path, entry, tensors));
        }
        if has("mask_head.") {
            return Self::head(path, tensors);
        }
        // As SAM's authors name its tensors, and as `transformers` does.
        if has("image_encoder.") || has("vision_encoder.") {
            return Self::sam(path, tensors);
        }
        // Neither a known model nor a part of one: say why not.
        let why = match path.join("config.json").is_file() {
            true => lmm::recognise(path).err().map(|error| error.to_string()),
            false => None,
        };
        let why = why.unwrap_or_else(|| "the tensors are those of no LMM, SAM or grounding head".to_owned());
        let facts = json!({ "kind": "unknown", "reason": why });
        Ok(Self { facts, tensors, problems: Vec::new(), unused: Vec::new() })
    }

    fn lmm(path: &Path, entry: &lmm::Entry, tensors: Vec<TensorInfo>) -> Self {
        let (opened, findings) = rehearse(|| lmm::open(path, DType::F32, &Device::Cpu));
        let Findings { problems, unused, .. } = findings;
        let known = json!({ "kind": "LMM", "name": entry.spec.name, "repository": entry.spec.repo });
        let mut facts = known;
        match lmm::converted_to(path) {
            Ok(found) => {
                if let Some(name) = found.and_then(WeightFormat::name) {
                    facts["converted_to"] = name.into();
                }
            }
            Err(error) => facts["cannot_be_opened"] = error.to_string().into(),
        }
        match opened {
            Ok(model) => {
                let (spec, decoder) = (model.spec(), model.decoder().config());
                facts["heads"] = spec.heads.into();
                facts["key_value_heads"] = decoder.num_kv_heads.into();
                facts["vocabulary"] = decoder.vocab_size.into();
                facts["context"] = decoder.max_positions.into();
                facts["grid"] = json!([spec.grid.0, spec.grid.1]);
                facts["fitting_head"] = json!({
                    "channels": spec.channels, "layers": spec.layers, "hidden_size": decoder.hidden_size,
                });
            }
            Err(error) => facts["cannot_be_opened"] = error.to_string().into(),
        }
        Self { facts, tensors, problems, unused }
    }

    fn head(path: &Path, tensors: Vec<TensorInfo>) -> Result<Self> {
        let (sizes, problems, unused) = examine_head(path, &tensors)?;
        let fits = REGISTRY.iter().map(|entry| entry.spec);
        let fits = fits.filter(|spec| {
            let maps = sizes.settings.channels(spec.channels);
            spec.layers == sizes.layers && maps.is_ok_and(|maps| maps == sizes.channels)
        });
        let fits: Vec<&str> = fits.map(|spec| spec.name).collect();
        let mut facts = json!({
            "kind": "grounding head",
            "channels": sizes.channels,
            "layers": sizes.layers,
            "hidden_size": sizes.hidden_size,
            "prompt_width": sizes.prompt_embed_dim,
            "trained_parameters": sizes.parameters,
            "keyword_selector": sizes.keyword_selector,
            "refiner": sizes.settings.refiner,
            "models_of_these_sizes": if fits.is_empty() { "none of the registry".to_owned() } else { fits.join(", ") },
        });
        if let Some(used) = &sizes.settings.channels_used {
            facts["channels_used"] = json!(used);
        }
        // What the SAM file supplies is not missing.
        let problems =
            problems.into_iter().filter(|p| p.found.is_some() || !p.name.starts_with("sam.")).collect();
        Ok(Self { facts, tensors, problems, unused })
    }

    fn sam(path: &Path, tensors: Vec<TensorInfo>) -> Result<Self> {
        let (opened, findings) = rehearse(|| {
            let (config, tensors) = read_checkpoint(path, &Device::Cpu)?;
            flmm::sam::Sam::load(&config, &Params::new(path, tensors)).map(|_| config)
        });
        let config = opened?;
        let public =
            [("ViT-B", SamConfig::vit_b()), ("ViT-L", SamConfig::vit_l()), ("ViT-H", SamConfig::vit_h())];
        let name = public.iter().find(|(_, size)| *size == config).map_or("of its own", |(name, _)| name);
        let facts = json!({
            "kind": "SAM",
            "size": name,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.embed_dim,
            "depth": config.depth,
            "heads": config.num_heads,
            "prompt_width": config.prompt_embed_dim,
        });
        Ok(Self { facts, tensors, problems: findings.problems, unused: findings.unused })
    }

    /// Facts, then what the tensors are.
    fn json(&self) -> Value {
        let mut facts = self.facts.clone();
        facts["tensors"] = self.tensors.len().into();
        facts["parameters"] = self.parameters().into();
        facts["types"] = json!(self.types());
        facts["missing"] = self.problems.iter().map(Problem::to_string).collect();
        facts["unused"] = json!(self.unused);
        facts
    }

    fn parameters(&self) -> usize {
        self.tensors.iter().map(values).fold(0, usize::saturating_add)
    }

    /// Number of tensors of every type.
    fn types(&self) -> BTreeMap<&str, usize> {
        let mut types = BTreeMap::new();
        for info in &self.tensors {
            *types.entry(info.dtype.as_str()).or_default() += 1;
        }
        types
    }

    fn text(&self, verbose: bool) -> String {
        let mut rows = Vec::new();
        flatten("", &self.facts, &mut rows);
        let types: Vec<String> = self.types().iter().map(|(name, count)| format!("{count} {name}")).collect();
        for (name, value) in [
            ("tensors", self.tensors.len().to_string()),
            ("types", types.join(", ")),
            ("parameters", self.parameters().to_string()),
            ("missing", self.problems.len().to_string()),
            ("unused", self.unused.len().to_string()),
        ] {
            rows.push(vec![name.to_owned(), value]);
        }
        let mut text = super::table(&rows);
        let few = if verbose { usize::MAX } else { FEW };
        let mut list = |heading: &str, lines: Vec<String>| {
            for line in lines.iter().take(few) {
                text.push_str(&format!("\n{heading}: {line}"));
            }
            if lines.len() > few {
                text.push_str(&format!("\n{heading}: and {} more (-v lists all)", lines.len() - few));
            }
        };
        list("missing", self.problems.iter().map(Problem::to_string).collect());
        list("unused", self.unused.clone());
        if verbose {
            let row =
                |info: &TensorInfo| vec![info.name.clone(), info.dtype.clone(), format!("{:?}", info.shape)];
            let rows: Vec<Vec<String>> = self.tensors.iter().map(row).collect();
            text.push_str(&format!("\n\n{}", super::table(&rows)));
        }
        text
    }
}

/// Values of a model that a tensor has: in four bits two to a byte, where rows are filled up to whole groups; scales are none.
fn values(info: &TensorInfo) -> usize {
    match info.name.rsplit_once('.') {
        Some((_, "int4")) => info.elements().saturating_mul(2),
        Some((matrix, "scales")) if matrix.ends_with("weight") => 0,
        _ => info.elements(),
    }
}

/// The tensors at `path`; of a folder without weights, those of the folders in it.
fn all_tensors(path: &Path) -> Result<Vec<TensorInfo>> {
    let absent = match checkpoint_files(path) {
        Ok(_) => return Ok(outline(path)?),
        Err(error) => error,
    };
    let inner = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> =
        inner.filter(|path| path.is_dir() && checkpoint_files(path).is_ok()).collect();
    folders.sort();
    let mut tensors = Vec::new();
    for folder in folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for info in outline(&folder)? {
            tensors.push(TensorInfo { name: format!("{name}/{}", info.name), ..info });
        }
    }
    match tensors.is_empty() {
        true => Err(absent.into()),
        false => Ok(tensors),
    }
}
