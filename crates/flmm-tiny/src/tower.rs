//! The CLIP-style vision tower and LLaVA's projector, in a form that trains (batched, from patches).
//!
//! The trained tensors are the ones `flmm` later loads as a frozen checkpoint; a test checks that both
//! compute the same.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::Tensor;
use flmm::nn::{LayerNorm, Linear, gelu, quick_gelu, softmax_last_dim};
use flmm::weights::Params;

use crate::config::{LAYER_NORM_EPS, LmmSizes};
use crate::store::Init;

const TOWER: &str = "vision_tower.vision_model";
const PROJECTOR: &str = "multi_modal_projector";

/// Initial tensors of the tower and the projector, by their Hugging Face names.
pub(crate) fn init(sizes: &LmmSizes, rng: &mut rand_chacha::ChaCha8Rng) -> Result<BTreeMap<String, Tensor>> {
    let mut init = Init::new(rng);
    let (d, ffn) = (sizes.tower_width, sizes.tower_ffn);
    let patch = 3 * sizes.patch_size * sizes.patch_size;
    let embeddings = format!("{TOWER}.embeddings");
    init.normal(format!("{embeddings}.class_embedding"), &[d], 0.02)?;
    let shape = [d, 3, sizes.patch_size, sizes.patch_size];
    init.normal(format!("{embeddings}.patch_embedding.weight"), &shape, (1.0 / patch as f32).sqrt())?;
    init.normal(format!("{embeddings}.position_embedding.weight"), &[sizes.image_tokens() + 1, d], 0.3)?;
    let mut norms = vec![format!("{TOWER}.pre_layrnorm"), format!("{TOWER}.post_layernorm")];
    let std = (1.0 / d as f32).sqrt();
    let residual = std / (2.0 * sizes.tower_layers as f32).sqrt();
    for layer in 0..sizes.tower_layers {
        let layer = format!("{TOWER}.encoder.layers.{layer}");
        norms.extend([format!("{layer}.layer_norm1"), format!("{layer}.layer_norm2")]);
        for (name, outputs, inputs, std) in [
            ("self_attn.q_proj", d, d, std),
            ("self_attn.k_proj", d, d, std),
            ("self_attn.v_proj", d, d, std),
            ("self_attn.out_proj", d, d, residual),
            ("mlp.fc1", ffn, d, std),
            ("mlp.fc2", d, ffn, residual * 0.5),
        ] {
            init.normal(format!("{layer}.{name}.weight"), &[outputs, inputs], std)?;
            init.constant(format!("{layer}.{name}.bias"), &[outputs], 0.0)?;
        }
    }
    for norm in norms {
        init.constant(format!("{norm}.weight"), &[d], 1.0)?;
        init.constant(format!("{norm}.bias"), &[d], 0.0)?;
    }
    init.normal(format!("{PROJECTOR}.linear_1.weight"), &[sizes.width, d], std)?;
    init.constant(format!("{PROJECTOR}.linear_1.bias"), &[sizes.width], 0.0)?;
    // Small at first: codes have length 1 to 2, and an output that starts ten times longer drowns the words.
    let std = 0.1 * (1.0 / sizes.width as f32).sqrt();
    init.normal(format!("{PROJECTOR}.linear_2.weight"), &[sizes.width, sizes.width], std)?;
    init.constant(format!("{PROJECTOR}.linear_2.bias"), &[sizes.width], 0.0)?;
    Ok(init.finish())
}

struct Layer {
    norm1: LayerNorm,
    attention: [Linear; 4],
    norm2: LayerNorm,
    mlp: [Linear; 2],
}

/// The tower up to its last layer's output (`vision_feature_layer` −1), without the class token.
pub(crate) struct Tower {
    class_embedding: Tensor,
    patch_embedding: Tensor,
    position_embedding: Tensor,
    pre_norm: LayerNorm,
    layers: Vec<Layer>,
    heads: usize,
}

impl Tower {
    /// Reads the tensors that [`init`] made.
    pub(crate) fn load(sizes: &LmmSizes, params: &Params) -> Result<Self> {
        let params = params.pp(TOWER);
        let (d, ffn) = (sizes.tower_width, sizes.tower_ffn);
        let embeddings = params.pp("embeddings");
        let shape = [d, 3, sizes.patch_size, sizes.patch_size];
        let mut layers = Vec::new();
        for layer in 0..sizes.tower_layers {
            let params = params.pp("encoder.layers").pp(layer);
            let attention = |name: &str| Linear::load(d, d, true, &params.pp("self_attn").pp(name));
            layers.push(Layer {
                norm1: LayerNorm::load(d, LAYER_NORM_EPS, &params.pp("layer_norm1"))?,
                attention: [
                    attention("q_proj")?,
                    attention("k_proj")?,
                    attention("v_proj")?,
                    attention("out_proj")?,
                ],
                norm2: LayerNorm::load(d, LAYER_NORM_EPS, &params.pp("layer_norm2"))?,
                mlp: [
                    Linear::load(d, ffn, true, &params.pp("mlp.fc1"))?,
                    Linear::load(ffn, d, true, &params.pp("mlp.fc2"))?,
                ],
            });
        }
        Ok(Self {
            class_embedding: embeddings.get(&[d], "class_embedding")?,
            patch_embedding: embeddings.pp("patch_embedding").get(&shape, "weight")?.reshape((d, ()))?,
            position_embedding: embeddings
                .pp("position_embedding")
                .get(&[sizes.image_tokens() + 1, d], "weight")?,
            pre_norm: LayerNorm::load(d, LAYER_NORM_EPS, &params.pp("pre_layrnorm"))?,
            layers,
            heads: sizes.tower_heads,
        })
    }

    /// `patches [B, tokens, 3 · p · p]` → features `[B, tokens, width]`.
    pub(crate) fn forward(&self, patches: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = patches.dims3()?;
        let width = self.class_embedding.dim(0)?;
        let x = patches.reshape((batch * tokens, ()))?.matmul(&self.patch_embedding.t()?)?;
        let class = self.class_embedding.reshape((1, 1, width))?.broadcast_as((batch, 1, width))?;
        let x = Tensor::cat(&[&class.contiguous()?, &x.reshape((batch, tokens, width))?], 1)?;
        let x = x.broadcast_add(&self.position_embedding)?;
        let mut x = self.pre_norm.forward(&x)?;
        for layer in &self.layers {
            let normed = layer.norm1.forward(&x)?;
            x = (x + self.attend(layer, &normed)?)?;
            let hidden = quick_gelu(&layer.mlp[0].forward(&layer.norm2.forward(&x)?)?)?;
            x = (x + layer.mlp[1].forward(&hidden)?)?;
        }
        Ok(x.narrow(1, 1, tokens)?)
    }

    fn attend(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let split = |linear: &Linear| -> Result<Tensor> {
            let y = linear.forward(x)?.reshape((batch, tokens, self.heads, width / self.heads))?;
            Ok(y.transpose(1, 2)?.contiguous()?)
        };
        let [q, k, v, out] = &layer.attention;
        let scale = 1.0 / ((width / self.heads) as f64).sqrt();
        let probs = softmax_last_dim(&(split(q)? * scale)?.matmul(&split(k)?.t()?)?)?;
        let y = probs.matmul(&split(v)?)?.transpose(1, 2)?.reshape((batch, tokens, width))?;
        Ok(out.forward(&y)?)
    }
}

/// LLaVA's projector: linear, exact GELU, linear.
pub(crate) struct Projector {
    linear_1: Linear,
    linear_2: Linear,
}

impl Projector {
    /// Reads the tensors that [`init`] made.
    pub(crate) fn load(sizes: &LmmSizes, params: &Params) -> Result<Self> {
        let params = params.pp(PROJECTOR);
        Ok(Self {
            linear_1: Linear::load(sizes.tower_width, sizes.width, true, &params.pp("linear_1"))?,
            linear_2: Linear::load(sizes.width, sizes.width, true, &params.pp("linear_2"))?,
        })
    }

    /// `[.., tower width]` → `[.., decoder width]`.
    pub(crate) fn forward(&self, features: &Tensor) -> Result<Tensor> {
        Ok(self.linear_2.forward(&gelu(&self.linear_1.forward(features)?)?)?)
    }
}

/// The patches of normalised pixels `[3, S, S]`, row by row, each in (channel, y, x) order as the patch
/// convolution reads them: `[tokens · 3 · p · p]`.
pub(crate) fn patches(pixels: &[f32], side: usize, patch: usize) -> Vec<f32> {
    let grid = side / patch;
    let mut out = Vec::with_capacity(pixels.len());
    for row in 0..grid {
        for column in 0..grid {
            for channel in 0..3 {
                for y in 0..patch {
                    let start = (channel * side + row * patch + y) * side + column * patch;
                    out.extend_from_slice(&pixels[start..start + patch]);
                }
            }
        }
    }
    out
}
