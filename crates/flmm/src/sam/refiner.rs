//! Coarse masks and words to sharp masks: prompts, decoding, post-processing (`spec/pipeline.md` §5.2–5.3).

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::config::SamConfig;
use super::geometry::{SamGeometry, bounding_box, coarse_masks, mask_prompt, upscale};
use super::init;
use super::mask_decoder::MaskDecoder;
use super::prompt_encoder::PromptEncoder;
use crate::error::{Error, Result};
use crate::weights::Params;

/// Image positions decoded at a time over all phrases of a group: bounds memory at the public size (8 phrases)
/// and lets small SAMs decode a whole batch at once.
const POSITIONS_AT_ONCE: usize = 8 * 64 * 64;

/// Which prompts the decoder gets. The method's own setting is the default.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptOptions {
    /// The CNN logits as dense prompt.
    pub mask_prompt: bool,
    /// The box around the thresholded CNN mask as two tokens.
    pub box_prompt: bool,
    /// The phrase's projected hidden states as tokens.
    pub text_prompt: bool,
    /// Of the decoder's three alternative masks take the one closest to the CNN mask, instead of its single mask.
    pub multimask: bool,
    /// Logit of the mask prompt's padding. `None`: the smallest of the phrases given, at most −1. Phrases that are
    /// refined in several parts need [`Refiner::padding`] of all of them.
    pub padding: Option<f32>,
}

impl Default for PromptOptions {
    fn default() -> Self {
        Self { mask_prompt: true, box_prompt: true, text_prompt: true, multimask: false, padding: None }
    }
}

/// SAM's prompt encoder and mask decoder, the trained half of SAM.
#[derive(Debug, Clone)]
pub struct Refiner {
    config: SamConfig,
    prompt_encoder: PromptEncoder,
    mask_decoder: MaskDecoder,
}

impl Refiner {
    /// Reads `prompt_encoder.*` and `mask_decoder.*` below `params` (in a grounding head: below `sam.model.`).
    pub fn load(config: &SamConfig, params: &Params) -> Result<Self> {
        Ok(Self {
            config: config.clone(),
            prompt_encoder: PromptEncoder::load(config, &params.pp("prompt_encoder"))?,
            mask_decoder: MaskDecoder::load(config, &params.pp("mask_decoder"))?,
        })
    }

    /// Fresh `prompt_encoder.*` and `mask_decoder.*` (PyTorch's default initialisations).
    pub fn init(config: &SamConfig, rng: &mut impl Rng) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = init::prompt_encoder(config, rng)?;
        tensors.extend(init::mask_decoder(config, rng)?);
        Ok(tensors)
    }

    /// Whether tensor `name` (public name, no prefix) takes part in training under `options`: the others never
    /// receive a gradient (`spec/pipeline.md` §5.4).
    pub fn is_trained(name: &str, options: &PromptOptions) -> bool {
        let hypernetwork =
            |i: usize| name.starts_with(&format!("mask_decoder.output_hypernetworks_mlps.{i}."));
        match name {
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
            | "prompt_encoder.point_embeddings.0.weight"
            | "prompt_encoder.point_embeddings.1.weight"
            | "prompt_encoder.not_a_point_embed.weight" => false,
            "prompt_encoder.point_embeddings.2.weight" | "prompt_encoder.point_embeddings.3.weight" => {
                options.box_prompt
            }
            "prompt_encoder.no_mask_embed.weight" => !options.mask_prompt,
            _ if name.starts_with("prompt_encoder.mask_downscaling.") => options.mask_prompt,
            _ if name.starts_with("mask_decoder.iou_prediction_head.") => false,
            _ if hypernetwork(0) => !options.multimask,
            _ if (1..SamConfig::MASK_TOKENS).any(hypernetwork) => options.multimask,
            _ => name.starts_with("mask_decoder."),
        }
    }

    /// The sizes this refiner was built for.
    pub fn config(&self) -> &SamConfig {
        &self.config
    }

    /// The prompt encoder.
    pub fn prompt_encoder(&self) -> &PromptEncoder {
        &self.prompt_encoder
    }

    /// The mask decoder.
    pub fn mask_decoder(&self) -> &MaskDecoder {
        &self.mask_decoder
    }

    /// Mask logits `[N, H, W]` of the picture's original size; arguments as for [`Self::low_res`].
    pub fn refine(
        &self,
        embedding: &Tensor,
        cnn_logits: &Tensor,
        text_embeds: &[Tensor],
        geometry: &SamGeometry,
        options: &PromptOptions,
    ) -> Result<Tensor> {
        self.upscale(&self.low_res(embedding, cnn_logits, text_embeds, geometry, options)?, geometry)
    }

    /// Mask logits `[N, 4e, 4e]` in the frame of the padded square, before post-processing.
    ///
    /// * `embedding [1, C, e, e]`, or `[N, C, e, e]` for phrases of different pictures of one geometry
    /// * `cnn_logits [N, mh, mw]` – padding of the LMM already cut off, not detached
    /// * `text_embeds` – N tensors `[T_n, C]`, T_n ≥ 1
    ///
    /// Fails if the shapes do not fit together or a phrase has no tokens.
    pub fn low_res(
        &self,
        embedding: &Tensor,
        cnn_logits: &Tensor,
        text_embeds: &[Tensor],
        geometry: &SamGeometry,
        options: &PromptOptions,
    ) -> Result<Tensor> {
        let n = self.check(embedding, cnn_logits, text_embeds)?;
        let low = self.config.low_res_size();
        if n == 0 {
            return Ok(Tensor::zeros((0, low, low), DType::F32, cnn_logits.device())?);
        }
        let coarse = match options.box_prompt || options.multimask {
            true => coarse_masks(cnn_logits, geometry.original)?,
            false => Vec::new(),
        };
        let corners = match options.box_prompt {
            true => Some(self.prompt_encoder.boxes(&sam_boxes(&coarse, geometry))?),
            false => None,
        };
        let prompts = match options.mask_prompt {
            true => Some(self.padded_prompt(cnn_logits, geometry, options.padding)?),
            false => None,
        };

        let mut done: Vec<(Vec<usize>, Tensor)> = Vec::new();
        for group in self.groups(text_embeds, options) {
            let rows: Vec<u32> = group.iter().map(|&i| i as u32).collect();
            let rows = Tensor::from_vec(rows, group.len(), cnn_logits.device())?;
            let pick = |x: &Tensor| match group.len() == n {
                true => Ok(x.clone()),
                false => x.index_select(&rows, 0),
            };
            let mut sparse = Vec::new();
            if let Some(corners) = &corners {
                sparse.push(pick(corners)?);
            }
            if options.text_prompt {
                let texts: Vec<&Tensor> = group.iter().map(|&i| &text_embeds[i]).collect();
                sparse.push(Tensor::stack(&texts, 0)?);
            }
            let sparse = match sparse.is_empty() {
                true => {
                    Tensor::zeros((group.len(), 0, self.config.prompt_embed_dim), DType::F32, rows.device())?
                }
                false => Tensor::cat(&sparse, 1)?,
            };
            let image = if embedding.dim(0)? == 1 { embedding.clone() } else { pick(embedding)? };
            let image = image.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
            let dense = match &prompts {
                Some(prompts) => self.prompt_encoder.masks(&pick(prompts)?)?,
                None => self.prompt_encoder.no_mask()?,
            };
            let (_, positions, width) = image.dims3()?;
            let image =
                image.broadcast_add(&dense)?.broadcast_as((group.len(), positions, width))?.contiguous()?;
            let masks = self.decode(&image, &sparse, &group, &coarse, geometry, options)?;
            done.push((group, masks));
        }
        in_order(done)
    }

    /// Low-resolution mask logits `[N, 4e, 4e]` → `[N, H, W]` of the picture's original size.
    pub fn upscale(&self, low_res_masks: &Tensor, geometry: &SamGeometry) -> Result<Tensor> {
        upscale(low_res_masks, geometry, self.config.image_size)
    }

    /// The dense prompt before the prompt encoder: `cnn_logits [N, mh, mw]` → `[N, 4e, 4e]`.
    ///
    /// Padding gets the smallest logit of all phrases, at most −1; that value is a constant, the logits are not.
    pub fn mask_prompt(&self, cnn_logits: &Tensor, geometry: &SamGeometry) -> Result<Tensor> {
        self.padded_prompt(cnn_logits, geometry, None)
    }

    /// The value that pads the mask prompts of phrases with these logits: min(−1, smallest logit).
    pub fn padding(cnn_logits: &Tensor) -> Result<f32> {
        let smallest = cnn_logits.detach().flatten_all()?.min(0)?.to_scalar::<f32>()?;
        Ok(smallest.min(-1.0))
    }

    fn padded_prompt(
        &self,
        cnn_logits: &Tensor,
        geometry: &SamGeometry,
        padding: Option<f32>,
    ) -> Result<Tensor> {
        let pad = match padding {
            Some(pad) => pad,
            None => Self::padding(cnn_logits)?,
        };
        mask_prompt(cnn_logits, geometry, self.config.image_size, self.config.low_res_size(), pad)
    }

    /// The boxes `(x0, y0, x1, y1)` that prompt the decoder, one per phrase, in pixels of the picture.
    /// [`SamGeometry::sam_from_image`] brings them into SAM's frame. No gradient.
    pub fn boxes_in_image(&self, cnn_logits: &Tensor, geometry: &SamGeometry) -> Result<Vec<[f64; 4]>> {
        let masks = coarse_masks(cnn_logits, geometry.original)?;
        Ok(masks.iter().map(|mask| bounding_box(mask, geometry.original)).collect())
    }

    /// Masks `[n, 4e, 4e]` of one group, whose phrases have equally many tokens.
    fn decode(
        &self,
        image: &Tensor,
        sparse: &Tensor,
        group: &[usize],
        coarse: &[Vec<bool>],
        geometry: &SamGeometry,
        options: &PromptOptions,
    ) -> Result<Tensor> {
        let transformed = self.mask_decoder.transform(image, self.prompt_encoder.dense_pe(), sparse)?;
        if !options.multimask {
            return Ok(self.mask_decoder.masks(&transformed, 0..1)?.squeeze(1)?);
        }
        let masks = self.mask_decoder.masks(&transformed, 1..SamConfig::MASK_TOKENS)?;
        let chosen = group.iter().enumerate().map(|(row, &phrase)| {
            let candidates = masks.get(row)?;
            let best = closest(&self.upscale(&candidates.detach(), geometry)?, &coarse[phrase])?;
            Ok(candidates.get(best)?)
        });
        Ok(Tensor::stack(&chosen.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// Phrases that can be decoded together: equally many tokens, and not too many at once.
    fn groups(&self, text_embeds: &[Tensor], options: &PromptOptions) -> Vec<Vec<usize>> {
        let mut by_length = BTreeMap::<usize, Vec<usize>>::new();
        for (phrase, text) in text_embeds.iter().enumerate() {
            let length = if options.text_prompt { text.dims()[0] } else { 0 };
            by_length.entry(length).or_default().push(phrase);
        }
        let at_once = (POSITIONS_AT_ONCE / self.config.grid().pow(2)).max(1);
        by_length
            .into_values()
            .flat_map(|group| group.chunks(at_once).map(<[_]>::to_vec).collect::<Vec<_>>())
            .collect()
    }

    /// The number of phrases, if all inputs agree on it and have the configured sizes.
    fn check(&self, embedding: &Tensor, cnn_logits: &Tensor, text_embeds: &[Tensor]) -> Result<usize> {
        let n = text_embeds.len();
        let (width, grid) = (self.config.prompt_embed_dim, self.config.grid());
        let hint = "the refiner, the image embedding and the grounding head must belong to the same SAM";
        match *embedding.dims() {
            [b, c, h, w] if (b == 1 || b == n) && c == width && h == grid && w == grid => {}
            ref found => {
                let what = format!(
                    "SAM's image embedding has shape {found:?}, expected [1, {width}, {grid}, {grid}]"
                );
                return Err(Error::request(what, hint));
            }
        }
        match *cnn_logits.dims() {
            [rows, h, w] if rows == n && (n == 0 || h * w > 0) => {}
            ref found => {
                let what = format!("CNN logits have shape {found:?}, expected [{n}, mh, mw] for {n} phrases");
                return Err(Error::request(what, hint));
            }
        }
        for (phrase, text) in text_embeds.iter().enumerate() {
            match *text.dims() {
                [tokens, c] if tokens > 0 && c == width => {}
                ref found => {
                    let what = format!(
                        "phrase {phrase} has text tokens of shape {found:?}, expected [T, {width}], T ≥ 1"
                    );
                    return Err(Error::request(what, hint));
                }
            }
        }
        Ok(n)
    }
}

fn sam_boxes(coarse: &[Vec<bool>], geometry: &SamGeometry) -> Vec<[f64; 4]> {
    coarse.iter().map(|mask| geometry.sam_from_image(bounding_box(mask, geometry.original))).collect()
}

/// Of `candidates [K, H, W]` (logits) the one whose mask has the highest IoU with `reference`; the first of equals.
fn closest(candidates: &Tensor, reference: &[bool]) -> Result<usize> {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, values) in candidates.flatten_from(1)?.to_vec2::<f32>()?.iter().enumerate() {
        let (mut both, mut any) = (0usize, 0usize);
        for (value, &set) in values.iter().zip(reference) {
            both += usize::from(*value > 0.0 && set);
            any += usize::from(*value > 0.0 || set);
        }
        let iou = both as f64 / any.max(1) as f64;
        if iou > best.1 {
            best = (i, iou);
        }
    }
    Ok(best.0)
}

/// Puts the results of groups back into the order of the phrases.
fn in_order(groups: Vec<(Vec<usize>, Tensor)>) -> Result<Tensor> {
    let (order, masks): (Vec<Vec<usize>>, Vec<Tensor>) = groups.into_iter().unzip();
    let masks = Tensor::cat(&masks, 0)?;
    let order = order.concat();
    if order.is_sorted() {
        return Ok(masks);
    }
    let mut place = vec![0u32; order.len()];
    for (row, &phrase) in order.iter().enumerate() {
        place[phrase] = row as u32;
    }
    let place = Tensor::from_vec(place, order.len(), masks.device())?;
    Ok(masks.index_select(&place, 0)?)
}
