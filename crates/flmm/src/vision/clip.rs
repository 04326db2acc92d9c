//! CLIP's vision transformer, up to the hidden state an LMM asks for (`spec/models.md` §5).

use candle_core::{DType, Tensor};
use flmm_kernels::Scores;

use super::regrid::regrid;
use super::tower;
use crate::config::Config;
use crate::error::Result;
use crate::nn::{self, LayerNorm, Linear, fused_attention, residual, softmax_last_dim};
use crate::text::round_to;
use crate::weights::Params;

/// Sizes of the tower, and the layer whose output is used.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the feed-forward blocks.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Number of heads.
    pub num_heads: usize,
    /// Side of the pictures that the tower was trained on, in pixels; tells the size of the position table.
    pub trained_size: usize,
    /// Side of the pictures it reads here; where it differs, the positions are re-gridded.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// How many blocks run before the features are taken: hidden state −2 is `num_layers − 1`.
    pub blocks_used: usize,
}

impl ClipConfig {
    /// Reads a `vision_config` with the defaults of the pinned library's `CLIPVisionConfig`.
    ///
    /// `feature_layer` counts hidden states, the embedding being number 0; negative numbers count from the end.
    pub fn from_config(config: &Config, feature_layer: i64) -> Result<Self> {
        let act = config.text_or("hidden_act", "quick_gelu")?;
        if act != "quick_gelu" {
            return Err(config.error(
                "hidden_act",
                format!("activation `{act}` is not supported; known: quick_gelu"),
                "use a model with a CLIP vision tower",
            ));
        }
        let num_layers = config.layers_or("num_hidden_layers", 12)?;
        let (hidden_size, num_heads) =
            (config.size_or("hidden_size", 768)?, config.size_or("num_attention_heads", 12)?);
        let (image_size, patch_size) =
            (config.size_or("image_size", 224)?, config.size_or("patch_size", 32)?);
        tower::check_sizes(
            config,
            (hidden_size, num_heads, "num_attention_heads"),
            (image_size, patch_size, "patch_size"),
        )?;
        Ok(Self {
            hidden_size,
            intermediate_size: config.size_or("intermediate_size", 3072)?,
            num_layers,
            num_heads,
            trained_size: image_size,
            image_size,
            patch_size,
            layer_norm_eps: config.number_or("layer_norm_eps", 1e-5)?,
            blocks_used: tower::blocks_used(config, num_layers, feature_layer)?,
        })
    }

    /// The same tower for pictures of another size.
    pub fn at_size(mut self, image_size: usize) -> Self {
        self.image_size = image_size;
        self
    }

    /// Tokens per side.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }
}

/// A frozen CLIP vision tower.
#[derive(Debug)]
pub struct ClipVision {
    config: ClipConfig,
    /// `[hidden]`
    class_embedding: Tensor,
    /// `[hidden, 3, patch, patch]`
    patch_embedding: Tensor,
    /// `[1 + grid², hidden]`, already on the grid that is used.
    position_embedding: Tensor,
    pre_layrnorm: LayerNorm,
    layers: Vec<Block>,
}

impl ClipVision {
    /// Reads `embeddings`, `pre_layrnorm` (sic) and the encoder layers that are used.
    pub fn load(config: ClipConfig, params: &Params) -> Result<Self> {
        let (width, patch) = (config.hidden_size, config.patch_size);
        let embeddings = params.pp("embeddings");
        let trained = config.trained_size / patch;
        let positions = embeddings.pp("position_embedding").get(&[1 + trained * trained, width], "weight")?;
        let layers = (0..config.blocks_used).map(|index| {
            let params = params.pp("encoder.layers").pp(index);
            params.claim(&[]);
            Block::load(&config, &params)
        });
        Ok(Self {
            class_embedding: embeddings.get(&[width], "class_embedding")?,
            patch_embedding: embeddings.pp("patch_embedding").get(&[width, 3, patch, patch], "weight")?,
            position_embedding: regrid(&positions, trained, config.grid())?,
            pre_layrnorm: LayerNorm::load(width, config.layer_norm_eps, &params.pp("pre_layrnorm"))?,
            layers: layers.collect::<Result<_>>()?,
            config,
        })
    }

    /// Sizes.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// The positions `[1 + grid², hidden]`, re-gridded where the picture size asks for it.
    pub fn position_embedding(&self) -> &Tensor {
        &self.position_embedding
    }

    /// `pixel_values [B, 3, S, S]` → `[B, grid², hidden]`: the selected hidden state without the class token.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let (batch, _, _, _) = pixel_values.dims4()?;
        let (grid, patch, width) = (self.config.grid(), self.config.patch_size, self.config.hidden_size);
        let patches = tower::patches(&pixel_values.to_dtype(self.class_embedding.dtype())?, grid, patch)?;
        let class = self.class_embedding.reshape((1, 1, width))?.broadcast_as((batch, 1, width))?;
        let kernel = self.patch_embedding.reshape((width, 3 * patch * patch))?;
        let tokens = Tensor::cat(&[&class, &Linear::new(kernel, None).forward(&patches)?], 1)?;
        let mut hidden = self.pre_layrnorm.forward(&tokens.broadcast_add(&self.position_embedding)?)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden)?;
        }
        Ok(hidden.narrow(1, 1, grid * grid)?.contiguous()?)
    }
}

#[derive(Debug)]
struct Block {
    layer_norm1: LayerNorm,
    self_attn: Attention,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    fn load(config: &ClipConfig, params: &Params) -> Result<Self> {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        Ok(Self {
            layer_norm1: LayerNorm::load(width, eps, &params.pp("layer_norm1"))?,
            self_attn: Attention::load(config, &params.pp("self_attn"))?,
            layer_norm2: LayerNorm::load(width, eps, &params.pp("layer_norm2"))?,
            fc1: Linear::load(width, inner, true, &params.pp("mlp.fc1"))?,
            fc2: Linear::load(inner, width, true, &params.pp("mlp.fc2"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = residual(x, &self.self_attn.forward(&self.layer_norm1.forward(x)?)?)?;
        let inner = quick_gelu(&self.fc1.forward(&self.layer_norm2.forward(&x)?)?)?;
        residual(&x, &self.fc2.forward(&inner)?)
    }
}

#[derive(Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

impl Attention {
    fn load(config: &ClipConfig, params: &Params) -> Result<Self> {
        let linear = |name| Linear::load(config.hidden_size, config.hidden_size, true, &params.pp(name));
        Ok(Self {
            q_proj: linear("q_proj")?,
            k_proj: linear("k_proj")?,
            v_proj: linear("v_proj")?,
            out_proj: linear("out_proj")?,
            heads: config.num_heads,
        })
    }

    /// Queries are scaled before the dot product; the softmax is rounded to the model's type.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let head_dim = width / self.heads;
        let split = |x: Tensor| -> Result<Tensor> {
            let x = x.reshape((batch, tokens, self.heads, head_dim))?.transpose(1, 2)?;
            Ok(x.reshape((batch * self.heads, tokens, head_dim))?)
        };
        let q = self.q_proj.forward(x)?.to_dtype(DType::F32)?;
        let q = split((q / (head_dim as f64).sqrt())?.to_dtype(x.dtype())?)?;
        let (k, v) = (split(self.k_proj.forward(x)?)?, split(self.v_proj.forward(x)?)?);
        if let Some((mixed, _)) = fused_attention([&q, &k, &v], batch, Scores::Full { divided: false })? {
            return self.out_proj.forward(&mixed);
        }
        let probs = softmax_last_dim(&q.matmul(&k.transpose(1, 2)?)?)?;
        let mixed = probs.matmul(&v)?.reshape((batch, self.heads, tokens, head_dim))?;
        self.out_proj.forward(&mixed.transpose(1, 2)?.reshape((batch, tokens, width))?)
    }
}

/// `x · σ(1.702 x)`, rounded to the type of `x` after every step as the reference does.
fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    if dtype == DType::F32 {
        return nn::quick_gelu(x);
    }
    let wide = x.to_dtype(DType::F32)?;
    let gate = nn::sigmoid(&round_to(&(&wide * 1.702)?, dtype)?)?;
    Ok((wide * round_to(&gate, dtype)?)?.to_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::error::Error;

    #[test]
    fn the_feature_layer_counts_hidden_states() -> Result<()> {
        let config = Config::new(
            Path::new("config.json"),
            json!({ "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14 }),
        )?;
        for (layer, blocks) in [(-2, 23), (-1, 24), (24, 24), (0, 0), (-25, 0)] {
            assert_eq!(ClipConfig::from_config(&config, layer)?.blocks_used, blocks);
        }
        assert_eq!(ClipConfig::from_config(&config, -2)?.grid(), 24);
        for layer in [25, -26] {
            assert!(matches!(ClipConfig::from_config(&config, layer), Err(Error::Config { .. })));
        }
        Ok(())
    }
}
