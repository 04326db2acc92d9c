//! Softmax with a gradient.

use candle_core::{D, DType, Tensor};

use crate::error::Result;

/// Softmax over the last axis, computed in f32 and returned in the type of `x`.
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(DType::F32)?;
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let exp = shifted.exp()?;
    Ok(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.to_dtype(dtype)?)
}
