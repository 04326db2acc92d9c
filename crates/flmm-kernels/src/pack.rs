//! Operands of products of many rows in the order in which kernels read them.

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::element::Units;
use crate::kernel::{Blocking, Kernel};
use crate::line::{Ahead, LANES, Line, transpose};

/// `x [rows, inputs]` in units: one behind the other the parts of up to [`Blocking::depth`] units, of each the panels
/// of up to [`Blocking::panel`] lines, each `[units, lines]`.
pub(crate) struct Packed {
    lines: Vec<Line>,
    /// Lines that hold all rows of one unit.
    width: usize,
    /// Of a row, filled up to a multiple of [`LANES`].
    pub(crate) units: usize,
    pub(crate) blocking: Blocking,
}

impl Packed {
    pub(crate) fn new<T: Copy + Send + Sync, U: Units<T>>(
        x: &[T],
        rows: usize,
        inputs: usize,
        blocking: Blocking,
        arch: Arch,
    ) -> Self {
        let Blocking { panel, depth, .. } = blocking;
        let width = rows.div_ceil(LANES);
        let units = inputs.div_ceil(U::PER_UNIT).next_multiple_of(LANES);
        let mut lines: Vec<Line> = bytemuck::zeroed_vec(width * units);
        let parts = lines.par_chunks_mut((width * depth).max(1)).enumerate();
        let panels = parts.flat_map(|(part, lines)| {
            let units = lines.len() / width;
            let panels = lines.par_chunks_mut(panel * units).enumerate();
            panels
                .map(move |(index, lines)| (part * depth..part * depth + units, index * panel * LANES, lines))
        });
        panels.for_each(|(units, first, lines)| {
            arch.dispatch(Pack::<T, U> {
                x: &x[first * inputs..],
                rows: rows - first,
                inputs,
                columns: units.start * U::PER_UNIT..inputs.min(units.end * U::PER_UNIT),
                lines,
                units: units.len(),
                how: PhantomData,
            });
        });
        Self { lines, width, units, blocking }
    }

    /// Units `from..from + depth`, a whole part, of the panels of `lines`.
    pub(crate) fn panels(&self, lines: Range<usize>, from: usize, depth: usize) -> &[Line] {
        &self.lines[from * self.width..][lines.start * depth..lines.end * depth]
    }
}

/// Packs columns of the first rows of `x [rows, inputs]` into one panel.
pub(crate) struct Pack<'a, T, U> {
    pub(crate) x: &'a [T],
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    /// The inputs that are packed.
    pub(crate) columns: Range<usize>,
    /// `[units, lines]`
    pub(crate) lines: &'a mut [Line],
    pub(crate) units: usize,
    pub(crate) how: PhantomData<U>,
}

impl<T: Copy, U: Units<T>> WithSimd for Pack<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, rows, inputs, columns, lines, units, .. } = self;
        let count = lines.len() / units;
        for line in 0..count {
            for k in (0..units).step_by(LANES) {
                let mut block = [Line::ZERO; LANES];
                let from = (columns.start + k * U::PER_UNIT).min(columns.end);
                let some = columns.end - from;
                for (row, units) in (line * LANES..rows).zip(&mut block) {
                    let x = &x[row * inputs..][..inputs][from..];
                    // A length that the compiler knows saves a call.
                    match some >= LANES * U::PER_UNIT {
                        true => U::write(&x[..LANES * U::PER_UNIT], &mut units.0),
                        false => U::write(&x[..some], &mut units.0),
                    }
                }
                transpose(&mut block);
                let to = lines[k * count..].iter_mut().skip(line).step_by(count);
                to.zip(block).for_each(|(to, from)| *to = from);
            }
        }
    }
}

/// Columns of some rows of weights.
pub(crate) struct Part<'a, T, U, K> {
    pub(crate) kernel: K,
    /// `[rows that exist, inputs]`
    pub(crate) weight: &'a [T],
    pub(crate) inputs: usize,
    pub(crate) columns: Range<usize>,
    /// Among those that are packed.
    pub(crate) rows: Range<usize>,
    /// Units of a packed row.
    pub(crate) depth: usize,
    pub(crate) how: PhantomData<U>,
}

impl<T, U, K> Part<'_, T, U, K> {
    /// Its columns, to be asked for.
    pub(crate) fn ahead(&self) -> Ahead {
        let first = self.weight.as_ptr().wrapping_add(self.columns.start);
        Ahead::new(first, self.inputs, self.weight.len() / self.inputs, self.columns.len())
    }
}

/// Packs a part where [`Kernel::blocks`] wants it; rows that do not exist are zeros.
pub(crate) struct PackPart<'a, 'b, T, U, K>(pub(crate) Part<'a, T, U, K>, pub(crate) &'b mut [u32]);

impl<T: Copy, U: Units<T>, K: Kernel> WithSimd for PackPart<'_, '_, T, U, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(Part { kernel, weight, inputs, columns, rows, depth, .. }, units) = self;
        let ([stride, step], outputs) = (kernel.layout(depth), kernel.outputs());
        let mut weight = weight.chunks_exact(inputs);
        for n in rows {
            let row = weight.next().map_or(&[][..], |row| &row[columns.clone()]);
            let to = &mut units[n / outputs * outputs * depth + n % outputs * stride..];
            let mut places = to.chunks_mut(step).take(depth / LANES);
            let mut parts = row.chunks_exact(LANES * U::PER_UNIT);
            for (part, to) in parts.by_ref().zip(places.by_ref()) {
                U::write(part, &mut to[..LANES]);
            }
            let mut last = parts.remainder();
            for to in places {
                U::write(last, &mut to[..LANES]);
                last = &[];
            }
        }
    }
}
