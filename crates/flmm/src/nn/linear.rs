//! Affine maps.

use candle_core::{DType, Tensor};

use super::affine::affine;
use super::frozen_linear::{frozen_linear, packed_linear};
use super::host::{Elements, frozen_bf16};
use crate::error::Result;
use crate::weights::{Matrix, Packed, Params, WeightFormat};

/// `y = x · weightᵀ + bias`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`
    weight: Matrix,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight [outputs, inputs]` and, if `bias`, `bias [outputs]`; the weight is kept as
    /// [`WeightFormat`](crate::weights::WeightFormat) says.
    pub fn load(inputs: usize, outputs: usize, bias: bool, params: &Params) -> Result<Self> {
        let weight = params.matrix([outputs, inputs], "weight")?;
        let bias = if bias { Some(params.get(&[outputs], "bias")?) } else { None };
        Ok(Self { weight, bias })
    }

    /// From tensors already at hand: `weight [out, in]`, `bias [out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Matrix::AsLoaded(weight), bias }
    }

    /// The same map with its weight, unless that has few bits, and its bias in `dtype`.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.to_dtype(dtype)).transpose()?;
        let weight = match &self.weight {
            Matrix::AsLoaded(weight) => Matrix::AsLoaded(weight.to_dtype(dtype)?),
            packed => packed.clone(),
        };
        Ok(Self { weight, bias })
    }

    /// The same map with its weight, if that is bf16 on the CPU, in `format`.
    pub(crate) fn in_format(&self, format: WeightFormat) -> Result<Self> {
        let weight = match &self.weight {
            Matrix::AsLoaded(weight) if frozen_bf16(&[weight]) => {
                let (_, inputs) = weight.dims2()?;
                let weight = weight.contiguous()?;
                let packed = Packed::quantise(format, Elements::of(&weight).get_as()?, inputs);
                packed.map_or(Matrix::AsLoaded(weight), Matrix::Packed)
            }
            other => other.clone(),
        };
        Ok(Self { weight, bias: self.bias.clone() })
    }

    /// `x [.., in]` → `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = match &self.weight {
            Matrix::AsLoaded(weight) => weight.dims2()?,
            Matrix::Packed(weight) => (weight.outputs(), weight.inputs()),
        };
        let bias = self.bias.as_ref();
        if let Matrix::AsLoaded(weight) = &self.weight
            && let Some(y) = affine(x, weight, bias)?
        {
            return Ok(y);
        }
        let mut dims = x.dims().to_vec();
        let rows = x.elem_count() / inputs;
        let x = x.reshape((rows, inputs))?;
        let y = match &self.weight {
            Matrix::Packed(weight) => packed_linear(&x, weight, bias)?,
            Matrix::AsLoaded(weight) => match frozen_linear(&x, weight, bias)? {
                Some(y) => y,
                None => composed(&x, weight, bias)?,
            },
        };
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        Ok(y.reshape(dims)?)
    }
}

/// `x [rows, in]` → `[rows, out]`, from candle's operations, with a gradient.
fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    Ok(match bias {
        None => x.matmul(&weight.t()?)?,
        // A reduced type is rounded once, after the addition, as the reference's fused product does. On the
        // CPU that is free: candle widens both factors to f32 anyway.
        Some(bias) if matches!(x.dtype(), DType::BF16 | DType::F16) && x.device().is_cpu() => {
            let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
            let y = wide(x)?.matmul(&wide(weight)?.t()?)?;
            y.broadcast_add(&wide(bias)?)?.to_dtype(x.dtype())?
        }
        Some(bias) => x.matmul(&weight.t()?)?.broadcast_add(bias)?,
    })
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
                let linear = Linear::new(weight.clone(), bias.clone());
                let y = linear.forward(&x)?;
                assert_eq!((y.dims(), y.dtype()), (&[1, rows, outputs][..], DType::BF16));
                let expected =
                    composed(&x.squeeze(0)?, &weight, bias.as_ref())?.to_dtype(DType::F32)?.flatten_all()?;
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
    fn weights_of_few_bits_are_near_and_give_up_their_tensor() -> Result<()> {
        let tensors = || -> Result<_> {
            let bias = ("bias".to_owned(), bf16_ramp(&[50], 0.2)?);
            Ok([("weight".to_owned(), bf16_ramp(&[50, 300], 0.4)?), bias].into_iter().collect())
        };
        let mut written = Vec::new();
        // Four bits are for a decoder's layers alone.
        for (format, in_layers, bits) in
            [(WeightFormat::Int8, true, 8), (WeightFormat::Int4, true, 4), (WeightFormat::Int4, false, 8)]
        {
            let params = Params::new("x", tensors()?);
            let exact = Linear::load(300, 50, true, &params)?;
            let place = params.in_format(format);
            let linear = Linear::load(300, 50, true, &if in_layers { place.in_layers() } else { place })?;
            let Matrix::Packed(packed) = &linear.weight else { panic!("not packed") };
            assert_eq!(if matches!(packed, Packed::Int4(_)) { 4 } else { 8 }, bits);
            for rows in [2, 40] {
                let x = bf16_ramp(&[rows, 300], 0.7)?;
                let [y, expected] = [linear.forward(&x)?, exact.forward(&x)?].map(|y| y.to_dtype(DType::F32));
                let (y, expected) = (y?, expected?);
                let relative = ((y - &expected)?.sqr()?.sum_all()? / expected.sqr()?.sum_all()?)?;
                let relative = relative.to_scalar::<f32>()?.sqrt();
                assert!(relative < if bits == 8 { 0.02 } else { 0.2 }, "{bits} bits: {relative}");
            }
            let learning = Var::from_tensor(&bf16_ramp(&[2, 300], 0.7)?)?;
            assert!(linear.forward(learning.as_tensor()).is_err(), "its gradient would be lost");
            params.finish("")?;
            written.push(packed.tensors("weight")?);
        }
        // As a file has them, the same numbers come out, whatever format is asked for.
        for (parts, bits) in written.into_iter().zip([8, 4, 8]) {
            let all = tensors()?;
            let made = Params::new("x", all).in_format(if bits == 8 {
                WeightFormat::Int8
            } else {
                WeightFormat::Int4
            });
            let made = Linear::load(300, 50, true, &made.in_layers())?;
            let mut all: std::collections::HashMap<_, _> = tensors()?;
            all.remove("weight");
            all.extend(parts);
            let params = Params::new("x", all.clone());
            let read = Linear::load(300, 50, true, &params)?;
            params.finish("")?;
            let x = bf16_ramp(&[3, 300], 0.7)?;
            let [a, b] =
                [made.forward(&x)?, read.forward(&x)?].map(|y| y.flatten_all()?.to_vec1::<half::bf16>());
            assert_eq!(a?, b?);
            // Too few scales, another type.
            let scales = all["weight.scales"].clone();
            all.insert("weight.scales".to_owned(), scales.narrow(1, 0, 1)?.contiguous()?);
            let params = Params::new("x", all.clone());
            Linear::load(300, 50, true, &params)?;
            assert!(params.finish("").unwrap_err().to_string().contains("weight.scales"));
            all.insert("weight.scales".to_owned(), scales.to_dtype(DType::F32)?);
            assert!(
                Linear::load(300, 50, true, &Params::new("x", all)).unwrap_err().to_string().contains("U8")
            );
        }
        let params = Params::new("x", tensors()?);
        // What is missing or has another type stays as it is, and is reported as ever.
        let missing = Linear::load(7, 5, false, &params.pp("other").in_format(WeightFormat::Int8))?;
        assert!(matches!(missing.weight, Matrix::AsLoaded(_)) && params.finish("").is_err());
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
