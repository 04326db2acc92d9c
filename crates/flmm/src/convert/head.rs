//! Released grounding heads (`spec/pipeline.md` §3.4, §5.4, §7).

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::{Converted, Staging, listed};
use crate::error::{Error, Result};
use crate::grounder::{GroundingHead, HeadSettings, HeadSizes, RefinerKind, SAM_PREFIX};
use crate::lmm::{self, LmmSpec};
use crate::sam::SamConfig;
use crate::weights::{
    Params, Problem, TensorInfo, load_checkpoint_some, outline, rehearse, save_safetensors, stand_ins,
};

/// Version of `head.json`.
const FORMAT: u32 = 1;

/// A buffer, not a parameter.
const BUFFER: &str = "sam.model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix";

/// Frozen parts that a checkpoint of the whole model brings along. The program has them from the LMM and from SAM.
const FROZEN: [&str; 11] = [
    "llm.",
    "lmm.",
    "model.",
    "llava.",
    "mgm.",
    "language_model.",
    "vision_tower.",
    "visual_encoder.",
    "projector.",
    "multi_modal_projector.",
    "sam.model.image_encoder.",
];

/// Constants of SAM's preprocessing, which some checkpoints bring along.
const CONSTANTS: [&str; 2] = ["sam.model.pixel_mean", "sam.model.pixel_std"];

/// What the tensors of a head tell about the model it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadSizesFound {
    /// Attention maps per phrase that the mask head looks at.
    pub channels: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the hidden states; unknown of a head with neither refiner nor keyword selector.
    pub hidden_size: Option<usize>,
    /// Width of SAM's prompts; none without a refiner.
    pub prompt_embed_dim: Option<usize>,
    /// Trained values, buffers left out.
    pub parameters: usize,
    /// Whether there is a keyword selector.
    pub keyword_selector: bool,
    /// What its `head.json` says, if there is one.
    pub settings: HeadSettings,
}

/// The model that a head is for.
#[derive(Debug, Clone)]
pub struct HeadTarget {
    /// Its repository, for `head.json`.
    pub repo: String,
    /// What errors call it: the folder or the name that was given.
    pub name: String,
    /// Attention maps per phrase.
    pub channels: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the hidden states; the registry does not know it.
    pub hidden_size: Option<usize>,
}

/// The model `lmm`: a folder, whose own sizes count, or a name or repository of the registry.
///
/// # Errors
/// As [`lmm::open`] for a folder whose configuration cannot be read (its weights are not needed);
/// [`Error::Request`] for a name that is not known.
pub fn head_target(lmm: &str) -> Result<HeadTarget> {
    let dir = Path::new(lmm);
    if dir.is_dir() {
        let (opened, _) = rehearse(|| lmm::open(dir, DType::F32, &Device::Cpu));
        let opened = opened?;
        let LmmSpec { repo, channels, layers, .. } = *opened.spec();
        let hidden_size = Some(opened.decoder().config().hidden_size);
        return Ok(HeadTarget {
            repo: repo.to_owned(),
            name: format!("`{lmm}`"),
            channels,
            layers,
            hidden_size,
        });
    }
    let same = |a: &str| a.eq_ignore_ascii_case(lmm);
    let found = lmm::REGISTRY.iter().map(|entry| entry.spec).find(|spec| same(spec.name) || same(spec.repo));
    found
        .map(|spec| HeadTarget {
            repo: spec.repo.to_owned(),
            name: spec.name.to_owned(),
            channels: spec.channels,
            layers: spec.layers,
            hidden_size: None,
        })
        .ok_or_else(|| {
            let names: Vec<_> = lmm::REGISTRY.iter().map(|entry| entry.spec.name).collect();
            Error::request(
                format!("`{lmm}` is neither a model folder nor a known model"),
                format!("known models: {}", names.join(", ")),
            )
        })
}

/// Sizes of the head with the tensors `outline`, and every tensor that is missing, misshapen (first) or not part of a
/// head (second). What SAM can supply is not missing; frozen parts are not counted.
///
/// # Errors
/// [`Error::Weights`] naming `file` if the tensors are not those of a head at all.
pub fn examine_head(
    file: &Path,
    outline: &[TensorInfo],
) -> Result<(HeadSizesFound, Vec<Problem>, Vec<String>)> {
    let kept: Vec<TensorInfo> = outline.iter().filter(|info| !is_frozen(&info.name)).cloned().collect();
    let size = |name: &str, axis: usize| {
        let shape = kept.iter().find(|info| info.name == name).map(|info| &info.shape);
        shape.and_then(|shape| shape.get(axis).copied()).filter(|size| (1..=1 << 16).contains(size))
    };
    let need = |name: &str, axis: usize| {
        size(name, axis).ok_or_else(|| {
            let what = format!("tensor `{name}` is missing or has an impossible shape: not a grounding head");
            Error::weights(
                file,
                what,
                "give a checkpoint with mask_head.*, text_proj.* and text_layer_weights",
            )
        })
    };
    let sam =
        |name: &str, axis: usize, public: usize| size(&format!("{SAM_PREFIX}{name}"), axis).unwrap_or(public);
    let settings = HeadSettings::read(file)?;
    let public = SamConfig::vit_l();
    let (prompt_embed_dim, hidden_size) = match settings.refiner {
        RefinerKind::Sam => (need("text_proj.weight", 0)?, Some(need("text_proj.weight", 1)?)),
        RefinerKind::None => (public.prompt_embed_dim, size("keyword_selector.weight", 1)),
    };
    let layer = |i: usize| size(&format!("sam.model.mask_decoder.transformer.layers.{i}.norm1.weight"), 0);
    let depth = (0..64).take_while(|&i| layer(i).is_some()).count();
    let inner = sam(
        "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight",
        0,
        prompt_embed_dim / public.attention_downsample_rate,
    );
    let config = SamConfig {
        prompt_embed_dim,
        mask_in_chans: sam("prompt_encoder.mask_downscaling.3.weight", 0, public.mask_in_chans),
        mlp_dim: sam("mask_decoder.transformer.layers.0.mlp.lin1.weight", 0, public.mlp_dim),
        decoder_depth: if depth == 0 { public.decoder_depth } else { depth },
        attention_downsample_rate: prompt_embed_dim / inner.max(1),
        iou_head_hidden_dim: Some(sam(
            "mask_decoder.iou_prediction_head.layers.0.weight",
            0,
            prompt_embed_dim,
        )),
        // Shapes do not tell it, and none depends on it.
        decoder_num_heads: 1,
        ..public
    };
    config.validate().map_err(|what| {
        Error::weights(file, format!("the refiner is impossible: {what}"), "download the file again")
    })?;
    let sizes = HeadSizes {
        channels: need("mask_head.encoder.0.0.convs.0.conv.weight", 1)?,
        layers: need("text_layer_weights", 0)?,
        // Asked for only where there is a tensor that tells it.
        hidden_size: hidden_size.unwrap_or(1),
        sam: config,
    };
    // The number of maps is read from the tensors themselves.
    let whole = HeadSettings { channels_used: None, ..settings.clone() };
    let (built, findings) = rehearse(|| {
        let params = Params::new(file, stand_ins(file, &kept, None, &|_| true)?);
        GroundingHead::from_params_as(&sizes, &whole, &params)
    });
    let head = built?;
    let buffer = kept.iter().find(|info| info.name == BUFFER).map_or(0, TensorInfo::elements);
    let found = HeadSizesFound {
        channels: sizes.channels,
        layers: sizes.layers,
        hidden_size,
        prompt_embed_dim: (settings.refiner == RefinerKind::Sam).then_some(prompt_embed_dim),
        parameters: findings.used_elements.saturating_sub(buffer),
        keyword_selector: head.keyword_selector.is_some(),
        settings,
    };
    Ok((found, findings.problems, findings.unused))
}

/// Whether the tensor belongs to a frozen part.
fn is_frozen(name: &str) -> bool {
    FROZEN.iter().any(|prefix| name.starts_with(prefix)) || CONSTANTS.contains(&name)
}

/// Whether the tensor may be missing in a head, because the SAM file has it.
fn is_sams(problem: &Problem) -> bool {
    problem.found.is_none() && problem.name.starts_with(SAM_PREFIX)
}

/// Reads a released head, checks it against `target`, and writes the folder `out` with `head.safetensors` and
/// `head.json`. Values keep their type. Nothing is written on an error.
///
/// # Errors
/// [`Error::Weights`] with every tensor that is missing, misshapen, unexpected or not finite, and if the head is for a
/// model of other sizes; [`Error::Request`] if `out` holds something and `force` is not given; [`Error::Io`].
pub fn convert_head(file: &Path, target: &HeadTarget, out: &Path, force: bool) -> Result<Converted> {
    let tensors = outline(file)?;
    let (found, problems, unexpected) = examine_head(file, &tensors)?;
    let mut lines = Vec::new();
    let mut compare = |what: &str, found: usize, expected: usize| {
        if found != expected {
            lines.push(format!("the head is for {found} {what}, {} has {expected}", target.name));
        }
    };
    compare("attention maps", found.channels, found.settings.channels(target.channels)?);
    compare("decoder layers", found.layers, target.layers);
    if let (Some(found), Some(expected)) = (found.hidden_size, target.hidden_size) {
        compare("hidden values", found, expected);
    }
    lines.extend(problems.iter().filter(|problem| !is_sams(problem)).map(Problem::to_string));
    lines.extend(unexpected.iter().map(|name| format!("unexpected tensor `{name}`")));
    if !lines.is_empty() {
        return Err(Error::weights(file, listed(lines), "give the head that was trained for this model"));
    }
    let staging = Staging::new(out, force)?;
    let read = load_checkpoint_some(file, None, &Device::Cpu, &|name| !is_frozen(name))?;
    let left_out = tensors.len() - read.len();
    let read: BTreeMap<String, Tensor> = read.into_iter().collect();
    check_values(file, &read)?;
    let about = serde_json::json!({
        "format": FORMAT,
        "lmm": target.repo,
        "channels": target.channels,
        "layers": found.layers,
        "hidden_size": found.hidden_size,
        "channels_used": found.settings.channels_used,
        "refiner": found.settings.refiner,
        "merge": "mean",
        "keyword_selector": found.keyword_selector,
        "parameters": found.parameters,
        "source": file.file_name().map(|name| name.to_string_lossy()),
    });
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    save_safetensors(staging.folder.join("head.safetensors"), &read, &metadata)?;
    let text = format!("{about:#}\n");
    crate::atomic::write(staging.folder.join("head.json"), |to| to.write_all(text.as_bytes()))?;
    staging.finish(out)?;
    Ok(Converted {
        file: out.join("head.safetensors"),
        tensors: read.len(),
        parameters: found.parameters,
        left_out,
        from_sam: problems.into_iter().filter(is_sams).map(|problem| problem.name).collect(),
    })
}

/// Refuses values that are not finite: a head with one makes no mask at all.
pub(super) fn check_values(file: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let mut lines = Vec::new();
    for (name, tensor) in tensors.iter().filter(|(_, tensor)| tensor.dtype().is_float()) {
        // The sum of absolute values in f64 is finite exactly if all values are.
        let sum = tensor.to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?;
        if !sum.is_finite() {
            lines.push(format!("tensor `{name}` has values that are not finite"));
        }
    }
    match lines.is_empty() {
        true => Ok(()),
        false => Err(Error::weights(
            file,
            listed(lines),
            "its training failed, or the file is damaged: use another",
        )),
    }
}
