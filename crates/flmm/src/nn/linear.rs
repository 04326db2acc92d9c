//! Affine maps.

use candle_core::{DType, Tensor};

use super::frozen_linear::frozen_linear;
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

    /// The same map with its weight and bias in `dtype`.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.to_dtype(dtype)).transpose()?;
        Ok(Self { weight: self.weight.to_dtype(dtype)?, bias })
    }

    /// `x [.., in]` → `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = self.weight.dims2()?;
        let mut dims = x.dims().to_vec();
        let rows = x.elem_count() / inputs;
        let x = x.reshape((rows, inputs))?;
        let y = match frozen_linear(&x, &self.weight, self.bias.as_ref())? {
            Some(y) => y,
            None => self.composed(&x)?,
        };
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        Ok(y.reshape(dims)?)
    }

    /// `x [rows, in]` → `[rows, out]`, from candle's operations, with a gradient.
    fn composed(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.bias {
            None => x.matmul(&self.weight.t()?)?,
            // A reduced type is rounded once, after the addition, as the reference's fused product does. On the
            // CPU that is free: candle widens both factors to f32 anyway.
            Some(bias) if matches!(x.dtype(), DType::BF16 | DType::F16) && x.device().is_cpu() => {
                let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
                let y = wide(x)?.matmul(&wide(&self.weight)?.t()?)?;
                y.broadcast_add(&wide(bias)?)?.to_dtype(x.dtype())?
            }
            Some(bias) => x.matmul(&self.weight.t()?)?.broadcast_add(bias)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn bf16_ramp(shape: &[usize], seed: f64) -> Result<Tensor> {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|i| ((i as f64 * 0.7 + seed) * 1.3).sin() as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::BF16)?)
    }

    #[test]
    fn frozen_and_composed_products_agree() -> Result<()> {
        for (rows, inputs, outputs) in [(1, 40, 30), (5, 33, 18), (70, 200, 101)] {
            let x = bf16_ramp(&[2, rows, inputs], 0.3)?.narrow(0, 1, 1)?;
            let weight = bf16_ramp(&[outputs, inputs], 0.6)?;
            for bias in [None, Some(bf16_ramp(&[outputs], 0.9)?)] {
                let linear = Linear::new(weight.clone(), bias);
                let y = linear.forward(&x)?;
                assert_eq!((y.dims(), y.dtype()), (&[1, rows, outputs][..], DType::BF16));
                let expected = linear.composed(&x.squeeze(0)?)?.to_dtype(DType::F32)?.flatten_all()?;
                let y = y.to_dtype(DType::F32)?.flatten_all()?;
                for (y, expected) in y.to_vec1::<f32>()?.into_iter().zip(expected.to_vec1::<f32>()?) {
                    // One rounding to bf16 apart, and what f32 sums differ where terms cancel.
                    assert!((y - expected).abs() <= expected.abs() / 128.0 + 1e-5, "{y} against {expected}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn trainable_weights_keep_their_gradient() -> Result<()> {
        let weight = Var::from_tensor(&bf16_ramp(&[3, 4], 0.2)?)?;
        let y = Linear::new(weight.as_tensor().clone(), None).forward(&bf16_ramp(&[2, 4], 0.1)?)?;
        assert!(y.sum_all()?.backward()?.get(&weight).is_some());
        Ok(())
    }
}
