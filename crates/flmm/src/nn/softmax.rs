//! Softmax with a gradient, plain and under an attention mask, fused on the CPU.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, D, DType, Layout, Result as CandleResult, Shape, Tensor};

use super::activation::exp;
use super::host::{Elements, elements, fusable};
use crate::error::Result;

/// Softmax over the last axis, computed in f32 and returned in the type of `x`.
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    if fusable(&[x]) {
        return Ok(x.contiguous()?.apply_op1(FusedSoftmax { scale: 1.0, mask: None })?);
    }
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let exp = shifted.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.to_dtype(dtype)?)
}

/// Which keys each query sees when several conversations share one prefix.
///
/// Row `i` of sample `b` sees keys `0..prefix` and `starts[b · S + i] ..= i`, both cut at `i`: causal
/// attention in which the conversations behind the prefix do not see one another.
#[derive(Debug, Clone)]
pub struct PackedMask {
    /// Tokens every row may see (those before it).
    pub prefix: usize,
    /// For each sample and row (`[B · S]`), the first token of the conversation the row belongs to.
    pub starts: Vec<u32>,
}

/// `softmax(scale · scores)` of `scores [B, H, S, S]` (f32, CPU) over the keys that `mask` allows.
pub fn packed_softmax(scores: &Tensor, scale: f32, mask: &Arc<PackedMask>) -> Result<Tensor> {
    let (batch, _, rows, keys) = scores.dims4()?;
    if rows != keys || mask.starts.len() != batch * rows {
        let what = format!("scores {:?} do not fit a mask of {} rows", scores.dims(), mask.starts.len());
        return Err(candle_core::Error::Msg(what).into());
    }
    Ok(scores.contiguous()?.apply_op1(FusedSoftmax { scale, mask: Some(mask.clone()) })?)
}

struct FusedSoftmax {
    scale: f32,
    mask: Option<Arc<PackedMask>>,
}

impl FusedSoftmax {
    /// The two key ranges that row `index` of `[B, H, S, S]` sees.
    fn spans(&self, index: usize, heads: usize, keys: usize) -> [std::ops::Range<usize>; 2] {
        let Some(mask) = &self.mask else { return [0..keys, keys..keys] };
        let (sample, row) = (index / (heads * keys), index % keys);
        let start = (mask.starts[sample * keys + row] as usize).max(mask.prefix);
        [0..mask.prefix.min(row + 1), start.min(row + 1)..row + 1]
    }

    fn heads(dims: &[usize]) -> usize {
        if dims.len() == 4 { dims[1] } else { 1 }
    }
}

impl CustomOp1 for FusedSoftmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let x = elements(x, layout)?;
        let keys = layout.dims().last().copied().unwrap_or(1);
        let heads = Self::heads(layout.dims());
        let mut out = vec![0f32; x.len()];
        for (index, (out, row)) in out.chunks_exact_mut(keys).zip(x.chunks_exact(keys)).enumerate() {
            let spans = self.spans(index, heads, keys);
            let mut max = f32::NEG_INFINITY;
            for span in spans.clone() {
                max = row[span].iter().fold(max, |m, v| m.max(*v));
            }
            let shift = max * self.scale;
            let mut sum = 0f32;
            for span in spans.clone() {
                for (out, v) in out[span.clone()].iter_mut().zip(&row[span.clone()]) {
                    *out = exp(v * self.scale - shift);
                }
                sum += out[span].iter().sum::<f32>();
            }
            let norm = 1.0 / sum;
            for span in spans {
                out[span].iter_mut().for_each(|v| *v *= norm);
            }
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, probs: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let keys = x.dims().last().copied().unwrap_or(1);
        let heads = Self::heads(x.dims());
        let mut dx = vec![0f32; x.elem_count()];
        let grad = grad.contiguous()?;
        let (probs, grads) = (Elements::of(probs), Elements::of(&grad));
        let (probs, grads) = (probs.get()?, grads.get()?);
        let rows = dx.chunks_exact_mut(keys).zip(probs.chunks_exact(keys)).zip(grads.chunks_exact(keys));
        for (index, ((dx, p), g)) in rows.enumerate() {
            let spans = self.spans(index, heads, keys);
            let mut dot = 0f32;
            for span in spans.clone() {
                dot += p[span.clone()].iter().zip(&g[span]).map(|(p, g)| p * g).sum::<f32>();
            }
            for span in spans {
                let (p, g) = (&p[span.clone()], &g[span.clone()]);
                for ((dx, p), g) in dx[span].iter_mut().zip(p).zip(g) {
                    *dx = self.scale * p * (g - dot);
                }
            }
        }
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
