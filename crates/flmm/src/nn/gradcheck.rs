//! Test helper: analytic gradients against finite differences.

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::Result;

/// Uniform values in `-1..1` from a seed.
pub(crate) fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Panics unless both tensors have one shape and differ by at most `tolerance` anywhere.
pub(crate) fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims());
    let difference = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    let difference = difference.to_scalar::<f32>().unwrap();
    assert!(difference <= tolerance, "largest difference {difference} > {tolerance}");
}

/// Panics unless the gradient of `Σ r · f(inputs)` (random fixed `r`) with respect to every input agrees with
/// central differences to 0.5 % in relative L2 norm. `f` must be smooth around `inputs`.
pub(crate) fn check(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    const STEP: f32 = 1e-2;
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tracked).unwrap();
    let mix = random(y.dims(), 999);
    let weights: Vec<f32> = mix.flatten_all().unwrap().to_vec1().unwrap();
    let grads = (&y * &mix).unwrap().sum_all().unwrap().backward().unwrap();

    for (index, input) in inputs.iter().enumerate() {
        let analytic = grads.get(&vars[index]).unwrap_or_else(|| panic!("input {index} has no gradient"));
        let analytic: Vec<f32> = analytic.flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f32> = input.flatten_all().unwrap().to_vec1().unwrap();
        let loss_at = |position: usize, value: f32| -> f64 {
            let mut moved = values.clone();
            moved[position] = value;
            let mut all = inputs.to_vec();
            all[index] = Tensor::from_vec(moved, input.dims(), &Device::Cpu).unwrap();
            let y: Vec<f32> = f(&all).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            y.iter().zip(&weights).map(|(&y, &w)| f64::from(y) * f64::from(w)).sum()
        };
        let (mut error, mut norm) = (0f64, 0f64);
        for (position, &value) in values.iter().enumerate() {
            let (above, below) = (value + STEP, value - STEP);
            let slope = (loss_at(position, above) - loss_at(position, below)) / f64::from(above - below);
            error += (slope - f64::from(analytic[position])).powi(2);
            norm += slope.powi(2);
        }
        let relative = (error / norm.max(1e-12)).sqrt();
        assert!(relative < 5e-3, "input {index}: analytic and numeric gradient differ by {relative:.2e}");
    }
}
