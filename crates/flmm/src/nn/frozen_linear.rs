//! Products with frozen weights on the processor, by `flmm_kernels`: bf16 without widening the weights.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use flmm_kernels::{Sizes, linear_bf16};
use half::bf16;

use super::host::{elements_as, frozen_bf16};

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
        let ((rows, inputs), (outputs, expected)) = (x_layout.shape().dims2()?, weight_layout.shape().dims2()?);
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
