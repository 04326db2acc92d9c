//! Many rows, in 8-bit integers.

use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{GROUP, Int8Weight, OFFSET, integers};
use crate::kernel::{Blocking, OUTPUTS};
use crate::line::{Ahead, LANES, Line, transpose};
use crate::product::{self, Sizes};
use crate::vnni::{Bytes, GROUP_UNITS, Quantised, Vnni};

/// Most lines of a register block.
const PANEL: usize = 4;
/// Groups that are worked on together: the block of rows has to fit the second-level cache.
const GROUPS: usize = 8;

/// Rows in 8-bit integers, packed in panels.
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
    /// Packs `x`, up to [`PANEL`] lines of rows.
    fn new(x: &[bf16], inputs: usize) -> Self {
        let (groups, lines) = (inputs.div_ceil(GROUP), (x.len() / inputs).div_ceil(LANES));
        let mut panel = Self {
            units: vec![Line::ZERO; groups * GROUP_UNITS * lines],
            scales: vec![Line::ZERO; groups * lines],
            corrections: vec![Line::ZERO; groups * lines],
            lines,
        };
        for (line, rows) in x.chunks(LANES * inputs).enumerate() {
            Arch::new().dispatch(Quantise { rows, inputs, line, panel: &mut panel });
        }
        panel
    }

    /// The operands of `groups`.
    fn part(&self, groups: Range<usize>) -> Quantised<'_> {
        let scales = groups.start * self.lines..groups.end * self.lines;
        Quantised {
            units: &self.units[scales.start * GROUP_UNITS..scales.end * GROUP_UNITS],
            scales: &self.scales[scales.clone()],
            corrections: &self.corrections[scales],
            lines: self.lines,
        }
    }
}

/// Writes up to sixteen rows into a line of a panel.
struct Quantise<'a> {
    rows: &'a [bf16],
    inputs: usize,
    line: usize,
    panel: &'a mut Panel,
}

impl WithSimd for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rows, inputs, line, panel } = self;
        let lines = panel.lines;
        for group in 0..inputs.div_ceil(GROUP) {
            let mut units = [[0u32; GROUP_UNITS]; LANES];
            let at = group * lines + line;
            for (lane, row) in rows.chunks_exact(inputs).enumerate() {
                let mut bytes = [0i8; GROUP];
                let numbers = &row[group * GROUP..inputs.min((group + 1) * GROUP)];
                let (scale, sum) = integers(numbers, 127.0, &mut bytes, |integer| integer as i8);
                units[lane] = bytemuck::cast(bytes);
                panel.scales[at].0[lane] = scale.to_bits();
                panel.corrections[at].0[lane] = sum.wrapping_mul(-OFFSET) as u32;
            }
            let to = &mut panel.units[group * GROUP_UNITS * lines..][..GROUP_UNITS * lines];
            for (part, to) in to.chunks_exact_mut(LANES * lines).enumerate() {
                let mut block = units.map(|units| Line(units.as_chunks().0[part]));
                transpose(&mut block);
                block.iter().enumerate().for_each(|(k, from)| to[k * lines + line] = *from);
            }
        }
    }
}

/// Many rows, in 8-bit integers.
pub(crate) fn many(
    vnni: Vnni,
    weight: &Int8Weight,
    x: &[bf16],
    bias: Option<&[bf16]>,
    sizes: Sizes,
    y: &mut [bf16],
) {
    let Sizes { inputs, .. } = sizes;
    let panels: Vec<Panel> = x.par_chunks(PANEL * LANES * inputs).map(|x| Panel::new(x, inputs)).collect();
    let scratch = || (vec![0u32; OUTPUTS * GROUPS * GROUP_UNITS], vec![0f32; OUTPUTS * GROUPS]);
    let blocking = Blocking { panel: PANEL, rows: 512, outputs: 96, depth: GROUPS * GROUP_UNITS };
    product::in_blocks(sizes, blocking, bias, y, scratch, |(units, scales), sums, block| {
        let panels = &panels[block.lines.start / PANEL..block.lines.end.div_ceil(PANEL)];
        let columns = |from: usize| from * GROUP..inputs.min((from + GROUPS) * GROUP);
        let parts = (0..weight.groups()).step_by(GROUPS);
        let steps =
            parts.flat_map(|from| block.outputs.clone().step_by(OUTPUTS).map(move |first| (from, first)));
        let mut steps = steps.peekable();
        while let Some((from, first)) = steps.next() {
            let groups = from..weight.groups().min(from + GROUPS);
            let rows = units.chunks_exact_mut(groups.len() * GROUP_UNITS);
            for (n, (units, scales)) in
                rows.zip(scales.chunks_exact_mut(groups.len())).take(OUTPUTS).enumerate()
            {
                if first + n < block.outputs.end {
                    let (bytes, all) = weight.row(first + n);
                    write_bytes(&bytes[columns(from)], units);
                    all[groups.clone()].convert_to_f32_slice(scales);
                } else {
                    scales.fill(0.0);
                }
            }
            // The next weights are asked for while these are multiplied: a few at a time, so that none of them waits.
            let mut ahead = steps.peek().map_or(Ahead::NONE, |&(from, first)| {
                let (bytes, _) = weight.row(first);
                let columns = columns(from);
                let rows = OUTPUTS.min(block.outputs.end - first);
                Ahead::new(&raw const bytes[columns.start], inputs, rows, columns.len())
            });
            let share = ahead.share(panels.len());
            let weights = Bytes { units, scales, groups: groups.len() };
            for (at, panel) in panels.iter().enumerate() {
                ahead.fetch(share);
                let sums = &mut sums[at * PANEL * blocking.outputs..];
                let sums = &mut sums[(first - block.outputs.start) * panel.lines..];
                vnni.tile(panel.part(groups.clone()), weights, sums, from > 0);
            }
        }
    });
}

/// Bytes as units; what is missing is filled with zeros.
fn write_bytes(bytes: &[u8], units: &mut [u32]) {
    let (fours, rest) = bytes.as_chunks::<4>();
    let (full, padding) = units.split_at_mut(fours.len());
    full.iter_mut().zip(fours).for_each(|(unit, four)| *unit = u32::from_le_bytes(*four));
    padding.fill(0);
    if let [unit, ..] = padding {
        let mut four = [0; 4];
        four[..rest.len()].copy_from_slice(rest);
        *unit = u32::from_le_bytes(four);
    }
}
