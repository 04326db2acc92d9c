//! Attention over packed conversations, computed where it is not masked: the keys that all rows share in dense products,
//! each row's own conversation apart.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, bail};

use super::product::{Buffer, Matrices, Numbers};
use super::rows::{add_times, dot, softmax, softmax_backward, wide};

/// Which keys each query sees when several conversations share one prefix.
///
/// Row `i` of sample `b` sees keys `0..prefix` and `starts[b · S + i] ..= i`, both cut at `i`: causal
/// attention in which the conversations behind the prefix do not see one another.
#[derive(Debug, Clone)]
pub(crate) struct PackedMask {
    /// Tokens every row may see (those before it).
    pub(crate) prefix: usize,
    /// For each sample and row (`[B · S]`), the first token of the conversation the row belongs to.
    pub(crate) starts: Vec<u32>,
}

/// The attention of a batch `[B, S]`, with `heads` heads of `head` numbers.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) batch: usize,
    pub(crate) rows: usize,
    pub(crate) heads: usize,
    pub(crate) head: usize,
    /// Which keys a row sees; all unless given.
    pub(crate) mask: Option<Arc<PackedMask>>,
}

/// Probabilities of one sample.
pub(crate) struct Probabilities {
    /// Of the keys before the conversations, `[heads, S, shared keys]`.
    shared: Buffer,
    /// Of the keys of each row's own conversation: row by row, head by head.
    own: Vec<f32>,
}

/// Attention maps that are part of a result: of `heads`, all rows, the keys from `first` to the conversations.
#[derive(Debug, Clone, Default)]
pub(crate) struct Maps {
    pub(crate) heads: Vec<usize>,
    pub(crate) first: usize,
}

impl Attention {
    fn width(&self) -> usize {
        self.heads * self.head
    }

    /// Keys that rows share: those before the conversations.
    pub(crate) fn shared(&self) -> usize {
        self.mask.as_ref().map_or(self.rows, |mask| mask.prefix.min(self.rows))
    }

    /// How many of the shared keys one of the rows before the conversations sees.
    fn seen(&self, row: usize) -> usize {
        if self.mask.is_some() { row + 1 } else { self.rows }
    }

    /// The keys of its own conversation that a row behind the shared ones sees.
    fn own(&self, sample: usize, row: usize) -> Range<usize> {
        let start = self.mask.as_ref().map_or(row, |mask| mask.starts[sample * self.rows + row] as usize);
        start.max(self.shared()).min(row)..row + 1
    }

    /// Every row behind the shared ones with its keys.
    fn conversations(&self, sample: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        (self.shared()..self.rows).map(move |row| (row, self.own(sample, row)))
    }

    /// Where head `head` of row `row` begins: of its query (`part` 0), key (1) or value (2).
    fn at(&self, part: usize, row: usize, head: usize) -> usize {
        (3 * row + part) * self.width() + head * self.head
    }

    /// Queries, keys or values `[heads, rows, head]` of a sample's first `rows` rows.
    fn part<'a>(&self, qkv: Numbers<'a>, part: usize, rows: usize) -> Matrices<'a> {
        Matrices::heads(qkv.skip(part * self.width()), [self.heads, rows, self.head], 3 * self.width())
    }

    /// Numbers of a sample in `[B, S, n · width]`.
    fn sample(&self, index: usize, n: usize) -> Range<usize> {
        let len = n * self.rows * self.width();
        index * len..(index + 1) * len
    }

    /// The shared probabilities of a row, or what has their form.
    fn row(&self, head: usize, row: usize) -> Range<usize> {
        let start = (head * self.rows + row) * self.shared();
        start..start + self.shared()
    }

    fn scale(&self) -> f32 {
        (self.head as f32).sqrt().recip()
    }

    /// The probabilities, and the values `[B, S, width]` they pick, of `qkv [B, S, 3 · width]`.
    pub(crate) fn forward(&self, qkv: &Buffer) -> Result<(Vec<Probabilities>, Buffer)> {
        let whole = self.batch * self.rows;
        if qkv.len() != whole * 3 * self.width() {
            bail!("queries, keys and values do not fit {self:?}");
        }
        if self.mask.as_ref().is_some_and(|mask| mask.starts.len() != whole) {
            bail!("the mask does not fit {self:?}");
        }
        let mut y = vec![0f32; whole * self.width()];
        let mut probabilities = Vec::with_capacity(self.batch);
        for index in 0..self.batch {
            let (numbers, shared) = (Numbers::from(qkv).skip(self.sample(index, 3).start), self.shared());
            let keys = self.part(numbers, 1, shared);
            let mut p = Probabilities {
                shared: self.part(numbers, 0, self.rows).multiply(keys.t())?,
                own: self.own_scores(index, &qkv[self.sample(index, 3)], 0, &qkv[self.sample(index, 3)]),
            };
            self.normalise(index, &mut p);
            let picked = Matrices::stacked(&p.shared, [self.heads, self.rows, shared])
                .multiply(self.part(numbers, 2, shared))?;
            let y = &mut y[self.sample(index, 1)];
            self.merge(&picked, y, self.width(), 0);
            self.pick_own(index, &p.own, &qkv[self.sample(index, 3)], y);
            probabilities.push(p);
        }
        Ok((probabilities, y.into()))
    }

    /// Products of every row's heads in `rows`, `[S, width]` or part 0 of `[S, 3 · width]`, and its conversation's keys
    /// (`part` 1) or values (2) in `qkv`.
    fn own_scores(&self, index: usize, rows: &[f32], part: usize, qkv: &[f32]) -> Vec<f32> {
        let (stride, part) = if part == 0 { (3 * self.width(), 1) } else { (self.width(), part) };
        let mut scores = Vec::new();
        wide(|| {
            for (row, keys) in self.conversations(index) {
                for head in 0..self.heads {
                    let x = &rows[row * stride + head * self.head..][..self.head];
                    for key in keys.clone() {
                        scores.push(dot(x, &qkv[self.at(part, key, head)..][..self.head]));
                    }
                }
            }
        });
        scores
    }

    /// Softmax of scores, in place.
    fn normalise(&self, index: usize, p: &mut Probabilities) {
        let scale = self.scale();
        wide(|| {
            for head in 0..self.heads {
                for row in 0..self.shared() {
                    let (seen, unseen) = p.shared[self.row(head, row)].split_at_mut(self.seen(row));
                    softmax(scale, [seen, &mut []]);
                    unseen.fill(0.0);
                }
            }
            let mut own = &mut p.own[..];
            for (row, keys) in self.conversations(index) {
                for head in 0..self.heads {
                    let (first, rest) = std::mem::take(&mut own).split_at_mut(keys.len());
                    softmax(scale, [&mut p.shared[self.row(head, row)], first]);
                    own = rest;
                }
            }
        });
    }

    /// Copies `[heads, rows, head]` to columns of `y [.., stride]` from `first` on.
    fn merge(&self, x: &[f32], y: &mut [f32], stride: usize, first: usize) {
        let rows = x.len() / self.width();
        for (head, x) in x.chunks_exact(rows * self.head).enumerate() {
            for (x, y) in x.chunks_exact(self.head).zip(y.chunks_exact_mut(stride)) {
                y[first + head * self.head..][..self.head].copy_from_slice(x);
            }
        }
    }

    /// Adds the values of every row's own conversation to `y [S, width]`.
    fn pick_own(&self, index: usize, own: &[f32], qkv: &[f32], y: &mut [f32]) {
        wide(|| {
            let mut own = own.iter();
            for (row, keys) in self.conversations(index) {
                for head in 0..self.heads {
                    let y = &mut y[row * self.width() + head * self.head..][..self.head];
                    for (key, p) in keys.clone().zip(&mut own) {
                        add_times(y, *p, &qkv[self.at(2, key, head)..][..self.head]);
                    }
                }
            }
        });
    }

    /// The gradient of `qkv`, from those of the result, `dy [B, S, width]`, and of `maps`, `[heads, B, S, keys]`.
    pub(crate) fn backward(
        &self,
        qkv: &Buffer,
        probabilities: &[Probabilities],
        dy: &Buffer,
        (maps, d_maps): (&Maps, &[f32]),
    ) -> Result<Buffer> {
        let (shared, width) = (self.shared(), self.width());
        let mut dqkv = vec![0f32; qkv.len()];
        for (index, p) in probabilities.iter().enumerate() {
            let numbers = Numbers::from(qkv).skip(self.sample(index, 3).start);
            let dy_heads = |rows| {
                let numbers = Numbers::from(dy).skip(self.sample(index, 1).start);
                Matrices::heads(numbers, [self.heads, rows, self.head], width)
            };
            let x = &qkv[self.sample(index, 3)];
            let mut d = Probabilities {
                shared: dy_heads(self.rows).multiply(self.part(numbers, 2, shared).t())?,
                own: self.own_scores(index, &dy[self.sample(index, 1)], 2, x),
            };
            self.add_maps(index, maps, d_maps, &mut d.shared);
            self.normalise_backward(index, p, &mut d);
            let sizes = [self.heads, self.rows, shared];
            let dx = &mut dqkv[self.sample(index, 3)];
            let d_scores = Matrices::stacked(&d.shared, sizes);
            let dq = d_scores.multiply(self.part(numbers, 1, shared))?;
            self.merge(&dq, dx, 3 * width, 0);
            let dk = d_scores.t().multiply(self.part(numbers, 0, self.rows))?;
            self.merge(&dk, dx, 3 * width, width);
            let dv = Matrices::stacked(&p.shared, sizes).t().multiply(dy_heads(self.rows))?;
            self.merge(&dv, dx, 3 * width, 2 * width);
            self.own_backward(index, (&p.own, &d.own), x, &dy[self.sample(index, 1)], dx);
        }
        Ok(dqkv.into())
    }

    /// The gradients of scores from those of probabilities, in place.
    fn normalise_backward(&self, index: usize, p: &Probabilities, d: &mut Probabilities) {
        let scale = self.scale();
        wide(|| {
            for head in 0..self.heads {
                for row in 0..self.shared() {
                    let p = &p.shared[self.row(head, row)][..self.seen(row)];
                    let (seen, unseen) = d.shared[self.row(head, row)].split_at_mut(p.len());
                    softmax_backward(scale, [p, &[]], [seen, &mut []]);
                    unseen.fill(0.0);
                }
            }
            let mut at = 0;
            for (row, keys) in self.conversations(index) {
                for head in 0..self.heads {
                    let (row, own) = (self.row(head, row), at..at + keys.len());
                    let p = [&p.shared[row.clone()], &p.own[own.clone()]];
                    softmax_backward(scale, p, [&mut d.shared[row], &mut d.own[own]]);
                    at += keys.len();
                }
            }
        });
    }

    /// Adds to `dqkv` what comes from the rows' own conversations, given their probabilities and the gradients of their
    /// scores.
    fn own_backward(
        &self,
        index: usize,
        (own, d_own): (&[f32], &[f32]),
        qkv: &[f32],
        dy: &[f32],
        dqkv: &mut [f32],
    ) {
        let mut query = vec![0f32; self.head];
        wide(|| {
            let mut pairs = own.iter().zip(d_own);
            for (row, keys) in self.conversations(index) {
                for head in 0..self.heads {
                    let q = &qkv[self.at(0, row, head)..][..self.head];
                    let dy = &dy[row * self.width() + head * self.head..][..self.head];
                    query.fill(0.0);
                    for (key, (p, d)) in keys.clone().zip(&mut pairs) {
                        add_times(&mut query, *d, &qkv[self.at(1, key, head)..][..self.head]);
                        add_times(&mut dqkv[self.at(1, key, head)..][..self.head], *d, q);
                        add_times(&mut dqkv[self.at(2, key, head)..][..self.head], *p, dy);
                    }
                    add_times(&mut dqkv[self.at(0, row, head)..][..self.head], 1.0, &query);
                }
            }
        });
    }

    /// Appends `maps`, `[heads, B, S, keys]`, to `out`.
    pub(crate) fn append_maps(&self, probabilities: &[Probabilities], maps: &Maps, out: &mut Vec<f32>) {
        for head in &maps.heads {
            for p in probabilities {
                for row in 0..self.rows {
                    out.extend_from_slice(&p.shared[self.row(*head, row)][maps.first..]);
                }
            }
        }
    }

    fn add_maps(&self, index: usize, maps: &Maps, gradients: &[f32], shared: &mut [f32]) {
        let keys = self.shared() - maps.first;
        let (of_sample, of_head) = (self.rows * keys, self.batch * self.rows * keys);
        for (head, gradients) in maps.heads.iter().zip(gradients.chunks_exact(of_head.max(1))) {
            let gradients = &gradients[index * of_sample..][..of_sample];
            for (row, gradients) in gradients.chunks_exact(keys.max(1)).enumerate() {
                add_times(&mut shared[self.row(*head, row)][maps.first..], 1.0, gradients);
            }
        }
    }
}
