//! The arithmetic of the 3×3 convolution, on plain slices.
//!
//! A picture has a border of zeros. Seen as one long row per channel (the border's two columns included), every tap of
//! the kernel is the same row shifted, so nothing is unfolded: a block of outputs × neighbouring pixels, or of outputs ×
//! taps for the gradient, stays in registers while all else passes by. The few results in the border's columns are
//! thrown away. `pulp` compiles the inner loops for what the processor has (AVX-512, AVX2, NEON).

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Outputs of a register block of the convolution.
const OUTPUTS: usize = 6;
/// Vectors of pixels of a register block, with 32 registers and with 16.
const VECTORS: usize = 4;
const FEW_VECTORS: usize = 2;
/// Outputs of a register block of the weight gradient.
const GRADIENT_OUTPUTS: usize = 3;
/// Channels whose padded planes are worked on together, so that they stay in the second-level cache.
const CHANNEL_BLOCK: usize = 16;
/// The widest vector, in numbers.
const WIDEST: usize = 16;

/// One picture `[channels, h, w]` with a border of zeros.
pub(super) struct Padded {
    data: Vec<f32>,
    channels: usize,
    h: usize,
    w: usize,
}

impl Padded {
    /// Copies `x [channels, h, w]`.
    pub(super) fn new(x: &[f32], channels: usize, h: usize, w: usize) -> Self {
        let (row, plane) = (w + 2, (h + 2) * (w + 2));
        // The last pixels of the last plane are read a block's width further, and that for every tap.
        let mut data = vec![0f32; channels * plane + 2 * row + 2 + VECTORS * WIDEST];
        data.par_chunks_exact_mut(plane).zip(x.par_chunks_exact((h * w).max(1))).for_each(|(to, from)| {
            for (to, from) in to[row..].chunks_exact_mut(row).zip(from.chunks_exact(w)) {
                to[1..=w].copy_from_slice(from);
            }
        });
        Self { data, channels, h, w }
    }

    fn row(&self) -> usize {
        self.w + 2
    }

    fn plane(&self) -> usize {
        (self.h + 2) * self.row()
    }

    /// Pixels of a channel seen as one long row.
    fn flat(&self) -> usize {
        self.h * self.row()
    }
}

/// A kernel `[outputs, channels, 3, 3]` in the order in which it is read: `[block of outputs][channel][tap][output]`.
pub(super) struct Packed {
    data: Vec<f32>,
    outputs: usize,
}

impl Packed {
    /// `weight(output, channel, tap)` gives the values.
    pub(super) fn new(
        outputs: usize,
        channels: usize,
        weight: impl Fn(usize, usize, usize) -> f32 + Sync,
    ) -> Self {
        let mut data = vec![0f32; outputs.div_ceil(OUTPUTS) * channels * 9 * OUTPUTS];
        data.par_chunks_mut((channels * 9 * OUTPUTS).max(1)).enumerate().for_each(|(block, data)| {
            for (i, values) in data.chunks_exact_mut(OUTPUTS).enumerate() {
                for (m, value) in values.iter_mut().enumerate().take(outputs - block * OUTPUTS) {
                    *value = weight(block * OUTPUTS + m, i / 9, i % 9);
                }
            }
        });
        Self { data, outputs }
    }
}

/// `x [n, channels, h, w]`, convolved: `[n, outputs, h, w]`.
pub(super) fn convolve(x: &[f32], [n, channels, h, w]: [usize; 4], kernel: &Packed) -> Vec<f32> {
    let (plane, row, outputs) = (h * w, w + 2, kernel.outputs);
    let mut y = vec![0f32; n * outputs * plane];
    if y.is_empty() {
        return y;
    }
    let width = Arch::new().dispatch(Width);
    let starts = || (0..h * row).step_by(width);
    let parts: Vec<(usize, usize)> = (0..n).flat_map(|image| starts().map(move |at| (image, at))).collect();
    let done: Vec<Vec<f32>> = parts
        .par_iter()
        .map_init(Vec::new, |tile, &(image, at)| {
            let image = &x[image * channels * plane..][..channels * plane];
            let (left, mut out) = (h * row - at, vec![0f32; outputs * width]);
            Arch::new().dispatch(Convolve { image, at, left, h, w, kernel, tile, out: &mut out });
            out
        })
        .collect();
    let of_image = parts.len() / n;
    y.par_chunks_exact_mut(plane).enumerate().for_each(|(at, y)| {
        let (image, output) = (at / outputs, at % outputs);
        let tiles = parts.iter().zip(&done).skip(image * of_image).take(of_image);
        for (&(_, at), tile) in tiles {
            let values = &tile[output * width..][..width];
            // Runs of pixels up to the border's columns.
            let (mut i, end) = (0, width.min(h * row - at));
            while i < end {
                let (line, column) = ((at + i) / row, (at + i) % row);
                let count = w.saturating_sub(column).min(end - i);
                y[line * w + column.min(w)..][..count].copy_from_slice(&values[i..i + count]);
                i += row - column;
            }
        }
    });
    y
}

/// Pixels of a part of the picture, seen as one long row per channel, border included.
struct Width;

impl WithSimd for Width {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES * if S::F32_LANES == 8 { FEW_VECTORS } else { VECTORS }
    }
}

/// All outputs for `width` pixels.
struct Convolve<'a> {
    /// `[channels, h, w]`
    image: &'a [f32],
    /// First pixel, and how many there are from it on.
    at: usize,
    left: usize,
    h: usize,
    w: usize,
    kernel: &'a Packed,
    /// `[channels][3][width + 2]`: what the pixels see. Every block of outputs reads it, so it is laid out in the
    /// order of reading, and small enough for the second-level cache.
    tile: &'a mut Vec<f32>,
    /// `[outputs, width]`
    out: &'a mut [f32],
}

impl WithSimd for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (S::F32_LANES, self.left.div_ceil(S::F32_LANES)) {
            (_, 1) => self.all::<S, 1>(simd),
            (8, _) => self.all::<S, FEW_VECTORS>(simd),
            (_, 2) => self.all::<S, 2>(simd),
            (_, 3) => self.all::<S, 3>(simd),
            _ => self.all::<S, VECTORS>(simd),
        }
    }
}

impl Convolve<'_> {
    #[inline(always)]
    fn all<S: Simd, const N: usize>(mut self, simd: S) {
        let width = N * S::F32_LANES;
        let size = 3 * (width + 2);
        self.fill(width + 2);
        let channels = self.tile.len() / size;
        let stride = self.out.len() / self.kernel.outputs;
        let blocks = self.kernel.data.chunks_exact(channels * 9 * OUTPUTS);
        for (block, out) in blocks.zip(self.out.chunks_mut(OUTPUTS * stride)) {
            let sums = block_sums::<S, N>(simd, self.tile, block);
            for (out, sums) in out.chunks_exact_mut(stride).zip(sums) {
                for (to, sum) in S::as_mut_simd_f32s(&mut out[..width]).0.iter_mut().zip(sums) {
                    *to = sum;
                }
            }
        }
    }

    /// Copies what `length - 2` pixels see, row above, own row and row below, into the tile.
    #[inline(always)]
    fn fill(&mut self, length: usize) {
        let (row, plane) = (self.w + 2, self.h * self.w);
        // The same runs for every channel: place in the tile, place in the plane, length.
        let mut runs = Vec::new();
        for dy in 0..3 {
            let mut i = 0;
            while i < length {
                // The long rows have the border on both sides and above: this is its row `line`, from `column` on.
                let (line, column) = ((self.at + i) / row + dy, (self.at + i) % row);
                let first = column.max(1);
                let count =
                    (self.w + 1).saturating_sub(first).min((length - i).saturating_sub(first - column));
                if (1..=self.h).contains(&line) && count > 0 {
                    runs.push((dy * length + i + first - column, (line - 1) * self.w + first - 1, count));
                }
                i += row - column;
            }
        }
        self.tile.clear();
        self.tile.resize(self.image.len() / plane * 3 * length, 0.0);
        for (tile, plane) in self.tile.chunks_exact_mut(3 * length).zip(self.image.chunks_exact(plane)) {
            for &(to, from, count) in &runs {
                tile[to..to + count].copy_from_slice(&plane[from..from + count]);
            }
        }
    }
}

/// A block of outputs from a tile `[channels][3][width + 2]` and weights `[channels][tap][OUTPUTS]`.
#[inline(always)]
fn block_sums<S: Simd, const N: usize>(simd: S, tile: &[f32], weights: &[f32]) -> [[S::f32s; N]; OUTPUTS] {
    let width = N * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); N]; OUTPUTS];
    let weights = weights.as_chunks::<{ 9 * OUTPUTS }>().0;
    for (tile, weights) in tile.chunks_exact(3 * (width + 2)).zip(weights) {
        for dy in 0..3 {
            for dx in 0..3 {
                let (pixels, _) = S::as_simd_f32s(&tile[dy * (width + 2) + dx..][..width]);
                let pixels: [S::f32s; N] = std::array::from_fn(|n| pixels[n]);
                // By number, not by iterator: only so do the sums stay in registers.
                #[allow(clippy::needless_range_loop)]
                for m in 0..OUTPUTS {
                    let weight = simd.splat_f32s(weights[(3 * dy + dx) * OUTPUTS + m]);
                    for n in 0..N {
                        sums[m][n] = simd.mul_add_e_f32s(weight, pixels[n], sums[m][n]);
                    }
                }
            }
        }
    }
    sums
}

/// Adds the weight's gradient `[outputs, channels, 3, 3]` of several pictures, given the gradients
/// `[outputs, h, w]` of their results.
pub(super) fn weight_gradient(pictures: &[(Padded, &[f32])], outputs: usize, sum: &mut [f32]) {
    let Some((first, _)) = pictures.first() else { return };
    let channels = first.channels;
    let flat = first.flat().next_multiple_of(WIDEST);
    // Rows with the border's columns, zero there: they add nothing.
    let spread: Vec<Vec<f32>> = pictures
        .iter()
        .map(|(x, gradient)| {
            let mut rows = vec![0f32; outputs.next_multiple_of(GRADIENT_OUTPUTS) * flat];
            let planes = rows.par_chunks_exact_mut(flat).zip(gradient.par_chunks_exact((x.h * x.w).max(1)));
            planes.for_each(|(to, from)| {
                for (to, from) in to.chunks_mut(x.row()).zip(from.chunks_exact(x.w)) {
                    to[..x.w].copy_from_slice(from);
                }
            });
            rows
        })
        .collect();
    let blocks: Vec<usize> = (0..channels).step_by(CHANNEL_BLOCK).collect();
    let parts: Vec<Vec<f32>> = blocks
        .par_iter()
        .map(|&from| {
            let count = CHANNEL_BLOCK.min(channels - from);
            let mut out = vec![0f32; outputs.next_multiple_of(GRADIENT_OUTPUTS) * count * 9];
            Arch::new().dispatch(Gradient { pictures, spread: &spread, flat, from, count, out: &mut out });
            out
        })
        .collect();
    for (from, part) in blocks.into_iter().zip(parts) {
        let width = 9 * CHANNEL_BLOCK.min(channels - from);
        for (output, part) in part.chunks_exact(width).take(outputs).enumerate() {
            let to = &mut sum[(output * channels + from) * 9..][..width];
            to.iter_mut().zip(part).for_each(|(sum, term)| *sum += term);
        }
    }
}

/// The gradient for the channels `from..from + count`.
struct Gradient<'a> {
    pictures: &'a [(Padded, &'a [f32])],
    /// Per picture `[outputs, flat]`
    spread: &'a [Vec<f32>],
    flat: usize,
    from: usize,
    count: usize,
    /// `[outputs, count, 9]`
    out: &'a mut [f32],
}

impl WithSimd for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let blocks = self.out.len() / (GRADIENT_OUTPUTS * self.count * 9);
        for block in 0..blocks {
            for channel in 0..self.count {
                let sums = if S::F32_LANES == 8 {
                    // Sixteen registers hold a third of the taps. No closure calls this: its body would be compiled for any
                    // processor, and every instruction of this one would become a function call.
                    let rows = [
                        self.taps::<S, 1>(simd, block, channel, 0),
                        self.taps::<S, 1>(simd, block, channel, 1),
                        self.taps::<S, 1>(simd, block, channel, 2),
                    ];
                    std::array::from_fn(|m| std::array::from_fn(|tap| rows[tap / 3][m][tap % 3]))
                } else {
                    self.taps::<S, 3>(simd, block, channel, 0)
                };
                for (m, sums) in sums.iter().enumerate() {
                    let to = ((block * GRADIENT_OUTPUTS + m) * self.count + channel) * 9;
                    self.out[to..to + 9].copy_from_slice(sums);
                }
            }
        }
    }
}

impl Gradient<'_> {
    /// For every output of the block the sums of `ROWS` rows of taps from row `top` on; the rest is 0.
    #[inline(always)]
    fn taps<S: Simd, const ROWS: usize>(
        &self,
        simd: S,
        block: usize,
        channel: usize,
        top: usize,
    ) -> [[f32; 9]; GRADIENT_OUTPUTS] {
        let mut sums = [[[simd.splat_f32s(0.0); GRADIENT_OUTPUTS]; 3]; ROWS];
        for ((x, _), spread) in self.pictures.iter().zip(self.spread) {
            let row = x.row();
            let source = &x.data[(self.from + channel) * x.plane() + top * row..];
            let gradients: [&[S::f32s]; GRADIENT_OUTPUTS] = std::array::from_fn(|m| {
                let start = (block * GRADIENT_OUTPUTS + m) * self.flat;
                S::as_simd_f32s(&spread[start..start + self.flat]).0
            });
            let shifted: [[&[S::f32s]; 3]; ROWS] = std::array::from_fn(|dy| {
                std::array::from_fn(|dx| S::as_simd_f32s(&source[dy * row + dx..][..self.flat]).0)
            });
            for i in 0..self.flat / S::F32_LANES {
                let mut gradient = [simd.splat_f32s(0.0); GRADIENT_OUTPUTS];
                for (gradient, all) in gradient.iter_mut().zip(&gradients) {
                    *gradient = all[i];
                }
                for (sums, shifted) in sums.iter_mut().zip(&shifted) {
                    for (sums, shifted) in sums.iter_mut().zip(shifted) {
                        let pixels = shifted[i];
                        for (sum, gradient) in sums.iter_mut().zip(&gradient) {
                            *sum = simd.mul_add_e_f32s(*gradient, pixels, *sum);
                        }
                    }
                }
            }
        }
        let mut out = [[0f32; 9]; GRADIENT_OUTPUTS];
        for (dy, sums) in sums.iter().enumerate() {
            for (dx, sums) in sums.iter().enumerate() {
                for (m, sum) in sums.iter().enumerate() {
                    out[m][3 * dy + dx] = simd.reduce_sum_f32s(*sum);
                }
            }
        }
        out
    }
}
