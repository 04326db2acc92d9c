//! Few rows, in 16-bit integers.

use half::bf16;
use pulp::{Arch, Simd, WithSimd};

use super::{GROUP, Int8Weight, LIMIT, OFFSET, OfOutput, integers};
use crate::few::{Dots, in_chunks, sums_by};
use crate::product::Sizes;

/// Products of eight-bit weights and 16-bit activations.
pub(crate) trait Dot: Copy + Send + Sync {
    /// Activations of a group, up to [`LIMIT`] in size, as they are read.
    type Words: Copy + Send + Sync;

    /// A group, in the order of its activations.
    fn words(group: &[i16; GROUP]) -> Self::Words;

    /// `Σ_group scale(row) · scale(n) · Σ_k x[row][k] · w[n][k]` for the first `R` rows.
    fn dot<const R: usize, const N: usize>(self, x: Rows<Self::Words>, w: [OfOutput; N]) -> [[f32; R]; N];
}

/// Rows of 16-bit integers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a, W> {
    /// `[rows, groups]`
    pub(crate) words: &'a [W],
    /// `[rows, groups]`
    pub(crate) scales: &'a [f32],
    /// `[rows, groups]`: what the weights' offset adds to the sums, with the sign changed.
    pub(crate) corrections: &'a [i32],
}

impl<W> Rows<'_, W> {
    /// Whether there are `R` rows for each of `w`, which have `groups` groups each.
    pub(crate) fn fit<const R: usize>(&self, groups: usize, w: &[OfOutput]) -> bool {
        w.iter().all(|w| w.0.len().div_ceil(GROUP) == groups && w.1.len() == groups)
            && self.words.len() >= R * groups
            && self.scales.len() >= R * groups
            && self.corrections.len() >= R * groups
    }
}

/// Few rows, in 16-bit integers.
pub(crate) fn few<K: Dot>(
    kernel: K,
    weight: &Int8Weight,
    x: &[bf16],
    bias: Option<&[bf16]>,
    sizes: Sizes,
    y: &mut [bf16],
) {
    let (mut words, mut scales, mut corrections) = (Vec::new(), Vec::new(), Vec::new());
    let prepare = Prepare::<K> { x, inputs: sizes.inputs, to: (&mut words, &mut scales, &mut corrections) };
    Arch::new().dispatch(prepare);
    let x = Rows { words: &words, scales: &scales, corrections: &corrections };
    in_chunks(sizes, bias, y, |outputs, sums| {
        sums_by(&Operands { kernel, x, weight }, sizes.rows, outputs.start, sums);
    });
}

/// Turns rows into integers.
struct Prepare<'a, K: Dot> {
    x: &'a [bf16],
    inputs: usize,
    /// Words, scales and corrections.
    to: (&'a mut Vec<K::Words>, &'a mut Vec<f32>, &'a mut Vec<i32>),
}

impl<K: Dot> WithSimd for Prepare<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (words, scales, corrections) = self.to;
        for numbers in self.x.chunks_exact(self.inputs).flat_map(|row| row.chunks(GROUP)) {
            let mut group = [0; GROUP];
            let (scale, sum) = integers(numbers, f32::from(LIMIT), &mut group, |integer| integer as i16);
            words.push(K::words(&group));
            scales.push(scale);
            corrections.push(sum.wrapping_mul(-OFFSET));
        }
    }
}

struct Operands<'a, K: Dot> {
    kernel: K,
    x: Rows<'a, K::Words>,
    weight: &'a Int8Weight,
}

impl<K: Dot> Dots for Operands<'_, K> {
    #[inline]
    fn dots<const R: usize, const N: usize>(&self, row: usize, outputs: [usize; N]) -> [[f32; R]; N] {
        let first = row * self.weight.groups();
        let Rows { words, scales, corrections } = self.x;
        let x = Rows { words: &words[first..], scales: &scales[first..], corrections: &corrections[first..] };
        self.kernel.dot(x, outputs.map(|n| self.weight.row(n)))
    }
}
