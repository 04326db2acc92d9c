//! Fresh tensors for training a SAM from scratch: PyTorch's default initialisations, public names.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use rand::Rng;

use super::config::SamConfig;
use crate::error::Result;

/// Collects named tensors, drawing from one generator in a fixed order.
struct Fresh<'a, R> {
    rng: &'a mut R,
    tensors: BTreeMap<String, Tensor>,
}

impl<R: Rng> Fresh<'_, R> {
    fn put(&mut self, name: String, shape: &[usize], mut draw: impl FnMut(&mut R) -> f32) -> Result<()> {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| draw(self.rng)).collect();
        self.tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        Ok(())
    }

    fn zeros(&mut self, name: String, shape: &[usize]) -> Result<()> {
        self.tensors.insert(name, Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
        Ok(())
    }

    /// Standard normal, by the Box–Muller transform.
    fn normal(&mut self, name: String, shape: &[usize]) -> Result<()> {
        self.put(name, shape, |rng| {
            let (radius, angle): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
            ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
        })
    }

    /// Weight of `shape` and bias of `outputs`, uniform in ±1/√`fan_in`.
    fn affine(&mut self, name: &str, shape: &[usize], fan_in: usize, bias: Option<usize>) -> Result<()> {
        let bound = 1.0 / (fan_in as f32).sqrt();
        self.put(format!("{name}.weight"), shape, |rng| rng.random_range(-bound..bound))?;
        if let Some(outputs) = bias {
            self.put(format!("{name}.bias"), &[outputs], |rng| rng.random_range(-bound..bound))?;
        }
        Ok(())
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) -> Result<()> {
        self.affine(name, &[outputs, inputs], inputs, Some(outputs))
    }

    fn norm(&mut self, name: &str, size: usize) -> Result<()> {
        self.put(format!("{name}.weight"), &[size], |_| 1.0)?;
        self.zeros(format!("{name}.bias"), &[size])
    }
}

/// Fresh `image_encoder.*`.
pub(super) fn image_encoder(config: &SamConfig, rng: &mut impl Rng) -> Result<BTreeMap<String, Tensor>> {
    let mut fresh = Fresh { rng, tensors: BTreeMap::new() };
    let (width, patch, grid) = (config.embed_dim, config.patch_size, config.grid());
    let root = "image_encoder";
    fresh.zeros(format!("{root}.pos_embed"), &[1, grid, grid, width])?;
    let (shape, fan_in) = ([width, 3, patch, patch], 3 * patch * patch);
    fresh.affine(&format!("{root}.patch_embed.proj"), &shape, fan_in, Some(width))?;
    for block in 0..config.depth {
        let at = format!("{root}.blocks.{block}");
        let side = config.window(block).unwrap_or(grid);
        fresh.norm(&format!("{at}.norm1"), width)?;
        fresh.zeros(format!("{at}.attn.rel_pos_h"), &[2 * side - 1, width / config.num_heads])?;
        fresh.zeros(format!("{at}.attn.rel_pos_w"), &[2 * side - 1, width / config.num_heads])?;
        fresh.linear(&format!("{at}.attn.qkv"), width, 3 * width)?;
        fresh.linear(&format!("{at}.attn.proj"), width, width)?;
        fresh.norm(&format!("{at}.norm2"), width)?;
        fresh.linear(&format!("{at}.mlp.lin1"), width, config.encoder_mlp_dim())?;
        fresh.linear(&format!("{at}.mlp.lin2"), config.encoder_mlp_dim(), width)?;
    }
    let out = config.prompt_embed_dim;
    fresh.affine(&format!("{root}.neck.0"), &[out, width, 1, 1], width, None)?;
    fresh.norm(&format!("{root}.neck.1"), out)?;
    fresh.affine(&format!("{root}.neck.2"), &[out, out, 3, 3], 9 * out, None)?;
    fresh.norm(&format!("{root}.neck.3"), out)?;
    Ok(fresh.tensors)
}

/// Fresh `prompt_encoder.*`.
pub(super) fn prompt_encoder(config: &SamConfig, rng: &mut impl Rng) -> Result<BTreeMap<String, Tensor>> {
    let mut fresh = Fresh { rng, tensors: BTreeMap::new() };
    let (width, inner) = (config.prompt_embed_dim, config.mask_in_chans);
    let root = "prompt_encoder";
    fresh.normal(format!("{root}.pe_layer.positional_encoding_gaussian_matrix"), &[2, width / 2])?;
    for i in 0..4 {
        fresh.normal(format!("{root}.point_embeddings.{i}.weight"), &[1, width])?;
    }
    fresh.normal(format!("{root}.not_a_point_embed.weight"), &[1, width])?;
    let down = format!("{root}.mask_downscaling");
    fresh.affine(&format!("{down}.0"), &[inner / 4, 1, 2, 2], 4, Some(inner / 4))?;
    fresh.norm(&format!("{down}.1"), inner / 4)?;
    fresh.affine(&format!("{down}.3"), &[inner, inner / 4, 2, 2], inner, Some(inner))?;
    fresh.norm(&format!("{down}.4"), inner)?;
    fresh.affine(&format!("{down}.6"), &[width, inner, 1, 1], inner, Some(width))?;
    fresh.normal(format!("{root}.no_mask_embed.weight"), &[1, width])?;
    Ok(fresh.tensors)
}

/// Fresh `mask_decoder.*`.
pub(super) fn mask_decoder(config: &SamConfig, rng: &mut impl Rng) -> Result<BTreeMap<String, Tensor>> {
    let mut fresh = Fresh { rng, tensors: BTreeMap::new() };
    let (width, cross) = (config.prompt_embed_dim, config.cross_attention_dim());
    let root = "mask_decoder";
    let attention = |fresh: &mut Fresh<'_, _>, at: String, inner: usize| {
        for name in ["q_proj", "k_proj", "v_proj"] {
            fresh.linear(&format!("{at}.{name}"), width, inner)?;
        }
        fresh.linear(&format!("{at}.out_proj"), inner, width)
    };
    fresh.normal(format!("{root}.iou_token.weight"), &[1, width])?;
    fresh.normal(format!("{root}.mask_tokens.weight"), &[SamConfig::MASK_TOKENS, width])?;
    for layer in 0..config.decoder_depth {
        let at = format!("{root}.transformer.layers.{layer}");
        attention(&mut fresh, format!("{at}.self_attn"), width)?;
        attention(&mut fresh, format!("{at}.cross_attn_token_to_image"), cross)?;
        attention(&mut fresh, format!("{at}.cross_attn_image_to_token"), cross)?;
        fresh.linear(&format!("{at}.mlp.lin1"), width, config.mlp_dim)?;
        fresh.linear(&format!("{at}.mlp.lin2"), config.mlp_dim, width)?;
        for i in 1..=4 {
            fresh.norm(&format!("{at}.norm{i}"), width)?;
        }
    }
    attention(&mut fresh, format!("{root}.transformer.final_attn_token_to_image"), cross)?;
    fresh.norm(&format!("{root}.transformer.norm_final_attn"), width)?;
    // PyTorch takes the second axis of a transposed convolution's weight for its fan-in.
    let up = format!("{root}.output_upscaling");
    let (middle, last) = (width / 4, width / 8);
    fresh.affine(&format!("{up}.0"), &[width, middle, 2, 2], 4 * middle, Some(middle))?;
    fresh.norm(&format!("{up}.1"), middle)?;
    fresh.affine(&format!("{up}.3"), &[middle, last, 2, 2], 4 * last, Some(last))?;
    let mlp = |fresh: &mut Fresh<'_, _>, at: String, hidden: usize, outputs: usize| {
        for layer in 0..SamConfig::HEAD_DEPTH {
            let inputs = if layer == 0 { width } else { hidden };
            let outputs = if layer + 1 == SamConfig::HEAD_DEPTH { outputs } else { hidden };
            fresh.linear(&format!("{at}.layers.{layer}"), inputs, outputs)?;
        }
        Ok::<_, crate::Error>(())
    };
    for i in 0..SamConfig::MASK_TOKENS {
        mlp(&mut fresh, format!("{root}.output_hypernetworks_mlps.{i}"), width, last)?;
    }
    mlp(&mut fresh, format!("{root}.iou_prediction_head"), config.iou_hidden_dim(), SamConfig::MASK_TOKENS)?;
    Ok(fresh.tensors)
}
