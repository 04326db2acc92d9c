//! A 3×3 convolution of enlarged maps that does not enlarge them.
//!
//! Bilinear enlarging works within channels, the convolution's sum over channels within pixels, and both are linear. So
//! the sum is taken first, at the maps' own size and for each of the nine taps; what is enlarged is one map for every
//! output and tap, and a shift by a tap is another row of the matrix that enlarges. For 1,024 maps of 24 × 24 on
//! 64 × 64 that is a seventh of the multiplications, forward and backward, and no enlarged copy of the maps exists.

use candle_core::{DType, Result as CandleResult, Tensor};

use super::conv3x3::conv3x3;
use super::linear::Linear;
use super::resize::{Taps, bilinear_scaled};
use crate::error::Result;

/// Maps `[n, in, h, w]` that stand for themselves enlarged by `factor` ([`bilinear_scaled`]) and continued with zeros to
/// the right and below, up to `size` (height, width).
#[derive(Debug, Clone)]
pub(crate) struct Enlarged {
    pub(crate) maps: Tensor,
    pub(crate) factor: f64,
    pub(crate) size: (usize, usize),
}

impl Enlarged {
    /// `[n, in, height, width]`
    pub(crate) fn written_out(&self) -> Result<Tensor> {
        let x = bilinear_scaled(&self.maps, self.factor)?;
        let (_, _, h, w) = x.dims4()?;
        Ok(x.pad_with_zeros(2, 0, self.size.0 - h)?.pad_with_zeros(3, 0, self.size.1 - w)?)
    }

    /// The convolution with `weight [out, in, 3, 3]`, zero padding 1: `[n, out, height, width]`.
    pub(crate) fn conv3x3(&self, weight: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = self.maps.dims4()?;
        // With less to gain the rearranging would cost more than it saves; reduced types would round more often.
        let worthwhile = 2 * h * w <= self.size.0 * self.size.1;
        if worthwhile && self.maps.dtype() == DType::F32 {
            self.unenlarged(weight)
        } else {
            Ok(conv3x3(&self.written_out()?, weight)?)
        }
    }

    fn unenlarged(&self, weight: &Tensor) -> Result<Tensor> {
        let (n, inputs, h, w) = self.maps.dims4()?;
        let (outputs, ..) = weight.dims4()?;
        let (height, width) = self.size;
        let pixels = self.maps.reshape((n, inputs, h * w))?.transpose(1, 2)?;
        let kernel = weight.permute([0, 2, 3, 1])?.reshape((outputs * 9, inputs))?;
        // [n, h, w, output, tap's row, tap's column]
        let sums = Linear::new(kernel, None).forward(&pixels)?.reshape(&[n, h, w, outputs, 3, 3])?;
        let sums = sums.permute([0, 3, 4, 1, 5, 2])?.reshape((n * outputs, 3 * h, 3 * w))?;
        let wide = Linear::new(self.shifted(w, width)?, None).forward(&sums)?;
        let tall = Linear::new(self.shifted(h, height)?, None).forward(&wide.transpose(1, 2)?)?;
        Ok(tall.transpose(1, 2)?.reshape((n, outputs, height, width))?)
    }

    /// `[output, 3 · input]`: for each of three taps the matrix that enlarges a side, shifted by the tap.
    fn shifted(&self, input: usize, output: usize) -> CandleResult<Tensor> {
        let taps = Taps::by_factor(input, self.factor);
        let mut matrix = vec![0f32; output * 3 * input];
        for (to, row) in matrix.chunks_exact_mut(3 * input).enumerate() {
            for (tap, row) in row.chunks_exact_mut(input).enumerate() {
                // The first tap sees the pixel before; beyond both ends everything is zero.
                if let Some(from) = (to + tap).checked_sub(1).filter(|from| *from < taps.output()) {
                    taps.add_weights(from, row);
                }
            }
        }
        Tensor::from_vec(matrix, (output, 3 * input), self.maps.device())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    /// Square, oblong, padded on both sides, a single pixel, a factor that cuts off part of a pixel.
    const CASES: [([usize; 4], f64, (usize, usize)); 5] = [
        ([2, 5, 6, 6], 64.0 / 24.0, (16, 16)),
        ([1, 3, 4, 7], 64.0 / 7.0, (40, 64)),
        ([2, 4, 5, 3], 2.3, (16, 8)),
        ([1, 2, 1, 1], 4.0, (8, 8)),
        ([1, 3, 3, 5], 2.0, (6, 10)),
    ];

    #[test]
    fn equals_the_convolution_of_the_written_out_maps_with_gradients() {
        for (shape, factor, size) in CASES {
            let maps = Var::from_tensor(&random(&shape, 1)).unwrap();
            let weight = Var::from_tensor(&random(&[7, shape[1], 3, 3], 2)).unwrap();
            let mix = random(&[shape[0], 7, size.0, size.1], 3);
            let enlarged = Enlarged { maps: maps.as_tensor().clone(), factor, size };
            let run = |y: Tensor| {
                let grads = (&y * &mix).unwrap().sum_all().unwrap().backward().unwrap();
                [y, grads.get(&maps).unwrap().clone(), grads.get(&weight).unwrap().clone()]
            };
            let plain = run(conv3x3(&enlarged.written_out().unwrap(), &weight).unwrap());
            let short = run(enlarged.unenlarged(&weight).unwrap());
            for (short, plain) in short.iter().zip(&plain) {
                assert_close(short, plain, 1e-4);
            }
        }
    }

    #[test]
    fn gradients() {
        let inputs = [random(&[2, 3, 2, 3], 5), random(&[4, 3, 3, 3], 6)];
        check(&inputs, |t| Enlarged { maps: t[0].clone(), factor: 2.5, size: (8, 8) }.unenlarged(&t[1]));
    }
}
