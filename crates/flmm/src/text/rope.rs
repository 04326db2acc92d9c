//! Rotary position embedding.

use candle_core::{D, DType, Device, Tensor};
use flmm_kernels::rotate_bf16;

use crate::error::Result;
use crate::nn::host::{Elements, frozen_bf16, with_bf16};

/// Rotates queries and keys by their positions, first half against second half of each head
/// (`spec/pipeline.md` §2.1 rule 1).
#[derive(Debug, Clone)]
pub struct Rope {
    /// `[head_dim / 2]`
    inverse_frequencies: Vec<f32>,
}

/// Cosines and sines of consecutive positions, each `[T, head_dim]` in the model's type.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Frequencies `theta^(−2i / head_dim)` in f32.
    pub fn new(theta: f64, head_dim: usize) -> Self {
        let frequency = |i: usize| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        };
        Self { inverse_frequencies: (0..head_dim / 2).map(frequency).collect() }
    }

    /// The rotation for positions `start..start + len`: angles in f32, then cast to `dtype`.
    pub fn rotation(&self, start: usize, len: usize, dtype: DType, device: &Device) -> Result<Rotation> {
        let half = self.inverse_frequencies.len();
        let angles = (start..start + len)
            .flat_map(|position| self.inverse_frequencies.iter().map(move |f| position as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        let table = |values: Vec<f32>| -> Result<Tensor> {
            let half = Tensor::from_vec(values, (len, half), device)?.to_dtype(dtype)?;
            Ok(Tensor::cat(&[&half, &half], 1)?)
        };
        Ok(Rotation { cos: table(cos)?, sin: table(sin)? })
    }
}

impl Rotation {
    /// The rotation without its first `rows` positions.
    pub(crate) fn from(&self, rows: usize) -> Result<Self> {
        let rest = |table: &Tensor| table.narrow(0, rows, table.dim(0)? - rows);
        Ok(Self { cos: rest(&self.cos)?, sin: rest(&self.sin)? })
    }

    /// `x [heads, T, head_dim]` → same shape.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if frozen_bf16(&[x, &self.cos]) && x.dims().ends_with(self.cos.dims()) {
            let half = x.dim(D::Minus1)? / 2;
            let [cos, sin] = [&self.cos, &self.sin].map(|table| table.narrow(1, 0, half)?.contiguous());
            let (cos, sin) = (cos?, sin?);
            let (cos, sin) = (Elements::of(&cos), Elements::of(&sin));
            return Ok(with_bf16(x, |x, y| {
                rotate_bf16(x, cos.get_as()?, sin.get_as()?, half, y);
                Ok(())
            })?);
        }
        let half = x.dim(D::Minus1)? / 2;
        let first = x.narrow(D::Minus1, 0, half)?;
        let second = x.narrow(D::Minus1, half, half)?;
        let turned = Tensor::cat(&[&second.neg()?, &first], D::Minus1)?;
        Ok((x.broadcast_mul(&self.cos)? + turned.broadcast_mul(&self.sin)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotates_the_halves_by_the_position() -> Result<()> {
        let x = Tensor::new(&[[[1f32, 0.0, 0.0, 2.0]]], &Device::Cpu)?;
        let rotation = Rope::new(100.0, 4).rotation(3, 1, DType::F32, &Device::Cpu)?;
        let y = rotation.apply(&x)?.flatten_all()?.to_vec1::<f32>()?;
        // Pairs are (0, 2) with frequency 1 and (1, 3) with frequency 100^-0.5.
        let expected = [3f32.cos(), -2.0 * 0.3f32.sin(), 3f32.sin(), 2.0 * 0.3f32.cos()];
        for (a, b) in y.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{y:?} against {expected:?}");
        }
        Ok(())
    }
}
