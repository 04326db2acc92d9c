//! The gate of a SwiGLU feed-forward layer, fused with its gradient.

use candle_core::{CpuStorage, CustomOp2, Layout, Result as CandleResult, Shape, Tensor};
use flmm_kernels::silu_mul_bf16;

use super::activation::{exp, silu};
use super::host::{Elements, elements, fusable, zip_bf16};
use crate::error::Result;

/// `silu(gate) · up`, element by element. Of reduced types the first product is evaluated in f32 and rounded before the
/// second.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if fusable(&[gate, up]) {
        return Ok(gate.contiguous()?.apply_op2(&up.contiguous()?, SiluMul)?);
    }
    Ok(match zip_bf16(gate, up, silu_mul_bf16)? {
        Some(gated) => gated,
        None => (silu(gate)? * up)?,
    })
}

struct SiluMul;

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (gate, up) = (elements(gate, gate_layout)?, elements(up, up_layout)?);
        let out = gate.iter().zip(up).map(|(g, u)| g / (1.0 + exp(-g)) * u).collect();
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let mut d_gate = vec![0f32; gate.elem_count()];
        let mut d_up = vec![0f32; gate.elem_count()];
        let grad = grad.contiguous()?;
        let (gates, ups, grads) = (Elements::of(gate), Elements::of(up), Elements::of(&grad));
        let (gates, ups, grads) = (gates.get()?, ups.get()?, grads.get()?);
        for i in 0..gates.len() {
            let sigmoid = 1.0 / (1.0 + exp(-gates[i]));
            let silu = gates[i] * sigmoid;
            d_gate[i] = grads[i] * ups[i] * (sigmoid + silu * (1.0 - sigmoid));
            d_up[i] = grads[i] * silu;
        }
        let shape = gate.shape();
        Ok((
            Some(Tensor::from_vec(d_gate, shape, gate.device())?),
            Some(Tensor::from_vec(d_up, shape, gate.device())?),
        ))
    }
}
