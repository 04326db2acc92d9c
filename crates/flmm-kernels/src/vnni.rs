//! Products of integers in AVX512-VNNI instructions.
#![allow(unsafe_code, reason = "vendor intrinsics take pointers and need a processor that has them")]

use std::arch::x86_64::*;

use crate::avx512::Avx512;
use crate::element::Float;
use crate::int4::{self, Block, GROUP_BYTES, GROUPS};
use crate::int8::{self, DEPTH, GROUP, Integers, OFFSET, OfOutput, Quantised, Rows};
use crate::kernel::OUTPUTS;
use crate::line::{AHEAD, LANES, Line, prefetch};
use crate::peak::SUMS;

/// Proof that the processor has AVX-512 (F, BW, VL) and AVX512-VNNI.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vnni(());

impl Vnni {
    /// The proof, on such a processor.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (Avx512::detect().is_some() && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
    }

    /// Multiplies and adds in registers, [`SUMS`] instructions a turn.
    pub(crate) fn spin(self, turns: usize) -> i32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { spin(turns) }
    }
}

impl int8::Tile for Vnni {
    type Activation = i8;
    type Weight = u8;

    const LIMIT: i16 = 127;
    const PANEL: usize = 4;

    #[inline(always)]
    fn narrow(integer: i32) -> i8 {
        integer as i8
    }

    #[inline(always)]
    fn weight(integer: i8) -> u8 {
        (i32::from(integer) + OFFSET) as u8
    }

    #[inline]
    fn tile(self, x: Quantised, w: Integers, c: &mut [Line], add: bool) {
        // A correction is that of a whole group.
        assert!(int8::fit::<Self>(&x, &w, c) && w.scales_of_group == 1);
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe {
            match x.lines {
                1 => tile::<1>(x, w, c.as_mut_ptr(), add),
                2 => tile::<2>(x, w, c.as_mut_ptr(), add),
                3 => tile::<3>(x, w, c.as_mut_ptr(), add),
                _ => tile::<4>(x, w, c.as_mut_ptr(), add),
            }
        }
    }
}

/// Units of a group of many rows.
const GROUP_UNITS: usize = <Vnni as int8::Tile>::UNITS;

/// Activations of a group of eight-bit weights: high bytes of 16-bit integers, then low ones, all with a sign.
type Words = [[i8; GROUP]; 2];

impl int8::Dot for Vnni {
    type Words = Words;

    #[inline(always)]
    fn words(group: &[i16; GROUP]) -> Words {
        [group.map(|integer| int8::halves(integer)[0]), group.map(|integer| int8::halves(integer)[1])]
    }

    #[inline]
    fn dot<const R: usize, const N: usize>(self, x: Rows<Words>, w: [OfOutput; N]) -> [[f32; R]; N] {
        let groups = w[0].1.len();
        assert!(x.fit::<R>(groups, &w));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe { dot8(x, w, groups) }
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile<const V: usize>(x: Quantised, w: Integers, c: *mut Line, add: bool) {
    for group in 0..w.groups {
        // SAFETY: the caller checked all operands for `w.groups` groups and `c` for all outputs.
        unsafe {
            let start: [__m512i; V] =
                std::array::from_fn(|v| _mm512_load_si512(x.corrections.as_ptr().add(group * V + v).cast()));
            let mut sums = [start; OUTPUTS];
            let units = x.units.as_ptr().add(group * GROUP_UNITS * V);
            let weights = w.units.as_ptr().add(group * GROUP_UNITS);
            for k in 0..GROUP_UNITS {
                let rows: [__m512i; V] =
                    std::array::from_fn(|v| _mm512_load_si512(units.add(k * V + v).cast()));
                for (n, sums) in sums.iter_mut().enumerate() {
                    let weight = _mm512_set1_epi32(*weights.add(n * DEPTH + k) as i32);
                    for (sum, &row) in sums.iter_mut().zip(&rows) {
                        *sum = _mm512_dpbusd_epi32(*sum, weight, row);
                    }
                }
            }
            let row_scales: [__m512; V] =
                std::array::from_fn(|v| _mm512_load_ps(x.scales.as_ptr().add(group * V + v).cast()));
            for (n, sums) in sums.iter().enumerate() {
                let scale = _mm512_set1_ps(*w.scales.as_ptr().add(n * w.groups + group));
                for (v, (&sum, &row_scale)) in sums.iter().zip(&row_scales).enumerate() {
                    let to: *mut f32 = c.add(n * V + v).cast();
                    let before = if add || group > 0 { _mm512_load_ps(to) } else { _mm512_setzero_ps() };
                    let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), row_scale);
                    _mm512_store_ps(to, _mm512_fmadd_ps(sum, scale, before));
                }
            }
        }
    }
}

/// Numbers of a vector of bytes.
const BYTES: usize = size_of::<Line>();

/// As [`int8::Dot::dot`]. A lane sums eight products of 255 · 128 at most for each byte of the activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn dot8<const R: usize, const N: usize>(
    x: Rows<Words>,
    w: [OfOutput; N],
    groups: usize,
) -> [[f32; R]; N] {
    let len = w[0].0.len();
    let mut totals = [[_mm512_setzero_ps(); N]; R];
    for group in 0..groups {
        let from = group * GROUP;
        if group % (2 * LANES) == 0 {
            w.iter()
                .for_each(|(_, scales)| prefetch(scales.as_ptr().wrapping_add(group + AHEAD / GROUP).cast()));
        }
        // SAFETY: the caller checked `x` for `R` rows of `groups` groups, and that each of `w` has `len` bytes and `groups`
        // scales. Bytes behind the last are not read, but asked for.
        unsafe {
            let weights: [[__m512i; 2]; N] = std::array::from_fn(|n| {
                std::array::from_fn(|k| {
                    let at = from + k * BYTES;
                    let bytes = w[n].0.as_ptr().wrapping_add(at);
                    // Its neighbour comes along.
                    if k == 0 {
                        prefetch(bytes.wrapping_add(AHEAD));
                    }
                    match len.saturating_sub(at) {
                        BYTES.. => _mm512_loadu_si512(bytes.cast()),
                        left => _mm512_maskz_loadu_epi8((1 << left) - 1, bytes.cast()),
                    }
                })
            });
            for (r, totals) in totals.iter_mut().enumerate() {
                let at = r * groups + group;
                let [high, low]: &Words = &*x.words.as_ptr().add(at);
                // The correction stands in one lane.
                let correction = _mm512_zextsi128_si512(_mm_cvtsi32_si128(*x.corrections.as_ptr().add(at)));
                for ((total, weights), (_, scales)) in totals.iter_mut().zip(&weights).zip(&w) {
                    let (mut upper, mut lower) = (_mm512_setzero_si512(), correction);
                    for (k, &weights) in weights.iter().enumerate() {
                        let number = |x: &[i8; GROUP]| _mm512_loadu_si512(x.as_ptr().add(k * BYTES).cast());
                        upper = _mm512_dpbusd_epi32(upper, weights, number(high));
                        lower = _mm512_dpbusd_epi32(lower, weights, number(low));
                    }
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), lower);
                    let scale = scales.get_unchecked(group).widen() * *x.scales.as_ptr().add(at);
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), *total);
                }
            }
        }
    }
    std::array::from_fn(|n| std::array::from_fn(|r| _mm512_reduce_add_ps(totals[r][n])))
}

impl int4::Dot for Vnni {
    #[inline]
    fn dot<const R: usize, const N: usize>(self, x: &[Block], w: [int4::OfOutput; N]) -> [[f32; R]; N] {
        let groups = w[0].1.len();
        assert!(int4::fit::<R>(x, groups, &w));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe { dot4(x, w, groups) }
    }
}

/// As [`int4::Dot::dot`]. A lane sums the four bytes at its place, of both halves: all of one group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn dot4<const R: usize, const N: usize>(
    x: &[Block],
    w: [int4::OfOutput; N],
    groups: usize,
) -> [[f32; R]; N] {
    let blocks = groups.div_ceil(GROUPS);
    let halves = _mm512_set1_epi8(15);
    // Scale of group i becomes the upper half of lanes 4i to 4i + 3.
    let spread = _mm512_set_epi32(
        3 << 16,
        3 << 16,
        3 << 16,
        3 << 16,
        2 << 16,
        2 << 16,
        2 << 16,
        2 << 16,
        1 << 16,
        1 << 16,
        1 << 16,
        1 << 16,
        0,
        0,
        0,
        0,
    );
    let mut totals = [[_mm512_setzero_ps(); N]; R];
    for block in 0..blocks {
        let left = (groups - block * GROUPS).min(GROUPS);
        // SAFETY: the masks keep reads within the groups that are left, of which the caller checked each of `w`; it checked
        // `x` for `R` rows of blocks.
        unsafe {
            let mut weights = [[_mm512_setzero_si512(); 2]; N];
            let mut of_groups = [_mm512_setzero_ps(); N];
            for (n, (nibbles, scales)) in w.iter().enumerate() {
                let bytes = nibbles.as_ptr().add(block * GROUPS * GROUP_BYTES);
                let scales = scales.as_ptr().add(block * GROUPS);
                prefetch(bytes.wrapping_add(AHEAD));
                if block % (LANES / 2) == 0 {
                    prefetch(scales.wrapping_add(AHEAD / GROUP_BYTES).cast());
                }
                let (bytes, scales) = match left {
                    GROUPS => (_mm512_loadu_si512(bytes.cast()), _mm_loadu_si64(scales.cast())),
                    _ => (
                        _mm512_maskz_loadu_epi32((1 << (4 * left)) - 1, bytes.cast()),
                        _mm_maskz_loadu_epi16((1 << left) - 1, scales.cast()),
                    ),
                };
                weights[n] = [
                    _mm512_and_si512(bytes, halves),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), halves),
                ];
                of_groups[n] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
                    0xaaaa_aaaa,
                    spread,
                    _mm512_castsi128_si512(scales),
                ));
            }
            for (r, totals) in totals.iter_mut().enumerate() {
                let x = &*x.as_ptr().add(r * blocks + block);
                let load = |numbers: &[i8; 64]| _mm512_load_si512(numbers.as_ptr().cast());
                let [high, low] = [x.high.each_ref().map(load), x.low.each_ref().map(load)];
                let corrections = _mm512_load_si512(x.corrections.as_ptr().cast());
                let scale = _mm512_set1_ps(x.scale);
                for ((total, weights), &of_groups) in totals.iter_mut().zip(&weights).zip(&of_groups) {
                    let (mut upper, mut lower) = (_mm512_setzero_si512(), corrections);
                    for ((&weights, &high), &low) in weights.iter().zip(&high).zip(&low) {
                        upper = _mm512_dpbusd_epi32(upper, weights, high);
                        lower = _mm512_dpbusd_epi32(lower, weights, low);
                    }
                    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), lower);
                    let scale = _mm512_mul_ps(of_groups, scale);
                    *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
                }
            }
        }
    }
    std::array::from_fn(|n| std::array::from_fn(|r| _mm512_reduce_add_ps(totals[r][n])))
}

/// As [`Vnni::spin`].
#[target_feature(enable = "avx512f,avx512vnni")]
fn spin(turns: usize) -> i32 {
    let mut sums = [_mm512_setzero_si512(); SUMS];
    let ones = _mm512_set1_epi8(1);
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, ones, ones);
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_epi32(sum)).fold(0, i32::wrapping_add)
}
