//! Products of integers in AVX512-VNNI instructions.
#![allow(unsafe_code, reason = "vendor intrinsics take pointers and need a processor that has them")]

use std::arch::x86_64::*;

use half::bf16;

use crate::avx512::Avx512;
use crate::int4::{self, Block, GROUP_BYTES, GROUPS};
use crate::int8::{self, GROUP, OfOutput, Words};
use crate::kernel::OUTPUTS;
use crate::line::{AHEAD, LANES, Line, prefetch};
use crate::peak::SUMS;

/// Units of four bytes that a group has.
pub(crate) const GROUP_UNITS: usize = GROUP / 4;

/// Proof that the processor has AVX-512 (F, BW, VL) and AVX512-VNNI.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vnni(());

/// Activations of a register block: for each group, `lines` lines of each operand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quantised<'a> {
    /// `[groups, units of a group, lines]`: four signed bytes to a unit.
    pub(crate) units: &'a [Line],
    /// `[groups, lines]` in f32: what the integers are multiplied by.
    pub(crate) scales: &'a [Line],
    /// `[groups, lines]` in i32: what the weights' offset adds to the sums, with the sign changed.
    pub(crate) corrections: &'a [Line],
    pub(crate) lines: usize,
}

/// Weights of a register block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes<'a> {
    /// `[OUTPUTS, groups, units of a group]`: four unsigned bytes to a unit.
    pub(crate) units: &'a [u32],
    /// `[OUTPUTS, groups]`
    pub(crate) scales: &'a [f32],
    pub(crate) groups: usize,
}

impl Vnni {
    /// The proof, on such a processor.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (Avx512::detect().is_some() && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
    }

    /// `c[n][row] (+)= Σ_group scale(row) · scale(n) · Σ_k x[k][row] · w[n][k]`, laid out as in
    /// [`crate::kernel::Kernel::tile`]; at most four lines.
    #[inline]
    pub(crate) fn tile(self, x: Quantised, w: Bytes, c: &mut [Line], add: bool) {
        let lines = x.lines;
        assert!(x.units.len() >= w.groups * GROUP_UNITS * lines);
        assert!(x.scales.len() >= w.groups * lines && x.corrections.len() >= w.groups * lines);
        assert!(w.units.len() >= OUTPUTS * w.groups * GROUP_UNITS && w.scales.len() >= OUTPUTS * w.groups);
        assert!((1..=4).contains(&lines) && c.len() >= OUTPUTS * lines);
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe {
            match lines {
                1 => tile::<1>(x, w, c.as_mut_ptr(), add),
                2 => tile::<2>(x, w, c.as_mut_ptr(), add),
                3 => tile::<3>(x, w, c.as_mut_ptr(), add),
                _ => tile::<4>(x, w, c.as_mut_ptr(), add),
            }
        }
    }

    /// Multiplies and adds in registers, [`SUMS`] instructions a turn.
    pub(crate) fn spin(self, turns: usize) -> i32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { spin(turns) }
    }
}

impl int8::Dot for Vnni {
    #[inline]
    fn dot<const R: usize, const N: usize>(self, x: Words, w: [OfOutput; N]) -> [[f32; R]; N] {
        let groups = w[0].1.len();
        assert!(x.fit::<R>(groups, &w));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        w.map(|(w, scales)| unsafe { dot::<R>(x.numbers, x.scales, x.corrections, w, scales) })
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile<const V: usize>(x: Quantised, w: Bytes, c: *mut Line, add: bool) {
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
                    let weight = _mm512_set1_epi32(*weights.add(n * w.groups * GROUP_UNITS + k) as i32);
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

/// Numbers of a vector of 16-bit integers.
const WORDS: usize = 2 * LANES;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn dot<const R: usize>(
    x: &[i16],
    row_scales: &[f32],
    corrections: &[i32],
    w: &[u8],
    scales: &[f32],
) -> [f32; R] {
    let groups = scales.len();
    let mut totals = [_mm512_setzero_ps(); R];
    for (group, &scale) in scales.iter().enumerate() {
        // The correction stands in one lane.
        let mut sums: [__m512i; R] =
            std::array::from_fn(|r| _mm512_maskz_set1_epi32(1, corrections[r * groups + group]));
        let bytes = w.len() - (group * GROUP).min(w.len());
        for line in (0..GROUP).step_by(size_of::<Line>()) {
            prefetch(w.as_ptr().wrapping_add(group * GROUP + line + AHEAD));
        }
        for k in (0..GROUP.min(bytes)).step_by(WORDS) {
            let mask = if bytes - k >= WORDS { u32::MAX } else { (1 << (bytes - k)) - 1 };
            // SAFETY: the mask keeps reads of `w` inside; the caller checked `x` for `R` rows of whole groups.
            unsafe {
                let weight = _mm256_maskz_loadu_epi8(mask, w.as_ptr().add(group * GROUP + k).cast());
                let weight = _mm512_cvtepu8_epi16(weight);
                for (r, sum) in sums.iter_mut().enumerate() {
                    let row = _mm512_loadu_si512(x.as_ptr().add((r * groups + group) * GROUP + k).cast());
                    *sum = _mm512_dpwssd_epi32(*sum, weight, row);
                }
            }
        }
        for (r, (total, &sum)) in totals.iter_mut().zip(&sums).enumerate() {
            let scale = _mm512_set1_ps(scale * row_scales[r * groups + group]);
            *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
        }
    }
    totals.map(|total| _mm512_reduce_add_ps(total))
}

impl int4::Dot for Vnni {
    #[inline]
    fn dot<const R: usize>(self, x: &[Block], nibbles: &[u8], scales: &[bf16]) -> [f32; R] {
        assert!(nibbles.len() == scales.len() * GROUP_BYTES);
        assert!(x.len() >= R * scales.len().div_ceil(GROUPS));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe { dot4::<R>(x, nibbles, scales) }
    }
}

/// As [`int4::Dot::dot`]. A lane sums the four bytes at its place, of both halves: all of one group.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn dot4<const R: usize>(x: &[Block], nibbles: &[u8], scales: &[bf16]) -> [f32; R] {
    let blocks = scales.len().div_ceil(GROUPS);
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
    let mut totals = [_mm512_setzero_ps(); R];
    for block in 0..blocks {
        let groups = (scales.len() - block * GROUPS).min(GROUPS);
        // SAFETY: the masks keep reads within the groups that are left; the caller checked `x` for `R` rows of blocks.
        unsafe {
            let bytes = nibbles.as_ptr().add(block * GROUPS * GROUP_BYTES);
            prefetch(bytes.wrapping_add(AHEAD));
            let bytes = match groups {
                GROUPS => _mm512_loadu_si512(bytes.cast()),
                _ => _mm512_maskz_loadu_epi32((1 << (4 * groups)) - 1, bytes.cast()),
            };
            let scales = scales.as_ptr().add(block * GROUPS);
            let scales = match groups {
                GROUPS => _mm_loadu_si64(scales.cast()),
                _ => _mm_maskz_loadu_epi16((1 << groups) - 1, scales.cast()),
            };
            let scales = _mm512_maskz_permutexvar_epi16(0xaaaa_aaaa, spread, _mm512_castsi128_si512(scales));
            let low = _mm512_and_si512(bytes, halves);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), halves);
            for (r, total) in totals.iter_mut().enumerate() {
                let x = &x[r * blocks + block];
                let load = |numbers: &[i8; 64]| _mm512_loadu_si512(numbers.as_ptr().cast());
                let lower = _mm512_loadu_si512(x.corrections.as_ptr().cast());
                let lower = _mm512_dpbusd_epi32(lower, low, load(&x.low[0]));
                let lower = _mm512_dpbusd_epi32(lower, high, load(&x.low[1]));
                let upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, load(&x.high[0]));
                let upper = _mm512_dpbusd_epi32(upper, high, load(&x.high[1]));
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), lower);
                let scale = _mm512_mul_ps(_mm512_castsi512_ps(scales), _mm512_set1_ps(x.scale));
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
            }
        }
    }
    totals.map(|total| _mm512_reduce_add_ps(total))
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
