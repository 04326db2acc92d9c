//! The softmax of a block of scores, sixteen rows to a vector.
//!
//! Loops over the lanes of a line are written out in plain Rust: compiled for the processor that runs them
//! ([`pulp::Arch::dispatch`]), each becomes one instruction.

use std::f32::consts::LOG2_E;
use std::marker::PhantomData;

use pulp::{Simd, WithSimd};

use crate::attention::BlockScores;
use crate::element::{Float, Units};
use crate::line::{LANES, Line};

type Lanes = [f32; LANES];

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> Lanes {
    let mut all = [0f32; LANES];
    for (i, lane) in all.iter_mut().enumerate() {
        *lane = f(i);
    }
    all
}

/// `eˣ` for `x ≤ 0`, to within two units of the last place; 0 where an f32 would lose digits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding this number rounds to a whole one, which then stands in the lowest bits.
    const ROUNDER: f32 = 12_582_912.0;
    // ln 2 in two parts, of which the first has few enough digits to be multiplied exactly.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    let rounded = x * LOG2_E + ROUNDER;
    let whole = rounded - ROUNDER;
    let rest = x - whole * LN_2.0 - whole * LN_2.1;
    let mut sum = 1.0 / 720.0;
    for term in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * rest + term;
    }
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { sum * power }
}

/// Turns scores `[keys, lines]` into probabilities, packed in units over the keys `[units, lines]` in the same place.
pub(crate) struct Softmax<'a, T, U> {
    pub(crate) scores: &'a mut [Line],
    pub(crate) lines: usize,
    pub(crate) keys: usize,
    pub(crate) rule: BlockScores<'a>,
    pub(crate) head_dim: usize,
    /// One per row of the block.
    pub(crate) lse: &'a mut [f32],
    pub(crate) how: PhantomData<(T, U)>,
}

impl<T: Float, U: Units<T>> WithSimd for Softmax<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let root = (self.head_dim as f32).sqrt();
        for (line, lse) in self.lse.chunks_mut(LANES).enumerate() {
            let scores = &mut self.scores[line..];
            let max = match self.rule {
                BlockScores::Causal { seen } => {
                    causal::<T>(scores, self.lines, self.keys, seen + line * LANES, root)
                }
                BlockScores::Full { divided } => {
                    let root = if divided { root } else { 1.0 };
                    causal::<T>(scores, self.lines, self.keys, self.keys, root)
                }
                BlockScores::Relative { by_row, by_column, height, columns, first } => {
                    let first = first + line * LANES;
                    let (by_row, by_column) = (
                        &by_row[line * LANES * (2 * height - 1)..],
                        &by_column[line * LANES * (2 * columns - 1)..],
                    );
                    let by_row = turned(by_row, height, lse.len(), |i| (first + i) / columns);
                    let by_column = turned(by_column, columns, lse.len(), |i| (first + i) % columns);
                    relative(scores, self.lines, &by_row, &by_column, 1.0 / root)
                }
            };
            let mut sum = [0f32; LANES];
            for line in scores.iter_mut().step_by(self.lines).take(self.keys) {
                let e = lanes(|i| exp(line.float(i) - max[i]));
                sum = lanes(|i| sum[i] + e[i]);
                *line = Line::of(e);
            }
            // The last unit may lack keys.
            for key in self.keys..self.keys.next_multiple_of(U::PER_UNIT) {
                scores[key * self.lines] = Line::ZERO;
            }
            let inverse = lanes(|i| 1.0 / sum[i]);
            for unit in 0..self.keys.div_ceil(U::PER_UNIT) {
                let first = scores[unit * U::PER_UNIT * self.lines];
                let last = scores[(unit * U::PER_UNIT + U::PER_UNIT - 1) * self.lines];
                let mut packed = Line::ZERO;
                for (i, unit) in packed.0.iter_mut().enumerate() {
                    *unit =
                        U::of(T::round(first.float(i) * inverse[i]), T::round(last.float(i) * inverse[i]));
                }
                scores[unit * self.lines] = packed;
            }
            lse.iter_mut().enumerate().for_each(|(i, lse)| *lse = max[i] + sum[i].ln());
        }
    }
}

/// Scales and rounds the scores of sixteen rows, of which the first sees `seen` keys; their largest ones.
#[inline(always)]
fn causal<T: Float>(scores: &mut [Line], lines: usize, keys: usize, seen: usize, root: f32) -> Lanes {
    let mut max = [f32::NEG_INFINITY; LANES];
    let round = |score: f32| T::round(T::round(score).widen() / root).widen();
    for (key, line) in scores.iter_mut().step_by(lines).take(keys).enumerate() {
        let mut score = lanes(|i| round(line.float(i)));
        if key >= seen {
            score = lanes(|i| if key >= seen + i { f32::NEG_INFINITY } else { score[i] });
        }
        max = lanes(|i| if score[i] > max[i] { score[i] } else { max[i] });
        *line = Line::of(score);
    }
    max
}

/// Scales the scores of sixteen rows and adds what row and column of the key give; their largest ones.
#[inline(always)]
fn relative(scores: &mut [Line], lines: usize, by_row: &[Lanes], by_column: &[Lanes], scale: f32) -> Lanes {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut scores = scores.iter_mut().step_by(lines);
    for row in by_row {
        for (column, line) in by_column.iter().zip(&mut scores) {
            let score = lanes(|i| line.float(i) * scale + row[i] + column[i]);
            max = lanes(|i| if score[i] > max[i] { score[i] } else { max[i] });
            *line = Line::of(score);
        }
    }
    max
}

/// What `rows` queries at `place` on an axis of `size` places add for each place of a key: `[size]` lines, of `numbers
/// [rows, 2 · size − 1]`; zeros for rows that are missing.
#[inline(always)]
fn turned(numbers: &[f32], size: usize, rows: usize, place: impl Fn(usize) -> usize) -> Vec<Lanes> {
    let mut lines = vec![[0f32; LANES]; size];
    for (i, numbers) in numbers.chunks_exact(2 * size - 1).take(rows).enumerate() {
        let seen = &numbers[size - 1 - place(i)..][..size];
        lines.iter_mut().zip(seen).for_each(|(line, &number)| line[i] = number);
    }
    lines
}

/// The softmax of a few rows, and its product with the values.
pub(crate) struct Decode<'a, T> {
    /// `[keys, heads · rows]`: the heads that share their keys.
    pub(crate) scores: &'a mut [f32],
    /// Rows of a head.
    pub(crate) rows: usize,
    /// `[keys, head_dim]`
    pub(crate) v: &'a [T],
    pub(crate) head_dim: usize,
    /// `[heads · rows, head_dim]`, zeros before.
    pub(crate) mixed: &'a mut [f32],
    /// `[heads · rows]`
    pub(crate) lse: &'a mut [f32],
}

impl<T: Float> WithSimd for Decode<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { scores, rows, v, head_dim, mixed, lse } = self;
        let (group, root) = (lse.len(), (head_dim as f32).sqrt());
        let keys = scores.len() / group;
        let mut row_scores = vec![[f32::NEG_INFINITY; LANES]; keys.div_ceil(LANES)];
        for (row, lse) in lse.iter_mut().enumerate() {
            // A later row of the same head sees one key more; the last one sees all.
            let seen = keys + row % rows + 1 - rows;
            let flat = row_scores.as_flattened_mut();
            flat.fill(f32::NEG_INFINITY);
            for (to, score) in flat.iter_mut().zip(scores.iter().skip(row).step_by(group)).take(seen) {
                *to = T::round(T::round(*score).widen() / root).widen();
            }
            let mut most = [f32::NEG_INFINITY; LANES];
            for score in &row_scores {
                most = lanes(|i| if score[i] > most[i] { score[i] } else { most[i] });
            }
            let max = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
            let mut sums = [0f32; LANES];
            for score in &mut row_scores {
                *score = lanes(|i| exp(score[i] - max));
                sums = lanes(|i| sums[i] + score[i]);
            }
            let sum = sums.into_iter().sum::<f32>();
            *lse = max + sum.ln();
            let flat = row_scores.as_flattened();
            for (e, to) in flat.iter().zip(scores.iter_mut().skip(row).step_by(group)) {
                *to = T::round(e / sum).widen();
            }
        }
        for (probs, v) in scores.chunks_exact(group).zip(v.chunks_exact(head_dim)) {
            for (&p, mixed) in probs.iter().zip(mixed.chunks_exact_mut(head_dim)) {
                mixed.iter_mut().zip(v).for_each(|(mixed, v)| *mixed += p * v.widen());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exponentials() {
        for i in 0..200_000 {
            let x = -(i as f32) * 5e-4;
            let (got, expected) = (super::exp(x), f64::from(x).exp());
            let error = (f64::from(got) - expected).abs();
            assert!(error <= expected * 2.5e-7 || expected < 1.7e-38, "e^{x}: {got} instead of {expected}");
        }
        assert_eq!((super::exp(0.0), super::exp(f32::NEG_INFINITY)), (1.0, 0.0));
    }
}
