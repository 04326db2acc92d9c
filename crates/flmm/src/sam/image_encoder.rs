//! SAM's image encoder: a ViT with windowed and global attention and decomposed relative positions
//! (`spec/pipeline.md` §5.1).
//!
//! Frozen when a grounding head is trained; every operation has a gradient all the same, so that a small SAM can
//! be trained from scratch. Feature maps are channels-last, `[B, rows, columns, width]`, until the neck.

use candle_core::{DType, Device, Tensor};
use flmm_kernels::Scores;
use rayon::prelude::*;

use super::config::SamConfig;
use super::numbers::Numbers;
use crate::error::{Error, Result};
use crate::nn::host::Elements;
use crate::nn::{Conv2d, LayerNorm, LayerNorm2d, Linear, fused_attention, gelu, softmax_last_dim};
use crate::weights::Params;

const EPS: f64 = 1e-6;

/// Attention scores held at a time, per worker, when no gradient is tracked: 16 MB in f32. Global attention of a
/// public SAM has 4096² scores per head and 12 to 16 heads.
const SCORES_AT_ONCE: usize = 1 << 22;

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
        let dtype = self.attn.qkv.dtype();
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

/// Queries, keys and values.
#[derive(Debug, Clone)]
enum Qkv {
    /// As in files, `[3·D, D]` and `[3·D]`, rows in the order q, k, v: all in one can be trained.
    Together { weight: Tensor, bias: Tensor },
    /// One after the other, in bf16 or packed.
    Apart([Linear; 3]),
}

impl Qkv {
    /// What is computed in.
    fn dtype(&self) -> DType {
        match self {
            Self::Together { weight, .. } => weight.dtype(),
            Self::Apart(_) => DType::BF16,
        }
    }

    /// The map to queries (0), keys (1) or values (2).
    fn part(&self, part: usize) -> Result<Linear> {
        match self {
            Self::Together { weight, bias } => {
                let width = weight.dim(1)?;
                let bias = bias.narrow(0, part * width, width)?;
                Ok(Linear::new(weight.narrow(0, part * width, width)?, Some(bias)))
            }
            Self::Apart(parts) => Ok(parts[part].clone()),
        }
    }

    fn frozen(&self, numbers: Numbers) -> Result<Self> {
        let part = |part| numbers.of(&self.part(part)?);
        Ok(Self::Apart([part(0)?, part(1)?, part(2)?]))
    }
}

/// Self-attention over a square of tokens with decomposed relative positions.
#[derive(Debug, Clone)]
struct Attention {
    qkv: Qkv,
    proj: Linear,
    /// `[2·side − 1, head dim]`
    rel_pos_h: Tensor,
    /// `[2·side − 1, head dim]`
    rel_pos_w: Tensor,
    /// `[side²]`: row of the table for every (query position, key position).
    offsets: Tensor,
    /// `[1, side², 2·side]`: which row and which column each key lies in.
    key_position: Tensor,
    heads: usize,
    side: usize,
}

impl Attention {
    fn load(width: usize, heads: usize, side: usize, params: &Params) -> Result<Self> {
        let table = [2 * side - 1, width / heads];
        let weight = params.get(&[3 * width, width], "qkv.weight")?;
        let device = weight.device();
        let position = |i: usize| i % side;
        let offsets: Vec<u32> =
            (0..side * side).map(|i| (i / side + side - 1 - position(i)) as u32).collect();
        let key_position = (0..side * side).flat_map(|key| {
            let (row, column) = (key / side, position(key));
            (0..2 * side).map(move |i| f32::from(u8::from(i == row || i == side + column)))
        });
        let key_position: Vec<f32> = key_position.collect();
        Ok(Self {
            offsets: Tensor::from_vec(offsets, side * side, device)?,
            key_position: Tensor::from_vec(key_position, (1, side * side, 2 * side), device)?,
            proj: Linear::load(width, width, true, &params.pp("proj"))?,
            rel_pos_h: params.get(&table, "rel_pos_h")?,
            rel_pos_w: params.get(&table, "rel_pos_w")?,
            qkv: Qkv::Together { weight, bias: params.get(&[3 * width], "qkv.bias")? },
            heads,
            side,
        })
    }

    /// The tables of relative positions stay as they are: they are small, and read in f32.
    fn frozen(&self, numbers: Numbers) -> Result<Self> {
        Ok(Self { qkv: self.qkv.frozen(numbers)?, proj: numbers.of(&self.proj)?, ..self.clone() })
    }

    /// `[G, side, side, D]` → same; each of the G squares attends to itself.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (squares, side, _, width) = x.dims4()?;
        let (tokens, head_dim) = (side * side, width / self.heads);
        let split = |part: usize| {
            let y = self.qkv.part(part)?.forward(x)?;
            let y = y.reshape((squares, tokens, self.heads, head_dim))?.transpose(1, 2)?.contiguous()?;
            Ok::<_, Error>(y.reshape((squares * self.heads, tokens, head_dim))?)
        };
        let (q, k, v) = (split(0)?, split(1)?, split(2)?);
        if let Some(y) = self.fused(&q, &k, &v, squares)? {
            return self.proj.forward(&y.reshape((squares, side, side, width))?);
        }

        // scores = q·k/√d + q·R_h[row offset] + q·R_w[column offset], the last two with the unscaled q. As one
        // product: queries carry their score against every row and column, keys say which ones they lie in.
        let (by_row, by_column) = self.position_scores(&q)?;
        let q = Tensor::cat(&[(&q * (head_dim as f64).powf(-0.5))?, by_row, by_column], 2)?;
        let position = self.key_position.broadcast_as((squares * self.heads, tokens, 2 * side))?;
        let k = Tensor::cat(&[k, position.to_dtype(x.dtype())?.contiguous()?], 2)?;

        let y = attend(&q, &k, &v, SCORES_AT_ONCE)?.reshape((squares, self.heads, tokens, head_dim))?;
        let y = y.transpose(1, 2)?.contiguous()?.reshape((squares, side, side, width))?;
        self.proj.forward(&y)
    }

    /// The same without a matrix of scores, where there is a kernel for it: `[squares, side², D]`.
    fn fused(&self, q: &Tensor, k: &Tensor, v: &Tensor, squares: usize) -> Result<Option<Tensor>> {
        let operands = [q, k, v, &self.rel_pos_h, &self.rel_pos_w];
        if !q.device().is_cpu() || operands.iter().any(|t| t.track_op()) {
            return Ok(None);
        }
        let (groups, tokens, dim) = q.dims3()?;
        let wide = q.to_dtype(DType::F32)?.reshape((groups * tokens, dim))?;
        // Of every query with every line of a table, of which the kernel takes those of its keys.
        let against = |table: &Tensor| wide.matmul(&table.to_dtype(DType::F32)?.flip(&[0])?.t()?);
        let (by_row, by_column) = (against(&self.rel_pos_h)?, against(&self.rel_pos_w)?);
        let (by_row, by_column) = (Elements::of(&by_row), Elements::of(&by_column));
        let scores =
            Scores::Relative { by_row: by_row.get()?, by_column: by_column.get()?, columns: self.side };
        Ok(fused_attention([q, k, v], squares, scores)?.map(|(y, _)| y))
    }

    /// `q [G, side², d]` → scores against each key row and each key column, both `[G, side², side]`.
    fn position_scores(&self, q: &Tensor) -> Result<(Tensor, Tensor)> {
        let (groups, tokens, dim) = q.dims3()?;
        let side = self.side;
        let q = q.reshape((groups, side, side, dim))?;
        // `axis`: of (row, column), the one that is compared; it becomes the batch of the product.
        let along = |table: &Tensor, axis: usize| {
            let order = if axis == 1 { [1, 0, 2, 3] } else { [2, 0, 1, 3] };
            let back = if axis == 1 { [1, 0, 2, 3] } else { [1, 2, 0, 3] };
            let table = table.index_select(&self.offsets, 0)?.reshape((side, side, dim))?;
            let q = q.permute(order)?.contiguous()?.reshape((side, groups * side, dim))?;
            let scores = q.matmul(&table.transpose(1, 2)?.contiguous()?)?;
            let scores = scores.reshape((side, groups, side, side))?.permute(back)?.contiguous()?;
            Ok::<_, Error>(scores.reshape((groups, tokens, side))?)
        };
        Ok((along(&self.rel_pos_h, 1)?, along(&self.rel_pos_w, 2)?))
    }
}

/// softmax(`q [G, L, c]` · `k [G, L, c]`ᵀ) · `v [G, L, d]` → `[G, L, d]`.
///
/// Without gradients the scores are made in blocks of at most `at_once`; with gradients all of them are
/// kept for the backward pass anyway.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, at_once: usize) -> Result<Tensor> {
    let plain = |q: &Tensor, k: &Tensor, v: &Tensor| {
        let scores = q.matmul(&k.transpose(1, 2)?)?;
        Ok::<_, Error>(softmax_last_dim(&scores)?.matmul(v)?)
    };
    let (groups, tokens, _) = q.dims3()?;
    if q.track_op() || k.track_op() || v.track_op() || groups * tokens * tokens <= at_once {
        return plain(q, k, v);
    }
    let groups_at_once = (at_once / (tokens * tokens)).clamp(1, groups);
    let rows_at_once = (at_once / tokens).clamp(1, tokens);
    let starts: Vec<(usize, usize)> = (0..groups)
        .step_by(groups_at_once)
        .flat_map(|group| (0..tokens).step_by(rows_at_once).map(move |row| (group, row)))
        .collect();
    let parts = starts
        .into_par_iter()
        .map(|(group, row)| {
            let count = groups_at_once.min(groups - group);
            let part = |x: &Tensor| x.narrow(0, group, count);
            let rows = part(q)?.narrow(1, row, rows_at_once.min(tokens - row))?.contiguous()?;
            let y = plain(&rows, &part(k)?, &part(v)?)?;
            // Either whole groups or rows of one group: both are runs of consecutive rows.
            Ok::<_, Error>(y.flatten(0, 1)?)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?.reshape(v.dims())?)
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
    use candle_core::{Device, Var};

    fn ramp(shape: &[usize], step: usize) -> Result<Tensor> {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|i| ((i * step) % 97) as f32 / 48.0 - 1.0).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    #[test]
    fn attention_in_blocks_equals_attention_at_once() -> Result<()> {
        let (q, k, v) = (ramp(&[6, 10, 5], 31)?, ramp(&[6, 10, 5], 17)?, ramp(&[6, 10, 3], 41)?);
        let whole = attend(&q, &k, &v, usize::MAX)?;
        let tracked = attend(Var::from_tensor(&q)?.as_tensor(), &k, &v, 1)?;
        // Rows of one group, several groups with a remainder, fewer scores than one row.
        for at_once in [30, 400, 7] {
            for other in [&attend(&q, &k, &v, at_once)?, &tracked] {
                let difference = (&whole - other)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                assert!(difference < 1e-6, "blocks of {at_once}: {difference}");
            }
        }
        Ok(())
    }

    #[test]
    fn windows_are_padded_split_and_joined_again() -> Result<()> {
        let x = ramp(&[2, 5, 5, 3], 13)?;
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
