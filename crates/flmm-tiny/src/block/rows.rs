//! What is done to rows of numbers between products, with its gradients.

use flmm::nn::exp;
use pulp::Arch;

/// Runs `work` with the widest vectors the processor has; loops in it, and functions that are inlined, use them.
#[inline(always)]
pub(crate) fn wide<R>(work: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(work)
}

/// Numbers that are summed side by side: a sum in one chain cannot be vectorised.
const LANES: usize = 16;

/// `Σ f(a, b)` of the pairs of two slices of the same length.
#[inline(always)]
pub(crate) fn sum_of(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += f(a[i], b[i]);
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[i] += f(*a, *b);
    }
    sums.iter().sum()
}

/// `Σ a · b`
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, |a, b| a * b)
}

#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; LANES];
    let (lines, rest) = x.as_chunks::<LANES>();
    for line in lines {
        for i in 0..LANES {
            most[i] = if line[i] > most[i] { line[i] } else { most[i] };
        }
    }
    rest.iter().chain(&most).fold(f32::NEG_INFINITY, |most, x| most.max(*x))
}

/// `y += factor · x`
#[inline(always)]
pub(crate) fn add_times(y: &mut [f32], factor: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

/// `softmax(scale · x)` in place, over two pieces together.
#[inline(always)]
pub(crate) fn softmax(scale: f32, pieces: [&mut [f32]; 2]) {
    let [a, b] = pieces;
    let shift = largest(a).max(largest(b)) * scale;
    let mut sum = 0.0;
    for piece in [&mut *a, &mut *b] {
        piece.iter_mut().for_each(|x| *x = exp(*x * scale - shift));
        sum += sum_of(piece, piece, |x, _| x);
    }
    let norm = 1.0 / sum;
    for piece in [a, b] {
        piece.iter_mut().for_each(|x| *x *= norm);
    }
}

/// Turns the gradients of probabilities into those of the scores, over two pieces together.
#[inline(always)]
pub(crate) fn softmax_backward(scale: f32, probabilities: [&[f32]; 2], gradients: [&mut [f32]; 2]) {
    let along: f32 = probabilities.iter().zip(&gradients).map(|(p, g)| dot(p, g)).sum();
    for (p, g) in probabilities.into_iter().zip(gradients) {
        g.iter_mut().zip(p).for_each(|(g, p)| *g = scale * p * (*g - along));
    }
}

/// Reciprocal root mean square of a row.
#[inline(always)]
fn rms_scale(row: &[f32], eps: f32) -> f32 {
    1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt()
}

/// Root-mean-square norm of the rows of `x`, times `weight`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    wide(|| {
        for x in x.chunks_exact(weight.len()) {
            let scale = rms_scale(x, eps);
            y.extend(x.iter().zip(weight).map(|(x, w)| x * scale * w));
        }
    });
    y
}

/// Adds to `dx` and `dw` the gradients of [`rms_norm`], from that of its result, `dy`.
pub(crate) fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let size = weight.len();
    let mut weighted = vec![0f32; size];
    wide(|| {
        let rows = x.chunks_exact(size).zip(dy.chunks_exact(size)).zip(dx.chunks_exact_mut(size));
        for ((x, dy), dx) in rows {
            let scale = rms_scale(x, eps);
            for i in 0..size {
                dw[i] += dy[i] * x[i] * scale;
                weighted[i] = dy[i] * weight[i];
            }
            let along = dot(&weighted, x) * scale * scale / size as f32;
            for i in 0..size {
                dx[i] += scale * (weighted[i] - x[i] * along);
            }
        }
    });
}

#[inline(always)]
fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `silu(gate) · up` of rows that hold `width` numbers of the gate and as many of `up`.
pub(crate) fn silu_mul(gate_up: &[f32], width: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(gate_up.len() / 2);
    wide(|| {
        for x in gate_up.chunks_exact(2 * width) {
            let (gate, up) = x.split_at(width);
            y.extend(gate.iter().zip(up).map(|(gate, up)| gate * logistic(*gate) * up));
        }
    });
    y
}

/// Turns `hidden`, the gradient of what [`silu_mul`] made, into that itself, and returns the gradient of `gate_up`.
pub(crate) fn silu_mul_backward(gate_up: &[f32], width: usize, hidden: &mut [f32]) -> Vec<f32> {
    let mut gradient = vec![0f32; gate_up.len()];
    wide(|| {
        let rows = hidden.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width));
        for ((hidden, x), gradient) in rows.zip(gradient.chunks_exact_mut(2 * width)) {
            let ((gate, up), (d_gate, d_up)) = (x.split_at(width), gradient.split_at_mut(width));
            for i in 0..width {
                let (dy, sigmoid) = (hidden[i], logistic(gate[i]));
                let silu = gate[i] * sigmoid;
                d_gate[i] = dy * up[i] * (sigmoid + silu * (1.0 - sigmoid));
                d_up[i] = dy * silu;
                hidden[i] = silu * up[i];
            }
        }
    });
    gradient
}
