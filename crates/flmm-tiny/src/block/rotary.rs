//! Rotary positions of the rows of a batch.

use super::rows::wide;

/// Cosines and sines of every row's angles, `[rows, half]`.
#[derive(Debug)]
pub(crate) struct Rotary {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rotary {
    /// For rows at `positions` and heads of `head` numbers, with frequencies `theta^(−2i / head)`.
    pub(crate) fn new(positions: &[u32], head: usize, theta: f64) -> Self {
        let half = head / 2;
        let frequency = |i: usize| 1.0 / (theta as f32).powf((2 * i) as f32 / head as f32);
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let most = positions.iter().max().map_or(0, |most| most + 1);
        // Rows share positions.
        let angles = (0..most).flat_map(|at| frequencies.iter().map(move |f| (at as f32 * f).sin_cos()));
        let (sines, cosines): (Vec<f32>, Vec<f32>) = angles.unzip();
        let of_rows = |table: &[f32]| {
            positions.iter().flat_map(|at| table[*at as usize * half..][..half].iter().copied()).collect()
        };
        Self { cos: of_rows(&cosines), sin: of_rows(&sines), half }
    }

    /// Rotates `heads` heads at the beginning of every row of `x [rows, width]`, back if `back`.
    pub(crate) fn rotate(&self, x: &mut [f32], width: usize, heads: usize, back: bool) {
        let (half, sign) = (self.half, if back { -1.0 } else { 1.0 });
        wide(|| {
            let angles = self.cos.chunks_exact(half).zip(self.sin.chunks_exact(half));
            for (x, (cos, sin)) in x.chunks_exact_mut(width).zip(angles) {
                for head in x.chunks_exact_mut(2 * half).take(heads) {
                    let (a, b) = head.split_at_mut(half);
                    for i in 0..half {
                        let (cos, sin) = (cos[i], sign * sin[i]);
                        (a[i], b[i]) = (a[i] * cos - b[i] * sin, b[i] * cos + a[i] * sin);
                    }
                }
            }
        });
    }
}
