//! Random choices whose results stay the same across platforms and library versions.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A stream of random choices.
pub(super) struct Dice(ChaCha8Rng);

impl Dice {
    /// The stream of a 32-byte key and a stream number: different keys or numbers give unrelated streams.
    pub(super) fn new(key: [u8; 32], stream: u64) -> Self {
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(stream);
        Self(rng)
    }

    /// Uniform in `0..n`; `n` must be positive. The bias of at most n / 2^32 does not matter here.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    /// Uniform in `[0, 1)`.
    pub(super) fn unit(&mut self) -> f64 {
        f64::from(self.0.next_u32()) / 4_294_967_296.0
    }

    /// Uniform in `[low, high)`.
    pub(super) fn range(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// True with this probability.
    pub(super) fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// One of the items, which must not be empty.
    pub(super) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// An index drawn with these weights.
    pub(super) fn weighted(&mut self, weights: &[f64]) -> usize {
        let mut left = self.unit() * weights.iter().sum::<f64>();
        for (i, weight) in weights.iter().enumerate() {
            left -= weight;
            if left < 0.0 {
                return i;
            }
        }
        weights.len() - 1
    }

    /// Fisher-Yates.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Sine by its Taylor series with plain IEEE operations, so that every platform paints the same bytes; the
/// platform's own `sin` may differ in the last bit. Accurate to 1e-9 for any moderate angle in radians.
pub(super) fn sin(angle: f64) -> f64 {
    use std::f64::consts::{PI, TAU};
    let mut x = angle - (angle / TAU).floor() * TAU;
    if x > PI {
        x -= TAU;
    }
    if x > PI / 2.0 {
        x = PI - x;
    } else if x < -PI / 2.0 {
        x = -PI - x;
    }
    let s = x * x;
    let mut term = x;
    let mut sum = x;
    for k in 1..10 {
        let k = f64::from(k);
        term *= -s / ((2.0 * k) * (2.0 * k + 1.0));
        sum += term;
    }
    sum
}

/// Cosine, see [`sin`].
pub(super) fn cos(angle: f64) -> f64 {
    sin(angle + std::f64::consts::FRAC_PI_2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sine_is_accurate() {
        for i in -400..400 {
            let x = f64::from(i) * 0.05;
            assert!((sin(x) - x.sin()).abs() < 1e-9, "sin({x})");
            assert!((cos(x) - x.cos()).abs() < 1e-9, "cos({x})");
        }
    }

    #[test]
    fn weights_and_ranges_are_respected() {
        let mut dice = Dice::new([7; 32], 1);
        let mut counts = [0; 3];
        for _ in 0..3000 {
            counts[dice.weighted(&[1.0, 0.0, 2.0])] += 1;
            assert!(dice.below(5) < 5);
            assert!((2.0..3.0).contains(&dice.range(2.0, 3.0)));
        }
        assert_eq!(counts[1], 0);
        assert!((800..1200).contains(&counts[0]), "{counts:?}");
    }
}
