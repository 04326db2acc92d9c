//! From sums to results: transposed, with a bias, rounded, in the rows they belong to.
#![allow(unsafe_code, reason = "threads write disjoint columns of one matrix")]

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::element::Float;
use crate::line::{Ahead, LANES, Line, transpose};

/// Adds `bias`, rounds, and writes the sums of a chunk to their columns of `y`.
pub(crate) struct Finish<'a, O> {
    /// `[panels, outputs, lines of a panel]`
    pub(crate) sums: &'a [Line],
    pub(crate) lines: usize,
    /// Most lines of a panel.
    pub(crate) panel: usize,
    /// That `sums` has room for. Sums that do not exist are not written, but there are lines for a multiple of [`LANES`].
    pub(crate) outputs: usize,
    pub(crate) bias: Option<&'a [O]>,
    pub(crate) y: &'a Columns<'a, O>,
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

impl<O: Float> WithSimd for Finish<'_, O> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        // `[16, outputs]`: rows of the result are written one after the other, whole cache lines of each.
        let width = self.columns.len().div_ceil(LANES);
        let mut rows = vec![Line::ZERO; LANES * width];
        for line in 0..self.lines {
            let within = line % self.panel;
            let count = self.panel.min(self.lines - (line - within));
            let sums = &self.sums[(line - within) * self.outputs + within..];
            let first = self.rows.start + line * LANES;
            let next = first + LANES..self.rows.end.min(first + 2 * LANES);
            let mut ahead = self.y.ahead(next, self.columns.clone());
            let share = ahead.share(width);
            for at in 0..width {
                ahead.fetch(share);
                let mut block: [Line; LANES] = std::array::from_fn(|n| sums[(at * LANES + n) * count]);
                transpose(&mut block);
                rows[at..].iter_mut().step_by(width).zip(block).for_each(|(to, from)| *to = from);
            }
            for (row, sums) in (first..self.rows.end).zip(rows.chunks_exact(width)) {
                // SAFETY: no other task writes these rows and columns.
                let y = unsafe { self.y.part(row, self.columns.clone()) };
                let sums: &[f32] = bytemuck::cast_slice(sums);
                round(sums, self.bias, y);
            }
        }
    }
}

/// Adds `bias` to the sums of a row, and rounds.
#[inline(always)]
pub(crate) fn round<O: Float>(sums: &[f32], bias: Option<&[O]>, y: &mut [O]) {
    match bias {
        Some(bias) => {
            for ((y, sum), bias) in y.iter_mut().zip(sums).zip(bias) {
                *y = O::round(sum + bias.widen());
            }
        }
        None => y.iter_mut().zip(sums).for_each(|(y, &sum)| *y = O::round(sum)),
    }
}

/// A matrix `[.., outputs]` that several threads write.
pub(crate) struct Columns<'a, O> {
    start: *mut O,
    len: usize,
    outputs: usize,
    /// Nobody else reaches the matrix meanwhile.
    matrix: PhantomData<&'a mut [O]>,
}

// SAFETY: the callers of `part` see to it that no element is reached twice.
unsafe impl<O: Send> Sync for Columns<'_, O> {}

impl<'a, O: Copy> Columns<'a, O> {
    /// `y [.., outputs]`.
    pub(crate) fn new(y: &'a mut [O], outputs: usize) -> Self {
        Self { start: y.as_mut_ptr(), len: y.len(), outputs, matrix: PhantomData }
    }

    /// The `columns` of `rows`, to be asked for before they are written.
    fn ahead(&self, rows: Range<usize>, columns: Range<usize>) -> Ahead {
        let first = self.start.wrapping_add(rows.start * self.outputs + columns.start);
        Ahead::new(first, self.outputs, rows.len(), columns.len())
    }

    /// The `columns` of `row`.
    ///
    /// # Safety
    /// Nobody else may reach these elements meanwhile.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "the caller promises that parts are apart")]
    unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [O] {
        let at = row * self.outputs + columns.start;
        assert!(columns.end <= self.outputs && at + columns.len() <= self.len);
        // SAFETY: in bounds, as just checked, of a matrix that is borrowed; not shared, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), columns.len()) }
    }
}
