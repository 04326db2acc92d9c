//! Affine maps.

use candle_core::Tensor;

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
        let y = x.reshape((rows, inputs))?.matmul(&self.weight.t()?)?;
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        let y = y.reshape(dims)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}
