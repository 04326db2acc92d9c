//! Products of a few rows with weights of few bits, and transposition, in AVX2 instructions.
#![allow(unsafe_code, reason = "vendor intrinsics take pointers and need a processor that has them")]

use std::arch::x86_64::*;

use half::bf16;

use crate::element::Float;
use crate::int4::{self, Block, GROUP_BYTES, GROUPS};
use crate::int8::{self, DEPTH, GROUP, Integers, LIMIT, OfOutput, Quantised, Rows};
use crate::kernel::OUTPUTS;
use crate::line::{AHEAD, LANES, Line, prefetch};
use crate::peak::SUMS;

/// Proof that the processor has AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, on such a processor.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }
}

impl Avx2 {
    /// Transposes a block of 16 × 16 units.
    pub(crate) fn transpose(self, block: &mut [Line; LANES]) {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { transpose(block) }
    }

    /// Multiplies and adds words in registers, [`SUMS`] times a turn.
    pub(crate) fn spin(self, turns: usize) -> i32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { spin(turns) }
    }
}

impl int4::Dot for Avx2 {
    #[inline]
    fn dot<const R: usize, const N: usize>(self, x: &[Block], w: [int4::OfOutput; N]) -> [[f32; R]; N] {
        assert!(int4::fit::<R>(x, w[0].1.len(), &w));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        w.map(|(nibbles, scales)| unsafe { dot4(x, nibbles, scales) })
    }
}

/// As [`int4::Dot::dot`], of one output: two groups at a time, the first in the lower half of a vector. A lane sums four bytes at its
/// place, of both halves.
#[target_feature(enable = "avx2,fma")]
unsafe fn dot4<const R: usize>(x: &[Block], nibbles: &[u8], scales: &[bf16]) -> [f32; R] {
    let blocks = scales.len().div_ceil(GROUPS);
    let (fifteen, one) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut totals = [_mm256_setzero_ps(); R];
    for block in 0..blocks {
        // What is missing behind the last group is zero.
        let (mut last_bytes, mut last_scales) = ([0u8; GROUPS * GROUP_BYTES], [bf16::ZERO; GROUPS]);
        let (mut bytes, mut of_groups) = (&nibbles[block * last_bytes.len()..], &scales[block * GROUPS..]);
        if of_groups.len() < GROUPS {
            last_bytes[..bytes.len()].copy_from_slice(bytes);
            last_scales[..of_groups.len()].copy_from_slice(of_groups);
            (bytes, of_groups) = (&last_bytes, &last_scales);
        }
        prefetch(bytes.as_ptr().wrapping_add(AHEAD));
        if block % (LANES / 2) == 0 {
            prefetch(of_groups.as_ptr().wrapping_add(AHEAD / GROUP_BYTES).cast());
        }
        // SAFETY: there are four scales, and bytes of four groups; the caller checked `x` for `R` rows of blocks.
        unsafe {
            let of_groups = _mm_cvtepu16_epi32(_mm_loadl_epi64(of_groups.as_ptr().cast()));
            let of_groups = _mm256_castps128_ps256(_mm_castsi128_ps(_mm_slli_epi32::<16>(of_groups)));
            let mut sums = [_mm256_setzero_ps(); R];
            for pair in 0..GROUPS / 2 {
                let bytes = _mm256_loadu_si256(bytes.as_ptr().add(pair * 2 * GROUP_BYTES).cast());
                let low = _mm256_and_si256(bytes, fifteen);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), fifteen);
                let spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
                let spread = _mm256_add_epi32(spread, _mm256_set1_epi32(2 * pair as i32));
                let scale = _mm256_permutevar8x32_ps(of_groups, spread);
                for (r, of_block) in sums.iter_mut().enumerate() {
                    let x = &*x.as_ptr().add(r * blocks + block);
                    let load = |numbers: &[i8; 64]| {
                        _mm256_loadu_si256(numbers.as_ptr().add(pair * 2 * GROUP_BYTES).cast())
                    };
                    // At most 4 · 15 · 128 in size: far from what 16 bits hold.
                    let product = |numbers: &[[i8; 64]; 2]| {
                        let low = _mm256_maddubs_epi16(low, load(&numbers[0]));
                        _mm256_add_epi16(low, _mm256_maddubs_epi16(high, load(&numbers[1])))
                    };
                    let upper = _mm256_madd_epi16(product(&x.high), _mm256_slli_epi16::<8>(one));
                    let lower = _mm256_madd_epi16(product(&x.low), one);
                    let corrections = _mm256_loadu_si256(x.corrections.as_ptr().add(8 * pair).cast());
                    let sum = _mm256_add_epi32(upper, _mm256_add_epi32(lower, corrections));
                    *of_block = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, *of_block);
                }
            }
            for (r, (total, &sum)) in totals.iter_mut().zip(&sums).enumerate() {
                let scale = _mm256_set1_ps((*x.as_ptr().add(r * blocks + block)).scale);
                *total = _mm256_fmadd_ps(sum, scale, *total);
            }
        }
    }
    let mut results = [0f32; R];
    for (result, &total) in results.iter_mut().zip(&totals) {
        *result = sum(total);
    }
    results
}

/// Of all lanes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn sum(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Activations of a group of eight-bit weights: of every 32 first those at even places, then those at odd ones, as a vector of
/// bytes comes apart.
type Words = [i16; GROUP];

impl int8::Dot for Avx2 {
    type Words = Words;

    #[inline(always)]
    fn words(group: &[i16; GROUP]) -> Words {
        let mut words = [0; GROUP];
        for (words, group) in words.as_chunks_mut::<BYTES>().0.iter_mut().zip(group.as_chunks::<BYTES>().0) {
            let (even, odd) = words.split_at_mut(WORDS);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(group.as_chunks::<2>().0) {
                [*even, *odd] = *pair;
            }
        }
        words
    }

    #[inline]
    fn dot<const R: usize, const N: usize>(self, x: Rows<Words>, w: [OfOutput; N]) -> [[f32; R]; N] {
        let groups = w[0].1.len();
        assert!(x.fit::<R>(groups, &w));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe { dot8(x, w, groups) }
    }
}

/// Numbers of a vector of 16-bit integers, and of bytes.
const WORDS: usize = 16;
const BYTES: usize = 2 * WORDS;

/// As [`int8::Dot::dot`]. A lane sums 16 products of 255 · 32639 at most, with the correction: what 32 bits hold.
#[target_feature(enable = "avx2,fma")]
unsafe fn dot8<const R: usize, const N: usize>(
    x: Rows<Words>,
    w: [OfOutput; N],
    groups: usize,
) -> [[f32; R]; N] {
    let len = w[0].0.len();
    let mut totals = [[_mm256_setzero_ps(); R]; N];
    for group in 0..groups {
        let from = group * GROUP;
        // SAFETY: the caller checked `x` for `R` rows of `groups` groups, and that each of `w` has `len` bytes and `groups`
        // scales. Bytes behind the last are not read, but asked for.
        unsafe {
            // The correction stands in one lane.
            let mut sums = [[_mm256_setzero_si256(); R]; N];
            for sums in &mut sums {
                for (r, sum) in sums.iter_mut().enumerate() {
                    let correction = _mm_cvtsi32_si128(*x.corrections.as_ptr().add(r * groups + group));
                    *sum = _mm256_zextsi128_si256(correction);
                }
            }
            let row = |r: usize, k: usize| {
                _mm256_loadu_si256(x.words.as_ptr().add(r * groups + group).cast::<i16>().add(k).cast())
            };
            if len - from >= GROUP {
                for (bytes, scales) in &w {
                    for line in (0..GROUP).step_by(size_of::<Line>()) {
                        prefetch(bytes.as_ptr().wrapping_add(from + line + AHEAD));
                    }
                    if group % (2 * LANES) == 0 {
                        prefetch(scales.as_ptr().wrapping_add(group + AHEAD / GROUP).cast());
                    }
                }
                for k in (0..GROUP).step_by(BYTES) {
                    for ((bytes, _), sums) in w.iter().zip(&mut sums) {
                        let bytes = _mm256_loadu_si256(bytes.as_ptr().add(from + k).cast());
                        add8(sums, bytes, |r, half| row(r, k + half));
                    }
                }
            } else {
                for ((bytes, _), sums) in w.iter().zip(&mut sums) {
                    for (at, bytes) in bytes[from..].chunks(BYTES).enumerate() {
                        let mut all = [0u8; BYTES];
                        all[..bytes.len()].copy_from_slice(bytes);
                        add8(sums, _mm256_loadu_si256(all.as_ptr().cast()), |r, k| row(r, at * BYTES + k));
                    }
                }
            }
            for ((totals, sums), (_, scales)) in totals.iter_mut().zip(&sums).zip(&w) {
                for (r, (total, &sum)) in totals.iter_mut().zip(sums).enumerate() {
                    let scale =
                        scales.get_unchecked(group).widen() * *x.scales.as_ptr().add(r * groups + group);
                    *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), *total);
                }
            }
        }
    }
    let mut results = [[0f32; R]; N];
    for (results, totals) in results.iter_mut().zip(&totals) {
        for (result, &total) in results.iter_mut().zip(totals) {
            *result = sum(total);
        }
    }
    results
}

/// Adds the products of 32 bytes of an output with the numbers of every row.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add8<const R: usize>(sums: &mut [__m256i; R], bytes: __m256i, row: impl Fn(usize, usize) -> __m256i) {
    let even = _mm256_and_si256(bytes, _mm256_set1_epi16(0xff));
    let odd = _mm256_srli_epi16::<8>(bytes);
    for (r, sum) in sums.iter_mut().enumerate() {
        let products =
            _mm256_add_epi32(_mm256_madd_epi16(even, row(r, 0)), _mm256_madd_epi16(odd, row(r, WORDS)));
        *sum = _mm256_add_epi32(*sum, products);
    }
}

impl int8::Tile for Avx2 {
    type Activation = i16;
    type Weight = i16;

    const LIMIT: i16 = LIMIT;
    const PANEL: usize = 1;

    #[inline(always)]
    fn narrow(integer: i32) -> i16 {
        integer as i16
    }

    #[inline(always)]
    fn weight(integer: i8) -> i16 {
        integer.into()
    }

    #[inline]
    fn tile(self, x: Quantised, w: Integers, c: &mut [Line], add: bool) {
        assert!(int8::fit::<Self>(&x, &w, c));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe { tile(x, w, c.as_mut_ptr(), add) }
    }
}

/// Units of a group of many rows.
const GROUP_UNITS: usize = <Avx2 as int8::Tile>::UNITS;

/// As [`int8::Tile::tile`], of one line. A lane sums 128 products of 128 · 32639 at most: what 32 bits hold.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile(x: Quantised, w: Integers, c: *mut Line, add: bool) {
    // What shares a scale.
    let (parts, units) = (w.groups * w.scales_of_group, GROUP_UNITS / w.scales_of_group);
    for part in 0..parts {
        // SAFETY: the caller checked all operands for `w.groups` groups and `c` for all outputs.
        unsafe {
            let vectors = |lines: &[Line], at: usize| -> *const f32 { lines.as_ptr().add(at).cast() };
            let mut sums = [[_mm256_setzero_si256(); 2]; OUTPUTS];
            let weights = w.units.as_ptr().add(part * units);
            for k in 0..units {
                let rows = vectors(x.units, part * units + k);
                let rows = [_mm256_load_si256(rows.cast()), _mm256_load_si256(rows.add(UNITS).cast())];
                for (n, sums) in sums.iter_mut().enumerate() {
                    let weight = _mm256_set1_epi32(*weights.add(n * DEPTH + k) as i32);
                    for (sum, &row) in sums.iter_mut().zip(&rows) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(row, weight));
                    }
                }
            }
            let row_scales = vectors(x.scales, part / w.scales_of_group);
            for (n, sums) in sums.iter().enumerate() {
                let scale = _mm256_set1_ps(*w.scales.as_ptr().add(n * parts + part));
                for (v, &sum) in sums.iter().enumerate() {
                    let to: *mut f32 = c.add(n).cast::<f32>().add(v * UNITS);
                    let before = if add || part > 0 { _mm256_load_ps(to) } else { _mm256_setzero_ps() };
                    let row_scale = _mm256_load_ps(row_scales.add(v * UNITS));
                    let sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), row_scale);
                    _mm256_store_ps(to, _mm256_fmadd_ps(sum, scale, before));
                }
            }
        }
    }
}

/// Units of a vector.
const UNITS: usize = 8;

/// Quarters of 8 × 8 units, of which two change places.
#[target_feature(enable = "avx2,fma")]
fn transpose(block: &mut [Line; LANES]) {
    for (row, column) in [(0, 0), (UNITS, UNITS)] {
        let quarter = transposed(load(block, row, column));
        store(quarter, block, row, column);
    }
    let (above, below) = (transposed(load(block, 0, UNITS)), transposed(load(block, UNITS, 0)));
    store(above, block, UNITS, 0);
    store(below, block, 0, UNITS);
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load(block: &[Line; LANES], row: usize, column: usize) -> [__m256; UNITS] {
    let mut rows = [_mm256_setzero_ps(); UNITS];
    for (to, line) in rows.iter_mut().zip(&block[row..]) {
        let units: &[u32; UNITS] = &line.0.as_chunks().0[column / UNITS];
        // SAFETY: there are eight units.
        *to = unsafe { _mm256_loadu_ps(units.as_ptr().cast()) };
    }
    rows
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn store(rows: [__m256; UNITS], block: &mut [Line; LANES], row: usize, column: usize) {
    for (line, from) in block[row..].iter_mut().zip(rows) {
        let units: &mut [u32; UNITS] = &mut line.0.as_chunks_mut().0[column / UNITS];
        // SAFETY: there are eight units.
        unsafe { _mm256_storeu_ps(units.as_mut_ptr().cast(), from) };
    }
}

/// Units, pairs of units, then halves of vectors change places.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed(rows: [__m256; UNITS]) -> [__m256; UNITS] {
    let [a, b, c, d, e, f, g, h] = rows;
    // Columns 0, 1 and 4, 5 of two rows, then 2, 3 and 6, 7.
    let (ab, cd) = (
        [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)],
        [_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)],
    );
    let (ef, gh) = (
        [_mm256_unpacklo_ps(e, f), _mm256_unpackhi_ps(e, f)],
        [_mm256_unpacklo_ps(g, h), _mm256_unpackhi_ps(g, h)],
    );
    // Columns k and k + 4 of four rows.
    let upper = [
        _mm256_shuffle_ps::<0x44>(ab[0], cd[0]),
        _mm256_shuffle_ps::<0xee>(ab[0], cd[0]),
        _mm256_shuffle_ps::<0x44>(ab[1], cd[1]),
        _mm256_shuffle_ps::<0xee>(ab[1], cd[1]),
    ];
    let lower = [
        _mm256_shuffle_ps::<0x44>(ef[0], gh[0]),
        _mm256_shuffle_ps::<0xee>(ef[0], gh[0]),
        _mm256_shuffle_ps::<0x44>(ef[1], gh[1]),
        _mm256_shuffle_ps::<0xee>(ef[1], gh[1]),
    ];
    let mut columns = [_mm256_setzero_ps(); UNITS];
    for (k, (&upper, &lower)) in upper.iter().zip(&lower).enumerate() {
        columns[k] = _mm256_permute2f128_ps::<0x20>(upper, lower);
        columns[k + 4] = _mm256_permute2f128_ps::<0x31>(upper, lower);
    }
    columns
}

/// As [`Avx2::spin`].
#[target_feature(enable = "avx2,fma")]
fn spin(turns: usize) -> i32 {
    // Sixteen sums and a factor do not fit sixteen registers.
    let mut sums = [_mm256_setzero_si256(); SUMS * 3 / 4];
    let ones = _mm256_set1_epi16(std::hint::black_box(1));
    for _ in 0..turns * 4 / 3 {
        for sum in &mut sums {
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*sum, ones));
        }
    }
    let total = sums.into_iter().fold(_mm256_setzero_si256(), |all, sum| _mm256_add_epi32(all, sum));
    _mm_cvtsi128_si32(_mm256_castsi256_si128(total))
}
