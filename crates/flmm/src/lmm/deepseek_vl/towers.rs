//! What `vision_config` of a DeepSeek-VL means: the files name towers, their sizes are not written anywhere.

use candle_core::{DType, Device};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::lmm::shared::supported;
use crate::vision::deepseek_hybrid::{HighConfig, HybridVision};
use crate::vision::siglip::{SiglipConfig, SiglipVision};
use crate::vision::tower::{PixelNorm, check_sizes};
use crate::weights::Params;

/// `cls` of `vision_config` of the 1.3B model.
pub(super) const SIGLIP: &str = "CLIPVisionTower";
/// `cls` of `vision_config` of the 7B model.
pub(super) const HYBRID: &str = "HybridVisionTower";

/// Key of `config.json` with sizes that differ from the ones a tower's name stands for, by that name.
const OVERRIDES: &str = "tiny_tower_overrides";

type Known<T> = (&'static str, fn() -> T);
const LOW: &[Known<SiglipConfig>] = &[("siglip_large_patch16_384", SiglipConfig::large_patch16_384)];
const HIGH: &[Known<HighConfig>] = &[("sam_b_downsample", HighConfig::sam_b_downsample)];

/// One tower, or two.
#[derive(Debug)]
pub(super) enum Tower {
    Siglip(SiglipVision, Option<PixelNorm>),
    Hybrid(Box<HybridVision>),
}

impl Tower {
    /// Reads the tower that `config`, the whole `config.json`, describes.
    pub(super) fn load(config: &Config, dtype: DType, device: &Device, params: &Params) -> Result<Self> {
        let vision = config.object("vision_config")?;
        let settings = vision.object("params")?;
        let norm = |settings: &Config| PixelNorm::from_config(settings, dtype, device);
        match vision.text("cls")? {
            SIGLIP => {
                let tower = SiglipVision::load(low(config, &settings)?, &params.pp("vision_tower"))?;
                Ok(Self::Siglip(tower, norm(&settings)?))
            }
            HYBRID => {
                supported(&settings, "concat_type", "tuple")?;
                let (high_settings, low_settings) =
                    (settings.object("high_res_cfg")?, settings.object("low_res_cfg")?);
                let high = (&high(config, &high_settings)?, norm(&high_settings)?);
                let low = (low(config, &low_settings)?, norm(&low_settings)?);
                Ok(Self::Hybrid(Box::new(HybridVision::load(high, low, params)?)))
            }
            other => Err(vision.error(
                "cls",
                format!("unknown vision tower `{other}`; known: {SIGLIP}, {HYBRID}"),
                "use deepseek-vl-1.3b or deepseek-vl-7b",
            )),
        }
    }

    /// Side of the pictures in pixels.
    pub(super) fn image_size(&self) -> usize {
        match self {
            Self::Siglip(tower, _) => tower.config().image_size,
            Self::Hybrid(tower) => tower.image_size(),
        }
    }

    /// Tokens per side.
    pub(super) fn grid(&self) -> usize {
        match self {
            Self::Siglip(tower, _) => tower.config().grid(),
            Self::Hybrid(tower) => tower.grid(),
        }
    }
}

/// The sizes that `model_name` stands for, and the file's own changes to them.
fn named<T>(config: &Config, settings: &Config, known: &[Known<T>]) -> Result<(T, Option<Config>)> {
    supported(settings, "select_feature", "same")?;
    let layer = settings.integer_or("select_layer", -1)?;
    if layer != -1 {
        let what = format!("{layer} is not supported; known: -1 (all blocks)");
        return Err(settings.error("select_layer", what, "use a model with the published setting"));
    }
    let name = settings.text("model_name")?;
    let Some((_, sizes)) = known.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        return Err(settings.error(
            "model_name",
            format!("unknown tower `{name}`; known: {}", known.join(", ")),
            "use deepseek-vl-1.3b or deepseek-vl-7b",
        ));
    };
    let changes = match config.get(OVERRIDES) {
        Some(_) => {
            let all = config.object(OVERRIDES)?;
            if all.get(name).is_some() { Some(all.object(name)?) } else { None }
        }
        None => None,
    };
    Ok((sizes(), changes))
}

/// `mlp_ratio`, a factor on a width.
fn ratio(changes: &Config, default: f64) -> Result<f64> {
    let ratio = changes.number_or("mlp_ratio", default)?;
    if ratio > 0.0 && ratio <= 64.0 {
        return Ok(ratio);
    }
    let what = format!("expected a number above 0 and at most 64, found {ratio}");
    Err(changes.error("mlp_ratio", what, "correct the value in the file"))
}

/// The SigLIP tower of `settings`.
fn low(config: &Config, settings: &Config) -> Result<SiglipConfig> {
    let (mut sizes, changes) = named(config, settings, LOW)?;
    sizes.image_size = settings.size_or("image_size", sizes.image_size)?;
    sizes.trained_size = sizes.image_size;
    if let Some(changes) = &changes {
        sizes.patch_size = changes.size_or("patch_size", sizes.patch_size)?;
        sizes.hidden_size = changes.size_or("width", sizes.hidden_size)?;
        sizes.num_heads = changes.size_or("heads", sizes.num_heads)?;
        sizes.num_layers = changes.layers_or("layers", sizes.num_layers)?;
        sizes.blocks_used = sizes.num_layers;
        sizes.intermediate_size = (sizes.hidden_size as f64 * ratio(changes, 4.0)?) as usize;
    }
    check_sizes(
        changes.as_ref().unwrap_or(settings),
        (sizes.hidden_size, sizes.num_heads, "heads"),
        (sizes.image_size, sizes.patch_size, "patch_size"),
    )?;
    Ok(sizes)
}

/// The high tower of `settings`.
fn high(config: &Config, settings: &Config) -> Result<HighConfig> {
    let (mut sizes, changes) = named(config, settings, HIGH)?;
    let encoder = &mut sizes.encoder;
    encoder.image_size = settings.size_or("image_size", encoder.image_size)?;
    if let Some(changes) = &changes {
        encoder.patch_size = changes.size_or("patch_size", encoder.patch_size)?;
        encoder.window_size = changes.size_or("window_size", encoder.window_size)?;
        encoder.embed_dim = changes.size_or("width", encoder.embed_dim)?;
        encoder.num_heads = changes.size_or("heads", encoder.num_heads)?;
        encoder.depth = changes.layers_or("layers", encoder.depth)?;
        encoder.prompt_embed_dim = changes.size_or("prompt_embed_dim", encoder.prompt_embed_dim)?;
        encoder.mlp_ratio = ratio(changes, encoder.mlp_ratio)?;
        if let Some(blocks) = list(changes, "global_attn_indexes", 0)? {
            encoder.global_attn_indexes = blocks;
        }
        if let Some(channels) = list(changes, "downsample_channels", 1)? {
            sizes.downsample_channels = channels;
        }
    }
    let wrong = |what: String| Error::config(config.file(), what, "correct the value in the file");
    sizes.encoder.validate().map_err(|what| wrong(format!("high tower: {what}")))?;
    if sizes.downsample_channels.len() > 8 {
        return Err(wrong("high tower: more than 8 `downsample_channels`".to_owned()));
    }
    Ok(sizes)
}

/// A list of whole numbers from `least` to 65536, if it is there.
fn list(changes: &Config, key: &str, least: u64) -> Result<Option<Vec<usize>>> {
    let Some(value) = changes.get(key) else { return Ok(None) };
    let number = |value: &serde_json::Value| {
        value.as_u64().filter(|number| (least..=1 << 16).contains(number)).map(|number| number as usize)
    };
    match value.as_array().map(|list| list.iter().map(number).collect::<Option<Vec<_>>>()) {
        Some(Some(list)) => Ok(Some(list)),
        _ => {
            let what = format!("expected a list of whole numbers from {least} to 65536, found {value}");
            Err(changes.error(key, what, "correct the value in the file"))
        }
    }
}
