//! Steps between products: norms, gates, rotations. Each reads its operands once.
//!
//! As in `softmax.rs`, loops are plain Rust that is compiled for the processor that runs them.

use half::bf16;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::element::Float;
use crate::line::LANES;
use crate::softmax::exp;

/// Numbers that a thread takes at once; fewer than that are not worth waking one.
const TASK: usize = 1 << 15;

/// Root-mean-square normalisation of rows as Llama does it: normalised in f32 and rounded, then multiplied by `weight
/// [width]` and rounded again. `x` and `y` are `[rows, width]`.
///
/// # Panics
/// If `x` and `y` are not whole rows of `weight`'s width.
pub fn rms_norm_bf16(x: &[bf16], weight: &[bf16], eps: f32, y: &mut [bf16]) {
    rms_norm(x, weight, eps, y);
}

/// As [`rms_norm_bf16`], in f32.
///
/// # Panics
/// As [`rms_norm_bf16`].
pub fn rms_norm_f32(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    rms_norm(x, weight, eps, y);
}

fn rms_norm<T: Float>(x: &[T], weight: &[T], eps: f32, y: &mut [T]) {
    whole_rows(x, y, weight.len());
    in_tasks(x, y, weight.len(), |x, y| RmsNorm { x, weight, eps, y });
}

/// Layer normalisation of rows: `(x − mean) / √(variance + eps) · weight + bias` in f32, rounded once. `x` and `y` are
/// `[rows, width]`, `weight` and `bias` `[width]`.
///
/// # Panics
/// As [`rms_norm_bf16`].
pub fn layer_norm_bf16(x: &[bf16], weight: &[bf16], bias: &[bf16], eps: f32, y: &mut [bf16]) {
    layer_norm(x, weight, bias, eps, y);
}

/// As [`layer_norm_bf16`], in f32.
///
/// # Panics
/// As [`rms_norm_bf16`].
pub fn layer_norm_f32(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    layer_norm(x, weight, bias, eps, y);
}

fn layer_norm<T: Float>(x: &[T], weight: &[T], bias: &[T], eps: f32, y: &mut [T]) {
    whole_rows(x, y, weight.len());
    assert_eq!(weight.len(), bias.len(), "weight and bias differ in width");
    in_tasks(x, y, weight.len(), |x, y| LayerNorm { x, weight, bias, eps, y });
}

/// `gate · sigmoid(gate) · up`, element by element; the first product is rounded before the second.
///
/// # Panics
/// If the slices differ in length.
pub fn silu_mul_bf16(gate: &[bf16], up: &[bf16], y: &mut [bf16]) {
    zip_map(gate, up, y, |gate, up| {
        // The exponential's argument is never above zero.
        let e = exp(-gate.abs());
        let sigmoid = if gate >= 0.0 { 1.0 } else { e } / (1.0 + e);
        <bf16 as Float>::round(gate * sigmoid).widen() * up
    });
}

/// `x + branch`, element by element, rounded once.
///
/// # Panics
/// If the slices differ in length.
pub fn add_bf16(x: &[bf16], branch: &[bf16], y: &mut [bf16]) {
    zip_map(x, branch, y, |x, branch| x + branch);
}

/// Rotary position embedding of `x [heads, rows, 2 · half]`, the first half of a head against the second, by
/// `cos` and `sin [rows, half]`; both products and their sum are rounded. `y` is as `x`.
///
/// # Panics
/// If `cos` and `sin` are not whole rows, or `x` and `y` not whole heads.
pub fn rotate_bf16(x: &[bf16], cos: &[bf16], sin: &[bf16], half: usize, y: &mut [bf16]) {
    assert_eq!(cos.len(), sin.len(), "cos and sin differ in length");
    assert!(half > 0 && cos.len().is_multiple_of(half), "{} angles are not rows of {half}", cos.len());
    let head = 2 * cos.len();
    whole_rows(x, y, head);
    in_tasks(x, y, head, |x, y| Rotate { x, cos, sin, half, y });
}

/// `y = f(x)`, element by element, evaluated in f32 and rounded once.
///
/// # Panics
/// If the slices differ in length.
pub fn map_bf16(x: &[bf16], y: &mut [bf16], f: impl Fn(f32) -> f32 + Sync) {
    whole_rows(x, y, 1);
    in_tasks(x, y, 1, |x, y| Map { x, y, f: &f });
}

/// As [`map_bf16`], in f32.
pub fn map_f32(x: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32 + Sync) {
    whole_rows(x, y, 1);
    in_tasks(x, y, 1, |x, y| Map { x, y, f: &f });
}

/// `f(x, g)` of every pair of numbers.
///
/// # Panics
/// If the slices differ in length.
pub fn zip_map_f32(x: &[f32], g: &[f32], y: &mut [f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    zip_map(x, g, y, f);
}

/// `f(x, g)` of every pair of numbers, evaluated in f32 and rounded.
fn zip_map<T: Float>(x: &[T], g: &[T], y: &mut [T], f: impl Fn(f32, f32) -> f32 + Sync) {
    assert!(x.len() == g.len() && x.len() == y.len(), "operands and result differ in length");
    if y.len() <= TASK {
        return Arch::new().dispatch(ZipMap { x, g, y, f: &f });
    }
    let tasks = y.par_chunks_mut(TASK).zip(x.par_chunks(TASK).zip(g.par_chunks(TASK)));
    tasks.for_each(|(y, (x, g))| Arch::new().dispatch(ZipMap { x, g, y, f: &f }));
}

struct ZipMap<'a, T, F> {
    x: &'a [T],
    g: &'a [T],
    y: &'a mut [T],
    f: &'a F,
}

impl<T: Float, F: Fn(f32, f32) -> f32> WithSimd for ZipMap<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let pairs = self.x.iter().zip(self.g);
        self.y.iter_mut().zip(pairs).for_each(|(y, (x, g))| *y = T::round((self.f)(x.widen(), g.widen())));
    }
}

struct Map<'a, T, F> {
    x: &'a [T],
    y: &'a mut [T],
    f: &'a F,
}

impl<T: Float, F: Fn(f32) -> f32> WithSimd for Map<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.y.iter_mut().zip(self.x).for_each(|(y, x)| *y = T::round((self.f)(x.widen())));
    }
}

fn whole_rows<T>(x: &[T], y: &[T], width: usize) {
    assert!(width > 0 && x.len().is_multiple_of(width), "{} numbers are not rows of {width}", x.len());
    assert_eq!(x.len(), y.len(), "operand and result differ in length");
}

/// Runs a step over parts of `x` and `y` of whole rows.
fn in_tasks<'a, T: Send + Sync, W: WithSimd<Output = ()>>(
    x: &'a [T],
    y: &'a mut [T],
    width: usize,
    step: impl Fn(&'a [T], &'a mut [T]) -> W + Sync,
) {
    let chunk = (TASK / width).max(1) * width;
    if y.len() <= chunk {
        return Arch::new().dispatch(step(x, y));
    }
    let tasks = y.par_chunks_mut(chunk).zip(x.par_chunks(chunk));
    tasks.for_each(|(y, x)| Arch::new().dispatch(step(x, y)));
}

/// `Σ f(x)` in sixteen sums.
#[inline(always)]
fn sum_of<T: Float>(x: &[T], f: impl Fn(f32) -> f32) -> f32 {
    let (lines, rest) = x.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for line in lines {
        for (sum, x) in sums.iter_mut().zip(line) {
            *sum += f(x.widen());
        }
    }
    sums.into_iter().sum::<f32>() + rest.iter().map(|x| f(x.widen())).sum::<f32>()
}

struct RmsNorm<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    eps: f32,
    y: &'a mut [T],
}

impl<T: Float> WithSimd for RmsNorm<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.weight.len();
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width)) {
            let root = (sum_of(x, |x| x * x) / width as f32 + self.eps).sqrt();
            for ((y, x), weight) in y.iter_mut().zip(x).zip(self.weight) {
                *y = T::round(T::round(x.widen() / root).widen() * weight.widen());
            }
        }
    }
}

struct LayerNorm<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    bias: &'a [T],
    eps: f32,
    y: &'a mut [T],
}

impl<T: Float> WithSimd for LayerNorm<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.weight.len();
        for (x, y) in self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width)) {
            let mean = sum_of(x, |x| x) / width as f32;
            let variance = sum_of(x, |x| (x - mean) * (x - mean)) / width as f32;
            let root = (variance + self.eps).sqrt();
            for ((y, x), (weight, bias)) in y.iter_mut().zip(x).zip(self.weight.iter().zip(self.bias)) {
                *y = T::round((x.widen() - mean) / root * weight.widen() + bias.widen());
            }
        }
    }
}

struct Rotate<'a> {
    x: &'a [bf16],
    cos: &'a [bf16],
    sin: &'a [bf16],
    half: usize,
    y: &'a mut [bf16],
}

impl WithSimd for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (half, head) = (self.half, 2 * self.cos.len());
        let product = |a: bf16, b: bf16| <bf16 as Float>::round(a.widen() * b.widen()).widen();
        for (x, y) in self.x.chunks_exact(head).zip(self.y.chunks_exact_mut(head)) {
            let angles = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
            for ((x, y), (cos, sin)) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)).zip(angles)
            {
                // Zipped, so that no index is checked and the loops become vectors.
                let (first, second) = x.split_at(half);
                let (y_first, y_second) = y.split_at_mut(half);
                let angles = || cos.iter().zip(sin);
                for ((y, (a, b)), (cos, sin)) in
                    y_first.iter_mut().zip(first.iter().zip(second)).zip(angles())
                {
                    *y = Float::round(product(*a, *cos) - product(*b, *sin));
                }
                for ((y, (a, b)), (cos, sin)) in
                    y_second.iter_mut().zip(first.iter().zip(second)).zip(angles())
                {
                    *y = Float::round(product(*b, *cos) + product(*a, *sin));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_mapped_one_by_one_across_tasks() {
        let x: Vec<f32> = (0..TASK + 77).map(|i| i as f32).collect();
        let g: Vec<f32> = x.iter().map(|x| 1.0 - x).collect();
        let mut y = vec![0f32; x.len()];
        zip_map_f32(&x, &g, &mut y, |x, g| 2.0 * x + g);
        assert!(y.iter().enumerate().all(|(i, &y)| y == i as f32 + 1.0));
    }
}
