//! Few rows, in 16-bit integers.

use half::bf16;

use super::{GROUP, Int8Weight, OFFSET, OfOutput, integers};
use crate::few::{Dots, in_chunks, sums_by};
use crate::product::Sizes;

/// Products of eight-bit weights and 16-bit activations.
pub(crate) trait Dot: Copy + Send + Sync {
    /// `Σ_group scale(row) · scale(n) · Σ_k x[row][k] · w[n][k]` for the first `R` rows.
    fn dot<const R: usize, const N: usize>(self, x: Words, w: [OfOutput; N]) -> [[f32; R]; N];
}

/// Rows of 16-bit integers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words<'a> {
    /// `[rows, groups · GROUP]`
    pub(crate) numbers: &'a [i16],
    /// `[rows, groups]`
    pub(crate) scales: &'a [f32],
    /// `[rows, groups]`: what the weights' offset adds to the sums, with the sign changed.
    pub(crate) corrections: &'a [i32],
}

impl Words<'_> {
    /// Whether there are `R` rows for each of `w`, which have `groups` groups each.
    pub(crate) fn fit<const R: usize>(&self, groups: usize, w: &[OfOutput]) -> bool {
        w.iter().all(|w| w.0.len().div_ceil(GROUP) == groups && w.1.len() == groups)
            && self.numbers.len() >= R * groups * GROUP
            && self.scales.len() >= R * groups
            && self.corrections.len() >= R * groups
    }
}

/// Few rows, in 16-bit integers.
pub(crate) fn few(
    kernel: impl Dot,
    weight: &Int8Weight,
    x: &[bf16],
    bias: Option<&[bf16]>,
    sizes: Sizes,
    y: &mut [bf16],
) {
    let (groups, inputs) = (weight.groups(), sizes.inputs);
    let mut numbers = vec![0i16; sizes.rows * groups * GROUP];
    let (mut scales, mut corrections) = (Vec::new(), Vec::new());
    for (row, words) in x.chunks_exact(inputs).zip(numbers.chunks_exact_mut(groups * GROUP)) {
        for (numbers, words) in row.chunks(GROUP).zip(words.chunks_exact_mut(GROUP)) {
            let (scale, sum) =
                integers(numbers, f32::from(i16::MAX), |at, integer| words[at] = integer as i16);
            scales.push(scale);
            corrections.push(-OFFSET * sum);
        }
    }
    let x = Words { numbers: &numbers, scales: &scales, corrections: &corrections };
    in_chunks(sizes, bias, y, |outputs, sums| {
        sums_by(&Operands { kernel, x, weight }, sizes.rows, outputs.start, sums);
    });
}

struct Operands<'a, K> {
    kernel: K,
    x: Words<'a>,
    weight: &'a Int8Weight,
}

impl<K: Dot> Dots for Operands<'_, K> {
    #[inline]
    fn dots<const R: usize, const N: usize>(&self, row: usize, outputs: [usize; N]) -> [[f32; R]; N] {
        let first = row * self.weight.groups();
        let Words { numbers, scales, corrections } = self.x;
        let x = Words {
            numbers: &numbers[first * GROUP..],
            scales: &scales[first..],
            corrections: &corrections[first..],
        };
        self.kernel.dot(x, outputs.map(|n| self.weight.row(n)))
    }
}
