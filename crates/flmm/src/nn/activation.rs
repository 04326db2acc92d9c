//! Activation functions with exact gradients, fused on the CPU.
//!
//! candle's own derivatives use six-digit constants (GELU) and pass the gradient at exactly zero (ReLU), and its
//! erf runs element by element in f64; these are accurate to f32 and several times faster.

use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};
use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result as CandleResult, Shape, Tensor};
use flmm_kernels::{map_bf16, map_f32, zip_map_f32};

use super::host::{Elements, elements, frozen_bf16, fusable, with_bf16};
use crate::error::Result;

/// `max(x, 0)`; the gradient at exactly 0 is 0.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    apply::<Relu>(x, Tensor::relu)
}

/// The exact GELU, `x · ½ (1 + erf(x / √2))`; reduced types are evaluated in f32 and rounded once.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    rounded_once::<Gelu>(x, Tensor::gelu_erf)
}

/// The tanh approximation of GELU (Gemma, SigLIP); reduced types are evaluated in f32 and rounded once.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    rounded_once::<GeluTanh>(x, Tensor::gelu)
}

/// `x · sigmoid(1.702 x)` (OpenAI's CLIP).
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    apply::<QuickGelu>(x, |x| x * logistic(&(x * 1.702)?)?)
}

/// `x · sigmoid(x)`; reduced types are evaluated in f32 and rounded once.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    rounded_once::<Silu>(x, Tensor::silu)
}

/// `1 / (1 + e^−x)`.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    apply::<Sigmoid>(x, logistic)
}

fn logistic(x: &Tensor) -> CandleResult<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

fn apply<F: Function>(x: &Tensor, composed: impl Fn(&Tensor) -> CandleResult<Tensor>) -> Result<Tensor> {
    if fusable(&[x]) {
        return Ok(x.contiguous()?.apply_op1(Map::<F>(PhantomData))?);
    }
    Ok(composed(x)?)
}

fn rounded_once<F: Function>(
    x: &Tensor,
    composed: impl Fn(&Tensor) -> CandleResult<Tensor>,
) -> Result<Tensor> {
    if frozen_bf16(&[x]) {
        return Ok(with_bf16(x, |x, y| {
            map_bf16(x, y, F::value);
            Ok(())
        })?);
    }
    Ok(apply::<F>(&x.to_dtype(DType::F32)?, composed)?.to_dtype(x.dtype())?)
}

/// A function of one number and its derivative.
trait Function: Send + Sync + 'static {
    const NAME: &'static str;
    fn value(x: f32) -> f32;
    fn slope(x: f32) -> f32;
}

struct Map<F>(PhantomData<F>);

impl<F: Function> CustomOp1 for Map<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let x = elements(storage, layout)?;
        let mut y = vec![0f32; x.len()];
        map_f32(x, &mut y, F::value);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (x_elements, grad_elements) = (Elements::of(x), Elements::of(&grad));
        let mut dx = vec![0f32; x.elem_count()];
        zip_map_f32(x_elements.get()?, grad_elements.get()?, &mut dx, |x, g| g * F::slope(x));
        Ok(Some(Tensor::from_vec(dx, x.dims(), x.device())?))
    }
}

struct Relu;
impl Function for Relu {
    const NAME: &'static str = "relu";
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x.max(0.0)
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { 0.0 }
    }
}

struct Sigmoid;
impl Function for Sigmoid {
    const NAME: &'static str = "sigmoid";
    #[inline(always)]
    fn value(x: f32) -> f32 {
        1.0 / (1.0 + exp(-x))
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let s = Self::value(x);
        s * (1.0 - s)
    }
}

struct Silu;
impl Function for Silu {
    const NAME: &'static str = "silu";
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * Sigmoid::value(x)
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let s = Sigmoid::value(x);
        s * (1.0 + x * (1.0 - s))
    }
}

struct QuickGelu;
impl Function for QuickGelu {
    const NAME: &'static str = "quick_gelu";
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * Sigmoid::value(1.702 * x)
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let s = Sigmoid::value(1.702 * x);
        s * (1.0 + 1.702 * x * (1.0 - s))
    }
}

struct Gelu;
impl Function for Gelu {
    const NAME: &'static str = "gelu";
    #[inline(always)]
    fn value(x: f32) -> f32 {
        0.5 * x * (1.0 + erf(x * FRAC_1_SQRT_2))
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        const INV_SQRT_TAU: f32 = 0.398_942_3;
        0.5 * (1.0 + erf(x * FRAC_1_SQRT_2)) + x * INV_SQRT_TAU * exp(-0.5 * x * x)
    }
}

struct GeluTanh;
impl GeluTanh {
    const SCALE: f32 = 0.797_884_6; // √(2/π)
    const CUBIC: f32 = 0.044_715;

    /// `½ (1 + tanh(√(2/π) (x + 0.044715 x³)))` is the logistic function of twice that argument.
    #[inline(always)]
    fn gate(x: f32) -> f32 {
        Sigmoid::value(2.0 * Self::SCALE * x * (1.0 + Self::CUBIC * x * x))
    }
}
impl Function for GeluTanh {
    const NAME: &'static str = "gelu_tanh";
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * Self::gate(x)
    }
    #[inline(always)]
    fn slope(x: f32) -> f32 {
        let gate = Self::gate(x);
        gate + x * gate * (1.0 - gate) * 2.0 * Self::SCALE * (1.0 + 3.0 * Self::CUBIC * x * x)
    }
}

/// `e^x` to 2 units in the last place, written so that the compiler can vectorise it: `2^n · e^r` with
/// `|r| ≤ ln 2 / 2`, the second factor by its Taylor series.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact when multiplied by a small integer.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + coefficient;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    series * f32::from_bits(exponent)
}

/// `erf(x)` to about 1e-7 absolute: `1 − e^(−x²) · Q(t)`, `t = 1 / (1 + 0.4 |x|)`, with `Q` the Chebyshev
/// interpolant of degree 8 of `e^(x²) erfc(x)` on 0..5 (error 4e-9).
#[inline(always)]
fn erf(x: f32) -> f32 {
    const Q: [f32; 9] = [
        8.736_681e-2,
        -4.629_238_5e-1,
        8.378_829e-1,
        -5.668_675e-1,
        5.569_672e-1,
        6.854_214e-2,
        2.572_284_2e-1,
        2.215_698e-1,
        2.341_520_2e-4,
    ];
    let magnitude = x.abs();
    let t = 1.0 / (1.0 + 0.4 * magnitude);
    let mut q = 0.0;
    for coefficient in Q {
        q = q * t + coefficient;
    }
    (1.0 - exp(-magnitude * magnitude) * q).copysign(x)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    fn grid() -> Tensor {
        (Tensor::arange(-1200f32, 1200., &Device::Cpu).unwrap() / 100.).unwrap()
    }

    #[test]
    fn exp_is_accurate() {
        for x in grid().to_vec1::<f32>().unwrap() {
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3e-7, "exp({x})");
        }
        assert_eq!((exp(0.0), exp(-1000.0) < 1e-37, exp(1000.0) > 1e38), (1.0, true, true));
    }

    type Named = (&'static str, fn(&Tensor) -> Result<Tensor>);
    const ALL: [Named; 6] = [
        ("relu", relu),
        ("gelu", gelu),
        ("gelu_tanh", gelu_tanh),
        ("quick_gelu", quick_gelu),
        ("silu", silu),
        ("sigmoid", sigmoid),
    ];

    #[test]
    fn values_and_slopes_equal_candle_in_f64() {
        for (name, f) in ALL {
            let run = |dtype: DType| {
                let x = Var::from_tensor(&(grid() + 0.003).unwrap().to_dtype(dtype).unwrap()).unwrap();
                let y = f(&x).unwrap();
                let slope = y.sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
                (y.to_dtype(DType::F32).unwrap(), slope.to_dtype(DType::F32).unwrap())
            };
            println!("{name}");
            let (fused, composed) = (run(DType::F32), run(DType::F64));
            assert_close(&fused.0, &composed.0, 1.5e-6);
            // candle's own slopes of GELU are good to six digits.
            assert_close(&fused.1, &composed.1, 5e-6);
        }
    }

    #[test]
    fn gradients() {
        // Away from the kink of the ReLU.
        let x = [(random(&[60], 1) * 3.0).unwrap()];
        for f in [gelu, gelu_tanh, quick_gelu, silu, sigmoid] {
            check(&x, |t| f(&t[0]));
        }
        let away = [Tensor::new(&[-2f32, -0.5, 0.5, 2.], &Device::Cpu).unwrap()];
        check(&away, |t| relu(&t[0]));
        let zero = Var::new(&[0f32], &Device::Cpu).unwrap();
        let grads = relu(&zero).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&zero).unwrap().to_vec1::<f32>().unwrap(), [0.0]);
    }
}
