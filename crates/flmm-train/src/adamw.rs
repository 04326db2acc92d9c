//! One tensor's AdamW update in one pass over memory; composed of tensor operations it would be twelve.

use candle_core::Tensor;
use flmm::Result;
use flmm::nn::host::{Elements, fusable};
use rayon::prelude::*;

/// Values that a thread updates at a time.
const CHUNK: usize = 1 << 16;

/// The numbers of one update, as `optim.rs` computes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Update {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
    /// Factor on the gradient.
    pub(crate) clip: f64,
    /// `1 − β₂ᵗ`
    pub(crate) correction2: f64,
    /// Learning rate over `1 − β₁ᵗ`.
    pub(crate) rate: f64,
    /// `1 − lr · wd`
    pub(crate) keep: f64,
}

impl Update {
    /// New parameter and moments; no gradient is a gradient of zero.
    pub(crate) fn apply(
        &self,
        parameter: &Tensor,
        moments: (&Tensor, &Tensor),
        gradient: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let gradient = gradient.map(|gradient| gradient.to_dtype(candle_core::DType::F32)?.contiguous());
        let gradient = gradient.transpose()?;
        let (m, v) = moments;
        match &gradient {
            Some(gradient) if fusable(&[parameter, m, v, gradient]) => self.fused(parameter, m, v, gradient),
            _ => self.composed(parameter, m, v, gradient.as_ref()),
        }
    }

    fn fused(
        &self,
        parameter: &Tensor,
        m: &Tensor,
        v: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let handles = [parameter, m, v, gradient].map(Elements::of);
        let [p, m, v, g] = [handles[0].get()?, handles[1].get()?, handles[2].get()?, handles[3].get()?];
        let (mut new_p, mut new_m, mut new_v) =
            (vec![0f32; p.len()], vec![0f32; p.len()], vec![0f32; p.len()]);
        let (b1, b2, eps) = (self.beta1 as f32, self.beta2 as f32, self.eps as f32);
        let (a1, a2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let (clip, rate, keep) = (self.clip as f32, self.rate as f32, self.keep as f32);
        let per_correction = (1.0 / self.correction2) as f32;
        let old =
            p.par_chunks(CHUNK).zip(m.par_chunks(CHUNK)).zip(v.par_chunks(CHUNK)).zip(g.par_chunks(CHUNK));
        let new =
            new_p.par_chunks_mut(CHUNK).zip(new_m.par_chunks_mut(CHUNK)).zip(new_v.par_chunks_mut(CHUNK));
        new.zip(old).for_each(|(((new_p, new_m), new_v), (((p, m), v), g))| {
            for i in 0..p.len() {
                let g = g[i] * clip;
                let (m, v) = (m[i] * b1 + g * a1, v[i] * b2 + g * g * a2);
                let denominator = (v * per_correction).sqrt() + eps;
                (new_p[i], new_m[i], new_v[i]) = (p[i] * keep - m / denominator * rate, m, v);
            }
        });
        let tensor = |values| Tensor::from_vec(values, parameter.shape(), parameter.device());
        Ok((tensor(new_p)?, tensor(new_m)?, tensor(new_v)?))
    }

    /// The same from tensor operations, for other devices and for tensors without a gradient.
    fn composed(
        &self,
        parameter: &Tensor,
        m: &Tensor,
        v: &Tensor,
        gradient: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (m, v) = match gradient {
            Some(gradient) => {
                let gradient = (gradient * self.clip)?;
                let square = (gradient.sqr()? * (1.0 - self.beta2))?;
                (((m * self.beta1)? + (gradient * (1.0 - self.beta1))?)?, ((v * self.beta2)? + square)?)
            }
            None => ((m * self.beta1)?, (v * self.beta2)?),
        };
        let denominator = ((&v / self.correction2)?.sqrt()? + self.eps)?;
        let change = ((&m / denominator)? * self.rate)?;
        Ok((((parameter * self.keep)? - change)?, m, v))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn fused_equals_composed() {
        // More than one chunk, and a rest.
        let shape = (CHUNK + 3, 2);
        let random = |low: f32, high: f32| Tensor::rand(low, high, shape, &Device::Cpu).unwrap();
        let (p, m, v, g) = (random(-1., 1.), random(-0.1, 0.1), random(0., 0.01), random(-2., 2.));
        let update = Update {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            clip: 0.37,
            correction2: 0.02,
            rate: 1e-2,
            keep: 0.999,
        };
        let one = update.apply(&p, (&m, &v), Some(&g)).unwrap();
        let other = update.composed(&p, &m, &v, Some(&g)).unwrap();
        for (a, b) in [(&one.0, &other.0), (&one.1, &other.1), (&one.2, &other.2)] {
            let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference < 2e-7, "{difference}");
        }
    }

    #[test]
    fn no_gradient_is_a_gradient_of_zero() {
        let p = Tensor::new(&[1f32, -2.0], &Device::Cpu).unwrap();
        let m = Tensor::new(&[0.1f32, 0.2], &Device::Cpu).unwrap();
        let v = Tensor::new(&[0.01f32, 0.02], &Device::Cpu).unwrap();
        let update =
            Update { beta1: 0.9, beta2: 0.99, eps: 1e-8, clip: 1.0, correction2: 0.5, rate: 0.1, keep: 0.9 };
        let values = |x: &Tensor| x.to_vec1::<f32>().unwrap();
        let none = update.apply(&p, (&m, &v), None).unwrap();
        let zero = update.apply(&p, (&m, &v), Some(&p.zeros_like().unwrap())).unwrap();
        for (a, b) in [(&none.0, &zero.0), (&none.1, &zero.1), (&none.2, &zero.2)] {
            assert!(values(a).iter().zip(values(b)).all(|(a, b)| (a - b).abs() < 1e-7));
        }
    }
}
