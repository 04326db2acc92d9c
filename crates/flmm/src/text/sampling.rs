//! From logits to the next token.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Chooses token ids. The same seed and logits give the same ids on every platform.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// `None`: always the first maximum.
    random: Option<Random>,
}

#[derive(Debug, Clone)]
struct Random {
    temperature: f64,
    top_p: f64,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// The token of the largest logit; of several, the first.
    pub fn greedy() -> Self {
        Self { random: None }
    }

    /// Draws from `softmax(logits / temperature)`, restricted to the fewest most likely tokens whose
    /// probabilities reach `top_p`.
    ///
    /// A temperature of zero (or below, or not a number) is greedy; `top_p` of one (or above, or not a number)
    /// restricts nothing, of zero or below leaves one token.
    pub fn seeded(temperature: f64, top_p: f64, seed: u64) -> Self {
        if temperature.is_nan() || temperature <= 0.0 {
            return Self::greedy();
        }
        let top_p = if top_p.is_nan() { 1.0 } else { top_p };
        Self { random: Some(Random { temperature, top_p, rng: ChaCha8Rng::seed_from_u64(seed) }) }
    }

    /// The next token's id for logits `[vocabulary]`.
    ///
    /// A logit that is not a number is never chosen. Without any usable logit the id is 0.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let best = first_maximum(logits);
        let Some(random) = &mut self.random else { return best as u32 };
        let Some(&most) = logits.get(best) else { return 0 };
        // An infinite maximum is certain, minus infinity means that nothing is usable.
        if !most.is_finite() {
            return best as u32;
        }
        random.draw(logits, f64::from(most)) as u32
    }
}

impl Random {
    fn draw(&mut self, logits: &[f32], most: f64) -> usize {
        let weight = |logit: f32| exp((f64::from(logit) - most) / self.temperature);
        let mut weights: Vec<(f64, usize)> = logits
            .iter()
            .enumerate()
            .filter(|(_, logit)| !logit.is_nan())
            .map(|(id, &logit)| (weight(logit), id))
            .filter(|(weight, _)| *weight > 0.0)
            .collect();
        if self.top_p < 1.0 {
            weights.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let reached = self.top_p * weights.iter().map(|(w, _)| w).sum::<f64>();
            let mut sum = 0.0;
            let kept = weights.iter().take_while(|(w, _)| {
                let keep = sum < reached;
                sum += w;
                keep
            });
            let kept = kept.count().max(1);
            weights.truncate(kept);
        }
        let total: f64 = weights.iter().map(|(w, _)| w).sum();
        // 53 random bits: uniform in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * total;
        for &(weight, id) in &weights {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding can leave a rest behind the last token.
        weights.last().map_or(0, |&(_, id)| id)
    }
}

/// Index of the first of the largest values; those that are not numbers do not count.
fn first_maximum(logits: &[f32]) -> usize {
    let mut best = 0;
    let mut most = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > most {
            (best, most) = (id, logit);
        }
    }
    best
}

/// e^x for x ≤ 0 from sums and products alone: the mathematical library's result differs between platforms in
/// the last bit, which could change a draw.
fn exp(x: f64) -> f64 {
    // ln 2 in two parts; the first has so few digits that its product with k is exact.
    const LN2_HIGH: f64 = f64::from_bits(0x3fe62e42fee00000);
    const LN2_LOW: f64 = f64::from_bits(0x3dea39ef35793c76);
    if x < -700.0 {
        return 0.0;
    }
    let k = (x * std::f64::consts::LOG2_E).round();
    let r = (x - k * LN2_HIGH) - k * LN2_LOW;
    // |r| ≤ ln 2 / 2: fourteen terms of the series are exact to the last bits.
    let series = (1..=14).rev().fold(1.0, |sum, n| 1.0 + sum * r / f64::from(n));
    let power = f64::from_bits(((1023 + k as i64) as u64) << 52);
    series * power
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn greedy_takes_the_first_maximum_and_never_a_nan() {
        let mut sampler = Sampler::greedy();
        assert_eq!(sampler.sample(&[0.0, 3.0, 3.0]), 1);
        assert_eq!(sampler.sample(&[f32::NAN, -3.0, f32::NAN]), 1);
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -3.0]), 1);
        assert_eq!(sampler.sample(&[f32::NAN]), 0);
        assert_eq!(sampler.sample(&[]), 0);
        assert_eq!(Sampler::seeded(0.0, 1.0, 1).sample(&[0.0, 3.0, 2.0]), 1);
        assert_eq!(Sampler::seeded(f64::NAN, 1.0, 1).sample(&[0.0, 3.0, 2.0]), 1);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0f32, 2f32.ln(), 5f32.ln(), f32::NAN];
        let mut sampler = Sampler::seeded(1.0, 1.0, 7);
        let mut counts = [0u32; 4];
        for _ in 0..8000 {
            counts[sampler.sample(&logits) as usize] += 1;
        }
        for (count, expected) in counts.iter().zip([1000.0, 2000.0, 5000.0, 0.0]) {
            assert!((f64::from(*count) - expected).abs() < 200.0, "{counts:?}");
        }
    }

    #[test]
    fn the_sequence_of_a_seed_is_fixed() {
        // Recorded once: a change here changes every seeded answer.
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37) % 50) as f32 / 10.0).collect();
        let mut sampler = Sampler::seeded(0.7, 0.9, 42);
        let ids: Vec<u32> = (0..8).map(|_| sampler.sample(&logits)).collect();
        let mut again = Sampler::seeded(0.7, 0.9, 42);
        assert_eq!(ids, (0..8).map(|_| again.sample(&logits)).collect::<Vec<_>>());
        assert_eq!(ids, RECORDED);
    }

    const RECORDED: [u32; 8] = [39, 5, 8, 12, 31, 4, 31, 20];

    #[test]
    fn own_exponential_is_accurate() {
        for i in 0..7000 {
            let x = -f64::from(i) / 10.0 * 0.99;
            let relative = (exp(x) - x.exp()) / x.exp();
            assert!(relative.abs() < 1e-15, "{x}: {relative}");
        }
        assert_eq!((exp(0.0), exp(-1e9)), (1.0, 0.0));
    }

    proptest! {
        #[test]
        fn draws_lie_in_the_nucleus(
            logits in prop::collection::vec(prop_oneof![9 => -20f32..20.0, 1 => Just(f32::NAN)], 1..60),
            temperature in 0.05f64..4.0, top_p in -0.1f64..1.2, seed in any::<u64>(),
        ) {
            prop_assume!(logits.iter().any(|l| !l.is_nan()));
            let id = Sampler::seeded(temperature, top_p, seed).sample(&logits) as usize;
            prop_assert!(!logits[id].is_nan());
            // The tokens that are strictly more likely do not reach top_p yet.
            let p: Vec<f64> = logits.iter().map(|&l| if l.is_nan() { 0.0 } else { (f64::from(l) / temperature).exp() }).collect();
            let total: f64 = p.iter().sum();
            let above: f64 = p.iter().filter(|q| **q > p[id]).sum::<f64>() / total;
            prop_assert!(above < top_p.max(0.0) + 1e-9 || above == 0.0);
        }

        #[test]
        fn no_logits_panic(bits in prop::collection::vec(any::<u32>(), 0..20), temperature in any::<f64>(), top_p in any::<f64>()) {
            let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let id = Sampler::seeded(temperature, top_p, 3).sample(&logits) as usize;
            prop_assert!(id < logits.len().max(1));
        }
    }
}
