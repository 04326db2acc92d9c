//! Products of many rows: blocks for the caches around [`Kernel::tile`].
//!
//! Rows of `x` are packed once: side by side in lines, so that a vector holds the same column of sixteen rows. Weights
//! stay as they lie in memory, which may be a mapped file; a few of their rows at a time are copied beside one another.
#![allow(unsafe_code, reason = "threads write disjoint columns of one matrix")]

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::element::{Float, Units};
use crate::kernel::{Blocking, Kernel, Sums, Weights};
use crate::line::{Ahead, LANES, Line, transpose};

/// Sizes of `x [rows, inputs]` times `weight [outputs, inputs]`, transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of `x` and of the result.
    pub rows: usize,
    /// Columns of `x` and of the weight.
    pub inputs: usize,
    /// Rows of the weight, columns of the result.
    pub outputs: usize,
}

/// `x [rows, inputs]` in units: one behind the other the parts of up to [`Blocking::depth`] units, of each the panels of up to
/// [`Blocking::panel`] lines, each `[units, lines]`.
struct Packed {
    lines: Vec<Line>,
    /// Lines that hold all rows of one unit.
    width: usize,
    /// Of a row, filled up to a multiple of [`LANES`].
    units: usize,
}

impl Packed {
    fn new<T: Copy + Send + Sync, U: Units<T>>(
        x: &[T],
        rows: usize,
        inputs: usize,
        blocking: Blocking,
        arch: Arch,
    ) -> Self {
        let Blocking { panel, depth, .. } = blocking;
        let width = rows.div_ceil(LANES);
        let units = inputs.div_ceil(U::PER_UNIT).next_multiple_of(LANES);
        let mut lines = vec![Line::ZERO; width * units];
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
        Self { lines, width, units }
    }

    /// Units `from..from + depth`, a whole part, of the panels of `lines`.
    fn panels(&self, lines: Range<usize>, from: usize, depth: usize) -> &[Line] {
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
                let from = columns.start + k * U::PER_UNIT;
                let from = from.min(columns.end)..(from + LANES * U::PER_UNIT).min(columns.end);
                for (row, units) in (line * LANES..rows).zip(&mut block) {
                    U::write(&x[row * inputs..][..inputs][from.clone()], &mut units.0);
                }
                transpose(&mut block);
                let to = lines[k * count..].iter_mut().skip(line).step_by(count);
                to.zip(block).for_each(|(to, from)| *to = from);
            }
        }
    }
}

/// Rows of a weight, handed out a few at a time.
pub(crate) trait WeightRows<T>: Sync {
    /// The rows `rows` of `inputs` numbers each, which may be made in `space`.
    fn rows<'a>(&'a self, rows: Range<usize>, inputs: usize, space: &'a mut Vec<T>) -> &'a [T];
}

impl<T: Sync> WeightRows<T> for [T] {
    fn rows<'a>(&'a self, rows: Range<usize>, inputs: usize, _: &'a mut Vec<T>) -> &'a [T] {
        &self[rows.start * inputs..rows.end * inputs]
    }
}

/// `y = x·weightᵀ + bias`, summed in f32 and rounded once; `U` tells what the units of `kernel` are.
///
/// Every element is summed in an order that depends on `inputs` alone.
pub(crate) fn product<T, U, K>(
    kernel: K,
    x: &[T],
    weight: &(impl WeightRows<T> + ?Sized),
    bias: Option<&[T]>,
    sizes: Sizes,
    y: &mut [T],
) where
    T: Float,
    U: Units<T>,
    K: Kernel,
{
    let Sizes { rows, inputs, .. } = sizes;
    let blocking = kernel.blocking();
    let packed = Packed::new::<T, U>(x, rows, inputs, blocking, Arch::new());
    let scratch = || (vec![Line::ZERO; kernel.outputs() * blocking.depth / LANES], Vec::new());
    in_blocks(sizes, blocking, bias, y, scratch, |(units, space), sums, block| {
        let weight = weight.rows(block.outputs, inputs, space);
        let units = bytemuck::cast_slice_mut(units);
        kernel.within(|| multiply::<T, U, K>(kernel, &packed, block.lines, weight, inputs, units, sums));
    });
}

/// A part of a product that one thread computes.
pub(crate) struct Block {
    /// Lines of rows.
    pub(crate) lines: Range<usize>,
    pub(crate) outputs: Range<usize>,
}

/// Computes `y` in blocks, whole panels of lines each: `sums` fills [`Sums::all`] of a block; then `bias` is added, and the
/// sums are rounded.
pub(crate) fn in_blocks<O: Float, S>(
    sizes: Sizes,
    blocking: Blocking,
    bias: Option<&[O]>,
    y: &mut [O],
    scratch: impl Fn() -> S + Sync + Send,
    sums: impl Fn(&mut S, &mut [Line], Block) + Sync + Send,
) {
    let Sizes { rows, outputs, .. } = sizes;
    let Blocking { panel, rows: most, outputs: chunk, .. } = blocking;
    let y = Columns::new(y, outputs);
    let width = rows.div_ceil(LANES);
    // Blocks of rows of equal size, whole panels each.
    let panels = width.div_ceil(panel);
    let count = panels.div_ceil((most / LANES / panel).max(1));
    let height = panels.div_ceil(count) * panel;
    let tasks: Vec<(usize, usize)> = (0..outputs)
        .step_by(chunk)
        .flat_map(|first| (0..width).step_by(height).map(move |line| (first, line)))
        .collect();
    tasks.into_par_iter().for_each_init(
        || (vec![Line::ZERO; chunk * height], scratch()),
        |(space, scratch), (first, line)| {
            let (columns, lines) = (first..outputs.min(first + chunk), line..width.min(line + height));
            sums(scratch, space, Block { lines: lines.clone(), outputs: columns.clone() });
            Arch::new().dispatch(Finish {
                sums: space,
                lines: lines.len(),
                panel,
                outputs: chunk,
                bias: bias.map(|bias| &bias[columns.clone()]),
                y: &y,
                rows: line * LANES..rows.min(lines.end * LANES),
                columns,
            });
        },
    );
}

/// [`Sums::all`] of the rows in `lines` for all rows of `weight`.
fn multiply<T: Copy + Send + Sync, U: Units<T>, K: Kernel>(
    kernel: K,
    packed: &Packed,
    lines: Range<usize>,
    weight: &[T],
    inputs: usize,
    space: &mut [u32],
    sums: &mut [Line],
) {
    let Blocking { outputs: room, depth: most, .. } = kernel.blocking();
    let (outputs, step) = (weight.len() / inputs, kernel.outputs());
    let columns = |from: usize| (from * U::PER_UNIT).min(inputs)..((from + most) * U::PER_UNIT).min(inputs);
    let firsts = || (0..outputs).step_by(step);
    let blocks = (0..packed.units).step_by(most).flat_map(|from| firsts().map(move |first| (from, first)));
    let mut blocks = blocks.peekable();
    while let Some((from, first)) = blocks.next() {
        let depth = most.min(packed.units - from);
        let mut rows = weight[first * inputs..].chunks_exact(inputs);
        for units in space[..step * depth].chunks_exact_mut(depth) {
            U::write(rows.next().map_or(&[], |row| &row[columns(from)]), units);
        }
        // The rows of the next block lie far apart, so that the processor would not fetch them ahead by itself.
        let ahead = blocks.peek().map_or(Ahead::NONE, |&(from, first)| {
            Ahead::new(&weight[first * inputs..outputs.min(first + step) * inputs], inputs, columns(from))
        });
        let weights = Weights { units: space, stride: depth, depth };
        let mut sums = Sums { all: sums, outputs: room, first };
        let rows = packed.panels(lines.clone(), from, depth);
        kernel.panels(rows, lines.len(), weights, &mut sums, from > 0, ahead);
    }
}

/// Adds `bias`, rounds, and writes the sums of a chunk to their columns of `y`.
pub(crate) struct Finish<'a, O> {
    /// As [`Sums::all`].
    pub(crate) sums: &'a [Line],
    pub(crate) lines: usize,
    /// Most lines of a panel.
    pub(crate) panel: usize,
    /// As [`Sums::outputs`], but for a single panel. Sums that do not exist are not written, but there are lines for a multiple of [`LANES`].
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
            for at in 0..width {
                let mut block: [Line; LANES] = std::array::from_fn(|n| sums[(at * LANES + n) * count]);
                transpose(&mut block);
                rows[at..].iter_mut().step_by(width).zip(block).for_each(|(to, from)| *to = from);
            }
            let first = self.rows.start + line * LANES;
            for (row, sums) in (first..self.rows.end).zip(rows.chunks_exact(width)) {
                // SAFETY: no other task writes these rows and columns.
                let y = unsafe { self.y.part(row, self.columns.clone()) };
                let sums: &[f32] = bytemuck::cast_slice(sums);
                match self.bias {
                    Some(bias) => {
                        for ((y, sum), bias) in y.iter_mut().zip(sums).zip(bias) {
                            *y = O::round(sum + bias.widen());
                        }
                    }
                    None => y.iter_mut().zip(sums).for_each(|(y, &sum)| *y = O::round(sum)),
                }
            }
        }
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
