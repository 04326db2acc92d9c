//! A branch joins its stream.

use candle_core::Tensor;
use flmm_kernels::add_bf16;

use super::host::zip_bf16;
use crate::error::Result;

/// `x + branch`, of the same shape and type, rounded once.
///
/// candle's own bf16 addition calls a function for every eight numbers, which made it a quarter of the time of reading a
/// prompt.
pub fn residual(x: &Tensor, branch: &Tensor) -> Result<Tensor> {
    Ok(match zip_bf16(x, branch, add_bf16)? {
        Some(sum) => sum,
        None => (x + branch)?,
    })
}
