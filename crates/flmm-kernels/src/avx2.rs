//! Products of packed four-bit weights in AVX2 instructions.
#![allow(unsafe_code, reason = "vendor intrinsics take pointers and need a processor that has them")]

use std::arch::x86_64::*;

use half::bf16;

use crate::int4::{Block, Dot, GROUP_BYTES, GROUPS};

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

impl Dot for Avx2 {
    #[inline]
    fn dot<const R: usize>(self, x: &[Block], nibbles: &[u8], scales: &[bf16]) -> [f32; R] {
        assert!(nibbles.len() == scales.len() * GROUP_BYTES);
        assert!(x.len() >= R * scales.len().div_ceil(GROUPS));
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe { dot::<R>(x, nibbles, scales) }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn dot<const R: usize>(x: &[Block], nibbles: &[u8], scales: &[bf16]) -> [f32; R] {
    let blocks = scales.len().div_ceil(GROUPS);
    let mut totals = [_mm256_setzero_ps(); R];
    for (group, scale) in scales.iter().enumerate() {
        // SAFETY: the caller checked that there are as many groups of bytes as scales.
        let bytes = unsafe { _mm_loadu_si128(nibbles.as_ptr().add(group * GROUP_BYTES).cast()) };
        let halves = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
        let weights = _mm256_and_si256(halves, _mm256_set1_epi8(15));
        for (r, total) in totals.iter_mut().enumerate() {
            let block = &x[r * blocks + group / GROUPS];
            let at = group % GROUPS;
            // At most 2 · 15 · 128 in size: far from what 16 bits hold.
            let product = |numbers: &[[i8; 64]; 2]| {
                // SAFETY: `at` is below the number of groups that a block has 16 bytes of on either side.
                let [low, high] = [0, 1].map(|side| unsafe {
                    _mm_loadu_si128(numbers[side].as_ptr().add(at * GROUP_BYTES).cast())
                });
                let pairs = _mm256_maddubs_epi16(weights, _mm256_set_m128i(high, low));
                _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
            };
            let (high, low) = (product(&block.high), product(&block.low));
            // The correction stands in one lane.
            let correction = _mm256_zextsi128_si256(_mm_cvtsi32_si128(block.corrections[4 * at]));
            let sum = _mm256_add_epi32(_mm256_slli_epi32::<8>(high), _mm256_add_epi32(low, correction));
            let scale = _mm256_set1_ps(block.scale * scale.to_f32());
            *total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, *total);
        }
    }
    totals.map(|total| {
        let four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps::<1>(total));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    })
}
