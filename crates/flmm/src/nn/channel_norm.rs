//! Normalisation of `[n, channels, h, w]` maps: over whole images (group norm with one group) and over the
//! channels of every pixel (SAM's `LayerNorm2d`). Fused forward and backward on the CPU.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result as CandleResult, Shape, Tensor, bail};
use rayon::prelude::*;

use super::host::{Elements, elements, fusable};
use crate::error::Result;
use crate::weights::Params;

/// Group normalisation with one group: every image of the batch is normalised over (channels, h, w), then
/// scaled and shifted per channel.
#[derive(Debug, Clone)]
pub struct GroupNorm1 {
    affine: Affine,
}

/// Layer normalisation over the channels of every pixel of `[n, channels, h, w]`.
#[derive(Debug, Clone)]
pub struct LayerNorm2d {
    affine: Affine,
}

#[derive(Debug, Clone)]
struct Affine {
    /// `[channels]`
    weight: Tensor,
    /// `[channels]`
    bias: Tensor,
    eps: f64,
}

impl Affine {
    fn load(channels: usize, eps: f64, params: &Params) -> Result<Self> {
        let (weight, bias) = (params.get(&[channels], "weight")?, params.get(&[channels], "bias")?);
        Ok(Self { weight, bias, eps })
    }

    fn apply(&self, x: &Tensor, over: Over, relu: bool) -> Result<Tensor> {
        if fusable(&[x, &self.weight, &self.bias]) {
            let op = Norm { over, eps: self.eps as f32, relu };
            return Ok(x.contiguous()?.apply_op3(
                &self.weight.contiguous()?,
                &self.bias.contiguous()?,
                op,
            )?);
        }
        let y = self.composed(x, over)?;
        if relu { Ok(y.relu()?) } else { Ok(y) }
    }

    /// The same from candle's operations, computed in f32 and returned in the type of `x`.
    fn composed(&self, x: &Tensor, over: Over) -> Result<Tensor> {
        let (n, channels, h, w) = x.dims4()?;
        let affine = |t: &Tensor| t.to_dtype(DType::F32)?.reshape((1, channels, 1, 1));
        let wide = x.to_dtype(DType::F32)?;
        let normed = match over {
            Over::Image => normalise(&wide.reshape((n, channels * h * w))?, self.eps, D::Minus1)?,
            Over::Pixel => normalise(&wide.reshape((n, channels, h * w))?, self.eps, D::Minus2)?,
        };
        let normed = normed.reshape((n, channels, h, w))?;
        let y = normed.broadcast_mul(&affine(&self.weight)?)?.broadcast_add(&affine(&self.bias)?)?;
        Ok(y.to_dtype(x.dtype())?)
    }
}

fn normalise(x: &Tensor, eps: f64, dim: D) -> CandleResult<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(dim)?)?;
    let variance = centred.sqr()?.mean_keepdim(dim)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)
}

impl GroupNorm1 {
    /// Reads `weight [channels]` and `bias [channels]`.
    pub fn load(channels: usize, eps: f64, params: &Params) -> Result<Self> {
        Ok(Self { affine: Affine::load(channels, eps, params)? })
    }

    /// From tensors already at hand, both `[channels]`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { affine: Affine { weight, bias, eps } }
    }

    /// `x [n, channels, h, w]` → same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.affine.apply(x, Over::Image, false)
    }

    /// `relu(forward(x))` in one pass.
    pub fn forward_relu(&self, x: &Tensor) -> Result<Tensor> {
        self.affine.apply(x, Over::Image, true)
    }
}

impl LayerNorm2d {
    /// Reads `weight [channels]` and `bias [channels]`.
    pub fn load(channels: usize, eps: f64, params: &Params) -> Result<Self> {
        Ok(Self { affine: Affine::load(channels, eps, params)? })
    }

    /// From tensors already at hand, both `[channels]`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { affine: Affine { weight, bias, eps } }
    }

    /// `x [n, channels, h, w]` → same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.affine.apply(x, Over::Pixel, false)
    }
}

/// What one mean and variance are taken over.
#[derive(Debug, Clone, Copy)]
enum Over {
    Image,
    Pixel,
}

struct Norm {
    over: Over,
    eps: f32,
    relu: bool,
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "channel_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        bias: &CpuStorage,
        lb: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let size = Size::new(lx.dims())?;
        let (x, weight, bias) = (elements(x, lx)?, elements(weight, lw)?, elements(bias, lb)?);
        if weight.len() != size.channels || bias.len() != size.channels {
            bail!("norm over {} channels with {} weights", size.channels, weight.len());
        }
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(size.image().max(1)).zip(x.par_chunks(size.image().max(1))).for_each(|(y, x)| {
            match self.over {
                Over::Image => {
                    let (mean, rstd) = moments(x, self.eps);
                    for (c, (y, x)) in planes(y, x, size.pixels).enumerate() {
                        let scale = rstd * weight[c];
                        let (w, b) = (scale, bias[c] - mean * scale);
                        y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * w + b);
                    }
                }
                Over::Pixel => {
                    let stats = PixelMoments::new(x, size.pixels, self.eps);
                    for (c, (y, x)) in planes(y, x, size.pixels).enumerate() {
                        for (p, y) in y.iter_mut().enumerate() {
                            *y = (x[p] - stats.mean[p]) * stats.rstd[p] * weight[c] + bias[c];
                        }
                    }
                }
            }
            if self.relu {
                y.iter_mut().for_each(|y| *y = y.max(0.0));
            }
        });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let size = Size::new(x.dims())?;
        let grad = grad.contiguous()?;
        let handles = [Elements::of(x), Elements::of(weight), Elements::of(y), Elements::of(&grad)];
        let (xs, weights) = (handles[0].get()?, handles[1].get()?);
        let (ys, grads) = (handles[2].get()?, handles[3].get()?);
        let image = size.image().max(1);
        let mut dx = vec![0f32; xs.len()];
        let sums: Vec<(Vec<f32>, Vec<f32>)> = dx
            .par_chunks_mut(image)
            .enumerate()
            .map(|(n, dx)| {
                let part = n * image..(n + 1) * image;
                // `dx` first holds the gradient behind the ReLU, then is turned into the result in place.
                dx.copy_from_slice(&grads[part.clone()]);
                if self.relu {
                    dx.iter_mut().zip(&ys[part.clone()]).for_each(|(g, &y)| {
                        if y <= 0.0 {
                            *g = 0.0;
                        }
                    });
                }
                match self.over {
                    Over::Image => image_backward(&xs[part], weights, dx, size.pixels, self.eps),
                    Over::Pixel => pixel_backward(&xs[part], weights, dx, size.pixels, self.eps),
                }
            })
            .collect();
        let (mut dw, mut db) = (vec![0f32; size.channels], vec![0f32; size.channels]);
        for (w, b) in &sums {
            dw.iter_mut().zip(w).for_each(|(sum, term)| *sum += term);
            db.iter_mut().zip(b).for_each(|(sum, term)| *sum += term);
        }
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.dims(), device)?),
            Some(Tensor::from_vec(dw, size.channels, device)?),
            Some(Tensor::from_vec(db, size.channels, device)?),
        ))
    }
}

#[derive(Clone, Copy)]
struct Size {
    channels: usize,
    pixels: usize,
}

impl Size {
    fn new(dims: &[usize]) -> CandleResult<Self> {
        match *dims {
            [_, channels, h, w] => Ok(Self { channels, pixels: h * w }),
            _ => bail!("expected [n, channels, h, w], found {dims:?}"),
        }
    }

    fn image(&self) -> usize {
        self.channels * self.pixels
    }
}

fn planes<'a>(
    y: &'a mut [f32],
    x: &'a [f32],
    pixels: usize,
) -> impl Iterator<Item = (&'a mut [f32], &'a [f32])> {
    y.chunks_mut(pixels.max(1)).zip(x.chunks(pixels.max(1)))
}

/// `Σ f(x)`: sixteen partial sums (one vector register) within a block, blocks in f64.
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    x.chunks(4096)
        .map(|block| {
            let mut lanes = [0f32; 16];
            let chunks = block.chunks_exact(16);
            let rest: f32 = chunks.remainder().iter().map(|&x| f(x)).sum();
            for chunk in chunks {
                lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane += f(x));
            }
            f64::from(lanes.iter().sum::<f32>() + rest)
        })
        .sum()
}

/// `Σ a · (b − mean)` likewise.
fn dot(a: &[f32], b: &[f32], mean: f32) -> f64 {
    let mut total = 0f64;
    for (a, b) in a.chunks(4096).zip(b.chunks(4096)) {
        let mut lanes = [0f32; 16];
        let (left, right) = (a.chunks_exact(16), b.chunks_exact(16));
        let rest: f32 = left.remainder().iter().zip(right.remainder()).map(|(&a, &b)| a * (b - mean)).sum();
        for (a, b) in left.zip(right) {
            for lane in 0..16 {
                lanes[lane] += a[lane] * (b[lane] - mean);
            }
        }
        total += f64::from(lanes.iter().sum::<f32>() + rest);
    }
    total
}

/// Mean and `1 / √(variance + eps)` of all values.
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let count = x.len() as f64;
    let mean = (sum(x, |x| x) / count) as f32;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / count;
    (mean, (1.0 / (variance + f64::from(eps)).sqrt()) as f32)
}

/// Turns `dx` from the output's gradient into the input's; returns the gradients of weight and bias.
fn image_backward(
    x: &[f32],
    weight: &[f32],
    dx: &mut [f32],
    pixels: usize,
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let (mean, rstd) = moments(x, eps);
    let (mut dw, mut db) = (Vec::new(), Vec::new());
    let (mut mean_g, mut mean_gx) = (0f64, 0f64);
    for (c, (g, x)) in planes(dx, x, pixels).enumerate() {
        let (g_sum, gx_sum) = (sum(g, |g| g), dot(g, x, mean) * f64::from(rstd));
        mean_g += g_sum * f64::from(weight[c]);
        mean_gx += gx_sum * f64::from(weight[c]);
        dw.push(gx_sum as f32);
        db.push(g_sum as f32);
    }
    let count = x.len() as f64;
    // dx = rstd · (g·w − mean(g·w) − x̂ · mean(g·w·x̂)) with x̂ = (x − mean) · rstd, as g·a + x·b + c.
    let b = -(rstd * rstd) * (mean_gx / count) as f32;
    let c0 = -rstd * (mean_g / count) as f32 - mean * b;
    for (c, (g, x)) in planes(dx, x, pixels).enumerate() {
        let a = rstd * weight[c];
        g.iter_mut().zip(x).for_each(|(g, &x)| *g = *g * a + x * b + c0);
    }
    (dw, db)
}

struct PixelMoments {
    mean: Vec<f32>,
    rstd: Vec<f32>,
}

impl PixelMoments {
    fn new(x: &[f32], pixels: usize, eps: f32) -> Self {
        let scale = pixels as f32 / x.len() as f32;
        let (mut mean, mut rstd) = (vec![0f32; pixels], vec![0f32; pixels]);
        for plane in x.chunks(pixels.max(1)) {
            mean.iter_mut().zip(plane).for_each(|(mean, &x)| *mean += x);
        }
        mean.iter_mut().for_each(|mean| *mean *= scale);
        for plane in x.chunks(pixels.max(1)) {
            for (p, square) in rstd.iter_mut().enumerate() {
                let centred = plane[p] - mean[p];
                *square += centred * centred;
            }
        }
        rstd.iter_mut().for_each(|square| *square = 1.0 / (*square * scale + eps).sqrt());
        Self { mean, rstd }
    }
}

fn pixel_backward(
    x: &[f32],
    weight: &[f32],
    dx: &mut [f32],
    pixels: usize,
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let PixelMoments { mean, rstd } = PixelMoments::new(x, pixels, eps);
    let (mut dw, mut db) = (Vec::new(), Vec::new());
    let (mut mean_g, mut mean_gx) = (vec![0f32; pixels], vec![0f32; pixels]);
    for (c, (g, x)) in planes(dx, x, pixels).enumerate() {
        let mut gx_sum = 0f64;
        for p in 0..pixels {
            let gx = g[p] * (x[p] - mean[p]) * rstd[p];
            gx_sum += f64::from(gx);
            mean_g[p] += g[p] * weight[c];
            mean_gx[p] += gx * weight[c];
        }
        dw.push(gx_sum as f32);
        db.push(sum(g, |g| g) as f32);
    }
    let scale = pixels as f32 / x.len() as f32;
    for (c, (g, x)) in planes(dx, x, pixels).enumerate() {
        for p in 0..pixels {
            let normed = (x[p] - mean[p]) * rstd[p];
            g[p] = rstd[p] * (g[p] * weight[c] - mean_g[p] * scale - normed * mean_gx[p] * scale);
        }
    }
    (dw, db)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    fn affine(channels: usize) -> Affine {
        Affine { weight: random(&[channels], 21), bias: random(&[channels], 22), eps: 1e-5 }
    }

    #[test]
    fn fused_equals_composed() {
        let x = (random(&[3, 7, 9, 11], 20) * 3.0).unwrap();
        for over in [Over::Image, Over::Pixel] {
            let expected = affine(7).composed(&x, over).unwrap();
            assert_close(&affine(7).apply(&x, over, false).unwrap(), &expected, 5e-6);
            let expected = expected.relu().unwrap();
            assert_close(&affine(7).apply(&x, over, true).unwrap(), &expected, 5e-6);
        }
    }

    #[test]
    fn a_small_variance_feels_the_epsilon() {
        // Real attention maps have values of 1e-3: variance 1e-6 against eps 1e-5.
        let x = (random(&[2, 4, 5, 5], 23) * 1e-3).unwrap();
        let expected = affine(4).composed(&x, Over::Image).unwrap();
        assert_close(&affine(4).apply(&x, Over::Image, false).unwrap(), &expected, 1e-6);
    }

    #[test]
    fn gradients() {
        let inputs = [random(&[2, 3, 3, 4], 30), random(&[3], 31), random(&[3], 32)];
        check(&inputs, |t| GroupNorm1::new(t[1].clone(), t[2].clone(), 1e-5).forward(&t[0]));
        check(&inputs, |t| LayerNorm2d::new(t[1].clone(), t[2].clone(), 1e-6).forward(&t[0]));
        // A bias of ±3 keeps every value away from the kink of the ReLU.
        let far = [
            inputs[0].clone(),
            (&inputs[1] * 0.5).unwrap(),
            Tensor::new(&[3f32, -3., 3.], x_device()).unwrap(),
        ];
        check(&far, |t| GroupNorm1::new(t[1].clone(), t[2].clone(), 1e-5).forward_relu(&t[0]));
    }

    fn x_device() -> &'static candle_core::Device {
        &candle_core::Device::Cpu
    }
}
