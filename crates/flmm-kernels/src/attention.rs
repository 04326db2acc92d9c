//! Attention without a matrix of scores: a block of query rows at a time, which stays in the second-level cache.
//!
//! A vector holds one score of sixteen query rows, so that maximum, sum and quotient of a row never cross lanes, and the
//! probabilities are already packed for the product with the values.

use std::marker::PhantomData;

use pulp::Arch;
use rayon::prelude::*;

use crate::element::{Float, Units};
use crate::few::{FEW, Few};
use crate::finish::{Columns, Finish};
use crate::kernel::{Kernel, Weights};
use crate::line::{LANES, Line};
use crate::pack::Pack;
use crate::softmax::{Decode, Softmax};

/// Lines of scores that a block of rows may take, so that they stay in the second-level cache (512 KiB).
const BLOCK: usize = 1 << 13;

/// Sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionSizes {
    /// Attentions that are computed apart: texts, or windows of a picture.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` reads key head `h · kv_heads / heads`.
    pub kv_heads: usize,
    /// Queries of a head.
    pub rows: usize,
    /// Keys of a head.
    pub keys: usize,
    /// Size of a head.
    pub head_dim: usize,
}

/// Keys or values `[batch · kv_heads, keys, head_dim]`, whose heads may lie apart.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a, T> {
    /// The numbers, from the first head's first on.
    pub data: &'a [T],
    /// From one head to the next.
    pub stride: usize,
}

impl<'a, T> Heads<'a, T> {
    fn head(&self, index: usize, len: usize) -> &'a [T] {
        &self.data[index * self.stride..][..len]
    }
}

/// What is done with the scores `q·k`.
#[derive(Debug, Clone, Copy)]
pub enum Scores<'a> {
    /// Divided by `√head_dim`; product and quotient are rounded to the type of the queries. The rows are the last of the
    /// keys, and no row sees a later key.
    Causal,
    /// As causal ones, but every row sees every key.
    Full {
        /// Whether there is a quotient; otherwise the queries have been divided before.
        divided: bool,
    },
    /// Divided by `√head_dim`, then two numbers are added that depend on where the key lies relative to the query:
    /// queries and keys are the same places of a grid of `height` rows, counted row by row.
    Relative {
        /// `[batch · heads, rows, 2 · height − 1]`: number `key's row − query's row + height − 1` of a query is added.
        by_row: &'a [f32],
        /// `[batch · heads, rows, 2 · columns − 1]`, likewise.
        by_column: &'a [f32],
        /// Columns of the grid.
        columns: usize,
    },
}

/// Softmax of the scores times the values.
///
/// `q [batch · heads, rows, head_dim]`, `y [batch, rows, heads · head_dim]`; `lse [batch · heads, rows]` receives the
/// log-sum-exp of every row of scores. The softmax is computed in f32, and probabilities are rounded to the type of the
/// values, with which they are multiplied.
pub(crate) fn attention<T, U, K>(
    kernel: K,
    q: &[T],
    [k, v]: [Heads<T>; 2],
    sizes: AttentionSizes,
    scores: Scores,
    y: &mut [T],
    lse: &mut [f32],
) where
    T: Float,
    U: Units<T>,
    K: Kernel + Few<T>,
{
    let AttentionSizes { batch, heads, kv_heads, rows, keys, head_dim } = sizes;
    assert!(kv_heads > 0 && heads % kv_heads == 0, "{heads} query heads cannot share {kv_heads} key heads");
    assert_eq!(q.len(), batch * heads * rows * head_dim, "q is not [{}, {rows}, {head_dim}]", batch * heads);
    assert_eq!(y.len(), q.len(), "y is not [{batch}, {rows}, {}]", heads * head_dim);
    assert_eq!(lse.len(), batch * heads * rows, "lse is not [{}, {rows}]", batch * heads);
    for numbers in [k, v] {
        let len = (batch * kv_heads - 1) * numbers.stride + keys * head_dim;
        assert!(
            numbers.data.len() >= len,
            "keys or values are not [{}, {keys}, {head_dim}]",
            batch * kv_heads
        );
    }
    match scores {
        Scores::Causal => assert!(rows <= keys, "{rows} rows are not the last of {keys} keys"),
        Scores::Full { .. } => (),
        Scores::Relative { by_row, by_column, columns } => assert!(
            rows == keys
                && keys.is_multiple_of(columns)
                && by_row.len() == lse.len() * (2 * (keys / columns) - 1)
                && by_column.len() == lse.len() * (2 * columns - 1),
            "relative scores do not fit {rows} queries and {keys} keys on a grid of {columns} columns"
        ),
    }
    if q.is_empty() {
        return;
    }
    let job = Job { kernel, q, k, v, sizes, scores, width: heads * sizes.head_dim };
    if heads / kv_heads * rows <= FEW && matches!(scores, Scores::Causal) {
        job.decode(y, lse);
    } else {
        job.prefill::<U>(y, lse);
    }
}

struct Job<'a, T, K> {
    kernel: K,
    q: &'a [T],
    k: Heads<'a, T>,
    v: Heads<'a, T>,
    sizes: AttentionSizes,
    scores: Scores<'a>,
    /// Of a row of the result.
    width: usize,
}

/// Keys and values of one head in units.
struct PackedHead {
    /// `[keys, units of a head]`, keys filled up to a multiple of [`Kernel::outputs`].
    keys: Vec<u32>,
    /// `[head_dim, units of all keys]`, filled up likewise.
    values: Vec<u32>,
}

impl<T: Float, K: Kernel + Few<T>> Job<'_, T, K> {
    fn prefill<U: Units<T>>(&self, y: &mut [T], lse: &mut [f32]) {
        let AttentionSizes { batch, heads, kv_heads, rows, keys, head_dim } = self.sizes;
        let packed: Vec<PackedHead> =
            (0..batch * kv_heads).into_par_iter().map(|head| self.pack::<U>(head)).collect();
        let lines = (BLOCK / keys).clamp(1, self.kernel.panel());
        let y = Columns::new(y, self.width);
        let tasks = lse.par_chunks_mut(rows).enumerate().flat_map(|(head, lse)| {
            lse.par_chunks_mut(lines * LANES).enumerate().map(move |(block, lse)| (head, block, lse))
        });
        tasks.for_each_init(
            || Block::new(self.kernel.outputs(), lines, keys, head_dim.div_ceil(U::PER_UNIT), head_dim),
            |scratch, (head, block, lse)| {
                let group = head / heads * kv_heads + head % heads * kv_heads / heads;
                let first = block * lines * LANES;
                scratch.run::<T, U, K>(self, head, &packed[group], first, lse);
                let column = head % heads * head_dim;
                let row = head / heads * rows + first;
                Arch::new().dispatch(Finish {
                    sums: &scratch.mixed,
                    lines: lse.len().div_ceil(LANES),
                    panel: lines,
                    outputs: head_dim,
                    bias: None,
                    y: &y,
                    rows: row..row + lse.len(),
                    columns: column..column + head_dim,
                });
            },
        );
    }

    fn pack<U: Units<T>>(&self, head: usize) -> PackedHead {
        let AttentionSizes { keys, head_dim, .. } = self.sizes;
        let (units, key_units) = (head_dim.div_ceil(U::PER_UNIT), keys.div_ceil(U::PER_UNIT));
        let outputs = self.kernel.outputs();
        let mut packed = PackedHead {
            keys: vec![0; keys.next_multiple_of(outputs) * units],
            values: vec![0; head_dim.next_multiple_of(outputs) * key_units],
        };
        let k = self.k.head(head, keys * head_dim).chunks_exact(head_dim);
        packed.keys.chunks_exact_mut(units).zip(k).for_each(|(units, k)| U::write(k, units));
        let v = self.v.head(head, keys * head_dim);
        for first in (0..keys).step_by(LANES) {
            let count = LANES.min(keys - first);
            let units = first / U::PER_UNIT..(first + count).div_ceil(U::PER_UNIT);
            for (column, values) in packed.values.chunks_exact_mut(key_units).take(head_dim).enumerate() {
                let numbers: [T; LANES] = std::array::from_fn(|i| match i < count {
                    true => v[(first + i) * head_dim + column],
                    false => T::round(0.0),
                });
                U::write(&numbers[..count], &mut values[units.clone()]);
            }
        }
        packed
    }

    /// Few rows: keys and values are read once and not copied.
    fn decode(&self, y: &mut [T], lse: &mut [f32]) {
        let AttentionSizes { batch, heads, kv_heads, rows, keys, head_dim } = self.sizes;
        let group = heads / kv_heads * rows;
        // `[batch · heads, rows, head_dim]`
        let mut mixed = vec![0f32; batch * heads * rows * head_dim];
        let tasks = mixed.par_chunks_mut(group * head_dim).zip(lse.par_chunks_mut(group)).enumerate();
        tasks.for_each(|(head, (mixed, lse))| {
            let q = self.kernel.prepare(&self.q[head * group * head_dim..][..group * head_dim], head_dim);
            let mut scores = vec![0f32; keys * group];
            self.kernel.sums(&q, self.k.head(head, keys * head_dim), head_dim, &mut scores);
            let v = self.v.head(head, keys * head_dim);
            Arch::new().dispatch(Decode { scores: &mut scores, rows, v, head_dim, mixed, lse });
        });
        for (at, mixed) in mixed.chunks_exact(head_dim).enumerate() {
            let (head, row) = (at / rows, at % rows);
            let to = (head / heads * rows + row) * self.width + head % heads * head_dim;
            y[to..][..head_dim].iter_mut().zip(mixed).for_each(|(y, &mixed)| *y = T::round(mixed));
        }
    }
}

/// What one thread needs for a block of rows.
struct Block {
    /// `[units of a head, lines]`
    queries: Vec<Line>,
    /// `[keys, lines]`: scores, then probabilities in units.
    scores: Vec<Line>,
    /// `[head_dim, lines]`
    mixed: Vec<Line>,
}

impl Block {
    fn new(outputs: usize, lines: usize, keys: usize, units: usize, head_dim: usize) -> Self {
        Self {
            queries: vec![Line::ZERO; units * lines],
            // One more for the other half of a last unit.
            scores: vec![Line::ZERO; (keys.next_multiple_of(outputs) + 1) * lines],
            mixed: vec![Line::ZERO; (head_dim.next_multiple_of(LANES) + outputs) * lines],
        }
    }

    /// The rows from `first` on, as many as `lse` has, of query head `head`; [`Block::mixed`] holds the result.
    fn run<T: Float, U: Units<T>, K: Kernel>(
        &mut self,
        job: &Job<T, K>,
        head: usize,
        packed: &PackedHead,
        first: usize,
        lse: &mut [f32],
    ) {
        let AttentionSizes { rows, keys, head_dim, .. } = job.sizes;
        let (lines, units) = (lse.len().div_ceil(LANES), head_dim.div_ceil(U::PER_UNIT));
        let arch = Arch::new();
        let queries = &mut self.queries[..units * lines];
        let x = &job.q[(head * rows + first) * head_dim..][..lse.len() * head_dim];
        arch.dispatch(Pack::<T, U> {
            x,
            rows: lse.len(),
            inputs: head_dim,
            columns: 0..head_dim,
            lines: queries,
            units,
            how: PhantomData,
        });

        // Later keys are masked for every row of the block, so they need not be looked at.
        let seen = match job.scores {
            Scores::Causal => keys - rows + first + lse.len(),
            Scores::Full { .. } | Scores::Relative { .. } => keys,
        };
        job.kernel.within(|| {
            for key in (0..seen).step_by(job.kernel.outputs()) {
                let weights = Weights::rows(&packed.keys[key * units..], units, units);
                job.kernel.tile(queries, lines, weights, &mut self.scores[key * lines..], false);
            }
        });
        arch.dispatch(Softmax::<T, U> {
            scores: &mut self.scores,
            lines,
            keys: seen,
            rule: job.scores.of_block(job.sizes, head, first),
            head_dim,
            lse,
            how: PhantomData,
        });
        let (depth, stride) = (seen.div_ceil(U::PER_UNIT), keys.div_ceil(U::PER_UNIT));
        job.kernel.within(|| {
            for column in (0..head_dim).step_by(job.kernel.outputs()) {
                let weights = Weights::rows(&packed.values[column * stride..], depth, stride);
                job.kernel.tile(&self.scores, lines, weights, &mut self.mixed[column * lines..], false);
            }
        });
    }
}

/// [`Scores`] of a block of rows of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BlockScores<'a> {
    /// The first row sees this many keys, every further row one more.
    Causal { seen: usize },
    /// As [`Scores::Full`].
    Full { divided: bool },
    /// As [`Scores::Relative`], for the queries from number `first` on.
    Relative { by_row: &'a [f32], by_column: &'a [f32], height: usize, columns: usize, first: usize },
}

impl<'a> Scores<'a> {
    fn of_block(&self, sizes: AttentionSizes, head: usize, first: usize) -> BlockScores<'a> {
        match *self {
            Self::Causal => BlockScores::Causal { seen: sizes.keys - sizes.rows + first + 1 },
            Self::Full { divided } => BlockScores::Full { divided },
            Self::Relative { by_row, by_column, columns } => {
                let (row, height) = (head * sizes.rows + first, sizes.keys / columns);
                let by_row = &by_row[row * (2 * height - 1)..];
                let by_column = &by_column[row * (2 * columns - 1)..];
                BlockScores::Relative { by_row, by_column, height, columns, first }
            }
        }
    }
}
