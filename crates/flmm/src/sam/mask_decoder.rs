//! Prompt tokens and image to masks: a two-way transformer and hyper-networks (`spec/pipeline.md` §5.3).

use std::ops::Range;

use candle_core::Tensor;

use super::config::SamConfig;
use crate::error::Result;
use crate::nn::{LayerNorm, Linear, attention, gelu, relu};
use crate::weights::Params;

const EPS: f64 = 1e-5;
const UPSCALING_EPS: f64 = 1e-6;

/// Predicts masks of four times the image embedding's side.
#[derive(Debug, Clone)]
pub struct MaskDecoder {
    config: SamConfig,
    /// `[1, C]`
    iou_token: Tensor,
    /// `[4, C]`
    mask_tokens: Tensor,
    layers: Vec<TwoWayLayer>,
    final_attn: Attention,
    norm_final: LayerNorm,
    upscaling: Upscaling,
    /// One per mask token, `C` → `C/8`.
    hypernetworks: Vec<Mlp>,
    iou_head: Mlp,
}

/// Transposed 2×2 convolutions of stride 2: → C/4, norm, GELU, → C/8, GELU.
#[derive(Debug, Clone)]
struct Upscaling {
    /// `[C, C/4, 2, 2]`, `[C/4]`
    first: (Tensor, Tensor),
    norm: LayerNorm,
    /// `[C/4, C/8, 2, 2]`, `[C/8]`
    second: (Tensor, Tensor),
}

/// What the two-way transformer made of one group of phrases.
#[derive(Debug, Clone)]
pub struct Transformed {
    /// Tokens after each layer, `[N, T, C]`.
    pub after_layers: Vec<Tensor>,
    /// Tokens after the last norm, `[N, T, C]`, in the order IoU token, mask tokens, prompt.
    pub tokens: Tensor,
    /// Image after the last layer, `[N, e·e, C]`.
    pub image: Tensor,
}

impl MaskDecoder {
    /// Reads the tensors below `params` (normally `mask_decoder.`).
    pub fn load(config: &SamConfig, params: &Params) -> Result<Self> {
        let (width, masks) = (config.prompt_embed_dim, SamConfig::MASK_TOKENS);
        let (heads, cross) = (config.decoder_num_heads, config.cross_attention_dim());
        let transformer = params.pp("transformer");
        let up = params.pp("output_upscaling");
        let conv = |index: usize, inputs: usize, outputs: usize| {
            let params = up.pp(index);
            Ok::<_, crate::Error>((
                params.get(&[inputs, outputs, 2, 2], "weight")?,
                params.get(&[outputs], "bias")?,
            ))
        };
        let hypernetwork =
            |i: usize| Mlp::load(width, width, width / 8, &params.pp("output_hypernetworks_mlps").pp(i));
        Ok(Self {
            iou_token: params.get(&[1, width], "iou_token.weight")?,
            mask_tokens: params.get(&[masks, width], "mask_tokens.weight")?,
            layers: (0..config.decoder_depth)
                .map(|i| TwoWayLayer::load(config, i == 0, &transformer.pp("layers").pp(i)))
                .collect::<Result<_>>()?,
            final_attn: Attention::load(width, cross, heads, &transformer.pp("final_attn_token_to_image"))?,
            norm_final: LayerNorm::load(width, EPS, &transformer.pp("norm_final_attn"))?,
            upscaling: Upscaling {
                first: conv(0, width, width / 4)?,
                norm: LayerNorm::load(width / 4, UPSCALING_EPS, &up.pp(1))?,
                second: conv(3, width / 4, width / 8)?,
            },
            hypernetworks: (0..masks).map(hypernetwork).collect::<Result<_>>()?,
            iou_head: Mlp::load(width, config.iou_hidden_dim(), masks, &params.pp("iou_prediction_head"))?,
            config: config.clone(),
        })
    }

    /// Runs the two-way transformer on N phrases with equally many prompt tokens.
    ///
    /// * `image [N, e·e, C]` – image embedding plus dense prompt
    /// * `image_pe [1, e·e, C]`
    /// * `prompt [N, P, C]` – sparse prompt, P may be 0
    pub fn transform(&self, image: &Tensor, image_pe: &Tensor, prompt: &Tensor) -> Result<Transformed> {
        let (n, _, width) = prompt.dims3()?;
        let own = Tensor::cat(&[&self.iou_token, &self.mask_tokens], 0)?.unsqueeze(0)?;
        let own = own.broadcast_as((n, 1 + SamConfig::MASK_TOKENS, width))?.contiguous()?;
        let token_pe = Tensor::cat(&[&own, prompt], 1)?;
        let (mut tokens, mut image) = (token_pe.clone(), image.clone());
        let mut after_layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            (tokens, image) = layer.forward(&tokens, &token_pe, &image, image_pe)?;
            after_layers.push(tokens.clone());
        }
        let keys = image.broadcast_add(image_pe)?;
        let attended = self.final_attn.forward(&(&tokens + &token_pe)?, &keys, &image)?;
        let tokens = self.norm_final.forward(&(tokens + attended)?)?;
        Ok(Transformed { after_layers, tokens, image })
    }

    /// Masks of the mask tokens `which` (0 = single mask, 1..4 = alternatives), `[N, which.len(), 4e, 4e]`.
    pub fn masks(&self, transformed: &Transformed, which: Range<usize>) -> Result<Tensor> {
        let (n, width, grid) = (transformed.tokens.dim(0)?, self.config.prompt_embed_dim, self.config.grid());
        let (middle, last, count) = (width / 4, width / 8, which.len());
        // A transposed convolution whose stride is its size maps each pixel to its own block: one product per
        // convolution, and the blocks are put in place only once, at the end.
        let spread = |x: Tensor, (weight, bias): &(Tensor, Tensor), inputs: usize, outputs: usize| {
            let weight = weight.permute((2, 3, 1, 0))?.contiguous()?.reshape((4 * outputs, inputs))?;
            let bias = Tensor::cat(&[bias; 4], 0)?;
            Ok::<_, crate::Error>(Linear::new(weight, Some(bias)).forward(&x)?.reshape(((), outputs))?)
        };
        let up = &self.upscaling;
        let x = transformed.image.reshape((n * grid * grid, width))?;
        let x = gelu(&up.norm.forward(&spread(x, &up.first, width, middle)?)?)?;
        let x = gelu(&spread(x, &up.second, middle, last)?)?.reshape((n, grid * grid * 16, last))?;

        let weights = which.map(|i| {
            let token = transformed.tokens.narrow(1, 1 + i, 1)?;
            self.hypernetworks[i].forward(&token)
        });
        let weights = Tensor::cat(&weights.collect::<Result<Vec<_>>>()?, 1)?;
        let masks = x.matmul(&weights.transpose(1, 2)?.contiguous()?)?;
        // Axes: row, column, their halves after the first and after the second convolution.
        let masks = masks.reshape(vec![n, grid, grid, 2, 2, 2, 2, count])?;
        let masks = masks.permute(vec![0, 7, 1, 3, 5, 2, 4, 6])?.contiguous()?;
        Ok(masks.reshape((n, count, 4 * grid, 4 * grid))?)
    }

    /// Predicted IoU of each of the four masks, `[N, 4]`. The method does not use it.
    pub fn iou(&self, transformed: &Transformed) -> Result<Tensor> {
        self.iou_head.forward(&transformed.tokens.narrow(1, 0, 1)?.squeeze(1)?)
    }
}

/// One layer: tokens among themselves, tokens to image, MLP, image to tokens.
#[derive(Debug, Clone)]
struct TwoWayLayer {
    self_attn: Attention,
    token_to_image: Attention,
    image_to_token: Attention,
    lin1: Linear,
    lin2: Linear,
    norms: [LayerNorm; 4],
    /// The first layer's self-attention replaces the tokens and adds no positions.
    first: bool,
}

impl TwoWayLayer {
    fn load(config: &SamConfig, first: bool, params: &Params) -> Result<Self> {
        let (width, hidden) = (config.prompt_embed_dim, config.mlp_dim);
        let (heads, cross) = (config.decoder_num_heads, config.cross_attention_dim());
        let norm = |i: usize| LayerNorm::load(width, EPS, &params.pp(format!("norm{i}")));
        Ok(Self {
            self_attn: Attention::load(width, width, heads, &params.pp("self_attn"))?,
            token_to_image: Attention::load(width, cross, heads, &params.pp("cross_attn_token_to_image"))?,
            image_to_token: Attention::load(width, cross, heads, &params.pp("cross_attn_image_to_token"))?,
            lin1: Linear::load(width, hidden, true, &params.pp("mlp").pp("lin1"))?,
            lin2: Linear::load(hidden, width, true, &params.pp("mlp").pp("lin2"))?,
            norms: [norm(1)?, norm(2)?, norm(3)?, norm(4)?],
            first,
        })
    }

    /// `tokens, token_pe [N, T, C]`, `image [N, e·e, C]`, `image_pe [1, e·e, C]` → tokens and image.
    fn forward(
        &self,
        tokens: &Tensor,
        token_pe: &Tensor,
        image: &Tensor,
        image_pe: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let [norm1, norm2, norm3, norm4] = &self.norms;
        let tokens = if self.first {
            self.self_attn.forward(tokens, tokens, tokens)?
        } else {
            let q = (tokens + token_pe)?;
            (tokens + self.self_attn.forward(&q, &q, tokens)?)?
        };
        let tokens = norm1.forward(&tokens)?;
        let placed_image = image.broadcast_add(image_pe)?;
        let attended = self.token_to_image.forward(&(&tokens + token_pe)?, &placed_image, image)?;
        let tokens = norm2.forward(&(tokens + attended)?)?;
        let hidden = relu(&self.lin1.forward(&tokens)?)?;
        let tokens = norm3.forward(&(&tokens + self.lin2.forward(&hidden)?)?)?;
        let attended = self.image_to_token.forward(&placed_image, &(&tokens + token_pe)?, &tokens)?;
        let image = norm4.forward(&(image + attended)?)?;
        Ok((tokens, image))
    }
}

/// Multi-head attention with an inner width of its own.
#[derive(Debug, Clone)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
}

impl Attention {
    fn load(width: usize, inner: usize, heads: usize, params: &Params) -> Result<Self> {
        Ok(Self {
            q_proj: Linear::load(width, inner, true, &params.pp("q_proj"))?,
            k_proj: Linear::load(width, inner, true, &params.pp("k_proj"))?,
            v_proj: Linear::load(width, inner, true, &params.pp("v_proj"))?,
            out_proj: Linear::load(inner, width, true, &params.pp("out_proj"))?,
            heads,
        })
    }

    /// `q [N, Q, C]`, `k` and `v [N, K, C]` → `[N, Q, C]`.
    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.q_proj.forward(q)?, self.k_proj.forward(k)?, self.v_proj.forward(v)?);
        self.out_proj.forward(&attention(&q, &k, &v, self.heads)?)
    }
}

/// Linear layers with ReLU between them.
#[derive(Debug, Clone)]
struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    fn load(inputs: usize, hidden: usize, outputs: usize, params: &Params) -> Result<Self> {
        let last = SamConfig::HEAD_DEPTH - 1;
        let layer = |i: usize| {
            let (from, to) = (if i == 0 { inputs } else { hidden }, if i == last { outputs } else { hidden });
            Linear::load(from, to, true, &params.pp("layers").pp(i))
        };
        Ok(Self { layers: (0..=last).map(layer).collect::<Result<_>>()? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x)?;
            if i + 1 < self.layers.len() {
                x = relu(&x)?;
            }
        }
        Ok(x)
    }
}
