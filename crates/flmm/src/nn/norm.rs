//! Layer and root-mean-square normalisation with gradients, fused on the CPU.

use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, D, DType, Layout, Result as CandleResult, Shape, Tensor,
};
use flmm_kernels::{layer_norm_bf16, layer_norm_f32, rms_norm_bf16, rms_norm_f32};

use super::host::{Elements, elements, frozen_bf16, fusable, with_bf16};
use crate::error::Result;
use crate::weights::Params;

/// Layer normalisation over the last axis: `(x − mean) / √(var + eps) · weight + bias`.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight [size]` and `bias [size]`.
    pub fn load(size: usize, eps: f64, params: &Params) -> Result<Self> {
        Ok(Self { weight: params.get(&[size], "weight")?, bias: params.get(&[size], "bias")?, eps })
    }

    /// `x [.., size]` → same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// Layer normalisation over the last axis, computed in f32 and returned in the type of `x`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if fusable(&[x, weight, bias]) {
        let op = FusedLayerNorm { eps: eps as f32 };
        return Ok(x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)?);
    }
    let fits = x.dims().ends_with(weight.dims()) && bias.dims() == weight.dims();
    if fits && frozen_bf16(&[x, weight, bias]) {
        let (weight, bias) = (Elements::of(weight), Elements::of(bias));
        return Ok(with_bf16(x, |x, y| {
            layer_norm_bf16(x, weight.get_as()?, bias.get_as()?, eps as f32, y);
            Ok(())
        })?);
    }
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    let weight = weight.to_dtype(DType::F32)?;
    let bias = bias.to_dtype(DType::F32)?;
    Ok(normed.broadcast_mul(&weight)?.broadcast_add(&bias)?.to_dtype(dtype)?)
}

/// Root-mean-square normalisation over the last axis as Llama does it: normalised in f32, cast to the type of
/// `x`, then multiplied by `weight` in that type (`spec/pipeline.md` §2.1 rule 5).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if fusable(&[x, weight]) {
        return Ok(x.contiguous()?.apply_op2(&weight.contiguous()?, FusedRmsNorm { eps: eps as f32 })?);
    }
    if frozen_bf16(&[x, weight]) && x.dims().ends_with(weight.dims()) {
        let weight = Elements::of(weight);
        return Ok(with_bf16(x, |x, y| {
            rms_norm_bf16(x, weight.get_as()?, eps as f32, y);
            Ok(())
        })?);
    }
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = x.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(dtype)?;
    Ok(normed.broadcast_mul(weight)?)
}

struct FusedLayerNorm {
    eps: f32,
}

impl FusedLayerNorm {
    /// Mean and reciprocal standard deviation of one row.
    fn statistics(&self, row: &[f32]) -> (f32, f32) {
        let n = row.len() as f32;
        let mean = row.iter().sum::<f32>() / n;
        let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }
}

impl CustomOp3 for FusedLayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (x, weight) = (elements(x, x_layout)?, elements(weight, weight_layout)?);
        let bias = elements(bias, bias_layout)?;
        let mut out = vec![0f32; x.len()];
        layer_norm_f32(x, weight, bias, self.eps, &mut out);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let size = weight.elem_count();
        let mut dx = vec![0f32; x.elem_count()];
        let (mut dw, mut db) = (vec![0f32; size], vec![0f32; size]);
        let mut normed = vec![0f32; size];
        let grad = grad.contiguous()?;
        let (x_elements, weights, grads) = (Elements::of(x), Elements::of(weight), Elements::of(&grad));
        let (values, weights, grads) = (x_elements.get()?, weights.get()?, grads.get()?);
        let rows = dx.chunks_exact_mut(size).zip(values.chunks_exact(size)).zip(grads.chunks_exact(size));
        for ((dx, row), grad) in rows {
            let (mean, scale) = self.statistics(row);
            let (mut sum, mut dot) = (0f32, 0f32);
            for i in 0..size {
                normed[i] = (row[i] - mean) * scale;
                dw[i] += grad[i] * normed[i];
                db[i] += grad[i];
                sum += grad[i] * weights[i];
                dot += grad[i] * weights[i] * normed[i];
            }
            let (sum, dot) = (sum / size as f32, dot / size as f32);
            for i in 0..size {
                dx[i] = scale * (grad[i] * weights[i] - sum - normed[i] * dot);
            }
        }
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), device)?),
            Some(Tensor::from_vec(dw, size, device)?),
            Some(Tensor::from_vec(db, size, device)?),
        ))
    }
}

struct FusedRmsNorm {
    eps: f32,
}

impl FusedRmsNorm {
    /// Reciprocal root mean square of one row.
    fn scale(&self, row: &[f32]) -> f32 {
        let square = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
        1.0 / (square + self.eps).sqrt()
    }
}

impl CustomOp2 for FusedRmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (x, weight) = (elements(x, x_layout)?, elements(weight, weight_layout)?);
        let mut out = vec![0f32; x.len()];
        rms_norm_f32(x, weight, self.eps, &mut out);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let size = weight.elem_count();
        let mut dx = vec![0f32; x.elem_count()];
        let mut dw = vec![0f32; size];
        let grad = grad.contiguous()?;
        let (x_elements, weights, grads) = (Elements::of(x), Elements::of(weight), Elements::of(&grad));
        let (values, weights, grads) = (x_elements.get()?, weights.get()?, grads.get()?);
        let rows = dx.chunks_exact_mut(size).zip(values.chunks_exact(size)).zip(grads.chunks_exact(size));
        for ((dx, row), grad) in rows {
            let scale = self.scale(row);
            let mut dot = 0f32;
            for i in 0..size {
                dw[i] += grad[i] * row[i] * scale;
                dot += grad[i] * weights[i] * row[i];
            }
            let dot = dot * scale * scale / size as f32;
            for i in 0..size {
                dx[i] = scale * (grad[i] * weights[i] - row[i] * dot);
            }
        }
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dw, size, x.device())?),
        ))
    }
}
