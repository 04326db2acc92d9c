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
use crate::kernel::{Kernel, OUTPUTS, Weights};
use crate::line::{LANES, Line, prefetch, transpose};

/// Units of a packed block along the inner dimension: the block of rows has to fit the second-level cache.
const DEPTH: usize = 256;
/// Most rows that are worked on together.
const ROWS: usize = 512;
/// Outputs that are worked on together; a multiple of [`OUTPUTS`] and [`LANES`].
const CHUNK: usize = 96;

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
    fn new<T: Copy + Send + Sync, U: Units<T>>(x: &[T], rows: usize, inputs: usize, panel: usize, arch: Arch) -> Self {
        let (width, units) = (rows.div_ceil(LANES), inputs.div_ceil(U::PER_UNIT));
        let mut lines = vec![Line::ZERO; width * units];
        lines.par_chunks_mut((panel * units).max(1)).enumerate().for_each(|(index, lines)| {
            let first = index * panel * LANES;
            arch.dispatch(Pack::<T, U> { x: &x[first * inputs..], rows: rows - first, inputs, lines, units, how: PhantomData });
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

/// `y = x·weightᵀ + bias`, summed in f32 and rounded once; `U` tells what the units of `kernel` are.
///
/// Every element is summed in an order that depends on `inputs` alone.
pub(crate) fn product<T, U, K, O>(kernel: K, x: &[T], weight: &[T], bias: Option<&[O]>, sizes: Sizes, y: &mut [O])
where
    T: Copy + Send + Sync,
    U: Units<T>,
    K: Kernel,
    O: Float,
{
    let Sizes { rows, inputs, outputs } = sizes;
    let arch = Arch::new();
    let packed = Packed::new::<T, U>(x, rows, inputs, kernel.panel(), arch);
    let y = Columns::new(y, outputs);
    // Blocks of rows of equal size, whole panels each.
    let panels = packed.width.div_ceil(packed.panel);
    let blocks = panels.div_ceil((ROWS / LANES / packed.panel).max(1));
    let height = panels.div_ceil(blocks.max(1)).max(1) * packed.panel;
    let tasks: Vec<(usize, usize)> = (0..outputs)
        .step_by(CHUNK)
        .flat_map(|first| (0..packed.width).step_by(height).map(move |line| (first, line)))
        .collect();
    tasks.into_par_iter().for_each_init(
        || Scratch { sums: vec![Line::ZERO; CHUNK * height], weights: vec![0; OUTPUTS * DEPTH] },
        |scratch, (first, line)| {
            let count = CHUNK.min(outputs - first);
            let lines = height.min(packed.width - line);
            let weight = &weight[first * inputs..][..count * inputs];
            scratch.multiply::<T, U, K>(kernel, &packed, line, lines, weight, inputs);
            arch.dispatch(Finish {
                sums: &scratch.sums,
                lines,
                bias: bias.map(|bias| &bias[first..][..count]),
                y: &y,
                rows: line * LANES..rows.min((line + lines) * LANES),
                columns: first..first + count,
            });
        },
    );
}

struct Scratch {
    /// `[outputs of the chunk, lines]`, f32.
    sums: Vec<Line>,
    /// `[OUTPUTS, depth]`
    weights: Vec<u32>,
}

impl Scratch {
    /// Sums of the rows in `lines` lines from `line` on, for all rows of `weight`.
    fn multiply<T: Copy + Send + Sync, U: Units<T>, K: Kernel>(
        &mut self,
        kernel: K,
        packed: &Packed,
        line: usize,
        lines: usize,
        weight: &[T],
        inputs: usize,
    ) {
        let outputs = weight.len() / inputs;
        let firsts = || (0..outputs).step_by(OUTPUTS);
        let blocks = (0..packed.units).step_by(DEPTH).flat_map(|from| firsts().map(move |first| (from, first)));
        // Row `n` of the weights of a block.
        let row = |(from, first): (usize, usize), n: usize| {
            let columns = from * U::PER_UNIT..((from + DEPTH) * U::PER_UNIT).min(inputs);
            weight.chunks_exact(inputs).nth(first + n).map_or(&[][..], |row| &row[columns])
        };
        let mut blocks = blocks.peekable();
        while let Some((from, first)) = blocks.next() {
            let depth = DEPTH.min(packed.units - from);
            for (n, units) in self.weights[..OUTPUTS * depth].chunks_exact_mut(depth).enumerate() {
                U::write(row((from, first), n), units);
            }
            // The rows of the next block lie far apart, so that the processor would not fetch them ahead by itself.
            let mut ahead = 0..OUTPUTS;
            let share = OUTPUTS.div_ceil(lines.div_ceil(packed.panel));
            for at in (0..lines).step_by(packed.panel) {
                if let Some(&next) = blocks.peek() {
                    ahead.by_ref().take(share).for_each(|n| prefetch(row(next, n)));
                }
                let (rows, count) = packed.panel(line + at, from, depth);
                let sums = &mut self.sums[first * lines + at..];
                let weights = Weights { units: &self.weights, stride: depth, depth };
                kernel.tile(rows, count, weights, sums, lines, from > 0);
            }
        }
    }
}

/// Adds `bias`, rounds, and writes the sums of a chunk to their columns of `y`.
pub(crate) struct Finish<'a, O> {
    /// `[outputs, lines]` in f32, outputs filled up to a multiple of [`LANES`].
    pub(crate) sums: &'a [Line],
    pub(crate) lines: usize,
    pub(crate) bias: Option<&'a [O]>,
    pub(crate) y: &'a Columns<O>,
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

impl<O: Float> WithSimd for Finish<'_, O> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for first in (0..self.columns.len()).step_by(LANES) {
            let count = LANES.min(self.columns.len() - first);
            let mut bias = [0f32; LANES];
            if let Some(numbers) = self.bias {
                bias.iter_mut().zip(&numbers[first..]).for_each(|(to, from)| *to = from.widen());
            }
            for line in 0..self.lines {
                let mut block: [Line; LANES] = std::array::from_fn(|n| self.sums[(first + n) * self.lines + line]);
                transpose(&mut block);
                for (row, sums) in (self.rows.start + line * LANES..self.rows.end).zip(&block) {
                    let numbers: [O; LANES] =
                        std::array::from_fn(|n| O::round(f32::from_bits(sums.0[n]) + bias[n]));
                    // SAFETY: no other task writes these rows and columns, and `y` outlives the tasks.
                    unsafe { self.y.write(row, self.columns.start + first, &numbers, count) }
                }
            }
        }
    }
}

/// A matrix `[.., outputs]` that several threads write.
pub(crate) struct Columns<O> {
    start: *mut O,
    len: usize,
    outputs: usize,
}

// SAFETY: the callers of `write` see to it that no element is written twice.
unsafe impl<O: Send> Sync for Columns<O> {}

impl<O: Copy> Columns<O> {
    /// `y [.., outputs]`, which must stay alive and untouched by others until the last write.
    pub(crate) fn new(y: &mut [O], outputs: usize) -> Self {
        Self { start: y.as_mut_ptr(), len: y.len(), outputs }
    }

    /// Writes the first `count` of `numbers` to `row` from `column` on.
    ///
    /// # Safety
    /// The matrix must be alive, and no other thread may touch these elements.
    #[inline(always)]
    unsafe fn write(&self, row: usize, column: usize, numbers: &[O; LANES], count: usize) {
        let at = row * self.outputs + column;
        assert!(count <= LANES && column + count <= self.outputs && at + count <= self.len);
        // SAFETY: in bounds, as just checked; not shared, as the caller promises.
        unsafe {
            let to = self.start.add(at);
            if count == LANES {
                to.cast::<[O; LANES]>().write_unaligned(*numbers);
            } else {
                std::ptr::copy_nonoverlapping(numbers.as_ptr(), to, count);
            }
        }
    }
}
