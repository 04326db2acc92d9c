//! Kernels in AVX-512 and AVX512-BF16 instructions.
#![allow(unsafe_code, reason = "vendor intrinsics take pointers and need a processor that has them")]

use std::arch::x86_64::*;

use half::bf16;

use crate::few::{Dots, Operands};
use crate::kernel::Weights;
use crate::line::{AHEAD, LANES, Line, prefetch};
use crate::peak::SUMS;

/// Proof that the processor has AVX-512 (F, BW, VL).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

/// Proof that the processor has AVX512-BF16 besides.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512Bf16(());

impl Avx512 {
    /// The proof, on such a processor.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        all.then_some(Self(()))
    }

    /// Transposes a block of 16 × 16 units.
    pub(crate) fn transpose(self, block: &mut [Line; LANES]) {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { transpose(block) }
    }
}

impl Avx512Bf16 {
    /// The proof, on such a processor.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (Avx512::detect().is_some() && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
    }

    /// As [`crate::kernel::Kernel::tile`], for `V` lines and `N` outputs.
    #[inline]
    pub(crate) fn tile<const V: usize, const N: usize>(
        self,
        a: &[Line],
        b: Weights,
        c: &mut [Line],
        add: bool,
    ) {
        assert!(a.len() >= b.depth * V && b.step == LANES && b.has(N));
        assert!(c.len() >= N * V);
        // SAFETY: `self` proves that the processor has the instructions; the lengths were checked.
        unsafe { tile::<V, N>(a.as_ptr(), b, c.as_mut_ptr(), add) }
    }

    /// Multiplies and adds in registers, [`SUMS`] instructions a turn.
    pub(crate) fn spin(self, turns: usize) -> f32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { spin(turns) }
    }
}

impl Dots for Operands<'_, Avx512Bf16, bf16, bf16> {
    #[inline]
    fn dots<const R: usize, const N: usize>(&self, row: usize, outputs: [usize; N]) -> [[f32; R]; N] {
        let (x, w) = self.of(row, outputs);
        assert!(x.len() >= R * self.inputs);
        // SAFETY: the kernel proves that the processor has the instructions; rows of `w` are `inputs` numbers, and the
        // length of `x` was checked.
        unsafe { dots(x.as_ptr().cast(), w.map(|w| w.as_ptr().cast()), self.inputs) }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile<const V: usize, const N: usize>(a: *const Line, b: Weights, c: *mut Line, add: bool) {
    let mut sums = [[_mm512_setzero_ps(); V]; N];
    let weights = b.units.as_ptr();
    for k in 0..b.depth {
        // SAFETY: the caller checked that `a` has `depth · V` lines and `b` has `N` outputs of `depth` units.
        unsafe {
            let rows: [__m512i; V] = std::array::from_fn(|v| _mm512_load_si512(a.add(k * V + v).cast()));
            for (n, sums) in sums.iter_mut().enumerate() {
                let weight = _mm512_set1_epi32(*weights.add(n * b.stride + k) as i32);
                for (sum, &row) in sums.iter_mut().zip(&rows) {
                    *sum = _mm512_dpbf16_ps(*sum, pairs(row), pairs(weight));
                }
            }
        }
    }
    for (n, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: the caller checked that `c` has `N · V` lines.
            unsafe {
                let to: *mut f32 = c.add(n * V + v).cast();
                let sum = if add { _mm512_add_ps(_mm512_load_ps(to), sum) } else { sum };
                _mm512_store_ps(to, sum);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(units: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes without invalid values.
    unsafe { std::mem::transmute(units) }
}

/// Vectors of one row that are summed apart, so that no sum waits for the one before.
const CHAINS: usize = 4;

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn dots<const R: usize, const N: usize>(
    x: *const u16,
    w: [*const u16; N],
    len: usize,
) -> [[f32; R]; N] {
    let mut sums = [[[_mm512_setzero_ps(); R]; N]; CHAINS];
    let mut k = 0;
    while k + 32 * CHAINS <= len {
        for (chain, sums) in sums.iter_mut().enumerate() {
            let at = k + 32 * chain;
            // SAFETY: the loop's condition keeps all reads below `len`, and the caller checked `x` for R rows, `w` for N.
            unsafe {
                let rows: [__m512i; R] =
                    std::array::from_fn(|r| _mm512_loadu_si512(x.add(r * len + at).cast()));
                for (w, sums) in w.iter().zip(sums.iter_mut()) {
                    prefetch(w.wrapping_add(at).cast::<u8>().wrapping_add(AHEAD));
                    let weight = _mm512_loadu_si512(w.add(at).cast());
                    for (sum, &row) in sums.iter_mut().zip(&rows) {
                        *sum = _mm512_dpbf16_ps(*sum, pairs(row), pairs(weight));
                    }
                }
            }
        }
        k += 32 * CHAINS;
    }
    while k < len {
        let mask: u32 = if len - k >= 32 { u32::MAX } else { (1 << (len - k)) - 1 };
        // SAFETY: the mask keeps all reads below `len`.
        unsafe {
            for (w, sums) in w.iter().zip(sums[0].iter_mut()) {
                let weight = _mm512_maskz_loadu_epi16(mask, w.add(k).cast());
                for (r, sum) in sums.iter_mut().enumerate() {
                    let row = _mm512_maskz_loadu_epi16(mask, x.add(r * len + k).cast());
                    *sum = _mm512_dpbf16_ps(*sum, pairs(row), pairs(weight));
                }
            }
        }
        k += 32;
    }
    let [a, b, c, d] = sums;
    std::array::from_fn(|n| {
        std::array::from_fn(|r| {
            let (ab, cd) = (_mm512_add_ps(a[n][r], b[n][r]), _mm512_add_ps(c[n][r], d[n][r]));
            _mm512_reduce_add_ps(_mm512_add_ps(ab, cd))
        })
    })
}

#[target_feature(enable = "avx512f")]
fn transpose(block: &mut [Line; LANES]) {
    let rows: [__m512i; 16] = std::array::from_fn(|i| {
        // SAFETY: a line is 64 aligned bytes.
        unsafe { _mm512_load_si512(std::ptr::from_ref(&block[i]).cast()) }
    });
    // Units, pairs of units, then quarters of vectors change places.
    let ones: [__m512i; 16] = std::array::from_fn(|i| {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
    });
    let twos: [__m512i; 16] = std::array::from_fn(|i| {
        // Of rows 4g..4g+4, column i % 4 of every quarter.
        let (g, column) = (i & !3, i % 4);
        let (a, b) = (ones[g + column / 2], ones[g + 2 + column / 2]);
        if column % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
    });
    let halves: [__m512i; 16] = std::array::from_fn(|i| {
        // (rows 0–7 or 8–15) of column i % 4: quarters 0 and 2, or 1 and 3.
        let (column, high, odd) = (i % 4, i / 8 * 8, (i / 4) % 2 == 1);
        let (a, b) = (twos[high + column], twos[high + 4 + column]);
        if odd { _mm512_shuffle_i32x4::<0xdd>(a, b) } else { _mm512_shuffle_i32x4::<0x88>(a, b) }
    });
    for (i, line) in block.iter_mut().enumerate() {
        // Column i lies in quarter i / 4 at place i % 4.
        let (column, quarter) = (i % 4, i / 4);
        let (a, b) = (halves[quarter % 2 * 4 + column], halves[8 + quarter % 2 * 4 + column]);
        let full =
            if quarter < 2 { _mm512_shuffle_i32x4::<0x88>(a, b) } else { _mm512_shuffle_i32x4::<0xdd>(a, b) };
        // SAFETY: a line is 64 aligned bytes.
        unsafe { _mm512_store_si512(std::ptr::from_mut(line).cast(), full) }
    }
}

/// As [`Avx512Bf16::spin`].
#[target_feature(enable = "avx512f,avx512bf16")]
fn spin(turns: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); SUMS];
    // Pairs of ones.
    let ones = pairs(_mm512_set1_epi32(0x3f80_3f80));
    for _ in 0..turns {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, ones, ones);
        }
    }
    sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
}
