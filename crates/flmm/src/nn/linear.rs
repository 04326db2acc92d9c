//! Affine maps.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::weights::Params;

/// `y = x · weightᵀ + bias`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`
    weight: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight [outputs, inputs]` and, if `bias`, `bias [outputs]`.
    pub fn load(inputs: usize, outputs: usize, bias: bool, params: &Params) -> Result<Self> {
        let weight = params.get(&[outputs, inputs], "weight")?;
        let bias = if bias { Some(params.get(&[outputs], "bias")?) } else { None };
        Ok(Self { weight, bias })
    }

    /// From tensors already at hand: `weight [out, in]`, `bias [out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// `x [.., in]` → `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = self.weight.dims2()?;
        let mut dims = x.dims().to_vec();
        let rows = x.elem_count() / inputs;
        let x = x.reshape((rows, inputs))?;
        let y = match &self.bias {
            None => x.matmul(&self.weight.t()?)?,
            // A reduced type is rounded once, after the addition, as the reference's fused product does. On the
            // CPU that is free: candle widens both factors to f32 anyway.
            Some(bias) if matches!(x.dtype(), DType::BF16 | DType::F16) && x.device().is_cpu() => {
                let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
                let y = wide(&x)?.matmul(&wide(&self.weight)?.t()?)?;
                y.broadcast_add(&wide(bias)?)?.to_dtype(x.dtype())?
            }
            Some(bias) => x.matmul(&self.weight.t()?)?.broadcast_add(bias)?,
        };
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        Ok(y.reshape(dims)?)
    }
}
