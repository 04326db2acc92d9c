//! Weights of eight bits: groups of neighbouring inputs share a scale.
//!
//! Few rows: activations are turned into 16-bit integers, of which nothing is noticed, and weights are read as they are.
//! Many rows: the same with AVX2; AVX512-VNNI takes activations of 8 bits, twice as many at a time; where there are AMX
//! tiles, weights are turned into bf16 instead, a few rows at a time.

#[cfg(target_arch = "x86_64")]
mod few;
#[cfg(target_arch = "x86_64")]
mod many;

use std::ops::Range;

use half::bf16;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use crate::element::Pairs;
use crate::element::{Float, Singles};
use crate::few::FEW;
use crate::kernel::Wide;
use crate::product::{self, Sizes, WeightRows};

#[cfg(target_arch = "x86_64")]
pub(crate) use few::{Dot, Rows, few};
#[cfg(target_arch = "x86_64")]
pub(crate) use many::{DEPTH, IntegerRows, Integers, Quantised, Tile, fit, many};

/// Inputs that share a scale.
pub(crate) const GROUP: usize = 128;
/// What is added to a weight so that it has no sign.
pub(crate) const OFFSET: i32 = 128;

/// Bytes and scales of an output.
pub(crate) type OfOutput<'a> = (&'a [u8], &'a [bf16]);

/// A weight `[outputs, inputs]` in eight bits: `(byte − 128) · scale of its group`.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Weight {
    /// `[outputs, inputs]`
    bytes: Vec<u8>,
    /// `[outputs, groups]`
    scales: Vec<bf16>,
    inputs: usize,
}

impl Int8Weight {
    /// The nearest such weight: of every 128 inputs of an output the largest becomes ±127, or ±126 where the scale had to be
    /// rounded up to a bf16.
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
        let (mut bytes, mut scales) = (vec![0u8; weight.len()], vec![bf16::ZERO; outputs * groups]);
        let rows =
            bytes.par_chunks_mut(inputs).zip(scales.par_chunks_mut(groups)).zip(weight.par_chunks(inputs));
        rows.for_each(|((bytes, scales), weight)| {
            for ((bytes, scale), weight) in bytes.chunks_mut(GROUP).zip(scales).zip(weight.chunks(GROUP)) {
                *scale = rounded_up(largest(weight) / 127.0);
                let inverse = scale.widen().recip();
                let inverse = if inverse.is_finite() { inverse } else { 0.0 };
                for (byte, x) in bytes.iter_mut().zip(weight) {
                    *byte = nearest(x.to_f32() * inverse).wrapping_add(OFFSET) as u8;
                }
            }
        });
        Self { bytes, scales, inputs }
    }

    /// A weight of `[outputs, inputs]` from its bytes, `[outputs, inputs]`, and scales, `[outputs, groups]`, as
    /// [`Int8Weight::parts`] gave them; `None` if the lengths do not fit.
    pub fn from_parts(bytes: Vec<u8>, scales: Vec<bf16>, [outputs, inputs]: [usize; 2]) -> Option<Self> {
        let [width, groups] = Self::part_sizes(inputs);
        let fits = inputs > 0
            && Some(bytes.len()) == outputs.checked_mul(width)
            && Some(scales.len()) == outputs.checked_mul(groups);
        fits.then_some(Self { bytes, scales, inputs })
    }

    /// Bytes `[outputs, inputs]` and scales `[outputs, groups]`.
    pub fn parts(&self) -> (&[u8], &[bf16]) {
        (&self.bytes, &self.scales)
    }

    /// Bytes and scales that an output of `inputs` has.
    pub fn part_sizes(inputs: usize) -> [usize; 2] {
        [inputs, inputs.div_ceil(GROUP)]
    }

    /// Rows.
    pub fn outputs(&self) -> usize {
        self.bytes.len() / self.inputs
    }

    /// Columns.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.bytes.len() + size_of_val(&self.scales[..])
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
        // Tiles multiply bf16 faster than anything else multiplies integers with a scale for every 128 of them.
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) = crate::amx::Amx::detect().filter(|_| sizes.rows > FEW) {
            return product::product::<_, Pairs, _>(amx, x, self, bias, sizes, y);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(vnni) = crate::vnni::Vnni::detect() {
            return match sizes.rows <= FEW {
                true => few(vnni, self, x, bias, sizes, y),
                false => many(vnni, self, x, bias, sizes, y),
            };
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = Avx2::detect().filter(|_| sizes.rows <= FEW) {
            return few(avx2, self, x, bias, sizes, y);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = in_words() {
            return many(avx2, self, x, bias, sizes, y);
        }
        self.widened(Wide::new(), x, bias, sizes, y);
    }

    /// As [`Int8Weight::multiply`], with weights that are widened a few rows at a time.
    pub(crate) fn widened(
        &self,
        wide: Wide,
        x: &[bf16],
        bias: Option<&[bf16]>,
        sizes: Sizes,
        y: &mut [bf16],
    ) {
        match sizes.rows <= FEW {
            true => crate::few::product(wide, x, self, bias, sizes, y),
            false => product::product::<_, Singles, _>(wide, x, self, bias, sizes, y),
        }
    }

    fn groups(&self) -> usize {
        self.inputs.div_ceil(GROUP)
    }

    /// Bytes and scales of output `n`.
    fn row(&self, n: usize) -> OfOutput<'_> {
        (&self.bytes[n * self.inputs..][..self.inputs], &self.scales[n * self.groups()..][..self.groups()])
    }
}

impl WeightRows<bf16> for Int8Weight {
    fn rows<'a>(&'a self, rows: Range<usize>, _: usize, space: &'a mut Vec<bf16>) -> &'a [bf16] {
        space.resize(rows.len() * self.inputs, bf16::ZERO);
        for (n, to) in rows.zip(space.chunks_exact_mut(self.inputs)) {
            let (bytes, scales) = self.row(n);
            Arch::new().dispatch(Widen { bytes, scales, to });
        }
        space
    }
}

/// Writes an output's weights as bf16.
struct Widen<'a> {
    bytes: &'a [u8],
    scales: &'a [bf16],
    to: &'a mut [bf16],
}

impl WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let groups = self.to.chunks_mut(GROUP).zip(self.bytes.chunks(GROUP)).zip(self.scales);
        for ((to, bytes), scale) in groups {
            let scale = scale.widen();
            for (to, &byte) in to.iter_mut().zip(bytes) {
                *to = <bf16 as Float>::round((i32::from(byte) - OFFSET) as f32 * scale);
            }
        }
    }
}

/// What multiplies many rows in 16-bit integers where nothing takes 8-bit ones: vectors of 512 bits are as fast in f32.
#[cfg(target_arch = "x86_64")]
pub(crate) fn in_words() -> Option<Avx2> {
    Avx2::detect().filter(|_| crate::avx512::Avx512::detect().is_none())
}

/// The smallest bf16 that is not less than `x`, a number without sign.
fn rounded_up(x: f32) -> bf16 {
    bf16::from_bits((x.to_bits().saturating_add(0xffff) >> 16) as u16)
}

/// The nearest integer, ties to even, to a number of at most 22 bits; any integer for one that is not finite. Neither
/// `f32::round_ties_even`, a call of a function where instructions for it are not taken for granted, nor `as`, which looks
/// for what does not fit.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    // Adding this number leaves the integer in the lowest bits.
    const ROUNDER: f32 = 12_582_912.0;
    (x + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32
}

/// Largest of the numbers, without sign; NaN if there is one.
#[inline(always)]
fn largest(numbers: &[bf16]) -> f32 {
    // As integers, whose order is that of the numbers, and of which several are compared at once.
    let bits = numbers.iter().fold(0u16, |largest, x| largest.max(x.to_bits() & 0x7fff));
    bf16::from_bits(bits).to_f32()
}

/// The largest 16-bit integer whose two bytes both have a sign.
pub(crate) const LIMIT: i16 = 0x7f7f;

/// An integer up to [`LIMIT`] in size as two bytes with a sign, `256 · high + low`.
#[inline(always)]
pub(crate) fn halves(integer: i16) -> [i8; 2] {
    let low = integer as i8;
    [((integer - i16::from(low)) >> 8) as i8, low]
}

/// Writes `numbers` as integers up to `limit`, each as `narrow` makes it, and returns scale and sum.
#[inline(always)]
pub(crate) fn integers<T>(
    numbers: &[bf16],
    limit: f32,
    to: &mut [T; GROUP],
    narrow: impl Fn(i32) -> T,
) -> (f32, i32) {
    let largest = largest(numbers);
    // Without a finite quotient all numbers are zero, or as good as zero.
    let inverse = limit / largest;
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut sum = 0i32;
    for (to, x) in to.iter_mut().zip(numbers) {
        let integer = nearest(x.widen() * inverse);
        sum = integer.wrapping_add(sum);
        *to = narrow(integer);
    }
    (largest / limit, sum)
}
