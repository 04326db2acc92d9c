//! Softmax cross-entropy over a vocabulary, fused with its gradient.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result as CandleResult, Shape, Tensor};

use super::activation::exp;
use super::host::{Elements, elements};
use crate::error::Result;

/// The mean over rows of `−log softmax(logits)[target]`, a scalar; `logits [rows, classes]` (f32, CPU).
///
/// A weight per row (`None`: all 1) scales its term; the mean divides by the sum of the weights.
pub fn cross_entropy(logits: &Tensor, targets: Vec<u32>, weights: Option<Vec<f32>>) -> Result<Tensor> {
    let (rows, classes) = logits.dims2()?;
    let weights = weights.unwrap_or_else(|| vec![1.0; rows]);
    let fits = targets.len() == rows && weights.len() == rows;
    if !fits || targets.iter().any(|target| *target as usize >= classes) {
        let what = format!("{} targets do not fit logits {:?}", targets.len(), logits.dims());
        return Err(candle_core::Error::Msg(what).into());
    }
    let total = weights.iter().sum::<f32>().max(f32::MIN_POSITIVE);
    Ok(logits.contiguous()?.apply_op1(CrossEntropy { targets: Arc::new(targets), weights, total })?)
}

struct CrossEntropy {
    targets: Arc<Vec<u32>>,
    weights: Vec<f32>,
    total: f32,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (_, classes) = layout.shape().dims2()?;
        let logits = elements(logits, layout)?;
        let mut loss = 0f64;
        for ((row, target), weight) in logits.chunks_exact(classes).zip(&*self.targets).zip(&self.weights) {
            let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
            let sum: f32 = row.iter().map(|v| exp(v - max)).sum();
            loss += f64::from(weight * (sum.ln() + max - row[*target as usize]));
        }
        Ok((CpuStorage::F32(vec![(loss / f64::from(self.total)) as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let (_, classes) = logits.dims2()?;
        let grad = grad.to_scalar::<f32>()?;
        let mut out = vec![0f32; logits.elem_count()];
        let elements = Elements::of(logits);
        let found = elements.get()?;
        let rows = out.chunks_exact_mut(classes).zip(found.chunks_exact(classes));
        for (((out, row), target), weight) in rows.zip(&*self.targets).zip(&self.weights) {
            let max = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
            for (out, v) in out.iter_mut().zip(row) {
                *out = exp(v - max);
            }
            let scale = grad * weight / self.total;
            let norm = scale / out.iter().sum::<f32>();
            out.iter_mut().for_each(|v| *v *= norm);
            out[*target as usize] -= scale;
        }
        Ok(Some(Tensor::from_vec(out, logits.shape(), logits.device())?))
    }
}
