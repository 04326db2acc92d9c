//! Products with frozen weights on the processor, by `flmm_kernels`: bf16 without widening the weights, and
//! weights of eight bits.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use flmm_kernels::{Int8Weight, Sizes, linear_bf16};
use half::bf16;

use super::host::{Elements, elements_as, frozen_bf16};

/// `x [rows, in] · weightᵀ + bias` in one step, where there is one: bf16 on the CPU, without a gradient.
///
/// The sum is rounded once, after the addition, as the reference's fused product does.
pub(crate) fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    if !frozen_bf16(&[x, weight, bias.unwrap_or(weight)]) {
        return Ok(None);
    }
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let op = FrozenLinear { biased: bias.is_some() };
    let bias = match bias {
        Some(bias) => bias.contiguous()?,
        None => weight.clone(),
    };
    Ok(Some(x.apply_op3_no_bwd(&weight, &bias, &op)?))
}

/// As [`frozen_linear`], with a weight of eight bits; `x` may have any floating type, in which the result is given.
pub(crate) fn int8_linear(x: &Tensor, weight: &Int8Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let bias = bias.map(|bias| bias.to_dtype(DType::BF16)).transpose()?;
    let narrow = x.to_dtype(DType::BF16)?.contiguous()?;
    let (numbers, bias) = (Elements::of(&narrow), bias.as_ref().map(Elements::of));
    let bias = bias.as_ref().map(|bias| bias.get_as()).transpose()?;
    if x.dim(1)? != weight.inputs() || bias.is_some_and(|bias: &[bf16]| bias.len() != weight.outputs()) {
        bail!("a product of {:?} and eight-bit [{}, {}]", x.dims(), weight.outputs(), weight.inputs());
    }
    let mut y = vec![bf16::ZERO; rows * weight.outputs()];
    weight.multiply(numbers.get_as()?, bias, &mut y);
    Tensor::from_vec(y, (rows, weight.outputs()), x.device())?.to_dtype(x.dtype())
}

struct FrozenLinear {
    /// Without a bias the third tensor is not looked at.
    biased: bool,
}

impl CustomOp3 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((rows, inputs), (outputs, expected)) =
            (x_layout.shape().dims2()?, weight_layout.shape().dims2()?);
        if inputs != expected || self.biased && bias_layout.dims() != [outputs] {
            let bias = if self.biased { bias_layout.dims() } else { &[outputs] };
            bail!("a product of [{rows}, {inputs}] and [{outputs}, {expected}] with a bias {bias:?}");
        }
        let bias = if self.biased { Some(elements_as(bias, bias_layout)?) } else { None };
        let mut y = vec![bf16::ZERO; rows * outputs];
        let sizes = Sizes { rows, inputs, outputs };
        linear_bf16(elements_as(x, x_layout)?, elements_as(weight, weight_layout)?, bias, sizes, &mut y);
        Ok((CpuStorage::BF16(y), Shape::from((rows, outputs))))
    }
}
