//! 2-D convolutions with gradients.
//!
//! candle's own convolution backward runs a transposed convolution kernel that is several times slower than a
//! matrix product. Here 1×1 and patchify are one, and 3×3 with stride 1 has kernels of its own
//! (see `conv_kernels.rs`).

use candle_core::Tensor;

use super::conv3x3::conv3x3;
use super::enlarged::Enlarged;
use crate::error::{Error, Result};
use crate::weights::Params;

/// A convolution of one of four kinds: 1×1, 3×3 with padding 1 and stride 1 or 2, or k×k with stride k.
#[derive(Debug, Clone)]
pub struct Conv2d {
    /// `[out, in, k, k]`
    weight: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Pointwise,
    Same3x3,
    Halve3x3,
    Patchify(usize),
}

impl Conv2d {
    /// Reads `weight [outputs, inputs, kernel, kernel]` and, if `bias`, `bias [outputs]`.
    ///
    /// `(kernel, stride)` must be `(1, 1)`, `(3, 1)` or `(3, 2)` (zero padding 1) or `(k, k)` (no padding); anything else
    /// is a bug in the caller and gives [`Error::Request`].
    pub fn load(
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        bias: bool,
        params: &Params,
    ) -> Result<Self> {
        let kind = Kind::of(kernel, stride)?;
        let weight = params.get(&[outputs, inputs, kernel, kernel], "weight")?;
        let bias = if bias { Some(params.get(&[outputs], "bias")?) } else { None };
        Ok(Self { weight, bias, kind })
    }

    /// From tensors already at hand: `weight [out, in, k, k]`, `bias [out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, stride: usize) -> Result<Self> {
        let (_, _, kernel, _) = weight.dims4()?;
        Ok(Self { kind: Kind::of(kernel, stride)?, weight, bias })
    }

    /// `x [n, in, h, w]` → `[n, out, h, w]`, `[n, out, ⌈h / 2⌉, ⌈w / 2⌉]` for 3×3 with stride 2, or
    /// `[n, out, h / k, w / k]` with stride k (which must divide).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match self.kind {
            Kind::Pointwise => pointwise(x, &self.weight)?,
            Kind::Same3x3 => conv3x3(x, &self.weight)?,
            Kind::Halve3x3 => halve3x3(x, &self.weight)?,
            Kind::Patchify(k) => patchify(x, &self.weight, k)?,
        };
        add_bias(y, self.bias.as_ref())
    }

    /// [`Conv2d::forward`] of the enlarged maps, which 3×3 with stride 1 does without writing them out.
    pub(crate) fn forward_enlarged(&self, x: &Enlarged) -> Result<Tensor> {
        match self.kind {
            Kind::Same3x3 => add_bias(x.conv3x3(&self.weight)?, self.bias.as_ref()),
            _ => self.forward(&x.written_out()?),
        }
    }
}

impl Kind {
    fn of(kernel: usize, stride: usize) -> Result<Self> {
        match (kernel, stride) {
            (1, 1) => Ok(Self::Pointwise),
            (3, 1) => Ok(Self::Same3x3),
            (3, 2) => Ok(Self::Halve3x3),
            (k, s) if k == s && k > 0 => Ok(Self::Patchify(k)),
            _ => Err(Error::request(
                format!("no {kernel}×{kernel} convolution with stride {stride}"),
                "flmm has 1×1, 3×3 with stride 1 or 2, and k×k with stride k",
            )),
        }
    }
}

fn add_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?),
        None => Ok(y),
    }
}

/// `weight [out, in, 1, 1]` as a matrix times the pixels of every image.
fn pointwise(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, inputs, h, w) = x.dims4()?;
    let (outputs, ..) = weight.dims4()?;
    let pixels = x.reshape((n, inputs, h * w))?;
    let y = weight.reshape((1, outputs, inputs))?.broadcast_matmul(&pixels)?;
    Ok(y.reshape((n, outputs, h, w))?)
}

/// 3×3, stride 2, zero padding 1: rows and columns are split into even and odd ones, so that every tap is a slice.
fn halve3x3(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, inputs, h, w) = x.dims4()?;
    let (outputs, ..) = weight.dims4()?;
    let (height, width) = (h.div_ceil(2), w.div_ceil(2));
    let x = x.pad_with_zeros(2, 1, 2 * height + 1 - h)?.pad_with_zeros(3, 1, 2 * width + 1 - w)?;
    let x = x.reshape(&[n, inputs, height + 1, 2, width + 1, 2])?;
    let mut taps = Vec::with_capacity(9);
    for (dy, dx) in (0..3).flat_map(|dy| (0..3).map(move |dx| (dy, dx))) {
        let rows = x.narrow(2, dy / 2, height)?.narrow(3, dy % 2, 1)?;
        let tap = rows.narrow(4, dx / 2, width)?.narrow(5, dx % 2, 1)?;
        taps.push(tap.reshape((n, inputs, height * width))?);
    }
    let columns = Tensor::stack(&taps, 2)?.reshape((n, inputs * 9, height * width))?;
    let y = weight.reshape((1, outputs, inputs * 9))?.broadcast_matmul(&columns)?;
    Ok(y.reshape((n, outputs, height, width))?)
}

fn patchify(x: &Tensor, weight: &Tensor, k: usize) -> Result<Tensor> {
    let (n, inputs, h, w) = x.dims4()?;
    let (outputs, ..) = weight.dims4()?;
    let (gh, gw) = (h / k, w / k);
    let patches = x
        .reshape(&[n, inputs, gh, k, gw, k])?
        .permute([0, 2, 4, 1, 3, 5])?
        .reshape((n * gh * gw, inputs * k * k))?;
    let y = patches.matmul(&weight.reshape((outputs, inputs * k * k))?.t()?)?;
    Ok(y.reshape((n, gh * gw, outputs))?.transpose(1, 2)?.reshape((n, outputs, gh, gw))?)
}

/// A transposed convolution 2×2 with stride 2: every input pixel becomes a 2×2 block.
#[derive(Debug, Clone)]
pub struct ConvTranspose2d {
    /// `[in, out, 2, 2]`
    weight: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
}

impl ConvTranspose2d {
    /// Reads `weight [inputs, outputs, 2, 2]` and, if `bias`, `bias [outputs]`.
    pub fn load(inputs: usize, outputs: usize, bias: bool, params: &Params) -> Result<Self> {
        let weight = params.get(&[inputs, outputs, 2, 2], "weight")?;
        let bias = if bias { Some(params.get(&[outputs], "bias")?) } else { None };
        Ok(Self { weight, bias })
    }

    /// From tensors already at hand: `weight [in, out, 2, 2]`, `bias [out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// `x [n, in, h, w]` → `[n, out, 2 · h, 2 · w]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (n, inputs, h, w) = x.dims4()?;
        let (_, outputs, ..) = self.weight.dims4()?;
        let matrix = self.weight.reshape((inputs, outputs * 4))?.t()?.unsqueeze(0)?;
        let y = matrix.broadcast_matmul(&x.reshape((n, inputs, h * w))?)?;
        let y = y.reshape(&[n, outputs, 2, 2, h, w])?.permute([0, 1, 4, 2, 5, 3])?.reshape((
            n,
            outputs,
            2 * h,
            2 * w,
        ))?;
        add_bias(y, self.bias.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    /// Straight from the definition, one output pixel at a time.
    fn naive(x: &Tensor, weight: &Tensor, stride: usize, pad: usize) -> Tensor {
        x.conv2d(weight, pad, stride, 1, 1).unwrap()
    }

    #[test]
    fn all_kinds_equal_the_definition() {
        for (k, stride, pad) in [(1, 1, 0), (3, 1, 1), (2, 2, 0), (4, 4, 0)] {
            let x = random(&[2, 5, 8, 12], 1);
            let weight = random(&[7, 5, k, k], 2);
            let conv = Conv2d::new(weight.clone(), None, stride).unwrap();
            assert_close(&conv.forward(&x).unwrap(), &naive(&x, &weight, stride, pad), 1e-5);
        }
        for shape in [[2, 5, 8, 12], [1, 5, 7, 5], [1, 5, 1, 2]] {
            let (x, weight) = (random(&shape, 1), random(&[7, 5, 3, 3], 2));
            let conv = Conv2d::new(weight.clone(), None, 2).unwrap();
            assert_close(&conv.forward(&x).unwrap(), &naive(&x, &weight, 2, 1), 1e-5);
        }
        assert!(Conv2d::new(random(&[7, 5, 5, 5], 2), None, 1).is_err());
    }

    #[test]
    fn strips_do_not_change_the_3x3_result() {
        // Enough columns that several strips are cut, and a map too small for one strip.
        for shape in [[3, 40, 33, 29], [5, 16, 2, 3], [1, 3, 1, 1]] {
            let x = random(&shape, 3);
            let weight = random(&[6, shape[1], 3, 3], 4);
            let conv = Conv2d::new(weight.clone(), None, 1).unwrap();
            assert_close(&conv.forward(&x).unwrap(), &naive(&x, &weight, 1, 1), 5e-5);
        }
    }

    #[test]
    fn gradients() {
        for (k, stride) in [(1, 1), (3, 1), (3, 2), (2, 2)] {
            let inputs = [random(&[2, 3, 4, 6], 5), random(&[4, 3, k, k], 6), random(&[4], 7)];
            check(&inputs, |t| Conv2d::new(t[1].clone(), Some(t[2].clone()), stride)?.forward(&t[0]));
        }
        let inputs = [random(&[2, 3, 2, 3], 8), random(&[3, 4, 2, 2], 9), random(&[4], 10)];
        check(&inputs, |t| ConvTranspose2d::new(t[1].clone(), Some(t[2].clone())).forward(&t[0]));
    }

    #[test]
    fn transposed_equals_the_definition() {
        let x = random(&[2, 5, 4, 3], 1);
        let weight = random(&[5, 7, 2, 2], 2);
        let expected = x.conv_transpose2d(&weight, 0, 0, 2, 1).unwrap();
        let y = ConvTranspose2d::new(weight, None).forward(&x).unwrap();
        assert_close(&y, &expected, 1e-5);
    }
}
