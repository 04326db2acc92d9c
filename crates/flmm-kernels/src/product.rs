//! Products of many rows: blocks for the caches around [`Kernel::blocks`].
//!
//! Rows of `x` are packed once: side by side in lines, so that a vector holds the same column of sixteen rows. Weights
//! stay as they lie in memory, which may be a mapped file; some columns of some of their rows at a time are packed as
//! the kernel reads them.

use std::marker::PhantomData;
use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use crate::element::{Float, Units};
use crate::finish::{Columns, Finish};
use crate::kernel::{Blocking, Kernel};
use crate::line::{Ahead, LANES, Line};
use crate::pack::{PackPart, Packed, Part};

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
    let blocking = kernel.blocking(rows);
    let packed = Packed::new::<T, U>(x, rows, inputs, blocking, Arch::new());
    let scratch =
        || ([(); 2].map(|()| vec![Line::ZERO; blocking.outputs * blocking.depth / LANES]), Vec::new());
    in_blocks(sizes, blocking, bias, y, scratch, |(units, space), sums, block| {
        let weight = weight.rows(block.outputs, inputs, space);
        let units = units.each_mut().map(|units| bytemuck::cast_slice_mut(units));
        kernel.within(|| multiply::<T, U, K>(kernel, &packed, block.lines, weight, inputs, units, sums));
    });
}

/// A part of a product that one thread computes.
pub(crate) struct Block {
    /// Lines of rows.
    pub(crate) lines: Range<usize>,
    pub(crate) outputs: Range<usize>,
}

/// Computes `y` in blocks, whole panels of lines each: `sums` fills `[panels, outputs, lines of a panel]` of a block
/// with f32, where outputs are [`Blocking::outputs`]; then `bias` is added, and the sums are rounded.
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

/// The sums of the rows in `lines` for all rows of `weight`, which are packed as many inputs at a time as
/// [`Blocking::depth`] says.
fn multiply<T: Copy + Send + Sync, U: Units<T>, K: Kernel>(
    kernel: K,
    packed: &Packed,
    lines: Range<usize>,
    weight: &[T],
    inputs: usize,
    [units, next_units]: [&mut [u32]; 2],
    sums: &mut [Line],
) {
    let Blocking { panel, outputs: room, depth: most, .. } = packed.blocking;
    let (given, blocks) = (weight.len() / inputs, (weight.len() / inputs).div_ceil(kernel.outputs()));
    let (outputs, arch) = (blocks * kernel.outputs(), Arch::new());
    let part = |rows: Range<usize>, from: usize| Part::<T, U, K> {
        kernel,
        weight: &weight[rows.start.min(given) * inputs..rows.end.min(given) * inputs],
        inputs,
        columns: (from * U::PER_UNIT).min(inputs)..((from + most) * U::PER_UNIT).min(inputs),
        rows,
        depth: most.min(packed.units - from),
        how: PhantomData,
    };
    let (mut units, mut next_units) = (units, next_units);
    for first in (0..outputs).step_by(LANES) {
        let part_at = |first: usize| part(first.min(outputs)..outputs.min(first + LANES), 0);
        part_at(first + LANES).ahead().fetch(usize::MAX);
        arch.dispatch(PackPart(part_at(first), &mut *units));
    }
    let panels = lines.len().div_ceil(panel);
    for from in (0..packed.units).step_by(most) {
        let (depth, next) = (most.min(packed.units - from), from + most);
        let pauses = blocks * kernel.pauses(depth);
        for index in 0..panels {
            let at = lines.start + index * panel;
            let end = lines.end.min(at + panel);
            // A few rows of the next weights at a time: their parts lie so far apart that the processor would not fetch
            // them by itself, and all of them would displace one another.
            let coming = (next < packed.units)
                .then(|| part(outputs * index / panels..outputs * (index + 1) / panels, next));
            let mut ahead = [
                coming.as_ref().map_or(Ahead::NONE, Part::ahead),
                Ahead::all(packed.panels(end..lines.end.min(end + panel), from, depth)),
            ];
            let shares = ahead.map(|ahead| ahead.share(pauses));
            let rows = packed.panels(at..end, from, depth);
            let sums = &mut sums[(at - lines.start) * room..];
            let all = &units[..outputs * depth];
            kernel.blocks(rows, end - at, all, sums, from > 0, || {
                ahead.iter_mut().zip(shares).for_each(|(ahead, share)| ahead.fetch(share));
            });
            if let Some(coming) = coming {
                arch.dispatch(PackPart(coming, &mut *next_units));
            }
        }
        std::mem::swap(&mut units, &mut next_units);
    }
}
