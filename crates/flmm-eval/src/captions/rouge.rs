//! ROUGE-L: longest common subsequence.

use super::{Scored, Words};

/// Weight of recall over precision.
const BETA: f64 = 1.2;

/// ROUGE-L of every picture and the mean. Precision and recall are each the best over the references.
pub(crate) fn rouge_l(pictures: &[Words]) -> Scored {
    let one = |picture: &Words| {
        // An empty sentence counts as one (empty) word, as in the public tool.
        let share = |common: usize, of: usize| common as f64 / of.max(1) as f64;
        let (mut precision, mut recall) = (0f64, 0f64);
        for reference in &picture.references {
            let common = match picture.candidate.is_empty() && reference.is_empty() {
                true => 1,
                false => common_subsequence(&picture.candidate, reference),
            };
            precision = precision.max(share(common, picture.candidate.len()));
            recall = recall.max(share(common, reference.len()));
        }
        let square = BETA * BETA;
        match precision > 0.0 && recall > 0.0 {
            true => (1.0 + square) * precision * recall / (recall + square * precision),
            false => 0.0,
        }
    };
    Scored::mean_of(pictures.iter().map(one).collect())
}

/// Length of the longest common subsequence.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (i, other) in b.iter().enumerate() {
            let above = row[i + 1];
            row[i + 1] = if word == other { diagonal + 1 } else { above.max(row[i]) };
            diagonal = above;
        }
    }
    row[b.len()]
}
