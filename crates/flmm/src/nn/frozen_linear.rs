//! Products with frozen weights on the processor, by `flmm_kernels`: bf16 without widening the weights, and
//! weights of eight and four bits.

use candle_core::{DType, Result, Tensor, bail};
use flmm_kernels::{Sizes, linear_bf16};
use half::bf16;

use super::host::{Elements, frozen_bf16};
use crate::weights::Packed;

/// `x [rows, in] · weightᵀ + bias` in one step, where there is one: bf16 on the CPU, without a gradient.
///
/// The sum is rounded once, after the addition, as the reference's fused product does.
pub(crate) fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    if !frozen_bf16(&[x, weight, bias.unwrap_or(weight)]) {
        return Ok(None);
    }
    let ((rows, inputs), (outputs, expected)) = (x.dims2()?, weight.dims2()?);
    if inputs != expected || bias.is_some_and(|bias| bias.dims() != [outputs]) {
        let bias = bias.map(Tensor::dims);
        bail!("a product of [{rows}, {inputs}] and [{outputs}, {expected}] with a bias {bias:?}");
    }
    let (flat, matrix) = (x.contiguous()?, weight.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let (numbers, weights, bias) =
        (Elements::of(&flat), Elements::of(&matrix), bias.as_ref().map(Elements::of));
    let bias = bias.as_ref().map(|bias| bias.get_as()).transpose()?;
    let mut y = bytemuck::zeroed_vec(rows * outputs);
    linear_bf16(numbers.get_as()?, weights.get_as()?, bias, Sizes { rows, inputs, outputs }, &mut y);
    Tensor::from_vec(y, (rows, outputs), x.device()).map(Some)
}

/// `x [n, rows, in] · yᵀ` for `y [n, columns, in]`, whose matrices may lie apart: `[n, rows, columns]`, where
/// [`frozen_linear`] computes it.
pub(crate) fn frozen_products(x: &Tensor, y: &Tensor) -> Result<Option<Tensor>> {
    if !frozen_bf16(&[x, y]) || x.elem_count() == 0 || y.elem_count() == 0 {
        return Ok(None);
    }
    let ((count, rows, inputs), (_, outputs, _)) = (x.dims3()?, y.dims3()?);
    if y.dims() != [count, outputs, inputs] {
        bail!("products of {:?} and {:?}", x.dims(), y.dims());
    }
    let x = x.contiguous()?;
    let y = if y.stride()[1..] == [inputs, 1] { y.clone() } else { y.contiguous()? };
    let (left, right) = (Elements::of(&x), Elements::of(&y));
    let (right, stride) = right.heads()?;
    let mut out = bytemuck::zeroed_vec(count * rows * outputs);
    let matrices = out.chunks_exact_mut(rows * outputs).zip(left.get_as()?.chunks_exact(rows * inputs));
    for (n, (out, left)) in matrices.enumerate() {
        let right = &right[n * stride..][..outputs * inputs];
        linear_bf16(left, right, None, Sizes { rows, inputs, outputs }, out);
    }
    Tensor::from_vec(out, (count, rows, outputs), x.device()).map(Some)
}

/// As [`frozen_linear`], with a weight of few bits; `x` may have any floating type, in which the result is given, but
/// no gradient: there is none to give it.
pub(crate) fn packed_linear(x: &Tensor, weight: &Packed, bias: Option<&Tensor>) -> Result<Tensor> {
    if x.track_op() || bias.is_some_and(Tensor::track_op) {
        bail!("a product with a packed weight has no gradient");
    }
    let rows = x.dim(0)?;
    let bias = bias.map(|bias| bias.to_dtype(DType::BF16)).transpose()?;
    let narrow = x.to_dtype(DType::BF16)?.contiguous()?;
    let (numbers, bias) = (Elements::of(&narrow), bias.as_ref().map(Elements::of));
    let bias = bias.as_ref().map(|bias| bias.get_as()).transpose()?;
    if x.dim(1)? != weight.inputs() || bias.is_some_and(|bias: &[bf16]| bias.len() != weight.outputs()) {
        bail!("a product of {:?} and packed [{}, {}]", x.dims(), weight.outputs(), weight.inputs());
    }
    let mut y = bytemuck::zeroed_vec(rows * weight.outputs());
    weight.multiply(numbers.get_as()?, bias, &mut y);
    Tensor::from_vec(y, (rows, weight.outputs()), x.device())?.to_dtype(x.dtype())
}
