//! CIDEr-D: tf-idf weighted n-gram similarity with clipping and a length penalty.

use std::collections::BTreeMap;

use super::ngrams::{Counts, LONGEST, count};
use super::{Scored, Words};

/// Width of the Gaussian penalty on the difference of lengths.
const SIGMA: f64 = 6.0;

/// A sentence as tf-idf weights.
struct Weighted<'a> {
    weights: BTreeMap<&'a [String], f64>,
    norms: [f64; LONGEST],
    /// Number of two-word runs: the length that the penalty looks at.
    pairs: usize,
}

/// CIDEr-D of every picture, 0 to 10, and the mean. Document frequencies: the number of *pictures* whose references
/// contain the n-gram.
pub(crate) fn cider(pictures: &[Words]) -> Scored {
    let references: Vec<Vec<Counts>> =
        pictures.iter().map(|p| p.references.iter().map(|words| count(words)).collect()).collect();
    let mut frequency: BTreeMap<&[String], usize> = BTreeMap::new();
    for counts in &references {
        let here: std::collections::BTreeSet<&[String]> =
            counts.iter().flat_map(|c| c.keys().copied()).collect();
        for run in here {
            *frequency.entry(run).or_default() += 1;
        }
    }
    let log_pictures = (pictures.len() as f64).ln();
    let idf = |run: &[String]| log_pictures - (frequency.get(run).copied().unwrap_or(0).max(1) as f64).ln();
    let per_image = pictures.iter().zip(&references).map(|(picture, references)| {
        let counts = count(&picture.candidate);
        let candidate = weigh(&counts, idf);
        let total: f64 = references.iter().map(|counts| similarity(&candidate, &weigh(counts, idf))).sum();
        10.0 * total / references.len() as f64
    });
    Scored::mean_of(per_image.collect())
}

fn weigh<'a>(counts: &Counts<'a>, idf: impl Fn(&[String]) -> f64) -> Weighted<'a> {
    let mut squares = [0f64; LONGEST];
    let mut pairs = 0;
    let mut weights = BTreeMap::new();
    for (&run, &times) in counts {
        let weight = times as f64 * idf(run);
        squares[run.len() - 1] += weight * weight;
        pairs += if run.len() == 2 { times } else { 0 };
        weights.insert(run, weight);
    }
    Weighted { weights, norms: squares.map(f64::sqrt), pairs }
}

/// Mean over the n-gram lengths of the clipped cosine, with the length penalty.
fn similarity(candidate: &Weighted, reference: &Weighted) -> f64 {
    let mut products = [0f64; LONGEST];
    for (run, &weight) in &candidate.weights {
        let true_weight = reference.weights.get(run).copied().unwrap_or(0.0);
        products[run.len() - 1] += weight.min(true_weight) * true_weight;
    }
    let difference = candidate.pairs as f64 - reference.pairs as f64;
    let penalty = (-difference * difference / (2.0 * SIGMA * SIGMA)).exp();
    let cosine = |n: usize| {
        let norm = candidate.norms[n] * reference.norms[n];
        if norm == 0.0 { products[n] } else { products[n] / norm }
    };
    (0..LONGEST).map(|n| cosine(n) * penalty).sum::<f64>() / LONGEST as f64
}
