//! Products of a few rows, where reading the weights is all the time: they are read once, in the order of memory.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::element::{Float, Singles, Units};
use crate::kernel::Wide;
use crate::product::{Sizes, WeightRows};

/// The most rows that are worked on in this way.
pub(crate) const FEW: usize = 8;
/// Rows of `x` that share one reading of a row of weights, or rows of weights that share one row of `x`.
pub(crate) const TOGETHER: usize = 4;
/// Weights that a thread takes at once.
const CHUNK: usize = 1 << 18;

/// Computes products of a few rows.
pub(crate) trait Few<T>: Copy + Send + Sync {
    /// A number of `x` as it is read.
    type X: Copy + Send + Sync;

    /// Makes `x` ready.
    fn prepare(self, x: &[T]) -> Vec<Self::X>;

    /// `sums[n][row] = Σ_k x[row][k] · weight[n][k]` for `x [rows, inputs]`, `weight [outputs, inputs]`.
    fn sums(self, x: &[Self::X], weight: &[T], inputs: usize, sums: &mut [f32]);
}

/// `y = x·weightᵀ + bias` for up to [`FEW`] rows.
pub(crate) fn product<T: Float, F: Few<T>>(
    few: F,
    x: &[T],
    weight: &(impl WeightRows<T> + ?Sized),
    bias: Option<&[T]>,
    sizes: Sizes,
    y: &mut [T],
) {
    let x = few.prepare(x);
    in_chunks(sizes, bias, y, |outputs, sums| {
        few.sums(&x, weight.rows(outputs, sizes.inputs, &mut Vec::new()), sizes.inputs, sums);
    });
}

/// Computes `y` in parts: `sums` fills `[outputs, rows]` for a range of outputs; then `bias` is added, and the sums are
/// rounded.
pub(crate) fn in_chunks<T: Float>(
    sizes: Sizes,
    bias: Option<&[T]>,
    y: &mut [T],
    fill: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    let Sizes { rows, inputs, outputs } = sizes;
    // `[outputs, rows]`
    let mut sums = vec![0f32; rows * outputs];
    let chunk = (CHUNK / inputs).max(1);
    sums.par_chunks_mut(chunk * rows).enumerate().for_each(|(at, sums)| {
        let first = at * chunk;
        fill(first..first + sums.len() / rows, sums);
    });
    for (row, y) in y.chunks_exact_mut(outputs).enumerate() {
        for (n, y) in y.iter_mut().enumerate() {
            *y = T::round(sums[n * rows + row] + bias.map_or(0.0, |bias| bias[n].widen()));
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Few<half::bf16> for crate::avx512::Avx512Bf16 {
    type X = half::bf16;

    fn prepare(self, x: &[half::bf16]) -> Vec<half::bf16> {
        x.to_vec()
    }

    fn sums(self, x: &[half::bf16], weight: &[half::bf16], inputs: usize, sums: &mut [f32]) {
        let rows = x.len() / inputs;
        if rows == 1 {
            // Several rows of weights side by side: a single stream leaves a third of the memory's speed unused.
            for (sums, weight) in sums.chunks_mut(TOGETHER).zip(weight.chunks(TOGETHER * inputs)) {
                match sums.len() {
                    TOGETHER => {
                        sums.copy_from_slice(self.dot::<1, TOGETHER>(x, weight, inputs).as_flattened());
                    }
                    _ => {
                        for (sum, weight) in sums.iter_mut().zip(weight.chunks_exact(inputs)) {
                            [[*sum]] = self.dot(x, weight, inputs);
                        }
                    }
                }
            }
            return;
        }
        for (sums, weight) in sums.chunks_exact_mut(rows).zip(weight.chunks_exact(inputs)) {
            for (sums, x) in sums.chunks_mut(TOGETHER).zip(x.chunks(TOGETHER * inputs)) {
                match sums {
                    [sum] => [[*sum]] = self.dot(x, weight, inputs),
                    [a, b] => [[*a, *b]] = self.dot(x, weight, inputs),
                    [a, b, c] => [[*a, *b, *c]] = self.dot(x, weight, inputs),
                    _ => sums.copy_from_slice(&self.dot::<TOGETHER, 1>(x, weight, inputs)[0]),
                }
            }
        }
    }
}

impl<T: Float> Few<T> for Wide
where
    Singles: Units<T>,
{
    type X = f32;

    fn prepare(self, x: &[T]) -> Vec<f32> {
        x.iter().map(|x| x.widen()).collect()
    }

    fn sums(self, x: &[f32], weight: &[T], inputs: usize, sums: &mut [f32]) {
        self.arch().dispatch(Sums { x, weight, inputs, sums });
    }
}

struct Sums<'a, T> {
    x: &'a [f32],
    weight: &'a [T],
    inputs: usize,
    sums: &'a mut [f32],
}

impl<T> WithSimd for Sums<'_, T>
where
    Singles: Units<T>,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.x.len() / self.inputs;
        let mut wide = vec![0; self.inputs];
        for (sums, weight) in self.sums.chunks_exact_mut(rows).zip(self.weight.chunks_exact(self.inputs)) {
            Singles::write(weight, &mut wide);
            let weight: &[f32] = bytemuck::cast_slice(&wide);
            for (sum, x) in sums.iter_mut().zip(self.x.chunks_exact(self.inputs)) {
                *sum = dot(simd, x, weight);
            }
        }
    }
}

/// `Σ x·w`
#[inline(always)]
fn dot<S: Simd>(simd: S, x: &[f32], w: &[f32]) -> f32 {
    let ((x, x_rest), (w, w_rest)) = (S::as_simd_f32s(x), S::as_simd_f32s(w));
    // Four sums, so that none waits for the one before.
    let mut sums = [simd.splat_f32s(0.0); 4];
    let ((x4, x1), (w4, w1)) = (x.as_chunks::<4>(), w.as_chunks::<4>());
    for (x, w) in x4.iter().zip(w4) {
        for (sum, (&x, &w)) in sums.iter_mut().zip(x.iter().zip(w)) {
            *sum = simd.mul_add_e_f32s(x, w, *sum);
        }
    }
    for (&x, &w) in x1.iter().zip(w1) {
        sums[0] = simd.mul_add_e_f32s(x, w, sums[0]);
    }
    let [a, b, c, d] = sums;
    let sum = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
    sum + x_rest.iter().zip(w_rest).map(|(x, w)| x * w).sum::<f32>()
}
