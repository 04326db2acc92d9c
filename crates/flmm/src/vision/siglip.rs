//! SigLIP's vision transformer under both published naming styles (`spec/models.md` §7, §9).

use candle_core::Tensor;
use flmm_kernels::Scores;

use super::regrid::regrid;
use super::tower;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear, fused_attention, gelu, gelu_tanh, residual, softmax_last_dim};
use crate::text::scaled_scores;
use crate::weights::Params;

/// How a checkpoint names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// `embeddings.*`, `encoder.layers.N.*`, `post_layernorm`: Hugging Face.
    HuggingFace,
    /// `patch_embed.proj`, `pos_embed`, `blocks.N.*` with a fused `qkv`, `norm`: timm.
    Timm,
}

/// Activation of the feed-forward blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The exact GELU.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// Sizes and flavour of the tower, and which of its states is used.
#[derive(Debug, Clone, PartialEq)]
pub struct SiglipConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the feed-forward blocks.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Number of heads; divides `hidden_size`.
    pub num_heads: usize,
    /// Side of the pictures that the tower was trained on, in pixels; tells the size of the position table.
    pub trained_size: usize,
    /// Side of the pictures it reads here; where it differs, the positions are re-gridded.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f64,
    /// Activation of the feed-forward blocks.
    pub activation: Activation,
    /// Naming style of the checkpoint.
    pub names: Names,
    /// How many blocks run before the features are taken: hidden state −2 is `num_layers − 1`.
    pub blocks_used: usize,
    /// Whether the final norm is applied to them.
    pub final_norm: bool,
}

impl SiglipConfig {
    /// SigLIP-L/16-384 as timm writes it: all blocks and the final norm (DeepSeek-VL, `spec/models.md` §7).
    pub fn large_patch16_384() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_layers: 24,
            num_heads: 16,
            trained_size: 384,
            image_size: 384,
            patch_size: 16,
            layer_norm_eps: 1e-6,
            activation: Activation::Gelu,
            names: Names::Timm,
            blocks_used: 24,
            final_norm: true,
        }
    }

    /// Reads a `vision_config` in Hugging Face's style with the defaults of the pinned library's
    /// `SiglipVisionConfig`.
    ///
    /// `feature_layer` counts hidden states, the embedding being number 0; negative numbers count from the end.
    /// Hidden states are taken before the final norm.
    pub fn from_config(config: &Config, feature_layer: i64) -> Result<Self> {
        let activation = match config.text_or("hidden_act", "gelu_pytorch_tanh")? {
            "gelu_pytorch_tanh" => Activation::GeluTanh,
            "gelu" => Activation::Gelu,
            other => {
                return Err(config.error(
                    "hidden_act",
                    format!("activation `{other}` is not supported; known: gelu_pytorch_tanh, gelu"),
                    "use a model with a SigLIP vision tower",
                ));
            }
        };
        let num_layers = config.layers_or("num_hidden_layers", 12)?;
        let (hidden_size, num_heads) =
            (config.size_or("hidden_size", 768)?, config.size_or("num_attention_heads", 12)?);
        let (image_size, patch_size) =
            (config.size_or("image_size", 224)?, config.size_or("patch_size", 16)?);
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
            layer_norm_eps: config.number_or("layer_norm_eps", 1e-6)?,
            activation,
            names: Names::HuggingFace,
            blocks_used: tower::blocks_used(config, num_layers, feature_layer)?,
            final_norm: false,
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

/// A frozen SigLIP vision tower.
#[derive(Debug)]
pub struct SiglipVision {
    config: SiglipConfig,
    /// A linear map of patches.
    patch_embedding: Linear,
    /// `[grid², hidden]`, already on the grid that is used.
    position_embedding: Tensor,
    layers: Vec<Block>,
    final_norm: Option<LayerNorm>,
}

impl SiglipVision {
    /// Reads the embeddings, the blocks that are used and, if it is used, the final norm below `params`
    /// (`vision_model.` of a Hugging Face checkpoint). The attention pool is never used.
    pub fn load(config: SiglipConfig, params: &Params) -> Result<Self> {
        let (width, patch) = (config.hidden_size, config.patch_size);
        let trained = config.trained_size / patch;
        let timm = config.names == Names::Timm;
        let embed = if timm { "patch_embed.proj" } else { "embeddings.patch_embedding" };
        let embed = params.pp(embed);
        let kernel = embed.get(&[width, 3, patch, patch], "weight")?.reshape((width, 3 * patch * patch))?;
        let positions = match config.names {
            Names::Timm => params.get(&[1, trained * trained, width], "pos_embed")?.squeeze(0)?,
            Names::HuggingFace => {
                params.get(&[trained * trained, width], "embeddings.position_embedding.weight")?
            }
        };
        let blocks = params.pp(if timm { "blocks" } else { "encoder.layers" });
        let layers = (0..config.blocks_used).map(|index| {
            blocks.pp(index).claim(&[]);
            Block::load(&config, &blocks.pp(index))
        });
        let norm = params.pp(if timm { "norm" } else { "post_layernorm" });
        let norm = config.final_norm.then(|| LayerNorm::load(width, config.layer_norm_eps, &norm));
        Ok(Self {
            patch_embedding: Linear::new(kernel, Some(embed.get(&[width], "bias")?)),
            position_embedding: regrid(&positions, trained, config.grid())?,
            layers: layers.collect::<Result<_>>()?,
            final_norm: norm.transpose()?,
            config,
        })
    }

    /// Sizes.
    pub fn config(&self) -> &SiglipConfig {
        &self.config
    }

    /// The positions `[grid², hidden]`, re-gridded where the picture size asks for it.
    pub fn position_embedding(&self) -> &Tensor {
        &self.position_embedding
    }

    /// `pixel_values [B, 3, S, S]` → `[B, grid², hidden]`: the selected state.
    ///
    /// # Errors
    /// [`Error::Request`] if S is not the configured picture size.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let side = self.config.image_size;
        if !matches!(*pixel_values.dims(), [_, 3, h, w] if (h, w) == (side, side)) {
            return Err(Error::request(
                format!("pixel values have shape {:?}, the tower reads {side} × {side}", pixel_values.dims()),
                "prepare the picture with the model's own processor",
            ));
        }
        let pixel_values = pixel_values.to_dtype(self.position_embedding.dtype())?;
        let patches = tower::patches(&pixel_values, self.config.grid(), self.config.patch_size)?;
        let mut hidden = self.patch_embedding.forward(&patches)?.broadcast_add(&self.position_embedding)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden)?;
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&hidden),
            None => Ok(hidden),
        }
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

impl Block {
    fn load(config: &SiglipConfig, params: &Params) -> Result<Self> {
        let (width, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let (norm1, attention, norm2) = match config.names {
            Names::HuggingFace => ("layer_norm1", "self_attn", "layer_norm2"),
            Names::Timm => ("norm1", "attn", "norm2"),
        };
        Ok(Self {
            norm1: LayerNorm::load(width, eps, &params.pp(norm1))?,
            attention: Attention::load(config, &params.pp(attention))?,
            norm2: LayerNorm::load(width, eps, &params.pp(norm2))?,
            fc1: Linear::load(width, inner, true, &params.pp("mlp.fc1"))?,
            fc2: Linear::load(inner, width, true, &params.pp("mlp.fc2"))?,
            activation: config.activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = residual(x, &self.attention.forward(&self.norm1.forward(x)?)?)?;
        let inner = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let inner = match self.activation {
            Activation::Gelu => gelu(&inner),
            Activation::GeluTanh => gelu_tanh(&inner),
        };
        residual(&x, &self.fc2.forward(&inner?)?)
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
    fn load(config: &SiglipConfig, params: &Params) -> Result<Self> {
        let (width, heads) = (config.hidden_size, config.num_heads);
        let linear = |name| Linear::load(width, width, true, &params.pp(name));
        if config.names == Names::HuggingFace {
            return Ok(Self {
                q_proj: linear("q_proj")?,
                k_proj: linear("k_proj")?,
                v_proj: linear("v_proj")?,
                out_proj: linear("out_proj")?,
                heads,
            });
        }
        let weight = params.get(&[3 * width, width], "qkv.weight")?;
        let bias = params.get(&[3 * width], "qkv.bias")?;
        let part = |index: usize| {
            let bias = bias.narrow(0, index * width, width)?;
            Ok::<_, Error>(Linear::new(weight.narrow(0, index * width, width)?, Some(bias)))
        };
        Ok(Self { q_proj: part(0)?, k_proj: part(1)?, v_proj: part(2)?, out_proj: linear("proj")?, heads })
    }

    /// The softmax runs in f32 and is rounded to the model's type.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let head_dim = width / self.heads;
        let split = |x: Tensor| -> Result<Tensor> {
            let x = x.reshape((batch, tokens, self.heads, head_dim))?.transpose(1, 2)?;
            Ok(x.reshape((batch * self.heads, tokens, head_dim))?)
        };
        let (q, k) = (split(self.q_proj.forward(x)?)?, split(self.k_proj.forward(x)?)?);
        let v = split(self.v_proj.forward(x)?)?;
        if let Some((mixed, _)) = fused_attention([&q, &k, &v], batch, Scores::Full { divided: true })? {
            return self.out_proj.forward(&mixed);
        }
        let probs = softmax_last_dim(&scaled_scores(&q, &k)?)?.to_dtype(x.dtype())?;
        let mixed = probs.matmul(&v)?.reshape((batch, self.heads, tokens, head_dim))?;
        self.out_proj.forward(&mixed.transpose(1, 2)?.reshape((batch, tokens, width))?)
    }
}
