//! Softmax with a gradient, fused on the CPU.

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result as CandleResult, Shape, Tensor};

use super::activation::exp;
use super::host::{Elements, elements, fusable};
use crate::error::Result;

/// Softmax over the last axis, computed in f32 and returned in the type of `x`.
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    if fusable(&[x]) {
        return Ok(x.contiguous()?.apply_op1(FusedSoftmax)?);
    }
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let exp = shifted.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.to_dtype(dtype)?)
}

struct FusedSoftmax;

impl CustomOp1 for FusedSoftmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let x = elements(x, layout)?;
        let width = layout.dims().last().copied().unwrap_or(1);
        let mut out = vec![0f32; x.len()];
        for (out, row) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
            for (out, v) in out.iter_mut().zip(row) {
                *out = exp(v - max);
            }
            let norm = 1.0 / out.iter().sum::<f32>();
            out.iter_mut().for_each(|v| *v *= norm);
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, probs: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let width = x.dims().last().copied().unwrap_or(1);
        let mut dx = vec![0f32; x.elem_count()];
        let grad = grad.contiguous()?;
        let (probs, grads) = (Elements::of(probs), Elements::of(&grad));
        let (probs, grads) = (probs.get()?, grads.get()?);
        let rows = dx.chunks_exact_mut(width).zip(probs.chunks_exact(width)).zip(grads.chunks_exact(width));
        for ((dx, p), g) in rows {
            let dot = p.iter().zip(g).map(|(p, g)| p * g).sum::<f32>();
            for ((dx, p), g) in dx.iter_mut().zip(p).zip(g) {
                *dx = p * (g - dot);
            }
        }
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
