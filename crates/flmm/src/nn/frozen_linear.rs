//! Products with frozen weights on the processor, by `flmm_kernels`: bf16 without widening the weights.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use flmm_kernels::{Sizes, linear_bf16};
use half::bf16;

/// `x [rows, in] · weightᵀ + bias` in one step, where there is one: bf16 on the CPU, without a gradient.
///
/// The sum is rounded once, after the addition, as the reference's fused product does.
pub(crate) fn frozen_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let all = [Some(x), Some(weight), bias];
    let plain = |t: &Tensor| t.device().is_cpu() && t.dtype() == DType::BF16 && !t.track_op();
    if !all.into_iter().flatten().all(plain) {
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
        let bias = if self.biased { Some(numbers(bias, bias_layout)?) } else { None };
        let mut y = vec![bf16::ZERO; rows * outputs];
        let sizes = Sizes { rows, inputs, outputs };
        linear_bf16(numbers(x, x_layout)?, numbers(weight, weight_layout)?, bias, sizes, &mut y);
        Ok((CpuStorage::BF16(y), Shape::from((rows, outputs))))
    }
}

/// The elements of a contiguous bf16 storage, in order.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [bf16]> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    Ok(&storage.as_slice::<bf16>()?[start..end])
}
