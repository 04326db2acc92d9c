//! Products of a few rows, where reading the weights is all the time: they are read once, in the order of memory.

use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::element::Float;
use crate::finish::round;
use crate::kernel::Wide;
use crate::line::{AHEAD, prefetch};
use crate::product::{Sizes, WeightRows};

/// The most rows that are worked on in this way.
pub(crate) const FEW: usize = 8;
/// Rows of `x` that share one reading of a row of weights, or rows of weights that share one row of `x`.
pub(crate) const TOGETHER: usize = 4;
/// The least and the most weights that a thread takes at once. Where a part begins nothing was asked for yet, so few large
/// parts are better, of which every thread should have [`PARTS`].
const CHUNK: [usize; 2] = [1 << 18, 1 << 21];
const PARTS: usize = 8;

/// Computes products of a few rows.
pub(crate) trait Few<T>: Copy + Send + Sync {
    /// A number of `x` as it is read.
    type X: Copy + Send + Sync;

    /// Makes `x [rows, inputs]` ready.
    fn prepare(self, x: &[T], inputs: usize) -> Vec<Self::X>;

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
    let x = few.prepare(x, sizes.inputs);
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
    let [least, most] = CHUNK.map(|weights| (weights / inputs).max(1));
    let chunk = (outputs / (PARTS * rayon::current_num_threads())).clamp(least, most);
    if rows == 1 {
        // Rounded by the thread that summed, as vectors.
        return y.par_chunks_mut(chunk).enumerate().for_each(|(at, y)| {
            let columns = at * chunk..at * chunk + y.len();
            let mut sums = vec![0f32; y.len()];
            fill(columns.clone(), &mut sums);
            round(&sums, bias.map(|bias| &bias[columns]), y);
        });
    }
    // `[outputs, rows]`
    let mut sums = vec![0f32; rows * outputs];
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

/// Dot products of rows of activations with rows of weights.
pub(crate) trait Dots {
    /// Products of the `R` rows from `row` on with each of `outputs`.
    fn dots<const R: usize, const N: usize>(&self, row: usize, outputs: [usize; N]) -> [[f32; R]; N];
}

/// Fills `sums [outputs, rows]` for the outputs from `first` on.
#[inline(always)]
pub(crate) fn sums_by(dots: &impl Dots, rows: usize, first: usize, sums: &mut [f32]) {
    if rows == 1 {
        // Weights are read from several places side by side: one alone leaves a third of the memory's speed unused.
        let part = sums.len() / TOGETHER;
        for n in 0..part {
            let found: [[f32; 1]; TOGETHER] =
                dots.dots(0, std::array::from_fn(|place| first + place * part + n));
            found.iter().enumerate().for_each(|(place, [sum])| sums[place * part + n] = *sum);
        }
        for (n, sum) in sums.iter_mut().enumerate().skip(part * TOGETHER) {
            [[*sum]] = dots.dots(0, [first + n]);
        }
        return;
    }
    for (n, sums) in sums.chunks_exact_mut(rows).enumerate() {
        let output = [first + n];
        for (at, sums) in sums.chunks_mut(TOGETHER).enumerate() {
            let row = at * TOGETHER;
            match sums {
                [sum] => [[*sum]] = dots.dots(row, output),
                [a, b] => [[*a, *b]] = dots.dots(row, output),
                [a, b, c] => [[*a, *b, *c]] = dots.dots(row, output),
                _ => sums.copy_from_slice(&dots.dots::<TOGETHER, 1>(row, output)[0]),
            }
        }
    }
}

/// Operands of [`Few::sums`], for `kernel`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operands<'a, K, X, W> {
    pub(crate) kernel: K,
    /// `[rows, inputs]`
    pub(crate) x: &'a [X],
    /// `[outputs, inputs]`
    pub(crate) weight: &'a [W],
    pub(crate) inputs: usize,
}

impl<'a, K, X, W> Operands<'a, K, X, W> {
    /// The rows of `x` from `row` on, and those of the weight for `outputs`.
    #[inline(always)]
    pub(crate) fn of<const N: usize>(&self, row: usize, outputs: [usize; N]) -> (&'a [X], [&'a [W]; N]) {
        (&self.x[row * self.inputs..], outputs.map(|n| &self.weight[n * self.inputs..][..self.inputs]))
    }

    #[inline(always)]
    fn rows(&self) -> usize {
        self.x.len() / self.inputs
    }
}

#[cfg(target_arch = "x86_64")]
impl Few<bf16> for crate::avx512::Avx512Bf16 {
    type X = bf16;

    fn prepare(self, x: &[bf16], _: usize) -> Vec<bf16> {
        x.to_vec()
    }

    fn sums(self, x: &[bf16], weight: &[bf16], inputs: usize, sums: &mut [f32]) {
        let operands = Operands { kernel: self, x, weight, inputs };
        sums_by(&operands, operands.rows(), 0, sums);
    }
}

impl Few<f32> for Wide {
    type X = f32;

    fn prepare(self, x: &[f32], _: usize) -> Vec<f32> {
        x.to_vec()
    }

    fn sums(self, x: &[f32], weight: &[f32], inputs: usize, sums: &mut [f32]) {
        self.arch().dispatch(Sums(Operands { kernel: (), x, weight, inputs }, sums));
    }
}

impl Few<bf16> for Wide {
    type X = f32;

    /// Of every row first the numbers at even places, then those at odd ones: that is how a vector of weights comes apart.
    fn prepare(self, x: &[bf16], inputs: usize) -> Vec<f32> {
        let rows = x.chunks_exact(inputs);
        rows.flat_map(|row| row.iter().step_by(2).chain(row.iter().skip(1).step_by(2)))
            .map(|x| x.widen())
            .collect()
    }

    fn sums(self, x: &[f32], weight: &[bf16], inputs: usize, sums: &mut [f32]) {
        let weight: &[u16] = weight.reinterpret_cast();
        self.arch().dispatch(Sums(Operands { kernel: (), x, weight, inputs }, sums));
    }
}

/// [`Few::sums`] of weights of type `W`.
struct Sums<'a, W>(Operands<'a, (), f32, W>, &'a mut [f32]);

impl WithSimd for Sums<'_, f32> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self(operands, sums) = self;
        let (x, weight) = (operands.x, operands.weight.chunks_exact(operands.inputs));
        for (sums, weight) in sums.chunks_exact_mut(operands.rows()).zip(weight) {
            for (sum, x) in sums.iter_mut().zip(x.chunks_exact(operands.inputs)) {
                *sum = dot(simd, x, weight);
            }
        }
    }
}

impl WithSimd for Sums<'_, u16> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self(Operands { x, weight, inputs, .. }, sums) = self;
        let operands = Operands { kernel: Vectors(simd), x, weight, inputs };
        sums_by(&operands, operands.rows(), 0, sums);
    }
}

/// Vectors of two neighbouring bf16 numbers in each lane, which are taken apart in registers.
struct Vectors<S>(S);

impl<S: Simd> Dots for Operands<'_, Vectors<S>, f32, u16> {
    #[inline(always)]
    fn dots<const R: usize, const N: usize>(&self, row: usize, outputs: [usize; N]) -> [[f32; R]; N] {
        let (simd, len) = (self.kernel.0, self.inputs);
        let (x, weights) = self.of(row, outputs);
        let rows: [[&[f32]; 2]; R] =
            std::array::from_fn(|r| x[r * len..][..len].split_at(len.div_ceil(2)).into());
        // Vectors of pairs; without vectors there is none.
        let count = if S::F32_LANES > 1 { len / (2 * S::F32_LANES) } else { 0 };
        let mut sums = [[[simd.splat_f32s(0.0); 2]; R]; N];
        if S::F32_LANES > 1 {
            let rows = rows.map(|halves| halves.map(|half| &S::as_simd_f32s(half).0[..count]));
            let weights = weights.map(|w| &S::as_simd_u16s(w).0[..count]);
            let (shift, odd) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
            for k in 0..count {
                for (sums, weights) in sums.iter_mut().zip(&weights) {
                    prefetch((&raw const weights[k]).cast::<u8>().wrapping_add(AHEAD));
                    let pairs: S::u32s = bytemuck::cast(weights[k]);
                    let halves = [simd.wrapping_dyn_shl_u32s(pairs, shift), simd.and_u32s(pairs, odd)];
                    for (sums, row) in sums.iter_mut().zip(&rows) {
                        for ((sum, half), row) in sums.iter_mut().zip(halves).zip(row) {
                            *sum = simd.mul_add_e_f32s(simd.transmute_f32s_u32s(half), row[k], *sum);
                        }
                    }
                }
            }
        }
        let mut totals = [[0f32; R]; N];
        for ((totals, sums), weights) in totals.iter_mut().zip(sums).zip(weights) {
            for ((total, [even, odd]), row) in totals.iter_mut().zip(sums).zip(rows) {
                let rest = (count * 2 * S::F32_LANES..len)
                    .map(|k| row[k % 2][k / 2] * f32::from_bits(u32::from(weights[k]) << 16));
                *total = simd.reduce_sum_f32s(simd.add_f32s(even, odd)) + rest.sum::<f32>();
            }
        }
        totals
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
