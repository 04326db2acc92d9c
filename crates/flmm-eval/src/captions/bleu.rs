//! BLEU-1 to BLEU-4 of a whole split.

use std::collections::BTreeMap;

use super::Words;
use super::ngrams::{LONGEST, count};

/// Keep divisions by zero away, with the values of the public tool.
const SMALL: f64 = 1e-9;
const TINY: f64 = 1e-15;

/// BLEU with up to 1, 2, 3 and 4 words, counts summed over the pictures. The reference length of a picture is the one
/// closest to the candidate's (with a single picture: the mean, as the public tool does).
pub(crate) fn bleu(pictures: &[Words]) -> [f64; LONGEST] {
    let (mut correct, mut guessed) = ([0usize; LONGEST], [0usize; LONGEST]);
    let (mut length, mut wanted) = (0f64, 0f64);
    for picture in pictures {
        let own = picture.candidate.len();
        let mut most: BTreeMap<&[String], usize> = BTreeMap::new();
        for counts in picture.references.iter().map(|words| count(words)) {
            for (run, times) in counts {
                let entry = most.entry(run).or_default();
                *entry = times.max(*entry);
            }
        }
        for (run, times) in count(&picture.candidate) {
            correct[run.len() - 1] += times.min(most.get(run).copied().unwrap_or(0));
        }
        for (n, guessed) in guessed.iter_mut().enumerate() {
            *guessed += own.saturating_sub(n);
        }
        let lengths = || picture.references.iter().map(Vec::len);
        length += own as f64;
        wanted += match pictures.len() {
            1 => lengths().sum::<usize>() as f64 / picture.references.len().max(1) as f64,
            _ => lengths().min_by_key(|&l| (l.abs_diff(own), l)).unwrap_or(0) as f64,
        };
    }
    let ratio = (length + TINY) / (wanted + SMALL);
    let penalty = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
    let mut product = 1.0;
    std::array::from_fn(|n| {
        product *= (correct[n] as f64 + TINY) / (guessed[n] as f64 + SMALL);
        product.powf(1.0 / (n + 1) as f64) * penalty
    })
}
