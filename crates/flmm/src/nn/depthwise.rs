//! Depthwise convolution of channels-last maps: every channel has a kernel of its own (ConvNeXt).
//!
//! candle's grouped convolution runs one convolution per channel. Here the channels of a pixel lie side by side, so
//! that one tap is one multiply-add of two rows of numbers.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result as CandleResult, Shape, Tensor, bail};
use rayon::prelude::*;

use super::host::{Elements, elements};
use crate::error::Result;
use crate::weights::Params;

/// A depthwise k×k convolution, k odd, with stride 1 and zero padding k / 2.
#[derive(Debug, Clone)]
pub struct DepthwiseConv2d {
    /// `[channels, 1, k, k]`
    weight: Tensor,
    /// `[channels]`
    bias: Tensor,
}

impl DepthwiseConv2d {
    /// Reads `weight [channels, 1, kernel, kernel]` and `bias [channels]`.
    pub fn load(channels: usize, kernel: usize, params: &Params) -> Result<Self> {
        let weight = params.get(&[channels, 1, kernel, kernel], "weight")?;
        Ok(Self { weight, bias: params.get(&[channels], "bias")? })
    }

    /// From tensors already at hand: `weight [channels, 1, k, k]` with k odd, `bias [channels]`.
    pub fn new(weight: Tensor, bias: Tensor) -> Self {
        Self { weight, bias }
    }

    /// `x [h, w, channels]` → same shape. Computed in f32 and rounded once to the type of `x`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = |x: &Tensor| x.to_dtype(DType::F32);
        let (x32, weight) = (wide(x)?, wide(&self.weight)?);
        let y = if x.device().is_cpu() {
            let (channels, _, kernel, _) = weight.dims4()?;
            let taps = weight.reshape((channels, kernel * kernel))?.t()?.contiguous()?;
            x32.contiguous()?.apply_op2(&taps, Depthwise { kernel })?
        } else {
            composed(&x32, &weight)?
        };
        Ok(y.broadcast_add(&wide(&self.bias)?)?.to_dtype(x.dtype())?)
    }
}

/// The same by candle's grouped convolution, for other devices.
fn composed(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (channels, _, kernel, _) = weight.dims4()?;
    let maps = x.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()?;
    Ok(maps.conv2d(weight, kernel / 2, 1, 1, channels)?.squeeze(0)?.permute((1, 2, 0))?.contiguous()?)
}

/// `x [h, w, c]` and taps `[k², c]` → `[h, w, c]`.
struct Depthwise {
    kernel: usize,
}

/// Sizes of a map, and which pixels a kernel reaches from one pixel.
#[derive(Clone, Copy)]
struct Sizes {
    height: usize,
    width: usize,
    channels: usize,
    kernel: usize,
}

impl Sizes {
    fn new(x: &[usize], taps: &[usize], kernel: usize) -> CandleResult<Self> {
        match (x, taps) {
            (&[height, width, channels], &[count, of])
                if kernel % 2 == 1 && count == kernel * kernel && of == channels && channels > 0 =>
            {
                Ok(Self { height, width, channels, kernel })
            }
            _ => bail!("depthwise expects [h, w, c] and [k², c] with k odd, found {x:?} and {taps:?}"),
        }
    }

    /// Calls `f(tap, pixel)` for every tap of the kernel centred on `(y, x)` that lies inside the map.
    fn reach(&self, y: usize, x: usize, mut f: impl FnMut(usize, usize)) {
        let (k, pad) = (self.kernel, self.kernel / 2);
        for i in pad.saturating_sub(y)..k.min(self.height + pad - y) {
            for j in pad.saturating_sub(x)..k.min(self.width + pad - x) {
                f(i * k + j, (y + i - pad) * self.width + x + j - pad);
            }
        }
    }
}

impl CustomOp2 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise-conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        taps: &CpuStorage,
        taps_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let sizes = Sizes::new(x_layout.dims(), taps_layout.dims(), self.kernel)?;
        let (x, taps, c) = (elements(x, x_layout)?, elements(taps, taps_layout)?, sizes.channels);
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut((sizes.width * c).max(1)).enumerate().for_each(|(row, out)| {
            for (column, out) in out.chunks_exact_mut(c).enumerate() {
                sizes.reach(row, column, |tap, pixel| {
                    let (x, weight) = (&x[pixel * c..][..c], &taps[tap * c..][..c]);
                    out.iter_mut().zip(x).zip(weight).for_each(|((out, x), weight)| *out += x * weight);
                });
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        taps: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let sizes = Sizes::new(x.dims(), taps.dims(), self.kernel)?;
        let grad = grad.contiguous()?;
        let (x_elements, grad_elements, c) = (Elements::of(x), Elements::of(&grad), sizes.channels);
        let (values, grads) = (x_elements.get()?, grad_elements.get()?);
        let mut d_taps = vec![0f32; taps.elem_count()];
        for (at, grad) in grads.chunks_exact(c).enumerate() {
            sizes.reach(at / sizes.width, at % sizes.width, |tap, pixel| {
                let (x, d_tap) = (&values[pixel * c..][..c], &mut d_taps[tap * c..][..c]);
                d_tap.iter_mut().zip(x).zip(grad).for_each(|((d, x), grad)| *d += x * grad);
            });
        }
        // What a pixel gives to others by a tap comes back by the tap on the other side of the centre.
        let count = (self.kernel * self.kernel) as u32;
        let mirror = Tensor::from_iter((0..count).rev(), taps.device())?;
        let mirrored = taps.index_select(&mirror, 0)?.detach();
        let dx = grad.detach().apply_op2(&mirrored, Self { kernel: self.kernel })?;
        Ok((Some(dx), Some(Tensor::from_vec(d_taps, taps.dims(), taps.device())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    #[test]
    fn equals_the_grouped_convolution() {
        // Maps larger and smaller than the kernel.
        for (shape, kernel) in [([9, 11, 5], 7), ([2, 3, 4], 7), ([1, 1, 3], 3), ([6, 4, 19], 1)] {
            let x = random(&shape, 1);
            let (weight, bias) = (random(&[shape[2], 1, kernel, kernel], 2), random(&[shape[2]], 3));
            let expected = composed(&x, &weight).unwrap().broadcast_add(&bias).unwrap();
            let conv = DepthwiseConv2d::new(weight, bias);
            assert_close(&conv.forward(&x).unwrap(), &expected, 2e-6);
            let half = conv.forward(&x.to_dtype(DType::BF16).unwrap()).unwrap();
            assert_eq!(half.dtype(), DType::BF16);
            assert_close(&half.to_dtype(DType::F32).unwrap(), &expected, 0.1);
        }
    }

    #[test]
    fn an_even_kernel_is_refused() {
        let conv = DepthwiseConv2d::new(random(&[3, 1, 2, 2], 1), random(&[3], 2));
        assert!(conv.forward(&random(&[4, 4, 3], 3)).is_err());
    }

    #[test]
    fn gradients() {
        let inputs = [random(&[4, 5, 3], 4), random(&[3, 1, 3, 3], 5), random(&[3], 6)];
        check(&inputs, |t| DepthwiseConv2d::new(t[1].clone(), t[2].clone()).forward(&t[0]));
    }
}
