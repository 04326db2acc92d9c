//! Layer and root-mean-square normalisation with gradients.

use candle_core::{D, DType, Tensor};

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
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let variance = x.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = x.broadcast_div(&(variance + eps)?.sqrt()?)?.to_dtype(dtype)?;
    Ok(normed.broadcast_mul(weight)?)
}
