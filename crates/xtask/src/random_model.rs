//! Full-size models whose weights come from a formula: for memory and time, not for answers.
//!
//! Which tensors a model has is not written down here a second time: opening a folder without tensors is rehearsed,
//! which tells what the loader misses and in which shape.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use flmm::grounder::HeadSizes;
use flmm::lmm::Lmm;
use flmm::sam::{Sam, SamConfig};
use flmm::weights::{rehearse, save_safetensors};
use half::bf16;
use safetensors::tensor::{Dtype, View};
use serde_json::{Value, json};

use crate::recipes::{self, Folder, RECIPES};

/// Largest shard, in bytes.
const SHARD: usize = 5_000_000_000;
/// Standard deviation of weight matrices.
const STD: f32 = 0.02;
/// Base width of the published mask heads.
const BASE_CHANNELS: usize = 64;
const CLIP_FOLDER: &str = "openai-clip-vit-large-patch14-336";
const CONVNEXT_FOLDER: &str = "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup";

/// Writes the bundle of the model `name` into `out`, with `layers` decoder layers if given.
pub(crate) fn write(name: &str, out: &Path, layers: Option<usize>) -> Result<()> {
    let recipe = RECIPES.iter().find(|recipe| recipe.name == name).context("unknown model")?;
    let mut folder = (recipe.lmm)();
    if let (Some(layers), Some(config)) = (layers, folder.get_mut("config.json")) {
        decoder_config(config)["num_hidden_layers"] = layers.into();
    }
    let lmm = out.join("lmm");
    write_folder(&lmm, &folder)?;
    if recipe.towers {
        write_folder(&out.join(CLIP_FOLDER), &recipes::clip_tower())?;
        let convnext = out.join(CONVNEXT_FOLDER);
        write_folder(&convnext, &Folder::new())?;
        write_shards(&convnext, "open_clip_model", recipes::convnext_large())?;
    }
    // Of the parts only CLIP's names begin so.
    let is_clip = |(name, _): &(String, Vec<usize>)| recipe.towers && name.starts_with("vision_model.");
    let (opened, asked) = asked_of(&lmm)?;
    let (clip, own): (Shapes, Shapes) = asked.into_iter().partition(is_clip);
    if recipe.towers {
        write_shards(&out.join(CLIP_FOLDER), "model", clip)?;
    }
    write_shards(&lmm, "model", own)?;
    write_heads(out, opened.as_ref())
}

/// The part of a `config.json` that describes the decoder.
fn decoder_config(config: &mut Value) -> &mut Value {
    match ["text_config", "language_config"].into_iter().find(|key| config.get(key).is_some()) {
        Some(key) => &mut config[key],
        None => config,
    }
}

fn write_folder(folder: &Path, files: &Folder) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for (name, content) in files {
        flmm::atomic::write(folder.join(name), |to| to.write_all(content.to_string().as_bytes()))?;
    }
    if !folder.join("model.safetensors").exists() {
        save_safetensors(folder.join("model.safetensors"), &BTreeMap::new(), &BTreeMap::new())?;
    }
    Ok(())
}

type Shapes = Vec<(String, Vec<usize>)>;

/// The model without its weights, and names and shapes of what the loader misses.
fn asked_of(lmm: &Path) -> Result<(Box<dyn Lmm>, Shapes)> {
    let (opened, findings) = rehearse(|| flmm::lmm::open(lmm, DType::BF16, &Device::Cpu));
    let missing = findings.problems.into_iter().filter(|problem| problem.found.is_none());
    Ok((opened?, missing.map(|problem| (problem.name, problem.expected)).collect()))
}

/// SAM-L and a head of the published width, both randomly initialised.
fn write_heads(out: &Path, lmm: &dyn Lmm) -> Result<()> {
    let sam = SamConfig::vit_l();
    let tensors = Sam::init(&sam, 1)?;
    std::fs::create_dir_all(out.join("sam"))?;
    std::fs::create_dir_all(out.join("head"))?;
    save_safetensors(out.join("sam/sam.safetensors"), &tensors, &BTreeMap::new())?;
    let (spec, sizes) = (lmm.spec(), HeadSizes::of(lmm, sam));
    let tensors = tensors.into_iter().collect();
    let head = flmm_train::head::init(&sizes, BASE_CHANNELS, Some(&Default::default()), Some(&tensors), 1)?;
    save_safetensors(out.join("head/head.safetensors"), &head, &BTreeMap::new())?;
    let about = json!({ "format": 1, "lmm": spec.repo, "channels": spec.channels, "refiner": "sam",
                        "merge": "mean", "licence": "random weights" });
    flmm::atomic::write(out.join("head/head.json"), |to| to.write_all(about.to_string().as_bytes()))?;
    Ok(())
}

/// Writes `tensors` as bf16: one file `stem.safetensors`, or shards with an index.
fn write_shards(folder: &Path, stem: &str, tensors: Shapes) -> Result<()> {
    let mut shards: Vec<(usize, Shapes)> = Vec::new();
    for (name, shape) in tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        match shards.last_mut() {
            Some((size, shard)) if *size + bytes <= SHARD => {
                *size += bytes;
                shard.push((name, shape));
            }
            _ => shards.push((bytes, vec![(name, shape)])),
        }
    }
    if shards.is_empty() {
        bail!("{}: no tensors to write", folder.display());
    }
    let _ = std::fs::remove_file(folder.join("model.safetensors"));
    let total: usize = shards.iter().map(|(size, _)| size).sum();
    let bar = indicatif::ProgressBar::new(total as u64);
    let style = indicatif::ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {wide_msg}");
    bar.set_style(style.context("progress style")?);
    let count = shards.len();
    let mut places = serde_json::Map::new();
    for (index, (_, shard)) in shards.into_iter().enumerate() {
        let name = match count {
            1 => format!("{stem}.safetensors"),
            _ => format!("{stem}-{:05}-of-{count:05}.safetensors", index + 1),
        };
        bar.set_message(folder.join(&name).display().to_string());
        places.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), Value::from(name.clone()))));
        let views = shard.into_iter().map(|(name, shape)| {
            let formula = Formula { seed: seed(&name), kind: Kind::of(&name, &shape), shape, bar: &bar };
            (name, formula)
        });
        let temporary = folder.join(format!("{name}.partial"));
        safetensors::serialize_to_file(
            views,
            Some(HashMap::from([("format".into(), "pt".into())])),
            &temporary,
        )?;
        std::fs::rename(&temporary, folder.join(&name))?;
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
        let file = folder.join(format!("{stem}.safetensors.index.json"));
        flmm::atomic::write(&file, |to| to.write_all(index.to_string().as_bytes()))?;
    }
    Ok(())
}

/// How a tensor is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Ones,
    Zeros,
    Noise,
}

impl Kind {
    fn of(name: &str, shape: &[usize]) -> Self {
        match (shape.len(), name.ends_with("bias")) {
            (0..=1, true) => Self::Zeros,
            (1, false) if name.ends_with("weight") => Self::Ones,
            _ => Self::Noise,
        }
    }
}

/// A tensor that is computed when it is written.
struct Formula<'a> {
    seed: u64,
    kind: Kind,
    shape: Vec<usize>,
    bar: &'a indicatif::ProgressBar,
}

impl View for Formula<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let count = self.data_len() / 2;
        let mut bytes = Vec::with_capacity(2 * count);
        let mut state = self.seed;
        for _ in 0..count {
            let value = match self.kind {
                Kind::Ones => 1.0,
                Kind::Zeros => 0.0,
                Kind::Noise => uniform(&mut state) * STD * 3f32.sqrt(),
            };
            bytes.extend(bf16::from_f32(value).to_le_bytes());
        }
        self.bar.inc(bytes.len() as u64);
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

/// FNV-1a of the name: every tensor begins elsewhere.
fn seed(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// SplitMix64, as a number between −1 and 1.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_says_what_it_needs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut files = (RECIPES[1].lmm)();
        let config = files.get_mut("config.json").context("config")?;
        for (key, value) in [("hidden_size", 64), ("num_hidden_layers", 1), ("num_attention_heads", 4)] {
            config["text_config"][key] = value.into();
        }
        write_folder(folder.path(), &files)?;
        let (_, shapes) = asked_of(folder.path())?;
        let q = "language_model.model.layers.0.self_attn.q_proj.weight";
        assert!(shapes.contains(&(q.to_owned(), vec![64, 64])), "{shapes:?}");
        write_shards(folder.path(), "model", shapes)?;
        assert!(asked_of(folder.path())?.1.is_empty());
        flmm::lmm::open(folder.path(), DType::BF16, &Device::Cpu)?;
        Ok(())
    }

    #[test]
    fn noise_has_the_size_it_says() {
        let mut state = seed("a");
        let values: Vec<f32> = (0..10_000).map(|_| uniform(&mut state)).collect();
        let mean = values.iter().sum::<f32>() / 1e4;
        let square = values.iter().map(|v| v * v).sum::<f32>() / 1e4;
        assert!(mean.abs() < 0.02 && (square - 1.0 / 3.0).abs() < 0.02, "{mean} {square}");
    }
}
