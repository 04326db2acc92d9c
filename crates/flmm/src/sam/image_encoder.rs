//! SAM's image encoder: a ViT with windowed and global attention and decomposed relative positions
//! (`spec/pipeline.md` §5.1).
//!
//! Frozen when a grounding head is trained; every operation has a gradient all the same, so that a small SAM can
//! be trained from scratch. Feature maps are channels-last, `[B, rows, columns, width]`, until the neck.

use candle_core::{Device, Tensor};

use super::attention::Attention;
use super::config::SamConfig;
use super::numbers::Numbers;
use crate::error::{Error, Result};
use crate::nn::{Conv2d, LayerNorm, LayerNorm2d, Linear, gelu};
use crate::weights::Params;

const EPS: f64 = 1e-6;

/// Picture `[B, 3, S, S]` → image embedding `[B, C, e, e]`, e = S / patch.
#[derive(Debug, Clone)]
pub struct ImageEncoder {
    config: SamConfig,
    /// `[D, 3, p, p]`
    patch_weight: Tensor,
    /// `[D]`
    patch_bias: Tensor,
    /// `[1, e, e, D]`
    pos_embed: Tensor,
    blocks: Vec<Block>,
    neck: Neck,
}

impl ImageEncoder {
    /// Reads the tensors below `params` (normally `image_encoder.`).
    pub fn load(config: &SamConfig, params: &Params) -> Result<Self> {
        let (width, patch, grid) = (config.embed_dim, config.patch_size, config.grid());
        let patch_params = params.pp("patch_embed").pp("proj");
        let blocks = params.pp("blocks");
        Ok(Self {
            patch_weight: patch_params.get(&[width, 3, patch, patch], "weight")?,
            patch_bias: patch_params.get(&[width], "bias")?,
            pos_embed: params.get(&[1, grid, grid, width], "pos_embed")?,
            blocks: (0..config.depth)
                .map(|i| Block::load(config, config.window(i), &blocks.pp(i)))
                .collect::<Result<_>>()?,
            neck: Neck::load(width, config.prompt_embed_dim, &params.pp("neck"))?,
            config: config.clone(),
        })
    }

    /// The same encoder with the matrices of its blocks, nearly all there is, in `numbers`. What the blocks add up stays in
    /// f32, and so do norms, the softmax, and what stands before and behind the blocks.
    ///
    /// # Errors
    /// [`Error::Request`] for [`Numbers::Int8`] elsewhere than on the processor.
    pub fn with_blocks_in(mut self, numbers: Numbers) -> Result<Self> {
        if numbers == Numbers::Int8 && !self.device().is_cpu() {
            return Err(Error::request(
                "int8 weights of SAM are for the processor only",
                "compute in bf16 there (--sam-dtype bf16), or on the processor (--device cpu)",
            ));
        }
        if numbers != Numbers::F32 {
            self.blocks = self.blocks.iter().map(|block| block.frozen(numbers)).collect::<Result<_>>()?;
        }
        Ok(self)
    }

    /// `pixel_values [B, 3, S, S]`, normalised and padded → `[B, C, e, e]`.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let mut x = self.embed(pixel_values)?;
        for i in 0..self.blocks.len() {
            x = self.block(i, &x)?;
        }
        self.neck.forward(&x)
    }

    /// First step of [`Self::forward`]: patches plus positions, `[B, 3, S, S]` → `[B, e, e, D]`.
    pub fn embed(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let (size, patch, grid) = (self.config.image_size, self.config.patch_size, self.config.grid());
        let batch = match *pixel_values.dims() {
            [batch, 3, h, w] if h == size && w == size => batch,
            ref found => {
                return Err(Error::request(
                    format!("SAM's pixel values have shape {found:?}, expected [B, 3, {size}, {size}]"),
                    "resize and pad the picture with `sam::pixel_values`",
                ));
            }
        };
        // A convolution whose stride is its size is one product over unfolded patches.
        let x = pixel_values.reshape(vec![batch, 3, grid, patch, grid, patch])?;
        let x = x.permute(vec![0, 2, 4, 1, 3, 5])?.contiguous()?.reshape((batch, grid, grid, ()))?;
        let weight = self.patch_weight.reshape((self.config.embed_dim, 3 * patch * patch))?;
        let x = Linear::new(weight, Some(self.patch_bias.clone())).forward(&x)?;
        Ok(x.broadcast_add(&self.pos_embed)?)
    }

    /// Transformer block `index`, `[B, e, e, D]` → same.
    pub fn block(&self, index: usize, x: &Tensor) -> Result<Tensor> {
        let block = self.blocks.get(index).ok_or_else(|| {
            Error::request(
                format!("SAM has no block {index}"),
                format!("it has {} blocks", self.blocks.len()),
            )
        })?;
        block.forward(x)
    }

    /// Where the tensors live.
    pub fn device(&self) -> &Device {
        self.pos_embed.device()
    }

    /// Number of transformer blocks.
    pub fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// Last step of [`Self::forward`], `[B, e, e, D]` → `[B, C, e, e]`.
    pub fn neck(&self) -> &Neck {
        &self.neck
    }
}

/// Convolutions from the encoder's width to the embedding's: 1×1, norm, 3×3, norm.
#[derive(Debug, Clone)]
pub struct Neck {
    /// `[C, D, 1, 1]`
    project: Tensor,
    norm1: LayerNorm,
    conv: Conv2d,
    norm2: LayerNorm2d,
}

impl Neck {
    /// Reads `0.weight`, `1.*`, `2.weight`, `3.*` below `params`.
    pub fn load(inputs: usize, outputs: usize, params: &Params) -> Result<Self> {
        Ok(Self {
            project: params.get(&[outputs, inputs, 1, 1], "0.weight")?,
            norm1: LayerNorm::load(outputs, EPS, &params.pp(1))?,
            conv: Conv2d::load(outputs, outputs, 3, 1, false, &params.pp(2))?,
            norm2: LayerNorm2d::load(outputs, EPS, &params.pp(3))?,
        })
    }

    /// `[B, e, e, D]` → `[B, C, e, e]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, inputs, _, _) = self.project.dims4()?;
        let x = Linear::new(self.project.reshape((outputs, inputs))?, None).forward(x)?;
        let x = self.norm1.forward(&x)?.permute((0, 3, 1, 2))?.contiguous()?;
        self.norm2.forward(&self.conv.forward(&x)?)
    }
}

/// Pre-norm transformer block.
#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    attn: Attention,
    norm2: LayerNorm,
    lin1: Linear,
    lin2: Linear,
    /// Side of the attention windows in tokens; `None` = global.
    window: Option<usize>,
}

impl Block {
    fn load(config: &SamConfig, window: Option<usize>, params: &Params) -> Result<Self> {
        let (width, hidden) = (config.embed_dim, config.encoder_mlp_dim());
        let side = window.unwrap_or(config.grid());
        Ok(Self {
            norm1: LayerNorm::load(width, EPS, &params.pp("norm1"))?,
            attn: Attention::load(width, config.num_heads, side, &params.pp("attn"))?,
            norm2: LayerNorm::load(width, EPS, &params.pp("norm2"))?,
            lin1: Linear::load(width, hidden, true, &params.pp("mlp").pp("lin1"))?,
            lin2: Linear::load(hidden, width, true, &params.pp("mlp").pp("lin2"))?,
            window,
        })
    }

    /// For use alone, computed in bf16.
    fn frozen(&self, numbers: Numbers) -> Result<Self> {
        Ok(Self {
            attn: self.attn.frozen(numbers)?,
            lin1: numbers.of(&self.lin1)?,
            lin2: numbers.of(&self.lin2)?,
            ..self.clone()
        })
    }

    /// The stream `x` keeps its type; the two branches are computed in that of the weights.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = self.attn.dtype();
        let attended = self.norm1.forward(x)?.to_dtype(dtype)?;
        let attended = match self.window {
            None => self.attn.forward(&attended)?,
            Some(side) => {
                let (_, rows, columns, _) = x.dims4()?;
                join_windows(&self.attn.forward(&split_windows(&attended, side)?)?, rows, columns)?
            }
        };
        let x = (x + attended.to_dtype(x.dtype())?)?;
        let hidden = gelu(&self.lin1.forward(&self.norm2.forward(&x)?.to_dtype(dtype)?)?)?;
        let fed = self.lin2.forward(&hidden)?.to_dtype(x.dtype())?;
        Ok((x + fed)?)
    }
}

/// `[B, h, w, D]` → `[B·windows, side, side, D]`, zero-padded at the bottom and right. Padding tokens are real keys.
fn split_windows(x: &Tensor, side: usize) -> Result<Tensor> {
    let (batch, h, w, width) = x.dims4()?;
    let (ny, nx) = (h.div_ceil(side), w.div_ceil(side));
    let x = x.pad_with_zeros(1, 0, ny * side - h)?.pad_with_zeros(2, 0, nx * side - w)?;
    let x = x.reshape(vec![batch, ny, side, nx, side, width])?.permute(vec![0, 1, 3, 2, 4, 5])?;
    Ok(x.contiguous()?.reshape((batch * ny * nx, side, side, width))?)
}

/// Inverse of [`split_windows`], dropping the padding: → `[B, h, w, D]`.
fn join_windows(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (windows, side, _, width) = x.dims4()?;
    let (ny, nx) = (h.div_ceil(side), w.div_ceil(side));
    let batch = windows / (ny * nx);
    let x = x.reshape(vec![batch, ny, nx, side, side, width])?.permute(vec![0, 1, 3, 2, 4, 5])?;
    let x = x.contiguous()?.reshape((batch, ny * side, nx * side, width))?;
    Ok(x.narrow(1, 0, h)?.narrow(2, 0, w)?.contiguous()?)
}

/// A resized picture as `pixel_values [3, S, S]`: `(x − mean) / std` per channel, zeros at the bottom and right.
///
/// Fails if the picture is larger than `image_size`.
pub fn pixel_values(resized: &image::RgbImage, image_size: usize) -> Result<Tensor> {
    const MEAN: [f32; 3] = [123.675, 116.28, 103.53];
    const STD: [f32; 3] = [58.395, 57.12, 57.375];
    let (w, h) = (resized.width() as usize, resized.height() as usize);
    if w > image_size || h > image_size {
        return Err(Error::image(
            format!("the resized picture is {w}×{h}, larger than SAM's input side {image_size}"),
            "resize its longer side to SAM's input side first",
        ));
    }
    let mut values = vec![0f32; 3 * image_size * image_size];
    for (x, y, pixel) in resized.enumerate_pixels() {
        for channel in 0..3 {
            let at = (channel * image_size + y as usize) * image_size + x as usize;
            values[at] = (f32::from(pixel.0[channel]) - MEAN[channel]) / STD[channel];
        }
    }
    Ok(Tensor::from_vec(values, (3, image_size, image_size), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_padded_split_and_joined_again() -> Result<()> {
        let x = Tensor::arange(0f32, 150.0, &Device::Cpu)?.reshape((2, 5, 5, 3))?;
        let windows = split_windows(&x, 4)?;
        assert_eq!(windows.dims(), [8, 4, 4, 3]);
        // Window (0, 1) of the first picture: one real column, then padding.
        let second = windows.get(1)?.to_vec3::<f32>()?;
        assert_eq!(second[2][0], x.get(0)?.to_vec3::<f32>()?[2][4]);
        assert_eq!(second[2][1], [0.0; 3]);
        let back = join_windows(&windows, 5, 5)?;
        assert_eq!(back.flatten_all()?.to_vec1::<f32>()?, x.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    }

    #[test]
    fn pixel_values_are_normalised_and_padded() -> Result<()> {
        let mut image = image::RgbImage::new(2, 1);
        image.put_pixel(1, 0, image::Rgb([255, 0, 7]));
        let values = pixel_values(&image, 4)?.to_vec3::<f32>()?;
        assert_eq!(values[0][0][1], (255.0 - 123.675) / 58.395);
        assert_eq!(values[2][0][1], (7.0 - 103.53) / 57.375);
        assert_eq!((values[0][1][0], values[0][0][2]), (0.0, 0.0));
        assert!(pixel_values(&image, 1).is_err());
        Ok(())
    }
}
