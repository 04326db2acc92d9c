//! The Llama-shaped decoder in a form that trains: many conversations packed behind one image.
//!
//! The trained tensors are the ones `flmm` later loads as a frozen checkpoint; a test checks that both
//! compute the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use candle_core::Tensor;
use flmm::nn::{Linear, rms_norm};
use flmm::weights::Params;

use crate::block::{DecoderSizes, Maps, PackedMask, Pass, Rotary, decoder_block};
use crate::config::{LmmSizes, RMS_NORM_EPS, ROPE_THETA};
use crate::store::Init;

const MODEL: &str = "language_model.model";

/// Initial tensors by their Hugging Face names; `embeddings [vocab, width]` and the marks of words and image tokens
/// are given.
pub(crate) fn init(
    sizes: &LmmSizes,
    embeddings: &Tensor,
    marks: [&[f32]; 2],
    rng: &mut rand_chacha::ChaCha8Rng,
) -> Result<BTreeMap<String, Tensor>> {
    let mut init = Init::new(rng);
    let (d, ffn) = (sizes.width, sizes.ffn);
    init.insert(format!("{MODEL}.embed_tokens.weight"), embeddings.clone());
    init.insert("language_model.lm_head.weight", (embeddings * 0.3)?);
    let std = (1.0 / d as f32).sqrt();
    let residual = std / (2.0 * sizes.layers as f32).sqrt();
    for layer in 0..sizes.layers {
        let layer = format!("{MODEL}.layers.{layer}");
        for (name, outputs, inputs, std) in [
            ("self_attn.q_proj", d, d, std),
            ("self_attn.k_proj", d, d, std),
            ("self_attn.v_proj", d, d, std),
            ("self_attn.o_proj", d, d, residual),
            ("mlp.gate_proj", ffn, d, std),
            ("mlp.up_proj", ffn, d, std),
            ("mlp.down_proj", d, ffn, residual * (d as f32 / ffn as f32).sqrt()),
        ] {
            init.normal(format!("{layer}.{name}.weight"), &[outputs, inputs], std)?;
        }
        init.constant(format!("{layer}.input_layernorm.weight"), &[d], 1.0)?;
        init.constant(format!("{layer}.post_attention_layernorm.weight"), &[d], 1.0)?;
    }
    init.constant(format!("{MODEL}.norm.weight"), &[d], 1.0)?;
    let mut tensors = init.finish();
    for (layer, head) in MATCHING_HEADS {
        matching_head(sizes, &format!("{MODEL}.layers.{layer}.self_attn"), head, marks, &mut tensors, rng)?;
    }
    Ok(tensors)
}

/// Heads (layer, head) that start out comparing words with patches.
const MATCHING_HEADS: [(usize, usize); 4] = [(0, 0), (0, 1), (1, 0), (2, 0)];
/// First rotary pair whose angle stays small over the length of a picture.
const FIRST_SLOW_PAIR: usize = 7;
/// Spread of a matching head's rows: a score of about 12 for a word and a patch with its code, ±3 for any other.
const MATCHING_STD: f32 = 0.25;
/// Gain of the marks: a score of about 6 for a word and any patch. A named thing that is there then wins over the
/// word itself (about 16), one that is not there loses.
const MARK_GAIN: f32 = 0.77;

/// Gives a head equal query and key rows in the slow rotary pairs, and next to nothing in the fast ones: a word
/// attends to the patches that show it, wherever they are, and to itself if there are none.
///
/// Large pre-trained models come with such heads; finding them from nothing took most of the training time.
fn matching_head(
    sizes: &LmmSizes,
    prefix: &str,
    head: usize,
    marks: [&[f32]; 2],
    tensors: &mut BTreeMap<String, Tensor>,
    rng: &mut rand_chacha::ChaCha8Rng,
) -> Result<()> {
    let (d, size) = (sizes.width, sizes.width / sizes.heads);
    let mut draw = Init::new(rng);
    draw.normal("rows", &[size, d], MATCHING_STD)?;
    let mut rows =
        draw.finish().remove("rows").map_or(Ok(Vec::new()), |t| t.flatten_all()?.to_vec1::<f32>())?;
    for (index, row) in rows.chunks_exact_mut(d).enumerate() {
        if index % (size / 2) < FIRST_SLOW_PAIR {
            row.iter_mut().for_each(|v| *v *= 0.05);
        }
        // Content only: the marks take no part in the comparison.
        for mark in marks {
            let along: f32 = row.iter().zip(mark).map(|(v, m)| v * m).sum();
            row.iter_mut().zip(mark).for_each(|(v, m)| *v -= along * m);
        }
    }
    for (name, mark) in [("q_proj", marks[0]), ("k_proj", marks[1])] {
        let mut rows = rows.clone();
        // The slowest component carries the marks.
        let slowest = &mut rows[(size - 1) * d..size * d];
        slowest.iter_mut().zip(mark).for_each(|(v, m)| *v += MARK_GAIN * m);
        let name = format!("{prefix}.{name}.weight");
        if let Some(tensor) = tensors.get_mut(&name) {
            let mut data = tensor.flatten_all()?.to_vec1::<f32>()?;
            data[head * size * d..(head + 1) * size * d].copy_from_slice(&rows);
            *tensor = Tensor::from_vec(data, (d, d), tensor.device())?;
        }
    }
    Ok(())
}

/// Heads (layer, head) that start out carrying places: what they read from a patch is where its thing lies and how
/// large it is, and they write it in the same code. Behind them a noun of the text knows the place of what it names.
const PLACE_HEADS: [(usize, usize); 2] = [(0, 1), (3, 0)];
/// Undoes the norm in front of the head, so that places are written about as strongly as they are read.
const PLACE_GAIN: f32 = 0.2;

/// Sets the value and output rows of [`PLACE_HEADS`] to `directions`.
///
/// With all kinds of questions mixed it did not help (20,000 scenes); the curriculum without it has not been tried.
pub(crate) fn carry_places<'a>(
    sizes: &LmmSizes,
    directions: impl Iterator<Item = &'a [f32]>,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<()> {
    let (d, size) = (sizes.width, sizes.width / sizes.heads);
    let directions: Vec<&[f32]> = directions.take(size).collect();
    for (layer, head) in PLACE_HEADS {
        let prefix = format!("{MODEL}.layers.{layer}.self_attn");
        for name in ["v_proj", "o_proj"] {
            let Some(tensor) = tensors.get_mut(&format!("{prefix}.{name}.weight")) else { continue };
            let mut data = tensor.flatten_all()?.to_vec1::<f32>()?;
            for (index, direction) in directions.iter().enumerate() {
                let component = head * size + index;
                for (at, value) in direction.iter().enumerate() {
                    match name {
                        "v_proj" => data[component * d + at] = *value,
                        _ => data[at * d + component] = PLACE_GAIN * value,
                    }
                }
            }
            *tensor = Tensor::from_vec(data, (d, d), tensor.device())?;
        }
    }
    Ok(())
}

/// The decoder, its embedding table and its output rows.
pub(crate) struct Decoder {
    embed_tokens: Tensor,
    /// All tensors of each layer, one behind the other.
    layers: Vec<Tensor>,
    norm: Tensor,
    lm_head: Linear,
    sizes: DecoderSizes,
}

/// A packed forward pass.
pub(crate) struct Output {
    /// Final-normed states `[B, S, width]`.
    pub(crate) hidden: Tensor,
    /// Attention `[B, S, image tokens]` of the heads (layer, head) that were asked for and are there.
    pub(crate) attention: BTreeMap<(usize, usize), Tensor>,
}

impl Decoder {
    /// Reads the tensors that [`init`] made.
    pub(crate) fn load(sizes: &LmmSizes, params: &Params) -> Result<Self> {
        let model = params.pp(MODEL);
        let d = sizes.width;
        let of_layer =
            DecoderSizes { width: d, heads: sizes.heads, ffn: sizes.ffn, eps: RMS_NORM_EPS as f32 };
        let mut layers = Vec::new();
        for layer in 0..sizes.layers {
            let params = model.pp("layers").pp(layer);
            let tensors = of_layer
                .tensors()
                .into_iter()
                .map(|(name, shape)| Ok(params.pp(name).get(&shape, "weight")?.flatten_all()?));
            layers.push(Tensor::cat(&tensors.collect::<Result<Vec<_>>>()?, 0)?);
        }
        Ok(Self {
            embed_tokens: model.pp("embed_tokens").get(&[sizes.vocab, d], "weight")?,
            layers,
            norm: model.pp("norm").get(&[d], "weight")?,
            lm_head: Linear::load(d, sizes.vocab, false, &params.pp("language_model.lm_head"))?,
            sizes: of_layer,
        })
    }

    /// All attention heads (layer, head), layer by layer.
    pub(crate) fn heads(&self) -> Vec<(usize, usize)> {
        let of_layer = |layer| (0..self.sizes.heads).map(move |head| (layer, head));
        (0..self.layers.len()).flat_map(of_layer).collect()
    }

    /// Embeddings `[B, T, width]` of `ids [B · T]`.
    pub(crate) fn embed(&self, ids: &[u32], batch: usize) -> Result<Tensor> {
        let ids_tensor = Tensor::new(ids, self.embed_tokens.device())?;
        let width = self.embed_tokens.dim(1)?;
        Ok(self.embed_tokens.index_select(&ids_tensor, 0)?.reshape((batch, ids.len() / batch, width))?)
    }

    /// `x [B, S, width]` through all layers under `mask`, rotated to `positions [B · S]`; keeps the attention of `heads` to
    /// the image, which ends where conversations begin and starts at row `image`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        positions: &[u32],
        mask: &Arc<PackedMask>,
        image: usize,
        heads: &[(usize, usize)],
    ) -> Result<Output> {
        let sizes = self.sizes;
        let rotary = Arc::new(Rotary::new(positions, sizes.width / sizes.heads, ROPE_THETA));
        let pass = Pass { sizes, mask: mask.clone(), rotary };
        let mut x = x.clone();
        let mut attention = BTreeMap::new();
        for (layer, parameters) in self.layers.iter().enumerate() {
            let of_layer: Vec<usize> = heads.iter().filter(|at| at.0 == layer).map(|at| at.1).collect();
            let maps = Maps { heads: of_layer, first: image };
            let (y, kept) = decoder_block(&x, parameters, &pass, &maps)?;
            attention.extend(maps.heads.into_iter().map(|head| (layer, head)).zip(kept));
            x = y;
        }
        Ok(Output { hidden: rms_norm(&x, &self.norm, RMS_NORM_EPS)?, attention })
    }

    /// Next-token logits `[rows, vocab]` of `hidden [rows, width]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.lm_head.forward(hidden)?)
    }
}
