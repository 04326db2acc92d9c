//! Rotary position embedding ("rotate half") with a gradient, fused with the split into heads.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result as CandleResult, Shape, Tensor};

use super::host::{Elements, elements};
use crate::error::Result;

/// `cos` and `sin` per position: `[positions, head_dim / 2]` each, flattened.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RotaryTable {
    /// Angles for positions `0..positions` with frequencies `theta^(−2i / head_dim)`.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let mut table = Self { cos: Vec::new(), sin: Vec::new(), half };
        for position in 0..positions {
            for i in 0..half {
                let frequency = 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32);
                let angle = position as f32 * frequency;
                table.cos.push(angle.cos());
                table.sin.push(angle.sin());
            }
        }
        table
    }
}

/// Splits `x [B, S, H · d]` (f32, CPU) into heads `[B, H, S, d]`, rotated to `positions [B · S]`.
pub fn rotary_heads(
    x: &Tensor,
    heads: usize,
    positions: &Arc<Vec<u32>>,
    table: &Arc<RotaryTable>,
) -> Result<Tensor> {
    let op = Rotary { heads, positions: positions.clone(), table: table.clone() };
    Ok(x.contiguous()?.apply_op1(op)?)
}

struct Rotary {
    heads: usize,
    positions: Arc<Vec<u32>>,
    table: Arc<RotaryTable>,
}

impl Rotary {
    /// Calls `f(offset in [B, S, H·d], offset in [B, H, S, d], cos, sin)` for every token and head.
    fn for_each(&self, batch: usize, seq: usize, mut f: impl FnMut(usize, usize, &[f32], &[f32])) {
        let half = self.table.half;
        for b in 0..batch {
            for s in 0..seq {
                let at = self.positions[b * seq + s] as usize * half;
                let (cos, sin) = (&self.table.cos[at..at + half], &self.table.sin[at..at + half]);
                for h in 0..self.heads {
                    let merged = ((b * seq + s) * self.heads + h) * 2 * half;
                    let split = ((b * self.heads + h) * seq + s) * 2 * half;
                    f(merged, split, cos, sin);
                }
            }
        }
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        "rotary-heads"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (batch, seq, _) = layout.shape().dims3()?;
        let (x, half) = (elements(x, layout)?, self.table.half);
        let mut out = vec![0f32; x.len()];
        self.for_each(batch, seq, |merged, split, cos, sin| {
            let (a, b) = x[merged..merged + 2 * half].split_at(half);
            let (out_a, out_b) = out[split..split + 2 * half].split_at_mut(half);
            for i in 0..half {
                out_a[i] = a[i] * cos[i] - b[i] * sin[i];
                out_b[i] = b[i] * cos[i] + a[i] * sin[i];
            }
        });
        Ok((CpuStorage::F32(out), (batch, self.heads, seq, 2 * half).into()))
    }

    fn bwd(&self, x: &Tensor, _result: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let (batch, seq, _) = x.dims3()?;
        let half = self.table.half;
        let mut dx = vec![0f32; x.elem_count()];
        let grad = grad.contiguous()?;
        let grads = Elements::of(&grad);
        let grad = grads.get()?;
        self.for_each(batch, seq, |merged, split, cos, sin| {
            let (a, b) = grad[split..split + 2 * half].split_at(half);
            let (dx_a, dx_b) = dx[merged..merged + 2 * half].split_at_mut(half);
            for i in 0..half {
                dx_a[i] = a[i] * cos[i] + b[i] * sin[i];
                dx_b[i] = b[i] * cos[i] - a[i] * sin[i];
            }
        });
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
