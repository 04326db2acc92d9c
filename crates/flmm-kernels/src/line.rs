//! Cache lines of 32-bit units, the form in which all packed operands lie.

/// Units of a line: lanes of the widest vector.
pub(crate) const LANES: usize = 16;

/// One cache line of sixteen 32-bit units, each of which holds one f32, two bf16 or four int8.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; LANES]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; LANES]);

    /// A line of f32 numbers.
    #[inline(always)]
    pub(crate) fn of(numbers: [f32; LANES]) -> Self {
        Self(numbers.map(f32::to_bits))
    }

    /// Unit `i` as an f32.
    #[inline(always)]
    pub(crate) fn float(&self, i: usize) -> f32 {
        f32::from_bits(self.0[i])
    }
}

/// Transposes a block of 16 × 16 units.
#[inline]
pub(crate) fn transpose(block: &mut [Line; LANES]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(avx512) = crate::avx512::Avx512::detect() {
        return avx512.transpose(block);
    }
    for row in 0..LANES {
        for column in 0..row {
            let above = block[column].0[row];
            block[column].0[row] = block[row].0[column];
            block[row].0[column] = above;
        }
    }
}

/// Asks for `data` to be brought near, without waiting for it.
#[inline(always)]
#[allow(unsafe_code, reason = "a prefetch takes a pointer")]
pub(crate) fn prefetch<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in data.chunks(size_of::<Line>() / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: prefetching has no effect on memory and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
    // Elsewhere there is no instruction for it that Rust knows.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}
