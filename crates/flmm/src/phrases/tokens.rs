//! Tokens as texts, and phrases as tokens.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::text::tokenizer::Tokenizer;

/// The text of `ids`, special tokens included, and the characters `[start, end)` that each token adds to it.
///
/// A token that ends within a character adds nothing; the one that completes the character adds all of it.
pub fn token_offsets(tokenizer: &Tokenizer, ids: &[u32]) -> (String, Vec<(usize, usize)>) {
    let text = tokenizer.decode(ids, false);
    let total = text.chars().count();
    let mut start = 0;
    let offsets = (1..=ids.len()).map(|count| {
        let end = if count == ids.len() {
            total
        } else {
            complete(&tokenizer.decode(&ids[..count], false)).chars().count()
        };
        let end = end.clamp(start, total);
        (std::mem::replace(&mut start, end), end)
    });
    (text, offsets.collect())
}

/// What each token adds to the text of `ids`: words as they are read, never entries of the vocabulary, whose marks for
/// blanks and bytes would count as letters ([`select_keywords`](super::select_keywords) takes these texts).
pub fn token_texts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let (text, offsets) = token_offsets(tokenizer, ids);
    cut(&text.chars().collect::<Vec<_>>(), &offsets)
}

/// The characters of every range.
pub(crate) fn cut(chars: &[char], offsets: &[(usize, usize)]) -> Vec<String> {
    offsets.iter().map(|&(start, end)| chars[start..end].iter().collect()).collect()
}

/// `text` without a character at its end that more tokens may complete.
fn complete(text: &str) -> &str {
    text.trim_end_matches('\u{fffd}')
}

/// The tokens of every phrase, from its first to its last one, in the order of the phrases' numbers. `mask_ids` has the
/// number of each token's phrase, −1 where it belongs to none.
pub fn true_ranges(mask_ids: &[i32]) -> Vec<Range<usize>> {
    let mut ranges: BTreeMap<i32, Range<usize>> = BTreeMap::new();
    for (token, &phrase) in mask_ids.iter().enumerate().filter(|(_, phrase)| **phrase >= 0) {
        ranges.entry(phrase).or_insert(token..token).end = token + 1;
    }
    ranges.into_values().collect()
}

/// Average precision of scores with their labels: Σ (recall step · precision) over falling thresholds, 0 to 1. Equal scores
/// are one step, so their order does not matter. 0 without a positive.
pub fn average_precision(labelled: &[(f32, bool)]) -> f64 {
    let mut sorted = labelled.to_vec();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
    let positives = sorted.iter().filter(|(_, positive)| *positive).count();
    let (mut sum, mut seen, mut right) = (0.0, 0usize, 0usize);
    for step in sorted.chunk_by(|a, b| a.0 == b.0) {
        let new = step.iter().filter(|(_, positive)| *positive).count();
        (seen, right) = (seen + step.len(), right + new);
        sum += new as f64 * right as f64 / seen as f64;
    }
    sum / positives.max(1) as f64
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges are what is tested")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Result;
    use crate::phrases::{LAMBDA, select_keywords};

    #[test]
    fn neighbouring_phrases_stay_apart() {
        assert_eq!(true_ranges(&[-1, 0, 0, 1, -1, 2]), [1..3, 3..4, 5..6]);
        assert_eq!(true_ranges(&[i32::MAX, -1, i32::MAX]), [0..3]);
        assert!(true_ranges(&[-1, i32::MIN]).is_empty());
    }

    #[test]
    fn equal_scores_are_one_step() {
        assert_eq!(average_precision(&[(0.9, true), (0.8, false), (0.7, true)]), (1.0 + 2.0 / 3.0) / 2.0);
        assert_eq!(average_precision(&[(0.5, true), (0.5, false)]), 0.5);
        assert_eq!(average_precision(&[(0.5, false), (0.5, true)]), 0.5);
        assert_eq!(average_precision(&[(0.5, false)]), 0.0);
    }

    /// A vocabulary writes a blank as a letter-like mark; read as text it is a blank, and does not begin a phrase.
    #[test]
    fn texts_are_decoded_not_looked_up() -> Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/flmm-tiny/lmm");
        let tokenizer = Tokenizer::load(folder)?;
        let ids = tokenizer.encode("a dog, 😀 a cat", false)?;
        let texts = token_texts(&tokenizer, &ids);
        assert_eq!((texts.len(), texts.concat()), (ids.len(), tokenizer.decode(&ids, false)));
        let (text, offsets) = token_offsets(&tokenizer, &ids);
        let comma = texts.iter().position(|text| text.trim() == ",").unwrap_or(usize::MAX);
        assert_eq!(text.chars().nth(offsets[comma].1 - 1), Some(','));
        // Every token is above the threshold: punctuation at the ends is trimmed, also where it carries a blank.
        let probs: Vec<f32> = (0..ids.len()).map(|at| if at > comma { 0.0 } else { 0.9 }).collect();
        assert_eq!(select_keywords(&probs, &texts, LAMBDA), [0..comma]);
        Ok(())
    }
}
