//! Prompts to embeddings: boxes, masks, positions (`spec/pipeline.md` §5.3).

use candle_core::{D, Tensor};

use super::config::SamConfig;
use crate::error::Result;
use crate::nn::{LayerNorm, Linear, gelu};
use crate::weights::Params;

const EPS: f64 = 1e-6;

/// Encodes box prompts as two tokens and mask prompts as a map of the image embedding's size.
///
/// Maps are channels-last and flat, `[N, e·e, C]`, as the mask decoder wants them.
#[derive(Debug, Clone)]
pub struct PromptEncoder {
    config: SamConfig,
    /// `[2, C/2]`, a constant
    gaussian: Tensor,
    /// `[1, C]`
    top_left: Tensor,
    /// `[1, C]`
    bottom_right: Tensor,
    /// `[1, C]`
    no_mask: Tensor,
    downscaling: Downscaling,
    /// `[1, e·e, C]`, a constant
    dense_pe: Tensor,
}

/// 2×2 stride 2, norm, GELU, 2×2 stride 2, norm, GELU, 1×1.
#[derive(Debug, Clone)]
struct Downscaling {
    /// `[m/4, 1, 2, 2]`, `[m/4]`
    first: (Tensor, Tensor),
    norm1: LayerNorm,
    /// `[m, m/4, 2, 2]`, `[m]`
    second: (Tensor, Tensor),
    norm2: LayerNorm,
    /// `[C, m, 1, 1]`, `[C]`
    last: (Tensor, Tensor),
}

impl PromptEncoder {
    /// Reads the tensors below `params` (normally `prompt_encoder.`).
    pub fn load(config: &SamConfig, params: &Params) -> Result<Self> {
        let (width, inner) = (config.prompt_embed_dim, config.mask_in_chans);
        let token = |name: &str| params.get(&[1, width], &format!("{name}.weight"));
        // Point prompts are not part of the method: their embeddings must exist, nothing reads them.
        for name in ["point_embeddings.0", "point_embeddings.1", "not_a_point_embed"] {
            token(name)?;
        }
        let down = params.pp("mask_downscaling");
        let conv = |index: usize, outputs: usize, inputs: usize, size: usize| {
            let params = down.pp(index);
            Ok::<_, crate::Error>((
                params.get(&[outputs, inputs, size, size], "weight")?,
                params.get(&[outputs], "bias")?,
            ))
        };
        let gaussian = params.get(&[2, width / 2], "pe_layer.positional_encoding_gaussian_matrix")?.detach();
        let grid = config.grid();
        let centre = |i: usize| (i as f32 + 0.5) / grid as f32;
        let centres: Vec<f32> = (0..grid * grid).flat_map(|i| [centre(i % grid), centre(i / grid)]).collect();
        let centres = Tensor::from_vec(centres, (grid * grid, 2), gaussian.device())?;
        Ok(Self {
            top_left: token("point_embeddings.2")?,
            bottom_right: token("point_embeddings.3")?,
            no_mask: token("no_mask_embed")?,
            downscaling: Downscaling {
                first: conv(0, inner / 4, 1, 2)?,
                norm1: LayerNorm::load(inner / 4, EPS, &down.pp(1))?,
                second: conv(3, inner, inner / 4, 2)?,
                norm2: LayerNorm::load(inner, EPS, &down.pp(4))?,
                last: conv(6, width, inner, 1)?,
            },
            dense_pe: position_encoding(&centres, &gaussian)?.unsqueeze(0)?,
            gaussian,
            config: config.clone(),
        })
    }

    /// Positions of the image embedding, `[1, e·e, C]`.
    pub fn dense_pe(&self) -> &Tensor {
        &self.dense_pe
    }

    /// Boxes `(x0, y0, x1, y1)` in pixels of SAM's input → corner tokens `[N, 2, C]`.
    ///
    /// Half a pixel is added to every coordinate, as published.
    pub fn boxes(&self, boxes: &[[f64; 4]]) -> Result<Tensor> {
        let side = self.config.image_size as f32;
        let corners: Vec<f32> = boxes.iter().flatten().map(|&x| (x as f32 + 0.5) / side).collect();
        let corners = Tensor::from_vec(corners, (2 * boxes.len(), 2), self.gaussian.device())?;
        let corners = position_encoding(&corners, &self.gaussian)?;
        let corners = corners.reshape((boxes.len(), 2, self.config.prompt_embed_dim))?;
        Ok(corners.broadcast_add(&Tensor::cat(&[&self.top_left, &self.bottom_right], 0)?)?)
    }

    /// Mask prompts (logits) `[N, 4e, 4e]` → dense embedding `[N, e·e, C]`.
    pub fn masks(&self, masks: &Tensor) -> Result<Tensor> {
        let (n, grid, width) = (masks.dim(0)?, self.config.grid(), self.config.prompt_embed_dim);
        let down = &self.downscaling;
        let inner = self.config.mask_in_chans;
        // Both strided convolutions only ever see one 4×4 block: gather the blocks once, then multiply. Axes:
        // row, its taps in the second and first convolution, column, its taps.
        let x = masks.reshape(vec![n, grid, 2, 2, grid, 2, 2])?;
        let x = x.permute(vec![0, 1, 4, 2, 5, 3, 6])?.contiguous()?.reshape((n * grid * grid * 4, 4))?;
        let x = Linear::new(down.first.0.reshape((inner / 4, 4))?, Some(down.first.1.clone())).forward(&x)?;
        let x = gelu(&down.norm1.forward(&x)?)?.reshape((n * grid * grid, inner))?;
        let weight = down.second.0.permute((0, 2, 3, 1))?.contiguous()?.reshape((inner, inner))?;
        let x = Linear::new(weight, Some(down.second.1.clone())).forward(&x)?;
        let x = gelu(&down.norm2.forward(&x)?)?;
        let x = Linear::new(down.last.0.reshape((width, inner))?, Some(down.last.1.clone())).forward(&x)?;
        Ok(x.reshape((n, grid * grid, width))?)
    }

    /// The dense embedding of phrases without a mask prompt, `[1, 1, C]`: the same everywhere.
    pub fn no_mask(&self) -> Result<Tensor> {
        Ok(self.no_mask.unsqueeze(0)?)
    }
}

/// Points `[K, 2]`, (x, y) in 0..1 → `[K, C]`: sines then cosines of random projections.
fn position_encoding(points: &Tensor, gaussian: &Tensor) -> Result<Tensor> {
    let centred = points.affine(2.0, -1.0)?;
    let angles = (centred.matmul(gaussian)? * std::f64::consts::TAU)?;
    Ok(Tensor::cat(&[angles.sin()?, angles.cos()?], D::Minus1)?)
}
