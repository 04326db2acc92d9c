//! Weights of four bits: groups of 32 neighbouring inputs share a scale.
//!
//! Few rows: weights are read as they are packed, and multiplied as integers by activations of 16 bits. Many rows: weights
//! are turned into bf16, a few rows at a time, and multiplied as bf16 is; with AVX2, as integers too.

use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::element::Pairs;
use crate::element::{Float, Singles};
use crate::few::{Dots, FEW, in_chunks, sums_by};
use crate::int8;
use crate::kernel::Wide;
use crate::product::{self, Sizes, WeightRows};

/// Inputs that share a scale.
pub(crate) const GROUP: usize = 32;
/// Bytes of a group.
pub(crate) const GROUP_BYTES: usize = GROUP / 2;
/// Groups that are multiplied at once: their bytes fill a vector of 512 bits.
pub(crate) const GROUPS: usize = 4;
/// Inputs of that many groups; their activations share a scale.
const BLOCK: usize = GROUPS * GROUP;
/// What is added to a weight so that it has no sign.
const OFFSET: i32 = 8;

/// Bytes and scales of an output.
pub(crate) type OfOutput<'a> = (&'a [u8], &'a [bf16]);

/// A weight `[outputs, inputs]` in four bits: `(number − 8) · scale of its group`, numbers from 0 to 15.
///
/// A byte holds an input in its low half, and in its high half the input 16 further on in the same group.
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Weight {
    /// `[outputs, groups, 16]`
    nibbles: Vec<u8>,
    /// `[outputs, groups]`; may be negative.
    scales: Vec<bf16>,
    inputs: usize,
}

impl Int4Weight {
    /// A near such weight: of every 32 inputs of an output, the largest becomes about −8, by the scale of a few that makes
    /// the sum of squared errors least.
    ///
    /// # Panics
    /// If `weight` is not whole rows of `inputs` numbers.
    pub fn quantise(weight: &[bf16], inputs: usize) -> Self {
        assert!(
            inputs > 0 && weight.len().is_multiple_of(inputs),
            "{} numbers are not rows of {inputs}",
            weight.len()
        );
        let (outputs, groups) = (weight.len() / inputs, inputs.div_ceil(GROUP));
        let (mut nibbles, mut scales) =
            (vec![0u8; outputs * groups * GROUP_BYTES], vec![bf16::ZERO; outputs * groups]);
        let rows = nibbles.par_chunks_mut(groups * GROUP_BYTES).zip(scales.par_chunks_mut(groups));
        rows.zip(weight.par_chunks(inputs)).for_each(|((nibbles, scales), weight)| {
            Arch::new().dispatch(Quantise { weight, nibbles, scales });
        });
        Self { nibbles, scales, inputs }
    }

    /// A weight of `[outputs, inputs]` from what [`Int4Weight::parts`] gave; `None` if the lengths do not fit.
    pub fn from_parts(nibbles: Vec<u8>, scales: Vec<bf16>, [outputs, inputs]: [usize; 2]) -> Option<Self> {
        let [bytes, groups] = Self::part_sizes(inputs);
        let fits = inputs > 0
            && Some(nibbles.len()) == outputs.checked_mul(bytes)
            && Some(scales.len()) == outputs.checked_mul(groups);
        fits.then_some(Self { nibbles, scales, inputs })
    }

    /// Bytes `[outputs, bytes of an output]` and scales `[outputs, groups]`.
    pub fn parts(&self) -> (&[u8], &[bf16]) {
        (&self.nibbles, &self.scales)
    }

    /// Bytes and scales that an output of `inputs` has.
    pub fn part_sizes(inputs: usize) -> [usize; 2] {
        let groups = inputs.div_ceil(GROUP);
        [groups * GROUP_BYTES, groups]
    }

    /// Rows.
    pub fn outputs(&self) -> usize {
        self.scales.len() / self.groups()
    }

    /// Columns.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.nibbles.len() + size_of_val(&self.scales[..])
    }

    /// `y = x·weightᵀ + bias` in bf16: `x [rows, inputs]`, `bias [outputs]`, `y [rows, outputs]`.
    ///
    /// # Panics
    /// If a slice is not whole rows.
    pub fn multiply(&self, x: &[bf16], bias: Option<&[bf16]>, y: &mut [bf16]) {
        let (inputs, outputs) = (self.inputs, self.outputs());
        let sizes = Sizes { rows: x.len() / inputs, inputs, outputs };
        assert!(x.len().is_multiple_of(inputs), "{} numbers are not rows of {inputs}", x.len());
        assert_eq!(y.len(), sizes.rows * outputs, "y is not [{}, {outputs}]", sizes.rows);
        assert!(bias.is_none_or(|bias| bias.len() == outputs), "the bias is not [{outputs}]");
        if y.is_empty() {
            return;
        }
        if sizes.rows <= FEW {
            #[cfg(target_arch = "x86_64")]
            if let Some(vnni) = crate::vnni::Vnni::detect() {
                return few(vnni, self, x, bias, sizes, y);
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(avx2) = crate::avx2::Avx2::detect() {
                return few(avx2, self, x, bias, sizes, y);
            }
            return few(Plain, self, x, bias, sizes, y);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) = crate::amx::Amx::detect() {
            return product::product::<_, Pairs, _>(amx, x, self, bias, sizes, y);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(native) = crate::avx512::Avx512Bf16::detect() {
            return product::product::<_, Pairs, _>(native, x, self, bias, sizes, y);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = int8::in_words() {
            return int8::many(avx2, self, x, bias, sizes, y);
        }
        product::product::<_, Singles, _>(Wide::new(), x, self, bias, sizes, y);
    }

    fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// Bytes and scales of output `n`.
    fn row(&self, n: usize) -> OfOutput<'_> {
        let groups = self.groups();
        (
            &self.nibbles[n * groups * GROUP_BYTES..][..groups * GROUP_BYTES],
            &self.scales[n * groups..][..groups],
        )
    }
}

/// Turns a row of weights into numbers and scales.
struct Quantise<'a> {
    weight: &'a [bf16],
    nibbles: &'a mut [u8],
    scales: &'a mut [bf16],
}

/// What the largest weight of a group is tried as. Weights beyond −8 and 7 are cut off, which pays where the largest stands
/// alone.
const LARGEST: [f32; 10] = [-8.0, -6.5, -6.75, -7.0, -7.25, -7.5, -7.75, -8.25, -8.5, -9.0];

impl WithSimd for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let groups = self.weight.chunks(GROUP).zip(self.nibbles.as_chunks_mut::<GROUP_BYTES>().0);
        for ((weight, nibbles), scale) in groups.zip(self.scales) {
            let mut numbers = [0f32; GROUP];
            weight.convert_to_f32_slice(&mut numbers[..weight.len()]);
            let largest = numbers.iter().fold(0f32, |a, &x| if x.abs() > a.abs() { x } else { a });
            let (mut best, mut least) = ([0f32; GROUP], f32::INFINITY);
            *scale = bf16::ZERO;
            let unit = largest.recip();
            for as_this in LARGEST {
                let tried = <bf16 as Float>::round(largest / as_this);
                let inverse = tried.to_f32().recip();
                // Without a finite quotient all numbers are zero, or as good as zero.
                if !inverse.is_finite() || !unit.is_finite() {
                    continue;
                }
                let (mut integers, mut errors) = ([0f32; GROUP], [0f32; GROUP]);
                for ((integer, error), x) in integers.iter_mut().zip(&mut errors).zip(&numbers) {
                    *integer = (x * inverse).round_ties_even().clamp(-8.0, 7.0);
                    *error = (x - *integer * tried.to_f32()) * unit;
                }
                let mut sums = [0f32; 8];
                for errors in errors.as_chunks::<8>().0 {
                    sums.iter_mut().zip(errors).for_each(|(sum, error)| *sum += error * error);
                }
                // A sum term by term would wait for every term before.
                let [a, b, c, d, e, f, g, h] = sums;
                let error = (a + b) + (c + d) + ((e + f) + (g + h));
                if error < least {
                    (best, least, *scale) = (integers, error, tried);
                }
            }
            let (low, high) = best.split_at(GROUP_BYTES);
            for ((byte, low), high) in nibbles.iter_mut().zip(low).zip(high) {
                *byte = (*low as i32 + OFFSET) as u8 | ((*high as i32 + OFFSET) as u8) << 4;
            }
        }
    }
}

impl WeightRows<bf16> for Int4Weight {
    fn rows<'a>(&'a self, rows: Range<usize>, _: usize, space: &'a mut Vec<bf16>) -> &'a [bf16] {
        space.resize(rows.len() * self.inputs, bf16::ZERO);
        for (n, to) in rows.zip(space.chunks_exact_mut(self.inputs)) {
            let (nibbles, scales) = self.row(n);
            Arch::new().dispatch(Widen { nibbles, scales, to });
        }
        space
    }
}

#[cfg(target_arch = "x86_64")]
impl int8::IntegerRows for Int4Weight {
    const SCALES: usize = GROUPS;

    fn all_groups(&self) -> Range<usize> {
        0..self.inputs.div_ceil(BLOCK)
    }

    fn bytes_of(&self, n: usize, groups: Range<usize>) -> &[u8] {
        let bytes = self.row(n).0;
        &bytes[groups.start * BLOCK / 2..bytes.len().min(groups.end * BLOCK / 2)]
    }

    fn write<K: int8::Tile>(&self, n: usize, groups: Range<usize>, to: &mut [K::Weight], scales: &mut [f32]) {
        let bytes = self.bytes_of(n, groups.clone());
        let (full, padding) = to.split_at_mut(2 * bytes.len());
        let numbers = full.as_chunks_mut::<GROUP>().0.iter_mut();
        for (to, bytes) in numbers.zip(bytes.as_chunks::<GROUP_BYTES>().0) {
            let (low, high) = to.split_at_mut(GROUP_BYTES);
            for (byte, (low, high)) in bytes.iter().zip(low.iter_mut().zip(high)) {
                (*low, *high) = (K::weight((byte & 15) as i8 - 8), K::weight((byte >> 4) as i8 - 8));
            }
        }
        padding.fill(K::weight(0));
        let from = &self.row(n).1[groups.start * GROUPS..];
        let (full, padding) = scales.split_at_mut(from.len().min(scales.len()));
        from[..full.len()].convert_to_f32_slice(full);
        padding.fill(0.0);
    }
}

/// Writes an output's weights as bf16.
struct Widen<'a> {
    nibbles: &'a [u8],
    scales: &'a [bf16],
    to: &'a mut [bf16],
}

impl WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let groups = self.nibbles.as_chunks::<GROUP_BYTES>().0.iter().zip(self.scales);
        for (to, (nibbles, scale)) in self.to.chunks_mut(GROUP).zip(groups) {
            let scale = scale.widen();
            let mut numbers = [0u8; GROUP];
            let (low, high) = numbers.split_at_mut(GROUP_BYTES);
            for (byte, (low, high)) in nibbles.iter().zip(low.iter_mut().zip(high)) {
                (*low, *high) = (byte & 15, byte >> 4);
            }
            for (to, &number) in to.iter_mut().zip(&numbers) {
                *to = <bf16 as Float>::round((i32::from(number) - OFFSET) as f32 * scale);
            }
        }
    }
}

/// Activations that meet [`GROUPS`] groups of weights: 16-bit integers in two signed bytes each, `256 · high + low`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Block {
    /// High bytes: first the partners of low halves of the weights' bytes, in the order of those, then of high halves.
    pub(crate) high: [[i8; BLOCK / 2]; 2],
    /// Low bytes in the same order.
    pub(crate) low: [[i8; BLOCK / 2]; 2],
    /// What the weights' offset adds to a group's sum, with the sign changed, at the first of four places of each group.
    pub(crate) corrections: [i32; 4 * GROUPS],
    /// What the integers are multiplied by.
    pub(crate) scale: f32,
}

impl Block {
    /// Up to [`BLOCK`] activations; what is missing is zero.
    #[inline(always)]
    fn new(numbers: &[bf16]) -> Self {
        let half = [0; BLOCK / 2];
        let mut block = Self { high: [half; 2], low: [half; 2], corrections: [0; 4 * GROUPS], scale: 0.0 };
        let mut integers = [0; BLOCK];
        let limit = f32::from(int8::LIMIT);
        (block.scale, _) = int8::integers(numbers, limit, &mut integers, |integer| integer as i16);
        for (group, numbers) in integers.as_chunks::<GROUP>().0.iter().enumerate() {
            for (side, numbers) in numbers.as_chunks::<GROUP_BYTES>().0.iter().enumerate() {
                let places = group * GROUP_BYTES..(group + 1) * GROUP_BYTES;
                let bytes = block.high[side][places.clone()].iter_mut().zip(&mut block.low[side][places]);
                for ((high, low), &integer) in bytes.zip(numbers) {
                    [*high, *low] = int8::halves(integer);
                }
            }
            let sum: i32 = numbers.iter().map(|&integer| i32::from(integer)).sum();
            block.corrections[4 * group] = -OFFSET * sum;
        }
        block
    }
}

/// Products of packed weights and activations.
pub(crate) trait Dot: Copy + Send + Sync {
    /// `Σ_block scale · Σ_group scale(group) · Σ_k x[row][k] · w[n][k]` for `R` rows, which lie one after the other.
    fn dot<const R: usize, const N: usize>(self, x: &[Block], w: [OfOutput; N]) -> [[f32; R]; N];
}

/// Whether `x` has `R` rows for each of `w`, which have `groups` groups each.
pub(crate) fn fit<const R: usize>(x: &[Block], groups: usize, w: &[OfOutput]) -> bool {
    w.iter().all(|w| w.0.len() == groups * GROUP_BYTES && w.1.len() == groups)
        && x.len() >= R * groups.div_ceil(GROUPS)
}

/// Without any vector unit that is known by name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plain;

impl Dot for Plain {
    fn dot<const R: usize, const N: usize>(self, x: &[Block], w: [OfOutput; N]) -> [[f32; R]; N] {
        w.map(|(nibbles, scales)| {
            let blocks = scales.len().div_ceil(GROUPS);
            std::array::from_fn(|row| {
                let mut total = 0.0;
                for (group, (nibbles, scale)) in
                    nibbles.as_chunks::<GROUP_BYTES>().0.iter().zip(scales).enumerate()
                {
                    let (block, group) = (&x[row * blocks + group / GROUPS], group % GROUPS);
                    let mut sum = block.corrections[4 * group];
                    for (k, byte) in nibbles.iter().enumerate() {
                        let place = group * GROUP_BYTES + k;
                        let number = |side: usize| {
                            256 * i32::from(block.high[side][place]) + i32::from(block.low[side][place])
                        };
                        sum += i32::from(byte & 15) * number(0) + i32::from(byte >> 4) * number(1);
                    }
                    total += sum as f32 * (block.scale * scale.to_f32());
                }
                total
            })
        })
    }
}

/// Few rows, in integers.
pub(crate) fn few(
    dot: impl Dot,
    weight: &Int4Weight,
    x: &[bf16],
    bias: Option<&[bf16]>,
    sizes: Sizes,
    y: &mut [bf16],
) {
    let blocks = sizes.inputs.div_ceil(BLOCK);
    let x = Arch::new().dispatch(Prepare { x, inputs: sizes.inputs });
    in_chunks(sizes, bias, y, |outputs, sums| {
        sums_by(&Operands { dot, x: &x, blocks, weight }, sizes.rows, outputs.start, sums);
    });
}

/// Turns rows into integers.
struct Prepare<'a> {
    x: &'a [bf16],
    inputs: usize,
}

impl WithSimd for Prepare<'_> {
    type Output = Vec<Block>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<Block> {
        let mut blocks = Vec::with_capacity(self.x.len().div_ceil(BLOCK));
        for numbers in self.x.chunks_exact(self.inputs).flat_map(|row| row.chunks(BLOCK)) {
            blocks.push(Block::new(numbers));
        }
        blocks
    }
}

struct Operands<'a, D> {
    dot: D,
    /// `[rows, blocks]`
    x: &'a [Block],
    blocks: usize,
    weight: &'a Int4Weight,
}

impl<D: Dot> Dots for Operands<'_, D> {
    #[inline]
    fn dots<const R: usize, const N: usize>(&self, row: usize, outputs: [usize; N]) -> [[f32; R]; N] {
        self.dot.dot(&self.x[row * self.blocks..], outputs.map(|n| self.weight.row(n)))
    }
}
