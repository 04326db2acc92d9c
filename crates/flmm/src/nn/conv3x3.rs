//! The 3×3 convolution as one operation with its backward pass; the arithmetic is in `conv_kernels.rs`.
//!
//! Nothing is kept for the backward pass. The gradient of `x` is the same convolution of the output's gradient with
//! the flipped, transposed kernel.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::conv_kernels::{Packed, Padded, convolve, weight_gradient};
use super::host::{Elements, elements, fusable};

/// Padded copies of pictures that exist at one time hold about this many numbers (64 MiB).
const PADDED_AT_ONCE: usize = 16 << 20;

/// `x [n, in, h, w]`, `weight [out, in, 3, 3]` → `[n, out, h, w]`, stride 1, zero padding 1.
pub(crate) fn conv3x3(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if fusable(&[x, weight]) {
        // A constant input (the first layer's) needs no gradient, which saves a third of its backward pass.
        let op = Conv3x3 { input_gradient: x.track_op(), weight_gradient: weight.track_op() };
        x.contiguous()?.apply_op2(&weight.contiguous()?, op)
    } else {
        composed(x, weight)
    }
}

/// The same from candle's operations, for other devices and types.
fn composed(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, inputs, h, w) = x.dims4()?;
    let (outputs, ..) = weight.dims4()?;
    let padded = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
    let mut shifted = Vec::with_capacity(9);
    for dy in 0..3 {
        for dx in 0..3 {
            shifted.push(padded.narrow(2, dy, h)?.narrow(3, dx, w)?);
        }
    }
    let columns = Tensor::stack(&shifted, 2)?.reshape((n, inputs * 9, h * w))?;
    let y = weight.reshape((1, outputs, inputs * 9))?.broadcast_matmul(&columns)?;
    y.reshape((n, outputs, h, w))
}

struct Conv3x3 {
    input_gradient: bool,
    weight_gradient: bool,
}

impl CustomOp2 for Conv3x3 {
    fn name(&self) -> &'static str {
        "conv3x3"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        k: &CpuStorage,
        lk: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let batch = Batch::new(lx.dims())?;
        let (outputs, inputs, ..) = lk.shape().dims4()?;
        if inputs != batch.channels {
            bail!("conv3x3: {} input channels, the weight expects {inputs}", batch.channels);
        }
        let k = elements(k, lk)?;
        let kernel = Packed::new(outputs, inputs, |o, i, tap| k[(o * inputs + i) * 9 + tap]);
        let y = convolve(elements(x, lx)?, batch.dims(), &kernel);
        Ok((CpuStorage::F32(y), Shape::from((batch.n, outputs, batch.h, batch.w))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        k: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x, grad) = (x.contiguous()?, grad.contiguous()?);
        let (x_elements, grad_elements) = (Elements::of(&x), Elements::of(&grad));
        let (outputs, inputs, ..) = k.dims4()?;
        let dk = if self.weight_gradient {
            let dk = Batch::new(x.dims())?.weight_gradient(x_elements.get()?, grad_elements.get()?, outputs);
            Some(Tensor::from_vec(dk, k.dims(), k.device())?)
        } else {
            None
        };
        let dx = if self.input_gradient {
            let k = k.contiguous()?;
            let k = Elements::of(&k);
            let k = k.get()?;
            let kernel = Packed::new(inputs, outputs, |i, o, tap| k[(o * inputs + i) * 9 + 8 - tap]);
            let dx = convolve(grad_elements.get()?, Batch::new(grad.dims())?.dims(), &kernel);
            Some(Tensor::from_vec(dx, x.dims(), x.device())?)
        } else {
            None
        };
        Ok((dx, dk))
    }
}

/// The geometry of a batch of maps `[n, channels, h, w]`.
struct Batch {
    n: usize,
    channels: usize,
    h: usize,
    w: usize,
}

impl Batch {
    fn new(dims: &[usize]) -> Result<Self> {
        match *dims {
            [n, channels, h, w] => Ok(Self { n, channels, h, w }),
            _ => bail!("conv3x3 expects [n, channels, h, w], found {dims:?}"),
        }
    }

    fn dims(&self) -> [usize; 4] {
        [self.n, self.channels, self.h, self.w]
    }

    /// The gradient `[outputs, channels, 3, 3]` given the output's gradient `[n, outputs, h, w]`.
    fn weight_gradient(&self, x: &[f32], grad: &[f32], outputs: usize) -> Vec<f32> {
        let (plane, size) = (self.h * self.w, self.channels * self.h * self.w);
        let mut sum = vec![0f32; outputs * self.channels * 9];
        if size == 0 || outputs == 0 {
            return sum;
        }
        let at_once = (PADDED_AT_ONCE / size).max(1);
        for (x, grad) in x.chunks(at_once * size).zip(grad.chunks(at_once * outputs * plane)) {
            let pictures: Vec<(Padded, &[f32])> = x
                .chunks_exact(size)
                .zip(grad.chunks_exact(outputs * plane))
                .map(|(x, grad)| (Padded::new(x, self.channels, self.h, self.w), grad))
                .collect();
            weight_gradient(&pictures, outputs, &mut sum);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::nn::gradcheck::{assert_close, random};

    /// Sides that fill vectors, that leave every kind of rest, and the smallest ones.
    #[test]
    fn fused_equals_composed_with_gradients() {
        for shape in
            [[3, 37, 19, 23], [2, 5, 64, 64], [5, 16, 8, 8], [2, 3, 1, 1], [1, 7, 2, 131], [1, 1, 33, 3]]
        {
            for outputs in [1, 6, 11] {
                let x = Var::from_tensor(&random(&shape, 1)).unwrap();
                let k = Var::from_tensor(&random(&[outputs, shape[1], 3, 3], 2)).unwrap();
                let mix = random(&[shape[0], outputs, shape[2], shape[3]], 3);
                let run = |f: fn(&Tensor, &Tensor) -> Result<Tensor>| {
                    let y = f(&x, &k).unwrap();
                    let grads = (&y * &mix).unwrap().sum_all().unwrap().backward().unwrap();
                    (y, grads.get(&x).unwrap().clone(), grads.get(&k).unwrap().clone())
                };
                let (fused, reference) = (run(conv3x3), run(composed));
                assert_close(&fused.0, &reference.0, 3e-5);
                assert_close(&fused.1, &reference.1, 3e-5);
                assert_close(&fused.2, &reference.2, 3e-4);
            }
        }
    }
}
