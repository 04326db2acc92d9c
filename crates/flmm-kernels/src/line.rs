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
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = crate::avx2::Avx2::detect() {
        return avx2.transpose(block);
    }
    for row in 0..LANES {
        for column in 0..row {
            let above = block[column].0[row];
            block[column].0[row] = block[row].0[column];
            block[row].0[column] = above;
        }
    }
}

/// Rows of a matrix, as far apart as they lie, that are soon needed: they are asked for a few cache lines at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ahead {
    /// Where the next line begins.
    next: *const u8,
    /// Lines of the row that have not been asked for.
    left: usize,
    /// Lines of a row.
    width: usize,
    /// Rows after this one.
    rows: usize,
    /// Bytes from the end of a row to the beginning of the next.
    gap: usize,
}

impl Ahead {
    /// Nothing.
    pub(crate) const NONE: Self = Self { next: std::ptr::null(), left: 0, width: 0, rows: 0, gap: 0 };

    /// The first `columns` of `rows` rows, which begin at `first` and `width` numbers apart.
    pub(crate) fn new<T>(first: *const T, width: usize, rows: usize, columns: usize) -> Self {
        let lines = (columns * size_of::<T>()).div_ceil(size_of::<Line>());
        let Some(rows) = rows.checked_sub(1).filter(|_| lines > 0) else { return Self::NONE };
        let gap = (width * size_of::<T>()).wrapping_sub(lines * size_of::<Line>());
        Self { next: first.cast(), left: lines, width: lines, rows, gap }
    }

    /// All of `lines`.
    pub(crate) fn all(lines: &[Line]) -> Self {
        Self { next: lines.as_ptr().cast(), left: lines.len(), ..Self::NONE }
    }

    /// How many lines to [`Ahead::fetch`] at a time if it is called `times` times.
    pub(crate) fn share(&self, times: usize) -> usize {
        (self.left + self.rows * self.width).div_ceil(times.max(1))
    }

    /// Asks for the next `count` lines to be brought near, without waiting for them.
    #[inline(always)]
    pub(crate) fn fetch(&mut self, count: usize) {
        for _ in 0..count {
            if self.left == 0 {
                if self.rows == 0 {
                    return;
                }
                self.rows -= 1;
                self.left = self.width;
                self.next = self.next.wrapping_add(self.gap);
            }
            prefetch(self.next);
            self.left -= 1;
            self.next = self.next.wrapping_add(size_of::<Line>());
        }
    }
}

/// Bytes of weights that are asked for ahead of those that are multiplied: a page, where the processor's own asking ends.
pub(crate) const AHEAD: usize = 4096;

/// Asks for a cache line to be brought into the second-level cache.
#[inline(always)]
#[allow(unsafe_code, reason = "a prefetch takes a pointer")]
pub(crate) fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: prefetching has no effect on memory and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) }
    }
    // Elsewhere there is no instruction for it that Rust knows.
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
