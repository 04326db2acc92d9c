//! The trained part: mask head, text projection, layer weights, refiner, keyword selector.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::capture::weighted_hidden;
use crate::error::{Error, Result};
use crate::grounder::{HeadSettings, MaskLogits, Observation, RefinerKind};
use crate::lmm::Lmm;
use crate::mask_head::{UNet, UNetConfig};
use crate::nn::{Linear, bilinear};
use crate::sam::{PromptOptions, Refiner, SamConfig};
use crate::weights::{Params, load_checkpoint};

/// Prefix of the SAM tensors in a released checkpoint.
pub const SAM_PREFIX: &str = "sam.model.";

/// What a head must fit: sizes of the LMM and of SAM.
#[derive(Debug, Clone)]
pub struct HeadSizes {
    /// Attention maps per phrase that the LMM has.
    pub channels: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// SAM's sizes.
    pub sam: SamConfig,
}

impl HeadSizes {
    /// Those of a head for `lmm` and a SAM of these sizes.
    pub fn of(lmm: &dyn Lmm, sam: SamConfig) -> Self {
        let spec = lmm.spec();
        let hidden_size = lmm.decoder().config().hidden_size;
        Self { channels: spec.channels, layers: spec.layers, hidden_size, sam }
    }
}

/// Everything that is trained, under the names of released checkpoints (`spec/pipeline.md` §7).
#[derive(Debug)]
pub struct GroundingHead {
    /// Attention maps to coarse logits: `mask_head.*`.
    pub mask_head: UNet,
    /// Numbers of the maps that the mask head looks at, `[K]`; all of them unless given.
    channels_used: Option<Tensor>,
    /// Hidden states to SAM's prompt width: `text_proj.*`. Only with a refiner.
    pub text_proj: Option<Linear>,
    /// `[L]`, before the softmax: `text_layer_weights`.
    pub text_layer_weights: Tensor,
    /// SAM's prompt encoder and mask decoder: `sam.model.{prompt_encoder,mask_decoder}.*`.
    pub refiner: Option<Refiner>,
    /// Scores of tokens for being part of a phrase: `keyword_selector.*`.
    pub keyword_selector: Option<Linear>,
}

impl GroundingHead {
    /// Builds the head from named tensors, frozen or trainable. The caller ends with [`Params::finish`].
    ///
    /// The base width of the mask head is read from `mask_head.conv_seg.weight [1, width, 1, 1]`.
    pub fn from_params(sizes: &HeadSizes, params: &Params) -> Result<Self> {
        Self::from_params_as(sizes, &HeadSettings::default(), params)
    }

    /// As [`GroundingHead::from_params`], for a head with `settings`.
    pub fn from_params_as(sizes: &HeadSizes, settings: &HeadSettings, params: &Params) -> Result<Self> {
        let mask_head = params.pp("mask_head");
        mask_head.claim(&[]);
        let base_channels = match mask_head.shape("conv_seg.weight").as_deref() {
            Some(&[1, width, 1, 1]) => width,
            _ => 64,
        };
        let unet =
            UNetConfig { in_channels: settings.channels(sizes.channels)?, base_channels, input_size: 64 };
        let selector = params.pp("keyword_selector");
        selector.claim(&[]);
        let keyword_selector = if selector.has("weight") || selector.has("bias") {
            Some(Linear::load(sizes.hidden_size, 1, true, &selector)?)
        } else {
            None
        };
        let (mut text_proj, mut refiner) = (None, None);
        if settings.refiner == RefinerKind::Sam {
            let width = sizes.sam.prompt_embed_dim;
            let projection = params.pp("text_proj");
            projection.claim(&[]);
            text_proj = Some(Linear::load(sizes.hidden_size, width, true, &projection)?);
            refiner = Some(Refiner::load(&sizes.sam, &params.pp("sam.model"))?);
        }
        let text_layer_weights = params.get(&[sizes.layers], "text_layer_weights")?;
        Ok(Self {
            mask_head: UNet::load(&unet, &mask_head)?,
            channels_used: settings.index(text_layer_weights.device())?,
            text_proj,
            text_layer_weights,
            refiner,
            keyword_selector,
        })
    }

    /// A head of zeros without a refiner, where there is no trained one. Its masks are empty.
    pub fn blank(sizes: &HeadSizes, device: &Device) -> Result<Self> {
        let unet = UNetConfig { in_channels: sizes.channels, base_channels: 1, input_size: 64 };
        let mut tensors = HashMap::new();
        for (name, shape) in unet.shapes() {
            tensors.insert(format!("mask_head.{name}"), Tensor::zeros(shape, DType::F32, device)?);
        }
        let layers = Tensor::zeros(sizes.layers, DType::F32, device)?;
        tensors.insert("text_layer_weights".into(), layers);
        let settings = HeadSettings { refiner: RefinerKind::None, ..HeadSettings::default() };
        Self::from_params_as(sizes, &settings, &Params::new("no head", tensors))
    }

    /// Coarse logits `[N, mh, mw]` of every phrase, the LMM's padding cut off (`spec/pipeline.md` §4).
    pub fn coarse(&self, observation: &Observation) -> Result<Tensor> {
        let logits = self.mask_head.forward(&self.maps(observation)?)?;
        let (_, height, width) = logits.dims3()?;
        let rect = observation.geometry.picture_rect(height, width);
        Ok(logits.narrow(1, rect.y0, rect.height)?.narrow(2, rect.x0, rect.width)?)
    }

    /// The maps that the mask head looks at.
    fn maps(&self, observation: &Observation) -> Result<Tensor> {
        match &self.channels_used {
            Some(used) => Ok(observation.maps.index_select(used, 1)?),
            None => Ok(observation.maps.clone()),
        }
    }

    /// Coarse and refined logits of every phrase. Differentiable in every tensor of the head.
    pub fn decode(&self, observation: &Observation) -> Result<MaskLogits> {
        self.decode_with(observation, &PromptOptions::default())
    }

    /// As [`GroundingHead::decode`], with chosen prompts for the refiner.
    pub fn decode_with(&self, observation: &Observation, options: &PromptOptions) -> Result<MaskLogits> {
        let coarse = self.coarse(observation)?;
        let refined = self.refine_with(observation, &coarse, options)?;
        Ok(MaskLogits { coarse, refined })
    }

    /// Refined logits `[N, H, W]` at the picture's own size, from coarse logits `[N, mh, mw]`. Without a refiner they
    /// are the coarse ones, resized.
    pub fn refine(&self, observation: &Observation, coarse: &Tensor) -> Result<Tensor> {
        self.refine_with(observation, coarse, &PromptOptions::default())
    }

    fn refine_with(
        &self,
        observation: &Observation,
        coarse: &Tensor,
        options: &PromptOptions,
    ) -> Result<Tensor> {
        let Some(refiner) = &self.refiner else {
            let (height, width) = observation.sam_geometry.original;
            return Ok(bilinear(&coarse.unsqueeze(0)?, height, width)?.squeeze(0)?);
        };
        let text = self.text_embeds(observation)?;
        let (embedding, geometry) = (&observation.sam_embedding, &observation.sam_geometry);
        refiner.refine(embedding, &coarse.contiguous()?, &text, geometry, options)
    }

    /// Per phrase, its tokens' states in SAM's prompt width: `[T_n, C]`; nothing without a refiner.
    pub fn text_embeds(&self, observation: &Observation) -> Result<Vec<Tensor>> {
        let Some(text_proj) = &self.text_proj else { return Ok(Vec::new()) };
        let rows: Vec<u32> = observation.phrases.iter().flatten().map(|&row| row as u32).collect();
        let rows = Tensor::from_slice(&rows, rows.len(), observation.hidden.device())?;
        // Rows of no phrase are left out first: a gradient that sums over fewer zeros can differ in its last bit, and a
        // cache keeps the rows of phrases alone.
        let hidden = observation.hidden.index_select(&rows, 1)?;
        let states = weighted_hidden(&hidden, &self.text_layer_weights)?;
        let mut first = 0;
        let phrases = observation.phrases.iter().map(|rows| {
            let states = states.narrow(0, first, rows.len())?;
            first += rows.len();
            text_proj.forward(&states)
        });
        phrases.collect()
    }

    /// Probability of every token to be part of a phrase, from hidden states `[L, T, D]`; `None` without a
    /// selector (`spec/training.md` §8.2).
    pub fn keyword_probs(&self, hidden: &Tensor) -> Result<Option<Vec<f32>>> {
        let Some(selector) = &self.keyword_selector else { return Ok(None) };
        let states = weighted_hidden(&hidden.detach(), &self.text_layer_weights.detach())?;
        let scores = selector.forward(&states)?.squeeze(1)?.to_vec1::<f32>()?;
        Ok(Some(scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect()))
    }
}

pub(crate) const WRONG_HEAD: &str = "use the grounding head that was trained for this model";

/// The tensors of a head in f32: `path/head.safetensors` of a folder, or the file itself.
pub(crate) fn load_head_tensors(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    load_checkpoint(path, Some(DType::F32), device)
}

/// Lays the tensors of the head in `file` over the public SAM tensors, whose names lack the prefix [`SAM_PREFIX`].
///
/// # Errors
/// [`Error::Weights`] listing every name that belongs to no part of a head.
pub fn overlay(
    file: &Path,
    sam: &HashMap<String, Tensor>,
    head: HashMap<String, Tensor>,
) -> Result<HashMap<String, Tensor>> {
    let known = ["mask_head.", "text_proj.", "keyword_selector.", SAM_PREFIX];
    let unexpected = |name: &&String| {
        *name != "text_layer_weights" && !known.iter().any(|prefix| name.starts_with(prefix))
    };
    let mut names: Vec<&String> = head.keys().filter(unexpected).collect();
    if !names.is_empty() {
        names.sort();
        let lines: Vec<_> = names.iter().map(|name| format!("unexpected tensor `{name}`")).collect();
        return Err(Error::weights(file, lines.join("\n"), WRONG_HEAD));
    }
    let prefixed = sam.iter().map(|(name, tensor)| (format!("{SAM_PREFIX}{name}"), tensor.clone()));
    let mut tensors: HashMap<_, _> = prefixed.collect();
    tensors.extend(head);
    Ok(tensors)
}
