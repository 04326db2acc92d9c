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
use crate::kernel::{Blocking, Kernel, Weights};
use crate::line::{LANES, Line, prefetch, transpose};

/// Units of a packed block along the inner dimension: the block of rows has to fit the second-level cache.
const DEPTH: usize = 256;

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

/// `x [rows, inputs]` in units: panels of up to [`Kernel::panel`] lines, each `[units, lines]`.
struct Packed {
    lines: Vec<Line>,
    /// Lines that hold all rows of one unit.
    width: usize,
    units: usize,
    panel: usize,
}

impl Packed {
    fn new<T: Copy + Send + Sync, U: Units<T>>(
        x: &[T],
        rows: usize,
        inputs: usize,
        panel: usize,
        arch: Arch,
    ) -> Self {
        let (width, units) = (rows.div_ceil(LANES), inputs.div_ceil(U::PER_UNIT));
        let mut lines = vec![Line::ZERO; width * units];
        lines.par_chunks_mut((panel * units).max(1)).enumerate().for_each(|(index, lines)| {
            let first = index * panel * LANES;
            arch.dispatch(Pack::<T, U> {
                x: &x[first * inputs..],
                rows: rows - first,
                inputs,
                lines,
                units,
                how: PhantomData,
            });
        });
        Self { lines, width, units, panel }
    }

    /// Units `from..from + depth` of the panel that begins at line `line`, and its number of lines.
    fn panel(&self, line: usize, from: usize, depth: usize) -> (&[Line], usize) {
        let count = self.panel.min(self.width - line);
        (&self.lines[line * self.units + from * count..][..depth * count], count)
    }
}

/// Packs the first rows of `x [rows, inputs]` into one panel.
pub(crate) struct Pack<'a, T, U> {
    pub(crate) x: &'a [T],
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    /// `[units, lines]`
    pub(crate) lines: &'a mut [Line],
    pub(crate) units: usize,
    pub(crate) how: PhantomData<U>,
}

impl<T: Copy, U: Units<T>> WithSimd for Pack<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, rows, inputs, lines, units, .. } = self;
        let count = lines.len() / units;
        for line in 0..count {
            for k in (0..units).step_by(LANES) {
                let mut block = [Line::ZERO; LANES];
                let from = k * U::PER_UNIT..((k + LANES) * U::PER_UNIT).min(inputs);
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
    let packed = Packed::new::<T, U>(x, rows, inputs, kernel.panel(), Arch::new());
    let scratch = || (vec![0u32; kernel.outputs() * DEPTH], Vec::new());
    in_blocks(sizes, kernel.blocking(), bias, y, scratch, |(units, space), sums, block| {
        let weight = weight.rows(block.outputs, inputs, space);
        kernel.within(|| multiply::<T, U, K>(kernel, &packed, block.lines, weight, inputs, units, sums));
    });
}

/// A part of a product that one thread computes.
pub(crate) struct Block {
    /// Lines of rows.
    pub(crate) lines: Range<usize>,
    pub(crate) outputs: Range<usize>,
}

/// Computes `y` in blocks, whole panels of lines each: `sums` fills `[outputs, lines]` of a block in f32; then `bias` is added, and the sums are
/// rounded.
pub(crate) fn in_blocks<O: Float, S>(
    sizes: Sizes,
    blocking: Blocking,
    bias: Option<&[O]>,
    y: &mut [O],
    scratch: impl Fn() -> S + Sync + Send,
    sums: impl Fn(&mut S, &mut [Line], Block) + Sync + Send,
) {
    let Sizes { rows, outputs, .. } = sizes;
    let Blocking { panel, rows: most, outputs: chunk } = blocking;
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
                bias: bias.map(|bias| &bias[columns.clone()]),
                y: &y,
                rows: line * LANES..rows.min(lines.end * LANES),
                columns,
            });
        },
    );
}

/// Sums `[outputs, lines]` of the rows in `lines` for all rows of `weight`.
fn multiply<T: Copy + Send + Sync, U: Units<T>, K: Kernel>(
    kernel: K,
    packed: &Packed,
    lines: Range<usize>,
    weight: &[T],
    inputs: usize,
    space: &mut [u32],
    sums: &mut [Line],
) {
    let (outputs, height) = (weight.len() / inputs, lines.len());
    let step = kernel.outputs();
    let firsts = || (0..outputs).step_by(step);
    let blocks = (0..packed.units).step_by(DEPTH).flat_map(|from| firsts().map(move |first| (from, first)));
    // Row `n` of the weights of a block.
    let row = |(from, first): (usize, usize), n: usize| {
        let columns = from * U::PER_UNIT..((from + DEPTH) * U::PER_UNIT).min(inputs);
        weight.chunks_exact(inputs).nth(first + n).map_or(&[][..], |row| &row[columns])
    };
    let mut blocks = blocks.peekable();
    while let Some((from, first)) = blocks.next() {
        let depth = DEPTH.min(packed.units - from);
        for (n, units) in space[..step * depth].chunks_exact_mut(depth).enumerate() {
            U::write(row((from, first), n), units);
        }
        // The rows of the next block lie far apart, so that the processor would not fetch them ahead by itself.
        let mut ahead = 0..step;
        let share = step.div_ceil(height.div_ceil(packed.panel));
        for at in (0..height).step_by(packed.panel) {
            if let Some(&next) = blocks.peek() {
                ahead.by_ref().take(share).for_each(|n| prefetch(row(next, n)));
            }
            let (rows, count) = packed.panel(lines.start + at, from, depth);
            let weights = Weights { units: space, stride: depth, depth };
            kernel.tile(rows, count, weights, &mut sums[first * height + at..], height, from > 0);
        }
    }
}

/// Adds `bias`, rounds, and writes the sums of a chunk to their columns of `y`.
pub(crate) struct Finish<'a, O> {
    /// `[outputs, lines]` in f32, outputs filled up to a multiple of [`LANES`].
    pub(crate) sums: &'a [Line],
    pub(crate) lines: usize,
    pub(crate) bias: Option<&'a [O]>,
    pub(crate) y: &'a Columns<'a, O>,
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

impl<O: Float> WithSimd for Finish<'_, O> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        // All columns of sixteen rows before the next rows: rows of `y` lie so far apart that their cache lines displace one
        // another, and half a line would be fetched twice.
        for line in 0..self.lines {
            for first in (0..self.columns.len()).step_by(LANES) {
                let count = LANES.min(self.columns.len() - first);
                let mut bias = [0f32; LANES];
                if let Some(numbers) = self.bias {
                    bias.iter_mut().zip(&numbers[first..]).for_each(|(to, from)| *to = from.widen());
                }
                let mut block: [Line; LANES] =
                    std::array::from_fn(|n| self.sums[(first + n) * self.lines + line]);
                transpose(&mut block);
                for (row, sums) in (self.rows.start + line * LANES..self.rows.end).zip(&block) {
                    let numbers: [O; LANES] =
                        std::array::from_fn(|n| O::round(f32::from_bits(sums.0[n]) + bias[n]));
                    // SAFETY: no other task writes these rows and columns.
                    unsafe { self.y.write(row, self.columns.start + first, &numbers, count) }
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

// SAFETY: the callers of `write` see to it that no element is written twice.
unsafe impl<O: Send> Sync for Columns<'_, O> {}

impl<'a, O: Copy> Columns<'a, O> {
    /// `y [.., outputs]`.
    pub(crate) fn new(y: &'a mut [O], outputs: usize) -> Self {
        Self { start: y.as_mut_ptr(), len: y.len(), outputs, matrix: PhantomData }
    }

    /// Writes the first `count` of `numbers` to `row` from `column` on.
    ///
    /// # Safety
    /// No other thread may write these elements.
    #[inline(always)]
    unsafe fn write(&self, row: usize, column: usize, numbers: &[O; LANES], count: usize) {
        let at = row * self.outputs + column;
        assert!(count <= LANES && column + count <= self.outputs && at + count <= self.len);
        // SAFETY: in bounds, as just checked, of a matrix that is borrowed; not shared, as the caller promises.
        unsafe {
            let to = self.start.add(at);
            if count == LANES {
                to.cast::<[O; LANES]>().write_unaligned(*numbers);
            } else {
                copy_some(&numbers[..count], to);
            }
        }
    }
}

/// Apart, so that the compiler does not make one call of any length of it and of the whole vectors above.
///
/// # Safety
/// As for copying to `to`, which must not overlap.
#[cold]
#[inline(never)]
unsafe fn copy_some<O: Copy>(numbers: &[O], to: *mut O) {
    // SAFETY: as the caller promises.
    unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), to, numbers.len()) }
}
