//! The sum with a constant as one operation: candle's own would also make a gradient for the constant.

use candle_core::{CpuStorage, CustomOp2, Layout, Result as CandleResult, Shape, Tensor, bail};

use super::host::{elements, fusable};
use crate::error::Result;

/// `x [n, ...] + constant [1, ...]`, where `constant` needs no gradient.
pub fn add_constant(x: &Tensor, constant: &Tensor) -> Result<Tensor> {
    if fusable(&[x, constant]) && !constant.track_op() {
        return Ok(x.contiguous()?.apply_op2(&constant.contiguous()?, AddConstant)?);
    }
    Ok(x.broadcast_add(constant)?)
}

struct AddConstant;

impl CustomOp2 for AddConstant {
    fn name(&self) -> &'static str {
        "add-constant"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        constant: &CpuStorage,
        lc: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        if lx.dims().get(1..) != lc.dims().get(1..) || lc.dims().first() != Some(&1) {
            bail!("{:?} and a constant {:?}", lx.dims(), lc.dims());
        }
        let (x, constant) = (elements(x, lx)?, elements(constant, lc)?);
        let rows = x.chunks_exact(constant.len().max(1));
        let y: Vec<f32> = rows.flat_map(|x| x.iter().zip(constant).map(|(x, c)| x + c)).collect();
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    #[test]
    fn equals_the_broadcast_sum_with_its_gradient() {
        let (x, constant) = (random(&[3, 4, 5], 1), random(&[1, 4, 5], 2));
        let y = add_constant(&x, &constant).unwrap();
        assert_close(&y, &x.broadcast_add(&constant).unwrap(), 0.0);
        check(&[x], |t| add_constant(&t[0], &constant));
        assert!(add_constant(&random(&[3, 2, 5], 1), &constant).is_err());
    }
}
