//! Finite-difference checks of the fused operations of `flmm::nn`.

use candle_core::{Device, Tensor, Var};
use flmm::nn;

/// Deterministic values in (−1, 1).
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn var(shape: &[usize], seed: u32) -> Var {
    let count = shape.iter().product();
    Var::from_vec(values(count, seed), shape, &Device::Cpu).unwrap()
}

/// Compares the gradient of `Σ f(inputs) · weights` with central differences, element by element.
fn check(inputs: &[Var], f: impl Fn(&[Tensor]) -> Tensor) {
    let loss = |inputs: &[Tensor]| {
        let y = f(inputs);
        let weights = Tensor::from_vec(values(y.elem_count(), 99), y.shape(), &Device::Cpu).unwrap();
        (y * weights).unwrap().sum_all().unwrap()
    };
    let tensors: Vec<_> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let grads = loss(&tensors).backward().unwrap();
    for (index, input) in inputs.iter().enumerate() {
        let grad = grads.get(input.as_tensor()).expect("no gradient").flatten_all().unwrap();
        let grad = grad.to_vec1::<f32>().unwrap();
        let base = input.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for at in 0..base.len() {
            let moved = |delta: f32| {
                let mut data = base.clone();
                data[at] += delta;
                let mut tensors: Vec<_> = inputs.iter().map(|v| v.as_detached_tensor()).collect();
                tensors[index] = Tensor::from_vec(data, input.shape(), &Device::Cpu).unwrap();
                f64::from(loss(&tensors).to_scalar::<f32>().unwrap())
            };
            let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            let error = (numeric - f64::from(grad[at])).abs();
            assert!(
                error < 2e-3 + 1e-2 * numeric.abs(),
                "input {index}[{at}]: {numeric} against {}",
                grad[at]
            );
        }
    }
}

#[test]
fn layer_norm() {
    check(&[var(&[3, 8], 1), var(&[8], 2), var(&[8], 3)], |t| {
        nn::layer_norm(&t[0], &t[1], &t[2], 1e-5).unwrap()
    });
}

#[test]
fn rms_norm() {
    check(&[var(&[3, 8], 4), var(&[8], 5)], |t| nn::rms_norm(&t[0], &t[1], 1e-5).unwrap());
}

#[test]
fn softmax() {
    check(&[var(&[2, 3, 7], 6)], |t| nn::softmax_last_dim(&t[0]).unwrap());
}

#[test]
fn silu_mul() {
    check(&[var(&[2, 9], 7), var(&[2, 9], 8)], |t| nn::silu_mul(&t[0], &t[1]).unwrap());
}

#[test]
fn cross_entropy() {
    check(&[var(&[3, 5], 12)], |t| {
        nn::cross_entropy(&t[0], vec![4, 0, 2], Some(vec![1.0, 0.5, 2.0])).unwrap()
    });
}
