//! Many rows, in integers.

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{GROUP, Int8Weight, OFFSET, integers};
use crate::kernel::{Blocking, OUTPUTS};
use crate::line::{Ahead, LANES, Line, transpose};
use crate::product::{self, Sizes};

/// Units of a row that are worked on together: the block of rows has to fit the second-level cache.
pub(crate) const DEPTH: usize = 256;
/// Most units of a group.
const MOST: usize = GROUP * size_of::<i16>() / size_of::<u32>();

/// Products of weights and many rows of activations, both integers.
pub(crate) trait Tile: Copy + Send + Sync {
    /// An integer of a row, with a sign.
    type Activation: Pod;
    /// A weight, as wide as an activation; without a sign it is [`OFFSET`] too large.
    type Weight: Pod;

    /// Size of the largest activation of a group.
    const LIMIT: i16;
    /// Most lines of a register block.
    const PANEL: usize;
    /// Units of a group.
    const UNITS: usize = GROUP * size_of::<Self::Activation>() / size_of::<u32>();

    /// An integer up to [`Tile::LIMIT`] in size.
    fn narrow(integer: i32) -> Self::Activation;

    /// A weight as an integer with a sign.
    fn weight(integer: i8) -> Self::Weight;

    /// `c[n][row] (+)= Σ_group scale(row) · scale(n) · Σ_k x[k][row] · w[n][k]`, laid out as in
    /// [`crate::kernel::Kernel::tile`]; at most [`Tile::PANEL`] lines.
    fn tile(self, x: Quantised, w: Integers, c: &mut [Line], add: bool);
}

/// Weights of few bits, `[outputs, inputs]`, as integers.
pub(crate) trait IntegerRows: Sync {
    /// Scales that [`GROUP`] inputs of an output have.
    const SCALES: usize;

    /// All groups of [`GROUP`] inputs.
    fn all_groups(&self) -> Range<usize>;

    /// The bytes of output `n` for `groups`.
    fn bytes_of(&self, n: usize, groups: Range<usize>) -> &[u8];

    /// Writes output `n` for `groups`: integers, zeros behind the last, and scales, of which those behind the last are zero.
    fn write<K: Tile>(&self, n: usize, groups: Range<usize>, to: &mut [K::Weight], scales: &mut [f32]);
}

/// Activations of a register block: for each group, `lines` lines of each operand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quantised<'a> {
    /// `[groups, units of a group, lines]`
    pub(crate) units: &'a [Line],
    /// `[groups, lines]` in f32: what the integers are multiplied by.
    pub(crate) scales: &'a [Line],
    /// `[groups, lines]` in i32: what [`OFFSET`] adds to the sums of weights without a sign, with the sign changed.
    pub(crate) corrections: &'a [Line],
    pub(crate) lines: usize,
}

/// Weights of a register block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Integers<'a> {
    /// `[OUTPUTS, DEPTH]`, of which `[groups, units of a group]` are taken.
    pub(crate) units: &'a [u32],
    /// `[OUTPUTS, groups, scales of a group]`
    pub(crate) scales: &'a [f32],
    pub(crate) groups: usize,
    /// As [`IntegerRows::SCALES`].
    pub(crate) scales_of_group: usize,
}

/// Whether `c` has room for a register block of `K`, and all operands are there.
pub(crate) fn fit<K: Tile>(x: &Quantised, w: &Integers, c: &[Line]) -> bool {
    let (lines, groups) = (x.lines, w.groups);
    (1..=K::PANEL).contains(&lines)
        && x.units.len() >= groups * K::UNITS * lines
        && x.scales.len() >= groups * lines
        && x.corrections.len() >= groups * lines
        && groups * K::UNITS <= DEPTH
        && w.units.len() >= OUTPUTS * DEPTH
        && w.scales.len() >= OUTPUTS * groups * w.scales_of_group
        && c.len() >= OUTPUTS * lines
}

/// Rows in integers, packed in panels.
struct Panel {
    /// `[groups, units of a group, lines]`
    units: Vec<Line>,
    /// `[groups, lines]`
    scales: Vec<Line>,
    /// `[groups, lines]`
    corrections: Vec<Line>,
    lines: usize,
}

impl Panel {
    /// Packs `x`, up to [`Tile::PANEL`] lines of rows.
    fn new<K: Tile>(x: &[bf16], inputs: usize) -> Self {
        let (groups, lines) = (inputs.div_ceil(GROUP), (x.len() / inputs).div_ceil(LANES));
        let mut panel = Self {
            units: vec![Line::ZERO; groups * K::UNITS * lines],
            scales: vec![Line::ZERO; groups * lines],
            corrections: vec![Line::ZERO; groups * lines],
            lines,
        };
        for (line, rows) in x.chunks(LANES * inputs).enumerate() {
            let kernel = PhantomData::<K>;
            Arch::new().dispatch(Quantise { rows, inputs, line, panel: &mut panel, kernel });
        }
        panel
    }

    /// The operands of `groups`, which have `units` units each.
    fn part(&self, groups: Range<usize>, units: usize) -> Quantised<'_> {
        let scales = groups.start * self.lines..groups.end * self.lines;
        Quantised {
            units: &self.units[scales.start * units..scales.end * units],
            scales: &self.scales[scales.clone()],
            corrections: &self.corrections[scales],
            lines: self.lines,
        }
    }
}

/// Writes up to sixteen rows into a line of a panel.
struct Quantise<'a, K> {
    rows: &'a [bf16],
    inputs: usize,
    line: usize,
    panel: &'a mut Panel,
    kernel: PhantomData<K>,
}

impl<K: Tile> WithSimd for Quantise<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rows, inputs, line, panel, .. } = self;
        let lines = panel.lines;
        for group in 0..inputs.div_ceil(GROUP) {
            let mut units = [[0u32; MOST]; LANES];
            let at = group * lines + line;
            for (lane, row) in rows.chunks_exact(inputs).enumerate() {
                let numbers = &row[group * GROUP..inputs.min((group + 1) * GROUP)];
                let (to, _) = bytemuck::cast_slice_mut(&mut units[lane]).as_chunks_mut();
                let (scale, sum) = integers(numbers, f32::from(K::LIMIT), &mut to[0], K::narrow);
                panel.scales[at].0[lane] = scale.to_bits();
                panel.corrections[at].0[lane] = sum.wrapping_mul(-OFFSET) as u32;
            }
            let to = &mut panel.units[group * K::UNITS * lines..][..K::UNITS * lines];
            for (part, to) in to.chunks_exact_mut(LANES * lines).enumerate() {
                let mut block = units.map(|units| Line(units.as_chunks().0[part]));
                transpose(&mut block);
                block.iter().enumerate().for_each(|(k, from)| to[k * lines + line] = *from);
            }
        }
    }
}

/// Many rows, in integers.
pub(crate) fn many<K: Tile, W: IntegerRows>(
    kernel: K,
    weight: &W,
    x: &[bf16],
    bias: Option<&[bf16]>,
    sizes: Sizes,
    y: &mut [bf16],
) {
    let (inputs, most) = (sizes.inputs, DEPTH / K::UNITS);
    let panels: Vec<Panel> =
        x.par_chunks(K::PANEL * LANES * inputs).map(|x| Panel::new::<K>(x, inputs)).collect();
    let scratch = || (vec![0u32; OUTPUTS * DEPTH], vec![0f32; OUTPUTS * most * W::SCALES]);
    let blocking = Blocking { panel: K::PANEL, rows: 512, outputs: 96, depth: DEPTH };
    product::in_blocks(sizes, blocking, bias, y, scratch, |(units, scales), sums, block| {
        let panels = &panels[block.lines.start / K::PANEL..block.lines.end.div_ceil(K::PANEL)];
        let groups = |from: usize| from..weight.all_groups().end.min(from + most);
        let parts = weight.all_groups().step_by(most);
        let steps =
            parts.flat_map(|from| block.outputs.clone().step_by(OUTPUTS).map(move |first| (from, first)));
        let mut steps = steps.peekable();
        while let Some((from, first)) = steps.next() {
            let now = groups(from);
            let rows = units.chunks_exact_mut(DEPTH);
            let parts = rows.zip(scales.chunks_exact_mut(now.len() * W::SCALES)).take(OUTPUTS);
            for (n, (units, scales)) in parts.enumerate() {
                match first + n < block.outputs.end {
                    true => {
                        let units = bytemuck::cast_slice_mut(&mut units[..now.len() * K::UNITS]);
                        weight.write::<K>(first + n, now.clone(), units, scales);
                    }
                    false => scales.fill(0.0),
                }
            }
            // The next weights are asked for while these are multiplied: a few at a time, so that none of them waits.
            let mut ahead = steps.peek().map_or(Ahead::NONE, |&(from, first)| {
                let bytes = weight.bytes_of(first, groups(from));
                let width = weight.bytes_of(first, weight.all_groups()).len();
                Ahead::new(bytes.as_ptr(), width, OUTPUTS.min(block.outputs.end - first), bytes.len())
            });
            let share = ahead.share(panels.len());
            let weights = Integers { units, scales, groups: now.len(), scales_of_group: W::SCALES };
            for (at, panel) in panels.iter().enumerate() {
                ahead.fetch(share);
                let sums = &mut sums[at * K::PANEL * blocking.outputs..];
                let sums = &mut sums[(first - block.outputs.start) * panel.lines..];
                kernel.tile(panel.part(now.clone(), K::UNITS), weights, sums, from > 0);
            }
        }
    });
}

impl IntegerRows for Int8Weight {
    const SCALES: usize = 1;

    fn all_groups(&self) -> Range<usize> {
        0..self.groups()
    }

    fn bytes_of(&self, n: usize, groups: Range<usize>) -> &[u8] {
        &self.row(n).0[groups.start * GROUP..self.inputs.min(groups.end * GROUP)]
    }

    fn write<K: Tile>(&self, n: usize, groups: Range<usize>, to: &mut [K::Weight], scales: &mut [f32]) {
        let bytes = self.bytes_of(n, groups.clone());
        let (full, padding) = to.split_at_mut(bytes.len());
        full.iter_mut()
            .zip(bytes)
            .for_each(|(to, byte)| *to = K::weight(byte.wrapping_sub(OFFSET as u8) as i8));
        padding.fill(K::weight(0));
        self.row(n).1[groups].convert_to_f32_slice(scales);
    }
}
