//! DeepSeek-VL-7B's two towers: SAM's encoder on the whole picture, SigLIP on a small copy of it
//! (`spec/models.md` §7).

use candle_core::Tensor;

use super::resample::antialiased_bilinear;
use super::siglip::{SiglipConfig, SiglipVision};
use super::tower::PixelNorm;
use crate::error::Result;
use crate::nn::{Conv2d, bilinear};
use crate::sam::{ImageEncoder, Neck, SamConfig};
use crate::weights::Params;

/// Sizes of the high tower.
#[derive(Debug, Clone, PartialEq)]
pub struct HighConfig {
    /// Sizes of the encoder; those of SAM's decoder are not looked at.
    pub encoder: SamConfig,
    /// Channels after each convolution that halves the map.
    pub downsample_channels: Vec<usize>,
}

impl HighConfig {
    /// `sam_b_downsample` (`spec/models.md` §7).
    pub fn sam_b_downsample() -> Self {
        Self { encoder: SamConfig::vit_b(), downsample_channels: vec![512, 1024] }
    }

    /// Width of the features.
    pub fn width(&self) -> usize {
        self.downsample_channels.last().copied().unwrap_or(self.encoder.prompt_embed_dim)
    }
}

/// SAM's encoder with a second neck on its first global block; both outputs are made smaller and added.
#[derive(Debug)]
struct HighTower {
    encoder: ImageEncoder,
    neck_hd: Neck,
    downsamples: Vec<Conv2d>,
    /// `[1]`: factor on what comes from the second neck.
    hd_alpha_downsamples: Tensor,
    first_global: usize,
    /// Side of the maps that are given out.
    grid: usize,
}

impl HighTower {
    fn load(config: &HighConfig, grid: usize, params: &Params) -> Result<Self> {
        let (width, outputs) = (config.encoder.embed_dim, config.encoder.prompt_embed_dim);
        let inputs = std::iter::once(&outputs).chain(&config.downsample_channels);
        let downsamples = inputs.zip(&config.downsample_channels).enumerate().map(|(index, (&from, &to))| {
            Conv2d::load(from, to, 3, 2, false, &params.pp("downsamples").pp(index))
        });
        Ok(Self {
            encoder: ImageEncoder::load(&config.encoder, params)?,
            neck_hd: Neck::load(width, outputs, &params.pp("neck_hd"))?,
            downsamples: downsamples.collect::<Result<_>>()?,
            hd_alpha_downsamples: params.get(&[1], "hd_alpha_downsamples")?,
            first_global: config.encoder.global_attn_indexes.iter().copied().min().unwrap_or(0),
            grid,
        })
    }

    /// Normalised pixels `[B, 3, S, S]` → `[B, grid², width]`.
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = self.encoder.embed(pixels)?;
        let mut first_global = x.clone();
        for index in 0..self.encoder.depth() {
            x = self.encoder.block(index, &x)?;
            if index == self.first_global {
                first_global = x.clone();
            }
        }
        let low = self.smaller(&self.encoder.neck().forward(&x)?)?;
        let high = self.smaller(&self.neck_hd.forward(&first_global)?)?;
        let maps = (low + high.broadcast_mul(&self.hd_alpha_downsamples)?)?;
        Ok(maps.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
    }

    /// `[B, C, e, e]` → `[B, width, grid, grid]`.
    fn smaller(&self, maps: &Tensor) -> Result<Tensor> {
        let side = self.grid << self.downsamples.len();
        let mut maps = bilinear(maps, side, side)?;
        for conv in &self.downsamples {
            maps = conv.forward(&maps)?;
        }
        Ok(maps)
    }
}

/// Both towers, each with its own view of the picture.
#[derive(Debug)]
pub struct HybridVision {
    high: HighTower,
    high_norm: Option<PixelNorm>,
    low: SiglipVision,
    low_norm: Option<PixelNorm>,
    image_size: usize,
    widths: (usize, usize),
}

impl HybridVision {
    /// Reads `vision_tower_high.vision_tower.*` and `vision_tower_low.vision_tower.*`. The layer norms behind them
    /// are in the file but never applied.
    pub(crate) fn load(
        (high, high_norm): (&HighConfig, Option<PixelNorm>),
        (low, low_norm): (SiglipConfig, Option<PixelNorm>),
        params: &Params,
    ) -> Result<Self> {
        Ok(Self {
            image_size: high.encoder.image_size,
            widths: (high.width(), low.hidden_size),
            high: HighTower::load(high, low.grid(), &params.pp("vision_tower_high.vision_tower"))?,
            low: SiglipVision::load(low, &params.pp("vision_tower_low.vision_tower"))?,
            high_norm,
            low_norm,
        })
    }

    /// Side of the pictures in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// Tokens per side.
    pub fn grid(&self) -> usize {
        self.low.config().grid()
    }

    /// Widths of the high and the low features.
    pub fn widths(&self) -> (usize, usize) {
        self.widths
    }

    /// What the low tower sees before its normalisation: `[B, 3, S, S]` → `[B, 3, s, s]`.
    pub fn small(&self, pixels: &Tensor) -> Result<Tensor> {
        let side = self.low.config().image_size;
        antialiased_bilinear(pixels, side, side)
    }

    /// `pixels [B, 3, S, S]` between 0 and 1, in the model's type → features of the high and of the low tower, both
    /// `[B, grid², width]`.
    pub fn forward(&self, pixels: &Tensor) -> Result<(Tensor, Tensor)> {
        let normed = |norm: &Option<PixelNorm>, pixels: &Tensor| match norm {
            Some(norm) => norm.forward(pixels),
            None => Ok(pixels.clone()),
        };
        let high = self.high.forward(&normed(&self.high_norm, pixels)?)?;
        Ok((high, self.low.forward(&normed(&self.low_norm, &self.small(pixels)?)?)?))
    }
}
