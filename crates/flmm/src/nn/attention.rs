//! Attention of trained layers as one operation on the CPU, made for few rows on one side and many on the other: the
//! prompt's tokens and the picture's positions of SAM's mask decoder.
//!
//! The longer side lies along the vector units whichever it is, so that queries over nine keys cost as little as nine
//! queries over all positions. Probabilities are computed again for the backward pass instead of being kept.

use std::slice::ChunksExactMut;

use candle_core::{CpuStorage, CustomOp3, Layout, Result as CandleResult, Shape, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::activation::exp;
use super::host::{Elements, elements, fusable};
use super::softmax::softmax_last_dim;
use crate::error::Result;

/// `softmax(q · kᵀ / √d) · v` in each of `heads` heads of `d` numbers: `q [n, Q, heads · d]`, `k` and `v [n, K, heads · d]`
/// → `[n, Q, heads · d]`.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    if fusable(&[q, k, v]) {
        return Ok(q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention { heads })?);
    }
    composed(q, k, v, heads)
}

/// The same from candle's operations, for other devices and types.
fn composed(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (n, rows, width) = q.dims3()?;
    let dim = width / heads;
    let split = |x: &Tensor| x.reshape((n, x.dim(1)?, heads, dim))?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let scores = (q.matmul(&k.transpose(2, 3)?)? / (dim as f64).sqrt())?;
    let y = softmax_last_dim(&scores)?.matmul(&v)?;
    Ok(y.transpose(1, 2)?.contiguous()?.reshape((n, rows, width))?)
}

struct Attention {
    heads: usize,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let sizes = Sizes::new(lq.dims(), lk.dims(), lv.dims(), self.heads)?;
        let (q, k, v) = (elements(q, lq)?, elements(k, lk)?, elements(v, lv)?);
        let mut y = vec![0f32; q.len()];
        let results = sizes.each_head(|at| [sizes.head(q, k, at).forward(sizes.rows(v, sizes.keys, at))]);
        for (at, [result]) in results {
            sizes.scatter(&result, sizes.queries, at, &mut y);
        }
        Ok((CpuStorage::F32(y), lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let sizes = Sizes::new(q.dims(), k.dims(), v.dims(), self.heads)?;
        let grad = grad.contiguous()?;
        let slices = [q, k, v, &grad].map(Elements::of);
        let [q_values, k_values, v_values, grads] =
            [slices[0].get()?, slices[1].get()?, slices[2].get()?, slices[3].get()?];
        let [mut dq, mut dk, mut dv] = [q_values, k_values, v_values].map(|values| vec![0f32; values.len()]);
        let results = sizes.each_head(|at| {
            let (v, dy) = (sizes.rows(v_values, sizes.keys, at), sizes.rows(grads, sizes.queries, at));
            sizes.head(q_values, k_values, at).backward(v, dy)
        });
        for (at, [dq_head, dk_head, dv_head]) in results {
            sizes.scatter(&dq_head, sizes.queries, at, &mut dq);
            sizes.scatter(&dk_head, sizes.keys, at, &mut dk);
            sizes.scatter(&dv_head, sizes.keys, at, &mut dv);
        }
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.dims(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    n: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
}

/// Element of the batch and head.
type Place = (usize, usize);

impl Sizes {
    fn new(q: &[usize], k: &[usize], v: &[usize], heads: usize) -> CandleResult<Self> {
        match (q, k) {
            (&[n, queries, width], &[of, keys, same])
                if k == v && n == of && width == same && keys > 0 && heads > 0 && width % heads == 0 =>
            {
                Ok(Self { n, queries, keys, heads, dim: width / heads })
            }
            _ => bail!("attention of {heads} heads from {q:?} to {k:?} and {v:?}"),
        }
    }

    fn each_head<const N: usize>(&self, work: impl Fn(Place) -> [Rows; N] + Sync) -> Vec<(Place, [Rows; N])> {
        let places = (0..self.n * self.heads).into_par_iter();
        places.map(|i| (i / self.heads, i % self.heads)).map(|at| (at, work(at))).collect()
    }

    /// The rows of one head.
    fn rows(&self, x: &[f32], rows: usize, (n, head): Place) -> Rows {
        let width = self.heads * self.dim;
        let x = x[n * rows * width..][..rows * width].chunks_exact(width);
        let mut data = Vec::with_capacity(rows * self.dim);
        x.for_each(|row| data.extend_from_slice(&row[head * self.dim..][..self.dim]));
        Rows { data, width: self.dim }
    }

    fn scatter(&self, from: &Rows, rows: usize, (n, head): Place, to: &mut [f32]) {
        let width = self.heads * self.dim;
        let to = to[n * rows * width..][..rows * width].chunks_exact_mut(width);
        for (to, from) in to.zip(from.data.chunks_exact(self.dim)) {
            to[head * self.dim..][..self.dim].copy_from_slice(from);
        }
    }

    fn head(&self, q: &[f32], k: &[f32], at: Place) -> Head {
        let (q, k) = (self.rows(q, self.queries, at), self.rows(k, self.keys, at));
        let many_queries = self.queries > self.keys;
        let (near, far) = if many_queries { (k, q.transposed()) } else { (q, k.transposed()) };
        let scale = 1.0 / (self.dim as f32).sqrt();
        let mut scores = mix(&near, &far, scale);
        Arch::new().dispatch(Softmax { scores: &mut scores, across: many_queries });
        Head { near, far, probabilities: scores, many_queries, scale }
    }
}

/// Rows of equal width.
struct Rows {
    data: Vec<f32>,
    width: usize,
}

impl Rows {
    fn zeros(rows: usize, width: usize) -> Self {
        Self { data: vec![0f32; rows * width], width }
    }

    fn count(&self) -> usize {
        self.data.len() / self.width
    }

    fn each_mut(&mut self) -> ChunksExactMut<'_, f32> {
        self.data.chunks_exact_mut(self.width)
    }

    fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.width..][..self.width]
    }

    fn transposed(&self) -> Self {
        // So many rows at a time that what is written fills whole cache lines.
        const ROWS: usize = 16;
        let mut to = Self::zeros(self.width, self.count().max(1));
        for (block, rows) in self.data.chunks(ROWS * self.width).enumerate() {
            for (i, to) in to.each_mut().enumerate() {
                let column = rows.iter().skip(i).step_by(self.width);
                to[block * ROWS..].iter_mut().zip(column).for_each(|(to, value)| *to = *value);
            }
        }
        to
    }
}

/// One head: the side with fewer rows and the other one, whose rows are columns here.
struct Head {
    /// `[few, d]`
    near: Rows,
    /// `[d, many]`
    far: Rows,
    /// `[few, many]`
    probabilities: Rows,
    many_queries: bool,
    scale: f32,
}

impl Head {
    /// `v [K, d]` → `[Q, d]`
    fn forward(&self, v: Rows) -> Rows {
        if self.many_queries {
            mix(&v.transposed(), &self.probabilities, 1.0).transposed()
        } else {
            dots(&self.probabilities, &v.transposed())
        }
    }

    /// `v [K, d]` and the gradient `dy [Q, d]` of the result → the gradients of q, k and v.
    fn backward(&self, v: Rows, dy: Rows) -> [Rows; 3] {
        // What the near and the far side contribute to the gradient of the probabilities.
        let (near, far) = if self.many_queries { (v, dy) } else { (dy, v) };
        let far = far.transposed();
        let mut slopes = mix(&near, &far, 1.0);
        let dv = if self.many_queries {
            dots(&self.probabilities, &far)
        } else {
            mix(&near.transposed(), &self.probabilities, 1.0).transposed()
        };
        let across = self.many_queries;
        let (probabilities, scale) = (&self.probabilities, self.scale);
        Arch::new().dispatch(Slopes { probabilities, slopes: &mut slopes, across, scale });
        let near_gradient = dots(&slopes, &self.far);
        let far_gradient = mix(&self.near.transposed(), &slopes, 1.0).transposed();
        if self.many_queries { [far_gradient, near_gradient, dv] } else { [near_gradient, far_gradient, dv] }
    }
}

/// `scale · factors · rows`: `factors [r, c]`, `rows [c, l]` → `[r, l]`.
fn mix(factors: &Rows, rows: &Rows, scale: f32) -> Rows {
    let mut out = Rows::zeros(factors.count(), rows.width);
    Arch::new().dispatch(Mix { factors, rows, scale, out: &mut out });
    out
}

struct Mix<'a> {
    factors: &'a Rows,
    rows: &'a Rows,
    scale: f32,
    out: &'a mut Rows,
}

impl WithSimd for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        // Columns that stay in the first cache.
        const COLUMNS: usize = 512;
        let width = self.rows.width;
        for (out, factors) in self.out.each_mut().zip(self.factors.data.chunks_exact(self.factors.width)) {
            for (part, out) in out.chunks_mut(COLUMNS).enumerate() {
                for (row, factor) in factors.iter().enumerate() {
                    let factor = factor * self.scale;
                    let row = &self.rows.data[row * width + part * COLUMNS..][..out.len()];
                    out.iter_mut().zip(row).for_each(|(out, value)| *out += factor * value);
                }
            }
        }
    }
}

/// `a · bᵀ`: `a [r, l]`, `b [c, l]` → `[r, c]`.
fn dots(a: &Rows, b: &Rows) -> Rows {
    let mut out = Rows::zeros(a.count(), b.count());
    Arch::new().dispatch(Dots { a, b, out: &mut out });
    out
}

struct Dots<'a> {
    a: &'a Rows,
    b: &'a Rows,
    out: &'a mut Rows,
}

impl WithSimd for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (r, out) in self.out.each_mut().enumerate() {
            for (c, out) in out.iter_mut().enumerate() {
                *out = dot(self.a.row(r), self.b.row(c));
            }
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 32;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// Scores become probabilities, over rows or, `across` them, over columns.
struct Softmax<'a> {
    scores: &'a mut Rows,
    across: bool,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        if !self.across {
            for row in self.scores.each_mut() {
                let most = row.iter().fold(f32::NEG_INFINITY, |most, &score| most.max(score));
                row.iter_mut().for_each(|score| *score = exp(*score - most));
                let norm = 1.0 / row.iter().sum::<f32>();
                row.iter_mut().for_each(|score| *score *= norm);
            }
            return;
        }
        let width = self.scores.width;
        let (mut most, mut sum) = (vec![f32::NEG_INFINITY; width], vec![0f32; width]);
        for row in self.scores.each_mut() {
            most.iter_mut().zip(row).for_each(|(most, score)| *most = most.max(*score));
        }
        for row in self.scores.each_mut() {
            for ((score, most), sum) in row.iter_mut().zip(&most).zip(&mut sum) {
                *score = exp(*score - most);
                *sum += *score;
            }
        }
        for row in self.scores.each_mut() {
            row.iter_mut().zip(&sum).for_each(|(score, sum)| *score /= sum);
        }
    }
}

/// Gradients of probabilities become those of unscaled scores.
struct Slopes<'a> {
    probabilities: &'a Rows,
    slopes: &'a mut Rows,
    across: bool,
    scale: f32,
}

impl WithSimd for Slopes<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let rows = self.probabilities.data.chunks_exact(self.probabilities.width);
        if !self.across {
            for (p, slopes) in rows.zip(self.slopes.each_mut()) {
                let mean = dot(p, slopes);
                slopes.iter_mut().zip(p).for_each(|(slope, p)| *slope = self.scale * p * (*slope - mean));
            }
            return;
        }
        let mut mean = vec![0f32; self.slopes.width];
        for (p, slopes) in rows.clone().zip(self.slopes.each_mut()) {
            mean.iter_mut().zip(p).zip(slopes).for_each(|((mean, p), slope)| *mean += p * *slope);
        }
        for (p, slopes) in rows.zip(self.slopes.each_mut()) {
            let terms = slopes.iter_mut().zip(p).zip(&mean);
            terms.for_each(|((slope, p), mean)| *slope = self.scale * p * (*slope - mean));
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::nn::gradcheck::{assert_close, check, random};

    #[test]
    fn equals_the_composed_attention_with_gradients() {
        // Many keys, many queries, as many of both, one key; more columns than one block.
        for (queries, keys) in [(9, 1100), (1100, 9), (7, 7), (5, 1)] {
            let vars = [(queries, 1), (keys, 2), (keys, 3)]
                .map(|(rows, seed)| Var::from_tensor(&random(&[2, rows, 12], seed)).unwrap());
            let run = |y: Tensor| {
                let mix = random(y.dims(), 4);
                let mut grads = (&y * &mix).unwrap().sum_all().unwrap().backward().unwrap();
                (y, vars.each_ref().map(|var| grads.remove(var).unwrap()))
            };
            let [q, k, v] = vars.each_ref().map(|var| var.as_tensor());
            let fused = run(attention(q, k, v, 3).unwrap());
            let plain = run(composed(q, k, v, 3).unwrap());
            assert_close(&fused.0, &plain.0, 1e-5);
            for (fused, plain) in fused.1.iter().zip(&plain.1) {
                assert_close(fused, plain, 2e-5);
            }
        }
    }

    #[test]
    fn gradients() {
        for (queries, keys) in [(2, 5), (5, 2)] {
            let inputs = [(queries, 1), (keys, 2), (keys, 3)].map(|(rows, seed)| random(&[2, rows, 4], seed));
            check(&inputs, |t| attention(&t[0], &t[1], &t[2], 2));
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let x = random(&[1, 3, 4], 1);
        assert!(attention(&x, &x, &random(&[1, 2, 4], 2), 2).is_err());
        assert!(attention(&x, &x, &x, 3).is_err());
    }
}
